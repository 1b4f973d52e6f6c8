"""A saved model on labelled data: its scores, what it gets wrong, and data that it cannot be compared with."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from hpo.models.bundle.bundle import Bundle, load
from hpo.models.bundle.evaluation import evaluate
from hpo.models.calibration import measure_reliability
from hpo.models.data.sequences import DataError, Sequences, from_arrays
from hpo.models.metrics import measure
from hpo.terminal import evaluation_row, show_evaluation
from tests.unit.test_bundle import saved


@pytest.fixture
def model(tmp_path: Path) -> Bundle:
    return load(saved(tmp_path / "model"))


def sequences(labels: list[str] | None) -> Sequences:
    """12 of 9 steps, of the model's two features, of which the first are labelled."""
    X = np.random.default_rng(0).normal(0, 3, (12, 9, 2))
    return from_arrays(X, None if labels is None else np.array(labels), features=("pulse", "breath"))


def test_its_scores_are_those_of_its_predictions_by_the_names_of_the_classes(model: Bundle) -> None:
    """The data hold two of the model's three classes, whose numbers there are others."""
    names = ["class 2", "class 0"] * 6
    found = evaluate(model, sequences(names))
    labels = np.array([int(name[-1]) for name in names])
    config = model.config
    probabilities = model.predict(sequences(None)).probabilities
    expected = measure(probabilities, labels, config.threshold, classes=config.classes)
    assert found.scores == expected
    assert found.reliability == measure_reliability(probabilities, labels)
    assert "no sequence of class class 1" in expected.undefined["balanced_accuracy"]
    assert found.scores.sequences == 12
    assert sum(map(sum, found.scores.confusion)) == 12
    assert len(found.scores.confusion) == 3


def test_what_is_shown_says_how_far_the_probabilities_can_be_believed(
    model: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    found = evaluate(model, sequences(["class 2", "class 0"] * 6))
    show_evaluation(found)
    ece, brier = found.reliability.ece, found.reliability.brier
    assert f"calibration: ECE {ece:.4f}, Brier score {brier:.4f}" in capsys.readouterr().out
    row = evaluation_row(found)
    assert (row["ece"], row["brier"]) == (ece, brier)


def test_the_wrong_ones_are_those_of_another_class_the_surest_first(model: Bundle) -> None:
    found = evaluate(model, sequences(["class 0"] * 6 + ["class 2"] * 6))
    wrong = found.wrong
    assert 0 < len(wrong) < 12
    assert sorted(wrong) == list(np.flatnonzero(found.predictions.labels != found.labels))
    sureness = found.predictions.probabilities[wrong].max(1)
    assert list(sureness) == sorted(sureness, reverse=True)


def test_the_file_holds_every_sequence_with_its_true_class(model: Bundle, tmp_path: Path) -> None:
    names = ["class 0", "class 1", "class 2"] * 4
    evaluate(model, sequences(names)).to_csv(tmp_path / "found.csv")
    with (tmp_path / "found.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["true"] for row in rows] == names
    assert list(rows[0])[:3] == ["id", "true", "predicted"]


def test_a_file_is_read_with_the_columns_of_training(model: Bundle, tmp_path: Path) -> None:
    data = sequences(["class 0", "class 1"] * 6)
    lines = ["id,step,breath,pulse,y"]
    for i, label in enumerate(["class 0", "class 1"] * 6):
        lines += [f"s{i},{t},{data.values[i, t, 1]},{data.values[i, t, 0]},{label}" for t in range(9)]
    (tmp_path / "data.csv").write_text("\n".join(lines))
    found = evaluate(model, tmp_path / "data.csv")
    assert found.scores.metrics == pytest.approx(evaluate(model, data).scores.metrics)
    assert found.predictions.ids[:2] == ("s0", "s1")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, "an evaluation needs the label of every sequence"),
        (["class 0", "other"] * 6, r"the model knows the classes \['class 0', .*\], the data has others: \['other'\]"),
    ],
)
def test_data_that_it_cannot_be_compared_with_are_an_error(
    labels: list[str] | None, message: str, model: Bundle
) -> None:
    with pytest.raises(DataError, match=message):
        evaluate(model, sequences(labels))
