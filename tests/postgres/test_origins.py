"""A trial that changed its device, kernel or host on the way is promoted, and its record says where it was computed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hpo.models.metrics import score
from hpo.models.training.training import Training
from hpo.promote.reproduce import reproduce
from hpo.promote.weights import PromotionError
from hpo.storage.artifacts import artifact_store
from hpo.storage.registry import Registry
from hpo.storage.trials import TrialStorage
from hpo.study.config import load
from hpo.study.lifecycle import create_or_open
from hpo.study.record import TrialRecord
from hpo.trial.build import lstm_kernel
from hpo.trial.checkpoints import CheckpointSchedule
from hpo.trial.context import TrialContext
from hpo.worker.worker import Worker


class PowerLossError(BaseException):
    """The worker is gone."""


@pytest.fixture(autouse=True)
def study(
    study_file: Callable[..., Path],
    storage: TrialStorage,
    database_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One trial, whose log-loss shows each last bit, and which is checkpointed after each epoch."""
    monkeypatch.setenv("HPO_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HPO_DATABASE_URL", database_url)
    monkeypatch.setenv("HPO_ARTIFACTS", str(tmp_path / "artifacts"))
    monkeypatch.setattr(CheckpointSchedule, "due", True)
    space = "hidden_size = 12\nlearning_rate = 0.03\nlayers = 2\nhead_size = 0\nbatch_size = 16\n"
    file = study_file(1, 6, space, study='metric = "log_loss"')
    create_or_open(load(file), storage, artifact_store())


def run_in_two(
    monkeypatch: pytest.MonkeyPatch, first: Callable[[pytest.MonkeyPatch], None], best_in_first: bool = True
) -> None:
    """Three epochs in a world that `first` makes, the rest here, up to the promotion."""
    made, epochs = TrialContext.checkpoint, []

    def checkpoint(context: TrialContext, training: Training) -> None:
        made(context, training)
        epochs.append(training.history[-1].number)
        if epochs == [1, 2, 3]:
            raise PowerLossError

    with monkeypatch.context() as patch:
        first(patch)
        patch.setattr(TrialContext, "checkpoint", checkpoint)
        with pytest.raises(PowerLossError):
            Worker("waves", "cpu").run()
    if best_in_first:
        monkeypatch.setattr(Training, "_is_best", lambda self, epoch: self.best is None)
    Worker("waves", "cpu").run()


def record_of(storage: TrialStorage) -> TrialRecord:
    (trial,) = storage.get_all_trials(storage.get_study_id_from_name("waves"))
    record = TrialRecord.of(trial)
    assert record is not None
    return record


@pytest.fixture
def native() -> str:
    kernel = lstm_kernel()
    if kernel is None:
        pytest.skip("no C compiler")
    return kernel.name


@pytest.mark.parametrize("kernels", [("0", "1"), ("1", "0")], ids=["torch then native", "native then torch"])
def test_a_trial_whose_best_epoch_ran_on_another_kernel_is_promoted(
    kernels: tuple[str, str], native: str, storage: TrialStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HPO_NATIVE", kernels[1])
    run_in_two(monkeypatch, lambda patch: patch.setenv("HPO_NATIVE", kernels[0]))
    record = record_of(storage)
    assert record.best_epoch <= 3
    names = ["torch LSTM", native] if kernels == ("0", "1") else [native, "torch LSTM"]
    assert [name in origin for name, origin in zip(names, record.origins, strict=True)] == [True, True]
    assert record.best_origin == record.origins[0]
    assert Registry(storage.connection).get("waves", 1).trial_number == 0


def test_a_trial_whose_best_epoch_ran_on_another_host_is_promoted(
    storage: TrialStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other host rounds otherwise: there the log-loss has another last bit."""

    def elsewhere(patch: pytest.MonkeyPatch) -> None:
        real = score
        patch.setattr("socket.gethostname", lambda: "host-b")
        patch.setattr("hpo.models.training.training.score", lambda *a, **k: float(np.nextafter(real(*a, **k), 1.0)))

    run_in_two(monkeypatch, elsewhere)
    record = record_of(storage)
    assert record.best_origin.startswith("host-b: cpu, ")
    assert Registry(storage.connection).get("waves", 1).trial_number == 0


def test_the_same_bits_are_still_asked_for_where_the_best_epoch_was_computed_here(
    storage: TrialStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rounds_otherwise(patch: pytest.MonkeyPatch) -> None:
        real = score
        patch.setattr("hpo.models.training.training.score", lambda *a, **k: float(np.nextafter(real(*a, **k), 1.0)))

    with pytest.raises(PromotionError, match="must give the recorded validation log_loss"):
        run_in_two(monkeypatch, rounds_otherwise)


def test_reproduce_names_a_change_of_origin(storage: TrialStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    run_in_two(monkeypatch, lambda patch: patch.setattr("socket.gethostname", lambda: "host-b"), best_in_first=False)
    found = reproduce(storage, "waves", 0)
    assert found.equal
    (cause,) = found.causes
    assert cause.startswith("origin: it changed in the middle of the trial, which was trained on host-b: cpu")
