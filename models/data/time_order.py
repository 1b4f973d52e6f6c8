"""Splits in the order of time: what validates or tests is later than what trains, functions of the data alone.

Sequences of equal time never stand on both sides of a cut. Of a group that has sequences in the later part, the earlier
ones are left out, and so is what lies in the gap.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpo.models.data.sequences import DataError, Indices, Mask, Sequences
from hpo.models.data.splits import counting

Gap = int | float | None  # a number of sequences, seconds, or nothing


@dataclass(frozen=True)
class Cut:
    """Where one part ends and the later one begins."""

    train: Indices  # rows, ascending
    later: Indices  # rows, ascending
    in_gap: int  # earlier sequences that are left out as they lie in the gap
    in_groups: int  # … as their group has sequences in the later part


def latest(sequences: Sequences, share: float, gap: Gap = None) -> Cut:
    """The latest `share` of the N sequences, and what may train for it; as near to the share as equal times
    allow, never none, never all.

    Raises DataError where all times are equal, and where nothing or one class only is left to train on.
    """
    (start,) = _starts(sequences, [(1 - share) * sequences.n])
    return _cut(sequences, start, None, gap, f"the latest {share:g} of it")


def rolling(sequences: Sequences, folds: int, gap: Gap = None) -> list[Cut]:
    """k cuts: k consecutive blocks, each of which validates what everything before it has trained.

    All k + 1 blocks, of which the first only trains, are of like size, as far as equal times allow. Raises DataError
    where there are too few times, and where for one of the blocks nothing or one class only is left to train on.
    """
    times = distinct(sequences)
    if not 2 <= folds < times:
        raise DataError(
            f"folds in the order of time must be 2 to {times - 1}, one less than there are different times, got {folds}"
        )
    starts = _starts(sequences, [sequences.n * (i + 1) / (folds + 1) for i in range(folds)])
    ends = [*starts[1:], None]
    return [
        _cut(sequences, start, end, gap, f"block {i} of {folds}")
        for i, (start, end) in enumerate(zip(starts, ends, strict=True), 1)
    ]


def distinct(sequences: Sequences) -> int:
    """How many different times there are."""
    return len(np.unique(_moments(sequences)))


def span(sequences: Sequences) -> str:
    """From the first to the last of the times."""
    moments = _moments(sequences)
    return " to ".join(dict.fromkeys(shown(moment) for moment in (moments.min(), moments.max())))


def shown(moment: Any) -> str:
    """A time as it is read, without zeros that say nothing."""
    return re.sub(r"(T00:00:00)?\.0+$", "", str(moment))


def length(gap_s: float) -> np.timedelta64:
    """That of a gap of so many seconds."""
    return np.timedelta64(round(gap_s * 1e6), "us")


def check_gap(sequences: Sequences, gap: Gap) -> None:
    """Raise DataError for a duration where the times are numbers."""
    if isinstance(gap, float) and _moments(sequences).dtype.kind != "M":
        raise DataError(
            f"data.gap of {gap:g} s is a duration, but the times of the sequences are numbers, from {span(sequences)}: "
            "give a number of sequences, as in data.gap = 20"
        )


def _moments(sequences: Sequences) -> NDArray[Any]:
    assert sequences.moments is not None
    return sequences.moments


def _starts(sequences: Sequences, wanted: list[float]) -> list[Any]:
    """The times at which parts begin, rising: of the cuts between different times those nearest to `wanted` sequences
    before them, each of its own."""
    times, counts = np.unique(_moments(sequences), return_counts=True)
    if len(times) < 2:
        raise DataError(f"all {sequences.n} sequences are of one time, {shown(times[0])}, which is never cut")
    before = counts.cumsum()[:-1]  # sequences before each cut
    starts: list[Any] = []
    low = 0
    for i, size in enumerate(wanted):
        high = len(before) - (len(wanted) - 1 - i)  # the others need one each
        low += int(np.abs(before[low:high] - size).argmin()) + 1
        starts.append(times[low])
    return starts


def _cut(sequences: Sequences, start: Any, end: Any, gap: Gap, what: str) -> Cut:
    """Everything before the time `start`, and the part from there to before `end` (None: to the last)."""
    moments = _moments(sequences)
    earlier = moments < start
    later = ~earlier if end is None else ~earlier & (moments < end)
    near = _near(moments, earlier, start, gap)
    train = earlier & ~near
    if sequences.groups is not None:
        train &= ~np.isin(sequences.groups, sequences.groups[later])
    cut = Cut(np.flatnonzero(train), np.flatnonzero(later), int(near.sum()), int((earlier & ~near & ~train).sum()))
    _check(sequences, cut, f"{what} (from {shown(start)} on)")
    return cut


def _near(moments: NDArray[Any], earlier: Mask, start: Any, gap: Gap) -> Mask:
    """(N,) the earlier sequences in the gap before the time `start`: as many as it says with all that are of one time
    with them, or those that are later than its length before it."""
    if not gap:
        return np.zeros(len(moments), dtype=np.bool_)
    if isinstance(gap, int):
        first = np.sort(moments[earlier])[-min(gap, int(earlier.sum()))]
        return np.asarray(earlier & (moments >= first))
    return np.asarray(earlier & (moments > start - length(gap)))


def _check(sequences: Sequences, cut: Cut, what: str) -> None:
    """Raise DataError where nothing, or one class only, is left to train on."""
    rows = counting(sequences, cut.train)
    n = len(rows)
    labels = None if sequences.labels is None else sequences.labels[rows]
    if n and (labels is None or (labels != labels[0]).any()):
        return
    left = "nothing" if labels is None or not n else f"only class {sequences.classes[labels[0]]!r}"
    out = [
        f"{cut.in_gap} lie in the gap: shorten data.gap" * bool(cut.in_gap),
        f"{cut.in_groups} are of groups that have sequences in it: leave the group column out" * bool(cut.in_groups),
    ]
    before = f"{len(cut.train) + cut.in_gap + cut.in_groups} sequences are earlier"
    raise DataError(f"{left} is left to train on before {what}: {', '.join([before, *filter(None, out)])}")
