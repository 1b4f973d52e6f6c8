"""The order of steps and of sequences, and the distances between them: whole numbers of any size, numbers, or times.

A column of steps has one form. Numbers and times are not mixed, nor two ways to write a time, nor times with and
without an offset from UTC: what does not look like the first one is an error that names both. A time is read only where
it can mean one thing: a day that may be a month is an error, too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from datetime import date
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpo.models.data.sequences import MISSING, DataError, is_number

_CLOCK = (
    r"(?P<clock>\d\d?:\d\d(?::\d\d(?:[.,]\d{1,9})?)?|\d\d(?:\d\d(?:\d\d(?:[.,]\d{1,9})?)?)?)"
    r"(?P<half> ?[AaPp][Mm])?"
)
_OFFSET = r" ?(?P<offset>Z|UTC|GMT|[+-]\d\d(?::?\d\d)?)"
_WEEKDAY = r"(?:(?P<weekday>[A-Za-z]{3,9}),? )?"
_MONTH = r"(?P<month>[A-Za-z]{3,9})"
_DATES = (  # each a form of its own
    r"(?P<year>\d{4})-(?P<month>\d\d)(?:-(?P<day>\d\d))?",  # ISO 8601
    r"(?P<year>\d{4})(?P<month>\d\d)(?P<day>\d\d)(?=[T ])",  # its basic form; without a clock it is a number
    r"(?P<year>\d{4})(?P<mark>[/.])(?P<month>\d\d?)(?P=mark)(?P<day>\d\d?)",
    r"(?P<day>\d\d?)\.(?P<month>\d\d?)\.(?P<year>\d{4})",
    rf"{_WEEKDAY}(?P<day>\d\d?)[ -]{_MONTH}\.?,?[ -](?P<year>\d{{4}})",  # with weekday and offset as in RFC 2822
    rf"{_WEEKDAY}{_MONTH}\.? (?P<day>\d\d?),? (?P<year>\d{{4}})",
)
_TIMES = tuple(re.compile(rf"{day}(?:(?:T|,? ){_CLOCK}(?:{_OFFSET})?)?") for day in _DATES)
_MONTHS = (
    "january", "february", "march", "april", "may", "june", "july", "august", "september", "october", "november",
    "december",
)  # fmt: skip
_WEEKDAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
_AMBIGUOUS = re.compile(r"\d\d?([/.-])\d\d?\1\d\d(\d\d)?(\D.*)?")
_FORMS = "2024-01-31, 2024-01-31T09:00:00.5+01:00, 2024/01/31 09:00, 31.01.2024 09:00 or 31 Jan 2024 09:00 UTC"
_TAKEN = {"step": f"steps are numbers or times, as in {_FORMS}", "time": f"times are numbers, or as in {_FORMS}"}
_SECONDS = {"W": 604_800.0, "D": 86_400.0, "h": 3_600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
UNITS = ("us", "ns")  # of times: microseconds wherever they tell all apart


def in_order(steps: Sequence[object] | NDArray[Any], at: Callable[[int], str], what: str = "step") -> NDArray[Any]:
    """(R,) numbers or times that sort as the steps (R,) do, from texts or from an array of numbers or times.

    `at` says where the i-th step stands, `what` they are called: "step" or "time". Raises DataError for one that is
    missing or of another form than the first.
    """
    if not isinstance(steps, np.ndarray) or steps.dtype.kind not in "iufMm":
        steps = _parsed(["" if step is None else step if type(step) is str else str(step) for step in steps], at, what)
    missing = np.isnat(steps) if steps.dtype.kind in "Mm" else np.isnan(steps)
    for row in np.flatnonzero(missing).tolist():
        raise DataError(f"{at(row)} has no {what}")
    if steps.dtype.kind == "f":
        for row in np.flatnonzero(np.isinf(steps)).tolist():
            raise DataError(f"{at(row)}: a {what} must be finite, got {steps[row]}")
    return steps


def moments(values: Sequence[object] | NDArray[Any], at: Callable[[int], str]) -> NDArray[Any]:
    """(N,) what orders sequences in time: int64, float64, or datetime64 of one of `UNITS` in UTC where there are
    offsets.

    The same times give the same array whatever form they were written in; masked ones are missing. Raises DataError
    like `in_order`.
    """
    if isinstance(values, np.ma.MaskedArray) and np.ma.is_masked(values):
        values = values.tolist()
    if isinstance(values, np.ndarray) and values.dtype.kind == "S":
        values = np.char.decode(values, "utf-8")
    found = in_order(values, at, "time")
    if found.dtype.kind == "m":  # since whatever they are counted from
        found = found.view(found.dtype.str.replace("m8", "M8"))
    if found.dtype.kind == "M":
        return _timestamps(found, at)
    if found.dtype.kind == "f" and (found == np.floor(found)).all() and np.abs(found).max(initial=0) < 2**53:
        return found.astype(np.int64)
    if found.dtype.kind == "u" and found.max(initial=0) < 2**63:
        return found.astype(np.int64)
    return found.astype(np.int64) if found.dtype.kind == "i" else found.astype(np.float64) + 0.0  # of -0.0: 0.0


def _timestamps(times: NDArray[Any], at: Callable[[int], str]) -> NDArray[Any]:
    """In the first of UNITS that holds them all exactly."""
    for unit in UNITS:
        found = times.astype(f"datetime64[{unit}]")
        lost = np.flatnonzero(found.astype(times.dtype) != times)
        if not len(lost):
            return found
    raise DataError(f"{at(int(lost[0]))}: a time must lie between 1678 and 2261 and be one of whole nanoseconds")


def positions(steps: NDArray[Any]) -> NDArray[np.float64]:
    """(R,) where the steps are, from the first one on: what is between two of them is their distance; infinite where a
    float cannot hold it."""
    if not len(steps):
        return np.empty(0)
    low, high = steps.min(), steps.max()
    if steps.dtype.kind == "i" and int(high) - int(low) >= 2**63:
        return steps.astype(np.float64)
    with np.errstate(over="ignore"):
        return np.asarray((steps - low).astype(np.float64))


def seconds_of(dtype: np.dtype[Any]) -> float:
    """Seconds of the unit in which `positions` gives steps of this type: 1 for numbers, and for what has no length, as
    months."""
    if dtype.kind not in "Mm":
        return 1.0
    unit, count = np.datetime_data(dtype)
    return count * _SECONDS.get(unit, 1.0)


def _parsed(texts: list[str], at: Callable[[int], str], what: str) -> NDArray[Any]:
    """(R,) of texts, all of the form of the first."""
    if "_" not in "".join(texts):
        for kind in (np.int64, np.float64):
            try:
                found = np.array(texts, dtype=kind)
            except (ValueError, OverflowError):
                continue
            if kind is np.int64 or np.abs(found).max() < 2**53:
                return found
    texts = [text.strip() for text in texts]
    for row in (row for row, text in enumerate(texts) if text in MISSING or text.lower() in ("nan", "nat")):
        raise DataError(f"{at(row)} has no {what}")
    if is_number(texts[0]):
        for row in (row for row, text in enumerate(texts) if not is_number(text)):
            raise _another(texts, row, at, what)
        return _numbers(texts)
    pattern = next((pattern for pattern in _TIMES if pattern.fullmatch(texts[0])), None)
    parts = [None if pattern is None else pattern.fullmatch(text) for text in texts]
    for row, part in enumerate(parts):
        if part is None or _form(part) != _form(parts[0]):
            raise _another(texts, row, at, what)
    return _times(texts, [part for part in parts if part], at, what)


def is_time(text: str) -> bool:
    """Whether it is written like a time, of whatever form."""
    return any(pattern.fullmatch(text) for pattern in _TIMES)


def _form(found: re.Match[str] | None) -> tuple[bool, bool, str | None] | None:
    """What times of one pattern must have in common: an offset, half days, the mark between year and month."""
    if found is None:
        return None
    return found["offset"] is not None, found["half"] is not None, found.groupdict().get("mark")


def _another(texts: list[str], row: int, at: Callable[[int], str], what: str) -> DataError:
    """The error for a step that is none, or of another form than the first."""
    text = texts[row]
    if is_number(text) or is_time(text):
        rule = f"is not of the form of the first {what}, {texts[0]!r}: one form a column"
        return DataError(f"{at(row)}: {what} {text!r} {rule}")
    if _AMBIGUOUS.fullmatch(text):
        rule = "its day or its month may come first; write the year first, as in 2024-01-31"
        return DataError(f"{at(row)}: {text!r} is no {what}: {rule}")
    return DataError(f"{at(row)}: {text!r} is no {what}: {_TAKEN[what]}")


def _numbers(texts: list[str]) -> NDArray[Any]:
    """(R,) of numbers of which some are too large for int64, or for a float to tell them from the next one."""
    try:
        whole = [int(text) for text in texts]
    except ValueError:
        return np.array(texts, dtype=np.float64)
    low = min(whole)
    if max(whole) - low < 2**63:
        return np.array([number - low for number in whole], dtype=np.int64)
    ranks = {number: rank for rank, number in enumerate(sorted(set(whole)))}
    return np.array([ranks[number] for number in whole], dtype=np.int64)


def _times(texts: list[str], parts: list[re.Match[str]], at: Callable[[int], str], what: str) -> NDArray[Any]:
    """(R,) of times, in UTC where they have an offset; to the nanosecond where one is written so finely."""
    fine = any(len(re.split("[.,]", f"{part['clock']}.")[1]) > 6 for part in parts)
    kind = f"datetime64[{'ns' if fine else 'us'}]"
    times = list(map(_iso, parts))
    try:
        found = np.array(times, dtype=kind)
    except ValueError:
        row = next(row for row, time in enumerate(times) if not _exists(time))
        raise DataError(f"{at(row)}: {texts[row]!r} is no {what}: no such time; {_TAKEN[what]}") from None
    for row in (row for row, time in enumerate(times) if fine and not "1678" <= time[:4] <= "2261"):
        raise DataError(f"{at(row)}: {what}s to the nanosecond must lie between 1678 and 2261, got {texts[row]!r}")
    seconds = np.array([_offset_s(part["offset"]) for part in parts], dtype="timedelta64[s]")
    return np.asarray(found - seconds)


def _exists(text: str) -> bool:
    try:
        np.datetime64(text)
    except ValueError:
        return False
    return True


def _iso(part: re.Match[str]) -> str:
    """The time without its offset, as numpy reads it; "?" for one that there is not."""
    month = part["month"] if part["month"].isdecimal() else _place(part["month"], _MONTHS)
    day = f"{part['year']}-{month:0>2}" + (f"-{part['day']:0>2}" if part["day"] else "")
    weekday = part.groupdict().get("weekday")
    if weekday is not None and not _falls_on(day, weekday):
        return "?"
    if part["clock"] is None:
        return day
    clock, _, fraction = part["clock"].replace(",", ".").partition(".")
    hour, *rest = clock.split(":") if ":" in clock else [clock[i : i + 2] for i in range(0, len(clock), 2)]
    if part["half"]:
        if not 1 <= int(hour) <= 12:
            return "?"
        hour = str(int(hour) % 12 + 12 * (part["half"].strip().lower() == "pm"))
    return f"{day}T{':'.join([hour.zfill(2), *rest])}" + (f".{fraction}" if fraction else "")


def _place(name: str, names: tuple[str, ...]) -> int:
    """From 1: which of the names this is the beginning of; 0: none."""
    return next((i for i, each in enumerate(names, 1) if each.startswith(name.lower())), 0)


def _falls_on(day: str, weekday: str) -> bool:
    try:
        return date.fromisoformat(day).isoweekday() == _place(weekday, _WEEKDAYS)
    except ValueError:
        return False


def _offset_s(text: str | None) -> int:
    """Seconds that a clock with this offset is ahead of UTC."""
    if text in (None, "Z", "UTC", "GMT"):
        return 0
    assert text is not None
    size = 3600 * int(text[1:3]) + 60 * int(text[3:].lstrip(":") or 0)
    return -size if text[0] == "-" else size
