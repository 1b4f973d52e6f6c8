"""How often the 95 % intervals of hpo.models.metrics hold the truth, and how wide they are, beside other methods.

    python benchmarks/intervals.py [--parts 2000] [--samples 400] [--weights 1]

With --weights each row has a log-normal weight of that deviation, and the columns are: shown; the interval of the
accuracy as if the rows were equal; the bootstrap of weighted rows.

A simulated part has two equal classes; each row's score is normal, with a distance between the classes that gives the
accuracy at the threshold in the middle (and by it the AUROC). The truth is that of 400,000 rows.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from hpo.models import metrics
from hpo.models.config import METRICS

SIZES, ACCURACIES = (20, 40, 200), (0.6, 0.9, 0.99)
Interval = tuple[float, float]
Part = tuple[NDArray[np.float64], NDArray[np.int64]]


def drawn(n: int, accuracy: float, rng: np.random.Generator) -> Part:
    """Probabilities (n, 2) that are calibrated, and labels (n,), in two classes of n / 2."""
    labels = np.arange(n) % 2
    half = norm.ppf(accuracy)  # of the distance between the classes, in deviations
    logit = 2 * half * (rng.normal(size=n) + half * (2 * labels - 1))
    positive = 1 / (1 + np.exp(-logit))
    return np.stack([1 - positive, positive], axis=1), labels


def wilson(hits: float, n: int) -> Interval:
    """Wilson's interval of a share (Journal of the American Statistical Association 22, 1927)."""
    z2, share = metrics.Z**2, hits / n
    middle, width = share + z2 / (2 * n), metrics.Z * np.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return (middle - width) / (1 + z2 / n), (middle + width) / (1 + z2 / n)


def bootstrap(
    probabilities: NDArray[np.float64],
    labels: NDArray[np.int64],
    samples: int,
    weights: NDArray[np.float64] | float = 1.0,
) -> dict[str, Interval]:
    """The percentile bootstrap within each class: what earlier versions showed."""
    drawn_weights = metrics._resample(labels, samples, np.random.default_rng(0)) * weights
    found = metrics._metrics(METRICS, probabilities, labels, 0.5, drawn_weights)
    return {name: metrics._middle(values) for name, values in found.items()}


def weighted(sigma: float, samples: int) -> dict[str, Callable[[Part], dict[str, Interval]]]:
    """Methods for rows whose weights are drawn anew for each part."""
    rng = np.random.default_rng(1)
    weights = np.ones(0)

    def shown(part: Part) -> dict[str, Interval]:
        nonlocal weights
        weights = rng.lognormal(0, sigma, len(part[1]))
        return metrics.intervals(*part, samples=samples, weights=weights)

    def as_if_equal(part: Part) -> dict[str, Interval]:
        n, accuracy = len(part[1]), metrics.score("accuracy", *part, weights=weights)
        return {"accuracy": metrics.proportion_interval(accuracy * n, n)}

    return {
        "shown": shown,
        "equal": as_if_equal,
        "bootstrap": lambda part: bootstrap(*part, samples, weights),
    }


def simulate(
    n: int, accuracy: float, parts: int, methods: dict[str, Callable[[Part], dict[str, Interval]]]
) -> dict[str, dict[str, tuple[float, float]]]:
    """method -> metric -> (coverage, mean width)."""
    rng = np.random.default_rng(0)
    truth = metrics.evaluate(*drawn(400_000, accuracy, rng))
    found: dict[str, dict[str, list[Interval]]] = {method: {} for method in methods}
    for _ in range(parts):
        part = drawn(n, accuracy, rng)
        for method, intervals in methods.items():
            for name, interval in intervals(part).items():
                found[method].setdefault(name, []).append(interval)
    summary: dict[str, dict[str, tuple[float, float]]] = {}
    for method, by_name in found.items():
        for name, intervals_found in by_name.items():
            low, high = np.array(intervals_found).T
            held = (low <= truth[name] + 1e-9) & (truth[name] <= high + 1e-9)
            summary.setdefault(method, {})[name] = float(held.mean()), float((high - low).mean())
    return summary


def coverage(n: int, accuracy: float, parts: int, samples: int) -> dict[str, float]:
    """How often each metric's interval, as saved models show it, holds the truth."""
    found = simulate(n, accuracy, parts, {"shown": lambda part: metrics.intervals(*part, samples=samples)})
    return {name: covered for name, (covered, _) in found["shown"].items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=int, default=2000, help="simulated parts a cell")
    parser.add_argument("--samples", type=int, default=400, help="resamples and draws an interval")
    parser.add_argument("--weights", type=float, default=0.0, help="deviation of the logarithm of weights; 0: none")
    given = parser.parse_args()
    methods: dict[str, Callable[[Part], dict[str, Interval]]] = {
        "shown": lambda part: metrics.intervals(*part, samples=given.samples),
        "wilson": lambda part: {"accuracy": wilson(metrics.confusion(*part).trace(), len(part[1]))},
        "bootstrap": lambda part: bootstrap(*part, given.samples),
    }
    if given.weights:
        methods = weighted(given.weights, given.samples)
    other = "as if equal" if given.weights else "Wilson"
    print(f"| n | accuracy | metric | shown: coverage, width | {other} | bootstrap |\n|---|---|---|---|---|---|")
    for n in SIZES:
        for accuracy in ACCURACIES:
            found = simulate(n, accuracy, given.parts, methods)
            for name in METRICS:
                cells = [found[method].get(name) for method in methods]
                texts = ["" if cell is None else f"{100 * cell[0]:.1f} %, {cell[1]:.3f}" for cell in cells]
                print(f"| {n} | {accuracy} | {name} | {' | '.join(texts)} |", flush=True)


if __name__ == "__main__":
    main()
