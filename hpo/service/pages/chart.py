"""A study's trials as points over their number, for an inline SVG; no text in it, so that it fits any width."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from hpo.service.schemas import Trial

WIDTH, HEIGHT = 1000, 200  # of the view box, which is stretched to its place
MOST = 2000  # points of each kind that are drawn


@dataclass(frozen=True)
class Chart:
    """Paths and the range of the values."""

    complete: str
    pruned: str
    best: str  # the best value so far
    low: float
    high: float
    last: int  # the last trial's number


def chart(trials: Sequence[Trial], *, maximize: bool) -> Chart | None:
    """The chart of trials by number; None where no trial has completed."""
    complete, pruned = _ended(trials, "complete"), _ended(trials, "pruned")
    if not complete:
        return None
    values = [value for _, value in complete]
    low, high = min(values), max(values)
    last = max(trials[-1].number, 1)

    def at(number: int, value: float) -> str:
        share = (min(max(value, low), high) - low) / (high - low) if high > low else 0.5
        return f"{WIDTH * number / last:.1f} {HEIGHT * (1 - share):.1f}"

    def dots(points: Sequence[tuple[int, float]]) -> str:
        few = points[:: 1 + len(points) // MOST]
        return "".join(f"M{at(number, value)}h0" for number, value in few)

    best = list(accumulate(values, max if maximize else min))
    return Chart(dots(complete), dots(pruned), _steps(complete, best, at, last), low, high, last)


def _ended(trials: Sequence[Trial], state: str) -> list[tuple[int, float]]:
    """Number and value of the trials that ended so."""
    return [(trial.number, trial.value) for trial in trials if trial.state == state and trial.value is not None]


def _steps(
    complete: Iterable[tuple[int, float]], best: Sequence[float], at: Callable[[int, float], str], last: int
) -> str:
    """The line of the best value so far: it changes where a better trial is."""
    path, before = "", None
    for (number, _), value in zip(complete, best, strict=True):
        if before is None:
            path = f"M{at(number, value)}"
        elif value != before:
            path += f"L{at(number, before)}L{at(number, value)}"
        before = value
    return path + f"L{at(last, best[-1])}"


@dataclass(frozen=True)
class Line:
    """One of a trial's curves, drawn over its own range."""

    name: str
    path: str
    low: float
    high: float
    last: float


def lines(curves: Mapping[str, Sequence[float | None]]) -> list[Line]:
    """A line for each curve, by epoch; an epoch without a number is left out."""
    found = []
    for name, curve in curves.items():
        points = [(epoch, value) for epoch, value in enumerate(curve) if value is not None]
        if not points:
            continue
        values = [value for _, value in points]
        low, high, end = min(values), max(values), max(len(curve) - 1, 1)
        steps = (
            f"{WIDTH * epoch / end:.1f} {HEIGHT * (1 - ((value - low) / (high - low) if high > low else 0.5)):.1f}"
            for epoch, value in points
        )
        found.append(Line(name, f"M{'L'.join(steps)}h0", low, high, values[-1]))
    return found
