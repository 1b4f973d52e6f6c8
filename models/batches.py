"""Sequences resident on the device, cut into batches of like length and cropped to each batch's longest.

Letters: N sequences, S steps (patches), B sequences in a batch, T, F as in `models.data`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.seeds import derive

JITTER = 0.1  # of the longest length: how far apart in length two sequences may be and still trade places


@dataclass(frozen=True)
class Batch:
    values: Tensor  # (S, B, F), cropped to the longest sequence of the batch
    lengths: Tensor | None  # (B,); None: every sequence fills all S steps
    labels: Tensor  # (B,)
    indices: NDArray[np.int64]  # (B,) rows of the part that the batch holds


class Batches:
    """One part of the data on the device, time-major, so that a batch is one `index_select`."""

    def __init__(self, values: Tensor, lengths: Tensor, labels: Tensor) -> None:
        """values (S, N, F) and lengths (N,) as `Classifier.prepare` gives them, labels (N,)."""
        self.values = values.contiguous()
        self.lengths = lengths
        self.labels = labels
        self._lengths = lengths.cpu().numpy()  # on the host, so that cutting a batch never waits for the device

    def __len__(self) -> int:
        return len(self._lengths)

    def training(self, batch_size: int, *seed: object) -> Iterator[Batch]:
        """Every sequence once, in an order that is a function of the seed alone.

        Batches are of even size, at most `batch_size`; where lengths vary, of like length.
        """
        random = np.random.default_rng(derive("order", *seed))
        order = random.permutation(len(self))
        if self._lengths.min() < self._lengths.max():
            key = self._lengths + random.uniform(0, JITTER * self._lengths.max(), len(self))
            order = np.argsort(key, kind="stable")
        parts = np.array_split(order, -(-len(self) // batch_size))
        return (self._batch(parts[index]) for index in random.permutation(len(parts)))

    def evaluation(self, batch_size: int = 256) -> Iterator[Batch]:
        """Every sequence once, sorted by length."""
        order = np.argsort(self._lengths, kind="stable")
        return (self._batch(order[i : i + batch_size]) for i in range(0, len(order), batch_size))

    def _batch(self, indices: NDArray[np.int64]) -> Batch:
        lengths = self._lengths[indices]
        longest = int(lengths.max())
        rows = torch.from_numpy(indices).to(self.values.device)
        values = self.values[:longest].index_select(1, rows)
        uniform = int(lengths.min()) == longest
        return Batch(values, None if uniform else self.lengths[rows], self.labels[rows], indices)
