"""One trial's training: an epoch, a validation, a checkpoint, an exact resume.

A `Training` holds the trial's members: one model for a single validation part, k in lockstep for k folds.
Each epoch trains every member on its own training part, and the metric is taken over the pooled validation
predictions. Nothing random is kept between epochs: initial weights, the order of batches and dropout are
functions of (seed, member, epoch), so a checkpoint of weights, optimiser and schedule resumes exactly.
"""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from models.batches import Batch, Batches
from models.classifier import Classifier, ClassifierConfig, to_probabilities
from models.data import Sequences
from models.metrics import choose_threshold, direction, score
from models.seeds import derive

OPTIMIZERS = ("adamw", "adam", "rmsprop", "sgd")
SCHEDULES = ("constant", "cosine", "plateau")
MOMENTUM = 0.9  # of SGD
PLATEAU_PATIENCE, PLATEAU_FACTOR = 3, 0.5  # epochs without a better validation loss, then this factor
Part = NDArray[np.int64]  # rows of a data set
Weights = dict[str, Tensor]


class TrainingError(ValueError):
    """The training configuration is out of range or does not fit the data."""


class Diverged(RuntimeError):
    """Loss, gradients or predictions stopped being finite numbers."""


class Interrupted(Exception):
    """The epoch was given up between two batches, as asked; the last checkpoint stands."""


@dataclass(frozen=True)
class TrainingConfig:
    """How one trial's weights are found. JSON-able."""

    metric: str  # the validation metric, one of models.metrics.METRICS
    epochs: int = 50  # at most, >= 1
    patience: int | None = 10  # epochs without a better metric before the end; None: never end early
    batch_size: int = 32  # sequences, >= 1
    optimizer: str = "adamw"  # one of OPTIMIZERS
    learning_rate: float = 1e-3  # > 0
    weight_decay: float = 0.0  # >= 0
    gradient_clip: float = 1.0  # largest norm of a step's gradients; 0: no limit
    schedule: str = "constant"  # one of SCHEDULES: of the learning rate
    class_weight: str = "none"  # none | balanced: weigh each class by the inverse of its share
    threshold: str = "half"  # half | chosen: the binary decision threshold, 0.5 or the best on validation data
    precision: str = "float32"  # float32 | bfloat16 (autocast)
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low in (("epochs", 1), ("batch_size", 1), ("weight_decay", 0), ("gradient_clip", 0)):
            if getattr(self, name) < low:
                raise TrainingError(f"{name} must be at least {low}, got {getattr(self, name)}")
        if self.learning_rate <= 0:
            raise TrainingError(f"learning_rate must be above 0, got {self.learning_rate}")
        choices = {"optimizer": OPTIMIZERS, "schedule": SCHEDULES, "class_weight": ("none", "balanced")}
        choices |= {"threshold": ("half", "chosen"), "precision": ("float32", "bfloat16")}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise TrainingError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")


@dataclass(frozen=True)
class Epoch:
    """What one epoch gave."""

    number: int  # from 1
    train_loss: float  # mean over the training sequences, all members
    value: float  # the validation metric
    log_loss: float  # of the validation part, breaks ties
    threshold: float  # the decision threshold that goes with the value
    seconds: float


class Training:
    """One trial in training on one device.

    sequences: the whole training file; folds: one (training rows, validation rows) pair a member.
    """

    def __init__(
        self,
        sequences: Sequences,
        folds: Sequence[tuple[Part, Part]],
        classifier: ClassifierConfig,
        config: TrainingConfig,
        device: str = "cpu",
    ) -> None:
        assert sequences.labels is not None
        self.config = config
        self.device = torch.device(device)
        self.members = [
            _Member(sequences, train, validation, classifier, config, index, self.device)
            for index, (train, validation) in enumerate(folds)
        ]
        self.labels = np.concatenate([sequences.labels[validation] for _, validation in folds])
        self.history: list[Epoch] = []
        self.best: Epoch | None = None
        self.best_weights: list[Weights] = []
        self.batches = 0  # trained since this object was made: the progress that a lease wants to see
        self.parameters = sum(p.numel() for m in self.members for p in m.model.parameters())
        self.fused = self.members[0].fused

    @property
    def finished(self) -> bool:
        """Whether all epochs are done, or `patience` epochs went by without a better one."""
        if not self.history or self.best is None:
            return False
        stale = self.history[-1].number - self.best.number
        patience = self.config.patience
        return self.history[-1].number >= self.config.epochs or (patience is not None and stale >= patience)

    def advance(self, interrupted: Callable[[], bool] = lambda: False) -> Epoch:
        """Train one epoch and validate.

        Raises Interrupted as soon as `interrupted()` is true between two batches, and Diverged. After
        either, the object holds half an epoch: `restore` a checkpoint or drop it.
        """
        started = time.perf_counter()
        number = len(self.history) + 1
        loss = self._train(number, interrupted)
        probabilities = self.validate()
        if not np.isfinite(probabilities).all():
            raise Diverged(f"validation predictions are not finite numbers after epoch {number}")
        threshold = self._threshold(probabilities)
        value = score(self.config.metric, probabilities, self.labels, threshold)
        log_loss = score("log_loss", probabilities, self.labels)
        epoch = Epoch(number, loss, value, log_loss, threshold, time.perf_counter() - started)
        for member in self.members:
            member.end_epoch(log_loss)
        self.history.append(epoch)
        if self._is_best(epoch):
            self.best = epoch
            self.best_weights = [member.weights() for member in self.members]
        return epoch

    def validate(self) -> NDArray[np.float64]:
        """Each member's probabilities (rows of its validation part, K), pooled in the order of the folds."""
        return np.concatenate([member.validate() for member in self.members])

    def load(self, members: Sequence[Weights]) -> None:
        """Put these weights into the members, to `validate` them."""
        for member, weights in zip(self.members, members, strict=True):
            member.model.load_state_dict(weights)

    def state(self) -> bytes:
        """A checkpoint: everything that the next epoch depends on."""
        content = {
            "history": [vars(epoch) for epoch in self.history],
            "best": None if self.best is None else self.best.number,
            "best_weights": self.best_weights,
            "members": [member.state() for member in self.members],
        }
        buffer = io.BytesIO()
        torch.save(content, buffer)
        return buffer.getvalue()

    def restore(self, checkpoint: bytes) -> None:
        """Go on where `state()` was taken: the next epoch gives the same bits as without the break."""
        content: dict[str, Any] = torch.load(io.BytesIO(checkpoint), map_location="cpu", weights_only=True)
        self.history = [Epoch(**epoch) for epoch in content["history"]]
        self.best = next((epoch for epoch in self.history if epoch.number == content["best"]), None)
        self.best_weights = content["best_weights"]
        for member, state in zip(self.members, content["members"], strict=True):
            member.restore(state)

    def _train(self, number: int, interrupted: Callable[[], bool]) -> float:
        losses = []
        for member in self.members:
            torch.manual_seed(derive("dropout", self.config.seed, member.index, number))
            member.begin_epoch()
            for batch in member.train.training(self.config.batch_size, self.config.seed, member.index, number):
                if interrupted():
                    raise Interrupted
                member.step(batch)
                self.batches += 1
            losses.append(member.loss_sum)
        total = float(torch.stack(losses).sum()) / sum(len(member.train) for member in self.members)
        if not math.isfinite(total):
            raise Diverged(f"the training loss became {total} in epoch {number}")
        return total

    def _threshold(self, probabilities: NDArray[np.float64]) -> float:
        if self.config.threshold == "half" or probabilities.shape[1] != 2:
            return 0.5
        return choose_threshold(probabilities, self.labels, self.config.metric)

    def _is_best(self, epoch: Epoch) -> bool:
        """Whether the latest epoch is the best so far: of those whose metric is no worse than the top by more than
        half a validation sequence's share, the one with the lowest log-loss. A ranking metric on some dozens of
        sequences is soon at its top, long before the probabilities are any good.
        """
        sign = 1.0 if direction(self.config.metric) == "maximize" else -1.0
        alike = 0.0 if self.config.metric == "log_loss" else 0.5 / len(self.labels)
        least = max(sign * past.value for past in self.history) - alike
        if self.best is None or sign * self.best.value < least:
            return True
        return sign * epoch.value >= least and epoch.log_loss < self.best.log_loss


class _Member:
    """One model of a trial with its optimiser and its two parts of the data."""

    def __init__(
        self,
        sequences: Sequences,
        train: Part,
        validation: Part,
        classifier: ClassifierConfig,
        config: TrainingConfig,
        index: int,
        device: torch.device,
    ) -> None:
        self.config, self.index, self.device = config, index, device
        torch.manual_seed(derive("weights", config.seed, index))
        self.model = Classifier(classifier)
        values, lengths = torch.from_numpy(sequences.values), torch.from_numpy(sequences.lengths)
        self.model.fit_normalization(values[train], lengths[train])
        self.model.to(device)
        assert sequences.labels is not None
        labels = torch.from_numpy(sequences.labels)
        self.train = _resident(self.model, values[train], lengths[train], labels[train], device)
        self.validation = _resident(self.model, values[validation], lengths[validation], labels[validation], device)
        self.loss = _loss(labels[train], classifier, config).to(device)
        self.optimizer, self.fused = _optimizer(self.model, config)
        self.schedule = _schedule(self.optimizer, config)
        self.loss_sum = torch.zeros((), device=device)

    def begin_epoch(self) -> None:
        self.model.train()
        self.loss_sum = torch.zeros((), device=self.device)

    def step(self, batch: Batch) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with self._autocast():
            logits = self.model.logits(batch.values, batch.lengths)
        labels = batch.labels if self.model.config.classes > 2 else batch.labels.float()
        loss: Tensor = self.loss(logits.float(), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        if self.config.gradient_clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.gradient_clip)
        self.optimizer.step()
        self.loss_sum += loss.detach() * len(batch.indices)

    def end_epoch(self, log_loss: float) -> None:
        if isinstance(self.schedule, torch.optim.lr_scheduler.ReduceLROnPlateau):
            self.schedule.step(log_loss)
        elif self.schedule is not None:
            self.schedule.step()

    @torch.inference_mode()
    def validate(self) -> NDArray[np.float64]:
        self.model.eval()
        result = np.empty((len(self.validation), self.model.config.classes))
        for batch in self.validation.evaluation():
            with self._autocast():
                logits = self.model.logits(batch.values, batch.lengths)
            result[batch.indices] = to_probabilities(logits).cpu().numpy()
        return result

    def weights(self) -> Weights:
        return {name: tensor.detach().cpu().clone() for name, tensor in self.model.state_dict().items()}

    def state(self) -> dict[str, Any]:
        schedule = None if self.schedule is None else self.schedule.state_dict()
        return {"model": self.weights(), "optimizer": self.optimizer.state_dict(), "schedule": schedule}

    def restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.schedule is not None:
            self.schedule.load_state_dict(state["schedule"])

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16")


def _resident(model: Classifier, values: Tensor, lengths: Tensor, labels: Tensor, device: torch.device) -> Batches:
    with torch.no_grad():
        patches, counts = model.prepare(values.to(device), lengths.to(device))
    return Batches(patches, counts, labels.to(device))


def _loss(labels: Tensor, classifier: ClassifierConfig, config: TrainingConfig) -> nn.Module:
    if config.class_weight == "none":
        return nn.BCEWithLogitsLoss() if classifier.classes == 2 else nn.CrossEntropyLoss()
    counts = torch.bincount(labels, minlength=classifier.classes).clamp(min=1).float()
    if classifier.classes == 2:
        return nn.BCEWithLogitsLoss(pos_weight=counts[0] / counts[1])
    return nn.CrossEntropyLoss(weight=counts.sum() / (classifier.classes * counts))


def _optimizer(model: nn.Module, config: TrainingConfig) -> tuple[torch.optim.Optimizer, bool]:
    """The optimiser and whether it is torch's fused one (its bits differ from the unfused one's)."""
    rate, decay = config.learning_rate, config.weight_decay
    if config.optimizer == "rmsprop":
        return torch.optim.RMSprop(model.parameters(), rate, weight_decay=decay), False
    if config.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), rate, MOMENTUM, weight_decay=decay, fused=True), True
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    return kind(model.parameters(), rate, weight_decay=decay, fused=True), True


def _schedule(
    optimizer: torch.optim.Optimizer, config: TrainingConfig
) -> torch.optim.lr_scheduler.LRScheduler | torch.optim.lr_scheduler.ReduceLROnPlateau | None:
    if config.schedule == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.epochs)
    if config.schedule == "plateau":
        return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=PLATEAU_FACTOR, patience=PLATEAU_PATIENCE)
    return None
