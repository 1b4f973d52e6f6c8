"""The training step on torch's meta device: it must read nothing on the host and do the same operations every time.

Whatever the step of a GPU consists of runs here without values: reading one is an error, so is a tensor of the CPU
among the operands, and the operations of each step are compared with those of the one before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hpo.models.training.fixed_steps import FixedSteps
from tests.gpu.cases import CONFIGURATIONS, Given, training
from tests.gpu.emulation import HOST_READS, installed

Operation = tuple[str, tuple[tuple[int, ...], ...]]  # its name, and the shapes of its results


class Log(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The operations within the block, and what a GPU would have to wait for."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[Operation] = []
        self.waits: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        name = str(function)
        if any(read in name for read in HOST_READS):
            self.waits.append(name)
        if any(tensor.device.type != "meta" for tensor in (*given, *results)):
            self.waits.append(f"{name} with a tensor of the CPU")
        self.operations.append((name, tuple(tuple(tensor.shape) for tensor in results)))
        return result


def cudnn_lstm(values: Tensor, states: Any, weights: list[Tensor], *rest: Any) -> tuple[Tensor, ...]:
    """What torch.lstm does on a GPU: one call of cuDNN."""
    _, layers, dropout, train, both, batch_first = rest
    size = weights[1].shape[1]
    buffer = torch.empty(sum(weight.numel() for weight in weights), device="meta")
    found: tuple[Tensor, ...] = torch.ops.aten._cudnn_rnn(
        values, weights, 4, buffer, *states, 2, size, 0, layers, batch_first, dropout, train, both, [], None
    )
    return found[:3]


def cudnn_lstm_backward(values: Tensor, weights: list[Tensor], *rest: Any) -> Any:
    hidden, cell = rest[2], rest[3]
    return (*map(torch.empty_like, (values, hidden, cell)), [torch.empty_like(weight) for weight in weights])


META: Any = torch.library
META = META.Library("aten", "IMPL", "Meta")
META.impl("_cudnn_rnn_backward", cudnn_lstm_backward)
for name in ("_fused_adamw_", "_fused_adam_", "_fused_sgd_"):
    META.impl(f"{name}.tensor_lr", lambda *_, **__: None)


class Shadow:
    """Replaces every tensor that can be reached from an object by one on the meta device, views by views."""

    def __init__(self) -> None:
        self._seen: dict[int, Any] = {}
        self._storages: dict[int, Tensor] = {}

    def of(self, thing: Any) -> Any:
        if id(thing) in self._seen:
            return self._seen[id(thing)][1]
        if isinstance(thing, Tensor):
            return self._tensor(thing)
        self._seen[id(thing)] = thing, thing  # kept, so that no other object gets its id
        if isinstance(thing, dict):
            for key in list(thing):
                thing[key] = self.of(thing[key])
        elif isinstance(thing, list):
            thing[:] = [self.of(item) for item in thing]
        elif isinstance(thing, tuple):
            return self._keep(thing, tuple(self.of(item) for item in thing))
        elif type(thing).__module__.startswith(("hpo.", "torch.nn.modules")):
            for key, value in list(vars(thing).items()):
                object.__setattr__(thing, key, self.of(value))
        return thing

    def _tensor(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._storages:
            elements = storage.nbytes() // tensor.element_size()
            self._storages[storage._cdata] = torch.empty(elements, dtype=tensor.dtype, device="meta")
        whole = self._storages[storage._cdata]
        view = whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
        new = nn.Parameter(view) if isinstance(tensor, nn.Parameter) else view
        self._keep(tensor, new)
        if tensor.is_leaf and tensor.grad is not None:
            new.grad = self.of(tensor.grad)
        return new

    def _keep(self, old: Any, new: Any) -> Any:
        self._seen[id(old)] = old, new
        return new


@contextmanager
def step_on_meta(given: Given, variable: bool) -> Iterator[tuple[FixedSteps, Callable[[], Log]]]:
    """A member's steps without values, and a call that logs one of them."""
    with installed(), pytest.MonkeyPatch.context() as patch:
        subject = training(given, graphs=False, classes=3, variable=variable)
        fixed = subject.members[0].fixed
        assert fixed is not None
        steps = fixed.train.longest()
        Shadow().of(fixed)
        patch.setattr(torch, "lstm", cudnn_lstm)
        fixed.learner.model.train()

        def logged() -> Log:
            log = Log()
            with log:
                fixed.step(steps)
            return log

        yield fixed, logged


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_step_waits_for_nothing_and_is_the_same_every_time(name: str) -> None:
    with step_on_meta(CONFIGURATIONS[name], variable=True) as (_, logged):
        first, *others = [logged() for _ in range(4)]
    assert first.waits == []
    assert any("_cudnn_rnn_backward" in operation for operation, _ in first.operations)
    for other in others:
        assert other.operations == first.operations
        assert other.waits == []


def read(fixed: FixedSteps) -> None:
    float(fixed.learner.loss_sum)


def copy_to_host(fixed: FixedSteps) -> None:
    fixed.learner.loss_sum.cpu()


def bring_from_host(fixed: FixedSteps) -> None:
    fixed.learner.loss_sum += torch.zeros(3).to("meta")[0]


def grow(fixed: FixedSteps) -> None:
    times = fixed.__dict__["times"] = fixed.__dict__.get("times", 0) + 1
    for _ in range(times):
        fixed.learner.loss_sum.add_(0)


@pytest.mark.parametrize("fault", [read, copy_to_host, bring_from_host, grow])
def test_the_check_sees_a_fault(fault: Callable[[FixedSteps], None], monkeypatch: pytest.MonkeyPatch) -> None:
    with step_on_meta({}, variable=True) as (fixed, logged):
        step: Callable[..., None] = fixed.learner.step

        def faulty(*given: Any) -> None:
            step(*given)
            fault(fixed)

        monkeypatch.setattr(fixed.learner, "step", faulty)
        try:
            logs = [logged() for _ in range(2)]
        except (RuntimeError, NotImplementedError):
            return
        assert logs[0].waits or logs[0].operations != logs[1].operations
