"""The canonical data file, a safetensors file: equal content gives equal bytes, and so an equal hash."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from hpo.models.data.buffers import contiguous, is_large
from hpo.models.data.sequences import DataError, Sequences, default_names
from hpo.models.data.steps import UNITS
from hpo.models.files import whole_file

NAMES = ("classes", "ids", "features")  # of `Sequences`, kept as texts
DTYPES = {"<i8": "I64", "<f8": "F64", "<f4": "F32", "|b1": "BOOL"}  # as safetensors calls them
ORDER = tuple(DTYPES)  # that of the arrays in the file, then by name


def to_bytes(sequences: Sequences, *, group_names: bool = True) -> bytes:
    """The canonical form, a safetensors file: equal content gives equal bytes.

    group_names: with what the groups are called; earlier versions kept their codes alone, and so do their studies.
    Whether the features have names of their own is no part of it, so that npz and csv are alike: `load` takes x0, x1, …
    for numbers. The study's plan keeps it, and what follows from the values that were missing.

    Data without times, weights and gaps get the bytes that earlier versions gave them.
    """
    return b"".join(_blocks(sequences, group_names))


def _blocks(sequences: Sequences, group_names: bool) -> Iterator[bytes | memoryview]:
    """The canonical form, block by block, as safetensors itself would write it: the header, then each array."""
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
    header: dict[str, Any] = {"__metadata__": {"sequences": json.dumps(about, separators=(",", ":"))}}
    order, end = sorted(arrays, key=lambda name: (ORDER.index(arrays[name].dtype.str), name)), 0
    for name in order:
        begin, end = end, end + arrays[name].nbytes
        kind = DTYPES[arrays[name].dtype.str]
        header[name] = {"dtype": kind, "shape": arrays[name].shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in order:
        yield contiguous(arrays[name]).reshape(-1).view(np.uint8).data


def fingerprint(sequences: Sequences, *, group_names: bool = True) -> str:
    """SHA-256 of the canonical form, in hexadecimal: the hash of the file that `save` writes."""
    found = hashlib.sha256()
    for block in _blocks(sequences, group_names):
        found.update(block)
    return found.hexdigest()


def save(sequences: Sequences, path: str | Path, *, group_names: bool = True) -> None:
    """Write the canonical file, which appears whole or not at all. Raises OSError."""
    with whole_file(Path(path)) as beside, beside.open("wb") as file:
        file.writelines(_blocks(sequences, group_names))


def load(path: str | Path) -> Sequences:
    """Map a canonical file into memory, to read: processes share its pages. Raises DataError."""
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
    """One tensor of a safetensors file; the reader of safetensors itself copies it. What is small, and what has one
    number a sequence, may be written to: torch asks for that."""
    dtype = next(np.dtype(each) for each, name in DTYPES.items() if name == entry["dtype"])
    begin, shape = start + entry["data_offsets"][0], tuple(entry["shape"])
    large = len(shape) > 1 and is_large(math.prod(shape) * dtype.itemsize)
    mode: Literal["r", "c"] = "r" if large else "c"  # what may be written to counts as the process's own memory
    return np.memmap(path, dtype=dtype, mode=mode, offset=begin, shape=shape).view(np.ndarray)
