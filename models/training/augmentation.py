"""What training does to a batch so that no sequence is seen twice alike: mixing, and noise.

Letters: S steps, B sequences in a batch, C numbers of a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hpo.models.config import ClassifierConfig, TrainingConfig
from hpo.models.data.buffers import empty, pieces
from hpo.models.preprocessing import taken, valid
from hpo.models.seeds import derive


def partners(tensor: Tensor, dim: int = 0) -> Tensor:
    """Each row's partner of a mixture: the next one of the batch, whose order is random; of the last, the first. Rows
    that fill a batch repeat its first, so that they change nothing."""
    return tensor.roll(-1, dim)


def mixing_shares(
    batches: Sequence[NDArray[np.int64]], config: TrainingConfig, member: int, epoch: int
) -> list[NDArray[np.float32]] | None:
    """Of each sequence of the epoch's batches, its own share in its mixture, in [1/2, 1], so that a mixture is as long
    as the sequence that has the larger share; None without mixup. A function of seed, member and epoch."""
    if not config.mixup:
        return None
    random = np.random.default_rng(derive("mixup", config.seed, member, epoch))
    drawn = [random.beta(config.mixup, config.mixup, len(indices)) for indices in batches]
    return [np.maximum(share, 1 - share).astype(np.float32) for share in drawn]


@dataclass(frozen=True)
class Noise:
    """What is added to a batch, and what it is multiplied by."""

    added: Tensor  # (C,) deviation of what is added to each value
    factor: float | Tensor  # deviation of the factor of a channel in a sequence, around 1; one for all, or (C,)
    # (C,) which of the drawn numbers each channel takes, so that the order of a file's columns does not matter; None:
    # its own
    places: Tensor | None = None

    def drawn(self, like: Tensor, generator: torch.Generator) -> Tensor:
        """Normal numbers of that shape (…, C)."""
        found = torch.empty_like(like).normal_(generator=generator)
        return found if self.places is None else found.index_select(-1, self.places)


def augmented(
    values: Tensor,
    lengths: Tensor | None,
    shares: Tensor | None,
    noise: Noise | None,
    generator: torch.Generator,
) -> Tensor:
    """A batch (S, B, C), zero beyond each length (B,), as it is trained on.

    shares (B,): each sequence's own in its mixture; None: none are mixed. noise: None: there is none.
    """
    if shares is not None:
        values = torch.lerp(partners(values, 1), values, shares[:, None])
    if noise is not None:
        factor = 1 + noise.factor * noise.drawn(values[0], generator)
        values = values * factor + noise.drawn(values, generator) * noise.added
    if lengths is not None and (shares is not None or noise is not None):
        values = values * valid(lengths, values.shape[0])[:, :, None]
    return values


def noise_of(
    config: TrainingConfig,
    classifier: ClassifierConfig,
    values: Tensor,
    lengths: Tensor,
    rows: NDArray[np.int64],
    places: Tensor | None,
) -> Noise | None:
    """The noise of a training on these rows of (S, N, P*C); none without jitter. Marks of what was observed have none.

    places: see `Noise`.
    """
    if not config.jitter:
        return None
    deviation, factor = config.jitter * deviation_of(values, lengths, rows), config.jitter
    if not classifier.marks:
        return Noise(deviation, factor, places)
    scaled = torch.arange(len(deviation), device=deviation.device) % classifier.channels < classifier.scaled
    return Noise(deviation * scaled, factor * scaled, places)


def deviation_of(values: Tensor, lengths: Tensor, rows: NDArray[np.int64]) -> Tensor:
    """The deviation (C,) of each channel over the valid steps of these rows of (S, N, C)."""
    return _steps_of(values, lengths, rows).std(0, correction=0).float()


def _steps_of(values: Tensor, lengths: Tensor, rows: NDArray[np.int64]) -> Tensor:
    """(steps, C) in float64: of the first step all of these sequences, of the second one those that have it, …"""
    S, _, C = values.shape
    parts = pieces(len(rows), S * C * values.element_size())
    if len(parts) == 1 or values.device.type != "cpu":
        at = torch.from_numpy(rows).to(values.device)
        inside = valid(lengths.index_select(0, at), S)
        return taken(values, at, S)[inside].double()
    kept = lengths.numpy()[rows]
    longer = len(rows) - np.bincount(kept, minlength=S + 1).cumsum()[:S]  # sequences that have each of the S steps
    places = longer.cumsum() - longer
    found = torch.from_numpy(empty((int(longer.sum()), C), np.float64))
    for part in parts:
        some, here = taken(values, torch.from_numpy(rows[part]), S), torch.from_numpy(kept[part])
        for step in range(int(here.max())):
            own = some[step, here > step]
            found[places[step] : places[step] + len(own)] = own
            places[step] += len(own)
    return found
