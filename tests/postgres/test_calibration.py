"""A promoted model is calibrated by what its networks say of sequences that they have not trained on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import hpo
from hpo.datasets import fetch_sequences
from hpo.models.bundle.bundle import unpack
from hpo.models.bundle.evaluation import evaluate
from hpo.models.calibration import calibrate, fit_temperature, measure_reliability
from hpo.models.costs import Costs
from hpo.models.metrics import confusion, predict_labels
from hpo.promote.versions import model_folder
from hpo.storage.artifacts import artifact_store
from hpo.storage.trials import TrialStorage
from hpo.study.config import load
from hpo.study.lifecycle import OpenStudy, create_or_open, open_study
from hpo.study.record import TrialRecord
from hpo.trial.build import rebuild
from hpo.worker.worker import Worker

STUDY = """
[study]
name = "sounds"
trials = 1
metric = "{metric}"
[data]
train = "train.npz"
test = "test.npz"
weight = "weight"
{data}
[train]
epochs = 12
[space]
hidden_size = 8
layers = 1
stem = "none"
pooling = "mean"
normalization = "channel"
learning_rate = 0.05
{space}
"""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPO_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HPO_DATABASE_URL", database_url)
    monkeypatch.setenv("HPO_ARTIFACTS", str(tmp_path / "artifacts"))


def write(folder: Path, K: int, **given: str) -> Path:
    """Sequences whose level tells the class, not without errors, in the order of time, some with more weight."""
    random = np.random.default_rng(0)
    for name, n in (("train", 120), ("test", 60)):
        labels = np.arange(n) % K
        X = random.normal(labels[:, None, None] * 1.0, 1, (n, 5, 1)) + random.normal(0, 0.5, (n, 1, 1))
        order: dict[str, Any] = (
            {"time": np.arange(n) + (0 if name == "train" else 1_000)} if "time" in given.get("data", "") else {}
        )
        np.savez(folder / f"{name}.npz", X=X, y=labels, weight=1.0 + (np.arange(n) % 3), **order)
    (folder / "study.toml").write_text(STUDY.format(**{"metric": "accuracy", "data": "", "space": ""} | given))
    return folder / "study.toml"


def promoted(file: Path, storage: TrialStorage) -> tuple[OpenStudy, TrialRecord]:
    create_or_open(load(file), storage, artifact_store())
    Worker("sounds", "cpu").run()
    study = open_study("sounds", storage)
    (record,) = study.best_first()
    return study, record


def unseen(study: OpenStudy, record: TrialRecord) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.float64]]:
    """Probabilities, labels and weights of the sequences that the trial's networks validated on."""
    sequences = fetch_sequences(artifact_store(), study.plan.train)
    with rebuild(study.plan, record, sequences, "cpu") as training:
        assert record.weights is not None
        assert training.row_weights is not None
        training.load(unpack(artifact_store().get(record.weights)))
        return training.validate(), training.labels, training.row_weights


def test_a_threshold_by_costs_is_the_cheapest_one_of_these_predictions(tmp_path: Path, storage: TrialStorage) -> None:
    """It decides in the scores of both parts, the trial's value stays what it was."""
    file = write(tmp_path, 2)
    file.write_text(file.read_text() + "[promote]\ncosts = { false_positive = 1, false_negative = 20 }\n")
    study, record = promoted(file, storage)
    model, costs = hpo.load(model_folder("sounds", 1)), Costs(1, 20)
    config = model.config
    probabilities, labels, weights = unseen(study, record)
    given = calibrate(probabilities, config.temperature).astype(np.float32)
    assert config.costs == costs
    assert config.threshold < 0.4

    def cost(threshold: float) -> float:
        wrong = np.where(labels == 0, costs.false_positive, costs.false_negative)
        return float(weights @ (wrong * (predict_labels(given, threshold) != labels)))

    least = min(map(cost, np.unique(given[:, 1]).astype(np.float64)))
    assert cost(config.threshold) == pytest.approx(least, rel=1e-12)
    assert least < cost(record.threshold)
    assert config.validation is not None
    assert config.test is not None
    assert config.validation.confusion == tuple(map(tuple, confusion(given, labels, config.threshold).tolist()))
    assert study.plan.test is not None
    test = evaluate(model, fetch_sequences(artifact_store(), study.plan.test))
    assert test.scores.confusion == config.test.confusion
    assert config.validation.metrics["accuracy"] < record.value


@pytest.mark.parametrize("K", [2, 3])
@pytest.mark.parametrize("rolling", [False, True])
def test_by_the_predictions_of_networks_that_have_not_seen_the_sequence(
    K: int, rolling: bool, tmp_path: Path, storage: TrialStorage
) -> None:
    data = "validation = { folds = 3 }" + ('\ntime = "time"' if rolling else "")
    space = 'threshold = "chosen"' if K == 2 else ""
    study, record = promoted(write(tmp_path, K, data=data, space=space), storage)
    model = hpo.load(model_folder("sounds", 1))
    config = model.config
    probabilities, labels, weights = unseen(study, record)

    assert config.members == (1 if rolling else 3)
    assert config.temperature == fit_temperature(probabilities, labels, weights)
    assert config.temperature != 1
    given = calibrate(probabilities, config.temperature).astype(np.float32)
    before = predict_labels(probabilities, record.threshold)
    np.testing.assert_array_equal(predict_labels(given, config.threshold), before)
    assert config.calibration["validation"].before == measure_reliability(probabilities, labels, weights)
    assert config.calibration["validation"].after == measure_reliability(given, labels, weights)

    assert config.validation is not None  # scores of the trial
    assert config.validation.metrics["accuracy"] == record.value
    assert config.validation.metrics["log_loss"] == record.log_loss

    test = fetch_sequences(artifact_store(), str(study.plan.test))
    assert config.test is not None
    found = evaluate(model, test)
    assert found.scores.metrics == pytest.approx(config.test.metrics)  # of the model as it predicts
    assert found.reliability == config.calibration["test"].after
    plain = evaluate(replace(model, config=replace(config, temperature=1.0, threshold=record.threshold)), test)
    assert plain.reliability == config.calibration["test"].before
    assert plain.scores.metrics["log_loss"] != found.scores.metrics["log_loss"]
    assert plain.predictions.labels.tolist() == found.predictions.labels.tolist()
    card = (model_folder("sounds", 1) / "README.md").read_text()
    assert f"| {plain.reliability.ece:.4f} | {found.reliability.ece:.4f} |" in card
