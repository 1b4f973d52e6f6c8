"""Which configuration the finals have shown to be the best, and how good it is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import mean, stdev

from hpo.models.estimate import Estimate
from hpo.models.metrics import Scores, direction
from hpo.study.finals import Finalist
from hpo.study.plan import Plan

T_QUANTILE = 0.975  # of 95 % intervals
METHOD = (
    "intervals over sequences and, by Student, over seeds and splits, squares added; as wide at least as the interval "
    "of the model's own predictions for validation"
)


def winner(finalists: Sequence[Finalist], plan: Plan) -> Finalist | None:
    """The finalist with the best mean of fresh values; of those that these cannot tell from it, the one with the fewest
    weights, then with the lower log-loss. None where no training came to its end.

    Values are compared in pairs, over the repeats that both have, which trained and validated on the same sequences.
    Two differ where the mean difference is more than its standard error (the one-standard-error rule of Breiman,
    Friedman, Olshen and Stone, Classification and Regression Trees, 1984, 3.4.3) and than what one validation sequence
    tells apart. Only those with as many repeats as any take part.
    """
    equal = contenders(finalists, plan)
    return min(equal, key=lambda each: (_size(each), _log_loss(each), each.record.number), default=None)


def contenders(finalists: Sequence[Finalist], plan: Plan) -> list[Finalist]:
    """The finalists that the fresh values do not tell from the one with the best mean, and that one; see `winner`."""
    most = max((len(each.repeats) for each in finalists), default=0)
    ready = [each for each in finalists if len(each.repeats) == most > 0]
    if not ready:
        return []
    sign = 1 if direction(plan.metric) == "maximize" else -1
    first = max(ready, key=lambda each: sign * mean(_values(each)))  # of equal ones the study's better one
    return [each for each in ready if _is_equal(first, each, plan.resolution)]


def _is_equal(first: Finalist, other: Finalist, resolution: float) -> bool:
    """Whether the fresh values of two finalists do not tell them apart."""
    repeats = first.repeats.keys() & other.repeats.keys()
    differences = [first.repeats[each].value - other.repeats[each].value for each in repeats]
    if not differences:
        return False
    error = stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else 0.0
    return abs(mean(differences)) <= max(error, resolution)


def _values(finalist: Finalist) -> list[float]:
    return [record.value for record in finalist.repeats.values()]


def _size(finalist: Finalist) -> int:
    return max(record.parameters for record in finalist.repeats.values())


def _log_loss(finalist: Finalist) -> float:
    return mean(record.log_loss for record in finalist.repeats.values())


def estimate(
    finalist: Finalist, finalists: Sequence[Finalist], metric: str, scores: Mapping[int, Scores], model: Scores
) -> Estimate:
    """How good a finalist is, with what it was selected by beside it. finalists: all of them; scores: of each of its
    repeats, on what that validated on; model: of those together that are promoted.

    The 95 % interval is that of a mean of values on the same sequences. How far these few sequences may mislead is the
    mean of the repeats' own intervals (`METHODS` of hpo/models/metrics.py). How far seeds and splits may is Student's
    interval of a mean of so many repeats, by the variance within all finalists: two or three values say little of it.
    The distances of both ends are combined as the root of the sum of their squares (MOVER: Zou and Donner, Statistics
    in Medicine 27, 2008). Repeats that predict together are as a rule better than the mean of them, so the interval
    reaches as far as that of their common predictions for validation.
    """
    values = [scores[repeat].metrics[metric] for repeat in sorted(scores)]
    found = [scores[repeat].intervals[metric] for repeat in sorted(scores)]
    center, spread = mean(values), _spread(finalists) / math.sqrt(len(values))
    below = mean(value - low for value, (low, _) in zip(values, found, strict=True))
    above = mean(high - value for value, (_, high) in zip(values, found, strict=True))
    own_low, own_high = model.intervals[metric]
    low = max(min(center - math.hypot(below, spread), own_low), 0.0)
    high = max(center + math.hypot(above, spread), own_high)
    return Estimate(
        value=center,
        interval=(low, high if metric == "log_loss" else min(high, 1.0)),
        method=METHOD,
        values=tuple(values),
        selected=finalist.record.value,
    )


def _spread(finalists: Sequence[Finalist]) -> float:
    """How far one value may be from its mean over seeds and splits: half of its 95 % interval, of Student's; 0 where no
    configuration has two values."""
    from scipy.special import stdtrit

    all_of_them = [_values(each) for each in finalists if each.repeats]
    freedom = sum(len(values) - 1 for values in all_of_them)
    if not freedom:
        return 0.0
    squares = sum((value - mean(values)) ** 2 for values in all_of_them for value in values)
    return float(stdtrit(freedom, T_QUANTILE)) * math.sqrt(squares / freedom)
