"""Captured steps give the bits of steps that run one operation at a time, whatever the network and however they end."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from hpo.models.machine import one_thread
from hpo.models.metrics import score
from hpo.models.training.memory import release_memory
from hpo.models.training.training import Training, TrainingInterrupted
from tests.gpu.cases import CONFIGURATIONS, Given, advanced, bits, captured, reasons, training
from tests.gpu.emulation import Driver, LostGenerators

RICH: Given = {"layers": 2, "dropout": 0.3, "bidirectional": True, "head_size": 4}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_captured_steps_give_the_bits_of_uncaptured_ones(name: str, device: str) -> None:
    """Every field's values, lengths that vary, two folds: no shape may fail to be captured."""
    given = CONFIGURATIONS[name]
    more: dict[str, Any] = {"folds": 2, "classes": 3}
    with training(given, device, **more) as fast, training(given, device, **more, graphs=False) as slow:
        assert bits(advanced(fast, 5)) == bits(advanced(slow, 5))
        assert reasons(fast) == {None}
        assert captured(fast) > 0
        assert captured(slow) == 0


@pytest.mark.parametrize("class_weight", ["none", "balanced"])
@pytest.mark.parametrize("classes", [2, 3])
def test_captured_steps_weigh_alike(classes: int, class_weight: str, device: str) -> None:
    given: dict[str, Any] = {"classes": classes, "class_weight": class_weight, "weighted": True}
    with training(None, device, **given) as captured, training(None, device, graphs=False, **given) as plain:
        assert bits(advanced(captured)) == bits(advanced(plain))
        assert reasons(captured) == {None}


@pytest.mark.parametrize("variable", [False, True])
def test_every_shape_that_comes_often_is_captured(variable: bool, device: str) -> None:
    with training(RICH, device, folds=2, variable=variable) as subject:
        advanced(subject, 6)
        for member in subject.members:
            assert member.fixed is not None
            batches = member.train.epoch(8, 0, member.index, 1)
            assert {member.fixed._rounded(batch) for batch in batches} <= set(member.fixed.replays)
        assert captured(subject) >= (2 if not variable else 4)


def test_a_checkpoint_goes_into_a_training_whose_steps_are_captured(device: str) -> None:
    with training(RICH, device) as subject, training(RICH, device, graphs=False) as simple:
        advanced(subject, 5)
        checkpoint = subject.state()
        advanced(subject, 2)
        subject.restore(checkpoint)
        advanced(subject, 3)
        assert bits(subject) == bits(advanced(simple, 8))


def test_an_interrupted_epoch_leaves_nothing_behind(device: str) -> None:
    with training(RICH, device) as subject, training(RICH, device, graphs=False) as simple:
        checkpoint = advanced(subject, 4).state()
        begun = subject.batches
        with pytest.raises(TrainingInterrupted):
            subject.advance(lambda: subject.batches == begun + 2)
        subject.restore(checkpoint)
        assert bits(advanced(subject, 2)) == bits(advanced(simple, 6))


@pytest.mark.parametrize("name", [name for name in CONFIGURATIONS if name.startswith("drawn")])
def test_the_best_weights_give_the_recorded_score_in_a_new_training(name: str, device: str) -> None:
    """To the bit, as a promotion asks for on the device that trained."""
    given = {**CONFIGURATIONS[name], "metric": "log_loss"}
    with training(given, device, folds=2) as subject:
        best = advanced(subject, 4).best
        weights = subject.best_weights
    assert best is not None
    with training(given, device, folds=2) as fresh:
        fresh.load(weights)
        assert score("log_loss", fresh.validate(), fresh.labels) == best.log_loss


class Unfit:
    """A step that reads a value on the host in its nth capture (from 0), which a GPU does not allow."""

    def __init__(self, subject: Training, nth: int) -> None:
        self.learner, self.left = subject.members[0].learner, nth
        self.step = self.learner.step

    def __call__(self, *given: Any) -> None:
        self.step(*given)
        if torch.cuda.is_current_stream_capturing():
            self.left -= 1
            if self.left < 0:
                float(self.learner.loss_sum)


@pytest.mark.parametrize("nth", [0, 2])
def test_a_capture_that_fails_costs_the_graphs_and_nothing_else(
    nth: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first, or one beside graphs that are there. Before torch 2.13 the generator and the allocator stay in the
    capture (PyTorch's CUDAGraph::capture_end), which dropout would meet.
    """
    with training(RICH, device, folds=2) as subject, training(RICH, device, folds=2, graphs=False) as simple:
        monkeypatch.setattr(subject.members[0].learner, "step", Unfit(subject, nth))
        with LostGenerators():  # type: ignore[no-untyped-call]
            advanced(subject, 8)
        one, other = (member.fixed for member in subject.members)
        assert one is not None
        assert other is not None
        assert "captur" in str(one.reason)
        assert not one.replays
        assert bits(subject) == bits(advanced(simple, 8))
    gc.collect()
    release_memory(device)
    with training(RICH, device) as later, training(RICH, device, graphs=False) as simple:
        assert bits(advanced(later)) == bits(advanced(simple))


def test_a_capture_that_ends_with_an_error_is_none_of_the_training(driver: Driver) -> None:
    driver.fails = lambda number: RuntimeError("CUDA error: capture was invalidated") if number == 2 else None
    with training(RICH) as subject, training(RICH, graphs=False) as simple:
        assert bits(advanced(subject, 6)) == bits(advanced(simple, 6))
        assert reasons(subject) == {"RuntimeError: CUDA error: capture was invalidated"}


def test_the_graphs_of_an_ended_training_are_gone_before_the_next_one_captures(device: str) -> None:
    """PyTorch issue 193402: the end of a graph clears the cuBLAS workspace that the others of its stream use."""
    with training(RICH, device, graphs=False) as simple:
        wanted = bits(advanced(simple, 8))
    gc.collect()
    gc.disable()
    try:
        with training({**RICH, "seed": 9}, device) as first:
            advanced(first, 5)
        with training(RICH, device) as second:
            advanced(second, 5)
            gc.collect()
            if device != "cpu":
                torch.cuda.empty_cache()
                filler = [torch.full((2**22,), torch.nan, device=device) for _ in range(64)]
                del filler
            assert bits(advanced(second, 3)) == wanted
    finally:
        gc.enable()


def test_with_a_training_all_its_graphs_end(driver: Driver) -> None:
    """Those whose capture failed too, at once and not whenever garbage is collected."""
    gc.disable()
    try:
        driver.fails = lambda number: RuntimeError("CUDA error: capture was invalidated") if number == 3 else None
        subject = training(RICH, folds=2)
        with subject:
            advanced(subject, 6)
            assert len(driver.live) == driver.captures > 3
        assert len(driver.live) == 0
    finally:
        gc.enable()


def test_garbage_is_not_collected_in_a_capture(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it would end may call the driver, which ends the capture."""
    seen: set[bool] = set()
    with training(RICH, device) as subject:
        learner = subject.members[0].learner
        real: Callable[..., None] = learner.step

        def step(*given: Any) -> None:
            seen.add(gc.isenabled())
            real(*given)

        monkeypatch.setattr(learner, "step", step)
        advanced(subject, 5)
        assert captured(subject) > 0
    assert seen == {False, True}
    assert gc.isenabled()


def test_the_backward_pass_runs_in_the_thread_that_trains(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own thread of a device has one handle of cuDNN for all slots, whose use by one of them ends the capture
    of another: the first run on a GPU (an H200, torch 2.11) lost most captures of four slots, and then a trial.
    """
    seen: set[bool] = set()
    with training(RICH, device) as subject:
        learner = subject.members[0].learner
        real: Callable[..., None] = learner.step

        def step(*given: Any) -> None:
            seen.add(torch._C._is_multithreading_enabled())
            real(*given)

        monkeypatch.setattr(learner, "step", step)
        advanced(subject, 5)
    assert seen == {False}
    assert torch._C._is_multithreading_enabled()


def test_slots_give_the_bits_of_one_at_a_time(device: str) -> None:
    """Several trainings in each of several threads, one after the other, with memory given back between them."""
    kinds = [{**CONFIGURATIONS[f"drawn-{number}"], "seed": number} for number in range(4)]
    wanted = []
    for given in kinds:
        with training(given, device, graphs=False) as simple:
            wanted.append(bits(advanced(simple, 5)))
    wrong: list[Any] = []

    def slot(index: int) -> None:
        one_thread()
        try:
            for number in range(3):
                kind = (index + number) % len(kinds)
                with training(kinds[kind], device) as subject:
                    if bits(advanced(subject, 5)) != wanted[kind] or reasons(subject) != {None}:
                        wrong.append((index, number, kind, reasons(subject)))
                release_memory(device)
        except Exception as error:
            wrong.append((index, repr(error)))

    threads = [threading.Thread(target=slot, args=(index,)) for index in range(4 if device == "cpu" else 8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
