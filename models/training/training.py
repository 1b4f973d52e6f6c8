"""One trial's training: an epoch, a validation, a checkpoint, an exact resume.

A `Training` holds the trial's members: one model for a single validation part, k that train epoch by epoch for k folds.
Each epoch trains every member on its own training part, and the metric is taken over the pooled validation
predictions. Nothing random is kept between epochs: initial weights, the order of batches and dropout are
functions of (seed, member, epoch), the learning rate of the epochs so far, so a checkpoint of weights and
optimiser resumes exactly.
"""

from __future__ import annotations

import io
import math
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hpo.errors import HpoError
from hpo.models.classifier import Classifier, Weights
from hpo.models.config import ClassifierConfig, TrainingConfig
from hpo.models.data.sequences import Sequences
from hpo.models.device import device_errors, is_gpu
from hpo.models.kernel.native import LARGEST, Kernel
from hpo.models.metrics import choose_threshold, direction, score
from hpo.models.seeds import derive
from hpo.models.training.batches import Batches
from hpo.models.training.member import Member
from hpo.models.training.memory import memory_bytes
from hpo.models.training.native_steps import Memory
from hpo.models.training.origin import origin_of
from hpo.models.training.prepared import Given
from hpo.models.training.schedules import learning_rate

MIB = 2**20
Rows = NDArray[np.int64]  # of a data set
_own = threading.local()  # each thread's streams: what one captures no other may write into
_initialising = threading.Lock()  # first weights are drawn from torch's own random state


class Diverged(HpoError):
    """Loss, gradients or predictions stopped being finite numbers."""


class StateError(HpoError):
    """These bytes are no state of this training, or these weights none of its network."""


class TrainingInterrupted(Exception):
    """The epoch was given up between two batches, as asked; the last checkpoint is valid."""


@dataclass(frozen=True)
class Epoch:
    """What one epoch gave."""

    number: int  # from 1
    train_loss: float  # mean over the training sequences, all members
    value: float  # the validation metric
    log_loss: float  # of the validation part, breaks ties
    threshold: float  # the decision threshold that goes with the value
    seconds: float
    origin: str = ""  # where it was computed; "" in checkpoints of earlier versions


class Training:
    """One trial in training on one device.

    history: the epochs so far. best: the best of them, best_weights: its members' states. validated (n,): the rows of
    the validation parts, pooled in the order of the folds; labels and row_weights (n,): theirs. bytes: an estimate of
    the memory that it takes. origin: where it computes.

    Trainings may run beside one another in one process, each in a thread of its own: nothing random is shared, and on
    a GPU each one has a stream of its own.
    """

    def __init__(
        self,
        sequences: Sequences,
        folds: Sequence[tuple[Rows, Rows]],
        classifier: ClassifierConfig,
        config: TrainingConfig,
        device: str = "cpu",
        *,
        kernel: Kernel | None = None,
        graphs: bool = True,
        fixed_shapes: bool | None = None,
        columns: Sequence[int] | None = None,
    ) -> None:
        """sequences: the whole training file; folds: one (training rows, validation rows) pair a member.

        kernel: native code, for float32 on a CPU and sizes where it is the faster one; None: torch.
        graphs: on a GPU, replay captured steps; else, or where capture fails, run them one operation at a time: the
        bits are the same. fixed_shapes: steps of a few fixed shapes (see `FixedSteps`); None: on a GPU. columns: (F,)
        the place of each feature in an order that is not the file's, by which it gets its first weights.
        Raises OutOfMemory and DeviceLost, as do all calls that use the device.
        """
        assert sequences.labels is not None
        self.config, self.classifier = config, classifier
        self.device = torch.device(device)
        validated = max(len(validation) for _, validation in folds)
        self.bytes = memory_bytes(sequences.n, validated, len(folds), classifier, config.batch_size, self.device.type)
        self.validated = np.concatenate([validation for _, validation in folds])
        self.labels = sequences.labels[self.validated]
        self.row_weights = None if sequences.weights is None else sequences.weights[self.validated]
        self.history: list[Epoch] = []
        self.best: Epoch | None = None
        self.best_weights: list[Weights] = []
        self.batches = 0  # trained since this object was made
        gpu = is_gpu(self.device)
        fits = not gpu and config.precision == "float32" and classifier.hidden_size <= LARGEST
        self.kernel = kernel if fits else None
        self.origin = origin_of(self.device, self.lstm_kernel)
        self._stream = _own_stream(self.device) if gpu else None
        with self._on_device():
            fixed = gpu if fixed_shapes is None else fixed_shapes
            self.members = self._members(sequences, folds, fixed, graphs, columns)
        learners = [member.learner for member in self.members]
        self.parameters = sum(weight.numel() for learner in learners for weight in learner.model.parameters())
        self.fused = learners[0].optimizer.fused

    @property
    def lstm_kernel(self) -> str:
        """What runs the LSTM: the name of a native kernel's build, or torch."""
        return "torch" if self.kernel is None else self.kernel.name

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

        Raises TrainingInterrupted as soon as `interrupted()` is true between two batches, and Diverged.
        After any of them the object is in the middle of an epoch: `restore` a checkpoint or drop it.
        """
        started = time.perf_counter()
        number = len(self.history) + 1
        with self._on_device():
            self._train(number, interrupted)
            probabilities = self._validate()
            loss = float(torch.stack([member.learner.loss_sum for member in self.members]).sum())
        loss /= sum(len(member.train) for member in self.members)
        _check_finite(number, loss, probabilities)
        threshold = self._threshold(probabilities)
        value = score(self.config.metric, probabilities, self.labels, threshold, self.row_weights)
        log_loss = score("log_loss", probabilities, self.labels, weights=self.row_weights)
        epoch = Epoch(number, loss, value, log_loss, threshold, time.perf_counter() - started, self.origin)
        self.history.append(epoch)
        if self._is_best(epoch):
            self.best = epoch
            self.best_weights = self.weights()
        return epoch

    def validate(self) -> NDArray[np.float64]:
        """Each member's probabilities (rows of its validation part, K), pooled in the order of the folds."""
        with self._on_device():
            return self._validate()

    def load(self, members: Sequence[Weights]) -> None:
        """Put these weights into the members, to `validate` them. Raises StateError where they do not fit."""
        if len(members) != len(self.members):
            raise StateError(f"weights of {len(self.members)} members are needed, got those of {len(members)}")
        for member, weights in zip(self.members, members, strict=True):
            _check_fit(member.learner.weights(), weights)
        with self._on_device():
            for member, weights in zip(self.members, members, strict=True):
                member.learner.model.load_state_dict(weights)

    def weights(self) -> list[Weights]:
        """Each member's state, on the CPU."""
        with self._on_device():
            return [member.learner.weights() for member in self.members]

    def state(self) -> bytes:
        """A checkpoint: everything that the next epoch depends on. Devices may take it from one another."""
        with self._on_device():
            members = [member.learner.state() for member in self.members]
        content = {
            "history": [vars(epoch) for epoch in self.history],
            "best": None if self.best is None else self.best.number,
            "best_weights": self.best_weights,
            "members": members,
        }
        buffer = io.BytesIO()
        torch.save(content, buffer)
        return buffer.getvalue()

    def restore(self, checkpoint: bytes) -> None:
        """Go on where `state()` was taken: the next epoch gives the same bits as without the break.

        checkpoint: of `state`, of a training of the same data and configurations on any device. Raises StateError for
        other bytes; then the training is as it was.
        """
        content = _read_state(checkpoint)
        try:
            history = [Epoch(**epoch) for epoch in content["history"]]
            best = next((epoch for epoch in history if epoch.number == content["best"]), None)
            best_weights, states = content["best_weights"], content["members"]
            for member, state in zip(self.members, states, strict=True):
                _check_fit(member.learner.state(), state)
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise StateError(f"it is no state of this training: {error}") from error
        self.history, self.best, self.best_weights = history, best, best_weights
        with self._on_device():
            for member, state in zip(self.members, states, strict=True):
                member.learner.restore(state)

    def close(self) -> None:
        """Let go of all memory, in the thread that trained; the history and the best weights stay."""
        members, self.members = self.members, []
        with self._on_device():
            for member in members:
                member.close()

    def __enter__(self) -> Training:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _train(self, number: int, interrupted: Callable[[], bool]) -> None:
        rate = learning_rate(self.config, [epoch.log_loss for epoch in self.history])
        for member in self.members:
            for step in member.epoch(number, rate):
                if interrupted():
                    raise TrainingInterrupted
                self.batches += step()

    def _validate(self) -> NDArray[np.float64]:
        return torch.cat([member.validate() for member in self.members]).cpu().numpy().astype(np.float64)

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        """Run on this training's stream; errors of the device become OutOfMemory or DeviceLost."""
        with device_errors(self.device, self._size):
            if self._stream is None:
                yield
                return
            # Backward passes run in this thread. torch would run those of all slots in one thread of the device, with
            # one handle of cuDNN, and what one slot does with its streams would end another's capture.
            with torch.cuda.stream(self._stream), torch.autograd.set_multithreading_enabled(False):
                yield

    def _size(self) -> str:
        shape, config = self.classifier, self.config
        return (
            f"hidden_size {shape.hidden_size}, layers {shape.layers}, batch_size {config.batch_size}, up to "
            f"{shape.patches} steps of {shape.inputs} values, bidirectional={shape.bidirectional}: some "
            f"{self.bytes / MIB:.0f} MiB; allow smaller sizes in [space], or fewer slots or workers on this device"
        )

    def _members(
        self,
        sequences: Sequences,
        folds: Sequence[tuple[Rows, Rows]],
        fixed_shapes: bool,
        graphs: bool,
        columns: Sequence[int] | None,
    ) -> list[Member]:
        given = Given(sequences, self.classifier)
        labels = torch.from_numpy(sequences.labels).to(self.device)
        variable = bool((sequences.lengths != sequences.lengths[0]).any())
        places = None
        if columns is not None:  # of the numbers of a patch, step by step
            channels = _channels(self.classifier, columns)
            steps = [
                at + channel
                for at in range(0, self.classifier.folded * len(channels), len(channels))
                for channel in channels
            ]
            places = torch.tensor(steps, device=self.device)
        found: list[Member] = []
        memory = Memory()
        whole: tuple[torch.Tensor, torch.Tensor] | None = None  # what members share that prepare their data alike
        for index, (train, validation) in enumerate(folds):
            model = _model(self.classifier, derive("weights", self.config.seed, index), columns)
            given.fit_normalization(model, train)
            model.place(self.device, variable=variable)
            model.kernel = self.kernel
            if whole is None or self.classifier.normalization == "channel":
                native = self.kernel is not None and not fixed_shapes  # reads a sequence's steps one after another
                whole = given.prepare(model, self.device, by_sequence=native)
            parts = Batches(*whole, labels, train, sequences.weights), Batches(*whole, labels, validation)
            kinds: dict[str, Any] = {"fixed_shapes": fixed_shapes, "graphs": graphs, "places": places}
            found.append(Member(model, *parts, self.config, index, memory=memory, **kinds))
        return found

    def _threshold(self, probabilities: NDArray[np.float64]) -> float:
        if self.config.threshold == "half" or probabilities.shape[1] != 2:
            return 0.5
        return choose_threshold(probabilities, self.labels, self.config.metric, self.row_weights)

    def _is_best(self, epoch: Epoch) -> bool:
        """Whether the latest epoch is the best so far: of those whose metric is no worse than the top by more than
        half a validation sequence's share, the one with the lowest log-loss. A ranking metric on some dozens of
        sequences soon reaches its maximum, long before the log-loss reaches its minimum.
        """
        sign = 1.0 if direction(self.config.metric) == "maximize" else -1.0
        alike = 0.0 if self.config.metric == "log_loss" else 0.5 / len(self.labels)
        least = max(sign * past.value for past in self.history) - alike
        if self.best is None or sign * self.best.value < least:
            return True
        return sign * epoch.value >= least and epoch.log_loss < self.best.log_loss


def _check_finite(number: int, loss: float, probabilities: NDArray[np.float64]) -> None:
    if not math.isfinite(loss):
        raise Diverged(f"the training loss became {loss} in epoch {number}")
    if not np.isfinite(probabilities).all():
        raise Diverged(f"validation predictions are not finite numbers after epoch {number}")


def _read_state(checkpoint: bytes) -> dict[str, Any]:
    """What `Training.state` wrote: a zip archive, whose entries have checksums. Raises StateError."""
    try:
        with zipfile.ZipFile(io.BytesIO(checkpoint)) as archive:
            damaged = archive.testzip()
        if damaged is None:
            content: dict[str, Any] = torch.load(io.BytesIO(checkpoint), map_location="cpu", weights_only=True)
            return content
    except MemoryError:
        raise
    except Exception as error:  # whatever torch makes of it
        raise StateError(f"{len(checkpoint)} bytes are no state of a training") from error
    raise StateError(f"the checksum of its part {damaged} is wrong")


def _check_fit(own: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raise StateError unless `given` has the names and shapes of `own`, in the dictionaries within it, too."""
    if own.keys() != given.keys():
        raise StateError(f"it has {sorted(given)} where this training has {sorted(own)}")
    for name, value in own.items():
        if isinstance(value, Mapping):
            _check_fit(value, given[name])
        elif value.shape != given[name].shape:
            raise StateError(f"{name} has shape {tuple(given[name].shape)}, this training's {tuple(value.shape)}")


def _own_stream(device: torch.device) -> torch.cuda.Stream:
    """This thread's stream on the device. torch has 32 a device before it hands out the same one again."""
    streams: dict[torch.device, torch.cuda.Stream] = _own.__dict__.setdefault("streams", {})
    if device not in streams:
        streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return streams[device]


def _channels(config: ClassifierConfig, columns: Sequence[int]) -> list[int]:
    """(C,) the place of each channel in an order by the features' places (F,)."""
    return [at + column for at in range(0, config.channels, config.features) for column in columns]


def _model(config: ClassifierConfig, seed: int, columns: Sequence[int] | None) -> Classifier:
    """A network whose first weights are a function of the seed; torch's own random state is left alone.

    columns: see `Training`.
    """
    with torch.random.fork_rng(devices=[]), _initialising:
        torch.manual_seed(seed)
        model = Classifier(config)
    if columns is not None:
        with torch.no_grad():
            channels = _channels(config, columns)
            if model.stem is not None:
                first = next(model.stem.parameters())  # (W, C, k)
                first.copy_(first[:, channels])
                return model
            reading: list[torch.Tensor] = [
                weight for name, weight in model.lstm.named_parameters() if name.startswith("weight_ih_l0")
            ]
            if config.skip:
                reading.append(next(model.head.parameters())[:, -2 * config.inputs :])
            for weight in reading:  # (rows, P*C), a patch step by step; of the skip connection twice that
                by_channel = weight.reshape(-1, config.channels)
                weight.copy_(by_channel[:, channels].view(weight.shape))
    return model
