"""csv and parquet files: tables of sequences in long form (one row a step) or wide form (one sequence a row).

Letters: R rows, N sequences, T steps, F features.
"""

from __future__ import annotations

import csv
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpo.models.data.sequences import MISSING, DataError, Indices, Raw, codes_of, is_number, names_of, pad


@dataclass(frozen=True)
class Columns:
    """The columns of a table by what they hold."""

    label: str
    id: str
    step: str
    group: str
    features: tuple[str, ...] | None  # the features to read; None: every column without another role
    labeled: bool | None  # True: the label column must be there


@dataclass(frozen=True)
class _Table:
    source: str
    rows: Sequence[int]  # (R,) row numbers as the file counts them
    features: tuple[str, ...]
    values: NDArray[np.float64]  # (R, F)
    roles: dict[str, Any]  # (R,) each: those there are of "label", "id", "step", "group"

    def at(self, row: int) -> str:
        return f"{self.source}, row {self.rows[row]}"


def read_csv(path: Path, columns: Columns) -> Raw:
    """csv with a header: long form (one row a step) or wide form (one univariate sequence a row). Raises DataError."""
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
        for lines, table in _chunks(numbered, str(path), header):
            rows += lines
            values.append(_numbers(str(path), lines, {name: table[name] for name in features}))
            for role, name in roles.items():
                texts.setdefault(role, []).extend(table[name])
    if not rows:
        raise DataError(f"{path} is empty: it has a header only")
    whole = _Table(str(path), rows, features, np.concatenate(values), texts)
    return _long(whole) if long else _wide(whole)


def _chunks(
    numbered: Iterator[tuple[int, list[str]]], source: str, header: list[str]
) -> Iterator[tuple[tuple[int, ...], dict[str, tuple[str, ...]]]]:
    """Of rows with their line numbers up to 1,000 at a time: the numbers and, by column, the cells."""
    while chunk := list(islice(numbered, 1_000)):
        for line, row in chunk:
            if len(row) != len(header):
                raise DataError(f"{source}, row {line} has {len(row)} cells, the header {len(header)}")
        lines, cells = zip(*chunk, strict=True)
        yield lines, dict(zip(header, zip(*cells, strict=True), strict=True))


def _layout(
    source: str, header: list[str], columns: Columns, only_long: bool = False
) -> tuple[bool, tuple[str, ...], dict[str, str]]:
    """Whether this is long form, the feature columns, and the column of each role that there is."""
    here = f"its columns are {', '.join(header[:20])}"
    roles = _roles(source, header, columns)
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


def _roles(source: str, header: list[str], columns: Columns) -> dict[str, str]:
    """The column of each role that there is, once those that must be there are."""
    here = f"its columns are {', '.join(header[:20])}"
    wanted = {"label": columns.label, "id": columns.id, "step": columns.step, "group": columns.group}
    roles = {role: name for role, name in wanted.items() if name in header}
    if "" in header or len(set(header)) < len(header) or (not roles and not _could_be_names(header)):
        raise DataError(f"{source}: the first row must name every column, each differently; {here}")
    for role, name in wanted.items():
        unneeded = role in ("label", "group") and not columns.labeled
        if role not in roles and not unneeded and (name != role or role == "label"):
            raise DataError(f"{source} has no {role} column {name!r}; {here}")
    return roles


def _could_be_names(header: list[str]) -> bool:
    """Numbers in a header are names only where they count the steps."""
    numbers = [name for name in header if is_number(name)]
    start = int(numbers[0]) if numbers and numbers[0].isdecimal() else 0
    return numbers == [str(start + i) for i in range(len(numbers))]


def _numbers(source: str, lines: Sequence[int], columns: dict[str, tuple[str, ...]]) -> NDArray[np.float64]:
    """(R, F) numbers of F text columns; NaN where missing."""
    texts = [list(map(MISSING.get, column, column)) for column in columns.values()]
    try:
        return np.array(texts, dtype=np.float64).T
    except ValueError:
        cells = ((name, line, cell) for name in columns for line, cell in zip(lines, columns[name], strict=True))
        name, line, cell = next(c for c in cells if not is_number(MISSING.get(c[2], c[2])))
        way_out = "if these are labels, ids, steps or groups, name that column as such"
        at = f"{source}, row {line}, column {name!r}"
        raise DataError(f"{at}: {cell!r} is not a number; {way_out}") from None


def read_parquet(path: Path, columns: Columns) -> Raw:
    """parquet in long form; needs pyarrow. Raises DataError."""
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


def _long(table: _Table) -> Raw:
    """Rows of steps, in any order, to sequences in the order in which their ids first appear."""
    ids = names_of(table.roles["id"])
    if None in ids:
        raise DataError(f"{table.at(ids.index(None))} has no id")
    codes, names = codes_of(ids)
    steps = _steps(table)
    order = np.lexsort((steps, codes))
    twice = (np.diff(codes[order]) == 0) & (steps[order][1:] == steps[order][:-1])
    for row in order[1:][twice].tolist():
        raise DataError(f"{table.at(row)}: sequence {ids[row]!r} has step {steps[row]} a second time")
    values = pad(table.values[order], np.bincount(codes))
    labels, groups = (_constant(table, role, ids, codes) for role in ("label", "group"))
    return Raw(table.source, values, labels, groups, "sequence", names, names, table.features)


def _steps(table: _Table) -> NDArray[Any]:
    """(R,) steps as whole numbers, numbers or times."""
    steps = table.roles["step"]
    for dtype in (np.int64, np.float64, "datetime64[us]"):
        if isinstance(steps, list):
            try:
                with warnings.catch_warnings(action="error"):  # numpy only warns of an offset in a time
                    steps = np.array([text.removesuffix("Z") for text in steps], dtype=dtype)
            except (ValueError, OverflowError, UserWarning):
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
    names = names_of(table.roles[role])
    found = codes_of(names)[0]
    first = np.unique(codes, return_index=True)[1]
    for row in np.flatnonzero(found != found[first][codes]).tolist():
        change = f"{role} of sequence {ids[row]!r} changes to {names[row]!r}"
        raise DataError(f"{table.at(row)}: {change}; a sequence has one {role}")
    return [names[i] for i in first]


def _wide(table: _Table) -> Raw:
    """Rows (R, T) of univariate sequences."""
    roles = table.roles
    ids = tuple(map(str, names_of(roles["id"]))) if "id" in roles else None
    if ids and len(set(ids)) < len(ids):
        raise DataError(f"{table.source}: ids repeat as in long form: name its step column too")
    values = table.values[:, :, None]
    return Raw(table.source, values, roles.get("label"), roles.get("group"), "row", table.rows, ids)
