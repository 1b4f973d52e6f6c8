"""Training steps of a few fixed shapes whose inputs lie on the device, so that each can be captured and replayed."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from hpo.models.training.batches import Batch, Batches
from hpo.models.training.graphs import Graphs, why_not
from hpo.models.training.learner import Learner

log = logging.getLogger("hpo")

BUCKETS = 8  # lengths at most that steps of fixed shape are rounded up to
FIRST = 3  # steps of a shape before its capture, in which libraries choose their kernels; a rare shape has no more


class FixedSteps:
    """Steps of a few fixed shapes: on a GPU, each shape becomes a CUDA graph once it has run a few times.

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
        self.shares = torch.ones(count, size, device=device) if learner.config.mixup else None
        self.next = torch.zeros(1, dtype=torch.long, device=device)  # number of the next batch
        self.reason = why_not(device) if graphs else "not asked for"
        self.replays: dict[int, Callable[[], None]] = {}  # by steps
        self._done: Counter[int] = Counter()  # by steps, one operation at a time
        self._graphs = Graphs(device) if self.reason is None else None

    def prepare(self, batches: list[NDArray[np.int64]], shares: list[NDArray[np.float32]] | None = None) -> None:
        """Lay out the epoch's batches (indices into the training part) on the device, and the shares in mixtures."""
        rows, mask = np.zeros(self.rows.shape, np.int64), np.zeros(self.mask.shape, np.float32)
        for number, indices in enumerate(batches):
            rows[number] = self.train.rows[indices[0]]
            rows[number, : len(indices)] = self.train.rows[indices]
            mask[number, : len(indices)] = 1
        self.rows.copy_(torch.from_numpy(rows))
        self.mask.copy_(torch.from_numpy(mask))
        if self.shares is not None and shares is not None:
            mixed = np.ones(self.shares.shape, np.float32)
            for number, share in enumerate(shares):
                mixed[number, : len(share)] = share
            self.shares.copy_(torch.from_numpy(mixed))

    def steps(self, batches: list[NDArray[np.int64]]) -> Iterator[Callable[[], None]]:
        """One call a batch of `batches`, which `prepare` has laid out."""
        self.next.zero_()
        for indices in batches:
            steps = self._rounded(indices)
            yield self.replays.get(steps) or partial(self._first, steps)

    def step(self, steps: int) -> None:
        """One training step over the next batch. No operation waits for the device, so that it can be captured."""
        rows = self.rows.index_select(0, self.next)[0]
        mask = self.mask.index_select(0, self.next)[0]
        shares = None if self.shares is None else self.shares.index_select(0, self.next)[0]
        self.next += 1
        values = self.train.values[:steps].index_select(1, rows)
        lengths = None if self.lengths is None else self.lengths.index_select(0, rows)
        labels = self.train.labels.index_select(0, rows)
        weights = None if self.train.weights is None else self.train.weights.index_select(0, rows)
        self.learner.step(Batch(values, lengths, labels, np.empty(0, np.int64), shares, weights), mask)

    def close(self) -> None:
        """End the graphs, in the thread that captured them."""
        self.replays.clear()
        if self._graphs is not None:
            self._graphs.close()

    def _rounded(self, indices: NDArray[np.int64]) -> int:
        """The steps of the longest of these sequences, rounded up to one of the fixed lengths."""
        longest = self.train.longest()
        return min(longest, -(-self.train.longest(indices) // self.width) * self.width)

    def _first(self, steps: int) -> None:
        """One of a shape's first steps, and its capture when there were enough of them."""
        if self._graphs is not None and self.reason is None and self._done[steps] >= FIRST:
            self._capture(steps, self._graphs)
        if steps in self.replays:
            self.replays[steps]()
        else:
            self.step(steps)
            self._done[steps] += 1

    def _capture(self, steps: int, graphs: Graphs) -> None:
        """Capture one shape. Where that fails, it is no error: all steps then run one operation at a time."""
        generator = self.learner.generator
        state = generator.get_state()
        try:
            self.replays[steps] = graphs.capture(partial(self.step, steps), generator)
        except RuntimeError as error:
            self.reason = f"{type(error).__name__}: {error}"
            log.warning("steps run without CUDA graphs: %s", self.reason)
            self.replays.clear()
            # Before torch 2.13 a generator stays as in a capture when that fails, and draws no more.
            self.learner.generator = torch.Generator(self.learner.device)
            self.learner.generator.set_state(state)
