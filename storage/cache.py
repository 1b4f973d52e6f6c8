"""What a process keeps of trials: finished ones, which never change and are fetched once, and those that it holds."""

from __future__ import annotations

import copy

from optuna.distributions import BaseDistribution
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from hpo.storage.records import read_attributes, read_distribution
from hpo.storage.writes import Writes

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


class StudyCache:
    """What this process knows of a study. Lists are replaced, never changed: they have been handed out."""

    def __init__(self) -> None:
        self.name: str | None = None
        self.directions: list[StudyDirection] | None = None
        self.next = 0  # every trial of a lower number is cached as finished or listed in `unfinished`
        self.unfinished: set[int] = set()
        self.ahead: dict[int, int] = {}  # cached finished trials of number `next` or more: id -> number
        self.distributions: dict[str, BaseDistribution] = {}
        self.drawn: dict[int, FrozenTrial] = {}  # running ones of our workers, as they were with all parameters
        self.dropped: frozenset[int] = frozenset()  # ids of trials that do not count, when it was last looked
        self.finished: dict[tuple[TrialState, ...], list[FrozenTrial]] = {FINISHED: []}
        self._copies: dict[tuple[TrialState, ...], list[FrozenTrial]] = {}
        self.best: FrozenTrial | None = None

    def add(self, trials: list[FrozenTrial]) -> None:
        """Cache finished trials, given in the order of their numbers."""
        for states, known in self.finished.items():
            new = [trial for trial in trials if trial.state in states]
            if new:
                joined = known + new
                if known and known[-1].number > new[0].number:
                    joined.sort(key=number_of)
                self.finished[states] = joined
        for trial in trials:
            self.unfinished.discard(trial._trial_id)
            self.drawn.pop(trial._trial_id, None)
            for name, distribution in trial.distributions.items():
                self.distributions.setdefault(name, distribution)
            if trial.state == TrialState.COMPLETE:
                self._compare(trial)

    def of(self, states: tuple[TrialState, ...]) -> list[FrozenTrial]:
        """The finished trials in one of the states, by number."""
        if states not in self.finished:
            self.finished[states] = [trial for trial in self.finished[FINISHED] if trial.state in states]
        return self.finished[states]

    def handed_out(self, states: tuple[TrialState, ...]) -> list[FrozenTrial]:
        """A copy of the list, the same one until it grows, or until its receiver is seen to have changed it."""
        known, copied = self.of(states), self._copies.get(states, [])
        if len(copied) != len(known) or (known and (copied[0] is not known[0] or copied[-1] is not known[-1])):
            copied = self._copies[states] = list(known)
        return copied

    def _compare(self, trial: FrozenTrial) -> None:
        if self.directions is None or len(self.directions) != 1:
            return
        sign = -1.0 if self.directions[0] == StudyDirection.MAXIMIZE else 1.0
        if self.best is None or _rank(trial, sign) < _rank(self.best, sign):
            self.best = trial


class HeldTrials:
    """The trials that this process holds, with all that it has written to them: nobody else writes to them."""

    def __init__(self) -> None:
        self._known: dict[int, FrozenTrial] = {}

    def get(self, trial_id: int) -> FrozenTrial | None:
        """The trial as it is now, if it is known. The caller's own copy."""
        known = self._known.get(trial_id)
        return None if known is None else _copied(known)

    def keep(self, trial: FrozenTrial) -> None:
        """This is the trial, as it was just read."""
        self._known[trial._trial_id] = _copied(trial)

    def forget(self, trial_id: int) -> None:
        """It may change, or what was written to it may not have been."""
        self._known.pop(trial_id, None)

    def update(self, trial_id: int, writes: Writes) -> None:
        """Add what is written to the trial."""
        if (known := self._known.get(trial_id)) is None:
            return
        for name, (value, text) in writes.params.items():
            known.distributions[name] = read_distribution(text)
            known.params[name] = known.distributions[name].to_external_repr(value)
        known.user_attrs.update(read_attributes(writes.user))
        known.system_attrs.update(read_attributes(writes.system))
        known.intermediate_values.update({step: float(value) for step, value in writes.reports.items()})


def _copied(trial: FrozenTrial) -> FrozenTrial:
    made = copy.copy(trial)
    made.params, made.distributions = dict(trial.params), dict(trial.distributions)
    made.user_attrs, made.system_attrs = dict(trial.user_attrs), dict(trial.system_attrs)
    made.intermediate_values = dict(trial.intermediate_values)
    return made


def number_of(trial: FrozenTrial) -> int:
    """The key to sort trials by."""
    return trial.number


def _rank(trial: FrozenTrial, sign: float) -> tuple[float, int]:
    assert trial.value is not None
    return sign * trial.value, trial.number
