"""When a trial's memory is released nothing holds on to what trained it, however the trial ended."""

from __future__ import annotations

import gc
import logging
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from optuna.trial import FrozenTrial, TrialState

from hpo.datasets import Datasets
from hpo.models.device import DeviceLost
from hpo.models.training.learner import Learner
from hpo.models.training.member import Member
from hpo.models.training.training import Epoch, Training
from hpo.storage.artifacts import artifact_store
from hpo.storage.errors import LeaseLost, PostgresError
from hpo.storage.leases import Leases
from hpo.storage.trials import TrialStorage, trial_storage
from hpo.study.config import load
from hpo.study.lifecycle import OpenStudy, create_or_open, open_study
from hpo.trial import run as trial_run
from hpo.trial.context import TrialContext, WorkerResources
from hpo.trial.device_lock import SharedExclusiveLock

CARD = "cpu:0"  # the CPU by a name that makes it a card: its memory is released after each trial
Endings = dict[str, Callable[[pytest.MonkeyPatch, WorkerResources], None]]


@pytest.fixture
def study(study_file: Callable[..., Path], storage: TrialStorage, tmp_path: Path) -> OpenStudy:
    file = study_file(trials=1, epochs=3)
    return create_or_open(load(file), storage, artifact_store(str(tmp_path / "artifacts")))


@pytest.fixture
def resources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WorkerResources:
    monkeypatch.setenv("HPO_HOME", str(tmp_path / "home"))
    store = artifact_store(str(tmp_path / "artifacts"))
    return WorkerResources("tester", CARD, store, Datasets(store), SharedExclusiveLock(), threading.Event())


def raises(owner: type, name: str, error: Exception, at_call: int = 1, times: int = 99) -> Any:
    """An ending: the method's calls from that one on raise."""

    def prepare(patch: pytest.MonkeyPatch, _: WorkerResources) -> None:
        real, calls = getattr(owner, name), [0]

        def call(*args: Any, **options: Any) -> Any:
            calls[0] += 1
            if at_call <= calls[0] < at_call + times:
                raise type(error)(*error.args)  # a kept error keeps its traceback, and with it the training
            return real(*args, **options)

        patch.setattr(owner, name, call)

    return prepare


def stopped(patch: pytest.MonkeyPatch, resources: WorkerResources) -> None:
    real = TrialContext.report

    def report(context: TrialContext, epoch: Epoch) -> None:
        real(context, epoch)
        resources.stop_requested.set()

    patch.setattr(TrialContext, "report", report)


ENDINGS: Endings = {
    "complete": lambda patch, _: None,
    "pruned": lambda patch, _: patch.setattr(TrialContext, "should_prune", lambda _: True),
    "failed in a step": raises(Learner, "step", ValueError("no such thing"), 3),
    "failed between epochs": raises(TrialContext, "should_prune", ValueError("no such thing")),
    "out of memory once": raises(Learner, "step", torch.OutOfMemoryError("CUDA out of memory"), 3, times=1),
    "out of memory": raises(Learner, "step", torch.OutOfMemoryError("CUDA out of memory"), 3),
    "given back between epochs": stopped,
    "given back between batches": lambda patch, _: patch.setattr(TrialContext, "interrupts_epoch", lambda _: True),
    "lease lost": raises(TrialContext, "report", LeaseLost("it has left")),
    "database away": raises(TrialContext, "report", PostgresError("it is away")),
    "store away": raises(TrialContext, "finish", OSError("it is away")),
    "device lost": raises(Training, "advance", DeviceLost("it does not answer"), 2),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_no_member_is_alive_when_memory_is_released(
    ending: str, study: OpenStudy, resources: WorkerResources, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[Member]] = []
    looks: list[int] = []
    real = Member.__init__

    def note(member: Member, *args: Any, **options: Any) -> None:
        real(member, *args, **options)
        made.append(weakref.ref(member))

    def look(device: str) -> None:
        assert device == CARD
        gc.collect()
        looks.append(sum(member() is not None for member in made))

    monkeypatch.setattr(Member, "__init__", note)
    monkeypatch.setattr(trial_run, "release_memory", look)
    monkeypatch.setattr("hpo.trial.context.device_name", str)
    monkeypatch.setattr(logging.getLogger("hpo"), "propagate", False)  # pytest keeps records, and with them tracebacks
    ENDINGS[ending](monkeypatch, resources)
    sequences = resources.datasets.get(study.plan.train)
    with (
        suppress(PostgresError, OSError, DeviceLost),
        resources.device_lock.shared(lambda: False),
        study.leases.take(study.study_id, "tester", CARD) as lease,
    ):
        assert lease is not None
        trial_run.run_trial(TrialContext(study, lease, resources, sequences))
    assert made
    assert looks == [0] * {"out of memory once": 3, "out of memory": 4}.get(ending, 1)


class TestOtherProcessesThatHoldTheDevicesMemory:
    """A card that a desktop, a colleague or another program uses: what is free changes without our doing."""

    @pytest.fixture
    def run(
        self, study: OpenStudy, resources: WorkerResources, monkeypatch: pytest.MonkeyPatch
    ) -> Callable[..., tuple[TrialState | None, FrozenTrial]]:
        """run(times, held) runs a trial that does not fit so many times, while others hold so many bytes."""
        monkeypatch.setattr(trial_run, "release_memory", lambda device: None)
        monkeypatch.setattr(trial_run, "PAUSES_S", (0.01, 0.02))
        monkeypatch.setattr("hpo.trial.context.device_name", str)

        def run_trial(times: int, held: int) -> tuple[TrialState | None, FrozenTrial]:
            monkeypatch.setattr(trial_run, "held_by_others", lambda device: held)
            raises(Learner, "step", torch.OutOfMemoryError("CUDA out of memory"), 1, times)(monkeypatch, resources)
            sequences = resources.datasets.get(study.plan.train)
            with (
                resources.device_lock.shared(lambda: False),
                study.leases.take(study.study_id, "tester", CARD) as lease,
            ):
                assert lease is not None
                state = trial_run.run_trial(TrialContext(study, lease, resources, sequences))
            (trial,) = study.storage.get_all_trials(study.study_id)
            return state, trial

        return run_trial

    def test_are_waited_for(self, run: Callable[..., tuple[TrialState | None, FrozenTrial]]) -> None:
        state, trial = run(3, 5 * 2**30)  # beside others, alone, and once more
        assert state == trial.state == TrialState.COMPLETE

    def test_are_named_where_the_trial_fails(self, run: Callable[..., tuple[TrialState | None, FrozenTrial]]) -> None:
        state, trial = run(99, 5 * 2**30)
        assert state == TrialState.FAIL
        assert trial.user_attrs["failure"].endswith("; other processes held 5120 MiB of the device")

    def test_are_not_waited_for_where_they_hold_little(
        self, run: Callable[..., tuple[TrialState | None, FrozenTrial]]
    ) -> None:
        state, trial = run(2, 2**29)
        assert state == TrialState.FAIL
        assert "other processes" not in trial.user_attrs["failure"]

    def test_are_waited_for_until_the_worker_is_to_stop(
        self,
        run: Callable[..., tuple[TrialState | None, FrozenTrial]],
        resources: WorkerResources,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(trial_run, "PAUSES_S", (600.0,))
        threading.Timer(0.5, resources.stop_requested.set).start()
        state, trial = run(99, 5 * 2**30)
        assert (state, trial.state) == (None, TrialState.RUNNING)


def test_a_trial_that_waits_for_a_device_that_is_lost_meanwhile_loses_nothing(
    study: OpenStudy, resources: WorkerResources, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen on a busy machine: neighbours of a configuration that kills its device three times failed with it, as each
    found the device dead when it gave back its memory.
    """
    with suppress(DeviceLost), study.leases.take(study.study_id, "tester", CARD):
        raise DeviceLost("it does not answer")

    def dead(*_: object) -> None:
        raise torch.AcceleratorError("CUDA error: device-side assert triggered")

    storage = trial_storage(database_url)
    again = open_study(study.name, storage)
    sequences = resources.datasets.get(study.plan.train)
    with monkeypatch.context() as patch:
        patch.setattr(trial_run, "release_memory", dead)
        patch.setattr("hpo.models.device.probe", dead)
        resources.stop_requested.set()  # by the slot that had the device
        with (
            suppress(DeviceLost),
            resources.device_lock.shared(lambda: False),
            again.leases.take(study.study_id, "second", CARD) as lease,
        ):
            assert lease is not None
            assert lease.lost == 1
            trial_run.run_trial(TrialContext(again, lease, resources, sequences))
    storage.close()
    storage = trial_storage(database_url)
    with Leases(storage).take(study.study_id, "third", CARD) as lease:
        assert lease is not None
        assert (lease.attempt, lease.lost) == (3, 1)
    storage.close()
