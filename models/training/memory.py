"""The memory of a training: how much it takes, and how it is given back."""

from __future__ import annotations

import ctypes
import gc
import os

import torch

from hpo.models.config import ClassifierConfig
from hpo.models.training.batches import EVALUATION_BATCH
from hpo.models.training.graphs import CAPTURING


def memory_bytes(n: int, members: int, classifier: ClassifierConfig, batch_size: int, device: str) -> int:
    """A rough upper estimate of what a training of n sequences takes on its device, in bytes.

    n sequences, members: models in training at once, batch_size in sequences, device: its type, cpu or cuda.

    Data; weights, gradients and optimiser; what the backward pass keeps of each step (four gates, cell, output and
    their gradients). On a GPU each member keeps its own, in the pool of its graphs.
    """
    directions = 2 if classifier.bidirectional else 1
    width, inputs = directions * classifier.hidden_size, classifier.features * classifier.patch_length
    copies = members if classifier.normalization == "channel" else 1
    data = 2 * copies * n * classifier.patches * inputs
    weights, kept = 0, 0
    for _ in range(classifier.layers):
        weights += 4 * width * (inputs + classifier.hidden_size + 2)
        kept += classifier.patches * (12 * width + inputs)
        inputs = width
    rows = max(batch_size, EVALUATION_BATCH[device] // 4)
    return 4 * (data + members * 4 * weights + (members if device == "cuda" else 1) * rows * kept)


def release_memory(device: str) -> None:
    """Give back what dropped trainings have left behind: to the device, and to the system what malloc keeps."""
    gc.collect()
    if device != "cpu":
        with CAPTURING:
            torch.cuda.empty_cache()
    if os.name == "posix" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
