"""What a report draws of a model's predictions for one part of the data: ROC and precision-recall curves of each class
against the rest, and the sequences with the highest loss.

Made where the probabilities are at hand, at promotion, and small enough to be kept in the database. It holds values of
the data, so no saved model's folder has it. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpo.models.data.sequences import Sequences
from hpo.models.metrics import CLIP, Floats, Labels, counted, predict_labels, score

POINTS = 60  # of a curve that are kept
CLASSES = 10  # of a model that have curves, those with the lowest AUROC
HARDEST = 8  # sequences with the highest loss that are kept
STEPS, FEATURES = 80, 4  # of one of these

Points = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class ClassCurves:
    """One class against the rest. JSON-able."""

    name: str
    sequences: int  # of the class
    auroc: float
    average_precision: float
    roc: Points  # (false positive rate, true positive rate), from (0, 0) to (1, 1)
    precision: Points  # (recall, precision), by falling probability


@dataclass(frozen=True)
class HardSequence:
    """A sequence with a high loss. JSON-able."""

    id: str
    true: str
    predicted: str
    probability: float  # of the predicted class
    true_probability: float
    loss: float  # -log of the true class's probability
    steps: int  # of the sequence; `values` has at most STEPS of them, evenly chosen
    features: tuple[str, ...]  # at most FEATURES, those that vary most between steps
    all_features: int  # F
    values: tuple[tuple[float, ...], ...]  # one row a feature


@dataclass(frozen=True)
class Diagnosis:
    """Curves and hardest sequences of one part. JSON-able."""

    part: str  # test | validation
    sequences: int
    threshold: float | None  # of two classes: the probability of the second one from which it is predicted
    curves: tuple[ClassCurves, ...]  # of two classes the second one's alone
    hardest: tuple[HardSequence, ...]  # the highest loss first

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Diagnosis:
        """Raises KeyError and TypeError for what another version wrote."""
        curves = tuple(
            ClassCurves(**{**each, **{name: tuple(map(tuple, each[name])) for name in ("roc", "precision")}})
            for each in content["curves"]
        )
        hardest = tuple(
            HardSequence(**{**each, "features": tuple(each["features"]), "values": tuple(map(tuple, each["values"]))})
            for each in content["hardest"]
        )
        return cls(**{**content, "curves": curves, "hardest": hardest})


def diagnose(
    part: str, sequences: Sequences, probabilities: NDArray[Any], threshold: float, rows: Labels | None = None
) -> Diagnosis:
    """Of the probabilities (n, K) of labelled sequences, or of these rows (n,) of them."""
    assert sequences.labels is not None
    rows = np.arange(sequences.n) if rows is None else rows
    labels = sequences.labels[rows]
    weights = None if sequences.weights is None else sequences.weights[rows]
    return Diagnosis(
        part=part,
        sequences=len(rows),
        threshold=threshold if len(sequences.classes) == 2 else None,
        curves=class_curves(probabilities, labels, sequences.classes, weights),
        hardest=_hardest(sequences, probabilities, labels, threshold, rows),
    )


def class_curves(
    probabilities: NDArray[Any], labels: Labels, classes: Sequence[str], weights: Floats | None = None
) -> tuple[ClassCurves, ...]:
    """The curves of each class that some rows are of and others are not, the lowest AUROC first."""
    probabilities, labels, weights = counted(probabilities, labels, weights)
    of = [1] if len(classes) == 2 else range(len(classes))
    found = [_curves(classes[k], probabilities[:, k], labels == k, weights) for k in of if 0 < (labels == k).mean() < 1]
    return tuple(sorted(found, key=lambda each: each.auroc)[:CLASSES])


def _curves(name: str, scores: NDArray[Any], positive: NDArray[np.bool_], weights: Floats) -> ClassCurves:
    """Rows with equal scores make one point, as no threshold parts them."""
    order = np.argsort(-scores, kind="stable")
    scores, positive, weights = scores[order].astype(np.float64), positive[order], weights[order]
    last = np.append(np.diff(scores) != 0, True)
    hits, misses = np.cumsum(weights * positive)[last], np.cumsum(weights * ~positive)[last]
    recall, false_rate, precision = hits / hits[-1], misses / misses[-1], hits / (hits + misses)
    both = np.stack([1 - scores, scores], axis=1)
    truth = positive.astype(np.int64)
    return ClassCurves(
        name=name,
        sequences=int(positive.sum()),
        auroc=score("auroc", both, truth, weights=weights),
        average_precision=score("average_precision", both, truth, weights=weights),
        roc=_thinned(np.append(0.0, false_rate), np.append(0.0, recall)),
        precision=_thinned(recall, precision),
    )


def _thinned(x: Floats, y: Floats) -> Points:
    """About POINTS of a curve, rounded, its ends among them; evenly along it, so that steep parts keep theirs."""
    along = np.append(0.0, np.cumsum(np.abs(np.diff(x)) + np.abs(np.diff(y))))
    if len(x) > POINTS:
        wanted = np.searchsorted(along, np.linspace(0, along[-1], POINTS))
        kept = np.unique(np.concatenate([[0], np.minimum(wanted, len(x) - 1), [len(x) - 1]]))
        x, y = x[kept], y[kept]
    return tuple((round(float(a), 4), round(float(b), 4)) for a, b in zip(x, y, strict=True))


def _hardest(
    sequences: Sequences, probabilities: NDArray[Any], labels: Labels, threshold: float, rows: Labels
) -> tuple[HardSequence, ...]:
    """Those with the highest loss of the rows that count, as they lie in the data."""
    true = probabilities[np.arange(len(labels)), labels].astype(np.float64)
    losses = -np.log(np.maximum(true, CLIP))
    if sequences.weights is not None:
        losses = np.where(sequences.weights[rows] > 0, losses, -np.inf)
    predicted = predict_labels(probabilities, threshold)
    found = []
    for i in np.argsort(-losses, kind="stable")[:HARDEST].tolist():
        if not np.isfinite(losses[i]):
            break
        names, values = _drawn(sequences, int(rows[i]))
        found.append(
            HardSequence(
                id=sequences.ids[rows[i]],
                true=sequences.classes[labels[i]],
                predicted=sequences.classes[predicted[i]],
                probability=round(float(probabilities[i, predicted[i]]), 6),
                true_probability=round(float(true[i]), 6),
                loss=round(float(losses[i]), 4),
                steps=int(sequences.lengths[rows[i]]),
                features=names,
                all_features=sequences.n_features,
                values=values,
            )
        )
    return tuple(found)


def _drawn(sequences: Sequences, row: int) -> tuple[tuple[str, ...], tuple[tuple[float, ...], ...]]:
    """Names and values of the features of one sequence that are worth a line."""
    values = sequences.values[row, : sequences.lengths[row]].astype(np.float64)  # (T, F)
    deviation = values.std(axis=0) / np.maximum(np.abs(values).max(axis=0), np.finfo(np.float32).tiny)
    features = np.sort(np.argsort(-deviation, kind="stable")[:FEATURES])
    steps = np.unique(np.linspace(0, len(values) - 1, min(STEPS, len(values))).round().astype(np.int64))
    lines = tuple(tuple(float(f"{value:.4g}") for value in values[steps, k]) for k in features.tolist())
    return tuple(sequences.features[k] for k in features.tolist()), lines
