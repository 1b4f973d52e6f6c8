"""A model's weights and gradients in flat buffers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from hpo.models.classifier import Classifier

CLIP_EPSILON = 1e-6  # as in torch's clip_grad_norm_


@dataclass(frozen=True)
class ParameterLayout:
    """Where the weights lie in a buffer."""

    of: dict[str, tuple[int, torch.Size]]  # start and shape by name

    def split(self, buffer: Tensor) -> dict[str, Tensor]:
        """The buffer's content by name, as views."""
        return {name: buffer[start : start + shape.numel()].view(shape) for name, (start, shape) in self.of.items()}


class ParameterBuffers:
    """A model's weights in one buffer and their gradients in another, so that clipping and the optimiser are a kernel
    or two whatever the number of weights. Weights that share a buffer already stay there: cuDNN has laid it out.

    groups: each buffer with its layout. buffers and gradients: in the order of the groups.
    """

    def __init__(self, model: Classifier) -> None:
        named = dict(model.named_parameters())
        stored: dict[int, dict[str, nn.Parameter]] = {}
        for name, weight in named.items():
            stored.setdefault(weight.untyped_storage()._cdata, {})[name] = weight
        shared = [weights for weights in stored.values() if len(weights) > 1]
        rest = {name: weight for weights in stored.values() if len(weights) == 1 for name, weight in weights.items()}
        self.groups = [*map(_laid_out, shared), *([_side_by_side(rest)] if rest else [])]
        self.buffers = [buffer for buffer, _ in self.groups]
        self.gradients = [torch.zeros_like(buffer) for buffer in self.buffers]
        for (buffer, layout), gradient in zip(self.groups, self.gradients, strict=True):
            buffer.grad = gradient
            for name, part in layout.split(gradient).items():
                named[name].grad = part

    def zero_gradients(self) -> None:
        """Set all gradients to zero, in place."""
        for gradient in self.gradients:
            gradient.zero_()

    def clip(self, most: float, *, waits: bool = True) -> None:
        """Scale the gradients down to a norm of at most `most`, all weights taken together, as clip_grad_norm_ does.

        waits: the norm may be read.
        """
        norms = [torch.linalg.vector_norm(gradient) for gradient in self.gradients]
        norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
        if waits and float(norm) < most - 2 * CLIP_EPSILON:
            return  # the factor would be 1
        scale = (most / (norm + CLIP_EPSILON)).clamp(max=1.0)
        for gradient in self.gradients:
            gradient.mul_(scale)


def _side_by_side(weights: dict[str, nn.Parameter]) -> tuple[nn.Parameter, ParameterLayout]:
    buffer = torch.cat([weight.detach().reshape(-1) for weight in weights.values()])
    starts = np.cumsum([0, *(weight.numel() for weight in weights.values())])
    layout = ParameterLayout(
        {name: (int(at), weight.shape) for at, (name, weight) in zip(starts, weights.items(), strict=False)}
    )
    for name, part in layout.split(buffer).items():
        weights[name].data = part
    return nn.Parameter(buffer), layout


def _laid_out(weights: dict[str, nn.Parameter]) -> tuple[nn.Parameter, ParameterLayout]:
    """Weights that share one storage already, gaps between them set to zero."""
    values = {name: weight.detach().clone() for name, weight in weights.items()}
    storage = next(iter(weights.values())).untyped_storage()
    like = next(iter(values.values()))
    buffer = torch.empty(0, dtype=like.dtype, device=like.device).set_(storage)
    buffer.zero_()
    for name, weight in weights.items():
        weight.detach().copy_(values[name])
    return nn.Parameter(buffer), ParameterLayout(
        {name: (int(w.storage_offset()), w.shape) for name, w in weights.items()}
    )
