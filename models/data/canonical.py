"""The canonical data file, a safetensors file: equal content gives equal bytes, and so an equal hash."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpo.models.data.sequences import DataError, Sequences, default_names
from hpo.models.data.steps import UNITS
from hpo.models.files import whole_file

NAMES = ("classes", "ids", "features")  # of `Sequences`, kept as texts


def to_bytes(sequences: Sequences, *, group_names: bool = True) -> bytes:
    """The canonical form, a safetensors file: equal content gives equal bytes.

    group_names: with what the groups are called; earlier versions kept their codes alone, and so do their studies.
    Whether the features have names of their own is no part of it, so that npz and csv are alike: `load` takes x0, x1, …
    for numbers. The study's plan keeps it, and what follows from the values that were missing.

    Data without times, weights and gaps get the bytes that earlier versions gave them.
    """
    from safetensors.numpy import save as serialize

    optional: dict[str, NDArray[Any] | None]
    optional = {"labels": sequences.labels, "groups": sequences.groups, "moments": sequences.moments}
    optional |= {"weights": sequences.weights, "observed": sequences.observed, "times": sequences.times}
    arrays: dict[str, NDArray[Any]] = {"values": sequences.values, "lengths": sequences.lengths}
    arrays |= {name: array for name, array in optional.items() if array is not None}
    about: dict[str, Any] = {name: getattr(sequences, name) for name in (*NAMES, "filled")}
    if group_names and sequences.group_names:
        about["group_names"] = sequences.group_names
    if "moments" in arrays and arrays["moments"].dtype.kind == "M":  # for which safetensors has no type
        about["clock"] = np.datetime_data(arrays["moments"].dtype)[0]
        arrays["moments"] = arrays["moments"].view(np.int64)
    meta = json.dumps(about, separators=(",", ":"))
    # one metadata key only: safetensors writes several in any order
    return serialize({k: np.ascontiguousarray(v) for k, v in arrays.items()}, {"sequences": meta})


def fingerprint(sequences: Sequences, *, group_names: bool = True) -> str:
    """SHA-256 of the canonical form, in hexadecimal: the hash of the file that `save` writes."""
    return hashlib.sha256(to_bytes(sequences, group_names=group_names)).hexdigest()


def save(sequences: Sequences, path: str | Path, *, group_names: bool = True) -> None:
    """Write the canonical file, which appears whole or not at all. Raises OSError."""
    with whole_file(Path(path)) as beside:
        beside.write_bytes(to_bytes(sequences, group_names=group_names))


def load(path: str | Path) -> Sequences:
    """Map a canonical file into memory, copy on write: processes share its pages. Raises DataError."""
    try:
        with Path(path).open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > Path(path).stat().st_size:
                raise ValueError(f"its header says to be of {size} bytes")
            header = json.loads(file.read(size))
        meta = json.loads(header.pop("__metadata__")["sequences"])
        named = {name: tuple(meta[name]) for name in NAMES}
        named["group_names"] = tuple(meta.get("group_names", ()))
        mapped = {name: _mapped(path, 8 + size, entry) for name, entry in header.items()}
        if "clock" in meta:
            mapped["moments"] = mapped["moments"].view({unit: f"M8[{unit}]" for unit in UNITS}[meta["clock"]])
        own = named["features"] != default_names(len(named["features"]))
        return Sequences(**{"labels": None, "groups": None, **mapped, **named, "filled": meta["filled"], "named": own})
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        OverflowError,
        MemoryError,
        RecursionError,
    ) as error:
        raise DataError(f"{path} is not a whole data set file: {type(error).__name__}: {error}") from None


def _mapped(path: str | Path, start: int, entry: dict[str, Any]) -> NDArray[Any]:
    """One tensor of a safetensors file; the reader of safetensors itself copies it."""
    dtype = {"F32": "<f4", "F64": "<f8", "I64": "<i8", "BOOL": "?"}[entry["dtype"]]
    begin, shape = start + entry["data_offsets"][0], tuple(entry["shape"])
    return np.memmap(path, dtype=dtype, mode="c", offset=begin, shape=shape).view(np.ndarray)
