"""A study of data whose gaps give the class away: adopted, promoted, exported and reproduced like any other."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

import hpo
from hpo.models.bundle import export
from hpo.models.data.gaps import inputs
from hpo.models.training.training import Training
from hpo.promote.reproduce import reproduce
from hpo.promote.versions import model_folder
from hpo.storage.artifacts import artifact_store
from hpo.storage.trials import TrialStorage
from hpo.study.config import load
from hpo.study.lifecycle import create_or_open
from hpo.study.record import TrialRecord
from hpo.trial.checkpoints import CheckpointSchedule
from hpo.trial.context import TrialContext
from hpo.worker.worker import Worker

N, STEPS = 80, 6
STUDY = """
[study]
name = "visits"
trials = 2
metric = "accuracy"
sampler = "random"
[data]
train = "visits.csv"
step = "when"
[train]
epochs = 40
[space]
normalization = "channel"
difference = false
stem = "none"
hidden_size = 8
layers = 1
bidirectional = false
pooling = "mean"
head_size = 0
batch_size = 8
learning_rate = 0.05
weight_decay = 0.0
label_smoothing = 0.0
mixup = 0.0
jitter = 0.0
"""


class PowerLossError(BaseException):
    """The worker is gone."""


def write(folder: Path, told_by: str) -> Path:
    """Patients whose pulse stays as it is. At one of their visits the sick ones have no value, or they were late."""
    random, lines = np.random.default_rng(0), ["id,when,pulse,label"]
    for i in range(N):
        odd = random.integers(1, STEPS - 1) if i % 2 else None
        when, pulse = datetime(2024, 1, 1), random.normal(70, 9)
        for step in range(STEPS):
            when += timedelta(days=9 if step == odd and told_by == "times" else 1)
            value = "" if step == odd and told_by == "values" else f"{pulse:.4f}"
            lines.append(f"p{i},{when.isoformat()},{value},{'sick' if i % 2 else 'well'}")
    (folder / "visits.csv").write_text("\n".join(lines) + "\n")
    (folder / "visits.toml").write_text(STUDY)
    return folder / "visits.toml"


@pytest.fixture(params=["values", "times"])
def study(
    request: pytest.FixtureRequest,
    storage: TrialStorage,
    database_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """Two trials, as all of the space but `missing` is fixed. Its file."""
    monkeypatch.setenv("HPO_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HPO_DATABASE_URL", database_url)
    monkeypatch.setenv("HPO_ARTIFACTS", str(tmp_path / "artifacts"))
    file = write(tmp_path, request.param)
    create_or_open(load(file), storage, artifact_store())
    return file


def lose_power_once(patch: pytest.MonkeyPatch) -> None:
    """The worker dies in the first trial that is told of gaps, at its third checkpoint, one of which each epoch has."""
    made, epochs = TrialContext.checkpoint, []

    def checkpoint(context: TrialContext, training: Training) -> None:
        made(context, training)
        if training.classifier.marks:
            epochs.append(training.history[-1].number)
        if epochs == [1, 2, 3]:
            raise PowerLossError

    patch.setattr(CheckpointSchedule, "due", True)
    patch.setattr(TrialContext, "checkpoint", checkpoint)


def test_a_network_that_is_told_of_the_gaps_learns_what_they_say_and_no_other_does(
    study: Path, storage: TrialStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        lose_power_once(patch)
        with pytest.raises(PowerLossError):
            Worker("visits", "cpu").run()
    Worker("visits", "cpu").run()
    records = [TrialRecord.of(trial) for trial in storage.get_all_trials(storage.get_study_id_from_name("visits"))]
    found = {record.params["missing"]: record for record in records if record is not None}
    assert found["mask"].value > 0.9
    assert found["interpolate"].value < 0.8
    for record in found.values():
        again = reproduce(storage, "visits", record.number)
        assert again.equal, again.first_difference

    folder = model_folder("visits", 1)
    model = hpo.load(folder)
    data = model.read(study.with_name("visits.csv"), labeled=True)
    predicted = model.predict(data)
    assert data.labels is not None
    assert (predicted.labels == np.array(data.classes)[data.labels]).mean() > 0.9
    given = inputs(model.conform(data), model.config.classifier)
    for format in ("onnx", "pt2"):
        out = export.export(folder, study.with_name(format), format, sequences=data)
        graph = getattr(export, f"_run_{format}")(out / f"model.{format}")
        np.testing.assert_allclose(graph(given, data.lengths), predicted.probabilities, atol=1e-5)
