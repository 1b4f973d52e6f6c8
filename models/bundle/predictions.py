"""The predictions of a saved model."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hpo.models.files import whole_file


@dataclass(frozen=True, eq=False)
class Predictions:
    """Predictions for N sequences, in the order given."""

    classes: tuple[str, ...]  # (K,)
    probabilities: NDArray[np.float32]  # (N, K)
    labels: NDArray[np.str_]  # (N,) predicted class names
    ids: tuple[str, ...]  # (N,)

    def to_csv(self, path: str | Path, true: NDArray[np.str_] | None = None) -> None:
        """Write columns id, predicted and probability_<class> of each class; the file appears whole or not at all.

        true: the true classes, in a column of that name after the id. Raises OSError.
        """
        with whole_file(Path(path)) as beside:
            beside.write_bytes(self.as_csv(true).encode())

    def as_csv(self, true: NDArray[np.str_] | None = None) -> str:
        """What `to_csv` writes."""
        known = [] if true is None else [true.tolist()]
        text = io.StringIO(newline="")
        writer = csv.writer(text)
        writer.writerow(
            ["id", *(["true"] if known else []), "predicted", *(f"probability_{name}" for name in self.classes)]
        )
        writer.writerows(
            [self.ids[i], *(column[i] for column in known), label, *map(str, self.probabilities[i])]
            for i, label in enumerate(self.labels.tolist())
        )
        return text.getvalue()
