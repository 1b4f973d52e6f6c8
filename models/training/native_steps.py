"""A member's epochs and validations in native code: batches by the dozen in one call that holds no Python lock.

What it computes is what `Learner.step` and `Classifier.logits` do, to rounding; dropout and noise have random numbers
of their own (see kernel/random.h). Weights, gradients and the optimiser's memory are the learner's tensors, so that
checkpoints are the same.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hpo.models.config import ClassifierConfig
from hpo.models.data.buffers import is_large
from hpo.models.kernel.native import Kernel
from hpo.models.kernel.structs import OPTIMIZERS, POOLINGS, Data, Network, NetworkBatches, TrainingSettings
from hpo.models.training.batches import Batches
from hpo.models.training.learner import Learner
from hpo.models.training.optimizers import MEMORY

SECONDS = 0.02  # of a call, about: how long a signal or a stop request may wait
VALIDATION_BATCH = 64  # sequences: their steps fit into a core's cache


class Memory:
    """What a batch takes, for all members of a training: they run one after another."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def at_least(self, size: int) -> int:
        """The address of so many bytes."""
        if len(self._memory) < size:
            self._memory = torch.empty(size, dtype=torch.uint8)
        return self._memory.data_ptr()


class NativeSteps:
    """The steps of one member, whose learner and two parts of the data it keeps."""

    def __init__(self, kernel: Kernel, learner: Learner, train: Batches, validation: Batches, memory: Memory) -> None:
        self._kernel, self._learner, self._memory = kernel, learner, memory
        self._train, self._validation = train, validation
        model, parameters = learner.model, learner.parameters
        (buffer, layout), *others = parameters.groups
        assert not others  # on a CPU all weights lie in one buffer
        places = [layout.of[name][0] for name in weight_names(model.config)]
        self._places = np.array(places, np.int64)
        layers = [] if model.stem is None else list(model.stem.layers)
        running: list[Any] = [pointer for each in layers for pointer in (each.running_mean, each.running_variance)]
        self._running = (ctypes.c_void_p * max(1, len(running)))(*(tensor.data_ptr() for tensor in running))
        self._network = _network(model.config)
        self._network.weights, self._network.gradients = buffer.data_ptr(), parameters.gradients[0].data_ptr()
        self._network.places = self._places.ctypes.data
        self._network.running = ctypes.cast(self._running, ctypes.c_void_p)
        self._settings = self._training_settings()

    def epoch(
        self, batches: list[NDArray[np.int64]], shares: list[NDArray[np.float32]] | None, seed: int
    ) -> Iterator[Callable[[], int]]:
        """Calls that each train some of these batches of the training part, for about SECONDS, and say how many. The
        learner's `loss_sum` grows by the losses of their rows.

        shares: of each sequence in its mixture; None: none are mixed. seed: of all that is random in this epoch.
        """
        rows = np.ascontiguousarray(self._train.rows[np.concatenate(batches)])
        ends = np.cumsum([len(batch) for batch in batches])
        mixed = None if shares is None else np.concatenate(shares)
        asked = NetworkBatches(rows.ctypes.data, ends.ctypes.data, None, len(batches), 0, seed, SECONDS)
        if mixed is not None:
            asked.shares = mixed.ctypes.data
        self._settings.rate = self._learner.optimizer.rate
        data, loss = _data(self._train), self._learner.loss_sum
        largest = max(map(len, batches))
        size = self._kernel.network_bytes(self._network, largest, self._train.longest(), 1)
        memory = self._memory.at_least(size)

        def some() -> int:
            begun = asked.first
            asked.first = self._kernel.network_train(
                self._network, data, self._settings, asked, loss.data_ptr(), memory
            )
            return int(asked.first - begun)

        while asked.first < asked.count:
            yield some

    def logits(self) -> Tensor:
        """Of the sequences of the validation part, (n,) or (n, K)."""
        part, outputs = self._validation, self._learner.model.config.outputs
        order = part.by_length()
        rows = np.ascontiguousarray(part.rows[order])
        ends = np.append(np.arange(VALIDATION_BATCH, len(rows), VALIDATION_BATCH), len(rows))
        asked = NetworkBatches(rows.ctypes.data, ends.ctypes.data, None, len(ends), 0, 0, 0.0)
        found = torch.empty(len(rows), outputs)
        largest = min(VALIDATION_BATCH, len(rows))
        memory = self._memory.at_least(self._kernel.network_bytes(self._network, largest, part.longest(), 0))
        self._kernel.network_predict(self._network, _data(part), asked, found.data_ptr(), memory)
        result = torch.empty_like(found)
        result[torch.from_numpy(order)] = found
        return result.squeeze(1) if outputs == 1 else result

    def _training_settings(self) -> TrainingSettings:
        learner, config = self._learner, self._learner.config
        state = learner.optimizer.state[0]
        first, *second = (state[name].data_ptr() for name in MEMORY[config.optimizer])
        settings = TrainingSettings(
            *(OPTIMIZERS.index(config.optimizer), learner.parameters.buffers[0].numel()),
            *(config.learning_rate, config.weight_decay, config.gradient_clip, config.label_smoothing),
            *(first, second[0] if second else None, state["step"].data_ptr() if "step" in state else None),
        )
        if learner.class_weight is not None:
            settings.class_weight = learner.class_weight.data_ptr()
        if learner.noise is not None:
            self._added = learner.noise.added.contiguous()
            self._factor = torch.as_tensor(learner.noise.factor).expand_as(self._added).contiguous()
            settings.added, settings.factor = self._added.data_ptr(), self._factor.data_ptr()
            if learner.noise.places is not None:
                self._drawn = learner.noise.places.contiguous()
                settings.drawn = self._drawn.data_ptr()
        return settings


def weight_names(config: ClassifierConfig) -> list[str]:
    """A classifier's weights in the order of the places in network.h."""
    names = [
        f"stem.layers.{i}.{kind}" for i in range(len(config.convolutions)) for kind in ("weight", "scale", "shift")
    ]
    names += [
        f"lstm.{kind}_l{layer}{suffix}"
        for layer in range(config.layers)
        for suffix in (("", "_reverse") if config.bidirectional else ("",))
        for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    ]
    if config.pooling == "attention":
        names += ["attention.weight", "attention.bias"]
    heads = ("head.0", "head.3") if config.head_size else ("head",)
    return names + [f"{head}.{kind}" for head in heads for kind in ("weight", "bias")]


def _network(config: ClassifierConfig) -> Network:
    stem = config.stem == "conv"
    return Network(
        channels=config.channels * config.folded,
        stem_layers=config.stem_layers if stem else 0,
        stem_width=config.stem_width,
        stem_kernel=config.stem_kernel,
        stem_stride=config.stem_stride,
        hidden=config.hidden_size,
        layers=config.layers,
        directions=1 + config.bidirectional,
        pooling=POOLINGS.index(config.pooling),
        skip=config.skip,
        head=config.head_size,
        outputs=config.outputs,
        dropout=config.dropout,
    )


def _data(part: Batches) -> Data:
    step, sequence, _ = part.values.stride()
    weights = None if part.weights is None else part.weights.data_ptr()
    mapped = is_large(part.values.nbytes)
    return Data(
        part.values.data_ptr(), step, sequence, part.lengths.data_ptr(), part.labels.data_ptr(), weights, mapped
    )
