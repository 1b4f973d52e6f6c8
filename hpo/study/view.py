"""What a trial sees of its study under `[study] parallel = K`, which makes the study the same from any number of
workers.

Trial n starts when all trials up to n - K have ended, and it sees these as they ended; of those between it sees the
parameters alone, as if all of them were running, whatever has become of them. So what is drawn for it, and the epoch
after which it is pruned, follow from its number, not from who was faster, who was killed or who went on with it.

Copied trials were there before the study began: they are seen whole. Trials that did not count when its parameters were
drawn, and another program's that had not ended, it never sees: their numbers are kept with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from hpo.study.record import COPIED_FROM

VIEW = "hpo:view"  # a drawn trial's system attribute: the numbers that are `without`; take_start asks for it
CHOSEN = ("fixed_params", "grid_id", "search_space")  # system attributes that say which parameters a trial has


@dataclass(frozen=True)
class View:
    """What one trial sees of the others."""

    number: int  # of the trial
    parallel: int  # K
    without: frozenset[int]  # numbers of earlier trials that it does not see

    @classmethod
    def kept(cls, trial: FrozenTrial, parallel: int) -> View | None:
        """That of a trial whose parameters were drawn; None before."""
        found = trial.system_attrs.get(VIEW)
        return None if found is None else cls(trial.number, parallel, frozenset(found))

    @classmethod
    def first(cls, number: int, parallel: int, trials: Sequence[FrozenTrial], dropped: frozenset[int]) -> View:
        """That of a trial whose parameters are drawn now. dropped: ids of the trials that do not count."""
        without = {
            trial.number
            for trial in trials
            if trial.number < number
            and (trial._trial_id in dropped or (trial.number <= number - parallel and not trial.state.is_finished()))
        }
        return cls(number, parallel, frozenset(without))

    def to_json(self) -> list[int]:
        """What is kept with the trial."""
        return sorted(self.without)

    def of(self, trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
        """What it sees of the study's trials, which are given by number."""
        seen = [trial for trial in trials if trial.number < self.number and trial.number not in self.without]
        return [trial if self._whole(trial) else _in_flight(trial) for trial in seen]

    def _whole(self, trial: FrozenTrial) -> bool:
        return trial.number <= self.number - self.parallel or COPIED_FROM in trial.user_attrs


def _in_flight(trial: FrozenTrial) -> FrozenTrial:
    """The trial as it was when its parameters were drawn."""
    kept: dict[str, Any] = {key: trial.system_attrs[key] for key in CHOSEN if key in trial.system_attrs}
    return FrozenTrial(
        number=trial.number,
        state=TrialState.RUNNING,
        value=None,
        datetime_start=trial.datetime_start,
        datetime_complete=None,
        params=trial.params,
        distributions=trial.distributions,
        user_attrs={},
        system_attrs=kept,
        intermediate_values={},
        trial_id=trial._trial_id,
    )


def next_to_start(trials: Sequence[FrozenTrial]) -> int:
    """The number of the trial that starts next: the first that waits, else a new one."""
    waiting = [trial.number for trial in trials if trial.state is TrialState.WAITING]
    return min(waiting) if waiting else max((trial.number + 1 for trial in trials), default=0)
