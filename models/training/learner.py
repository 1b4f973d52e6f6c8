"""A model with what trains it: flat weights, loss, optimiser; one gradient step, and the state that it leaves."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from hpo.models.classifier import Classifier, Weights
from hpo.models.config import TrainingConfig
from hpo.models.training.augmentation import Noise, augmented, partners
from hpo.models.training.batches import Batch
from hpo.models.training.optimizers import Optimizer
from hpo.models.training.parameters import ParameterBuffers

LEAST = 1e-30  # what divides at least: a batch may hold rows of weight 0 alone


class Learner:
    """A classifier and its optimiser on one device.

    generator: where dropout draws from. loss_sum: the losses of the rows since it was last set to zero, a scalar on
    the device.
    """

    def __init__(
        self,
        model: Classifier,
        config: TrainingConfig,
        labels: Tensor,
        *,
        weights: Tensor | None = None,
        noise: Noise | None = None,
        waits: bool = True,
    ) -> None:
        """labels (N,): those of the training part, on the model's device; weights (N,): how much each counts. noise:
        see `augmented`.

        waits: a step may read what it computes, and so wait for the device; else it can be captured.
        """
        self.model, self.config, self.noise, self.waits = model, config, noise, waits
        self.device = labels.device
        self.parameters = ParameterBuffers(model)
        self.generator = torch.Generator(self.device)
        if model.stem is not None:
            model.stem.begin_epoch()  # what a step counts in must be there before it is captured
        self.class_weight = None
        if config.class_weight == "balanced":
            self.class_weight = _class_weight(labels, weights, model.config.classes)
        self.optimizer = Optimizer(self.parameters.buffers, self.parameters.gradients, config, waits=waits)
        self.loss_sum = torch.zeros((), device=self.device)

    def step(self, batch: Batch, mask: Tensor | None = None) -> None:
        """One gradient step. mask (B,): 1 for the rows that count, 0 for those that only fill the batch."""
        self.parameters.zero_gradients()
        with torch.no_grad():
            values = augmented(batch.values, batch.lengths, batch.shares, self.noise, self.generator)
        with self.autocast():
            logits = self.model.logits(values, batch.lengths, self.generator, mask)
        loss = self._loss(logits.float(), batch, mask)
        loss.backward()  # type: ignore[no-untyped-call]
        if self.config.gradient_clip:
            self.parameters.clip(self.config.gradient_clip, waits=self.waits)
        self.optimizer.step()
        self.loss_sum += loss.detach() * _rows(batch, mask)

    def autocast(self) -> AbstractContextManager[None]:
        """The precision in which the network runs."""
        if self.config.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def weights(self) -> Weights:
        """The model's state on the CPU, a copy."""
        return {name: tensor.detach().cpu().clone() for name, tensor in self.model.state_dict().items()}

    def state(self) -> dict[str, Any]:
        """Weights and the optimiser's memory, by the names of the weights: the same on every device."""
        optimizer: dict[str, Any] = {}
        for (buffer, layout), memory in zip(self.parameters.groups, self.optimizer.state, strict=True):
            for key, value in memory.items():
                if value.shape == buffer.shape:
                    optimizer.setdefault(key, {}).update(layout.split(value.cpu().clone()))
                else:
                    optimizer[key] = value.cpu().clone()
        return {"model": self.weights(), "optimizer": optimizer}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over a state, in place: captured graphs refer to its memory."""
        self.model.load_state_dict(state["model"])
        for (_, layout), memory in zip(self.parameters.groups, self.optimizer.state, strict=True):
            for key, value in state["optimizer"].items():
                if isinstance(value, dict):
                    for name, part in layout.split(memory[key]).items():
                        part.copy_(value[name])
                else:
                    memory[key].copy_(value)

    def _loss(self, logits: Tensor, batch: Batch, mask: Tensor | None) -> Tensor:
        """The mean over the rows that count, each weighted by its class and its own weight, 0 where none weighs
        anything; that of a mixture counts by its shares."""
        losses, counts = self._losses(logits, batch.labels, batch.weights)
        if batch.shares is not None:
            others = None if batch.weights is None else partners(batch.weights)
            other_losses, other_counts = self._losses(logits, partners(batch.labels), others)
            losses = torch.lerp(other_losses, losses, batch.shares)
            counts = torch.lerp(other_counts, counts, batch.shares)
        if mask is not None:
            losses, counts = losses * mask, counts * mask
        total = counts.sum()
        return losses.sum() / (total if batch.weights is None else total.clamp(min=LEAST))

    def _losses(self, logits: Tensor, labels: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
        """Each row's loss (B,), as often as it counts by its own weight (B,), and what it counts in the mean (B,)."""
        by_class, smoothing = self.class_weight, self.config.label_smoothing
        if self.model.config.classes == 2:
            targets = labels * (1 - smoothing) + smoothing / 2
            losses = nn.functional.binary_cross_entropy_with_logits(
                logits, targets, pos_weight=by_class, reduction="none"
            )
        else:
            losses = nn.functional.cross_entropy(logits, labels, by_class, reduction="none", label_smoothing=smoothing)
        counts = torch.ones_like(losses) if by_class is None or self.model.config.classes == 2 else by_class[labels]
        return (losses, counts) if weights is None else (losses * weights, counts * weights)


def _rows(batch: Batch, mask: Tensor | None) -> Tensor | int:
    """How many rows the batch counts for."""
    if batch.weights is None:
        return len(batch.labels) if mask is None else mask.sum()
    return (batch.weights if mask is None else batch.weights * mask).sum()


def _class_weight(labels: Tensor, weights: Tensor | None, classes: int) -> Tensor:
    """Weights that balance the classes of labels (N,) by what their rows weigh. Two classes: that of class 1 relative
    to class 0; more: one a class."""
    if weights is None:
        counts = torch.bincount(labels, minlength=classes).clamp(min=1).float()
    else:
        sums = torch.bincount(labels.cpu(), weights.cpu().double(), minlength=classes)  # on a GPU in any order
        counts = torch.where(sums > 0, sums, 1.0).float().to(labels.device)
    return counts[0] / counts[1] if classes == 2 else counts.sum() / (classes * counts)
