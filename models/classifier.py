"""The network: preprocessing, LSTM, pooling and head, as one module that maps padded sequences to logits.

Letters: B sequences in a batch, T steps, F features, P patch length, S = ceil(T / P) patches, H hidden size,
D directions (1 or 2), K classes.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from hpo.models.config import ClassifierConfig
from hpo.models.device import is_gpu
from hpo.models.kernel.native import Kernel

Weights = dict[str, Tensor]  # a classifier's state by parameter name
ROUNDING = 2.0**-23
"""Of float32, relative to a value. A feature whose deviation is no larger than this part of its mean does not vary:
what it seems to is rounding. Compared with its mean, not with a number, so that its unit does not matter."""


def valid(lengths: Tensor, steps: int) -> Tensor:
    """(steps, B) bool: whether step t lies inside sequence b."""
    return torch.arange(steps, device=lengths.device)[:, None] < lengths[None, :]


def crop_last(values: Tensor, lengths: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """The last `keep` valid steps of each sequence, moved to the front: (B, min(T, keep), F) and lengths."""
    start = (lengths - keep).clamp(min=0)
    steps = torch.arange(values.shape[1], device=values.device)[:keep]
    index = (start[:, None] + steps[None, :]).clamp(max=values.shape[1] - 1)
    cropped = values.gather(1, index[:, :, None].expand(-1, -1, values.shape[2]))
    return cropped, lengths.clamp(max=keep)


def fold_patches(values: Tensor, lengths: Tensor, patch: int) -> tuple[Tensor, Tensor]:
    """(B, T, F) to (B, S, P*F); the last, partial patch is filled with zeros and counts as valid."""
    patches = (values.shape[1] + patch - 1) // patch
    padded = nn.functional.pad(values, (0, 0, 0, patches * patch - values.shape[1]))
    folded = padded.reshape(values.shape[0], patches, patch * values.shape[2])
    return folded, (lengths + patch - 1) // patch


def channel_statistics(values: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (F,) of each channel over all valid steps of (B, T, F)."""
    inside = valid(lengths, values.shape[1]).T[:, :, None]
    flat = values[inside.expand_as(values)].reshape(-1, values.shape[2]).double()
    return flat.mean(0).float(), flat.std(0, correction=0).float()


def weights_of(config: ClassifierConfig) -> tuple[int, int]:
    """How many numbers the state of a `Classifier` holds, and how many tensors, without making one."""
    F, H, D, L = config.features, config.hidden_size, 1 + config.bidirectional, config.layers
    inputs = F * config.patch_length + (L - 1) * D * H  # of all layers
    numbers, tensors = 4 * D * H * (inputs + L * (H + 2)) + 2 * F, 4 * D * L + 2
    if config.pooling == "attention":
        numbers, tensors = numbers + D * H + 1, tensors + 2
    pooled = D * H * (config.patches if config.pooling == "flatten" else 1)
    for width in (config.head_size, config.outputs) if config.head_size else (config.outputs,):
        numbers, tensors, pooled = numbers + (pooled + 1) * width, tensors + 2, width
    return numbers, tensors


class Classifier(nn.Module):
    """An LSTM classifier of padded sequences whose padding never changes an answer.

    `lstm` carries nn.LSTM's own parameter names, so that its weights load into a plain `torch.nn.LSTM`.
    """

    mean: Tensor
    deviation: Tensor
    kernel: Kernel | None = None  # runs the LSTM in float32 on a CPU; None: torch does
    apart: bool | None = None  # on a GPU: whether the directions of a layer run one by one, their weights laid out so

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size * (2 if config.bidirectional else 1)
        self.lstm = nn.LSTM(
            config.features * config.patch_length,
            config.hidden_size,
            config.layers,
            bidirectional=config.bidirectional,
        )
        pooled = width * config.patches if config.pooling == "flatten" else width
        self.attention = nn.Linear(width, 1) if config.pooling == "attention" else None
        self.head = _head(pooled, config)
        self.register_buffer("mean", torch.zeros(config.features))
        self.register_buffer("deviation", torch.ones(config.features))

    def place(self, device: torch.device, *, variable: bool = True) -> Classifier:
        """Move it to a device, as `to` does. On a GPU each call of cuDNN then finds its weights in one buffer, laid out
        as it wants them; it would copy them every time.

        variable: sequences differ in length, so that the reverse direction runs over flipped ones, by itself.
        """
        self.to(device)
        if is_gpu(device):
            self.apart = variable and self.config.bidirectional
            for weights in self._calls():
                lay_out(weights, self.config.hidden_size)
        return self

    def fit_normalization(self, values: Tensor, lengths: Tensor) -> None:
        """Take the channel statistics of the training part: values (N, T, F), lengths (N,). The deviation of a feature
        that does not vary becomes 0, and so does whatever it is later.
        """
        if self.config.normalization == "channel":
            mean, deviation = channel_statistics(values, lengths)
            if not self.config.epsilon:
                deviation[deviation <= ROUNDING * mean.abs()] = 0
            self.mean.copy_(mean)
            self.deviation.copy_(deviation)

    def forward(self, values: Tensor, lengths: Tensor) -> Tensor:
        """values (B, T, F) float32 and lengths (B,) int64 to logits: (B,) when binary, else (B, K)."""
        return self.logits(*self.prepare(values, lengths))

    def probabilities(self, values: Tensor, lengths: Tensor) -> Tensor:
        """values (B, T, F), lengths (B,) to class probabilities (B, K)."""
        return to_probabilities(self.forward(values, lengths))

    def prepare(self, values: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Crop, normalise and fold: (B, T, F) to time-major patches (S, B, P*F) and their lengths (B,).

        Nothing in it is trained, so a training run does it once for all its data.
        """
        if self.config.sequence_length:
            values, lengths = crop_last(values, lengths, self.config.sequence_length)
        inside = valid(lengths, values.shape[1]).T[:, :, None]
        values = torch.where(inside, self._normalize(values, inside, lengths), 0.0)
        patches, lengths = fold_patches(values, lengths, self.config.patch_length)
        return patches.transpose(0, 1), lengths

    def unknown(self, values: Tensor, lengths: Tensor) -> Tensor:
        """(B,) bool: sequences with a value within their kept steps that is no finite number."""
        if self.config.sequence_length:
            values, lengths = crop_last(values, lengths, self.config.sequence_length)
        inside = valid(lengths, values.shape[1]).T[:, :, None]
        return (torch.where(inside, values - values, 0.0) != 0).flatten(1).any(1)

    def logits(self, patches: Tensor, lengths: Tensor | None, generator: torch.Generator | None = None) -> Tensor:
        """Time-major patches (S, B, P*F) to logits; `lengths` None says that every sequence fills all S.

        generator: of dropout's random numbers in training; None: torch's own.
        """
        if self.kernel is not None and self.config.pooling == "last":
            return self._apply_head(self.outputs(patches, lengths, generator, final=True), generator)
        return self.classify(self.outputs(patches, lengths, generator), lengths, generator)

    def outputs(
        self,
        patches: Tensor,
        lengths: Tensor | None,
        generator: torch.Generator | None = None,
        *,
        final: bool = False,
    ) -> Tensor:
        """The last layer's outputs (S, B, D*H); those beyond a sequence's length have no meaning.

        final: only those that each direction ends with, (B, D*H), which cost the native kernel less.
        """
        dropout = self.config.dropout if self.training and self.config.layers > 1 else 0.0
        apart = lengths is not None and self.config.bidirectional if self.apart is None else self.apart
        if self.kernel is None and self.apart is None and not dropout and not apart:
            result: Tensor = self.lstm(patches)[0]
            return result
        flips = _flips(patches, lengths) if apart and self.kernel is None else None
        for layer in range(self.config.layers):
            if layer and dropout:
                patches = drop(patches, dropout, generator)
            last = final and layer == self.config.layers - 1
            patches = self._layer(patches, lengths, layer, flips, final=last)
        return patches

    def classify(self, outputs: Tensor, lengths: Tensor | None, generator: torch.Generator | None = None) -> Tensor:
        """The last layer's outputs (S, B, D*H) to logits: pooling and head."""
        return self._apply_head(self._pool(outputs, lengths), generator)

    def _apply_head(self, pooled: Tensor, generator: torch.Generator | None) -> Tensor:
        """The head: pooled outputs (B, D*H), or (B, S*D*H) for `flatten`, to logits."""
        result = pooled
        for module in self.head if isinstance(self.head, nn.Sequential) else [self.head]:
            if isinstance(module, nn.Dropout):
                result = drop(result, module.p, generator) if self.training else result
            else:
                result = module(result)
        return result.squeeze(-1) if self.config.classes == 2 else result

    def _normalize(self, values: Tensor, inside: Tensor, lengths: Tensor) -> Tensor:
        epsilon = self.config.epsilon
        if self.config.normalization == "channel":
            if epsilon:
                return (values - self.mean) / (self.deviation + epsilon)
            return torch.where(self.deviation == 0, 0.0, (values - self.mean) / self.deviation)
        if self.config.normalization == "sequence":
            count = lengths[:, None, None].to(values.dtype)
            mean = torch.where(inside, values, 0.0).sum(1, keepdim=True) / count
            centred = torch.where(inside, values - mean, 0.0)
            if epsilon:
                return centred / ((centred.square().sum(1, keepdim=True) / count).sqrt() + epsilon)
            return _by_deviation(centred, mean, inside, count)
        return values

    def _layer(
        self, patches: Tensor, lengths: Tensor | None, layer: int, flips: Tensor | None, *, final: bool
    ) -> Tensor:
        """One layer, (S, B, inputs) to (S, B, D*H). With `flips` (S, B, 1) the reverse direction runs over each
        sequence flipped within its own length; the native kernel does so by itself.
        """
        forward, backward = self._weights(f"l{layer}"), []
        if self.config.bidirectional:
            backward = self._weights(f"l{layer}_reverse")
        if self.kernel is not None:
            return self.kernel.layer(patches, lengths, *forward, *backward, final=final)
        if flips is None:
            return self._run(patches, forward + backward)
        flipped = _reorder(self._run(_reorder(patches, flips), backward), flips)
        return torch.cat([self._run(patches, forward), flipped], 2)

    def _calls(self) -> list[list[Tensor]]:
        """The weights of each call on a GPU: of a layer in one direction, or in both."""
        calls = []
        for layer in range(self.config.layers):
            forward, backward = self._weights(f"l{layer}"), []
            if self.config.bidirectional:
                backward = self._weights(f"l{layer}_reverse")
            calls += [forward, backward] if self.apart else [forward + backward]
        return calls

    def _weights(self, suffix: str) -> list[Tensor]:
        """The weights of one direction of one layer."""
        kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        return [cast(Tensor, getattr(self.lstm, f"{kind}_{suffix}")) for kind in kinds]

    def _run(self, patches: Tensor, weights: list[Tensor]) -> Tensor:
        """torch's LSTM of one layer, in one direction or, with the weights of two, in both."""
        both = len(weights) == 8
        zeros = patches.new_zeros(1 + both, patches.shape[1], self.config.hidden_size)
        outputs: Tensor = torch.lstm(patches, (zeros, zeros), weights, True, 1, 0.0, self.training, both, False)[0]
        return outputs

    def _pool(self, outputs: Tensor, lengths: Tensor | None) -> Tensor:
        """(S, B, D*H) to (B, D*H), or (B, S*D*H) for `flatten`; steps outside a sequence never count."""
        pooling = self.config.pooling
        if pooling == "last":
            return self._last(outputs, lengths)
        if pooling == "flatten":
            return outputs.transpose(0, 1).flatten(1)
        outside = None if lengths is None else ~valid(lengths, outputs.shape[0])[:, :, None]
        if pooling == "mean":
            if outside is None:
                return outputs.mean(0)
            return outputs.masked_fill(outside, 0.0).sum(0) / cast(Tensor, lengths)[:, None]
        if pooling == "max":
            return (outputs if outside is None else outputs.masked_fill(outside, -torch.inf)).amax(0)
        scores = cast(nn.Linear, self.attention)(outputs)
        scores = scores if outside is None else scores.masked_fill(outside, -torch.inf)
        pooled: Tensor = (scores.softmax(0) * outputs).sum(0)
        return pooled

    def _last(self, outputs: Tensor, lengths: Tensor | None) -> Tensor:
        """The forward direction's last valid step and, when there are two, the reverse one's first step."""
        if lengths is None:
            last = outputs[-1]
        else:
            last = outputs.gather(0, (lengths - 1)[None, :, None].expand(1, -1, outputs.shape[2]))[0]
        if not self.config.bidirectional:
            return last
        hidden = self.config.hidden_size
        return torch.cat([last[:, :hidden], outputs[0, :, hidden:]], 1)


def to_probabilities(logits: Tensor) -> Tensor:
    """Logits (B,) or (B, K) to class probabilities (B, K) in float32."""
    logits = logits.float()
    if logits.dim() == 1:
        positive = logits.sigmoid()
        return torch.stack([1 - positive, positive], 1)
    return logits.softmax(1)


def drop(values: Tensor, probability: float, generator: torch.Generator | None) -> Tensor:
    """Dropout with random numbers of the caller's generator; torch's own dropout takes none."""
    if not probability:
        return values
    kept = torch.empty_like(values).bernoulli_(1 - probability, generator=generator)
    return values * kept.div_(1 - probability)


def _flips(patches: Tensor, lengths: Tensor | None) -> Tensor:
    """(S, B, 1): where each step of a sequence flipped within its own length comes from."""
    steps, batch = patches.shape[:2]
    index = torch.arange(steps, device=patches.device)[:, None]
    if lengths is None:
        return (steps - 1 - index).expand(steps, batch)[:, :, None]
    return torch.where(index < lengths, lengths - 1 - index, index)[:, :, None]


def _by_deviation(centred: Tensor, mean: Tensor, inside: Tensor, count: Tensor) -> Tensor:
    """Centred values (B, T, F) divided by their deviation in each sequence; 0 where it is only rounding."""
    # A sum of large values is rounded: what is left of the mean is subtracted once more.
    centred = torch.where(inside, centred - centred.sum(1, keepdim=True) / count, 0.0)
    # The square of 1e-30 or 1e30 is no float32: the largest value becomes 1 first.
    largest = centred.abs().amax(1, keepdim=True)
    scaled = centred / torch.where(largest > 0, largest, 1.0)
    deviation = (scaled.square().sum(1, keepdim=True) / count).sqrt()
    return torch.where(deviation * largest <= ROUNDING * mean.abs(), 0.0, scaled / deviation)


@torch.no_grad()
def lay_out(weights: list[Tensor], hidden_size: int) -> None:
    """Move the weights of one call of cuDNN's LSTM, one direction's or both's, into one buffer, as cuDNN wants them."""
    if torch.backends.cudnn.is_acceptable(weights[0]):  # type: ignore[no-untyped-call]
        size, lstm, both = weights[0].shape[1], 2, len(weights) == 8
        torch._cudnn_rnn_flatten_weight(weights, 4, size, lstm, hidden_size, 0, 1, False, both)


def _reorder(patches: Tensor, index: Tensor) -> Tensor:
    return patches.gather(0, index.expand(-1, -1, patches.shape[2]))


def _head(inputs: int, config: ClassifierConfig) -> nn.Module:
    if not config.head_size:
        return nn.Linear(inputs, config.outputs)
    return nn.Sequential(
        nn.Linear(inputs, config.head_size),
        nn.ReLU(),
        nn.Dropout(config.dropout),
        nn.Linear(config.head_size, config.outputs),
    )
