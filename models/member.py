"""One model of a trial in training: its weights side by side, its optimiser, its steps.

On a CPU a step is made for each batch as it comes, cropped to its longest sequence. On a GPU, where starting a kernel
costs more than most of these kernels do, steps have a few fixed shapes and take their batch from the device, so
that each shape is captured once as a CUDA graph and an epoch is a row of replays.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hpo.models.batches import Batch, Batches
from hpo.models.classifier import Classifier, to_probabilities
from hpo.models.optimizers import Optimizer
from hpo.models.seeds import derive

if TYPE_CHECKING:
    from hpo.models.training import TrainingConfig

log = logging.getLogger("hpo")

Weights = dict[str, Tensor]
BUCKETS = 8  # lengths at most that steps of fixed shape are rounded up to
WARM_UP = 3  # steps before a capture, for libraries to choose their kernels and take their workspaces
EVALUATION_BATCH = {"cpu": 256, "cuda": 1024}  # sequences
CLIP_EPSILON = 1e-6  # as in torch's clip_grad_norm_

capturing = threading.Lock()  # one capture at a time in a process; no call that waits for the whole device beside it


class Member:
    """A classifier in training on its two parts of the data."""

    def __init__(
        self,
        model: Classifier,
        train: Batches,
        validation: Batches,
        config: TrainingConfig,
        index: int,
        *,
        fixed_shapes: bool,
        graphs: bool,
    ) -> None:
        self.model, self.train, self.validation, self.config, self.index = model, train, validation, config, index
        self.device = train.values.device
        self.weights_and_gradients = Flat(model)
        self.generator = torch.Generator(self.device)
        self.class_weight = _class_weight(train, model.config.classes, config)
        self.optimizer = Optimizer(self.weights_and_gradients.buffers, self.weights_and_gradients.gradients, config)
        self.fused = self.optimizer.fused
        self.loss_sum = torch.zeros((), device=self.device)
        self.fixed = FixedSteps(self, graphs) if fixed_shapes else None

    def epoch(self, number: int, rate: float) -> Iterator[Callable[[], None]]:
        """The steps of one epoch, each a call that trains one batch; `loss_sum` then holds the sum of losses."""
        parts = self.train.parts(self.config.batch_size, self.config.seed, self.index, number)
        self.model.train()
        if self.fixed is not None:
            self.fixed.get_ready(parts)
        self.generator.manual_seed(derive("dropout", self.config.seed, self.index, number))
        self.optimizer.set_rate(rate)
        self.loss_sum.zero_()
        if self.fixed is not None:
            yield from self.fixed.steps(parts)
            return
        for part in parts:
            batch = self.train.batch(part)
            yield lambda batch=batch: self.step(batch)  # type: ignore[misc]

    def step(self, batch: Batch, mask: Tensor | None = None) -> None:
        """One gradient step. mask (B,): 1 for the rows that count, 0 for those that only fill the batch."""
        self.weights_and_gradients.zero_gradients()
        with self._autocast():
            logits = self.model.logits(batch.values, batch.lengths, self.generator)
        loss = self._loss(logits.float(), batch.labels, mask)
        loss.backward()  # type: ignore[no-untyped-call]
        if self.config.gradient_clip:
            self.weights_and_gradients.clip(self.config.gradient_clip)
        self.optimizer.step()
        self.loss_sum += loss.detach() * (len(batch.labels) if mask is None else mask.sum())

    @torch.inference_mode()
    def validate(self) -> Tensor:
        """Probabilities (rows of the validation part, K), on the device."""
        self.model.eval()
        result = torch.empty(len(self.validation), self.model.config.classes, device=self.device)
        for batch in self.validation.evaluation(EVALUATION_BATCH[self.device.type]):
            with self._autocast():
                logits = self.model.logits(batch.values, batch.lengths)
            result[torch.from_numpy(batch.indices).to(self.device)] = to_probabilities(logits)
        return result

    def weights(self) -> Weights:
        return {name: tensor.detach().cpu().clone() for name, tensor in self.model.state_dict().items()}

    def state(self) -> dict[str, Any]:
        """Weights and the optimiser's memory, by the names of the weights: the same on every device."""
        optimizer: dict[str, Any] = {}
        for (buffer, places), memory in zip(self.weights_and_gradients.groups, self.optimizer.state, strict=True):
            for key, value in memory.items():
                if value.shape == buffer.shape:
                    optimizer.setdefault(key, {}).update(places.split(value.cpu().clone()))
                else:
                    optimizer[key] = value.cpu().clone()
        return {"model": self.weights(), "optimizer": optimizer}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over a state, in place: captured graphs hold on to its memory."""
        self.model.load_state_dict(state["model"])
        for (_, places), memory in zip(self.weights_and_gradients.groups, self.optimizer.state, strict=True):
            for key, value in state["optimizer"].items():
                if isinstance(value, dict):
                    for name, part in places.split(memory[key]).items():
                        part.copy_(value[name])
                else:
                    memory[key].copy_(value)

    def _loss(self, logits: Tensor, labels: Tensor, mask: Tensor | None) -> Tensor:
        """The mean over the rows that count, each weighed by its class."""
        reduction = "mean" if mask is None else "none"
        weight = self.class_weight
        if self.model.config.classes == 2:
            losses = nn.functional.binary_cross_entropy_with_logits(
                logits, labels.float(), pos_weight=weight, reduction=reduction
            )
            return losses if mask is None else (losses * mask).sum() / mask.sum()
        losses = nn.functional.cross_entropy(logits, labels, weight, reduction=reduction)
        if mask is None:
            return losses
        return (losses * mask).sum() / (mask if weight is None else mask * weight[labels]).sum()

    def _autocast(self) -> AbstractContextManager[None]:
        if self.config.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)


class FixedSteps:
    """Steps of a few fixed shapes whose inputs lie on the device: each shape is one CUDA graph.

    A batch is as large as the largest of the epoch, its missing rows repeat a row and do not count; its steps are
    rounded up to one of at most BUCKETS lengths. Padding never changes an answer, so neither does this.
    """

    def __init__(self, member: Member, graphs: bool) -> None:
        self.member = member
        count = -(-len(member.train) // member.config.batch_size)
        size = -(-len(member.train) // count)
        self.width = -(-member.train.longest() // BUCKETS)
        self.lengths = None if member.train.uniform else member.train.lengths
        self.rows = torch.zeros(count, size, dtype=torch.long, device=member.device)  # of each batch of the epoch
        self.mask = torch.zeros(count, size, device=member.device)
        self.turn = torch.zeros(1, dtype=torch.long, device=member.device)  # the batch that comes next
        self.reason: str | None = None if graphs and member.device.type == "cuda" else "not asked for"
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle() if self.reason is None else None

    def get_ready(self, parts: list[NDArray[np.int64]]) -> None:
        """Lay out the epoch's batches on the device and capture the shapes that are new."""
        rows, mask = np.zeros(self.rows.shape, np.int64), np.zeros(self.mask.shape, np.float32)
        for turn, part in enumerate(parts):
            rows[turn] = self.member.train.rows[part[0]]
            rows[turn, : len(part)] = self.member.train.rows[part]
            mask[turn, : len(part)] = 1
        self.rows.copy_(torch.from_numpy(rows))
        self.mask.copy_(torch.from_numpy(mask))
        for part in parts:
            steps = self._rounded(part)
            if self.reason is None and steps not in self.graphs:
                self._capture(steps)

    def steps(self, parts: list[NDArray[np.int64]]) -> Iterator[Callable[[], None]]:
        self.turn.zero_()
        for part in parts:
            steps = self._rounded(part)
            yield self.graphs[steps].replay if steps in self.graphs else lambda steps=steps: self.step(steps)  # type: ignore[misc]

    def step(self, steps: int) -> None:
        """One training step over the batch whose turn it is; waits for nothing, so that it can be captured."""
        train = self.member.train
        rows = self.rows.index_select(0, self.turn)[0]
        mask = self.mask.index_select(0, self.turn)[0]
        self.turn += 1
        values = train.values[:steps].index_select(1, rows)
        lengths = None if self.lengths is None else self.lengths.index_select(0, rows)
        self.member.step(Batch(values, lengths, train.labels.index_select(0, rows), np.empty(0, np.int64)), mask)

    def _rounded(self, part: NDArray[np.int64]) -> int:
        longest = self.member.train.longest()
        return min(longest, -(-self.member.train.longest(part) // self.width) * self.width)

    def _capture(self, steps: int) -> None:
        """Capture one shape; a shape that cannot be captured is no error: its steps run one operation at a time."""
        before = self.member.state()
        self.turn.zero_()
        try:
            with capturing:
                self.graphs[steps] = self._captured(steps)
        except RuntimeError as error:
            self.reason = f"{type(error).__name__}: {error}"
            log.warning("steps run without CUDA graphs: %s", self.reason)
        finally:
            self.member.restore(before)

    def _captured(self, steps: int) -> torch.cuda.CUDAGraph:
        for _ in range(WARM_UP):
            self.step(steps)
            self.turn.zero_()
        torch.cuda.current_stream(self.member.device).synchronize()
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self.member.generator)
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            self.step(steps)
        finally:
            graph.capture_end()
        return graph


@dataclass(frozen=True)
class Places:
    """Where the weights lie in a buffer: name to (start, shape)."""

    of: dict[str, tuple[int, torch.Size]]

    def split(self, buffer: Tensor) -> dict[str, Tensor]:
        """The buffer's content by name, as views."""
        return {name: buffer[start : start + shape.numel()].view(shape) for name, (start, shape) in self.of.items()}


class Flat:
    """A model's weights in one buffer and their gradients in another, so that clipping and the optimiser are a kernel
    or two whatever the number of weights. On a GPU the LSTM's weights stay in the buffer that cuDNN laid out.
    """

    def __init__(self, model: Classifier) -> None:
        named = dict(model.named_parameters())
        lstm = {name: weight for name, weight in named.items() if name.startswith("lstm.")}
        rest = {name: weight for name, weight in named.items() if name not in lstm}
        laid_out = len({weight.untyped_storage().data_ptr() for weight in lstm.values()}) == 1 < len(lstm)
        self.groups = [_laid_out(lstm), _side_by_side(rest)] if laid_out else [_side_by_side(named)]
        self.buffers = [buffer for buffer, _ in self.groups]
        self.gradients = [torch.zeros_like(buffer) for buffer in self.buffers]
        for (buffer, places), gradient in zip(self.groups, self.gradients, strict=True):
            buffer.grad = gradient
            for name, part in places.split(gradient).items():
                named[name].grad = part

    def zero_gradients(self) -> None:
        for gradient in self.gradients:
            gradient.zero_()

    def clip(self, most: float) -> None:
        """Scale the gradients down to a norm of at most `most`, all weights taken together."""
        norms = [torch.linalg.vector_norm(gradient) for gradient in self.gradients]
        norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
        if norm.device.type == "cpu" and float(norm) < most - 2 * CLIP_EPSILON:
            return  # the factor would be 1; on a GPU to ask would be to wait
        scale = (most / (norm + CLIP_EPSILON)).clamp(max=1.0)
        for gradient in self.gradients:
            gradient.mul_(scale)


def _side_by_side(weights: dict[str, nn.Parameter]) -> tuple[nn.Parameter, Places]:
    buffer = torch.cat([weight.detach().reshape(-1) for weight in weights.values()])
    starts = np.cumsum([0, *(weight.numel() for weight in weights.values())])
    places = Places(
        {name: (int(at), weight.shape) for at, (name, weight) in zip(starts, weights.items(), strict=False)}
    )
    for name, part in places.split(buffer).items():
        weights[name].data = part
    return nn.Parameter(buffer), places


def _laid_out(weights: dict[str, nn.Parameter]) -> tuple[nn.Parameter, Places]:
    """Weights that share one storage already, gaps between them set to zero."""
    values = {name: weight.detach().clone() for name, weight in weights.items()}
    storage = next(iter(weights.values())).untyped_storage()
    like = next(iter(values.values()))
    buffer = torch.empty(0, dtype=like.dtype, device=like.device).set_(storage)
    buffer.zero_()
    for name, weight in weights.items():
        weight.detach().copy_(values[name])
    return nn.Parameter(buffer), Places({name: (int(w.storage_offset()), w.shape) for name, w in weights.items()})


def _class_weight(train: Batches, classes: int, config: TrainingConfig) -> Tensor | None:
    """Binary: the weight of class 1 against class 0; else one weight a class."""
    if config.class_weight == "none":
        return None
    rows = torch.from_numpy(train.rows).to(train.labels.device)
    counts = torch.bincount(train.labels[rows], minlength=classes).clamp(min=1).float()
    return counts[0] / counts[1] if classes == 2 else counts.sum() / (classes * counts)
