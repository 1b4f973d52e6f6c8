"""Whether a study goes on: it ends when so many trials in a row brought nothing that validation can tell apart.

Trials count in the order in which they ended, as the sampler learns of them in that order: after a long trial that
turns out to be the best, others have the whole patience to build on it, whatever has begun in between. Complete and
pruned trials of our workers count; failed ones say nothing of the search, copied ones are another study's, and dropped
ones are as if they had not been. A complete trial brings something if it is better than the last one that did by more
than `Plan.resolution`, so that small gains add up; a pruned one never does, nor does one beyond the study's limits.

What was begun before is waited for: while a trial of a lower number is at work than those that brought nothing, as many
as the patience allows, the study goes on. Otherwise many workers, of whose trials most are pruned early, would end it
before one that is not pruned has ended.

Under `[study] parallel` trials count in the order of their numbers: whether trial n starts is judged by those that it
sees as they ended, so that the study ends at the same number whoever was faster, and none is waited for.

All of it follows from the trials in the database, so every worker judges alike. `Leases.take` compares what was judged
with what is there in the transaction that starts a trial.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from optuna.trial import FrozenTrial, TrialState

from hpo.storage.terms import Judgement, Patience, Standstill
from hpo.study.limits import NONE, Limits
from hpo.study.plan import Plan
from hpo.study.portfolio import portfolio_of
from hpo.study.ranking import is_better
from hpo.study.record import trained_by_us
from hpo.study.view import next_to_start

JUDGED = (TrialState.COMPLETE, TrialState.PRUNED)  # trials by which a study's patience goes


def judged(
    trials: Sequence[FrozenTrial], dropped: Collection[int], plan: Plan, patience: Patience, limits: Limits = NONE
) -> Judgement:
    """What these trials, all of the study that are complete or pruned, say of its going on.

    dropped: ids of those that do not count. limits: beyond which a trial brings nothing.
    """
    counted = [trial for trial in trials if trial._trial_id not in dropped and trained_by_us(trial)]
    standstill, numbers = _standstill(sorted(counted, key=_end), plan, patience, limits)
    seen = (patience, len(trials), tuple(sorted(dropped)))
    first = len(portfolio_of(plan))  # trials that are not drawn, and have their turn before
    if standstill is None or max(trial.number for trial in trials) < first - 1:
        return Judgement(*seen)
    return Judgement(*seen, standstill, max(numbers[patience.trials - 1], first - 1))


def judged_in_order(
    trials: Sequence[FrozenTrial],
    dropped: Collection[int],
    plan: Plan,
    patience: Patience,
    parallel: int,
    limits: Limits = NONE,
) -> Judgement:
    """The same under `parallel`, for the trial that starts next. trials: all of the study, by number."""
    number = next_to_start(trials)
    ended = [trial for trial in trials if trial.number <= number - parallel and trial.state in JUDGED]
    counted = [trial for trial in ended if trial._trial_id not in dropped and trained_by_us(trial)]
    standstill, _ = _standstill(counted, plan, patience, limits)
    if number < len(portfolio_of(plan)):
        standstill = None
    return Judgement(patience, len(ended), tuple(sorted(dropped)), standstill, last=-1, number=number)


def _standstill(
    trials: Sequence[FrozenTrial], plan: Plan, patience: Patience, limits: Limits
) -> tuple[Standstill | None, list[int]]:
    """The standstill to which these trials, in their order, have come, if they have; the numbers of those that brought
    nothing."""
    since, idle = _row(trials, plan, limits)
    numbers = sorted(number for number in idle if number >= patience.since)
    if since is None or len(numbers) < patience.trials:
        return None, numbers
    return Standstill(since, len(numbers)), numbers


def _row(trials: Sequence[FrozenTrial], plan: Plan, limits: Limits) -> tuple[int | None, list[int]]:
    """The number of the last trial that brought something, and those of the trials that ended after it."""
    best, idle = None, list[int]()
    for trial in trials:
        counts = trial.state.name == "COMPLETE" and limits.admit(trial.user_attrs)
        if counts and (best is None or is_better(trial, best, plan)):
            best, idle = trial, []
        else:
            idle.append(trial.number)
    return (None if best is None else best.number), idle


def _end(trial: FrozenTrial) -> tuple[float, int]:
    """When it ended, by the database's clock, also in an hour that the local clock has twice; then its number."""
    return (trial.datetime_complete.timestamp() if trial.datetime_complete else 0.0), trial.number
