"""What a set of predictions is worth: seven metrics, the decision threshold, 95 % intervals.

Everywhere: probabilities (N, K) float, rows sum to 1; labels (N,) int, an index into the K classes. With two
classes class 1 (the last class name) is the positive one and `threshold` decides between the two; with more
classes the most probable one is predicted.

Rows may have weights (N,), at least 0: a row of weight 2 counts like two rows, one of weight 0 like none, and equal
weights like none at all.

Each metric is computed for many weightings of the rows at once, weights (S, N): ones, or those, give the score, the
counts of a resample the bootstrap. scikit-learn's functions, with which the tests compare these, take one
weighting a call: 5 to 10 times longer for the score of an epoch, 20 to 50 times for 1,000 resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from hpo.errors import StudyFault
from hpo.models.config import METRICS
from hpo.models.costs import Costs
from hpo.models.data.weights import relative

Floats = NDArray[np.float64]
Labels = NDArray[np.int64]

BY_THRESHOLD = ("accuracy", "balanced_accuracy", "f1", "macro_f1")  # those that depend on the predicted class alone
BY_RANK = ("auroc", "average_precision")
Z, TAIL = 1.959963984540054, 0.025  # of 95 % intervals
METHODS = {  # of each metric's interval
    "accuracy": "Clopper-Pearson",
    "balanced_accuracy": "Clopper-Pearson of each recall, squares added",
    "f1": "posterior of the confusion counts",
    "macro_f1": "posterior of the confusion counts",
    "auroc": "Newcombe",
    "average_precision": "Clopper-Pearson over the positives",
    "log_loss": "bootstrap",
}
WEIGHTED = ", weighted: of the effective number of sequences (Kish)"  # how they are found where weights differ
CLIP = float(np.finfo(np.float32).eps)  # of log_loss: networks give float32, whatever type carries it here


GROUPS_KEPT = 1_000  # of a part, the worst: data may have as many groups as sequences


class MetricError(StudyFault):
    """A metric is unknown, or undefined for these probabilities and labels."""


@dataclass(frozen=True)
class Groups:
    """How many sequences of each group of a part get the right class, the surest failures first (see `count_groups`).

    The names are the data's own and may be those of people: a saved model's folder has none (`bundle.config.to_json`).
    """

    total: int  # groups of the part
    counts: tuple[tuple[int, int], ...]  # (sequences, right) of the worst GROUPS_KEPT
    names: tuple[str, ...] = ()  # of these; empty: not known here


@dataclass(frozen=True)
class Scores:
    """What a model is worth on one part of the data. JSON-able."""

    sequences: int  # N
    metrics: dict[str, float]  # see `evaluate`
    intervals: dict[str, tuple[float, float]]  # 95 %, see `intervals`
    confusion: tuple[tuple[int, ...], ...]  # (K, K), row = true class
    undefined: dict[str, str] = field(default_factory=dict)  # metric -> why it has no value here
    methods: dict[str, str] = field(default_factory=dict)  # of the intervals; earlier versions: all by bootstrap
    groups: Groups | None = None  # None: there are none, or an earlier version did not count them

    @property
    def weighted(self) -> bool:
        """Whether some sequences count more than others in metrics and intervals; counts are of sequences as ever."""
        return any(method.endswith(WEIGHTED) for method in self.methods.values())


def direction(name: str) -> Literal["maximize", "minimize"]:
    """ "maximize" or "minimize", as Optuna spells it."""
    _known(name)
    return "minimize" if name == "log_loss" else "maximize"


def score(
    name: str,
    probabilities: NDArray[Any],
    labels: Labels,
    threshold: float = 0.5,
    weights: Floats | None = None,
) -> float:
    """One metric.

    f1 is that of class 1 with two classes and the macro mean with more. Macro means (balanced_accuracy over
    true classes, macro_f1 over true or predicted ones; auroc and average_precision one against the rest over
    classes that have both positives and negatives here) leave out classes that do not occur. log_loss clips
    probabilities at 1.2e-7, as scikit-learn does for float32. Raises MetricError for probabilities that are not
    finite or do not sum to 1, labels that are no class, and a ranking metric on a single class.
    """
    _known(name)
    probabilities, labels, weights = counted(probabilities, labels, weights)
    return _metrics((name,), probabilities, labels, threshold, weights[None])[name].item()


def evaluate(
    probabilities: NDArray[Any], labels: Labels, threshold: float = 0.5, weights: Floats | None = None
) -> dict[str, float]:
    """Every metric; where only one class occurs auroc and average_precision are undefined and left out."""
    probabilities, labels, weights = counted(probabilities, labels, weights)
    values = _metrics(_defined(labels), probabilities, labels, threshold, weights[None])
    return {name: value.item() for name, value in values.items()}


def undefined(labels: Labels, classes: Sequence[str]) -> dict[str, str]:
    """The metrics that have no value on rows with these labels, each with the reason.

    classes: the names of all K. Every metric but accuracy and log-loss says something of each class (f1 of two classes:
    of class 1), and nothing where one has no row.
    """
    absent = [name for c, name in enumerate(classes) if not (labels == c).any()]
    if not absent:
        return {}
    reason = f"no sequence of class {', '.join(absent[:5])}" + (f" and {len(absent) - 5} more" if absent[5:] else "")
    needed = {name for name in METRICS if name not in ("accuracy", "log_loss")}
    if len(classes) == 2 and classes[1] not in absent:
        needed -= {"f1"}
    return {name: reason for name in METRICS if name in needed}


def intervals(
    probabilities: NDArray[Any],
    labels: Labels,
    threshold: float = 0.5,
    seed: int = 0,
    samples: int = 1000,
    weights: Floats | None = None,
) -> dict[str, tuple[float, float]]:
    """95 % interval of each metric in `evaluate`, by its method in METHODS; none is without width.

    A bootstrap of the metrics themselves says [1, 1] of a dozen right answers. benchmarks/intervals.py compares.
    Weighted rows are worth as many equal ones as have a weighted mean of the same variance (Kish, Survey Sampling,
    1965), in all and of each class: the methods take these numbers, and the weighted shares, for theirs.
    """
    probabilities, labels, weights = counted(probabilities, labels, weights)
    values, rng = evaluate(probabilities, labels, threshold, weights), np.random.default_rng(seed)
    counts = _confusion(probabilities, labels, threshold, weights[None])[0]
    number, numbers = effective(weights), _effective_by_class(labels, weights, len(counts))
    scaled = counts * (numbers / np.where(numbers > 0, counts.sum(axis=1), 1.0))[:, None]
    found = {
        "accuracy": proportion_interval(counts.trace() * (number / counts.sum()), number),
        "balanced_accuracy": _recall_interval(scaled),
        **_posterior_intervals(scaled, counts.sum(axis=1), rng, samples),
        "log_loss": _loss_interval(probabilities, labels, weights, rng, samples),
    }
    if "auroc" in values:
        found |= _rank_intervals(probabilities, labels, weights)
    return {name: (min(found[name][0], value), max(found[name][1], value)) for name, value in values.items()}


def measure(
    probabilities: NDArray[Any],
    labels: Labels,
    threshold: float = 0.5,
    seed: int = 0,
    classes: Sequence[str] | None = None,
    weights: Floats | None = None,
) -> Scores:
    """Every metric with its interval, and the confusion counts, which are of rows whatever they weigh.

    classes: their names; metrics that say something of a class without a row are then left out, with the reason. None,
    for the part that tuning goes by: they leave that class out, as `score` does, so that there is a value to tune.
    """
    counts = confusion(probabilities, labels, threshold).tolist()
    kept, weighted = counted(probabilities, labels, weights)[1:]
    without = {} if classes is None else undefined(kept, classes)
    values = evaluate(probabilities, labels, threshold, weights)
    found = intervals(probabilities, labels, threshold, seed, weights=weights)
    more = "" if (weighted == 1).all() else WEIGHTED
    return Scores(
        sequences=len(labels),
        metrics={name: value for name, value in values.items() if name not in without},
        intervals={name: interval for name, interval in found.items() if name not in without},
        confusion=tuple(tuple(row) for row in counts),
        undefined=without,
        methods={name: METHODS[name] + more for name in found if name not in without},
    )


def count_groups(right: NDArray[np.bool_], groups: Labels | None, names: Sequence[str]) -> Groups | None:
    """The groups of a part by how many of their sequences are right.

    right (N,): whether each sequence gets its class; groups (N,): codes, into `names` where these are known. In order
    of the upper end of the accuracy's interval, so that one wrong sequence of one does not come before 30 right of 100;
    of equal ones by accuracy, then by name, or by code without names. None without groups, and where each group is one
    sequence: the wrong sequences say the same then.
    """
    if groups is None:
        return None
    codes, at = np.unique(groups, return_inverse=True)
    if len(codes) == len(groups):
        return None
    sizes, hits = np.bincount(at), np.bincount(at, right).astype(np.int64)
    last = np.unique(np.array(names)[codes], return_inverse=True)[1] if names else codes
    order = np.lexsort((last, hits / sizes, _upper_ends(hits, sizes)))[:GROUPS_KEPT]
    counts = zip(sizes[order].tolist(), hits[order].tolist(), strict=True)
    return Groups(len(codes), tuple(counts), tuple(names[code] for code in codes[order].tolist()) if names else ())


def _upper_ends(hits: NDArray[np.int64], sizes: NDArray[np.int64]) -> Floats:
    """Of `proportion_interval`, of many shares at once."""
    from scipy.special import betaincinv  # a sixth of a second that a training does not need

    return np.where(hits < sizes, betaincinv(hits + 1, np.maximum(sizes - hits, 1), 1 - TAIL), 1.0)


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


def choose_threshold(
    probabilities: NDArray[Any], labels: Labels, aim: str | Costs, weights: Floats | None = None
) -> float:
    """The threshold on class 1 under which a metric is best, or decisions are cheapest, on these rows; 0.5 with more
    than two classes.

    A metric that does not depend on the threshold is replaced by balanced accuracy (its maximum is Youden's).
    Candidates are the middles between neighbouring probabilities and 0.5, or what the costs make of true probabilities;
    of equal ones the nearest to that. With rows of one class, costs take it, and a metric has no best one.
    """
    expected = aim.threshold if isinstance(aim, Costs) else 0.5
    if not isinstance(aim, Costs):
        _known(aim)
    probabilities, labels, weights = counted(probabilities, labels, weights)
    if probabilities.shape[1] != 2:
        return 0.5
    if len(np.unique(labels)) < 2:
        if isinstance(aim, Costs):
            return expected
        raise MetricError("choosing a threshold needs rows of both classes, got one; keep 0.5 or use more rows")
    p = probabilities[:, 1].astype(np.float64)
    edges = np.concatenate([[0.0], np.unique(p), [1.0]])
    thresholds = np.append((edges[1:] + edges[:-1]) / 2, expected)
    # counts[c, class, predicted] for each candidate c
    counts = np.stack([_decided(p[labels == c], weights[labels == c], thresholds) for c in (0, 1)], axis=1)
    if isinstance(aim, Costs):
        wrong = aim.false_positive * counts[:, 0, 1] + aim.false_negative * counts[:, 1, 0]
        best = thresholds[wrong <= wrong.min() * (1 + 1e-12)]
    else:
        values = _by_confusion(aim if aim in BY_THRESHOLD else "balanced_accuracy", counts)
        best = thresholds[values >= values.max() - 1e-12]
    return float(best[np.abs(best - expected).argmin()])


def _decided(scores: Floats, weights: Floats, thresholds: Floats) -> Floats:
    """What scores (n,) below each threshold, which are called 0, and the others weigh: (candidates, 2).

    Each is a sum of its own: a difference from all would leave a rounding error where nothing is, which counts if costs
    differ much.
    """
    order = np.argsort(scores, kind="stable")
    below = np.concatenate([[0.0], weights[order].cumsum()])
    others = np.concatenate([[0.0], weights[order[::-1]].cumsum()])[::-1]
    return np.stack([below, others], axis=1)[np.searchsorted(scores[order], thresholds)]


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


def counted(probabilities: NDArray[Any], labels: Labels, weights: Floats | None) -> tuple[NDArray[Any], Labels, Floats]:
    """The rows that count, with their weights: ones where all are equal, else 1 in the mean."""
    _check(probabilities, labels)
    if weights is None:
        return probabilities, labels, np.ones(len(labels))
    if weights.shape != labels.shape or not np.isfinite(weights).all() or weights.min() < 0 or not weights.any():
        raise MetricError(f"weights must be finite, at least 0, not all 0 and one a row, got {weights.shape}")
    rows = weights > 0
    found = relative(weights[rows])
    return probabilities[rows], labels[rows], np.ones(int(rows.sum())) if found is None else found


def effective(weights: Floats) -> float:
    """As many equal rows have a mean of the same variance as rows of these weights (Kish, Survey Sampling, 1965)."""
    return float(weights.sum() ** 2 / (weights**2).sum())


def _effective_by_class(labels: Labels, weights: Floats, K: int) -> Floats:
    """(K,) that of each class; 0 of one without a row."""
    sums, squares = (np.bincount(labels, values, minlength=K) for values in (weights, weights**2))
    return np.asarray(sums**2 / np.where(squares > 0, squares, 1.0))


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


# ------------------------------------------------------------------------------------------------ intervals


def proportion_interval(hits: float, n: float) -> tuple[float, float]:
    """Clopper and Pearson's interval of a share hits / n (Biometrika 26, 1934): it covers at least 95 % of the time.

    Wilson's is narrower and, for shares near 1, covers less often (benchmarks/intervals.py). hits need not be whole.
    """
    from scipy.special import betaincinv  # a sixth of a second that a training does not need

    low = float(betaincinv(hits, n - hits + 1, TAIL)) if hits > 0 else 0.0
    high = float(betaincinv(hits + 1, n - hits, 1 - TAIL)) if hits < n else 1.0
    return low, high


def auroc_interval(auroc: float, positives: float, negatives: float) -> tuple[float, float]:
    """Newcombe's interval of an AUROC, his method 5 (Statistics in Medicine 25, 2006, 559-573).

    The values that the estimate is 1.96 standard errors away from, by Hanley and McNeil's variance at the value itself,
    with the mean group size in place of each: so it has a width at 1.0, too.
    """
    more = (positives + negatives) / 2 - 1

    def excess(value: float) -> float:
        variance = value * (1 - value) * (1 + more * ((1 - value) / (2 - value) + value / (1 + value)))
        return (auroc - value) ** 2 - Z**2 * variance / (positives * negatives)

    def edge(outside: float) -> float:
        inside = auroc
        for _ in range(60):
            middle = (inside + outside) / 2
            inside, outside = (inside, middle) if excess(middle) > 0 else (middle, outside)
        return inside

    return edge(0.0), edge(1.0)


def _recall_interval(counts: Floats) -> tuple[float, float]:
    """Of the mean of the classes' recalls: the limits of each, their distances from it squared and added (Zou and
    Donner, Statistics in Medicine 27, 2008; Newcombe's hybrid score method of a difference is the same)."""
    rows = [(float(row[c]), float(row.sum())) for c, row in enumerate(counts) if row.any()]
    limits = np.array([proportion_interval(hits, n) for hits, n in rows])
    recalls = np.array([hits / n for hits, n in rows])
    below, above = np.sqrt(((limits - recalls[:, None]) ** 2).sum(axis=0)) / len(rows)
    return max(0.0, float(recalls.mean() - below)), min(1.0, float(recalls.mean() + above))


def _posterior_intervals(
    counts: Floats, sizes: Floats, rng: np.random.Generator, samples: int
) -> dict[str, tuple[float, float]]:
    """Of f1 and macro_f1 of classes that weigh `sizes` (K,): drawn shares of each class that are predicted as which,
    given these counts (K, K) (Goutte and Gaussier, ECIR 2005). As in Clopper and Pearson's interval one row of each
    class is added, a wrong one for the lower limit and a right one for the upper. Of more than 245 classes fewer are
    drawn, as each draw takes K^2 numbers."""
    K, names = len(counts), ("f1", "macro_f1")
    right, sizes = np.eye(K), sizes[:, None]
    samples = min(samples, max(100, 60_000_000 // K**2))
    chunk = max(1, 4_000_000 // K**2)  # draws at once: 32 MB
    drawn = []
    for added in ((1 - right) / max(K - 1, 1), right):
        values = []
        for size in np.diff([*range(0, samples, chunk), samples]):
            shares = rng.standard_gamma(np.broadcast_to(counts + added, (size, K, K)))
            shares = sizes * shares / shares.sum(axis=2, keepdims=True)
            values.append([_by_confusion(name, shares) for name in names])
        drawn.append(np.concatenate(values, axis=1))
    return {name: (_middle(low)[0], _middle(high)[1]) for name, low, high in zip(names, *drawn, strict=True)}


def _rank_intervals(probabilities: NDArray[Any], labels: Labels, weights: Floats) -> dict[str, tuple[float, float]]:
    """Of auroc and average_precision: of class 1 of two, else the mean of the classes' limits, as if they erred
    together. An average precision is taken for a share of the positives (Boyd, Eng and Page, ECML 2013)."""
    K, limits = probabilities.shape[1], []
    sizes = np.bincount(labels, minlength=K)
    for c in [1] if K == 2 else np.flatnonzero((sizes > 0) & (sizes < len(labels))):
        positive = labels == c
        auroc, precision = _rank(probabilities[:, c], positive, weights[None])[:, 0].tolist()
        n, others = effective(weights[positive]), effective(weights[~positive])
        limits.append([auroc_interval(auroc, n, others), proportion_interval(precision * n, n)])
    means = np.mean(limits, axis=0)
    return {name: (low, high) for name, (low, high) in zip(BY_RANK, means.tolist(), strict=True)}


def _loss_interval(
    probabilities: NDArray[Any], labels: Labels, weights: Floats, rng: np.random.Generator, samples: int
) -> tuple[float, float]:
    """Of the log-loss: a bootstrap within each class. Where all resamples are alike (one row, or equal losses) as far
    to both sides as the rows that so few may have missed would move it, each with the loss of a guess, log K."""
    losses, N = _losses(probabilities, labels), len(labels)
    chunk = max(1, 4_000_000 // N)  # resamples at once: 32 MB of weights
    sizes = np.diff([*range(0, samples, chunk), samples])
    drawn = np.concatenate([_weighted(labels, weights, size, rng) @ losses / weights.sum() for size in sizes])
    low, high = _middle(drawn)
    if high - low > 1e-9:
        return low, high
    far = (1 - TAIL ** (1 / effective(weights))) * float(np.log(probabilities.shape[1]))
    return max(0.0, low - far), high + far


def _middle(values: Floats) -> tuple[float, float]:
    """What lies between the outer 2.5 % of values (S,)."""
    low, high = np.quantile(values, (TAIL, 1 - TAIL))
    return low.item(), high.item()


# ------------------------------------------------------------------------------------------------ arithmetic


def _resample(labels: Labels, samples: int, rng: np.random.Generator) -> Floats:
    """How often each row is drawn, (S, N): within each class as many draws as the class has rows."""
    weights = np.empty((samples, len(labels)))
    for c in np.unique(labels):
        rows = np.flatnonzero(labels == c)
        drawn = rng.integers(len(rows), size=(samples, len(rows))) + np.arange(samples)[:, None] * len(rows)
        weights[:, rows] = np.bincount(drawn.ravel(), minlength=drawn.size).reshape(drawn.shape)
    return weights


def _weighted(labels: Labels, weights: Floats, samples: int, rng: np.random.Generator) -> Floats:
    """What each row weighs in a resample, (S, N): as often as it is drawn, and each class as much as it does."""
    drawn = _resample(labels, samples, rng)
    if (weights == 1).all():
        return drawn
    drawn *= weights
    for c in np.unique(labels):
        rows = labels == c
        drawn[:, rows] *= weights[rows].sum() / drawn[:, rows].sum(axis=1, keepdims=True)
    return drawn


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
