"""A whole study run again, by one worker on a server of its own, to the first trial that differs from the stored one.

Under `[study] parallel` it is the same study from any number of workers. Without, it is so where one worker made it.
Then its finals, whose trainings do not go by one another: each by itself, as any trial.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from hpo.datasets import Datasets
from hpo.promote.reproduce import ReproductionError, reproduce, what_changed
from hpo.storage.artifacts import artifact_store
from hpo.storage.errors import StudyOver
from hpo.storage.leases import Leases
from hpo.storage.scratch import scratch_folder
from hpo.storage.server import server as embedded
from hpo.storage.terms import Terms
from hpo.storage.trials import TrialStorage, trial_storage
from hpo.study.lifecycle import OpenStudy, finals_name, open_again, open_study
from hpo.study.record import COPIED_FROM, TrialRecord
from hpo.trial.context import TrialContext, WorkerResources
from hpo.trial.device import choose_device
from hpo.trial.device_lock import SharedExclusiveLock
from hpo.trial.run import run_trial

WORKER = "again"


@dataclass(frozen=True)
class StudyReproduction:
    """What has come of a study that was run again."""

    trials: int  # compared: those before the first that differs, and that one
    finals: int  # of its finals' trainings, likewise
    difference: str | None  # which trial is the first that differs, and in what; None: none does
    causes: tuple[str, ...]  # what is not as it was, or kept the study from repeating itself


def reproduce_study(storage: TrialStorage, name: str) -> StudyReproduction:
    """Run the trials of a study again that had ended when the first one had not, then those of its finals that are
    complete. Raises ReproductionError."""
    study = open_study(name, storage)
    if study.plan.finals:
        raise ReproductionError(
            f"{name!r} are finals, whose trainings do not go by one another: `hpo reproduce {name} --trial N`"
        )
    recorded = _ended(storage.get_all_trials(study.study_id, deepcopy=False))
    if all(COPIED_FROM in trial.user_attrs for trial in recorded):
        raise ReproductionError(f"only a study of which a trial has ended can be run again; {name!r} has none")
    row = study.leases.study(study.study_id)
    assert row is not None
    budget = sum(COPIED_FROM not in trial.user_attrs for trial in recorded)
    terms = Terms(budget, None, row.lease_s, resolution=row.resolution, patience=row.patience)
    count = 0
    with _own_server() as url, closing(trial_storage(url)) as own:
        for trial in _trials_again(open_again(own, study.plan, terms, recorded)):
            then, count = recorded[trial.number], count + 1
            if (difference := first_difference(then, trial)) is not None:
                causes = (*_of_the_study(study, recorded), *_of_the_trial(then, trial))
                return StudyReproduction(count, 0, f"trial {trial.number}: {difference}", causes)
    if count < budget:
        text = f"trial {recorded[-budget + count].number}: recorded, now the study is over before it"
        return StudyReproduction(count, 0, text, _of_the_study(study, recorded))
    return _finals_again(study, count)


def _finals_again(study: OpenStudy, trials: int) -> StudyReproduction:
    """The trainings of its finals, after so many equal trials."""
    row, count = study.leases.finals(study.study_id), 0
    records = [] if row is None else open_study(row.name, study.storage).complete()
    for number in sorted(record.number for record in records):
        again, count = reproduce(study.storage, finals_name(study.name), number), count + 1
        if not again.equal:
            difference = f"trial {number} of its finals: {again.first_difference}"
            return StudyReproduction(trials, count, difference, again.causes)
    return StudyReproduction(trials, count, None, ())


def first_difference(then: FrozenTrial, now: FrozenTrial) -> str | None:
    """In what a trial differs from the recorded one; None where it does not, to the last bit."""
    for name in {**then.params, **now.params}:
        if then.params.get(name) != now.params.get(name):
            return f"{name}: recorded {then.params.get(name)!r}, now {now.params.get(name)!r}"
    for epoch in sorted({**then.intermediate_values, **now.intermediate_values}):
        old, new = (trial.intermediate_values.get(epoch) for trial in (then, now))
        if not _same(old, new):
            return f"value of epoch {epoch}: recorded {_said(old)}, now {_said(new)}"
    if then.state is not now.state:
        return f"state: recorded {then.state.name.lower()}, now {now.state.name.lower()}"
    for what, old, new in (("value", then.value, now.value), ("log-loss", _log_loss(then), _log_loss(now))):
        if not _same(old, new):
            return f"{what}: recorded {_said(old)}, now {_said(new)}"
    return None


def _same(one: float | None, other: float | None) -> bool:
    both_nan = one is not None and other is not None and math.isnan(one) and math.isnan(other)
    return one == other or both_nan


def _said(value: float | None) -> str:
    return "none" if value is None else repr(value)


def _log_loss(trial: FrozenTrial) -> float | None:
    found: float | None = trial.user_attrs.get("log_loss")
    return found


def _ended(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Those before the first that has not ended."""
    left = [trial.number for trial in trials if not trial.state.is_finished()]
    return [trial for trial in trials if not left or trial.number < min(left)]


@contextmanager
def _own_server() -> Iterator[str]:
    """URL of an embedded server in a folder of its own, which ends with the block."""
    before = os.environ.get("HPO_HOME")
    with scratch_folder() as folder:
        if os.geteuid() == 0:
            folder.chmod(0o711)  # root's server runs as another user

        def with_home(call: Any) -> Any:
            os.environ["HPO_HOME"] = str(folder / "home")
            try:
                return call()
            finally:
                if before is None:
                    del os.environ["HPO_HOME"]
                else:
                    os.environ["HPO_HOME"] = before

        try:
            yield with_home(embedded.start)
        finally:
            with_home(embedded.stop)


def _trials_again(study: OpenStudy) -> Iterator[FrozenTrial]:
    """One trial after another, trained here as a worker does."""
    leases = Leases(study.storage)
    datasets, device = Datasets(artifact_store()), choose_device()
    sequences = datasets.get(study.plan.train)
    with scratch_folder() as folder:
        stop = threading.Event()
        store = artifact_store(str(folder))
        resources = WorkerResources(WORKER, device, store, datasets, SharedExclusiveLock(), stop)
        while True:
            if study.sampler.exhausted():
                leases.exhaust(study.study_id, study.plan.revision)
            try:
                with leases.take(study.study_id, WORKER, device, judge=study.judge) as lease:
                    assert lease is not None
                    run_trial(TrialContext(study, lease, resources, sequences))
            except StudyOver:
                return
            yield study.storage.get_trial(lease.trial_id)


def _of_the_study(study: OpenStudy, recorded: Sequence[FrozenTrial]) -> tuple[str, ...]:
    """What keeps a study from repeating itself."""
    found = []
    workers = {trial.user_attrs.get("worker") for trial in recorded} - {None}
    if study.plan.config.study.parallel is None and len(workers) > 1:
        found.append(f"{len(workers)} workers made it, and its trials started as they were free: set study.parallel")
    if study.plan.config.limits.latency_ms is not None:
        found.append("limits.latency_ms: a latency is measured, and never twice the same")
    if study.plan.revision:
        found.append(f"it was changed after it had begun: hpo changes {study.name}")
    if dropped := study.storage.dropped(study.study_id):
        numbers = sorted(trial.number for trial in recorded if trial._trial_id in dropped)
        found.append(f"trials that were dropped: {', '.join(map(str, numbers))}")
    return tuple(found)


def _of_the_trial(then: FrozenTrial, now: FrozenTrial) -> tuple[str, ...]:
    """What is not as it was when the trial was trained."""
    records = TrialRecord.of(then), TrialRecord.of(now)
    if then.state is TrialState.FAIL or records[0] is None or records[1] is None:
        reasons: Mapping[str, Any] = {"then": then.user_attrs.get("failure"), "now": now.user_attrs.get("failure")}
        return tuple(f"it failed {when}: {why}" for when, why in reasons.items() if why)
    return what_changed(records[0], records[1])
