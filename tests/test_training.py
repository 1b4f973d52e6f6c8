"""One trial's training: exact resume, what each epoch counts, what ends it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from models.batches import Batches
from models.classifier import Classifier, ClassifierConfig
from models.data import Sequences, from_arrays, split_folds, split_share
from models.metrics import score
from models.training import OPTIMIZERS, Diverged, Interrupted, Training, TrainingConfig, TrainingError


def sequences(classes: int = 2, variable: bool = True, n: int = 48) -> Sequences:
    """Noisy sines whose frequency is the class."""
    random = np.random.default_rng(0)
    labels = np.arange(n) % classes
    lengths = random.integers(6, 15, n) if variable else np.full(n, 14)
    parts = [
        np.sin(np.arange(length) * (1 + label))[:, None] + random.normal(0, 0.3, (length, 2))
        for length, label in zip(lengths, labels, strict=True)
    ]
    return from_arrays(parts, labels)


def training(data: Sequences, folds: int = 0, device: str = "cpu", **given: Any) -> Training:
    torch.set_num_threads(1)
    shape = {name: given.pop(name) for name in list(given) if name in ClassifierConfig.__dataclass_fields__}
    config = ClassifierConfig(
        features=data.n_features, classes=len(data.classes), steps=data.steps, **({"hidden_size": 6} | shape)
    )
    parts = split_folds(data, folds, 0) if folds else split_share(data, 0.25, 0)
    settings: dict[str, Any] = {"metric": "accuracy", "epochs": 6, "batch_size": 8, "learning_rate": 0.02, "seed": 3}
    return Training(data, parts, config, TrainingConfig(**(settings | given)), device)


def run(subject: Training, epochs: int) -> Training:
    for _ in range(epochs):
        subject.advance()
    return subject


def assert_same(one: Training, other: Training) -> None:
    """Bit for bit: history without times, weights, best weights."""
    strip = [[vars(epoch) | {"seconds": 0} for epoch in subject.history] for subject in (one, other)]
    assert strip[0] == strip[1]
    for a, b in zip(one.members, other.members, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.weights().values(), b.weights().values(), strict=True))
    for left, right in zip(one.best_weights, other.best_weights, strict=True):
        assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("schedule", ["constant", "cosine", "plateau"])
@pytest.mark.parametrize("folds", [0, 3])
def test_a_resumed_training_ends_in_the_same_bits(optimizer: str, schedule: str, folds: int) -> None:
    given: dict[str, Any] = {
        "optimizer": optimizer,
        "schedule": schedule,
        "layers": 2,
        "dropout": 0.3,
        "weight_decay": 1e-3,
    }
    data = sequences()
    whole = run(training(data, folds, **given), 6)
    checkpoint = run(training(data, folds, **given), 3).state()
    resumed = training(data, folds, **given)
    resumed.restore(checkpoint)
    assert_same(run(resumed, 3), whole)


def test_a_resumed_bfloat16_training_ends_in_the_same_bits() -> None:
    data = sequences()
    whole = run(training(data, precision="bfloat16"), 4)
    resumed = training(data, precision="bfloat16")
    resumed.restore(run(training(data, precision="bfloat16"), 2).state())
    assert_same(run(resumed, 2), whole)


def test_what_runs_beside_does_not_change_a_training() -> None:
    """Nothing random is kept between epochs: two trainings may take turns in one process."""
    data = sequences()
    alone = run(training(data, layers=2, dropout=0.5), 3)
    one, other = training(data, layers=2, dropout=0.5), training(data, layers=2, dropout=0.5, seed=9)
    for _ in range(3):
        one.advance()
        other.advance()
    assert_same(one, alone)


def test_the_value_is_the_pooled_metric_of_the_best_weights() -> None:
    data = sequences(classes=3)
    subject = run(training(data, folds=4), 6)
    assert subject.best is not None
    subject.load(subject.best_weights)
    probabilities = subject.validate()
    assert score("accuracy", probabilities, subject.labels) == subject.best.value
    assert score("log_loss", probabilities, subject.labels) == subject.best.log_loss
    assert sorted(subject.labels) == sorted(data.labels if data.labels is not None else [])


@pytest.mark.parametrize("metric", ["accuracy", "auroc", "macro_f1"])
def test_of_values_that_no_validation_sequence_tells_apart_the_lowest_log_loss_is_best(metric: str) -> None:
    subject = run(training(sequences(), folds=3, metric=metric, epochs=12), 12)
    assert subject.best is not None
    top = max(epoch.value for epoch in subject.history)
    rivals = [epoch for epoch in subject.history if epoch.value >= top - 0.5 / 48]
    assert subject.best in rivals
    later = [epoch.log_loss for epoch in rivals if epoch.number >= subject.best.number]
    assert subject.best.log_loss == min(later)


def test_log_loss_as_the_metric_is_minimized() -> None:
    subject = run(training(sequences(), metric="log_loss"), 5)
    assert subject.best is not None
    assert subject.best.value == min(epoch.value for epoch in subject.history)


def test_a_network_learns_what_can_be_learnt() -> None:
    data = sequences(classes=3, n=120)
    subject = run(training(data, epochs=25, hidden_size=16, pooling="mean"), 25)
    assert subject.best is not None
    assert subject.best.value >= 0.9


def test_it_finishes_after_its_epochs_or_its_patience() -> None:
    subject = training(sequences(), epochs=3, patience=None)
    while not subject.finished:
        subject.advance()
    assert len(subject.history) == 3
    subject = training(sequences(), epochs=500, patience=2, learning_rate=1e-9)
    while not subject.finished:
        subject.advance()
    assert subject.best is not None
    assert subject.history[-1].number == subject.best.number + 2


def test_a_loss_that_is_no_number_is_reported_as_divergence() -> None:
    with pytest.raises(Diverged, match=r"epoch \d"):
        run(training(sequences(), learning_rate=1e38, optimizer="sgd", gradient_clip=0.0), 6)


def test_it_stops_between_two_batches_when_interrupted() -> None:
    subject = training(sequences())
    with pytest.raises(Interrupted):
        subject.advance(lambda: subject.batches == 2)
    assert subject.batches == 2
    assert subject.history == []


def test_the_chosen_threshold_goes_with_the_value() -> None:
    subject = run(training(sequences(), threshold="chosen", metric="f1", epochs=1), 1)
    epoch = subject.history[0]
    assert score("f1", subject.validate(), subject.labels, epoch.threshold) == epoch.value
    assert epoch.value >= score("f1", subject.validate(), subject.labels, 0.5)


def test_balanced_class_weights_lift_the_rare_class() -> None:
    random = np.random.default_rng(1)
    labels = (np.arange(200) % 10 == 0).astype(int)
    data = from_arrays(random.normal(labels[:, None, None], 1.5, (200, 5, 1)), labels)
    recall = {}
    for weight in ("none", "balanced"):
        subject = run(training(data, class_weight=weight, epochs=8), 8)
        recall[weight] = score("balanced_accuracy", subject.validate(), subject.labels)
    assert recall["balanced"] > recall["none"]


class TestBatches:
    def batches(self, variable: bool) -> tuple[Batches, Sequences]:
        data = sequences(variable=variable, n=50)
        model = Classifier(ClassifierConfig(features=2, classes=2, steps=data.steps))
        patches, lengths = model.prepare(torch.from_numpy(data.values), torch.from_numpy(data.lengths))
        return Batches(patches, lengths, torch.arange(50)), data

    @pytest.mark.parametrize("variable", [False, True])
    def test_every_sequence_comes_once(self, variable: bool) -> None:
        batches, _ = self.batches(variable)
        for parts in (list(batches.training(16, 0, 1)), list(batches.evaluation(16))):
            assert sorted(np.concatenate([part.indices for part in parts])) == list(range(50))
            assert all(torch.equal(part.labels, torch.from_numpy(part.indices)) for part in parts)

    def test_batches_are_cropped_to_their_longest_and_of_like_length(self) -> None:
        batches, data = self.batches(variable=True)
        parts = list(batches.training(8, 0, 1))
        for part in parts:
            assert part.values.shape[0] == data.lengths[part.indices].max()
        spread = [np.ptp(data.lengths[part.indices]) for part in parts]
        assert np.mean(spread) < np.ptp(data.lengths) / 2

    def test_order_is_a_function_of_the_seed_alone(self) -> None:
        batches, _ = self.batches(variable=True)
        orders = [
            np.concatenate([part.indices for part in batches.training(8, *seed)]) for seed in [(0, 1)] * 2 + [(0, 2)]
        ]
        assert (orders[0] == orders[1]).all()
        assert (orders[0] != orders[2]).any()

    def test_full_batches_carry_no_lengths(self) -> None:
        batches, _ = self.batches(variable=False)
        assert all(part.lengths is None for part in batches.training(8, 0))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0, got 0.0"),
        ({"optimizer": "lion"}, "optimizer must be one of adamw, adam, rmsprop, sgd, got 'lion'"),
    ],
)
def test_a_configuration_out_of_range_names_rule_and_value(given: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        TrainingConfig(**({"metric": "accuracy"} | given))
