"""Which trial is better: by value, and by log-loss where no validation sequence tells the values apart.

The one rule for promotion, for the weights that are kept, and for every display. The statement `snapshot`
(storage/sql/studies.sql) states `best` once more in SQL, for those that look several times a second.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from optuna.trial import FrozenTrial

from hpo.models.metrics import direction
from hpo.storage.snapshot import BestTrial
from hpo.study.limits import NONE, Limits
from hpo.study.plan import Plan
from hpo.study.record import TrialRecord, trained_by_us

Score = tuple[float, float]  # value and log-loss


def rank(scores: Mapping[int, Score], metric: str, resolution: float) -> list[int]:
    """Trial numbers, best first.

    Values within `resolution` of the best one are equal: among them the lower log-loss is better. The others follow by
    value, then by log-loss. Equal trials stand in the order of their numbers. NaN is worse than any number.
    """
    return _ranked(scores, resolution, maximize=direction(metric) == "maximize")


def _ranked(scores: Mapping[int, Score], resolution: float, *, maximize: bool) -> list[int]:
    costs = {number: _cost(value, maximize=maximize) for number, (value, _) in scores.items()}
    most = min(costs.values(), default=0.0) + resolution

    def key(number: int) -> tuple[bool, float, float, int]:
        cost, log_loss = costs[number], _cost(scores[number][1])
        if cost <= most:
            return False, log_loss, cost, number
        return True, cost, log_loss, number

    return sorted(scores, key=key)


def _cost(value: float, *, maximize: bool = False) -> float:
    if math.isnan(value):
        return math.inf
    return -value if maximize else value


def best(scores: Mapping[int, Score], resolution: float, *, maximize: bool) -> BestTrial | None:
    """The best trial, with the one that is ahead of it by value where the rule prefers another; None without any."""
    if not scores:
        return None
    number = _ranked(scores, resolution, maximize=maximize)[0]
    costs = {other: _cost(value, maximize=maximize) for other, (value, _) in scores.items()}
    first = min(costs, key=lambda other: (costs[other], other))
    ahead = (first, scores[first][0]) if costs[first] < costs[number] else None
    return BestTrial(number, scores[number][0], ahead)


def is_better(trial: FrozenTrial, earlier: FrozenTrial, plan: Plan) -> bool:
    """Whether a complete trial is better than an earlier one by more than its validation sequences tell apart."""
    maximize = direction(plan.metric) == "maximize"
    cost, before = (_cost(each.values[0], maximize=maximize) for each in (trial, earlier))
    return cost + plan.resolution < before


def scores_of(trials: Iterable[FrozenTrial], limits: Limits = NONE) -> dict[int, Score]:
    """Value and log-loss of the complete trials within the limits that our workers trained, by number; infinite where
    not recorded."""
    return {
        trial.number: (trial.values[0], _number(trial.user_attrs.get("log_loss")))
        for trial in trials
        if trial.state.name == "COMPLETE" and trial.values and trained_by_us(trial) and limits.admit(trial.user_attrs)
    }


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.inf
    try:
        return math.inf if math.isnan(value) else float(value)
    except OverflowError:
        return math.inf


def best_first(records: Iterable[TrialRecord], plan: Plan) -> list[TrialRecord]:
    """The complete trials among these."""
    complete = {record.number: record for record in records if record.complete}
    scores = {number: (record.value, record.log_loss) for number, record in complete.items()}
    return [complete[number] for number in rank(scores, plan.metric, plan.resolution)]


def displaced(others: Iterable[TrialRecord], plan: Plan, number: int, score: Score) -> list[str] | None:
    """Artifact keys of weights to drop once the trial of that number is complete with that score.

    None where it is not among the best `train.keep_best` trials, so that its own weights are not kept.
    """
    complete = {record.number: record for record in others if record.complete and record.number != number}
    scores = {other: (record.value, record.log_loss) for other, record in complete.items()} | {number: score}
    places = rank(scores, plan.metric, plan.resolution)
    most = plan.config.train.keep_best
    if number not in places[:most]:
        return None
    return [key for other in places[most:] if other != number and (key := complete[other].weights) is not None]
