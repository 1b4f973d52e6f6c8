"""Sequences from files: readers for npz, csv, parquet and .ts, splits, and one canonical file.

Shapes: N sequences, T steps (of the longest), F features. Every reader gives the same `Sequences` for the
same content, by the same rules:

- Steps at the end of a sequence in which every feature is missing are padding (unless `lengths` are given).
- Missing values before that are filled: linearly between the known steps of that sequence and feature, with
  the nearest known value at the edges, with 0 where the sequence has none; `Sequences.filled` counts them.
- Infinite values (also those beyond float32), sequences without a step and unequal numbers of features are
  errors that name the file and the row. A constant feature is kept.
- Labels are kept by name: 1, 1.0 and "1.0" are "1"; other text is kept, without spaces around it. All labels
  missing: the data is unlabeled. Some missing: an error.
"""

import csv
import hashlib
import json
import os
import re
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from itertools import chain, islice
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float32]
Indices = NDArray[np.int64]
Mask = NDArray[np.bool_]
Split = tuple[Indices, Indices]  # training and validation indices, ascending


class DataError(ValueError):
    """The data breaks a rule: the message names the file, the row and the way out."""


@dataclass(frozen=True, eq=False)
class Sequences:
    """Labeled or unlabeled sequences, in memory or mapped from a file by `load`."""

    values: Values  # (N, T, F); zero at and after each sequence's length
    lengths: Indices  # (N,) valid steps, 1..T
    labels: Indices | None  # (N,) index into classes; None: unlabeled
    classes: tuple[str, ...]  # class names; sorted, as numbers if all are
    groups: Indices | None  # (N,) a split never separates equal codes
    ids: tuple[str, ...]  # (N,) names of the sequences; "0", "1", … where the file has none
    features: tuple[str, ...]  # (F,) names of the features; "x0", "x1", … where the file has none
    filled: int  # missing values filled in the file that these come from

    @property
    def n(self) -> int:
        return len(self.values)

    @property
    def steps(self) -> int:
        return int(self.values.shape[1])

    @property
    def n_features(self) -> int:
        return int(self.values.shape[2])

    def take(self, indices: Iterable[int] | NDArray[Any]) -> "Sequences":
        """The sequences at `indices`, in that order (or of a mask (N,)); T, classes and features stay."""
        at = np.arange(self.n)[indices if isinstance(indices, np.ndarray) else list(indices)]
        return replace(
            self,
            values=self.values[at],
            lengths=self.lengths[at],
            labels=None if self.labels is None else self.labels[at],
            groups=None if self.groups is None else self.groups[at],
            ids=tuple(self.ids[i] for i in at),
        )


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
        raw = READERS[path.suffix.lower()](path, _Columns(label, id, step, group, features, labeled))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is not a text file in UTF-8: {error}") from None
    return _finish(raw, classes, labeled, features)


def from_arrays(
    X: Any,
    y: Any = None,
    lengths: Any = None,
    groups: Any = None,
    *,
    ids: Any = None,
    classes: tuple[str, ...] | None = None,
    features: tuple[str, ...] | None = None,
    source: str = "the data",
) -> Sequences:
    """Sequences from arrays.

    X is (N, T, F) or, univariate, (N, T); or a list of N arrays (T_i, F) or (T_i,). y (N,) holds labels of
    any type, `lengths` (N,) the valid steps, `groups` (N,) what a split must keep together. `classes` and
    `features` as for `read`; `source` names the data in errors. Raises DataError.
    """
    return _finish(_arrays(source, X, y, lengths, groups, ids), classes, None, features)


# ------------------------------------------------------------------ what every reader hands over


@dataclass(frozen=True)
class _Columns:
    label: str
    id: str
    step: str
    group: str
    features: tuple[str, ...] | None  # the features to read; None: every column without another role
    labeled: bool | None  # True: the label column must be there


@dataclass(frozen=True)
class _Raw:
    source: str
    values: NDArray[Any]  # (N, T, F); NaN: missing or padding
    labels: Sequence[object] | None  # (N,)
    groups: Sequence[object] | None  # (N,)
    place: str  # "row", "line" or "sequence": what `marks` count
    marks: Sequence[object]  # (N,) where each sequence stands, for error messages
    ids: tuple[str, ...] | None = None  # None: not named in the file
    features: tuple[str, ...] | None = None  # None: not named in the file
    lengths: Indices | None = None  # None: up to the last step that has a value

    def at(self, i: int) -> str:
        return f"{self.source}, {self.place} {self.marks[i]}"


def _finish(
    raw: _Raw, classes: tuple[str, ...] | None, labeled: bool | None, features: tuple[str, ...] | None
) -> Sequences:
    """Check, fill and encode: the one way from a reader to `Sequences`."""
    if 0 in raw.values.shape:
        raise DataError(f"{raw.source} is empty: it holds no values")
    with np.errstate(over="ignore"):  # becomes inf, which is refused below
        values = np.array(raw.values, dtype=np.float32, order="C")
    names = features or raw.features or tuple(f"x{i}" for i in range(values.shape[2]))
    if len(names) != values.shape[2]:
        raise DataError(f"{raw.source} has {values.shape[2]} features, expected {len(names)}")
    lengths = _valid_steps(values) if raw.lengths is None else raw.lengths
    for i in np.flatnonzero((lengths < 1) | (lengths > values.shape[1])).tolist():
        rule = f"a sequence needs 1 to {values.shape[1]} steps"
        raise DataError(f"{raw.at(i)} has length {lengths[i]}: {rule}; remove or correct it")
    values = np.ascontiguousarray(values[:, : lengths.max()])
    inside = np.arange(values.shape[1]) < lengths[:, None]
    for i, t, f in np.argwhere(np.isinf(values) & inside[:, :, None]).tolist():
        rule = "values must be finite in float32; correct it, or leave it empty to have it filled"
        raise DataError(f"{raw.at(i)}, step {t}, feature {names[f]!r} is infinite: {rule}")
    filled = _fill(values, inside)
    values[~inside] = 0
    labels, classes = _encode(raw, classes, labeled)
    ids = raw.ids or tuple(map(str, range(len(values))))
    return Sequences(values, lengths, labels, classes, _groups(raw), ids, names, filled)


def _valid_steps(values: Values) -> Indices:
    """(N,) steps up to the last one with a value."""
    known: Mask = ~np.asarray(np.isnan(values).all(axis=2))
    last = values.shape[1] - np.argmax(known[:, ::-1], axis=1)
    return np.where(known.any(axis=1), last, 0).astype(np.int64)


def _fill(values: Values, inside: Mask) -> int:
    """Fill the NaN of (N, T, F) values within the lengths, in place; how many they were."""
    missing = np.isnan(values) & inside[:, :, None]
    steps = np.arange(values.shape[1])
    for i, f in np.argwhere(missing.any(axis=1)).tolist():
        series, gap = values[i, :, f], missing[i, :, f]
        known = inside[i] & ~gap
        series[gap] = np.interp(steps[gap], steps[known], series[known]) if known.any() else 0
    return int(missing.sum())


def _encode(raw: _Raw, classes: tuple[str, ...] | None, labeled: bool | None) -> tuple[Indices | None, tuple[str, ...]]:
    """Labels as indices into the classes, which are the labels' names where none are given."""
    names = _names(raw.labels or ())
    known = {name for name in names if name is not None}
    if labeled is False or not known:
        if labeled:
            raise DataError(f"{raw.source} has no labels")
        return None, classes or ()
    if None in names:
        raise DataError(f"{raw.at(names.index(None))} has no label: label every sequence or none")
    classes = classes or _sorted_classes(known)
    codes: dict[str | None, int] = {name: i for i, name in enumerate(classes)}
    for i, name in enumerate(names):
        if name not in codes:
            trained = ", ".join(classes)
            raise DataError(f"{raw.at(i)}: label {name!r} is not a class of the training data ({trained})")
    return np.array([codes[name] for name in names], dtype=np.int64), classes


def _sorted_classes(names: set[str]) -> tuple[str, ...]:
    if all(_is_number(name) and isfinite(float(name)) for name in names):
        return tuple(sorted(names, key=lambda name: (float(name), name)))
    return tuple(sorted(names))


def _groups(raw: _Raw) -> Indices | None:
    if raw.groups is None:
        return None
    names = _names(raw.groups)
    if None in names:
        raise DataError(f"{raw.at(names.index(None))} has no group: give every sequence one or none")
    return _codes(names)[0]


def _names(values: Iterable[object]) -> list[str | None]:
    """Names of labels, ids or groups; None where one is missing."""
    values = list(values)
    names = {value: _name(value) for value in set(values)}
    return [names[value] for value in values]


def _name(value: object) -> str | None:
    if value is None or value != value:  # NaN
        return None
    text = value.decode() if isinstance(value, bytes) else str(value)
    return re.sub(r"^(-?\d+)\.0*$", r"\1", text.strip()) or None


def _codes(names: Iterable[str | None]) -> tuple[Indices, tuple[str, ...]]:
    """Codes in the order of first appearance, and the names that they stand for."""
    seen: dict[str, int] = {}
    codes = np.array([seen.setdefault(str(name), len(seen)) for name in names], dtype=np.int64)
    return codes, tuple(seen)


def _pad(flat: NDArray[np.float64], lengths: Indices) -> NDArray[np.float64]:
    """(N, T, F) of steps (sum of lengths, F), one sequence after another; NaN behind the shorter ones."""
    steps = lengths.max(initial=0)
    values = np.full((len(lengths), steps, flat.shape[1]), np.nan)
    values[np.arange(steps) < lengths[:, None]] = flat
    return values


def _concatenated(parts: Sequence[NDArray[Any]]) -> NDArray[np.float64]:
    """(N, T, F) of N arrays (T_i, F)."""
    lengths = np.array([len(part) for part in parts], dtype=np.int64)
    return _pad(np.concatenate(parts) if parts else np.empty((0, 0)), lengths)


# ------------------------------------------------------------------ arrays and npz


def _arrays(source: str, X: Any, y: Any, lengths: Any, groups: Any, ids: Any = None) -> _Raw:
    values = _numeric(source, X)
    n = len(values)
    columns = {"y": y, "lengths": lengths, "groups": groups, "ids": ids}
    at = {name: _column(source, name, column, n) for name, column in columns.items()}
    for i, length in enumerate(at["lengths"] or ()):
        if not isinstance(length, int | float) or not float(length).is_integer():
            raise DataError(f"{source}, sequence {i}: lengths must be whole numbers, got {length!r}")
    valid = None if at["lengths"] is None else np.array(at["lengths"], dtype=np.int64)
    names = None if at["ids"] is None else tuple(map(str, _names(at["ids"])))
    return _Raw(source, values, at["y"], at["groups"], "sequence", range(n), names, None, valid)


def _column(source: str, name: str, values: Any, n: int) -> list[Any] | None:
    """N Python values."""
    if values is None:
        return None
    array = np.array(values, dtype=object) if isinstance(values, list | tuple) else np.asarray(values)
    if array.shape != (n,):
        raise DataError(f"{source}: {name} must be of shape ({n},), one a sequence, got {array.shape}")
    return [value.item() if isinstance(value, np.generic) else value for value in array.tolist()]


def _numeric(source: str, X: Any) -> NDArray[Any]:
    """(N, T, F) of what `from_arrays` takes for X."""
    if not isinstance(X, list | tuple):
        X = np.asarray(X)
        if X.ndim not in (2, 3) or X.dtype.kind not in "fiub":
            raise DataError(f"{source}: X must be numbers (N, T, F) or (N, T), got {X.dtype} {X.shape}")
        return np.atleast_3d(X)
    parts = [np.asarray(part) for part in X]
    for i, part in enumerate(parts):
        if part.ndim not in (1, 2) or part.dtype.kind not in "fiub":
            rule = "a sequence must be numbers (T, F) or (T,)"
            raise DataError(f"{source}, sequence {i}: {rule}, got {part.dtype} {part.shape}")
    parts = [part if part.ndim == 2 else part[:, None] for part in parts]
    for i, part in enumerate(parts):
        if part.shape[1] != parts[0].shape[1]:
            rule = f"{part.shape[1]} features, the first sequence has {parts[0].shape[1]}"
            raise DataError(f"{source}, sequence {i} has {rule}")
    return _concatenated(parts)


_NPZ = {"x": "X", "y": "y", "label": "y", "target": "y", "lengths": "lengths", "groups": "groups"}


def _read_npz(path: Path, _: _Columns) -> _Raw:
    """npz: X (N, T, F) or (N, T); optional y, lengths and groups, each (N,)."""
    if not zipfile.is_zipfile(path):
        raise DataError(f"{path} is empty or not an npz file: write it with numpy.savez")
    try:
        with np.load(path, allow_pickle=False) as file:
            found = list(file.files)
            arrays = {name: file[name] for name in _NPZ.values() if name in found}
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
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
    return _arrays(str(path), arrays["X"], arrays.get("y"), arrays.get("lengths"), arrays.get("groups"))


# ------------------------------------------------------------------ tables: csv and parquet

_MISSING = dict.fromkeys(("", "?", "NA", "N/A", "null", "NULL", "None"), "nan")


@dataclass(frozen=True)
class _Table:
    source: str
    rows: Sequence[int]  # (R,) row numbers as the file counts them
    features: tuple[str, ...]
    values: NDArray[np.float64]  # (R, F)
    roles: dict[str, Any]  # (R,) each: those there are of "label", "id", "step", "group"

    def at(self, row: int) -> str:
        return f"{self.source}, row {self.rows[row]}"


def _read_csv(path: Path, columns: _Columns) -> _Raw:
    """csv with a header: long form (one row a step) or wide form (one univariate sequence a row)."""
    rows: list[int] = []
    values: list[NDArray[np.float64]] = []
    texts: dict[str, list[str]] = {}
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file, skipinitialspace=True)
        header = [name.strip() for name in next(reader, [])]
        if not header:
            raise DataError(f"{path} is empty: it holds no values")
        long, features, roles = _layout(str(path), header, columns)
        numbered = ((reader.line_num, row) for row in reader if row)
        while chunk := list(islice(numbered, 1_000)):
            for line, row in chunk:
                if len(row) != len(header):
                    raise DataError(f"{path}, row {line} has {len(row)} cells, the header {len(header)}")
            lines, cells = zip(*chunk, strict=True)
            table = dict(zip(header, zip(*cells, strict=True), strict=True))
            rows += lines
            values.append(_numbers(str(path), lines, {name: table[name] for name in features}))
            for role, name in roles.items():
                texts.setdefault(role, []).extend(table[name])
    if not rows:
        raise DataError(f"{path} is empty: it has a header only")
    whole = _Table(str(path), rows, features, np.concatenate(values), texts)
    return _long(whole) if long else _wide(whole)


def _layout(
    source: str, header: list[str], columns: _Columns, only_long: bool = False
) -> tuple[bool, tuple[str, ...], dict[str, str]]:
    """Whether this is long form, the feature columns, and the column of each role that there is."""
    here = f"its columns are {', '.join(header[:20])}"
    wanted = {"label": columns.label, "id": columns.id, "step": columns.step, "group": columns.group}
    roles = {role: name for role, name in wanted.items() if name in header}
    if "" in header or len(set(header)) < len(header) or (not roles and not _could_be_names(header)):
        raise DataError(f"{source}: the first row must name every column, each differently; {here}")
    for role, name in wanted.items():
        unneeded = role in ("label", "group") and not columns.labeled
        if role not in roles and not unneeded and (name != role or role == "label"):
            raise DataError(f"{source} has no {role} column {name!r}; {here}")
    long = "id" in roles and "step" in roles
    features = tuple(name for name in header if name not in roles.values())
    if not long and (only_long or "step" in roles or not all(name[-1].isdecimal() for name in features)):
        wide = "" if only_long else "; in wide form the names of the steps end in numbers, as in t0, t1"
        rule = f"long form needs columns {columns.id!r} and {columns.step!r}{wide}"
        raise DataError(f"{source}: {rule}; {here}")
    if long and columns.features is not None:
        features = columns.features
    unknown = [name for name in features if name not in header]
    if unknown or not features:
        raise DataError(f"{source} has no feature column {', '.join(map(repr, unknown))}; {here}")
    return long, features, roles


def _could_be_names(header: list[str]) -> bool:
    """Numbers in a header are names only where they count the steps."""
    numbers = [name for name in header if _is_number(name)]
    start = int(numbers[0]) if numbers and numbers[0].isdecimal() else 0
    return numbers == [str(start + i) for i in range(len(numbers))]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _numbers(source: str, lines: Sequence[int], columns: dict[str, tuple[str, ...]]) -> NDArray[np.float64]:
    """(R, F) numbers of F text columns; NaN where missing."""
    texts = [list(map(_MISSING.get, column, column)) for column in columns.values()]
    try:
        return np.array(texts, dtype=np.float64).T
    except ValueError:
        cells = ((name, line, cell) for name in columns for line, cell in zip(lines, columns[name], strict=True))
        name, line, cell = next(c for c in cells if not _is_number(_MISSING.get(c[2], c[2])))
        way_out = "if these are labels, ids, steps or groups, name that column as such"
        at = f"{source}, row {line}, column {name!r}"
        raise DataError(f"{at}: {cell!r} is not a number; {way_out}") from None


def _read_parquet(path: Path, columns: _Columns) -> _Raw:
    """parquet in long form; needs pyarrow."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise DataError(f"{path}: parquet needs pyarrow: pip install 'hpo[parquet]'") from None
    try:
        with pq.ParquetFile(path) as file:
            table = file.read()
    except pa.ArrowException as error:
        raise DataError(f"{path} is empty or not a parquet file: {error}") from None
    _, features, roles = _layout(str(path), table.column_names, columns, only_long=True)
    values = np.empty((table.num_rows, len(features)))
    for j, name in enumerate(features):
        try:
            values[:, j] = table[name].cast(pa.float64()).to_numpy()
        except pa.ArrowException as error:
            raise DataError(f"{path}, column {name!r} must hold numbers: {error}") from None
    texts = {role: table[name].to_pylist() for role, name in roles.items() if role != "step"}
    step = table[roles["step"]].to_numpy()
    texts["step"] = step if step.dtype.kind in "iufM" else ["" if s is None else str(s) for s in step]
    return _long(_Table(str(path), range(table.num_rows), features, values, texts))


def _long(table: _Table) -> _Raw:
    """Rows of steps, in any order, to sequences in the order in which their ids first appear."""
    ids = _names(table.roles["id"])
    if None in ids:
        raise DataError(f"{table.at(ids.index(None))} has no id")
    codes, names = _codes(ids)
    steps = _steps(table)
    order = np.lexsort((steps, codes))
    twice = (np.diff(codes[order]) == 0) & (steps[order][1:] == steps[order][:-1])
    for row in order[1:][twice].tolist():
        raise DataError(f"{table.at(row)}: sequence {ids[row]!r} has step {steps[row]} a second time")
    values = _pad(table.values[order], np.bincount(codes))
    labels, groups = (_constant(table, role, ids, codes) for role in ("label", "group"))
    return _Raw(table.source, values, labels, groups, "sequence", names, names, table.features)


def _steps(table: _Table) -> NDArray[Any]:
    """(R,) steps as whole numbers, numbers or times."""
    steps = table.roles["step"]
    for dtype in (np.int64, np.float64, "datetime64[us]"):
        if isinstance(steps, list):
            try:
                with warnings.catch_warnings(action="error"):  # numpy only warns of an offset in a time
                    steps = np.array([text.removesuffix("Z") for text in steps], dtype=dtype)
            except (ValueError, UserWarning):
                continue
    if isinstance(steps, list):
        raise DataError(f"{table.source}: steps must be numbers or ISO times without an offset")
    for row in np.flatnonzero(np.isnat(steps) if steps.dtype.kind == "M" else np.isnan(steps)).tolist():
        raise DataError(f"{table.at(row)} has no step")
    return np.asarray(steps)


def _constant(table: _Table, role: str, ids: list[str | None], codes: Indices) -> list[str | None] | None:
    """(N,) the one label or group of each sequence."""
    if role not in table.roles:
        return None
    names = _names(table.roles[role])
    found = _codes(names)[0]
    first = np.unique(codes, return_index=True)[1]
    for row in np.flatnonzero(found != found[first][codes]).tolist():
        change = f"{role} of sequence {ids[row]!r} changes to {names[row]!r}"
        raise DataError(f"{table.at(row)}: {change}; a sequence has one {role}")
    return [names[i] for i in first]


def _wide(table: _Table) -> _Raw:
    """Rows (R, T) of univariate sequences."""
    roles = table.roles
    ids = tuple(map(str, _names(roles["id"]))) if "id" in roles else None
    if ids and len(set(ids)) < len(ids):
        raise DataError(f"{table.source}: ids repeat as in long form: name its step column too")
    values = table.values[:, :, None]
    return _Raw(table.source, values, roles.get("label"), roles.get("group"), "row", table.rows, ids)


# ------------------------------------------------------------------ .ts


def _read_ts(path: Path, _: _Columns) -> _Raw:
    """The UCR/UEA text format: one sequence a line, features separated by ':', the label last, '?' missing.

    https://www.aeon-toolkit.org/en/stable/api_reference/data_format.html
    """
    text = path.read_bytes().decode("utf-8-sig", errors="backslashreplace")  # descriptions may be Latin-1
    numbered = ((i, line.strip()) for i, line in enumerate(text.split("\n"), 1))
    lines = [(i, line) for i, line in numbered if line and not line.startswith("#")]
    start = next((k for k, (_, line) in enumerate(lines) if line.lower() == "@data"), None)
    if lines and start is None:
        raise DataError(f"{path} is no .ts file: it has no line @data")
    fields = [line.split() for _, line in lines[:start] if line.startswith("@")]
    header = {key.lower(): words for key, *words in fields}
    on = {key for key, words in header.items() if words[:1] and words[0].lower() == "true"}
    for key in on & {"@timestamps", "@targetlabel"}:
        raise DataError(f"{path}: {key} true is not supported, only values at regular steps with a class")
    classes = set(_names(header["@classlabel"][1:])) if "@classlabel" in on else None
    n_features = ["1"] if "@univariate" in on else header.get("@dimensions", header.get("@dimension"))
    return _ts_lines(str(path), lines[(start or 0) + 1 :], classes, n_features)


def _ts_lines(
    source: str, lines: list[tuple[int, str]], classes: set[str | None] | None, n_features: list[str] | None
) -> _Raw:
    parts: list[NDArray[np.float64]] = []
    labels: list[str | None] = []
    for i, line in lines:
        channels = line.split(":")
        if classes is not None:
            label = channels.pop().strip()
            labels.append(None if label == "?" else label)
            if classes and _name(labels[-1]) not in {*classes, None}:
                raise DataError(f"{source}, line {i}: label {label!r} is not one of @classLabel")
        parts.append(_ts_values(f"{source}, line {i}", channels))
        n_features = n_features or [str(parts[0].shape[1])]
        if [str(len(channels))] != n_features:
            raise DataError(f"{source}, line {i} has {len(channels)} features, expected {n_features[0]}")
    marks = [i for i, _ in lines]
    return _Raw(source, _concatenated(parts), labels if classes is not None else None, None, "line", marks)


def _ts_values(at: str, channels: list[str]) -> NDArray[np.float64]:
    """(T, F) of one line's channels."""
    if len({channel.count(",") for channel in channels}) != 1:
        raise DataError(f"{at}: every feature of a sequence needs the same steps; mark missing ones with '?'")
    cells = ",".join(channels).replace(" ", "").split(",")
    try:
        flat = np.array(list(map(_MISSING.get, cells, cells)), dtype=np.float64)
    except ValueError as error:
        raise DataError(f"{at}: values must be numbers separated by commas: {error}") from None
    return flat.reshape(len(channels), -1).T


READERS = {".npz": _read_npz, ".csv": _read_csv, ".parquet": _read_parquet, ".ts": _read_ts}


# ------------------------------------------------------------------ splits


def check_trainable(sequences: Sequences, source: str = "the training data") -> None:
    """Raise DataError unless there are labels, two classes or more, and a class of two sequences or more."""
    if sequences.labels is None:
        raise DataError(f"{source} has no labels: add them, or name their column")
    present, counts = np.unique(sequences.labels, return_counts=True)
    if len(present) < 2:
        only = sequences.classes[present[0]]
        raise DataError(f"{source} has one class only, {only!r}: a classifier needs two or more")
    if counts.max() < 2:
        rule = "labels must be classes that several sequences share"
        raise DataError(f"{source} has another label for each of its {sequences.n} sequences: {rule}")


def split_folds(sequences: Sequences, folds: int, seed: int) -> list[Split]:
    """k (training, validation) pairs; the validation parts are disjoint and together all N.

    Stratified: without groups, folds differ by at most one sequence, in all and of each class. A class with
    fewer members than folds works: some folds validate without it. Every training part holds every class of
    two sequences or more (with groups: where one of ten draws allows it).
    Raises DataError where there are fewer sequences or groups than folds.
    """
    units, what = _units(sequences)
    if not 2 <= folds <= units:
        raise DataError(f"folds must be 2 to {units}, the number of {what}, got {folds}")
    labels, rng = _strata(sequences), np.random.default_rng(seed)
    if sequences.groups is not None:
        fold = _grouped_folds(labels, sequences.groups, folds, rng)
    else:
        fold = np.empty(sequences.n, dtype=np.int64)
        fold[_by_class(labels, rng)] = np.arange(sequences.n) % folds
    return [_split(fold == k) for k in range(folds)]


def split_share(sequences: Sequences, share: float, seed: int) -> list[Split]:
    """One (training, validation) pair with about `share` of the N in validation, never none, never all.

    Stratified; one member of every class stays in training where the share leaves room for them. Groups stay
    whole: of 1 / share grouped folds the one nearest to the share is taken, so large groups can miss it.
    Raises DataError where there are fewer than two sequences or groups.
    """
    units, what = _units(sequences)
    if not 0 < share < 1 or units < 2:
        raise DataError(f"a share must lie in (0, 1), of two {what} or more; got {share} of {units}")
    labels, rng = _strata(sequences), np.random.default_rng(seed)
    wanted = min(max(round(share * sequences.n), 1), sequences.n - 1)
    if sequences.groups is None:
        return [_split(_share(labels, wanted, rng))]
    folds = min(max(round(1 / min(share, 1 - share)), 2), units)
    fold = _grouped_folds(labels, sequences.groups, folds, rng)
    parts = [(fold == k) if share <= 0.5 else (fold != k) for k in range(folds)]
    return [_split(min(parts, key=lambda part: (_lost_classes(labels, part), abs(part.sum() - wanted))))]


def holdout(sequences: Sequences, share: float, seed: int) -> tuple[Sequences, Sequences]:
    """(training, test) sequences, split as by `split_share`."""
    ((train, test),) = split_share(sequences, share, seed)
    return sequences.take(train), sequences.take(test)


def _units(sequences: Sequences) -> tuple[int, str]:
    if sequences.groups is None:
        return sequences.n, "sequences"
    return len(np.unique(sequences.groups)), "groups"


def _strata(sequences: Sequences) -> Indices:
    return np.zeros(sequences.n, dtype=np.int64) if sequences.labels is None else sequences.labels


def _split(validation: Mask) -> Split:
    return np.flatnonzero(~validation), np.flatnonzero(validation)


def _by_class(labels: Indices, rng: np.random.Generator) -> Indices:
    """Indices class by class, each class shuffled."""
    order = rng.permutation(len(labels))
    return order[np.argsort(labels[order], kind="stable")]


def _share(labels: Indices, wanted: int, rng: np.random.Generator) -> Mask:
    """(N,) true for `wanted` sequences, evenly spaced in the order by class and so stratified."""
    order = _by_class(labels, rng)
    first = np.diff(labels[order], prepend=-1) != 0  # one of each class, for training
    free = order[~first] if wanted <= len(order) - first.sum() else order
    picks = ((np.arange(wanted) + rng.random()) * (len(free) / wanted)).astype(np.int64)
    part = np.zeros(len(labels), dtype=np.bool_)
    part[free[picks]] = True
    return part


def _grouped_folds(labels: Indices, groups: Indices, folds: int, rng: np.random.Generator) -> Indices:
    """(N,) fold of each sequence: of ten draws the first whose training parts hold every class, or the first.

    scikit-learn's StratifiedGroupKFold refuses data in which all classes have fewer members than folds, and
    more often leaves a training part without a class.
    """
    draw = _deal_groups(labels, groups, folds, rng)
    draws = chain([draw], (_deal_groups(labels, groups, folds, rng) for _ in range(9)))
    return next((d for d in draws if not any(_lost_classes(labels, d == k) for k in range(folds))), draw)


def _deal_groups(labels: Indices, groups: Indices, folds: int, rng: np.random.Generator) -> Indices:
    """(N,) folds: the largest groups first, each to the fold that has least of its classes."""
    classes, group = np.unique(labels, return_inverse=True)[1], np.unique(groups, return_inverse=True)[1]
    held = np.zeros((group.max() + 1, classes.max() + 1))  # (groups, classes), as shares of each class
    np.add.at(held, (group, classes), 1)
    held /= held.sum(axis=0)
    order = rng.permutation(len(held))
    dealt = np.zeros((folds, held.shape[1]))
    fold = np.empty(len(held), dtype=np.int64)
    for g in order[np.argsort(-held.sum(axis=1)[order], kind="stable")]:
        fold[g] = np.argmin(dealt @ held[g] + 1e-9 * dealt.sum(axis=1))  # no overlap: to the emptiest
        dealt[fold[g]] += held[g]
    return fold[group]


def _lost_classes(labels: Indices, part: Mask) -> int:
    """How many classes have no member outside of `part`."""
    return len(np.unique(labels)) - len(np.unique(labels[~part]))


# ------------------------------------------------------------------ the canonical file


def to_bytes(sequences: Sequences) -> bytes:
    """The canonical form, a safetensors file: equal content gives equal bytes."""
    from safetensors.numpy import save as serialize

    optional = {"labels": sequences.labels, "groups": sequences.groups}
    arrays = {"values": sequences.values, "lengths": sequences.lengths}
    arrays |= {name: array for name, array in optional.items() if array is not None}
    names = {"classes": sequences.classes, "ids": sequences.ids, "features": sequences.features}
    meta = json.dumps({**names, "filled": sequences.filled}, separators=(",", ":"))
    # one metadata key only: safetensors writes several in any order
    return serialize({k: np.ascontiguousarray(v) for k, v in arrays.items()}, {"sequences": meta})


def fingerprint(sequences: Sequences) -> str:
    """SHA-256 of the canonical form, in hexadecimal: the hash of the file that `save` writes."""
    return hashlib.sha256(to_bytes(sequences)).hexdigest()


def save(sequences: Sequences, path: str | Path) -> None:
    """Write the canonical file, whole or not at all."""
    path = Path(path)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            file.write(to_bytes(sequences))
            file.flush()
            os.fsync(file.fileno())
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def load(path: str | Path) -> Sequences:
    """Map a canonical file into memory, copy on write: processes share its pages. Raises DataError."""
    try:
        with Path(path).open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        meta = json.loads(header.pop("__metadata__")["sequences"])
        named = {name: tuple(meta[name]) for name in ("classes", "ids", "features")}
        mapped = {name: _mapped(path, 8 + size, entry) for name, entry in header.items()}
        return Sequences(**{"labels": None, "groups": None, **mapped, **named, "filled": meta["filled"]})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, MemoryError) as error:
        raise DataError(f"{path} is not a whole data set file: {type(error).__name__}: {error}") from None


def _mapped(path: str | Path, start: int, entry: dict[str, Any]) -> NDArray[Any]:
    """One tensor of a safetensors file; the reader of safetensors itself copies it."""
    dtype = {"F32": "<f4", "I64": "<i8"}[entry["dtype"]]
    begin, shape = start + entry["data_offsets"][0], tuple(entry["shape"])
    return np.memmap(path, dtype=dtype, mode="c", offset=begin, shape=shape).view(np.ndarray)
