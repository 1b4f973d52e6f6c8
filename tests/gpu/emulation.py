"""A GPU's ways of working, emulated on a CPU: graphs, streams, cuDNN's layout of weights, errors of the driver.

A capture logs the ATen calls of a step and undoes what they did, as a capture computes nothing; a replay runs the log
again in the same memory. What a GPU would refuse in a capture, or answer with garbage, is an error here:

- reading a value on the host ends the capture (CUDA's documentation of stream capture);
- random numbers come from a generator that is registered with the graph only;
- a replay finds no value of the one before: fresh memory is filled with NaN first, as the pool hands it to others;
- after a capture that failed its generators draw no more (torch before 2.13), which `LostGenerators` checks;
- once a graph has ended, the others of its stream must not be replayed (PyTorch issue 193402: its end clears the cuBLAS
  workspace of that stream).

`installed()` lets all code of `hpo.models` take the CPU for a GPU.
"""

from __future__ import annotations

import itertools
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GAP = 5  # numbers between the weights of one call, and at both ends
HOST_READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal.default", "masked_select", "unique", "bincount")


@dataclass
class Call:
    """One ATen call of a capture."""

    function: Any
    args: Any
    kwargs: Any
    results: list[Tensor]
    fresh: list[int]  # which results lie in memory of their own


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Logs calls, and remembers what memory from outside held before the first call that writes to it."""

    def __init__(self, generators: list[torch.Generator]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[Call] = []
        self.generators = generators
        self.error: Exception | None = None  # what has ended the capture
        self._own: set[int] = set()  # storages that the capture has made
        self._before: dict[int, tuple[Tensor, Tensor]] = {}  # by storage: all of it, and a copy
        self._states = [(generator, generator.get_state()) for generator in generators]

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(name in str(function) for name in HOST_READS):
            self.error = RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({function})")
            raise self.error
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor | torch.Generator)]
        drawn = [leaf for leaf in given if isinstance(leaf, torch.Generator)]
        known = {generator._cdata for generator in self.generators}  # type: ignore[attr-defined]
        if any(generator._cdata not in known for generator in drawn):  # type: ignore[attr-defined]
            raise RuntimeError("a generator that is not registered with the graph draws in its capture")
        if function._schema.is_mutable:
            self._remember(function, args, kwargs)
        result = function(*args, **kwargs)
        inputs = {tensor.untyped_storage()._cdata for tensor in given if isinstance(tensor, Tensor)}
        results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        fresh = [i for i, tensor in enumerate(results) if tensor.untyped_storage()._cdata not in inputs]
        self._own |= {results[i].untyped_storage()._cdata for i in fresh}
        if fresh or function._schema.is_mutable:
            self.calls.append(Call(function, args, kwargs, results, fresh))
        return result

    def undo(self) -> None:
        """Put back what the calls have changed outside of the capture's own memory."""
        for whole, copy in self._before.values():
            whole.copy_(copy)
        for generator, state in self._states:
            generator.set_state(state)

    def _remember(self, function: Any, args: Any, kwargs: Any) -> None:
        for index, argument in enumerate(function._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            value = kwargs.get(argument.name) if argument.name in kwargs else args[index] if index < len(args) else None
            for tensor in [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]:
                storage = tensor.untyped_storage()
                if storage._cdata not in self._own and storage._cdata not in self._before:
                    whole = torch.empty(0, dtype=tensor.dtype).set_(storage)
                    self._before[storage._cdata] = whole, whole.clone()


class LostGenerators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within the block no generator draws that a failed capture has kept."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs or {})):
            if isinstance(leaf, torch.Generator):
                kept = leaf._cdata in Graph.driver.lost  # type: ignore[attr-defined]
                assert not kept, "this generator is still in a capture that failed"
        return function(*args, **(kwargs or {}))


@dataclass
class Driver:
    """What the emulated driver has seen, and what it is to do."""

    captures: int = 0
    replays: int = 0
    calls: list[int] = field(default_factory=list)  # of each capture
    streams: set[int] = field(default_factory=set)  # with captures, by number
    fails: Callable[[int], Exception | None] = lambda _: None  # what the n-th capture (from 0) ends with
    lost: set[int] = field(default_factory=set)  # generators, by address, that failed captures have kept
    live: weakref.WeakSet[Graph] = field(default_factory=weakref.WeakSet)
    lock: threading.Lock = field(default_factory=threading.Lock)


class Graph:
    """In place of torch.cuda.CUDAGraph."""

    driver = Driver()

    def __init__(self) -> None:
        self._generators: list[torch.Generator] = []
        self._recorder: Recorder | None = None
        self._calls: list[Call] = []
        self.stream = current_stream()
        self._error: Exception | None = None
        self.captured, self.ended, self.damaged = False, False, False

    def register_generator_state(self, generator: torch.Generator) -> None:
        self._generators.append(generator)

    def capture_begin(self, pool: object = None, capture_error_mode: str = "global") -> None:
        assert self.stream is not DEFAULT, "the default stream cannot be captured"
        assert pool is not None
        assert capture_error_mode == "thread_local", "other threads call the driver meanwhile"
        self._recorder = Recorder(self._generators)
        self._recorder.__enter__()  # type: ignore[no-untyped-call]
        _current.captures = True

    def capture_end(self) -> None:
        assert self._recorder is not None
        assert current_stream() is self.stream
        self._recorder.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        _current.captures = False
        self._recorder.undo()
        self._calls, self._error, self._recorder = self._recorder.calls, self._recorder.error, None
        self.captured = True
        driver = self.driver
        with driver.lock:
            number = driver.captures
            driver.captures += 1
            driver.calls.append(len(self._calls))
            driver.streams.add(self.stream.number)
            driver.live.add(self)
        error = driver.fails(number) or self._error
        if error is not None:
            driver.lost |= {generator._cdata for generator in self._generators}  # type: ignore[attr-defined]
            raise error

    def replay(self) -> None:
        assert self.captured
        assert not self.ended
        assert not self.damaged, "another graph of this stream has ended, and with it the cuBLAS workspace"
        assert current_stream() is self.stream, "replayed on another stream than its memory belongs to"
        self.driver.replays += 1
        for call in self._calls:
            for i in call.fresh:
                if call.results[i].is_floating_point():
                    call.results[i].fill_(torch.nan)
        with torch._C._AutoDispatchBelowAutograd():
            for call in self._calls:
                again = call.function(*call.args, **call.kwargs)
                for i in call.fresh:
                    call.results[i].copy_([leaf for leaf in tree_leaves(again) if isinstance(leaf, Tensor)][i])

    def reset(self) -> None:
        self._calls.clear()
        self._end()

    def __del__(self) -> None:
        self._end()

    def _end(self) -> None:
        if self.captured and not self.ended:
            self.ended = True
            self.driver.live.discard(self)
            for other in self.driver.live:
                if other is not self and other.stream is self.stream:
                    other.damaged = True


class Stream:
    """In place of torch.cuda.Stream: all run in order, but each has a name."""

    _numbers = itertools.count()

    def __init__(self, device: object = None) -> None:
        self.number = next(self._numbers)

    def synchronize(self) -> None:
        """Nothing runs beside the caller."""


DEFAULT = Stream()
_current = threading.local()


def current_stream(device: object = None) -> Stream:
    stream: Stream = getattr(_current, "stream", DEFAULT)
    return stream


@contextmanager
def on_stream(stream: Stream) -> Iterator[None]:
    before, _current.stream = current_stream(), stream
    try:
        yield
    finally:
        _current.stream = before


@torch.no_grad()
def lay_out(weights: list[Tensor], hidden_size: int) -> None:
    """Weights in one buffer with gaps between them, as cuDNN leaves them. What is in the gaps must never count."""
    buffer = torch.full((sum(weight.numel() + GAP for weight in weights) + GAP,), torch.nan)
    at = GAP
    for weight in weights:
        part = buffer[at : at + weight.numel()].view(weight.shape)
        part.copy_(weight)
        weight.data = part
        at += weight.numel() + GAP


def install(patch: pytest.MonkeyPatch) -> Driver:
    """Let `hpo.models` take the CPU for a GPU, until the patch is undone."""
    from hpo.models import classifier, device
    from hpo.models.training import training  # with all that trains

    genuine = device.is_gpu
    for module in [known for name, known in sys.modules.items() if name.startswith("hpo.")]:
        if getattr(module, "is_gpu", None) is genuine:
            patch.setattr(module, "is_gpu", lambda device: device.type == "cpu")
    patch.setattr(classifier, "lay_out", lay_out)
    patch.setattr(training, "_own", threading.local())  # no streams of another installation
    patch.setattr(torch.cuda, "CUDAGraph", Graph)
    patch.setattr(torch.cuda, "Stream", Stream)
    patch.setattr(torch.cuda, "stream", on_stream)
    patch.setattr(torch.cuda, "current_stream", current_stream)
    patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: getattr(_current, "captures", False))
    patch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    Graph.driver = Driver()
    return Graph.driver


@contextmanager
def installed() -> Iterator[Driver]:
    """`install` within the block."""
    with pytest.MonkeyPatch.context() as patch:
        yield install(patch)
