"""A data set as networks take it: prepared once for a training, a piece at a time where it is large."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hpo.models.classifier import Classifier
from hpo.models.config import ClassifierConfig
from hpo.models.data.buffers import empty, pieces
from hpo.models.data.gaps import inputs
from hpo.models.data.sequences import Sequences


class Given:
    """What the networks of a configuration are given of a data set.

    The arithmetic is the same in pieces and at once, and so are the bits: a statistic is taken over all that it is of,
    which lies in one array, mapped from a file where that is large.
    """

    def __init__(self, sequences: Sequences, classifier: ClassifierConfig) -> None:
        self._sequences, self._classifier = sequences, classifier
        self._parts = pieces(sequences.n, 4 * sequences.steps * classifier.given)
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
        if self._whole is not None:
            patches, counts = model.prepare(self._whole.to(device), self._lengths.to(device))
            if by_sequence:
                return patches.transpose(0, 1).contiguous().transpose(0, 1), counts
            return patches.contiguous(), counts
        found, counts = torch.empty(0), torch.empty(len(self._lengths), dtype=torch.int64, device=device)
        for part in self._parts:
            patches, counts[part] = model.prepare(self._piece(part).to(device), self._lengths[part].to(device))
            if not len(found):
                found = self._all(patches)
            found[:, part] = patches
        return found, counts

    def _piece(self, part: slice) -> Tensor:
        return torch.from_numpy(np.array(inputs(self._sequences.part(part), self._classifier)))

    def _all(self, like: Tensor) -> Tensor:
        """(S, N, P*C) to write to, of some patches' sizes and on their device."""
        steps, n, width = len(like), self._sequences.n, like.shape[2]
        if like.device.type != "cpu":
            return like.new_empty((steps, n, width))
        return torch.from_numpy(empty((n, steps, width), np.float32)).transpose(0, 1)
