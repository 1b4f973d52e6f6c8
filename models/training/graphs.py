"""Operations on a GPU, captured once as a CUDA graph and replayed: what starting each one costs is then saved."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from hpo.models.device import is_gpu

# One capture at a time in a process, and no call meanwhile that waits for the whole device.
CAPTURING = threading.Lock()


def why_not(device: torch.device) -> str | None:
    """Why steps on this device cannot be captured; None where they can."""
    return None if is_gpu(device) else f"{device.type} has no graphs"


class Graphs:
    """The graphs of one member of a training, in one pool of memory, captured and replayed by one thread on one stream.

    All live until `close`, those whose capture failed too: the end of any of them clears the cuBLAS workspace of its
    stream, which the others still use (PyTorch issue 193402).
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: list[torch.cuda.CUDAGraph] = []

    def capture(self, call: Callable[[], None], generator: torch.Generator) -> Callable[[], None]:
        """What repeats `call`, which may draw random numbers from `generator`; captured, it does not run.

        `call` has run on this stream before, so that libraries have chosen their kernels and taken their workspaces.
        Raises RuntimeError.
        """
        graph = torch.cuda.CUDAGraph()
        self._graphs.append(graph)
        graph.register_generator_state(generator)
        torch.cuda.current_stream(self.device).synchronize()
        with CAPTURING, _no_garbage_collection():
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                call()
            finally:
                graph.capture_end()
        return graph.replay

    def close(self) -> None:
        """End all graphs, in the thread that captured them."""
        graphs, self._graphs = self._graphs, []
        if graphs:
            torch.cuda.current_stream(self.device).synchronize()
        for graph in graphs:
            graph.reset()  # whoever still refers to it


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """What is collected in a capture may call the driver and so end it: graphs, streams, events of other trainings."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
