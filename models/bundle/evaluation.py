"""A saved model on labelled data that it has not seen: its scores, and the sequences that it gets wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpo.models.bundle.bundle import Bundle
from hpo.models.bundle.predictions import Predictions
from hpo.models.calibration import Reliability, measure_reliability
from hpo.models.data.sequences import DataError, Sequences
from hpo.models.metrics import Scores, count_groups, measure


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What a model is worth on one set of sequences."""

    scores: Scores
    reliability: Reliability
    predictions: Predictions
    labels: NDArray[np.str_]  # (N,) the true class of each sequence

    @property
    def wrong(self) -> NDArray[np.int64]:
        """Rows of the sequences whose class is not the predicted one, the surest of them first."""
        rows = np.flatnonzero(self.predictions.labels != self.labels)
        sureness = self.predictions.probabilities[rows].max(1)
        return rows[np.argsort(-sureness, kind="stable")]

    def to_csv(self, path: str | Path) -> None:
        """As `Predictions.to_csv`, with a column `true` before them."""
        self.predictions.to_csv(path, true=self.labels)


def evaluate(
    bundle: Bundle, data: Any, batch_size: int = 256, progress: Callable[[int], object] | None = None
) -> Evaluation:
    """Predict labelled sequences and compare.

    data: a file, or `Sequences` with labels, and with weights where some count more. Raises DataError, also for data
    without labels.
    """
    sequences = data if isinstance(data, Sequences) else bundle.read(data, labeled=True)
    if sequences.labels is None:
        raise DataError("an evaluation needs the label of every sequence; `hpo predict` needs none")
    predictions = bundle.predict(sequences, batch_size, progress)
    names = np.array(sequences.classes)[sequences.labels]
    known = {name: index for index, name in enumerate(bundle.config.classes)}
    unknown = sorted(set(names.tolist()) - set(known))
    if unknown:
        raise DataError(f"the model knows the classes {list(known)}, the data has others: {unknown}")
    labels = np.array([known[name] for name in names.tolist()])
    classes = bundle.config.classes
    scores = measure(
        predictions.probabilities, labels, bundle.config.threshold, classes=classes, weights=sequences.weights
    )
    groups = count_groups(predictions.labels == names, sequences.groups, sequences.group_names)
    reliability = measure_reliability(predictions.probabilities, labels, sequences.weights)
    return Evaluation(replace(scores, groups=groups), reliability, predictions, names)
