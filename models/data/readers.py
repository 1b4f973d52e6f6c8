"""Reads npz, csv, parquet and .ts files: the same content gives the same `Sequences`, whatever the format."""

from __future__ import annotations

import csv
import zipfile
import zlib
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path

import numpy as np

from hpo.models.data.sequences import DataError, Raw, Sequences, raw_arrays, to_sequences
from hpo.models.data.tables import Columns, read_csv, read_parquet
from hpo.models.data.ts import read_ts

# the arrays of an npz file, and names by which they are often called
_NPZ = {"x": "X", "y": "y", "label": "y", "target": "y", "lengths": "lengths", "groups": "groups"}


def _read_npz(path: Path) -> Raw:
    """npz: X (N, T, F) or (N, T); optional y, lengths and groups, each (N,)."""
    if not zipfile.is_zipfile(path):
        raise DataError(f"{path} is empty or not an npz file: write it with numpy.savez")
    try:
        with np.load(path, allow_pickle=False) as file:
            found = list(file.files)
            arrays = {name: file[name] for name in _NPZ.values() if name in found}
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise DataError(f"{path} is damaged: {error}") from None
    except ValueError as error:
        way_out = "save labels as a str array, y=numpy.array(labels, dtype=str), and X as a float array"
        raise DataError(f"{path}: {error}; Python objects are never loaded: {way_out}") from None
    for name in set(found) - set(arrays):
        for meant in (_NPZ[close] for close in get_close_matches(name.lower(), _NPZ, 1)):
            if meant not in arrays:
                raise DataError(f"{path}: unknown array {name!r}; if it is {meant!r}, call it so")
    if "X" not in arrays:
        raise DataError(f"{path} has no array 'X'; it has {', '.join(found) or 'none'}")
    return raw_arrays(str(path), arrays["X"], arrays.get("y"), arrays.get("lengths"), arrays.get("groups"))


READERS: dict[str, Callable[[Path, Columns], Raw]] = {  # by suffix; the formats without columns need no names of them
    ".npz": lambda path, _: _read_npz(path),
    ".csv": read_csv,
    ".parquet": read_parquet,
    ".ts": lambda path, _: read_ts(path),
}


def read(
    path: str | Path,
    *,
    label: str = "label",
    id: str = "id",
    step: str = "step",
    group: str = "group",
    classes: tuple[str, ...] | None = None,
    labeled: bool | None = None,
    features: tuple[str, ...] | None = None,
) -> Sequences:
    """Read one file; its suffix says how (`READERS`).

    `label`, `id`, `step` and `group` name columns of csv and parquet files. A csv file with both an id and
    a step column is in long form (one row a step), else in wide form (one univariate sequence a row; the
    names of the step columns end in numbers, as in t0, t1). Rows of the long form may stand in any order.

    `classes` and `features` are those of the training data: labels are encoded with these classes, and the
    columns of these features are read in this order (npz, .ts and wide csv name none: only their number is
    checked). `labeled`: True demands labels, and the group column if it is named; False ignores labels; None
    takes both where they are.

    Raises DataError.
    """
    path = Path(path)
    if path.suffix.lower() not in READERS:
        raise DataError(f"{path}: unknown suffix {path.suffix!r}; known are {', '.join(READERS)}")
    try:
        path.open("rb").close()
        raw = READERS[path.suffix.lower()](path, Columns(label, id, step, group, features, labeled))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is not a text file in UTF-8: {error}") from None
    return to_sequences(raw, classes, labeled, features)
