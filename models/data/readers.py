"""Reads npz, csv, parquet and .ts files, data frames and arrays: the same content gives the same `Sequences`."""

from __future__ import annotations

import gzip
import zipfile
import zlib
from collections.abc import Callable, Collection, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np

from hpo.models.data.sequences import DataError, Raw, Sequences, raw_arrays, to_sequences
from hpo.models.data.tables import Columns, is_frame, read_csv, read_frame, read_parquet
from hpo.models.data.ts import ARFF, read_ts

ARRAYS = ("X", "y", "lengths", "groups")  # of an npz file
# their names, and others by which they often go
_OFTEN = {"x": "X", "y": "y", "label": "y", "target": "y", "lengths": "lengths", "groups": "groups"}


def _read_npz(path: Path) -> Raw:
    """npz: X (N, T, F) or (N, T); optional y, lengths and groups, each (N,). No other array."""
    if not zipfile.is_zipfile(path):
        raise DataError(f"{path} is empty or not an npz file: write it with numpy.savez")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] if name in ARRAYS else None for name in file.files}
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise DataError(f"{path} is damaged: {error}") from None
    except NotImplementedError as error:
        raise DataError(f"{path} is zipped in a way that is not read ({error}): write it with numpy.savez") from None
    except ValueError as error:
        labels = "save labels as a str array, y=numpy.array(labels, dtype=str)"
        way_out = f"{labels}, and X as a float array, shorter sequences with NaN or zeros behind them and `lengths`"
        raise DataError(f"{path}: {error}; Python objects are never loaded: {way_out}") from None
    return _of_arrays(str(path), arrays)


def _of_arrays(source: str, arrays: Mapping[str, Any]) -> Raw:
    """Of arrays by name, once there is no other among them than `ARRAYS`, and X."""
    for name in arrays:
        close = () if name in ARRAYS else get_close_matches(str(name).lower(), _OFTEN, 1)
        for meant in (_OFTEN[known] for known in close):
            if meant not in arrays:
                raise DataError(f"{source}: unknown array {name!r}; if it is {meant!r}, call it so")
    if "X" not in arrays:
        raise DataError(f"{source} has no array 'X'; it has {', '.join(map(str, arrays)) or 'none'}")
    for name in arrays:
        if name not in ARRAYS:
            known = "known are X, y, lengths and groups; lengths say how many steps are valid"
            raise DataError(f"{source}: unknown array {name!r}: leave it out; {known}")
    return raw_arrays(source, arrays["X"], arrays.get("y"), arrays.get("lengths"), arrays.get("groups"))


READERS: dict[str, Callable[[Path, Columns], Raw]] = {  # by suffix; the formats without columns need no names of them
    ".npz": lambda path, _: _read_npz(path),
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
    ".ts": lambda path, _: read_ts(path),
    ".csv.gz": read_csv,
    ".tsv.gz": read_csv,
    ".ts.gz": lambda path, _: read_ts(path),
}

TABLES = tuple(suffix for suffix in READERS if suffix.startswith((".csv", ".tsv", ".parquet")))  # have columns

_SHEET = "is a spreadsheet, which is not read: save the sheet as csv"
_OTHERS = {  # what people have, by suffix
    ".xlsx": _SHEET,
    ".xls": _SHEET,
    ".ods": _SHEET,
    ".arff": ARFF,
    ".npy": "holds one array: write it with its labels by numpy.savez('data.npz', X=X, y=y)",
    ".pkl": "holds Python objects, which are never loaded: write npz, csv or parquet",
    ".pickle": "holds Python objects, which are never loaded: write npz, csv or parquet",
    ".txt": "may be anything: call it .csv (columns with names), .tsv or .ts, if it is one of these",
}


def suffix_of(path: Path) -> str:
    """The suffix that says how to read a file, in small letters; .gz with the one before it."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return "".join(suffixes[-2:] if suffixes[-1:] == [".gz"] else suffixes[-1:])


def read(
    source: Any,
    *,
    label: str = "label",
    id: str = "id",
    step: str = "step",
    group: str = "group",
    classes: tuple[str, ...] | None = None,
    labeled: bool | None = None,
    features: tuple[str, ...] | None = None,
    named: bool = True,
    needed: Collection[str] = (),
) -> Sequences:
    """Read one file, whose suffix says how (`READERS`), or what is in memory.

    In memory: a data frame of pandas or polars or a table of Arrow, read like csv; a dict of the arrays of an npz file;
    or an array, or a list of arrays, which is X of `from_arrays`.

    `label`, `id`, `step` and `group` name columns of csv and parquet files and of data frames; group may be id. Those
    in `needed` must be there. A table with both an id
    and a step column is in long form (one row a step), else in wide form (one univariate sequence a row; the names of
    the step columns are one prefix and a number, as in t0, t1). Rows of the long form, and columns of the wide form,
    may stand in any order.

    `classes` and `features` are those of the training data: labels are encoded with these classes, and the
    columns of these features are read in this order (npz, .ts and wide csv name none: only their number is
    checked). `named` False: these are no names, and a file without such columns is read by place. `labeled`: True
    demands labels, and the group column if it is named; False ignores labels; None takes both where they are.

    A feature that a sequence lacks throughout has values of 0 here, until a study or a model fills it with the mean of
    the training part.

    Raises DataError.
    """
    columns = Columns(label, id, step, group, features, named, labeled, needed)
    if needed and not is_frame(source) and not (isinstance(source, str | Path) and suffix_of(Path(source)) in TABLES):
        raise DataError(f"{_named(source)} has no columns to name, only tables have; leave out {', '.join(needed)}")
    if isinstance(source, str | Path):
        raw = _read_file(Path(source), columns)
    elif is_frame(source):
        raw = read_frame(source, columns)
    elif isinstance(source, Mapping):
        raw = _of_arrays("the data", source)
    else:
        raw = raw_arrays("the data", source, None, None, None)
    return to_sequences(raw, classes, labeled, features, named)


def _named(source: Any) -> str:
    return str(source) if isinstance(source, str | Path) else "the data"


def _read_file(path: Path, columns: Columns) -> Raw:
    suffix = suffix_of(path)
    if suffix in _OTHERS:
        raise DataError(f"{path} {_OTHERS[suffix]}")
    if suffix not in READERS:
        raise DataError(f"{path}: unknown suffix {suffix!r}; known are {', '.join(READERS)}")
    try:
        path.open("rb").close()
        return READERS[suffix](path, columns)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is damaged: {error}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not a text file in UTF-8: {error}") from None
