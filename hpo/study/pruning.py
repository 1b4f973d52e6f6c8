"""The pruners: Optuna's rules, as functions of the study's seed, at a cost that hardly grows with the study."""

from __future__ import annotations

import copy
import math
from bisect import bisect, insort
from collections import defaultdict
from collections.abc import Callable, Hashable
from itertools import accumulate

import optuna
from optuna.pruners._percentile import _is_first_in_interval_step
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from hpo.models.seeds import derive
from hpo.study.plan import Plan

Basis = Callable[[], Hashable]
FACTOR = 3  # of successive halving: a third of the trials goes on to three times as many epochs


RUNG = "completed_rung_"  # begins the system attributes in which Optuna keeps a trial's values at its rungs


def _always_the_same() -> Hashable:
    return None


def make_pruner(plan: Plan, basis: Basis = _always_the_same) -> optuna.pruners.BasePruner:
    """The pruner that the study file names. basis: while it stays the same, its study shows it more trials, never
    others."""
    epochs = plan.config.train.epochs
    name = plan.config.study.pruner
    least = _least(plan)
    if name == "hyperband":
        return HyperbandPruner(plan.config.study.seed, least, epochs)
    if name == "halving":
        return optuna.pruners.SuccessiveHalvingPruner(min_resource=least, reduction_factor=FACTOR)
    if name == "median":
        return MedianPruner(n_warmup_steps=least, basis=basis)
    return optuna.pruners.NopPruner()


def may_prune(plan: Plan, study: Study, number: int, epoch: int) -> bool:
    """Whether the pruner may end trial `number` after this epoch; False: whatever was reported, it lets it go on.

    Successive halving decides at its rungs alone, of which a trial of 50 epochs has three at most.
    """
    if plan.config.study.pruner == "median":
        return epoch >= _least(plan)
    return plan.config.study.pruner != "none" and epoch in _rungs(plan, study, number, epoch)


def as_it_came(plan: Plan, study: Study, trial: FrozenTrial) -> FrozenTrial:
    """A trial that has reported an epoch, as it came to it: without the rungs from this epoch on, to which an attempt
    that was lost had come before."""
    if plan.config.study.pruner not in ("hyperband", "halving"):
        return trial
    step = trial.last_step or 0
    passed = len([rung for rung in _rungs(plan, study, trial.number, step) if rung < step])
    later = {key for key in trial.system_attrs if key.startswith(RUNG) and int(key.removeprefix(RUNG)) >= passed}
    if not later:
        return trial
    earlier = copy.copy(trial)
    earlier.system_attrs = {key: value for key, value in trial.system_attrs.items() if key not in later}
    return earlier


def _rungs(plan: Plan, study: Study, number: int, last: int) -> list[int]:
    """The epochs up to `last` after which successive halving decides about trial `number`."""
    first = _least(plan)
    if isinstance(study.pruner, HyperbandPruner):
        first *= FACTOR ** study.pruner.bracket(study, number)
    rungs = []
    while first <= last:
        rungs.append(first)
        first *= FACTOR
    return rungs


def _least(plan: Plan) -> int:
    """Epochs before a curve says anything."""
    return max(1, min(plan.config.train.epochs // 10, 5))


class HyperbandPruner(optuna.pruners.HyperbandPruner):
    """Optuna's own, but for a trial's bracket: a function of the study's seed and the trial's number.

    Optuna's is one of the study's name and the number, so that a study would not repeat itself under another name.
    The brackets' shares are Optuna's.
    """

    def __init__(self, seed: int, min_resource: int, max_resource: int) -> None:
        super().__init__(min_resource, max_resource, reduction_factor=FACTOR)
        self._seed = seed

    def bracket(self, study: Study, number: int) -> int:
        """That of trial `number`."""
        if not self._pruners:
            self._try_initialization(study)
        ends = list(accumulate(self._trial_allocation_budgets))
        return bisect(ends, derive(self._seed, "bracket", number) % ends[-1])

    def _get_bracket_id(self, study: Study, trial: FrozenTrial) -> int:
        return self.bracket(study, trial.number)


class MedianPruner(optuna.pruners.MedianPruner):
    """Decides as Optuna's own, from sorted lists kept from one decision to the next instead of every trial.

    One pruner serves one study and one thread.
    """

    def __init__(
        self,
        n_startup_trials: int = 5,
        n_warmup_steps: int = 0,
        interval_steps: int = 1,
        basis: Basis = _always_the_same,
    ) -> None:
        super().__init__(n_startup_trials, n_warmup_steps, interval_steps)
        self._basis = basis
        self._made_by: Hashable = None  # the basis of the lists
        self._seen: set[int] = set()  # numbers of the completed trials in the lists
        self._sorted: defaultdict[int, list[float]] = defaultdict(list)  # step -> values, without NaN

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        completed = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if (basis := self._basis()) != self._made_by:
            self._made_by = basis
            self._seen.clear()
            self._sorted.clear()
        self._add(completed)
        step = trial.last_step
        if len(completed) < max(1, self._n_startup_trials) or step is None or step < self._n_warmup_steps:
            return False
        values = trial.intermediate_values
        if not _is_first_in_interval_step(step, values.keys(), self._n_warmup_steps, self._interval_steps):
            return False
        numbers = [value for value in values.values() if not math.isnan(value)]
        if not numbers:
            return True
        median = _median(self._sorted[step])
        if study.direction == StudyDirection.MAXIMIZE:
            return max(numbers) < median
        return min(numbers) > median

    def _add(self, completed: list[FrozenTrial]) -> None:
        """Take in the trials that are new, which are among the last ones."""
        missing = len(completed) - len(self._seen)
        for trial in reversed(completed):
            if missing == 0:
                return
            if trial.number not in self._seen:
                missing -= 1
                self._seen.add(trial.number)
                for step, value in trial.intermediate_values.items():
                    if not math.isnan(value):
                        insort(self._sorted[step], value)


def _median(ordered: list[float]) -> float:
    """NaN, which compares as neither, where there is no median: no values, or between two infinities."""
    if not ordered:
        return math.nan
    low, high = ordered[(len(ordered) - 1) // 2], ordered[len(ordered) // 2]
    if low == high:
        return low
    return high - (high - low) * 0.5 if math.isfinite(high - low) else math.nan
