"""What a set of predictions is worth: seven metrics, the decision threshold, bootstrap intervals.

Everywhere: probabilities (N, K) float, rows sum to 1; labels (N,) int, an index into the K classes. With two
classes class 1 (the last class name) is the positive one and `threshold` decides between the two; with more
classes the most probable one is predicted.

Each metric is computed for many weightings of the rows at once, weights (S, N): ones give the score, the
counts of a resample the bootstrap. scikit-learn's functions, with which the tests compare these, take one
weighting a call: 5 to 10 times longer for the score of an epoch, 20 to 50 times for 1,000 resamples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from hpo.errors import StudyFault
from hpo.models.config import METRICS

Floats = NDArray[np.float64]
Labels = NDArray[np.int64]

BY_THRESHOLD = ("accuracy", "balanced_accuracy", "f1", "macro_f1")  # those that depend on the predicted class alone
BY_RANK = ("auroc", "average_precision")
CLIP = float(np.finfo(np.float32).eps)  # of log_loss: networks give float32, whatever type carries it here


class MetricError(StudyFault):
    """A metric is unknown, or undefined for these probabilities and labels."""


@dataclass(frozen=True)
class Scores:
    """What a model is worth on one part of the data. JSON-able."""

    sequences: int  # N
    metrics: dict[str, float]  # see `evaluate`
    intervals: dict[str, tuple[float, float]]  # 95 %, see `intervals`
    confusion: tuple[tuple[int, ...], ...]  # (K, K), row = true class


def direction(name: str) -> Literal["maximize", "minimize"]:
    """ "maximize" or "minimize", as Optuna spells it."""
    _known(name)
    return "minimize" if name == "log_loss" else "maximize"


def score(name: str, probabilities: NDArray[Any], labels: Labels, threshold: float = 0.5) -> float:
    """One metric.

    f1 is that of class 1 with two classes and the macro mean with more. Macro means (balanced_accuracy over
    true classes, macro_f1 over true or predicted ones; auroc and average_precision one against the rest over
    classes that have both positives and negatives here) leave out classes that do not occur. log_loss clips
    probabilities at 1.2e-7, as scikit-learn does for float32. Raises MetricError for probabilities that are not
    finite or do not sum to 1, labels that are no class, and a ranking metric on a single class.
    """
    _known(name)
    _check(probabilities, labels)
    return _metrics((name,), probabilities, labels, threshold, np.ones((1, len(labels))))[name].item()


def evaluate(probabilities: NDArray[Any], labels: Labels, threshold: float = 0.5) -> dict[str, float]:
    """Every metric; where only one class occurs auroc and average_precision are undefined and left out."""
    _check(probabilities, labels)
    values = _metrics(_defined(labels), probabilities, labels, threshold, np.ones((1, len(labels))))
    return {name: value.item() for name, value in values.items()}


def intervals(
    probabilities: NDArray[Any], labels: Labels, threshold: float = 0.5, seed: int = 0, samples: int = 1000
) -> dict[str, tuple[float, float]]:
    """95 % percentile bootstrap interval of each metric in `evaluate`.

    Rows are drawn with replacement within each class (stratified), so no resample loses a class.
    """
    _check(probabilities, labels)
    rng = np.random.default_rng(seed)
    chunk = max(1, 4_000_000 // len(labels))  # resamples at once: 32 MB of weights
    parts = [
        _metrics(_defined(labels), probabilities, labels, threshold, _resample(labels, size, rng))
        for size in np.diff([*range(0, samples, chunk), samples])
    ]
    drawn = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    bounds = {name: np.quantile(values, (0.025, 0.975)) for name, values in drawn.items()}
    return {name: (low.item(), high.item()) for name, (low, high) in bounds.items()}


def measure(probabilities: NDArray[Any], labels: Labels, threshold: float = 0.5, seed: int = 0) -> Scores:
    """Every metric with its interval, and the confusion counts."""
    counts = confusion(probabilities, labels, threshold).tolist()
    return Scores(
        sequences=len(labels),
        metrics=evaluate(probabilities, labels, threshold),
        intervals=intervals(probabilities, labels, threshold, seed),
        confusion=tuple(tuple(row) for row in counts),
    )


def predict_labels(probabilities: NDArray[Any], threshold: float = 0.5) -> Labels:
    """The predicted class of each row, (N,). Two classes: class 1 from `threshold` up; more: the largest."""
    if probabilities.shape[1] == 2:  # in float64: a threshold between two float32 values must not be rounded
        return np.asarray(probabilities[:, 1].astype(np.float64) >= threshold, np.int64)
    return np.asarray(probabilities.argmax(axis=1), np.int64)


def confusion(probabilities: NDArray[Any], labels: Labels, threshold: float = 0.5) -> NDArray[np.int64]:
    """Counts (K, K): row = true class, column = predicted class."""
    _check(probabilities, labels)
    counts = _confusion(probabilities, labels, threshold, np.ones((1, len(labels))))
    return np.asarray(counts[0], np.int64)


def choose_threshold(probabilities: NDArray[Any], labels: Labels, metric: str) -> float:
    """The threshold on class 1 under which `metric` is best on these rows; 0.5 with more than two classes.

    A metric that does not depend on the threshold is replaced by balanced accuracy (its maximum is Youden's).
    Candidates are 0.5 and the middles between neighbouring probabilities; of equal ones the nearest to 0.5.
    """
    _known(metric)
    _check(probabilities, labels)
    if probabilities.shape[1] != 2:
        return 0.5
    if len(np.unique(labels)) < 2:
        raise MetricError("choosing a threshold needs rows of both classes, got one; keep 0.5 or use more rows")
    p = probabilities[:, 1].astype(np.float64)
    edges = np.concatenate([[0.0], np.unique(p), [1.0]])
    thresholds = np.append((edges[1:] + edges[:-1]) / 2, 0.5)
    # Rows below the threshold are called 0: counts[c, class, predicted] for each candidate c.
    below = np.stack([np.searchsorted(np.sort(p[labels == c]), thresholds) for c in (0, 1)], axis=1)
    counts = np.stack([below, np.bincount(labels, minlength=2) - below], axis=2).astype(np.float64)
    values = _by_confusion(metric if metric in BY_THRESHOLD else "balanced_accuracy", counts)
    best = thresholds[values >= values.max() - 1e-12]
    return float(best[np.abs(best - 0.5).argmin()])


def _known(name: str) -> None:
    if name not in METRICS:
        raise MetricError(f"metric must be one of {', '.join(METRICS)}, got {name!r}")


def _defined(labels: Labels) -> tuple[str, ...]:
    one_class = labels.min() == labels.max()
    return tuple(name for name in METRICS if not (one_class and name in BY_RANK))


def _check(probabilities: NDArray[Any], labels: Labels) -> None:
    if probabilities.ndim != 2 or labels.shape != probabilities.shape[:1] or not len(labels):
        shapes = f"{probabilities.shape} and {labels.shape}"
        raise MetricError(f"metrics need probabilities (N, K) and labels (N,) with N at least 1, got {shapes}")
    if not np.isfinite(probabilities).all():
        row = int(np.flatnonzero(~np.isfinite(probabilities).all(axis=1))[0])
        raise MetricError(f"probabilities must be finite, got {probabilities[row].tolist()} in row {row}")
    if probabilities.min() < 0 or np.abs(probabilities.sum(axis=1) - 1).max() > 1e-3:
        raise MetricError("each row of probabilities must be at least 0 and sum to 1; pass probabilities, not logits")
    if labels.min() < 0 or labels.max() >= probabilities.shape[1]:
        found = f"{labels.min()} to {labels.max()}"
        raise MetricError(f"labels must lie in 0 to {probabilities.shape[1] - 1}, got {found}")


def _metrics(
    names: tuple[str, ...], probabilities: NDArray[Any], labels: Labels, threshold: float, weights: Floats
) -> dict[str, Floats]:
    """Each named metric under each weighting: weights (S, N) -> (S,)."""
    found: dict[str, Floats] = {}
    if any(name in BY_THRESHOLD for name in names):
        counts = _confusion(probabilities, labels, threshold, weights)
        found |= {name: _by_confusion(name, counts) for name in BY_THRESHOLD}
    if any(name in BY_RANK for name in names):
        found |= dict(zip(BY_RANK, _by_rank(probabilities, labels, weights), strict=True))
    if "log_loss" in names:
        found["log_loss"] = weights @ _losses(probabilities, labels) / weights.sum(axis=1)
    return {name: found[name] for name in names}


def _resample(labels: Labels, samples: int, rng: np.random.Generator) -> Floats:
    """How often each row is drawn, (S, N): within each class as many draws as the class has rows."""
    weights = np.empty((samples, len(labels)))
    for c in np.unique(labels):
        rows = np.flatnonzero(labels == c)
        drawn = rng.integers(len(rows), size=(samples, len(rows))) + np.arange(samples)[:, None] * len(rows)
        weights[:, rows] = np.bincount(drawn.ravel(), minlength=drawn.size).reshape(drawn.shape)
    return weights


def _confusion(probabilities: NDArray[Any], labels: Labels, threshold: float, weights: Floats) -> Floats:
    """Weight of each (true, predicted) pair, (S, K, K)."""
    K = probabilities.shape[1]
    cells, at = np.unique(labels * K + predict_labels(probabilities, threshold), return_inverse=True)
    counts = np.zeros((len(weights), K * K))
    counts[:, cells] = weights @ np.eye(len(cells))[at]
    return counts.reshape(-1, K, K)


def _by_confusion(name: str, counts: Floats) -> Floats:
    """A threshold metric from confusion counts (S, K, K) -> (S,)."""
    hits = counts.diagonal(axis1=1, axis2=2)  # (S, K)
    true, predicted = counts.sum(axis=2), counts.sum(axis=1)
    if name == "accuracy":
        accuracy: Floats = hits.sum(axis=1) / true.sum(axis=1)
        return accuracy
    if name == "balanced_accuracy":
        return _macro(hits, true)
    if name == "f1" and counts.shape[1] == 2:
        return _macro(2 * hits[:, 1:], (true + predicted)[:, 1:])
    return _macro(2 * hits, true + predicted)


def _macro(part: Floats, whole: Floats) -> Floats:
    """Mean of part / whole over the classes whose whole is not 0, (S, K) -> (S,); 0 where there is none."""
    shares = part / np.maximum(whole, 1e-300)
    mean: Floats = shares.sum(axis=1) / np.maximum((whole > 0).sum(axis=1), 1)
    return mean


def _by_rank(probabilities: NDArray[Any], labels: Labels, weights: Floats) -> Floats:
    """(auroc, average precision), (2, S): class 1 of two, else the macro mean of one against the rest."""
    K = probabilities.shape[1]
    sizes = np.bincount(labels, minlength=K)
    present = np.flatnonzero((sizes > 0) & (sizes < len(labels)))
    if not len(present):
        raise MetricError(
            f"{' and '.join(BY_RANK)} need rows of at least two classes, got only class {labels[0]} in "
            f"{len(labels)} rows; use more rows, a stratified split, or a metric such as log_loss"
        )
    classes = [1] if K == 2 else present
    mean: Floats = np.mean([_rank(probabilities[:, c], labels == c, weights) for c in classes], axis=0)
    return mean


def _rank(scores: NDArray[Any], positive: NDArray[np.bool_], weights: Floats) -> Floats:
    """(auroc, average precision), (2, S), of scores (N,) for positive (N,); equal scores are one step."""
    order = np.argsort(-scores, kind="stable")
    steps = np.flatnonzero(np.diff(scores[order], prepend=np.inf))
    ordered = weights[:, order]
    every = np.add.reduceat(ordered, steps, axis=1)  # (S, steps), from the highest score down
    hits = np.add.reduceat(ordered * positive[order], steps, axis=1)
    called, found = every.cumsum(axis=1), hits.cumsum(axis=1)
    misses, missed = every - hits, called - found
    total_hits, total_misses = found[:, -1], missed[:, -1]
    # P(a positive scores above a negative) + half of the ties: the negatives that come after each positive.
    auroc = (hits * (total_misses[:, None] - missed + misses / 2)).sum(axis=1) / (total_hits * total_misses)
    precision = found / np.maximum(called, 1e-300)
    return np.stack([auroc, (hits * precision).sum(axis=1) / total_hits])


def _losses(probabilities: NDArray[Any], labels: Labels) -> Floats:
    """-log of each row's probability of its true class, (N,)."""
    true = probabilities[np.arange(len(labels)), labels].astype(np.float64)
    return np.asarray(-np.log(np.clip(true, CLIP, 1 - CLIP)))
