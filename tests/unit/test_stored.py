"""What earlier versions wrote is read: a data set, a checkpoint and saved models.

The files in `stored` were written at commit bb0e887 by a training of 24 sequences in two folds, the checkpoint after
two of its four epochs; those in `stored/format_4` at commit 8d769fc, before models had a
temperature. Another processor may round differently, so numbers are compared to within 1e-4.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from hpo.models.bundle import bundle, card
from hpo.models.config import EARLIER_EPSILON, ClassifierConfig, TrainingConfig
from hpo.models.data import canonical
from hpo.models.data.splits import split_folds
from hpo.models.training.training import Training

STORED = Path(__file__).with_name("stored")
EXPECTED = json.loads((STORED / "expected.json").read_text())


def test_a_checkpoint_is_continued() -> None:
    torch.set_num_threads(1)
    data = canonical.load(STORED / "data.safetensors")
    classifier = ClassifierConfig(
        features=2,
        classes=2,
        steps=data.steps,
        hidden_size=3,
        layers=2,
        dropout=0.2,
        normalization="channel",
        head_size=2,
        epsilon=EARLIER_EPSILON,
    )
    config = TrainingConfig(
        metric="auroc", epochs=4, batch_size=6, learning_rate=0.02, weight_decay=1e-3, schedule="cosine", seed=1
    )
    training = Training(data, split_folds(data, 2, 0), classifier, config)
    training.restore((STORED / "checkpoint.pt").read_bytes())
    assert len(training.history) == 2
    while not training.finished:
        training.advance()
    found = [[epoch.train_loss, epoch.value, epoch.log_loss] for epoch in training.history]
    np.testing.assert_allclose(found, EXPECTED["epochs"], atol=1e-4)


def test_a_saved_model_predicts() -> None:
    model = bundle.load(STORED / "model")
    found = model.predict(canonical.load(STORED / "data.safetensors")).probabilities[:, 1]
    np.testing.assert_allclose(found, EXPECTED["probabilities"], atol=1e-4)
    assert model.config.provenance == {"study": "stored"}


def test_a_saved_model_without_a_temperature_predicts_as_it_did() -> None:
    folder = STORED / "format_4"
    expected = json.loads((folder / "expected.json").read_text())
    assert json.loads((folder / "config.json").read_text())["format"] == 4
    model = bundle.load(folder)
    assert (model.config.temperature, model.config.calibration) == (1.0, {})
    found = model.predict(canonical.load(STORED / "data.safetensors"))
    np.testing.assert_allclose(found.probabilities[:, 1], expected["probabilities"], atol=1e-5)
    assert found.labels.tolist() == expected["labels"]
    assert "Calibration" not in card.readme(model.config)


def test_the_hash_of_a_data_set_is_that_of_its_file() -> None:
    """Artifact keys of data sets are made of it."""
    data = canonical.load(STORED / "data.safetensors")
    assert canonical.to_bytes(data) == (STORED / "data.safetensors").read_bytes()


@pytest.mark.parametrize("part", ["validation", "test"])
def test_scores_are_those_that_were_saved(part: str) -> None:
    config = bundle.load(STORED / "model").config
    content = json.loads((STORED / "model" / "config.json").read_text())[part]
    scores = getattr(config, part)
    assert (None if scores is None else scores.metrics) == (content and content["metrics"])
