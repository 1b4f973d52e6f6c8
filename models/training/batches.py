"""Sequences resident on the device, cut into batches of like length and cropped to each batch's longest.

Letters: N sequences, S steps (patches), B sequences in a batch, F features of a patch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hpo.models.data.weights import relative
from hpo.models.preprocessing import taken
from hpo.models.seeds import derive

EVALUATION_BATCH = {"cpu": 256, "cuda": 1024}  # sequences of a batch in validation, by type of device
JITTER = 0.1  # of the longest length: how much longer one sequence may be than another that the order puts after it


@dataclass(frozen=True)
class Batch:
    """Sequences of one step."""

    values: Tensor  # (S, B, F), cropped to the longest sequence of the batch
    lengths: Tensor | None  # (B,); None: every sequence fills all S steps
    labels: Tensor  # (B,)
    indices: NDArray[np.int64]  # (B,) rows of the part that the batch holds
    shares: Tensor | None = None  # (B,) of each sequence in its mixture with its partner; None: none are mixed
    weights: Tensor | None = None  # (B,) how much each counts; None: all alike


class Batches:
    """One part of the data on the device, time-major, so that a batch is one `index_select`."""

    def __init__(
        self,
        values: Tensor,
        lengths: Tensor,
        labels: Tensor,
        rows: NDArray[np.int64] | None = None,
        weights: NDArray[np.float64] | None = None,
    ) -> None:
        """values (S, N, F) and lengths (N,) as `Classifier.prepare` gives them, labels (N,).

        rows: the part's rows of these, all of them if None. Parts may share the tensors. weights (N,): how much each
        sequence counts; None, or equal ones in the part: all alike.
        """
        self.values = values
        self.lengths = lengths
        self.labels = labels
        self.rows = np.arange(len(lengths)) if rows is None else rows
        self.weights = None if weights is None else self._weights(weights)  # (N,), in the part 1 in the mean
        self._lengths = lengths.cpu().numpy()[self.rows]  # on the CPU: cutting a batch never waits for the device

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def uniform(self) -> bool:
        """Whether all sequences of the part are equally long."""
        return bool(self._lengths.min() == self._lengths.max())

    def epoch(self, batch_size: int, *seed: object) -> list[NDArray[np.int64]]:
        """The batches of an epoch, as indices into the part.

        Every sequence comes once, in an order that is a function of the seed alone. Batches are of even size, at
        most `batch_size`; where lengths vary, of like length.
        """
        random = np.random.default_rng(derive("order", *seed))
        order = random.permutation(len(self))
        if not self.uniform:
            key = self._lengths + random.uniform(0, JITTER * self._lengths.max(), len(self))
            order = np.argsort(key, kind="stable")
        batches = np.array_split(order, -(-len(self) // batch_size))
        return [batches[index] for index in random.permutation(len(batches))]

    def part_labels(self) -> Tensor:
        """The labels (N,) of the part's sequences, on the device."""
        return self.labels[torch.from_numpy(self.rows).to(self.labels.device)]

    def part_weights(self) -> Tensor | None:
        """How much the part's sequences count (n,), on the device; None: all alike."""
        return None if self.weights is None else self.weights[torch.from_numpy(self.rows).to(self.weights.device)]

    def longest(self, indices: NDArray[np.int64] | None = None) -> int:
        """The steps of the longest of these sequences, or of all."""
        return int((self._lengths if indices is None else self._lengths[indices]).max())

    def evaluation(self, batch_size: int) -> Iterator[Batch]:
        """Every sequence once, sorted by length."""
        order = self.by_length()
        return (self.batch(order[i : i + batch_size]) for i in range(0, len(order), batch_size))

    def by_length(self) -> NDArray[np.int64]:
        """The part's indices (n,), by length."""
        return np.argsort(self._lengths, kind="stable")

    def batch(self, indices: NDArray[np.int64], shares: NDArray[np.float32] | None = None) -> Batch:
        """These sequences of the part, cropped to their longest. shares (B,): see `Batch`."""
        lengths = self._lengths[indices]
        longest = int(lengths.max())
        rows = torch.from_numpy(self.rows[indices]).to(self.values.device)
        values = taken(self.values, rows, longest)
        uniform = int(lengths.min()) == longest
        own = None if uniform else self.lengths.index_select(0, rows)
        mixed = None if shares is None else torch.from_numpy(shares).to(self.values.device)
        weights = None if self.weights is None else self.weights.index_select(0, rows)
        return Batch(values, own, self.labels.index_select(0, rows), indices, mixed, weights)

    def _weights(self, weights: NDArray[np.float64]) -> Tensor | None:
        """(N,) on the device; None where those of the part are equal."""
        part = relative(weights[self.rows])
        if part is None:
            return None
        found = np.zeros(len(weights), np.float32)
        found[self.rows] = part
        return torch.from_numpy(found).to(self.labels.device)
