"""Tables of sequences in long form (one row a step) or wide form (one sequence of one feature a row).

They are csv and parquet files, or data frames. A table's columns are known by name:

- The columns of label, id, step, group, time and weight are named by the caller; group may be id, and time id, step or
  group. A table with both an id and a step column is in long form, and every other column is a feature. There the time
  of a sequence is that of its last step.
- Without them it is in wide form, and every other column is a step. The steps' names are one prefix and a number, as in
  t0, t1, or times (`steps.py`); the columns are put in their order. Names of two kinds are refused.
- A column that pandas writes for its index (`Unnamed: 0`, `__index_level_0__`, one without a name) holds the place of
  a row, which can give the class away: it is left out, and the log says so.

Letters: R rows, N sequences, T steps, F features.
"""

from __future__ import annotations

import csv
import json
import re
from array import array
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice, pairwise
from numbers import Number
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from hpo.models.data.buffers import Growing, empty, taken
from hpo.models.data.columns import BESIDE, ROLES, clash
from hpo.models.data.sequences import (
    MISSING,
    DataError,
    Indices,
    Raw,
    codes_of,
    ids_of,
    is_missing,
    is_number,
    names_of,
    pad,
    visible,
    warn,
)
from hpo.models.data.sizes import check_content, check_padding
from hpo.models.data.steps import in_order, is_time, moments, positions, seconds_of
from hpo.models.data.text import open_text
from hpo.models.data.weights import weights

_INDEX = re.compile(r"(Unnamed: \d+(_level_\d+)?|__index_level_\d+__)?")  # how pandas names its index, or does not
_STEP = re.compile(r"(.*?)(\d+(?:\.\d+)?)")  # prefix and number
_DATE = re.compile(r"\d{4}-\d\d-\d\d.*|\d{4}-\d\d")  # also one that there is not, or with more behind it
KINDS = 100_000  # different texts of a column that are looked for among those that were read
_COMMA = re.compile(r"(?<=\d),(?=\d)")  # a decimal one: not that of Wed, 31 Jan


@dataclass(frozen=True)
class Columns:
    """The columns of a table by what they hold."""

    label: str
    id: str
    step: str
    group: str
    features: tuple[str, ...] | None  # the features to read; None: every column without another role
    named: bool  # False: `features` only numbers them, so that a table without these columns is read by place
    labeled: bool | None  # True: the label column must be there
    needed: Collection[str] = ()  # of the roles those that must be there, whatever `labeled`
    time: str | None = None  # None: no column orders the sequences
    weight: str | None = None  # None: all sequences count alike

    @property
    def roles(self) -> dict[str, str]:
        """The column of each role that has one. Raises DataError where two are one that must not be."""
        given = {role: getattr(self, role) for role in ROLES}
        found = {role: name for role, name in given.items() if name is not None}
        if rule := clash(found):
            raise DataError(f"{rule}, got {', '.join(f'{role} = {name!r}' for role, name in found.items())}")
        return found

    def reads(self, role: str) -> bool:
        """Whether a column of that role is read where there is one; else it is only no feature."""
        return role not in BESIDE or self.labeled is not False

    def demands(self, role: str) -> bool:
        """Whether there must be a column of that role."""
        name = getattr(self, role)
        asked = bool(self.labeled) or role in self.needed or role in ("id", "step")
        return asked and (name != role if role in ("id", "step", "group") else name is not None)


@dataclass(frozen=True)
class _Layout:
    long: bool
    features: tuple[str, ...]  # of the long form; the columns of the steps, in their order, of the wide one
    roles: dict[str, str]  # the column of each role that there is
    times: NDArray[np.float64] | None = None  # (T,) where the steps of the wide form are
    seconds: float = 1.0  # of a unit of these


@dataclass(frozen=True)
class _Table:
    source: str
    rows: Sequence[int]  # (R,) row numbers as the file counts them
    layout: _Layout
    values: NDArray[np.float64]  # (R, F)
    roles: dict[str, Any]  # (R,) each: those there are
    path: Path | None = None  # the file; None: the table was in memory

    def at(self, row: int) -> str:
        return f"{self.source}, row {self.rows[row]}"

    def raw(self) -> Raw:
        return _long(self) if self.layout.long else _wide(self)


# ------------------------------------------------------------------ csv


def read_csv(path: Path, columns: Columns) -> Raw:
    """csv with a header, in long or wide form. Raises DataError.

    Cells are separated by commas, or by semicolons or tabs where the header is, and then a comma in a number is a
    decimal one. The log says so.
    """
    rows, values = array("q"), Growing()
    texts: dict[str, list[str]] = {}
    with open_text(path) as file:
        separator = _separator(file)
        records = _records(str(path), file, separator)
        header = [visible(name) for name in next(records, (0, []))[1]]
        if not header:
            raise DataError(f"{path} is empty: it holds no values")
        layout = _layout(str(path), header, columns)
        numbers = _Numbers(str(path), comma=separator != ",")
        for lines, table in _chunks(records, str(path), header):
            rows.extend(lines)
            values.append(numbers.of(lines, {name: table[name] for name in layout.features}))
            for role, name in layout.roles.items():
                if columns.reads(role):
                    texts.setdefault(role, _Cells()).extend(table[name])
    if not rows:
        raise DataError(f"{path} is empty: it has a header only")
    numbers.check()
    if separator != ",":
        _say_form(str(path), separator, "," in numbers.marks)
    if numbers.comma:
        for role in texts.keys() & {"step", "time"}:
            texts[role] = [_COMMA.sub(".", text) for text in texts[role]]
        if "weight" in texts:
            texts["weight"] = [text.replace(",", ".") for text in texts["weight"]]
    return _Table(str(path), rows, layout, values.whole(), texts, path).raw()


class _Cells(list[str]):
    """The texts of a column. Equal ones are one object, as ids, steps and labels come again and again."""

    def __init__(self) -> None:
        self._seen: dict[str, str] = {}

    def extend(self, texts: Iterable[str]) -> None:
        seen = self._seen
        super().extend(seen.setdefault(text, text) for text in texts)
        if len(seen) > KINDS:  # they do not come again
            seen.clear()


def _separator(file: TextIO) -> str:
    """What separates the cells of the header: of comma, semicolon and tab the one that gives most of them."""
    first = "\n"
    while first and not first.strip():
        first = file.readline()
    file.seek(0)
    with suppress(csv.Error):  # which `_records` meets, too
        return max(",;\t", key=lambda separator: len(next(csv.reader([first], delimiter=separator), [])))
    return ","


def _say_form(source: str, separator: str, comma: bool) -> None:
    found = {";": "semicolons", "\t": "tabs"}[separator]
    warn(f"{source}: read with {found} between its cells{', and decimal commas' if comma else ''}")


def _records(source: str, file: TextIO, separator: str) -> Iterator[tuple[int, list[str]]]:
    """The rows that are not blank, each with the number of its last line."""
    reader = csv.reader(file, delimiter=separator, skipinitialspace=True, strict=True)
    line = 0
    try:
        for row in reader:
            line = reader.line_num
            if row:
                yield line, row
    except csv.Error as error:
        rule = "a quote that opens a cell must end it; write a quote within a cell twice"
        raise DataError(f"{source}, row {line + 1}: {rule} ({error})") from None


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


@dataclass(frozen=True)
class _Numbers:
    """Cells to numbers."""

    source: str
    comma: bool  # a comma in a number is a decimal one
    marks: dict[str, str] = field(default_factory=dict)  # where the first comma and the first point of a number stand

    def of(self, lines: Sequence[int], columns: dict[str, tuple[str, ...]]) -> NDArray[np.float64]:
        """(R, F) numbers of F text columns; NaN where missing."""
        try:
            return np.array([self._texts(lines, *column) for column in columns.items()], dtype=np.float64).T
        except ValueError:
            cells = ((name, line, cell) for name in columns for line, cell in zip(lines, columns[name], strict=True))
            name, line, cell = next(c for c in cells if not is_number(self._point(MISSING.get(c[2], c[2]))))
            way_out = "if these are labels, ids, steps or groups, name that column as such"
            at = f"{self.source}, row {line}, column {name!r}"
            raise DataError(f"{at}: {cell!r} is not a number; {way_out}") from None

    def check(self) -> None:
        """Raise DataError where some numbers have a comma and others a point: one of them may part thousands."""
        if len(self.marks) == 2:
            rule = "a comma or a point is the decimal mark, not both"
            raise DataError(f"{self.source}: {self.marks[',']} and {self.marks['.']}: {rule}")

    def _texts(self, lines: Sequence[int], name: str, column: tuple[str, ...]) -> list[str]:
        """(R,) texts that float() reads as they are meant."""
        joined = "".join(column)
        if "_" in joined:
            raise ValueError("float() would leave it out")
        if self.comma:
            for mark in ",.":
                if mark in joined and mark not in self.marks:
                    line, cell = next(found for found in zip(lines, column, strict=True) if mark in found[1])
                    self.marks[mark] = f"row {line}, column {name!r} holds {cell!r}"
            if "," in joined:
                column = tuple(map(self._point, column))
        return list(map(MISSING.get, column, column))

    def _point(self, cell: str) -> str:
        """The cell with a decimal point."""
        return cell.replace(",", ".") if self.comma else cell


# ------------------------------------------------------------------ what the columns are


def _layout(source: str, header: list[str], columns: Columns, only_long: bool = False) -> _Layout:
    """What the columns of a table are. Raises DataError."""
    here = _columns(header)
    roles = _roles(source, header, columns)
    long = "id" in roles and "step" in roles
    wanted = columns.features or ()
    features = tuple(name for name in header if name not in roles.values() and _kept(source, name, wanted))
    stepped = "step" not in roles and (all(map(_STEP.fullmatch, features)) or all(map(_is_date, features)))
    if not long and (only_long or not stepped):
        wide = "" if only_long else "; in wide form the names of the steps end in numbers, as in t0, t1"
        rule = f"long form needs columns {columns.id!r} and {columns.step!r}{wide}"
        raise DataError(f"{source}: {rule}; {here}")
    if not features:
        raise DataError(f"{source} has no feature column; {here}")
    if not long:
        order, times, seconds = _wide_steps(source, features)
        return _Layout(False, order, roles, times, seconds)
    unknown = [name for name in wanted if name not in header]
    if unknown and columns.named:
        raise DataError(f"{source} has no feature column {', '.join(map(repr, unknown))}; {here}")
    return _Layout(True, wanted if wanted and not unknown else features, roles)


def _is_date(name: str) -> bool:
    return bool(_DATE.fullmatch(name)) or is_time(name)


def _kept(source: str, name: str, wanted: tuple[str, ...]) -> bool:
    """Whether a column is one of the data, not the index of a data frame."""
    if name in wanted or not _INDEX.fullmatch(name):
        return True
    warn(f"{source}: column {name!r} is left out: it is the index of a data frame, or has no name")
    return False


def _roles(source: str, header: list[str], columns: Columns) -> dict[str, str]:
    """The column of each role that there is, once those that must be there are."""
    here = _columns(header)
    wanted = columns.roles
    roles = {role: name for role, name in wanted.items() if name in header}
    if len(set(header)) < len(header) or (not roles and not _could_be_names(header)):
        raise DataError(f"{source}: the first row must name every column, each differently; {here}")
    for role, name in wanted.items():
        if role not in roles and columns.demands(role):
            way_out = f"say which is the {role} column (data.{role} of a study, {role}= in Python)"
            raise DataError(f"{source} has no {role} column {name!r}; {here}; {way_out}")
    return roles


def _columns(header: list[str]) -> str:
    more = f" and {len(header) - 20} more" if header[20:] else ""
    return f"its columns are {', '.join(header[:20])}{more}"


def _could_be_names(header: list[str]) -> bool:
    """Numbers in a header are names only where they count the steps."""
    numbers = [name for name in header if is_number(name)]
    start = int(numbers[0]) if numbers and numbers[0].isdecimal() and len(numbers[0]) < 19 else 0
    return numbers == [str(start + i) for i in range(len(numbers))]


def _wide_steps(source: str, names: tuple[str, ...]) -> tuple[tuple[str, ...], NDArray[np.float64], float]:
    """The columns of the steps in their order, (T,) where the steps are, and the seconds of a unit of that."""
    if all(map(_is_date, names)):
        steps = in_order(names, lambda i: f"{source}, column {names[i]!r}")
    else:
        found = [parts.group(1, 2) for parts in map(_STEP.fullmatch, names) if parts]
        for name, (prefix, _) in zip(names, found, strict=True):
            if prefix != found[0][0]:
                rule = "in wide form the steps of one feature share a prefix; more features need the long form"
                raise DataError(f"{source}: columns {names[0]!r} and {name!r} are of two kinds: {rule}")
        steps = in_order([number for _, number in found], lambda i: f"{source}, column {names[i]!r}")
    order = np.argsort(steps, kind="stable")
    for i, j in pairwise(order):
        if steps[i] == steps[j]:
            raise DataError(f"{source}: columns {names[i]!r} and {names[j]!r} are one step")
    return tuple(names[i] for i in order), positions(steps[order]), seconds_of(steps.dtype)


# ------------------------------------------------------------------ parquet and data frames


def read_parquet(path: Path, columns: Columns) -> Raw:
    """parquet in long form; needs pyarrow. Raises DataError."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise DataError(f"{path}: parquet needs pyarrow: pip install 'hpo[parquet]'") from None
    try:
        with pq.ParquetFile(path) as file:
            table = _bounded_table(path, pa, file)
            indices = _pandas_index(file.schema_arrow.metadata or {}, columns)
    except (pa.ArrowException, OSError, ValueError, OverflowError, RecursionError) as error:
        raise DataError(f"{path} is empty, damaged or not a parquet file: {error}") from None
    for name in indices:
        if table.column_names.count(name) == 1:  # of two of that name `_layout` speaks
            warn(f"{path}: column {name!r} is left out: it is the index of a data frame")
            table = table.drop_columns([name])
    return _frame(str(path), table, columns, path)


def _bounded_table(path: Path, pa: Any, file: Any) -> Any:
    """The table of Arrow, once neither its footer nor its pages say more than a file of this size may hold."""
    said = file.metadata
    check_content(path, 8 * said.num_rows * said.num_columns, said.num_rows)
    batches, size = [], 0
    for batch in file.iter_batches(1_000):
        batches.append(batch)
        size += batch.nbytes
        check_content(path, size)
    return pa.Table.from_batches(batches, file.schema_arrow)


def _pandas_index(metadata: dict[bytes, bytes], columns: Columns) -> list[str]:
    """The columns that pandas wrote for its index and that nobody asks for. Raises ValueError."""
    wanted = {*columns.roles.values(), *(columns.features or ())}
    found = json.loads(metadata.get(b"pandas", b"{}"))
    names = found.get("index_columns", []) if isinstance(found, dict) else None
    if not isinstance(names, list):
        raise ValueError("what pandas wrote of its index is damaged")
    return [name for name in names if isinstance(name, str) and name not in wanted]


def is_frame(data: object) -> bool:
    """Whether this is a table of named columns: a data frame of pandas or polars, or a table of Arrow."""
    return hasattr(data, "columns") and hasattr(data, "__getitem__") and hasattr(data, "shape")


def read_frame(data: Any, columns: Columns, source: str = "the data frame") -> Raw:
    """A data frame in long or wide form; of its index only what is named by a role is read.

    Raises DataError.
    """
    named = columns.roles.values()
    levels = [name for name in getattr(getattr(data, "index", None), "names", ()) if name in named]
    return _frame(source, data.reset_index(level=levels) if levels else data, columns)


def _frame(source: str, frame: Any, columns: Columns, path: Path | None = None) -> Raw:
    """A data frame of pandas or polars or a table of Arrow, which are alike in `frame[name].to_numpy()`.

    path: of the file that holds it, in long form.
    """
    keys = list(getattr(frame, "column_names", None) or frame.columns)  # an Arrow table's `columns` are the data
    header = [visible(str(key)) for key in keys]
    layout = _layout(source, header, columns, only_long=path is not None)
    by_name = dict(zip(header, keys, strict=True))
    rows = range(len(frame))
    values = empty((len(rows), len(layout.features)), np.float64)
    for j, name in enumerate(layout.features):
        values[:, j] = _column_numbers(f"{source}, column {name!r}", frame[by_name[name]])
    roles = {}
    for role, name in layout.roles.items():
        if not columns.reads(role):
            continue
        try:
            roles[role] = _column_values(frame[by_name[name]], role)
        except (OverflowError, ValueError) as error:  # a day beyond the year 9999, bytes that are no text
            raise DataError(f"{source}, column {name!r} holds a value that cannot be read: {error}") from None
    return _Table(source, rows, layout, values, roles, path).raw()


def _column_values(column: Any, role: str) -> Any:
    """(R,) Python values, None where one is missing; steps and times that are numbers or times as an array."""
    ordered = role in ("step", "time")
    if hasattr(column, "to_pylist") and (not ordered or column.null_count):  # of Arrow
        return column.to_pylist()
    array = _numpy(column)
    if array.dtype.kind in "Mm":
        return array if ordered else array.astype(str).tolist()
    if ordered and array.dtype.kind in "iuf":
        return array
    return [None if is_missing(value) else value for value in array.tolist()]


def _numpy(column: Any) -> NDArray[Any]:
    """The column as an array; Arrow asks for leave to copy."""
    array = column.to_numpy(zero_copy_only=False) if hasattr(column, "to_pylist") else column.to_numpy()
    return np.asarray(array)


def _column_numbers(at: str, column: Any) -> NDArray[np.float64]:
    """(R,) float64; NaN where missing."""
    array = _numpy(column)
    if array.dtype.kind in "fiub":
        return np.asarray(array, dtype=np.float64)
    if array.dtype.kind in "Mm":
        raise DataError(f"{at} must hold numbers, got times")
    values = [np.nan if is_missing(value) else _number(at, row, value) for row, value in enumerate(array.tolist())]
    return np.array(values, dtype=np.float64)


def _number(at: str, row: int, value: Any) -> float:
    """Of a number, or of a text that is one."""
    try:
        if not isinstance(value, Number):
            value = MISSING.get(value.strip(), value)
        if not isinstance(value, Number) and not is_number(value):
            raise ValueError
        return float(value)
    except (TypeError, ValueError, AttributeError):
        raise DataError(f"{at} must hold numbers, row {row} holds {value!r}") from None


# ------------------------------------------------------------------ rows to sequences


def _long(table: _Table) -> Raw:
    """Rows of steps, in any order, to sequences in the order in which their ids first appear."""
    ids = ids_of(table.roles["id"], table.at)
    codes, names = codes_of(ids)
    steps = in_order(table.roles["step"], table.at)
    order = np.lexsort((steps, codes))
    twice = (np.diff(codes[order]) == 0) & (steps[order][1:] == steps[order][:-1])
    for row in order[1:][twice].tolist():
        step = table.roles["step"][row]
        raise DataError(f"{table.at(row)}: sequence {ids[row]!r} has step {step} a second time")
    lengths = np.bincount(codes)
    if table.path is not None:
        check_padding(table.path, len(lengths), int(lengths.max(initial=0)), table.values.shape[1])
    values = pad(taken(table.values, order), lengths)
    times = pad(positions(steps)[order][:, None], lengths)[:, :, 0]
    labels, groups = (_constant(table, role, ids, codes) for role in ("label", "group"))
    features, last = table.layout.features, order[np.cumsum(lengths) - 1]
    counted = _weights(table)
    if counted is not None:
        counted = counted[_first(table, "weight", counted, table.roles["weight"], ids, codes)]
    return Raw(
        table.source,
        values,
        labels,
        groups,
        "sequence",
        names,
        names,
        features,
        times=times,
        seconds=seconds_of(steps.dtype),
        moments=_moments(table, last),
        weights=counted,
    )


def _moments(table: _Table, rows: Indices) -> NDArray[Any] | None:
    """(N,) the times in these rows (N,)."""
    if "time" not in table.roles:
        return None
    found = table.roles["time"]
    some = found[rows] if isinstance(found, np.ndarray) else [found[row] for row in rows.tolist()]
    return moments(some, lambda i: table.at(int(rows[i])))


def _weights(table: _Table) -> NDArray[np.float64] | None:
    """(R,) the weight in each row."""
    return None if "weight" not in table.roles else weights(table.roles["weight"], table.at)


def _constant(table: _Table, role: str, ids: Sequence[str], codes: Indices) -> list[object] | None:
    """(N,) the one label or group of each sequence."""
    if role not in table.roles:
        return None
    names = names_of(table.roles[role], table.at)
    first = _first(table, role, codes_of(names)[0], names, ids, codes)
    return [table.roles[role][i] for i in first]


def _first(
    table: _Table, role: str, found: NDArray[Any], shown: Sequence[object], ids: Sequence[str], codes: Indices
) -> Indices:
    """(N,) the first row of each sequence, once its others hold the same of `found` (R,)."""
    first = np.unique(codes, return_index=True)[1]
    for row in np.flatnonzero(found != found[first][codes]).tolist():
        change = f"{role} of sequence {ids[row]!r} changes to {shown[row]!r}"
        raise DataError(f"{table.at(row)}: {change}; a sequence has one {role}")
    return first


def _wide(table: _Table) -> Raw:
    """Rows (R, T) of univariate sequences."""
    roles = table.roles
    ids = ids_of(roles["id"], table.at) if "id" in roles else None
    if ids and len(set(ids)) < len(ids):
        raise DataError(f"{table.source}: ids repeat as in long form: name its step column too")
    values = table.values[:, :, None]
    times = None if table.layout.times is None else np.broadcast_to(table.layout.times, table.values.shape)
    return Raw(
        table.source,
        values,
        roles.get("label"),
        roles.get("group"),
        "row",
        table.rows,
        ids,
        times=times,
        seconds=table.layout.seconds,
        moments=_moments(table, np.arange(len(values))),
        weights=_weights(table),
    )
