"""How good a model is, by trainings that nothing was chosen by."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """The mean of a metric over repeats of one configuration on fresh seeds and fresh splits. JSON-able."""

    value: float  # the mean
    interval: tuple[float, float]  # 95 %, of seeds, splits and sequences
    method: str  # of the interval
    values: tuple[float, ...]  # of the repeats
    selected: float  # by which the configuration was chosen: the best of many, so too good on average
