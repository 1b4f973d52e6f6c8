"""What a prediction of a model takes: the time of one sequence on one thread, and the size of the weights."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from statistics import median

import numpy as np
import torch

from hpo.models.bundle.bundle import Bundle, assemble
from hpo.models.bundle.config import BundleConfig, Footprint
from hpo.models.classifier import Weights, weights_of
from hpo.models.config import ClassifierConfig
from hpo.models.data.sequences import Sequences
from hpo.models.machine import cpu_name

NUMBER_BYTES = 4  # of a weight: float32
MB = 1e6  # bytes
WARM_UP = 2  # calls that are not measured
CALLS = 15  # that are, at most; one at least
ENOUGH_S = 0.05  # after which no further one is made


def size_mb(classifier: ClassifierConfig, networks: int) -> float:
    """10^6 bytes of the weights of so many networks as they are stored, without the names beside them."""
    return networks * weights_of(classifier)[0] * NUMBER_BYTES / MB


def size_of(config: BundleConfig) -> float:
    """10^6 bytes of a model's weights."""
    return sum(size_mb(each.classifier, each.members) for each in config.components)


def measure(config: BundleConfig, members: Sequence[Weights], sequences: Sequences, calls: int = CALLS) -> Footprint:
    """Size, and latency of `Bundle.predict` on one sequence, on one thread of this machine's CPU: the median of some
    calls, of so many at most.

    It is the longest of the sequences, because a limit is to hold for every one. Raises BundleError for weights, and
    DataError for networks, that give no probability.
    """
    bundle = assemble(replace(config, gaps=None), members)  # without a word on what is missing in that one sequence
    longest = sequences.take([int(np.argmax(sequences.lengths))])
    with _one_thread():
        latency_ms = 1e3 * _seconds(bundle, longest, calls)
    return Footprint(latency_ms, size_of(config), int(longest.lengths[0]), cpu_name())


def _seconds(bundle: Bundle, sequence: Sequences, calls: int) -> float:
    for _ in range(WARM_UP):
        bundle.predict(sequence)
    taken: list[float] = []
    while not taken or (len(taken) < calls and sum(taken) < ENOUGH_S):
        started = time.perf_counter()
        bundle.predict(sequence)
        taken.append(time.perf_counter() - started)
    return median(taken)


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
