"""Weights of sequences: a row of weight 2 is two rows, equal weights are none, and a weight is no feature."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

import hpo
from hpo.models import metrics
from hpo.models.classifier import Classifier
from hpo.models.config import METRICS, ClassifierConfig, TrainingConfig
from hpo.models.data.canonical import fingerprint, load, save
from hpo.models.data.order import in_order
from hpo.models.data.readers import read
from hpo.models.data.sequences import DataError, Sequences
from hpo.models.data.splits import lacking
from hpo.models.metrics import WEIGHTED, MetricError
from hpo.models.training.batches import Batch
from hpo.models.training.learner import Learner
from hpo.models.training.training import Training
from hpo.study.config import ConfigError, config_for_data
from hpo.study.plan import Plan, make_plan
from hpo.study.readout import readout

# ------------------------------------------------------------------ metrics


@st.composite
def rows(draw: st.DrawFn) -> tuple[NDArray[Any], NDArray[np.int64], NDArray[np.float64]]:
    """Probabilities with many ties, labels of every class, whole weights of which some are 0."""
    n, K, seed = draw(st.integers(8, 30)), draw(st.integers(2, 4)), draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    p = np.round(rng.dirichlet(np.ones(K), n), 1) + 0.01
    labels = np.concatenate([np.arange(K), rng.integers(K, size=n - K)])
    weights = rng.integers(0, 4, n).astype(float)
    weights[:K] = rng.integers(1, 4, K)
    return p / p.sum(axis=1, keepdims=True), labels, weights


def repeated(weights: NDArray[np.float64], *arrays: NDArray[Any]) -> list[NDArray[Any]]:
    return [np.repeat(array, weights.astype(int), axis=0) for array in arrays]


@settings(max_examples=150, deadline=None)
@given(rows(), st.floats(0.1, 0.9))
def test_whole_weights_give_the_metrics_of_repeated_rows(drawn: Any, threshold: float) -> None:
    p, labels, weights = drawn
    many, own = repeated(weights, p, labels)
    found, expected = metrics.evaluate(p, labels, threshold, weights), metrics.evaluate(many, own, threshold)
    assert found.keys() == expected.keys()
    for name in METRICS:
        assert found[name] == pytest.approx(expected[name], abs=1e-12)
        assert metrics.score(name, p, labels, threshold, 7.5 * weights) == pytest.approx(expected[name], abs=1e-12)
        chosen = metrics.choose_threshold(p, labels, name, weights)
        assert chosen == pytest.approx(metrics.choose_threshold(many, own, name), abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(rows(), st.floats(1e-3, 1e6))
def test_equal_weights_give_the_bits_of_none(drawn: Any, weight: float) -> None:
    p, labels, _ = drawn
    equal = np.full(len(labels), weight)
    assert metrics.measure(p, labels, 0.4, weights=equal) == metrics.measure(p, labels, 0.4)
    assert metrics.choose_threshold(p, labels, "f1", equal) == metrics.choose_threshold(p, labels, "f1")


def test_weights_of_any_size_are_shares() -> None:
    rng = np.random.default_rng(0)
    p, labels = rng.dirichlet([1, 1], 50), np.arange(50) % 2
    weights = rng.lognormal(size=50)
    expected = roc_auc_score(labels, p[:, 1], sample_weight=weights)
    for scale in (1e-300, 1.0, 1e300):
        assert metrics.score("auroc", p, labels, weights=scale * weights) == pytest.approx(expected)


@pytest.mark.parametrize("weights", [[1.0, -1.0], [1.0, np.nan], [np.inf, 1.0], [0.0, 0.0], [1.0]])
def test_weights_that_are_none_are_refused(weights: list[float]) -> None:
    with pytest.raises(MetricError, match="weights must be finite, at least 0, not all 0 and one a row"):
        metrics.score("accuracy", np.eye(2), np.arange(2), weights=np.array(weights))


class TestIntervals:
    def test_their_methods_say_so_and_counts_are_of_sequences(self) -> None:
        p, labels = np.array([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3], [0.6, 0.4]]), np.array([0, 1, 1, 0])
        found = metrics.measure(p, labels, weights=np.array([1.0, 1, 3, 5]))
        assert found.weighted
        assert not metrics.measure(p, labels).weighted
        assert all(method.endswith(WEIGHTED) for method in found.methods.values())
        assert found.metrics["accuracy"] == pytest.approx(0.7)
        assert (found.confusion, found.sequences) == (((2, 0), (1, 1)), 4)

    def test_unequal_weights_are_worth_fewer_sequences(self) -> None:
        """Ten of 40 rows with nearly all of the weight are worth about ten rows."""
        p, labels = np.tile([[0.8, 0.2], [0.3, 0.7]], (20, 1)), np.arange(40) % 2
        weights = np.where(np.arange(40) < 10, 1.0, 1e-9)
        assert metrics.effective(weights) == pytest.approx(10)
        few = metrics.intervals(p[:10], labels[:10])
        for name, (low, high) in metrics.intervals(p, labels, weights=weights).items():
            assert (low, high) == pytest.approx(few[name], abs=0.01)

    def test_they_hold_the_truth_as_often_as_they_say(self) -> None:
        """400 draws; with as many equal rows the sampling error of a share of 0.95 is 0.011."""
        rng = np.random.default_rng(0)
        held = dict.fromkeys(("accuracy", "auroc"), 0)
        truth = {"accuracy": 0.8, "auroc": 0.8}
        for _ in range(400):
            labels, weights = np.arange(80) % 2, rng.lognormal(size=80)
            right = rng.random(80) < 0.8
            p = np.where((labels == 1) == right, 0.8, 0.2)
            found = metrics.intervals(np.stack([1 - p, p], 1), labels, samples=10, weights=weights)
            for name in held:
                low, high = found[name]
                held[name] += low <= truth[name] <= high
        assert all(count >= 0.93 * 400 for count in held.values())

    def test_a_class_of_weight_0_is_no_class(self) -> None:
        p, labels = np.eye(3)[[0, 1, 2, 0]] * 0.7 + 0.1, np.array([0, 1, 2, 0])
        found = metrics.measure(p, labels, classes=("a", "b", "c"), weights=np.array([1.0, 2, 0, 1]))
        assert found.undefined["macro_f1"] == "no sequence of class c"
        assert found.metrics.keys() == {"accuracy", "log_loss"}


# ------------------------------------------------------------------ training


def sequences(n: int = 48, classes: int = 2, weights: Any = None) -> Sequences:
    """Noise with an offset by class, of different lengths."""
    rng = np.random.default_rng(0)
    labels = np.arange(n) % classes
    X = rng.normal(size=(n, 9, 2)) + 0.5 * labels[:, None, None]
    arrays = {"X": X, "y": labels, "lengths": rng.integers(5, 10, n)}
    given = {} if weights is None else {"weight": weights}
    return read(arrays | given, weight=None if weights is None else "weight")


def learner(data: Sequences, weights: NDArray[np.float64] | None, class_weight: str) -> Learner:
    torch.manual_seed(0)
    model = Classifier(
        ClassifierConfig(features=2, classes=len(data.classes), steps=data.steps, hidden_size=5, layers=1)
    )
    assert data.labels is not None
    config = TrainingConfig(metric="accuracy", class_weight=class_weight)
    given = None if weights is None else torch.from_numpy(weights).float()
    return Learner(model, config, torch.from_numpy(data.labels), weights=given)


def loss_of(found: Learner, logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    batch = Batch(torch.empty(0), None, labels, np.arange(len(labels)), weights=weights)
    return found._loss(logits, batch, None)


@pytest.mark.parametrize("class_weight", ["none", "balanced"])
@pytest.mark.parametrize("classes", [2, 3])
def test_whole_weights_give_the_loss_of_repeated_rows(classes: int, class_weight: str) -> None:
    rng = np.random.default_rng(1)
    data, weights = sequences(24, classes), rng.integers(0, 4, 24).astype(float)
    assert data.labels is not None
    logits = torch.from_numpy(rng.normal(size=(24,) if classes == 2 else (24, classes))).float()
    labels = torch.from_numpy(data.labels)
    many, own = (torch.from_numpy(each) for each in repeated(weights, logits.numpy(), data.labels))
    alone = learner(data.take(np.repeat(np.arange(24), weights.astype(int))), None, class_weight)
    expected = loss_of(alone, many, own, None)
    for scale in (1.0, 0.25):  # the same for weights that are shares
        weighted = learner(data, scale * weights, class_weight)
        found = loss_of(weighted, logits, labels, torch.from_numpy(scale * weights).float())
        torch.testing.assert_close(found, expected)


def test_a_batch_of_weight_0_alone_gives_no_loss_and_no_gradient() -> None:
    data = sequences(8)
    assert data.labels is not None
    logits = torch.ones(8, requires_grad=True)
    loss = loss_of(learner(data, None, "none"), logits, torch.from_numpy(data.labels), torch.zeros(8))
    loss.backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert (loss.item(), logits.grad.abs().max().item()) == (0.0, 0.0)


def training(data: Sequences, *, fixed_shapes: bool = False, **given: Any) -> Training:
    torch.set_num_threads(1)
    shape = ClassifierConfig(features=2, classes=len(data.classes), steps=data.steps, hidden_size=6, layers=1)
    config = TrainingConfig(
        metric="accuracy", epochs=3, batch_size=8, learning_rate=0.02, seed=3, threshold="chosen", **given
    )
    parts = [(np.arange(0, data.n, 2), np.arange(1, data.n, 2)), (np.arange(1, data.n, 2), np.arange(0, data.n, 2))]
    return Training(data, parts, shape, config, fixed_shapes=fixed_shapes)


def trained(data: Sequences, epochs: int = 3, **given: Any) -> Training:
    found = training(data, **given)
    for _ in range(epochs):
        found.advance()
    return found


def numbers(found: Training) -> list[tuple[float, ...]]:
    return [(each.train_loss, each.value, each.log_loss, each.threshold) for each in found.history]


WEIGHTS = np.random.default_rng(5).integers(0, 5, 48) * 0.5


@pytest.mark.parametrize("fixed_shapes", [False, True])
@pytest.mark.parametrize("class_weight", ["none", "balanced"])
def test_equal_weights_train_the_bits_of_none(class_weight: str, fixed_shapes: bool) -> None:
    data = sequences()
    equal = replace(data, weights=np.full(data.n, 0.3))
    one, other = (trained(each, class_weight=class_weight, fixed_shapes=fixed_shapes) for each in (data, equal))
    assert numbers(one) == numbers(other)


@pytest.mark.parametrize("more", [{}, {"mixup": 0.4, "label_smoothing": 0.1}])
@pytest.mark.parametrize("class_weight", ["none", "balanced"])
@pytest.mark.parametrize("classes", [2, 3])
def test_steps_of_fixed_shapes_weigh_alike(classes: int, class_weight: str, more: dict[str, Any]) -> None:
    data = sequences(classes=classes, weights=WEIGHTS)
    one = trained(data, class_weight=class_weight, **more)
    other = trained(data, class_weight=class_weight, fixed_shapes=True, **more)
    np.testing.assert_allclose(numbers(one), numbers(other), rtol=1e-4)
    assert numbers(one) != numbers(trained(sequences(classes=classes), class_weight=class_weight, **more))


def test_validation_is_weighted_and_a_resumed_training_goes_on_in_the_same_bits() -> None:
    data = sequences(weights=WEIGHTS)
    whole = trained(data)
    resumed = training(data)
    resumed.restore(trained(data, epochs=1).state())
    resumed.advance()
    last = resumed.advance()
    assert numbers(resumed) == numbers(whole)
    p, labels, weights = resumed.validate(), resumed.labels, resumed.row_weights
    assert weights is not None
    assert last.threshold == metrics.choose_threshold(p, labels, "accuracy", weights)
    assert last.value == metrics.score("accuracy", p, labels, last.threshold, weights)
    many, own = repeated(2 * weights, p, labels)
    assert last.log_loss == pytest.approx(metrics.score("log_loss", many, own), abs=1e-12)


def test_a_sequence_of_weight_0_has_no_say() -> None:
    """Whatever its label is: only what is fitted to values, and where a batch ends, knows of it."""
    data = sequences(weights=WEIGHTS)
    assert data.labels is not None
    turned = replace(data, labels=np.where(WEIGHTS == 0, 1 - data.labels, data.labels))
    assert (WEIGHTS == 0).any()
    for more in ({}, {"class_weight": "balanced"}, {"mixup": 0.4}):
        assert numbers(trained(data, **more)) == numbers(trained(turned, **more))


# ------------------------------------------------------------------ from a file


class TestWeightsOfAFile:
    LONG = "id,step,x,w,label\na,2,1,0.50,p\na,1,0,.5,p\nb,1,3,2,q\n"
    WIDE = "t0,t1,w,label\n0,1,0.5,p\n3,,2,q\n"
    ARRAYS: dict[str, Any] = {"X": np.array([[0.0, 1], [3, np.nan]]), "y": ["p", "q"]}  # noqa: RUF012

    def test_every_form_gives_the_same_weights_and_no_feature_of_them(self, tmp_path: Path) -> None:
        found = []
        for name, text in (("long.csv", self.LONG), ("wide.csv", self.WIDE)):
            (tmp_path / name).write_text(text)
            (tmp_path / f"{name}.tsv").write_text(text.replace(",", ";").replace(".", ","))
            found += [hpo.read(tmp_path / each, weight="w") for each in (name, f"{name}.tsv")]
        for weights in ([0.5, 2], ["0.5", "2"], np.array([0.5, 2], np.float32), np.array([b"0.5", b"2"])):
            found.append(hpo.read({**self.ARRAYS, "weight": weights}, weight="w"))
            np.savez(tmp_path / "data.npz", **self.ARRAYS, weight=np.array(weights))
            found.append(hpo.read(tmp_path / "data.npz", weight="w"))
        for each in found:
            assert each.weights is not None
            assert each.weights.tolist() == [0.5, 2]
            assert (each.n_features, each.steps) == (1, 2)

    def test_equal_weights_are_none(self) -> None:
        plain = hpo.read(self.ARRAYS)
        equal = hpo.read({**self.ARRAYS, "weight": [3, 3.0]}, weight="w")
        assert equal.weights is None
        assert fingerprint(equal) == fingerprint(plain)
        assert fingerprint(hpo.read({**self.ARRAYS, "weight": [3, 2]}, weight="w")) != fingerprint(plain)

    def test_they_are_stored_taken_and_ordered_with_their_sequences(self, tmp_path: Path) -> None:
        data = sequences(weights=WEIGHTS)
        save(data, tmp_path / "data")
        again = load(tmp_path / "data")
        assert again.weights is not None
        assert again.weights.tolist() == WEIGHTS.tolist()
        assert fingerprint(again) == fingerprint(data)
        rng = np.random.default_rng(0)
        twins = read({"X": np.ones((30, 2)), "y": np.arange(30) % 2, "weight": rng.integers(0, 9, 30)}, weight="w")
        one, other = in_order(twins), in_order(twins.take(rng.permutation(30)))
        assert one.weights is not None
        assert other.weights is not None
        assert one.weights.tolist() == other.weights.tolist()

    def test_new_data_need_none(self, tmp_path: Path) -> None:
        (tmp_path / "new.csv").write_text("t0,t1,w\n0,1,heavy\n3,2,\n")
        found = read(tmp_path / "new.csv", weight="w", labeled=False)
        assert (found.weights, found.steps) == (None, 2)
        (tmp_path / "new.csv").write_text("t0,t1,label\n0,1,p\n3,2,q\n")
        assert read(tmp_path / "new.csv", weight="w").weights is None

    @pytest.mark.parametrize(
        ("weights", "expected"),
        [
            ([1, None], "sequence 1 has no weight: give every sequence one"),
            ([1, np.nan], "sequence 1 has no weight: give every sequence one"),
            (["1", "?"], "sequence 1 has no weight: give every sequence one"),
            ([1, np.inf], "sequence 1: a weight is a finite number of 0 or more, got inf"),
            ([-0.5, 1], r"sequence 0: a weight is a finite number of 0 or more, got -0\.5"),
            (["1", "1_0"], "sequence 1: '1_0' is no weight: a weight is a finite number"),
            ([[1], 2], "sequence 0: .* is no weight|weight must be of shape"),
            ([0, 0], "the weight of every sequence is 0: give those that count more"),
            ([1, 2, 3], r"weight must be of shape \(2,\), one a sequence"),
        ],
    )
    def test_what_is_no_weight_is_named(self, weights: Any, expected: str) -> None:
        with pytest.raises(DataError, match=expected):
            hpo.read({**self.ARRAYS, "weight": weights}, weight="w")

    def test_a_column_that_changes_is_missing_or_something_else_is_named(self, tmp_path: Path) -> None:
        path = tmp_path / "a.csv"
        path.write_text(self.LONG.replace(".5,p", ".6,p"))
        with pytest.raises(DataError, match=r"row 3: weight of sequence 'a' changes to '\.6'; a sequence has one"):
            hpo.read(path, weight="w")
        path.write_text(self.LONG)
        with pytest.raises(DataError, match="no weight column 'v'; its columns are id, step, x, w, label; say which"):
            hpo.read(path, weight="v")
        for role in ("label", "id", "step", "x"):
            columns = {"weight": "x", "time": "x"} if role == "x" else {"weight": role}
            with pytest.raises(DataError, match="group, time and weight must be different columns"):
                hpo.read(path, **columns)
        with pytest.raises(DataError, match=r"TRAIN\.ts is a \.ts file, whose sequences have no weight"):
            hpo.read("examples/data/ItalyPowerDemand_TRAIN.ts", weight="w")


# ------------------------------------------------------------------ from a file to a plan


def planned(folder: Path, weights: Any, *overrides: str) -> tuple[Plan, Sequences, Sequences]:
    rng = np.random.default_rng(0)
    np.savez(
        folder / "data.npz", X=rng.normal(size=(60, 6, 1)), y=np.arange(60) % 2, weight=weights, time=np.arange(60)
    )
    plan, train, test = make_plan(
        config_for_data(folder / "data.npz", ["data.weight=weight", "data.time=time", *overrides])
    )
    assert test is not None
    return plan, train, test


class TestPlan:
    def test_both_parts_keep_theirs_and_the_launch_says_so(self, tmp_path: Path) -> None:
        plan, train, test = planned(tmp_path, 1.0 + np.arange(60))
        assert train.weights is not None
        assert test.weights is not None
        assert sorted([*train.weights, *test.weights]) == (1.0 + np.arange(60)).tolist()
        said = readout(plan, train, test)
        assert "weights from 1 to 48" in said[0]
        assert "weights from 49 to 60" in said[1]

    @pytest.mark.parametrize(
        ("none", "expected"),
        [
            (range(8), r"nothing is left to train on before block 1 of 5 \(from 8 on\): 8 sequences are earlier"),
            (range(8, 48), r"data\.npz: data\.weight is 0 for all 40 sequences of the validation part: set more aside"),
            (range(48, 60), r"data\.npz: data\.weight is 0 for all 12 sequences of the test part: set more aside"),
        ],
    )
    def test_a_part_that_weighs_nothing_is_refused(self, tmp_path: Path, none: range, expected: str) -> None:
        weights = np.ones(60)
        weights[list(none)] = 0
        with pytest.raises(DataError, match=expected):
            planned(tmp_path, weights)

    def test_a_class_that_weighs_nothing_is_said_or_refused(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="has one class only, '1'"):
            planned(tmp_path, (np.arange(60) % 2).astype(float))
        data = sequences(weights=np.where(np.arange(48) < 40, 1.0, np.arange(48) % 2))
        assert lacking(data, np.arange(40, 48)) == ["0"]

    def test_it_needs_a_column_of_its_own(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="group, time and weight must be different columns"):
            planned(tmp_path, np.ones(60), "data.weight=label")

    def test_weights_that_nobody_has_named_are_refused(self, tmp_path: Path) -> None:
        planned(tmp_path, np.ones(60))
        with pytest.raises(DataError, match="unknown array 'weight': leave it out, or name it to have it used"):
            make_plan(config_for_data(tmp_path / "data.npz", ["data.time=time"]))
