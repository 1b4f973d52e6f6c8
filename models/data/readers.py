"""Reads npz, csv, parquet and .ts files, data frames and arrays: the same content gives the same `Sequences`."""

from __future__ import annotations

import gzip
import math
import struct
import sys
import warnings
import zipfile
import zlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from hpo.models.data.buffers import empty, is_large, pieces_of
from hpo.models.data.columns import BESIDE
from hpo.models.data.sequences import DataError, Raw, Sequences, column, is_missing, raw_arrays, to_sequences
from hpo.models.data.sizes import check_content
from hpo.models.data.steps import in_order, moments, positions, seconds_of
from hpo.models.data.tables import Columns, is_frame, read_csv, read_frame, read_parquet
from hpo.models.data.ts import ARFF, read_ts
from hpo.models.data.weights import weights

BLOCK = 2**18  # bytes read at once
LOCAL_HEADER = 30  # bytes of a zip file before a member's name; the last four are the lengths of name and extra field
ARRAYS = ("X", "y", "lengths", "groups", "steps", *BESIDE)  # of an npz file
_KNOWN = f"known are {', '.join(ARRAYS)}; lengths say how many steps are valid, steps where they are"
_OFTEN = {  # their names, and others by which they often go
    **{name: name for name in ("lengths", "groups", "steps", *BESIDE)},
    **{"x": "X", "y": "y", "label": "y", "target": "y"},
}


def _read_npz(path: Path, columns: Columns) -> Raw:
    """npz: X (N, T, F) or (N, T); optional y, lengths, groups, time and weight, each (N,), and steps (N, T). No other
    array."""
    if not zipfile.is_zipfile(path):
        raise DataError(f"{path} is empty or not an npz file: write it with numpy.savez")
    try:
        with zipfile.ZipFile(path) as file:
            members = _members(path, file)
            arrays = {name: _array(path, file, member) for name, member in members.items() if name in ARRAYS}
    except (zipfile.BadZipFile, zlib.error, EOFError, struct.error) as error:
        raise DataError(f"{path} is damaged: {error}") from None
    except (NotImplementedError, RuntimeError) as error:  # another method; a password
        raise DataError(f"{path} is zipped in a way that is not read ({error}): write it with numpy.savez") from None
    return _of_arrays(str(path), {name: arrays.get(name) for name in members}, columns)


def _members(path: Path, file: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The arrays of the archive by name, once they say to be of a size that the file can hold."""
    members: dict[str, zipfile.ZipInfo] = {}
    for member in file.infolist():
        name = member.filename.removesuffix(".npy")
        if name in members:
            raise DataError(f"{path} holds the array {name!r} twice: write it with numpy.savez")
        members[name] = member
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise NotImplementedError(f"method {member.compress_type}")
    check_content(path, sum(member.file_size for member in members.values()))
    return members


def _array(path: Path, file: zipfile.ZipFile, member: zipfile.ZipInfo) -> NDArray[Any]:
    """One array, whose header must fit the size of the member before anything of it is read."""
    at = f"{path}, array {member.filename.removesuffix('.npy')!r}"
    with file.open(member) as content:
        try:
            version = npy.read_magic(content)
            header = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[version]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that Python 2 wrote it
                shape, by_columns, dtype = header(content, max_header_size=1_000)
        except (ValueError, KeyError, TypeError, RecursionError, MemoryError, TokenError):
            raise DataError(f"{at}: this is no array of numbers or text; write it with numpy.savez") from None
        if dtype.kind == "V":
            raise DataError(f"{at} holds records: write X, y, lengths and groups as arrays of their own")
        if dtype.hasobject:
            labels = "save labels as a str array, y=numpy.array(labels, dtype=str)"
            way_out = f"{labels}, and X as a float array, shorter sequences with NaN or zeros behind them and `lengths`"
            raise DataError(f"{at}: Python objects are never loaded: {way_out}")
        size = math.prod(shape) * dtype.itemsize
        if min(shape, default=0) < 0 or not dtype.itemsize or size != member.file_size - content.tell():
            raise DataError(f"{path} is damaged: array {member.filename!r} says to be {dtype} {shape}, and is not")
        check_content(path, size, shape[0] if shape else 0)
        begin = content.tell()
        mapped = member.compress_type == zipfile.ZIP_STORED and is_large(size)
        data = _mapped(path, member, begin, size) if mapped else empty((size,), np.uint8)
        for start in range(0, size, BLOCK):
            block = content.read(min(BLOCK, size - start))  # at once it would be copied again and again
            if len(block) != min(BLOCK, size - start):
                raise EOFError(f"array {member.filename!r} ends early")
            if not mapped:
                data[start : start + len(block)] = np.frombuffer(block, np.uint8)
        if content.read(1):  # at the end the checksum is compared
            raise EOFError(f"array {member.filename!r} goes on after its end")
    if dtype.kind == "U":
        letters = data.view(np.dtype("u4").newbyteorder(dtype.byteorder))
        if any(letters[part].max(initial=0) > sys.maxunicode for part in pieces_of(letters)):
            raise DataError(f"{path} is damaged: array {member.filename!r} holds text that is none")
    return data.view(dtype).reshape(shape, order="F" if by_columns else "C")


def _mapped(path: Path, member: zipfile.ZipInfo, begin: int, size: int) -> NDArray[Any]:
    """So many bytes of an array that was not compressed, from `begin` within it on, mapped from the file itself."""
    with path.open("rb") as file:
        file.seek(member.header_offset)
        name, extra = struct.unpack("<HH", file.read(LOCAL_HEADER)[-4:])
    start = member.header_offset + LOCAL_HEADER + name + extra + begin
    return np.memmap(path, np.uint8, "r", start, (size,)).view(np.ndarray)


def _of_arrays(source: str, arrays: Mapping[str, Any], columns: Columns) -> Raw:
    """Of arrays by name, once there is no other among them than `ARRAYS`, and X."""
    for name in arrays:
        close = () if name in ARRAYS else get_close_matches(str(name).lower(), _OFTEN, 1)
        for meant in (_OFTEN[known] for known in close):
            if meant not in arrays:
                raise DataError(f"{source}: unknown array {name!r}; if it is {meant!r}, call it so")
    if "X" not in arrays:
        raise DataError(f"{source} has no array 'X'; it has {', '.join(map(str, arrays)) or 'none'}")
    for name in arrays:
        if name in BESIDE and getattr(columns, name) is None:
            way_out = f"leave it out, or name it to have it used (data.{name} of a study, {name}= in Python)"
            raise DataError(f"{source}: unknown array {name!r}: {way_out}; {_KNOWN}")
        if name not in ARRAYS:
            raise DataError(f"{source}: unknown array {name!r}: leave it out; {_KNOWN}")
    raw = raw_arrays(source, arrays["X"], arrays.get("y"), arrays.get("lengths"), arrays.get("groups"))
    if arrays.get("steps") is not None:
        raw = _with_steps(raw, arrays["steps"])
    for role in BESIDE:
        if role not in arrays and columns.demands(role):
            raise DataError(
                f"{source} has no array {role!r} (N,), which is named; it has {', '.join(map(str, arrays))}"
            )
    beside = {
        role: column(source, role, arrays[role], len(raw.values))
        for role in BESIDE
        if role in arrays and columns.reads(role)
    }
    if "time" in beside:
        raw = replace(raw, moments=moments(beside["time"], raw.at))
    if "weight" in beside:
        raw = replace(raw, weights=weights(beside["weight"].tolist(), raw.at))
    return raw


def _with_steps(raw: Raw, steps: Any) -> Raw:
    """With where its steps are: rising numbers or times (N, T), or N lists of them; what is missing lies beyond a
    sequence's end. Raises DataError."""
    N, T = raw.values.shape[:2]
    rows = steps if isinstance(steps, list | tuple) else np.atleast_1d(np.asarray(steps))
    if len(rows) != N:
        raise DataError(f"{raw.source}: steps must be those of each of the {N} sequences, got {len(rows)}")
    parts = [_known_steps(raw, i, row) for i, row in enumerate(rows)]
    lengths = np.array([len(part) for part in parts])
    owner, parts = np.repeat(np.arange(N), lengths), [part for part in parts if len(part)]
    kinds = {part.dtype.kind for part in parts}
    alike = bool(parts) and (kinds <= set("iuf") or kinds <= set("mM"))
    flat = np.concatenate(parts) if alike else [value for part in parts for value in part.tolist()]
    found = in_order(flat, lambda place: raw.at(int(owner[place]))) if parts else np.empty(0)
    times = np.full((N, T), np.nan)
    times[np.arange(T) < lengths[:, None]] = positions(found)
    for i, t in np.argwhere(np.diff(times, axis=1) <= 0)[:1].tolist():
        rule = "steps must rise; those beyond a sequence's end are missing (NaN or NaT), or `lengths` say where it is"
        raise DataError(f"{raw.at(i)}, step {t + 1} is not after the one before it: {rule}")
    return replace(raw, times=times, seconds=seconds_of(found.dtype))


def _known_steps(raw: Raw, i: int, row: Any) -> NDArray[Any]:
    """The steps of sequence i up to its end, or to the first one that is missing. Raises DataError."""
    try:
        found = np.asarray(row)
    except ValueError:  # lists of lists
        found = np.empty(())
    most = raw.values.shape[1]
    if found.ndim != 1 or len(found) > most:
        raise DataError(f"{raw.at(i)}: steps must be a list of numbers or times, and at most {most} as the values are")
    found = found[: None if raw.lengths is None else max(0, int(raw.lengths[i]))]
    if found.dtype.kind in "iub":
        return found
    if found.dtype.kind in "fmM":
        missing = np.isnan(found) if found.dtype.kind == "f" else np.isnat(found)
    else:
        missing = np.array([is_missing(value) or value == "" for value in found.tolist()], dtype=np.bool_)
    return found[: np.argmax(missing)] if missing.any() else found


def _read_ts(path: Path, columns: Columns) -> Raw:
    for role in BESIDE:
        if columns.demands(role):
            way_out = f"leave {role} out, or write the sequences as npz, csv or parquet"
            raise DataError(f"{path} is a .ts file, whose sequences have no {role}: {way_out}")
    return read_ts(path)


READERS: dict[str, Callable[[Path, Columns], Raw]] = {  # by suffix
    ".npz": _read_npz,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
    ".ts": _read_ts,
    ".csv.gz": read_csv,
    ".tsv.gz": read_csv,
    ".ts.gz": _read_ts,
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
    time: str | None = None,
    weight: str | None = None,
    classes: tuple[str, ...] | None = None,
    labeled: bool | None = None,
    features: tuple[str, ...] | None = None,
    named: bool = True,
    needed: Collection[str] = (),
) -> Sequences:
    """Read one file, whose suffix says how (`READERS`), or what is in memory.

    In memory: a data frame of pandas or polars or a table of Arrow, read like csv; a dict of the arrays of an npz file,
    in which `steps` may be N lists; or an array, or a list of arrays, which is X of `from_arrays`.

    `label`, `id`, `step` and `group` name columns of csv and parquet files and of data frames; group may be id. `time`
    names the one that orders the sequences, numbers or times, and may be id, step or group; `weight` the one that says
    how much each counts in training and scores, in long form the same in all rows of a sequence. In npz files and dicts
    these are, whatever they are called, the arrays `time` and `weight` (N,), and `steps` (N, T) says where the steps
    are: rising numbers or times. Those in `needed` must be there.

    A table with both an id and a step column is in long form (one row a step), else in wide form (one univariate
    sequence a row; the names of the step columns are one prefix and a number, as in t0, t1). Rows of the long form, and
    columns of the wide form, may stand in any order.

    `classes` and `features` are those of the training data: labels are encoded with these classes, and the
    columns of these features are read in this order (npz, .ts and wide csv name none: only their number is
    checked). `named` False: these are no names, and a file without such columns is read by place.

    `labeled`: True demands labels, and the columns of group, time and weight if they are named; False ignores labels,
    times and weights; None takes all of them where they are.

    A feature that a sequence lacks throughout has values of 0 here, until a study or a model fills it with the mean of
    the training part.

    Whoever wrote the file: no code of it runs, and reading takes at most 1 GiB and 3,000 times its size (ordinary
    files 3 to 30 times theirs): what unzips, unpacks or is padded to far more than its size is refused (`sizes`).

    Raises DataError, whose message is one line.
    """
    columns = Columns(label, id, step, group, features, named, labeled, needed, time, weight)
    table = is_frame(source) or (isinstance(source, str | Path) and suffix_of(Path(source)) in TABLES)
    unfit = [role for role in needed if role not in BESIDE]
    if unfit and not table:
        raise DataError(f"{_named(source)} has no columns to name, only tables have; leave out {', '.join(unfit)}")
    try:
        return to_sequences(_raw(source, columns), classes, labeled, features, named)
    except MemoryError:
        raise DataError(f"{_named(source)} does not fit into the memory that this process may have") from None


def _raw(source: Any, columns: Columns) -> Raw:
    if isinstance(source, str | Path):
        return _read_file(Path(source), columns)
    if is_frame(source):
        return read_frame(source, columns)
    if isinstance(source, Mapping):
        return _of_arrays("the data", source, columns)
    return _of_arrays("the data", {"X": source}, columns)


def _named(source: Any) -> str:
    return str(source) if isinstance(source, str | Path) else "the data"


def _read_file(path: Path, columns: Columns) -> Raw:
    suffix = suffix_of(path)
    if suffix in _OTHERS:
        raise DataError(f"{path} {_OTHERS[suffix]}")
    if suffix not in READERS:
        raise DataError(f"{path}: unknown suffix {suffix!r}; known are {', '.join(READERS)}")
    try:
        if "\0" in str(path) or (path.exists() and not path.is_file()):  # a pipe may never end
            raise DataError(f"{path} is no file that holds its data, but something else")
        path.open("rb").close()
        return READERS[suffix](path, columns)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is damaged: {error}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not a text file in UTF-8: {error}") from None
