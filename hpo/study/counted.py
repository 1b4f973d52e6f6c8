"""The trials of a study as its sampler and its pruner see them: without those that were dropped."""

from __future__ import annotations

import copy
from collections.abc import Container

from optuna.trial import FrozenTrial, TrialState

from hpo.storage.trials import TrialStorage

CMAES_STATE = "cma:optimizer"  # begins the system attributes in which Optuna's sampler keeps what it has learnt


class CountedTrials(TrialStorage):
    """A view of a storage, over the same connections and the same cache."""

    def __init__(self, storage: TrialStorage) -> None:
        vars(self).update(vars(storage))

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        with self.connection.lock:
            trials = super().get_all_trials(study_id, deepcopy=False, states=states)
            dropped = self.dropped(study_id)
            first = min((self._finished[i].number for i in dropped if i in self._finished), default=None)
        if first is not None:
            trials = [_without_state(trial, first) for trial in trials if trial._trial_id not in dropped]
        return copy.deepcopy(trials) if deepcopy else trials


def _without_state(trial: FrozenTrial, first: int) -> FrozenTrial:
    """Without what CMA-ES has kept with it, if it may have been told the value of trial `first`: what it has learnt
    cannot be taken apart, so it goes on from the last state that was not."""
    if trial.number < first or not any(key.startswith(CMAES_STATE) for key in trial.system_attrs):
        return trial
    without = copy.copy(trial)
    without.system_attrs = {k: v for k, v in trial.system_attrs.items() if not k.startswith(CMAES_STATE)}
    return without
