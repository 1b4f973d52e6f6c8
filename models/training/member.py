"""One model of a trial in training: its learner, its two parts of the data, its epochs.

On a CPU native code trains batch after batch, each cropped to its longest sequence; where it cannot be built or is not
the faster one, torch makes a step for each. On a GPU, where starting a kernel
costs more than most of these kernels do, steps have a few fixed shapes and take their batch from the device, so
that each shape is captured once as a CUDA graph and then replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from hpo.models.classifier import Classifier, to_probabilities
from hpo.models.config import TrainingConfig
from hpo.models.seeds import derive
from hpo.models.training.augmentation import mixing_shares, noise_of
from hpo.models.training.batches import EVALUATION_BATCH, Batches
from hpo.models.training.fixed_steps import FixedSteps
from hpo.models.training.learner import Learner
from hpo.models.training.native_steps import Memory, NativeSteps


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
        places: Tensor | None = None,
        memory: Memory | None = None,
    ) -> None:
        """index: of the fold, one of what its seeds are functions of. fixed_shapes and graphs as for `Training`.
        places: see `Noise`. memory: where the model has a native kernel, that of its batches."""
        self.train, self.validation, self.index = train, validation, index
        noise = noise_of(config, model.config, train.values, train.lengths, train.rows, places)
        weights = train.part_weights()
        self.learner = Learner(model, config, train.part_labels(), weights=weights, noise=noise, waits=not fixed_shapes)
        self.fixed = FixedSteps(self.learner, train, graphs) if fixed_shapes else None
        self.native = None
        if model.kernel is not None and not fixed_shapes:
            self.native = NativeSteps(model.kernel, self.learner, train, validation, memory or Memory())

    def epoch(self, number: int, rate: float) -> Iterator[Callable[[], int]]:
        """The steps of epoch `number` (from 1), each a call that trains a batch, or several, and says how many.

        The learner's `loss_sum` is then the sum of the rows' losses, each as often as it counts.
        """
        learner, config = self.learner, self.learner.config
        batches = self.train.epoch(config.batch_size, config.seed, self.index, number)
        shares = mixing_shares(batches, config, self.index, number)
        learner.model.train()
        if learner.model.stem is not None:
            learner.model.stem.begin_epoch()
        if self.fixed is not None:
            self.fixed.prepare(batches, shares)
        seed = derive("dropout", config.seed, self.index, number)
        learner.generator.manual_seed(seed)
        learner.optimizer.set_rate(rate)
        learner.loss_sum.zero_()
        if self.native is not None:
            yield from self.native.epoch(batches, shares, seed)
            return
        if self.fixed is not None:
            yield from map(_one, self.fixed.steps(batches))
            return
        for place, indices in enumerate(batches):
            batch = self.train.batch(indices, None if shares is None else shares[place])
            yield _one(partial(learner.step, batch))

    def close(self) -> None:
        """End what must end in the thread that trained."""
        if self.fixed is not None:
            self.fixed.close()

    @torch.inference_mode()
    def validate(self) -> Tensor:
        """Probabilities (rows of the validation part, K), on the device."""
        model, device = self.learner.model, self.learner.device
        model.eval()
        if self.native is not None:
            return to_probabilities(self.native.logits())
        result = torch.empty(len(self.validation), model.config.classes, device=device)
        for batch in self.validation.evaluation(EVALUATION_BATCH[device.type]):
            with self.learner.autocast():
                logits = model.logits(batch.values, batch.lengths)
            result[torch.from_numpy(batch.indices).to(device)] = to_probabilities(logits)
        return result


def _one(step: Callable[[], None]) -> Callable[[], int]:
    """A step of one batch that says so."""

    def counted() -> int:
        step()
        return 1

    return counted
