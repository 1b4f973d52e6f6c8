"""The trials of a study as its sampler and its pruner see them: without those that were dropped, and as if all had been
drawn from the space, and had ended under the limits, that the study has now; under `[study] parallel` by the view of
the trial that is drawn or pruned (view.py)."""

from __future__ import annotations

import copy
from collections.abc import Container, Hashable, Iterator, Set
from contextlib import contextmanager
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState

from hpo.storage.trials import TrialStorage
from hpo.study.limits import CONSTRAINT, Limits
from hpo.study.plan import Plan
from hpo.study.space import distributions, walk
from hpo.study.view import View

CMAES = "cma:"  # begins the system attributes in which Optuna's sampler keeps what it has learnt
CMAES_STATE = f"{CMAES}optimizer"


class CountedTrials(TrialStorage):
    """A view of a storage, over the same connections and the same cache; without the reports of running trials, which
    neither asks for."""

    shows_reports = False

    def __init__(self, storage: TrialStorage, plan: Plan | None = None, limits: Limits | None = None) -> None:
        """plan, limits: of the study that is looked at; without them, its trials are as they were drawn and ended."""
        vars(self).update(vars(storage))
        self._limits = limits
        self._plan = plan if plan is not None and plan.revision else None
        self._wide = {} if self._plan is None else distributions(self._plan.config.space)
        self._fitted: dict[int, FrozenTrial] = {}  # finished trials, by id
        self._ids: dict[str, int] = {}  # of studies, by name
        self._still: dict[int, list[FrozenTrial]] | None = None  # while nothing new is looked for: by study
        self._parallel = None if plan is None else plan.config.study.parallel
        self._seen: tuple[View, list[FrozenTrial]] | None = None  # by the trial that was asked about last

    @contextmanager
    def seen_by(self, study_id: int, trial: FrozenTrial) -> Iterator[View | None]:
        """Within the block the study's trials are those that this one sees: under `parallel` by its view, which is the
        same whenever it is asked for; else those of the first look at them, as a draw takes many and goes by one state
        of the study. For one thread at a time."""
        view, self._still = None, {}
        if self._parallel is not None:
            view, self._still[study_id] = self._seen_by(study_id, trial, self._parallel)
        try:
            yield view
        finally:
            self._still = None

    def _seen_by(self, study_id: int, trial: FrozenTrial, parallel: int) -> tuple[View, list[FrozenTrial]]:
        """The trial's view and what it sees, looked up once for each trial."""
        view = View.kept(trial, parallel)
        if view is None or self._seen is None or self._seen[0] != view:
            trials = self.drawn_trials(study_id)
            view = view or View.first(trial.number, parallel, trials, self.dropped(study_id))
            gone = frozenset(other._trial_id for other in trials if other.number in view.without)
            self._seen = view, self._counted(view.of(trials), gone)
        return self._seen

    def basis(self, study_id: int) -> Hashable:
        """What trials are seen by at this moment: while it stays, they only become more."""
        if self._parallel is not None and self._still is not None and self._seen is not None:
            return self._seen[0]
        return self.dropped(study_id)

    def get_study_id_from_name(self, study_name: str) -> int:
        """Asked once, as Hyperband does at each of its decisions: an open study is deleted, never renamed."""
        if study_name not in self._ids:
            self._ids[study_name] = super().get_study_id_from_name(study_name)
        return self._ids[study_name]

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        with self.connection.lock:
            if self._still is None:
                trials = super().get_all_trials(study_id, deepcopy=False, states=states)
                trials = self._counted(trials, self.dropped(study_id))
            else:
                if study_id not in self._still:
                    trials = self.drawn_trials(study_id)
                    self._still[study_id] = self._counted(trials, self.dropped(study_id))
                trials = [trial for trial in self._still[study_id] if states is None or trial.state in states]
        return copy.deepcopy(trials) if deepcopy else trials

    def _counted(self, trials: list[FrozenTrial], dropped: Set[int]) -> list[FrozenTrial]:
        """Of a study's trials those that count, as they are seen. dropped: the ids of those that do not."""
        first = min((self._finished[i].number for i in dropped if i in self._finished), default=None)
        if self._plan is not None:
            trials = [self._fitting(self._plan, trial) for trial in trials]
        if self._limits is not None:
            trials = [_constrained(self._limits, trial) for trial in trials]
        if first is not None:
            trials = [_without_state(trial, first) for trial in trials if trial._trial_id not in dropped]
        return trials

    def _fitting(self, plan: Plan, trial: FrozenTrial) -> FrozenTrial:
        """The trial as the present space would have drawn it, kept once it has ended."""
        known = self._fitted.get(trial._trial_id)
        if known is None:
            known = _fitted(plan, self._wide, trial)
            if trial.state.is_finished():
                self._fitted[trial._trial_id] = known
        return known


def _fitted(plan: Plan, wide: dict[str, BaseDistribution], trial: FrozenTrial) -> FrozenTrial:
    """With the present distributions, and what was fixed when it was drawn among its parameters.

    What CMA-ES has learnt in the narrower space says nothing of the wider one: it begins anew.
    """
    if not trial.params:
        return trial
    values = {**plan.fixed, **trial.params}
    drawn: dict[str, Any] = {}

    def look_up(name: str, _: BaseDistribution) -> Any:
        drawn[name] = values[name]
        return values[name]

    try:
        walk(plan.config.space, look_up)
    except KeyError:  # a copied one, or another program's, need not have all
        drawn = dict(trial.params)
    items = {name: wide[name] if name in wide else trial.distributions[name] for name in drawn}
    if items == trial.distributions:
        return trial
    fitted = copy.copy(trial)
    fitted.params, fitted.distributions = drawn, items
    fitted.system_attrs = {key: value for key, value in trial.system_attrs.items() if not key.startswith(CMAES)}
    return fitted


def _constrained(limits: Limits, trial: FrozenTrial) -> FrozenTrial:
    """The trial with a constraint for each of the limits: all have the same ones, as Optuna's GP needs it."""
    wanted = limits.constraints(trial.user_attrs) if trial.state.is_finished() else {}
    had = {name: value for name, value in trial.system_attrs.items() if name.startswith(CONSTRAINT)}
    if wanted == had:
        return trial
    judged = copy.copy(trial)
    judged.system_attrs = {key: value for key, value in trial.system_attrs.items() if key not in had} | wanted
    return judged


def _without_state(trial: FrozenTrial, first: int) -> FrozenTrial:
    """Without what CMA-ES has kept with it, if it may have been told the value of trial `first`: what it has learnt
    cannot be taken apart, so it goes on from the last state that was not."""
    if trial.number < first or not any(key.startswith(CMAES_STATE) for key in trial.system_attrs):
        return trial
    without = copy.copy(trial)
    without.system_attrs = {k: v for k, v in trial.system_attrs.items() if not k.startswith(CMAES_STATE)}
    return without
