"""Drawn and rolling folds on data that drift with time, and on data that do not: validation beside the test part.

    python benchmarks/drift.py [--seeds 3] [--epochs 20]

900 noisy sines of two features in two classes, which differ in sign; in the drifting data the direction in which they
lie turns with time. A third feature is the time, so that a network knows the direction of whatever time it has trained
on. The latest fifth is the test part; five folds of the rest train an LSTM each. Scored on the test part: the five
networks together, and the last one alone.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch

from hpo.models.bundle.bundle import assemble
from hpo.models.bundle.config import BundleConfig
from hpo.models.classifier import Weights
from hpo.models.config import ClassifierConfig, TrainingConfig
from hpo.models.data.readers import read
from hpo.models.data.sequences import Sequences
from hpo.models.data.splits import Split, split_folds
from hpo.models.data.time_order import latest, rolling
from hpo.models.training.training import Training

N, STEPS, FOLDS = 900, 12, 5
CLASSIFIER = ClassifierConfig(features=3, classes=2, steps=STEPS, hidden_size=16, normalization="channel")


def drawn(turns: float, seed: int) -> Sequences:
    """The data; turns: how often the direction turns by 180 degrees."""
    rng, time = np.random.default_rng(seed), np.arange(N)
    labels, angle = rng.integers(0, 2, N), np.pi * turns * time / N
    direction = np.stack([np.cos(angle), np.sin(angle)], axis=1) * (2 * labels - 1)[:, None]
    sines = 0.5 * direction[:, None, :] * np.sin(0.8 * np.arange(STEPS))[None, :, None]
    level = np.broadcast_to((3 * time / N)[:, None, None], (N, STEPS, 1))
    X = np.concatenate([rng.normal(size=(N, STEPS, 2)) + sines, level], axis=2)
    return read({"X": X, "y": labels, "time": time}, time="time")


def accuracy(members: list[Weights], test: Sequences) -> float:
    """That of the members together."""
    config = BundleConfig(CLASSIFIER, test.classes, test.features, "accuracy", members=len(members), named=False)
    predicted = assemble(config, members, "cpu").predict(test).labels
    return float((predicted == np.array(test.classes)[test.labels]).mean())


def scores(train: Sequences, test: Sequences, parts: list[Split], epochs: int, seed: int) -> list[float]:
    """Accuracies: on validation, of all networks on the test part, of the last one there."""
    config = TrainingConfig(
        metric="accuracy", epochs=epochs, patience=None, batch_size=32, learning_rate=0.01, seed=seed
    )
    with Training(train, parts, CLASSIFIER, config) as training:
        while not training.finished:
            training.advance()
        assert training.best is not None
        best = training.best_weights
        return [training.best.value, accuracy(best, test), accuracy(best[-1:], test)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print("| data | folds | validation | test, all networks | test, the last one |\n|---|---|---|---|---|")
    for name, turns in (("drifting", 1.2), ("still", 0.0)):
        found: dict[str, list[list[float]]] = {"drawn": [], "rolling": []}
        for seed in range(given.seeds):
            data = drawn(turns, seed)
            cut = latest(data, 0.2)
            train, test = data.take(cut.train), data.take(cut.later)
            splits = {
                "drawn": split_folds(train, FOLDS, seed),
                "rolling": [(each.train, each.later) for each in rolling(train, FOLDS)],
            }
            for kind, parts in splits.items():
                found[kind].append(scores(train, test, parts, given.epochs, seed))
        for kind, rows in found.items():
            print(f"| {name} | {kind} | {' | '.join(f'{mean:.3f}' for mean in np.mean(rows, axis=0))} |", flush=True)


if __name__ == "__main__":
    main()
