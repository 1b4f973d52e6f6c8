"""Which trial is better: by value, and by log-loss where no validation sequence tells the values apart."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from hpo.models.metrics import direction
from hpo.study.plan import Plan
from hpo.study.record import TrialRecord

Score = tuple[float, float]  # value and log-loss


def rank(scores: Mapping[int, Score], metric: str, resolution: float) -> list[int]:
    """Trial numbers, best first.

    Values within `resolution` of the best one are equal: among them the lower log-loss is better. The others follow by
    value, then by log-loss. Equal trials stand in the order of their numbers.
    """
    sign = -1.0 if direction(metric) == "maximize" else 1.0
    most = min((sign * value for value, _ in scores.values()), default=0.0) + resolution

    def key(number: int) -> tuple[bool, float, float, int]:
        value, log_loss = scores[number]
        if sign * value <= most:
            return False, log_loss, sign * value, number
        return True, sign * value, log_loss, number

    return sorted(scores, key=key)


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
