"""What happens to padded sequences before anything that is trained: crop, first differences, normalisation, patches.

Letters: B sequences, T steps, F features, C channels, P patch length, S = ceil(T / P) patches.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hpo.models.data.buffers import ask_for, is_large

ROUNDING = 2.0**-23
"""Of float32, relative to a value. A feature whose deviation is no larger than this part of its mean does not vary:
what it seems to is rounding. Compared with its mean, not with a number, so that its unit does not matter."""


def valid(lengths: Tensor, steps: int) -> Tensor:
    """(steps, B) bool: whether step t lies inside sequence b."""
    return torch.arange(steps, device=lengths.device)[:, None] < lengths[None, :]


def taken(patches: Tensor, rows: Tensor, steps: int) -> Tensor:
    """The first steps of these rows of patches (S, N, P*C). Where each sequence's steps lie one after another, torch
    would copy all rows for that."""
    by_sequence = patches.transpose(0, 1)
    if by_sequence.is_contiguous() and not patches.is_contiguous():
        if is_large(by_sequence.nbytes) and rows.device.type == "cpu":
            ask_for(by_sequence.data_ptr(), by_sequence.stride(0) * by_sequence.element_size(), rows.numpy())
        return by_sequence.index_select(0, rows)[:, :steps].transpose(0, 1).contiguous()
    return patches[:steps].index_select(1, rows)


def crop_last(values: Tensor, lengths: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """The last `keep` valid steps of each sequence, moved to the front: (B, min(T, keep), F) and lengths."""
    start = (lengths - keep).clamp(min=0)
    steps = torch.arange(values.shape[1], device=values.device)[:keep]
    index = (start[:, None] + steps[None, :]).clamp(max=values.shape[1] - 1)
    cropped = values.gather(1, index[:, :, None].expand(-1, -1, values.shape[2]))
    return cropped, lengths.clamp(max=keep)


def with_differences(values: Tensor) -> Tensor:
    """(B, T, F) to (B, T, 2 F): the values, then what each step adds to the one before it; 0 at the first step."""
    return torch.cat([values, torch.cat([torch.zeros_like(values[:, :1]), values[:, 1:] - values[:, :-1]], 1)], 2)


def fold_patches(values: Tensor, lengths: Tensor, patch: int) -> tuple[Tensor, Tensor]:
    """(B, T, C) to (B, S, P*C); the last, partial patch is filled with zeros and counts as valid."""
    patches = (values.shape[1] + patch - 1) // patch
    padded = nn.functional.pad(values, (0, 0, 0, patches * patch - values.shape[1]))
    folded = padded.reshape(values.shape[0], patches, patch * values.shape[2])
    return folded, (lengths + patch - 1) // patch


def valid_values(values: Tensor, lengths: Tensor) -> Tensor:
    """(steps, C) of all valid steps of (B, T, C), one sequence after another."""
    inside = valid(lengths, values.shape[1]).T
    return values.flatten(0, 1) if inside.all() else values[inside]


def channel_statistics(steps: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (C,) of each channel over steps (steps, C) in float64."""
    return steps.mean(0).float(), steps.std(0, correction=0).float()


def by_channel(values: Tensor, mean: Tensor, deviation: Tensor, epsilon: float) -> Tensor:
    """(B, T, C) minus `mean` (C,), divided by `deviation` (C,): with `epsilon` added to it, or 0 where it is 0."""
    if epsilon:
        return (values - mean) / (deviation + epsilon)
    return torch.where(deviation == 0, 0.0, (values - mean) / deviation)


def by_sequence(values: Tensor, inside: Tensor, lengths: Tensor, epsilon: float) -> Tensor:
    """(B, T, C) minus each sequence's own mean, divided by its own deviation, as in `by_channel`.

    inside (B, T, 1): the steps within each sequence.
    """
    count = lengths[:, None, None].to(values.dtype)
    mean = torch.where(inside, values, 0.0).sum(1, keepdim=True) / count
    centred = torch.where(inside, values - mean, 0.0)
    if epsilon:
        return centred / ((centred.square().sum(1, keepdim=True) / count).sqrt() + epsilon)
    return _by_deviation(centred, mean, inside, count)


def _by_deviation(centred: Tensor, mean: Tensor, inside: Tensor, count: Tensor) -> Tensor:
    """Centred values (B, T, C) divided by their deviation in each sequence; 0 where it is only rounding."""
    # A sum of large values is rounded: what is left of the mean is subtracted once more.
    centred = torch.where(inside, centred - centred.sum(1, keepdim=True) / count, 0.0)
    # The square of 1e-30 or 1e30 is no float32: the largest value becomes 1 first.
    largest = centred.abs().amax(1, keepdim=True)
    scaled = centred / torch.where(largest > 0, largest, 1.0)
    deviation = (scaled.square().sum(1, keepdim=True) / count).sqrt()
    return torch.where(deviation * largest <= ROUNDING * mean.abs(), 0.0, scaled / deviation)
