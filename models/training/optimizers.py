"""torch's optimisers on flat buffers, called without the classes of torch.optim.

The first of those in a process imports torch's compiler, which takes a second, and each of their steps takes some
20 us of bookkeeping. The kernels and the order of operations are theirs, so on a CPU the bits are, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hpo.models.config import TrainingConfig

MOMENTUM = 0.9  # of SGD
BETA1, BETA2 = 0.9, 0.999  # of Adam and AdamW
ALPHA = 0.99  # of RMSprop
EPSILON = 1e-8
MEMORY = {  # what is remembered of each weight, by torch's names; a momentum of zero becomes the first gradient
    "adamw": ("exp_avg", "exp_avg_sq"),
    "adam": ("exp_avg", "exp_avg_sq"),
    "sgd": ("momentum_buffer",),
    "rmsprop": ("square_avg",),
}


class Optimizer:
    """One optimiser over a few buffers, each with its gradient in a buffer of its own.

    rate: the learning rate; in steps that can be captured it lies on the device. state: of each buffer by torch's
    names, all zero before the first step, and always the same tensors. fused: whether one kernel makes the whole step
    (its bits differ from those of several).
    """

    def __init__(
        self, buffers: Sequence[Tensor], gradients: Sequence[Tensor], config: TrainingConfig, *, waits: bool = True
    ) -> None:
        """waits: a step may read what the device has computed; else it can be captured."""
        self.kind, self.decay = config.optimizer, config.weight_decay
        self.fused = self.kind != "rmsprop"
        self.buffers, self.gradients = list(buffers), list(gradients)
        device = self.buffers[0].device
        rate = config.learning_rate
        self.rate: float | Tensor = rate if waits else torch.tensor(rate, device=device)
        self._memory = [[torch.zeros_like(buffer) for buffer in buffers] for _ in MEMORY[self.kind]]
        self._steps = [torch.zeros((), device=device) for _ in buffers] if "adam" in self.kind else []
        self.state: list[dict[str, Tensor]] = [
            dict(zip(MEMORY[self.kind], own, strict=True)) for own in zip(*self._memory, strict=True)
        ]
        for own, step in zip(self.state, self._steps, strict=False):
            own["step"] = step

    def set_rate(self, rate: float) -> None:
        """The learning rate of the steps from now on."""
        if isinstance(self.rate, Tensor):
            self.rate.fill_(rate)
        else:
            self.rate = rate

    @torch.no_grad()
    def step(self) -> None:
        """Move the weights by their gradients."""
        if self.kind == "sgd":
            self._sgd()
        elif self.kind == "rmsprop":
            for buffer, gradient, square in zip(self.buffers, self.gradients, self._memory[0], strict=True):
                self._rmsprop(buffer, gradient, square)
        else:
            self._adam()

    def _adam(self) -> None:
        torch._foreach_add_(self._steps, 1)
        update: Any = torch._fused_adamw_ if self.kind == "adamw" else torch._fused_adam_
        update(
            self.buffers,
            self.gradients,
            *self._memory,
            [],
            self._steps,
            lr=self.rate,
            beta1=BETA1,
            beta2=BETA2,
            weight_decay=self.decay,
            eps=EPSILON,
            amsgrad=False,
            maximize=False,
        )

    def _sgd(self) -> None:
        torch._fused_sgd_(
            self.buffers,
            self.gradients,
            *self._memory,
            lr=self.rate,
            momentum=MOMENTUM,
            dampening=0.0,
            weight_decay=self.decay,
            nesterov=False,
            maximize=False,
            is_first_step=False,
        )

    def _rmsprop(self, buffer: Tensor, gradient: Tensor, square: Tensor) -> None:
        if self.decay:
            gradient = gradient.add(buffer, alpha=self.decay)
        square.mul_(ALPHA).addcmul_(gradient, gradient, value=1 - ALPHA)
        divisor = square.sqrt().add_(EPSILON)
        if isinstance(self.rate, Tensor):
            buffer.sub_(gradient.div(divisor).mul_(self.rate))
        else:
            buffer.addcdiv_(gradient, divisor, value=-self.rate)
