"""The convolutional stem gives what torch's layers give, sees no padding, and counts only what is there."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from hpo.models.config import ClassifierConfig
from hpo.models.preprocessing import valid, with_differences
from hpo.models.stem import EPSILON, NormalizeAndRectify, Stem, StemLayer

LENGTHS = torch.tensor([13, 4, 1, 9, 8])


def stem(**given: Any) -> Stem:
    torch.manual_seed(0)
    config: dict[str, Any] = {"features": 3, "classes": 2, "steps": 13, "stem": "conv", "stem_width": 5} | given
    return Stem(ClassifierConfig(**config))


def layers_of(own: Stem) -> list[StemLayer]:
    return [cast(StemLayer, layer) for layer in own.layers]


def batch(padding: int = 0) -> Tensor:
    """(13 + padding, 5, 3), zero beyond each of LENGTHS."""
    torch.manual_seed(1)
    values = torch.randn(13, 5, 3) * valid(LENGTHS, 13)[:, :, None]
    return nn.functional.pad(values, (0, 0, 0, 0, 0, padding))


class Torchs(nn.Module):
    """The same of torch's own layers, for one sequence or several of one length: (T, B, C) to (S, B, W)."""

    def __init__(self, own: StemLayer) -> None:
        super().__init__()
        width, channels, kernel = own.weight.shape
        self.left = max(0, (kernel - own.stride) // 2)
        self.convolution = nn.Conv1d(channels, width, kernel, own.stride, bias=False)
        self.norm = nn.BatchNorm1d(width, eps=EPSILON)
        self.kernel, self.stride = kernel, own.stride
        with torch.no_grad():
            self.convolution.weight.copy_(own.weight)

    def forward(self, values: Tensor) -> Tensor:
        right = -len(values) % self.stride + self.kernel - self.stride - self.left
        padded = nn.functional.pad(values.permute(1, 2, 0), (self.left, right))
        found: Tensor = self.norm(self.convolution(padded)).relu().permute(2, 0, 1)
        return found


@pytest.mark.parametrize(("layers", "kernel", "stride"), [(1, 5, 1), (1, 8, 4), (1, 3, 5), (2, 3, 2), (3, 4, 3)])
def test_it_is_torchs_convolutions_batch_normalisations_and_relus(layers: int, kernel: int, stride: int) -> None:
    own = stem(stem_layers=layers, stem_kernel=kernel, stem_stride=stride)
    torchs = nn.Sequential(*(Torchs(layer) for layer in layers_of(own)))
    torch.manual_seed(2)
    values = torch.randn(13, 5, 3)
    found, lengths = own(values, None)
    expected = torchs(values)
    assert lengths is None
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    gradient = torch.randn_like(expected)
    found.backward(gradient)
    expected.backward(gradient)
    for layer, other in zip(layers_of(own), torchs, strict=True):
        for mine, theirs in zip(layer.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-4, rtol=1e-4)
    own.eval()
    torchs.eval()
    for layer, other in zip(layers_of(own), torchs, strict=True):
        state = {"running_mean": layer.running_mean, "running_var": layer.running_variance}
        cast(Torchs, other).norm.load_state_dict(state, strict=False)
    torch.testing.assert_close(own(values, None)[0], torchs(values), atol=1e-5, rtol=1e-5)


def test_the_gradient_of_the_normalisation_is_that_of_its_values() -> None:
    torch.manual_seed(0)
    share = torch.tensor([1.0, 2, 0, 1, 1, 3], dtype=torch.double)
    inputs = [torch.randn(6, 3), torch.randn(3), torch.randn(3)]
    inputs = [one.double().requires_grad_() for one in inputs]

    def function(values: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        found: Tensor = NormalizeAndRectify.apply(values, scale, shift, share / share.sum())[0]  # type: ignore[no-untyped-call]
        return found

    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("given", [{"stem_stride": 4}, {"stem_layers": 2, "stem_kernel": 4, "stem_stride": 2}])
@pytest.mark.parametrize("training", [False, True])
def test_padding_and_rows_that_fill_a_batch_change_nothing(given: dict[str, Any], training: bool) -> None:
    alone, filled = (stem(**given).train(training) for _ in range(2))
    expected, lengths = alone(batch(), LENGTHS)
    rows = torch.tensor([1.0, 1, 1, 1, 1, 0, 0])
    more = torch.cat([batch(6), batch(6)[:, :2]], 1)
    found, _ = filled(more, torch.cat([LENGTHS, LENGTHS[:2]]), rows)
    torch.testing.assert_close(lengths, -(-LENGTHS // given["stem_stride"]))
    torch.testing.assert_close(found[: len(expected), :5], expected, atol=1e-6, rtol=0)
    assert not found[len(expected) :].any()
    assert not (expected * ~valid(lengths, len(expected))[:, :, None]).any()
    for one, other in zip(alone.buffers(), filled.buffers(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


def test_statistics_are_those_of_valid_steps_alone() -> None:
    own = stem(stem_kernel=1, stem_stride=1)
    (layer,) = layers_of(own)
    own(batch(), LENGTHS)
    values = layer.convolve(batch())[valid(LENGTHS, 13)]
    torch.testing.assert_close(layer.running_mean, values.mean(0))
    torch.testing.assert_close(layer.running_variance, values.var(0, correction=0))


def test_running_statistics_are_the_mean_of_an_epochs_batches_and_then_the_last_tens() -> None:
    own = stem(stem_kernel=1, stem_stride=1)
    (layer,) = layers_of(own)
    torch.manual_seed(3)
    batches = [torch.randn(4, 2, 3) + number for number in range(25)]
    means = [layer.convolve(one).mean((0, 1)) for one in batches]
    for one in batches[:10]:
        own(one, None)
    torch.testing.assert_close(layer.running_mean, torch.stack(means[:10]).mean(0))
    before = layer.running_mean.clone()
    own(batches[10], None)
    torch.testing.assert_close(layer.running_mean, before + 0.1 * (means[10] - before))
    own.begin_epoch()
    own(batches[20], None)
    torch.testing.assert_close(layer.running_mean, means[20])


@pytest.mark.parametrize(("layers", "kernel", "stride"), [(1, 1, 5), (1, 3, 4), (2, 2, 7), (2, 3, 1)])
def test_no_step_goes_unseen(layers: int, kernel: int, stride: int) -> None:
    own = stem(stem_layers=layers, stem_kernel=kernel, stem_stride=stride).eval()
    for layer in layers_of(own):
        nn.init.constant_(layer.weight, 1.0)
    values = torch.ones(13, 1, 3, requires_grad=True)
    own(values, None)[0].sum().backward()
    assert values.grad is not None
    assert (values.grad > 0).all()


def test_differences_begin_with_zero() -> None:
    values = torch.tensor([[[1.0], [4.0], [2.0]]])
    assert with_differences(values).tolist() == [[[1.0, 0.0], [4.0, 3.0], [2.0, -2.0]]]
