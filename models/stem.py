"""The convolutional stem: what an LSTM reads instead of the bare steps.

A few convolutions over the steps, each with batch normalisation (Ioffe and Szegedy, 2015) and a ReLU; the first one
takes every R-th step, so that the others and the LSTM have fewer of them. No convolution sees padding: beyond a
sequence's end there are zeros, as before its start, whatever else is in the batch; and batch statistics count valid
steps of real sequences only.

Letters: B sequences, T steps, C channels, W width, k steps that a convolution sees, R stride, S = ceil(T / R).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hpo.models.config import ClassifierConfig
from hpo.models.preprocessing import valid

EPSILON = 1e-5  # added to a variance, as in torch
MOMENTUM = 0.1  # least share of a batch in the running statistics


class Stem(nn.Module):
    """Time-major (T, B, C) to (S, B, W)."""

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(
            StemLayer(channels, config.stem_width, kernel, stride) for channels, kernel, stride in config.convolutions
        )

    def forward(
        self, values: Tensor, lengths: Tensor | None, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """values (T, B, C), zero beyond each length; lengths (B,), None where all are T; to (S, B, W), zero beyond
        ceil(length / R), and these.

        rows (B,): 1 for the sequences that count in the batch statistics, 0 for those that only fill the batch.
        """
        for layer in self.layers:
            values, lengths = layer(values, lengths, rows)
        return values, lengths

    def begin_epoch(self) -> None:
        """Forget the batches so far: the running statistics become those of the epoch that begins."""
        for layer in self.layers:
            cast(StemLayer, layer).begin_epoch()


class StemLayer(nn.Module):
    """A convolution, batch normalisation and a ReLU: (T, B, C) to (S, B, W).

    Its R steps from s * R lie in the middle of the k steps that output s sees.
    """

    running_mean: Tensor
    running_variance: Tensor
    batches: Tensor | None = None  # of this epoch so far, on the device; always the same tensor

    def __init__(self, channels: int, width: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride
        convolution = nn.Conv1d(channels, width, kernel, bias=False)  # its shape and first weights
        self.weight = convolution.weight  # (W, C, k)
        self.scale, self.shift = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_variance", torch.ones(width))

    def begin_epoch(self) -> None:
        """As `Stem.begin_epoch`."""
        if self.batches is None:
            self.batches = self.running_mean.new_zeros(())
        self.batches.zero_()

    def forward(self, values: Tensor, lengths: Tensor | None, rows: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """As `Stem.forward`."""
        outputs = self.convolve(values).float()
        inside = None
        if lengths is not None:
            lengths = (lengths + self.stride - 1) // self.stride
            inside = valid(lengths, outputs.shape[0]).to(outputs.dtype)
        if not self.training:
            result = self._normalize(outputs)
            return (result if inside is None else result * inside[:, :, None]), lengths
        if rows is not None:
            inside = rows.expand(outputs.shape[:2]) if inside is None else inside * rows
        return self._train(outputs, inside), lengths

    def convolve(self, values: Tensor) -> Tensor:
        """(T, B, C) to (S, B, W) as one product of matrices: its sums have the same order on every device."""
        (T, B, C), k, R = values.shape, self.kernel, self.stride
        S, left = (T + R - 1) // R, max(0, (k - R) // 2)
        padded = nn.functional.pad(values, (0, 0, 0, 0, left, k + R))  # more than the last window needs
        windows = torch.cat([padded[j : j + (S - 1) * R + 1 : R] for j in range(k)], 2)  # (S, B, k*C)
        return windows.reshape(S * B, k * C).matmul(self.weight.permute(2, 1, 0).reshape(k * C, -1)).view(S, B, -1)

    def _normalize(self, outputs: Tensor) -> Tensor:
        """By the running statistics, and the ReLU."""
        scale = self.scale * (self.running_variance + EPSILON).rsqrt()
        return (outputs * scale + (self.shift - self.running_mean * scale)).relu()

    def _train(self, outputs: Tensor, inside: Tensor | None) -> Tensor:
        """By the statistics of the batch, which enter the running ones, and the ReLU. inside (S, B): what counts."""
        (S, B, W), count = outputs.shape, outputs.shape[0] * outputs.shape[1]
        share = outputs.new_full((count,), 1 / count) if inside is None else inside.reshape(-1) / inside.sum()
        with _float32(outputs.device.type):
            found = NormalizeAndRectify.apply(outputs.reshape(count, W), self.scale, self.shift, share)  # type: ignore[no-untyped-call]
        result, mean, variance = cast(tuple[Tensor, Tensor, Tensor], found)
        if self.batches is None:
            self.begin_epoch()
        assert self.batches is not None
        with torch.no_grad():
            # At first the mean over the epoch's batches: a tenth of each would leave the start in it for too long.
            self.batches += 1
            recent = (1 / self.batches).clamp(min=MOMENTUM)
            self.running_mean.lerp_(mean, recent)
            self.running_variance.lerp_(variance, recent)
        return result.view(S, B, W)


def _float32(device: str) -> AbstractContextManager[None]:
    """Statistics are never taken in the lower precision of autocast."""
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


class NormalizeAndRectify(torch.autograd.Function):
    """ReLU of a batch normalisation, with few passes over the values. M rows of W numbers."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, scale: Tensor, shift: Tensor, share: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """values (M, W), scale and shift (W,), share (M,): of each row in the statistics, in all 1; a row whose share
        is 0 becomes 0. Also mean and variance (W,)."""
        mean = values.T.mv(share)
        centred = values - mean
        variance = centred.square().T.mv(share)
        inverse = (variance + EPSILON).rsqrt()
        normal = centred.mul_(inverse)
        result = torch.addcmul(shift, normal, scale).relu_()
        result *= (share > 0)[:, None]
        ctx.save_for_backward(normal, result, scale, inverse, share)
        ctx.mark_non_differentiable(mean, variance)
        return result, mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        normal, result, scale, inverse, share = ctx.saved_tensors
        inner = gradient * (result > 0)
        shift, slope = inner.sum(0), (inner * normal).sum(0)
        mean = normal.mul(slope).add_(shift).mul_(share[:, None])  # what flows through mean and variance
        values = inner.sub_(mean).mul_(scale * inverse) if ctx.needs_input_grad[0] else None
        return values, slope, shift, None
