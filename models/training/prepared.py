"""A data set as networks take it: prepared once for a training, a piece at a time where it is large."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hpo.models.classifier import Classifier
from hpo.models.config import ClassifierConfig
from hpo.models.data.buffers import empty, pieces
from hpo.models.data.gaps import inputs
from hpo.models.data.sequences import Sequences

COLUMNS = 64
"""Sums over the steps of a batch run over this many of its numbers at once in torch's code for CPUs, and over what is
left of them in another order."""


class Given:
    """What the networks of a configuration are given of a data set.

    On a CPU with one thread the bits are the same in pieces and at once: a statistic of a part is taken over all that
    it is of, which lies in one array, and pieces end where torch begins anew.
    """

    def __init__(self, sequences: Sequences, classifier: ClassifierConfig) -> None:
        self._sequences, self._classifier = sequences, classifier
        unit = COLUMNS // math.gcd(COLUMNS, classifier.scaled)
        self._parts = pieces(sequences.n, 4 * sequences.steps * classifier.given, unit)
        self._lengths = torch.from_numpy(sequences.lengths)
        self._whole = torch.from_numpy(inputs(sequences, classifier)) if len(self._parts) == 1 else None

    def fit_normalization(self, model: Classifier, rows: NDArray[np.int64]) -> None:
        """Take the channel statistics of these rows, where the network is normalised by them."""
        if model.config.normalization != "channel":
            return
        sequences, end = self._sequences, 0
        steps = torch.from_numpy(empty((int(sequences.lengths[rows].sum()), model.config.scaled), np.float64))
        for part in pieces(len(rows), 4 * sequences.steps * sequences.n_features):
            at = rows[part]
            found = model.channels(torch.from_numpy(sequences.values[at]), self._lengths[at])
            begin, end = end, end + len(found)
            steps[begin:end] = found
        model.fit_channels(steps)

    @torch.no_grad()
    def prepare(self, model: Classifier, device: torch.device, *, by_sequence: bool) -> tuple[Tensor, Tensor]:
        """All of it by `Classifier.prepare`, (S, N, P*C) and lengths (N,). by_sequence: each sequence's steps lie one
        after another, as they always do in an array that is mapped, so that a batch is read from few places."""
        if self._whole is None and device.type == "cpu":
            return self._in_pieces(model)
        patches, counts = model.prepare(self._on(device), self._lengths.to(device))
        if by_sequence:
            return patches.transpose(0, 1).contiguous().transpose(0, 1), counts
        return patches.contiguous(), counts

    def _in_pieces(self, model: Classifier) -> tuple[Tensor, Tensor]:
        found, counts = torch.empty(0), torch.empty_like(self._lengths)
        for part in self._parts:
            patches, counts[part] = model.prepare(self._piece(part), self._lengths[part])
            if not len(found):
                steps, _, width = patches.shape
                found = torch.from_numpy(empty((len(counts), steps, width), np.float32))
            found[part] = patches.transpose(0, 1)
        return found.transpose(0, 1), counts

    def _on(self, device: torch.device) -> Tensor:
        """(N, T, given) on the device."""
        if self._whole is not None:
            return self._whole.to(device)
        N, T, _ = self._sequences.values.shape
        found = torch.empty((N, T, self._classifier.given), device=device)
        for part in self._parts:
            found[part] = self._piece(part).to(device)
        return found

    def _piece(self, part: slice) -> Tensor:
        return torch.from_numpy(np.array(inputs(self._sequences.part(part), self._classifier)))
