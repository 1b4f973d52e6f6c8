"""Training steps of a few fixed shapes, each captured once as a CUDA graph and replayed."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from hpo.models.training.batches import Batch, Batches
from hpo.models.training.learner import Learner

log = logging.getLogger("hpo")

BUCKETS = 8  # lengths at most that steps of fixed shape are rounded up to
WARM_UP = 3  # steps before a capture, for libraries to choose their kernels and take their workspaces

# one capture at a time in a process, and no call meanwhile that waits for the whole device
CAPTURING = threading.Lock()


class FixedSteps:
    """Steps of a few fixed shapes whose inputs lie on the device: each shape is one CUDA graph.

    A batch is as large as the largest of the epoch, its missing rows repeat a row and do not count; its steps are
    rounded up to one of at most BUCKETS lengths. Padding never changes an answer, so neither does this.
    """

    def __init__(self, learner: Learner, train: Batches, graphs: bool) -> None:
        """graphs: whether to capture the steps on a GPU. `reason` says why they are not captured, if so."""
        self.learner, self.train = learner, train
        count = -(-len(train) // learner.config.batch_size)
        size = -(-len(train) // count)
        device = learner.device
        self.width = -(-train.longest() // BUCKETS)
        self.lengths = None if train.uniform else train.lengths
        self.rows = torch.zeros(count, size, dtype=torch.long, device=device)  # of each batch of the epoch
        self.mask = torch.zeros(count, size, device=device)
        self.next = torch.zeros(1, dtype=torch.long, device=device)  # number of the next batch
        self.reason: str | None = None if graphs and device.type == "cuda" else "not asked for"
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle() if self.reason is None else None

    def prepare(self, batches: list[NDArray[np.int64]]) -> None:
        """Lay out the epoch's batches (indices into the training part) on the device; capture new shapes."""
        rows, mask = np.zeros(self.rows.shape, np.int64), np.zeros(self.mask.shape, np.float32)
        for number, indices in enumerate(batches):
            rows[number] = self.train.rows[indices[0]]
            rows[number, : len(indices)] = self.train.rows[indices]
            mask[number, : len(indices)] = 1
        self.rows.copy_(torch.from_numpy(rows))
        self.mask.copy_(torch.from_numpy(mask))
        for indices in batches:
            steps = self._rounded(indices)
            if self.reason is None and steps not in self.graphs:
                self._capture(steps)

    def steps(self, batches: list[NDArray[np.int64]]) -> Iterator[Callable[[], None]]:
        """One call a batch of `batches`, which `prepare` has laid out."""
        self.next.zero_()
        for indices in batches:
            steps = self._rounded(indices)
            yield self.graphs[steps].replay if steps in self.graphs else lambda steps=steps: self.step(steps)  # type: ignore[misc]

    def step(self, steps: int) -> None:
        """One training step over the next batch. No operation waits for the device, so that it can be captured."""
        rows = self.rows.index_select(0, self.next)[0]
        mask = self.mask.index_select(0, self.next)[0]
        self.next += 1
        values = self.train.values[:steps].index_select(1, rows)
        lengths = None if self.lengths is None else self.lengths.index_select(0, rows)
        self.learner.step(Batch(values, lengths, self.train.labels.index_select(0, rows), np.empty(0, np.int64)), mask)

    def _rounded(self, indices: NDArray[np.int64]) -> int:
        """The steps of the longest of these sequences, rounded up to one of the fixed lengths."""
        longest = self.train.longest()
        return min(longest, -(-self.train.longest(indices) // self.width) * self.width)

    def _capture(self, steps: int) -> None:
        """Capture one shape; a shape that cannot be captured is no error: its steps run one operation at a time."""
        before = self.learner.state()
        self.next.zero_()
        try:
            with CAPTURING:
                self.graphs[steps] = self._captured(steps)
        except RuntimeError as error:
            self.reason = f"{type(error).__name__}: {error}"
            log.warning("steps run without CUDA graphs: %s", self.reason)
        finally:
            self.learner.restore(before)

    def _captured(self, steps: int) -> torch.cuda.CUDAGraph:
        for _ in range(WARM_UP):
            self.step(steps)
            self.next.zero_()
        torch.cuda.current_stream(self.learner.device).synchronize()
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self.learner.generator)
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            self.step(steps)
        finally:
            graph.capture_end()
        return graph
