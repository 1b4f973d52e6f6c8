"""The order of steps, and the distances between them: whole numbers of any size, numbers, or ISO times.

A column of steps has one form. Numbers and times are not mixed, nor times with and without an offset from UTC: what
does not look like the first one is an error that names both.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpo.models.data.sequences import MISSING, DataError, is_number

_TIME = re.compile(
    r"(?P<date>\d{4}-\d\d(?:-\d\d)?)(?:[T ](?P<clock>\d\d(?::?\d\d(?::?\d\d(?:[.,]\d{1,9})?)?)?)"
    r"(?: ?(?P<offset>Z|[+-]\d\d(?::?\d\d)?))?)?"
)
_TAKEN = "steps are numbers or ISO times, as in 2024-01-31 or 2024-01-31T09:00:00.5+01:00"


def in_order(steps: Sequence[object] | NDArray[Any], at: Callable[[int], str]) -> NDArray[Any]:
    """(R,) numbers or times that sort as the steps (R,) do, from texts or from an array of numbers or times.

    `at` says where the i-th step stands. Raises DataError for one that is missing or of another form than the first.
    """
    if not isinstance(steps, np.ndarray) or steps.dtype.kind not in "iufMm":
        steps = _parsed(["" if step is None else step if type(step) is str else str(step) for step in steps], at)
    missing = np.isnat(steps) if steps.dtype.kind in "Mm" else np.isnan(steps)
    for row in np.flatnonzero(missing).tolist():
        raise DataError(f"{at(row)} has no step")
    if steps.dtype.kind == "f":
        for row in np.flatnonzero(np.isinf(steps)).tolist():
            raise DataError(f"{at(row)}: a step must be finite, got {steps[row]}")
    return steps


def positions(steps: NDArray[Any]) -> NDArray[np.float64]:
    """(R,) where the steps are, from the first one on: what is between two of them is their distance."""
    low, high = steps.min(), steps.max()
    if steps.dtype.kind == "i" and int(high) - int(low) >= 2**63:
        return steps.astype(np.float64)
    return np.asarray((steps - low).astype(np.float64))


def _parsed(texts: list[str], at: Callable[[int], str]) -> NDArray[Any]:
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
        raise DataError(f"{at(row)} has no step")
    forms = list(map(_form, texts))
    for row, form in enumerate(forms):
        if form is None:
            raise DataError(f"{at(row)}: {texts[row]!r} is no step: {_TAKEN}")
        if form != forms[0]:
            rule = f"is not of the form of the first step, {texts[0]!r}: one form a column"
            raise DataError(f"{at(row)}: step {texts[row]!r} {rule}")
    return _numbers(texts) if forms[0] == "number" else _times(texts, at)


def _form(text: str) -> str | None:
    if is_number(text):
        return "number"
    found = _TIME.fullmatch(text)
    return found and ("time with an offset" if found["offset"] else "time")


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


def _times(texts: list[str], at: Callable[[int], str]) -> NDArray[Any]:
    """(R,) of ISO times, in UTC where they have an offset; to the nanosecond where one is written so finely."""
    parts = [found for found in map(_TIME.fullmatch, texts) if found]
    fine = any(len(re.split("[.,]", f"{part['clock']}.")[1]) > 6 for part in parts)
    kind = f"datetime64[{'ns' if fine else 'us'}]"
    times = list(map(_iso, parts))
    try:
        found = np.array(times, dtype=kind)
    except ValueError:
        row = next(row for row, time in enumerate(times) if not _is_time(time))
        raise DataError(f"{at(row)}: {texts[row]!r} is no step: no such time; {_TAKEN}") from None
    for row in (row for row, time in enumerate(times) if fine and not "1678" <= time[:4] <= "2261"):
        raise DataError(f"{at(row)}: steps to the nanosecond must lie between 1678 and 2261, got {texts[row]!r}")
    seconds = np.array([_offset_s(part["offset"]) for part in parts], dtype="timedelta64[s]")
    return np.asarray(found - seconds)


def _is_time(text: str) -> bool:
    try:
        np.datetime64(text)
    except ValueError:
        return False
    return True


def _iso(part: re.Match[str]) -> str:
    """The time without its offset, as numpy reads it."""
    if part["clock"] is None:
        return part["date"]
    digits, _, fraction = part["clock"].replace(":", "").replace(",", ".").partition(".")
    clock = ":".join(digits[i : i + 2] for i in range(0, len(digits), 2))
    return f"{part['date']}T{clock}" + (f".{fraction}" if fraction else "")


def _offset_s(text: str | None) -> int:
    """Seconds that a clock with this offset is ahead of UTC."""
    if text in (None, "Z"):
        return 0
    assert text is not None
    size = 3600 * int(text[1:3]) + 60 * int(text[3:].lstrip(":") or 0)
    return -size if text[0] == "-" else size
