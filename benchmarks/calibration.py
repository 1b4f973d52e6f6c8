"""What keeps a temperature that is fitted to few rows from ruin: the prior of `hpo.models.calibration`, or targets
smoothed as by Platt (1999).

    python benchmarks/calibration.py [--repeats 40]

Drawn models whose probabilities become true ones by a known temperature T; of each so many rows to fit one to, and
4,000 others. A line has the mean log-loss on those, uncalibrated, at the true temperature and at the one fitted by

    none      the log-loss alone, within the bounds
    smoothed  targets (n + 1) / (n + 2) for the true class, the rest for the others as the model has them
    prior     `fit_temperature`
"""

from __future__ import annotations

import argparse
import itertools

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import log_softmax, softmax

from hpo.models.calibration import COOLEST, HOTTEST, fit_temperature

Floats = NDArray[np.float64]
Labels = NDArray[np.int64]
OTHERS = 4_000  # rows that the temperatures are judged by


def drawn(rng: np.random.Generator, n: int, K: int, scale: float, T: float) -> tuple[Floats, Labels]:
    """Logarithms of probabilities (n, K) that become true ones by the temperature T, and labels (n,)."""
    logits = rng.normal(size=(n, K)) * scale
    if K == 2:
        logits[:, 0] = -logits[:, 1]
    labels = (softmax(logits, axis=1).cumsum(1) < rng.random((n, 1))).sum(1).clip(max=K - 1)
    return log_softmax(logits * T, axis=1), labels


def by_targets(logs: Floats, labels: Labels, added: float) -> float:
    """The temperature with the lowest cross-entropy to targets with so many rows added that are right, and wrong."""
    n, rows = len(labels), np.arange(len(labels))
    targets = np.exp(logs)
    targets[rows, labels] = 0
    targets *= added / (n + 2 * added) / targets.sum(axis=1, keepdims=True)
    targets[rows, labels] = (n + added) / (n + 2 * added)

    def slope(b: float) -> float:
        return float(((softmax(b * logs, axis=1) - targets) * logs).sum())

    if slope(1 / HOTTEST) >= 0:
        return HOTTEST
    return COOLEST if slope(1 / COOLEST) <= 0 else 1 / float(brentq(slope, 1 / HOTTEST, 1 / COOLEST))


def log_loss(logs: Floats, labels: Labels, T: float) -> float:
    return float(-log_softmax(logs / T, axis=1)[np.arange(len(labels)), labels].mean())


def line(rng: np.random.Generator, n: int, K: int, scale: float, T: float, repeats: int) -> str:
    losses, right = [], []
    for _ in range(repeats):
        logs, labels = drawn(rng, n + OTHERS, K, scale, T)
        fitted, known = logs[:n], labels[:n]
        temperatures = 1.0, T, by_targets(fitted, known, 0.0), by_targets(fitted, known, 1.0)
        temperatures = (*temperatures, fit_temperature(np.exp(fitted), known))
        losses.append([log_loss(logs[n:], labels[n:], each) for each in temperatures])
        right.append((logs.argmax(axis=1) == labels).mean())
    cells = " | ".join(f"{value:.4f}" for value in np.mean(losses, axis=0))
    return f"| {K} | {np.mean(right):.1%} | {n} | {T} | {cells} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=40)
    repeats = parser.parse_args().repeats
    rng = np.random.default_rng(0)
    print("| K | right | rows | T | uncalibrated | true T | none | smoothed | prior |")
    print("|---|---|---|---|---|---|---|---|---|")
    for (K, scale), n, T in itertools.product([(2, 1.5), (2, 8), (2, 20), (10, 8)], (20, 67, 270), (0.3, 1.0, 3.0)):
        print(line(rng, n, K, scale, T, repeats), flush=True)


if __name__ == "__main__":
    main()
