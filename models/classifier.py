"""The network: preprocessing, stem, LSTM, pooling and head, as one module that maps padded sequences to logits.

Letters: B sequences in a batch, T steps, F features, C channels, P patch length, S steps of the LSTM, H hidden size,
D directions (1 or 2), K classes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from functools import cache
from typing import cast

import torch
from torch import Tensor, nn

from hpo.models.config import ClassifierConfig
from hpo.models.device import is_gpu
from hpo.models.kernel.native import Kernel
from hpo.models.preprocessing import (
    ROUNDING,
    by_channel,
    by_sequence,
    channel_statistics,
    crop_last,
    fold_patches,
    valid,
    valid_values,
    with_differences,
)
from hpo.models.stem import Stem

log = logging.getLogger("hpo")

Weights = dict[str, Tensor]  # a classifier's state by parameter name


def weights_of(config: ClassifierConfig) -> tuple[int, int]:
    """How many numbers the state of a `Classifier` holds, and how many tensors, without making one."""
    H, D, L = config.hidden_size, 1 + config.bidirectional, config.layers
    inputs = config.inputs + (L - 1) * D * H  # of all layers
    numbers, tensors = 4 * D * H * (inputs + L * (H + 2)) + 2 * config.scaled, 4 * D * L + 2
    for channels, kernel, _ in config.convolutions:
        numbers, tensors = numbers + config.stem_width * (channels * kernel + 4), tensors + 5
    if config.pooling == "attention":
        numbers, tensors = numbers + D * H + 1, tensors + 2
    pooled = config.pooled
    for width in (config.head_size, config.outputs) if config.head_size else (config.outputs,):
        numbers, tensors, pooled = numbers + (pooled + 1) * width, tensors + 2, width
    return numbers, tensors


def _in_float32(device: torch.device) -> bool:
    """Whether autocast is to leave out the LSTM: on a CPU that has none in bfloat16."""
    return device.type == "cpu" and torch.is_autocast_enabled("cpu") and not has_bfloat16_lstm()


@cache
def has_bfloat16_lstm() -> bool:
    """Whether torch can train an LSTM in bfloat16 on this CPU: oneDNN has none without AVX-512, and says so only when
    it is to run one."""
    one, weights = torch.zeros(1, 1, 1), [torch.zeros(4, *shape, requires_grad=True) for shape in ((1,), (1,), (), ())]
    try:
        with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16):
            torch.lstm(one, (one, one), weights, True, 1, 0.0, True, False, False)
    except RuntimeError:
        log.warning("this CPU has no LSTM in bfloat16: it runs in float32, all else in bfloat16")
        return False
    return True


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
        self.stem = Stem(config) if config.stem == "conv" else None
        self.lstm = nn.LSTM(config.inputs, config.hidden_size, config.layers, bidirectional=config.bidirectional)
        self.attention = nn.Linear(config.width, 1) if config.pooling == "attention" else None
        self.head = _head(config)
        self.register_buffer("mean", torch.zeros(config.scaled))
        self.register_buffer("deviation", torch.ones(config.scaled))

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
        """Take the channel statistics of the training part: values (N, T, F) with or without marks, lengths (N,). The
        deviation of a channel that does not vary becomes 0, and so does whatever it is later.
        """
        if self.config.normalization == "channel":
            self.fit_channels(self.channels(values, lengths).double())

    def channels(self, values: Tensor, lengths: Tensor) -> Tensor:
        """The channels that are normalised, of all valid steps: values (B, T, given) to (steps, C)."""
        values = values[:, :, : self.config.features]
        return valid_values(with_differences(values) if self.config.difference else values, lengths)

    def fit_channels(self, steps: Tensor) -> None:
        """As `fit_normalization`, of all that `channels` gives of the training part, in float64."""
        mean, deviation = channel_statistics(steps)
        if not self.config.epsilon:
            deviation[deviation <= ROUNDING * mean.abs()] = 0
        self.mean.copy_(mean)
        self.deviation.copy_(deviation)

    def forward(self, values: Tensor, lengths: Tensor) -> Tensor:
        """values (B, T, given) float32, made by `hpo.models.data.gaps.inputs`, and lengths (B,) int64 to logits: (B,)
        when binary, else (B, K)."""
        return self.logits(*self.prepare(values, lengths))

    def probabilities(self, values: Tensor, lengths: Tensor) -> Tensor:
        """values (B, T, given), lengths (B,) to class probabilities (B, K)."""
        return to_probabilities(self.forward(values, lengths))

    def prepare(self, values: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Crop, add differences, normalise and fold: (B, T, given) to time-major patches (T / P, B, P*C) and their
        lengths (B,), zero beyond these.

        Nothing in it is trained, so a training run does it once for all its data.
        """
        if self.config.sequence_length:
            values, lengths = crop_last(values, lengths, self.config.sequence_length)
        inside = valid(lengths, values.shape[1]).T[:, :, None]
        marks = None
        if self.config.marks:
            values, marks = values[:, :, : self.config.features], values[:, :, self.config.features :]
        if self.config.difference:
            values = with_differences(values)
        values = self._normalize(values, inside, lengths)
        if marks is not None:
            values = torch.cat([values, marks], 2)
        values = torch.where(inside, values, 0.0)
        patches, lengths = fold_patches(values, lengths, self.config.folded)
        return patches.transpose(0, 1), lengths

    def unknown(self, values: Tensor, lengths: Tensor) -> Tensor:
        """(B,) bool: sequences with a value within their kept steps that is no finite number."""
        if self.config.sequence_length:
            values, lengths = crop_last(values, lengths, self.config.sequence_length)
        inside = valid(lengths, values.shape[1]).T[:, :, None]
        return (torch.where(inside, values - values, 0.0) != 0).flatten(1).any(1)

    def logits(
        self,
        patches: Tensor,
        lengths: Tensor | None,
        generator: torch.Generator | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Time-major patches as of `prepare` to logits; `lengths` None says that every sequence fills all steps.

        generator: of dropout's random numbers in training; None: torch's own. rows (B,): 1 for the sequences that
        count, 0 for those that only fill the batch.
        """
        inputs, lengths = self.embed(patches, lengths, rows)
        if self.kernel is not None and self.config.pooling == "last":
            pooled = self.outputs(inputs, lengths, generator, final=True)
            return self._apply_head(self._with_skip(pooled, inputs, lengths), generator)
        return self.classify(self.outputs(inputs, lengths, generator), inputs, lengths, generator)

    def embed(
        self, patches: Tensor, lengths: Tensor | None, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Time-major patches and their lengths to what the LSTM reads, (S, B, inputs), and its lengths."""
        if self.stem is None:
            return patches, lengths
        found: tuple[Tensor, Tensor | None] = self.stem(patches, lengths, rows)
        return found

    def outputs(
        self,
        patches: Tensor,
        lengths: Tensor | None,
        generator: torch.Generator | None = None,
        *,
        final: bool = False,
    ) -> Tensor:
        """What `embed` gives to the last layer's outputs (S, B, D*H); those beyond a length have no meaning.

        final: only those that each direction ends with, (B, D*H), which cost the native kernel less.
        """
        if self.kernel is None and _in_float32(patches.device):
            with torch.autocast("cpu", enabled=False):
                return self.outputs(patches.float(), lengths, generator, final=final)
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

    def classify(
        self, outputs: Tensor, inputs: Tensor, lengths: Tensor | None, generator: torch.Generator | None = None
    ) -> Tensor:
        """The last layer's outputs (S, B, D*H) to logits: pooling and head. inputs (S, B, inputs): what it all read."""
        return self._apply_head(self._with_skip(self._pool(outputs, lengths), inputs, lengths), generator)

    def _apply_head(self, pooled: Tensor, generator: torch.Generator | None) -> Tensor:
        """The head: pooled outputs (B, pooled) to logits."""
        result = pooled
        for module in self.head if isinstance(self.head, nn.Sequential) else [self.head]:
            if isinstance(module, nn.Dropout):
                result = drop(result, module.p, generator) if self.training else result
            else:
                result = module(result)
        return result.squeeze(-1) if self.config.classes == 2 else result

    def _normalize(self, values: Tensor, inside: Tensor, lengths: Tensor) -> Tensor:
        if self.config.normalization == "channel":
            return by_channel(values, self.mean, self.deviation, self.config.epsilon)
        if self.config.normalization == "sequence":
            return by_sequence(values, inside, lengths, self.config.epsilon)
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

    def _with_skip(self, pooled: Tensor, inputs: Tensor, lengths: Tensor | None) -> Tensor:
        """The LSTM's pooled outputs, with the skip connection that goes to the head beside them: (B, pooled)."""
        if not self.config.skip:
            return pooled
        outside = _outside(inputs, lengths)
        return torch.cat([pooled, _max(inputs, outside), _mean(inputs, outside, lengths)], 1)

    def _pool(self, outputs: Tensor, lengths: Tensor | None) -> Tensor:
        """(S, B, D*H) to one row a sequence; steps outside a sequence never count."""
        pooling = self.config.pooling
        if pooling == "last":
            return self._last(outputs, lengths)
        if pooling == "flatten":
            return outputs.transpose(0, 1).flatten(1)
        outside = _outside(outputs, lengths)
        if pooling == "mean":
            return _mean(outputs, outside, lengths)
        if pooling == "max":
            return _max(outputs, outside)
        if pooling == "concat":
            parts = [_max(outputs, outside), _mean(outputs, outside, lengths), self._last(outputs, lengths)]
            return torch.cat(parts, 1)
        scores = cast(nn.Linear, self.attention)(outputs)
        scores = scores if outside is None else scores.masked_fill(outside, -torch.inf)
        found: Tensor = (scores.softmax(0) * outputs).sum(0)
        return found

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


def averaged(logits: Sequence[Tensor], temperature: float = 1.0, weights: Sequence[float] | None = None) -> Tensor:
    """Logits of k members, each (B,) or (B, K), to the mean of their probabilities (B, K) in float32, p, and of that
    softmax(log p / temperature). weights (k,) of the members in the mean, which sum to 1; None: all alike.

    That one is computed from logarithms: in float32 the probability 1 - p of a class that is nearly certain has few
    digits or none.
    """
    if temperature == 1:
        found = [to_probabilities(one) for one in logits]
        if weights is None:
            return torch.stack(found).mean(0)
        return torch.stack([weight * one for weight, one in zip(weights, found, strict=True)]).sum(0)
    logs = [_log_probabilities(one.float()) for one in logits]
    if weights is not None:  # else but for log k, as of all
        logs = [one + math.log(weight) for weight, one in zip(weights, logs, strict=True)]
    return (torch.stack(logs).logsumexp(0) / temperature).softmax(1)


def _log_probabilities(logits: Tensor) -> Tensor:
    """Logits (B,) or (B, K) to the logarithms of class probabilities, (B, K)."""
    if logits.dim() == 1:
        return -nn.functional.softplus(torch.stack([logits, -logits], 1))
    return logits.log_softmax(1)


def drop(values: Tensor, probability: float, generator: torch.Generator | None) -> Tensor:
    """Dropout with random numbers of the caller's generator; torch's own dropout takes none."""
    if not probability:
        return values
    kept = torch.empty_like(values).bernoulli_(1 - probability, generator=generator)
    return values * kept.div_(1 - probability)


def _outside(outputs: Tensor, lengths: Tensor | None) -> Tensor | None:
    """(S, B, 1): the steps of (S, B, …) beyond each sequence's end; None where there are none."""
    return None if lengths is None else ~valid(lengths, outputs.shape[0])[:, :, None]


def _mean(outputs: Tensor, outside: Tensor | None, lengths: Tensor | None) -> Tensor:
    if outside is None:
        return outputs.mean(0)
    return outputs.masked_fill(outside, 0.0).sum(0) / cast(Tensor, lengths)[:, None]


def _max(outputs: Tensor, outside: Tensor | None) -> Tensor:
    return (outputs if outside is None else outputs.masked_fill(outside, -torch.inf)).amax(0)


def _flips(patches: Tensor, lengths: Tensor | None) -> Tensor:
    """(S, B, 1): where each step of a sequence flipped within its own length comes from."""
    steps, batch = patches.shape[:2]
    index = torch.arange(steps, device=patches.device)[:, None]
    if lengths is None:
        return (steps - 1 - index).expand(steps, batch)[:, :, None]
    return torch.where(index < lengths, lengths - 1 - index, index)[:, :, None]


@torch.no_grad()
def lay_out(weights: list[Tensor], hidden_size: int) -> None:
    """Move the weights of one call of cuDNN's LSTM, one direction's or both's, into one buffer, as cuDNN wants them."""
    if torch.backends.cudnn.is_acceptable(weights[0]):  # type: ignore[no-untyped-call]
        size, lstm, both = weights[0].shape[1], 2, len(weights) == 8
        torch._cudnn_rnn_flatten_weight(weights, 4, size, lstm, hidden_size, 0, 1, False, both)


def _reorder(patches: Tensor, index: Tensor) -> Tensor:
    return patches.gather(0, index.expand(-1, -1, patches.shape[2]))


def _head(config: ClassifierConfig) -> nn.Module:
    if not config.head_size:
        return nn.Linear(config.pooled, config.outputs)
    return nn.Sequential(
        nn.Linear(config.pooled, config.head_size),
        nn.ReLU(),
        nn.Dropout(config.dropout),
        nn.Linear(config.head_size, config.outputs),
    )
