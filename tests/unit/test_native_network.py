"""A member's epochs in native code are those of torch: the same network, losses, gradients, updates and predictions."""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hpo.models.classifier import Classifier
from hpo.models.config import ClassifierConfig, TrainingConfig
from hpo.models.fields import rules
from hpo.models.kernel import native
from hpo.models.kernel.native import Kernel
from hpo.models.seeds import derive
from hpo.models.stem import StemLayer
from hpo.models.training.augmentation import Noise
from hpo.models.training.batches import Batch
from hpo.models.training.training import Training
from tests.unit.test_training import AUGMENTED, CONVOLUTIONS, MASKED, kernel, run, sequences, training

__all__ = ["kernel"]  # the fixture

FARTHER = 8.0  # than torch's float32 from float64, at most; see test_native.py
ONE_ROUNDING = 2.0**-23
POOLINGS = rules(ClassifierConfig)["pooling"].names
OPTIMIZERS = rules(TrainingConfig)["optimizer"].names


def threefry(seed: int, batch: int, site: int, rows: int, width: int) -> np.ndarray:
    """The 32-bit numbers (rows, width) of random.h, written as its source says it."""
    blocks = -(-width // 32)
    counters = np.arange(rows * blocks * 16, dtype=np.uint32).reshape(rows, blocks, 16)
    low, high = np.uint32(seed & 0xFFFFFFFF), np.uint32(seed >> 32)
    keys = (low, high, np.uint32(0x1BD11BDA) ^ low ^ high)
    with np.errstate(over="ignore"):
        x, y = counters + keys[0], np.full_like(counters, batch * 64 + site) + keys[1]
        for group in range(5):
            for by in ((13, 15, 26, 6), (17, 29, 16, 24))[group % 2]:
                x = x + y
                y = ((y << np.uint32(by)) | (y >> np.uint32(32 - by))) ^ x
            x = x + keys[(group + 1) % 3]
            y = y + keys[(group + 2) % 3] + np.uint32(group + 1)
    return np.concatenate([x, y], 2).reshape(rows, blocks * 32)[:, :width]


def normal(bits: Callable[[int], np.ndarray], width: int) -> np.ndarray:
    """Normal numbers (rows, width) from the bits of as many rows."""
    whole = bits(-(-width // 32) * 32)
    words = whole.reshape(len(whole), -1, 2, 16)
    radius = np.sqrt(-2 * np.log(((words[:, :, 0] >> 8) + 0.5) / 2**24))
    angle = (words[:, :, 1] >> 8) / 2**24 * 2 * np.pi
    both = np.stack([radius * np.cos(angle), radius * np.sin(angle)], 2)
    return both.reshape(len(whole), -1)[:, :width]


class Numbers:
    """Where torch's training takes random numbers from, so that they are the native ones."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seed = self.batch = self.site = 0
        monkeypatch.setattr("hpo.models.classifier.drop", self.drop)
        monkeypatch.setattr(Noise, "drawn", lambda noise, like, _: self.drawn(noise, like))

    def bits(self, rows: int, width: int) -> np.ndarray:
        found = threefry(self.seed, self.batch, self.site, rows, width)
        self.site += 1
        return found

    def drop(self, values: Tensor, probability: float, _: object) -> Tensor:
        if not probability:
            return values
        bits = self.bits(values[..., 0].numel(), values.shape[-1])
        kept = torch.from_numpy(bits >= int(probability * 2**32)).view(values.shape)
        return values * kept / (1 - probability)

    def drawn(self, noise: Noise, like: Tensor) -> Tensor:
        found = normal(functools.partial(self.bits, like[..., 0].numel()), like.shape[-1])
        numbers = torch.from_numpy(found).to(like.dtype).view(like.shape)
        return numbers if noise.places is None else numbers.index_select(-1, noise.places)


@pytest.fixture
def numbers(monkeypatch: pytest.MonkeyPatch) -> Numbers:
    return Numbers(monkeypatch)


def torchs_epoch(subject: Training, number: int, numbers: Numbers, rate: float) -> Iterator[Callable[[], int]]:
    """The steps of torch's epoch, with native random numbers."""
    member = subject.members[0]
    numbers.seed = derive("dropout", subject.config.seed, 0, number)
    for batch, step in enumerate(member.epoch(number, rate)):
        numbers.batch, numbers.site = batch, 0
        yield step


def widened(subject: Training) -> Training:
    """The same training in float64: its reference."""
    for member in subject.members:
        learner, model = member.learner, member.learner.model
        assert isinstance(model, Classifier)
        weights = {name: tensor.double() for name, tensor in model.state_dict().items()}
        model.double()
        if model.stem is not None:
            for layer in model.stem.layers:
                assert isinstance(layer, StemLayer)
                layer.batches = None
        model.load_state_dict(weights)
        for part in (member.train, member.validation):
            part.values = part.values.double()
            part.weights = None if part.weights is None else part.weights.double()
        noise = learner.noise
        if noise is not None:
            factor = noise.factor.double() if isinstance(noise.factor, Tensor) else noise.factor
            noise = Noise(noise.added.double(), factor, noise.places)
        learner.__init__(  # type: ignore[misc]
            model, learner.config, member.train.part_labels(), weights=member.train.part_weights(), noise=noise
        )
        learner.loss_sum = learner.loss_sum.double()
        if learner.class_weight is not None:
            learner.class_weight = learner.class_weight.double()
        member.train.batch = functools.partial(_wide_batch, member.train.batch)  # type: ignore[method-assign]
    return subject


def _wide_batch(batch: Callable[..., Batch], *given: Any) -> Batch:
    found = batch(*given)
    return found if found.shares is None else replace(found, shares=found.shares.double())


def gradients(subject: Training) -> dict[str, Tensor]:
    parameters = subject.members[0].learner.parameters
    (gradient,), ((_, layout),) = parameters.gradients, parameters.groups
    return {name: part.clone() for name, part in layout.split(gradient).items()}


def first_step(subject: Training, numbers: Numbers | None) -> dict[str, Tensor]:
    """Gradients, loss and running statistics after one batch, whose step does not move the weights."""
    learner = subject.members[0].learner
    steps = torchs_epoch(subject, 1, numbers, 0.0) if numbers else subject.members[0].epoch(1, 0.0)
    next(iter(steps))()
    running = {name: value.clone() for name, value in learner.model.named_buffers() if "running" in name}
    return gradients(subject) | {"loss": learner.loss_sum.detach().clone()} | running


def held(make: Callable[..., Training], kernel: Kernel, numbers: Numbers) -> None:
    """One batch, native and by torch in float32 and float64: what was computed, and predictions of what it left."""
    given = {"batch_size": 10**6}  # one batch: native code trains as many as it has time for
    own, theirs, exact = make(kernel=kernel, **given), make(**given), widened(make(**given))
    found, other = first_step(own, None), first_step(theirs, numbers)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "float", Tensor.double)  # what torch computes with in float32
        torch.set_default_dtype(torch.float64)
        try:
            right = first_step(exact, numbers)
        finally:
            torch.set_default_dtype(torch.float32)
    for name, value in right.items():
        rounded = ONE_ROUNDING * float(value.abs().max())
        allowed = max(float((other[name].double() - value).abs().max()), rounded, 1e-7)
        off = float((found[name].double() - value).abs().max())
        assert off <= FARTHER * allowed, (name, off, allowed)
    np.testing.assert_allclose(own.validate(), exact.validate(), atol=2e-5, rtol=2e-5)


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped": {"gradient_clip": 0.01},
    "two layers": {"layers": 2, "dropout": 0.4},
    "three layers of two directions": {"layers": 3, "dropout": 0.4, "bidirectional": True, "pooling": "mean"},
    "head": {"head_size": 5, "dropout": 0.3},
    "wide head": {"head_size": 70, "dropout": 0.3, "pooling": "concat", "bidirectional": True, "hidden_size": 33},
    "patches": {"patch_length": 3, "skip": True, "pooling": "max"},
    "convolutions": CONVOLUTIONS,
    "deep convolutions": CONVOLUTIONS | {"stem_layers": 4, "stem_width": 37, "stem_kernel": 4, "stem_stride": 1},
    "one step of convolutions": CONVOLUTIONS | {"stem_layers": 3, "stem_kernel": 1, "stem_stride": 7},
    "convolutions, all": CONVOLUTIONS | {"bidirectional": True, "pooling": "attention", "head_size": 9, "dropout": 0.2},
    "augmented": AUGMENTED,
    "augmented convolutions": AUGMENTED | CONVOLUTIONS,
    "marks": MASKED | AUGMENTED,
    "balanced": {"class_weight": "balanced", "label_smoothing": 0.2},
    "balanced mixtures": {"class_weight": "balanced", "label_smoothing": 0.2, "mixup": 0.5},
    "large": {"hidden_size": 130, "batch_size": 40},
    "one unit": {"hidden_size": 1, "bidirectional": True},
}  # fmt: skip


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("variable", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_a_step_is_torchs(kernel: Kernel, numbers: Numbers, name: str, variable: bool, classes: int) -> None:
    data = sequences(classes, variable)
    held(lambda **given: training(data, **(CASES[name] | given)), kernel, numbers)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_every_pooling(kernel: Kernel, numbers: Numbers, pooling: str, bidirectional: bool) -> None:
    data = sequences(3, variable=pooling != "flatten")
    given: dict[str, Any] = {"pooling": pooling, "bidirectional": bidirectional, "layers": 2, "skip": True}
    held(lambda **more: training(data, **(given | more)), kernel, numbers)


@pytest.mark.parametrize("weights", [[1.0, 2.0, 0.0, 5.0], [0.0, 1.0]])
@pytest.mark.parametrize("mixup", [0.0, 0.4])
def test_weighted_sequences(kernel: Kernel, numbers: Numbers, weights: list[float], mixup: float) -> None:
    data = sequences(3)
    data = replace(data, weights=np.resize(weights, data.n).astype(float))
    held(lambda **given: training(data, mixup=mixup, class_weight="balanced", **given), kernel, numbers)


@st.composite
def configurations(draw: st.DrawFn) -> tuple[int, bool, int, dict[str, Any]]:
    """Classes, whether lengths vary, sequences, and all else that a training may be given."""
    variable, conv = draw(st.booleans()), draw(st.booleans())
    poolings = [pooling for pooling in POOLINGS if pooling != "flatten" or not variable]
    given: dict[str, Any] = {
        "hidden_size": draw(st.integers(1, 70)),
        "layers": draw(st.integers(1, 3)),
        "bidirectional": draw(st.booleans()),
        "pooling": draw(st.sampled_from(poolings)),
        "skip": draw(st.booleans()),
        "head_size": draw(st.sampled_from([0, 1, 17])),
        "dropout": draw(st.sampled_from([0.0, 0.3])),
        "difference": draw(st.booleans()),
        "class_weight": draw(st.sampled_from(["none", "balanced"])),
        "label_smoothing": draw(st.sampled_from([0.0, 0.1])),
        "mixup": draw(st.sampled_from([0.0, 0.3])),
        "jitter": draw(st.sampled_from([0.0, 0.1])),
        "seed": draw(st.integers(0, 99)),
    }
    if conv:
        given |= {"stem": "conv", "stem_layers": draw(st.integers(1, 3)), "stem_width": draw(st.integers(1, 40))}
        given |= {"stem_kernel": draw(st.integers(1, 6)), "stem_stride": draw(st.integers(1, 4))}
    else:
        given["patch_length"] = draw(st.integers(1, 6))
    return draw(st.integers(2, 4)), variable, draw(st.integers(8, 60)), given


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(configurations())
def test_any_configuration(kernel: Kernel, numbers: Numbers, drawn: tuple[int, bool, int, dict[str, Any]]) -> None:
    classes, variable, n, given = drawn
    data = sequences(classes, variable, n)
    held(lambda **more: training(data, **(given | more)), kernel, numbers)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", ["two layers", "convolutions, all", "augmented", "marks"])
def test_epochs_are_torchs(kernel: Kernel, numbers: Numbers, name: str, optimizer: str) -> None:
    """Three epochs of six batches: losses, values and weights stay together."""
    data, given = sequences(3), CASES[name] | {"optimizer": optimizer, "learning_rate": 1e-3, "weight_decay": 1e-2}
    own, theirs = training(data, kernel=kernel, **given), training(data, **given)
    run(own, 3)
    losses = []
    for number in range(1, 4):
        for step in torchs_epoch(theirs, number, numbers, 1e-3):
            step()
        losses.append(float(theirs.members[0].learner.loss_sum) / len(theirs.members[0].train))
    assert [epoch.train_loss for epoch in own.history] == pytest.approx(losses, rel=2e-4)
    np.testing.assert_allclose(own.validate(), theirs.validate(), atol=2e-3)
    for ours, torchs in zip(own.weights()[0].items(), theirs.weights()[0].items(), strict=True):
        assert ours[0] == torchs[0]
        torch.testing.assert_close(ours[1], torchs[1], atol=2e-3, rtol=2e-2)


def test_every_width_of_vectors_gives_the_same_bits(tmp_path: Path) -> None:
    """So that it may be chosen by a measurement, and no processor of a kind trains other weights than the next."""
    compiler = native._compiler()
    found = []
    for width in (4, 8):
        native._compile_fastest(compiler, tmp_path / f"{width}.so", (width,))
        subjects = [
            training(sequences(3), kernel=Kernel(tmp_path / f"{width}.so", "own"), hidden_size=21, **CASES[name])
            for name in ("convolutions, all", "three layers of two directions", "augmented")
        ]
        found.append([run(subject, 2).weights()[0] for subject in subjects])
    for one, other in zip(*found, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_faster_width_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = native._compiler()
    for width in (4, 8):
        monkeypatch.setattr(native, "_fastest", lambda kernels, width=width: width if len(kernels) == 2 else 0)
        native._compile_fastest(compiler, tmp_path / "both.so", (8, 4))
        native._compile_fastest(compiler, tmp_path / "one.so", (width,))
        assert (tmp_path / "both.so").read_bytes() == (tmp_path / "one.so").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"both.so", "one.so"}


def test_the_width_that_takes_longer_is_not_the_fastest(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = copy.copy(kernel)
    monkeypatch.setattr(native, "MEASUREMENTS", 3)

    def layer(*given: Any, **more: Any) -> Tensor:
        time.sleep(0.2)
        return kernel.layer(*given, **more)

    monkeypatch.setattr(slow, "layer", layer)
    assert native._fastest({8: slow, 4: kernel}) == 4
    assert native._fastest({4: kernel, 8: slow}) == 4
