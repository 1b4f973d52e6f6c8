"""The memory of a training: how much it takes, and how it is given back."""

from __future__ import annotations

import ctypes
import gc
import os

import torch

from hpo.models.config import ClassifierConfig
from hpo.models.training.batches import EVALUATION_BATCH
from hpo.models.training.graphs import CAPTURING

LEAST = 10 * 2**20  # bytes that cuDNN takes for the smallest step


def memory_bytes(
    n: int, validated: int, members: int, classifier: ClassifierConfig, batch_size: int, device: str
) -> int:
    """A rough upper estimate of what a training of n sequences takes on its device, in bytes.

    n, validated: sequences, and those that a member validates on; members: models in training at once; batch_size in
    sequences; device: its type, cpu or cuda.

    Data; weights, gradients and optimiser; what a step or a validation takes besides, with the windows, the normalised
    and the final values of each convolution of a stem. On a GPU, in units of an output of one layer in one direction
    (steps, rows, H), as measured with cuDNN 9 (benchmarks/LOG.md): 21 of workspace in a
    step and 9 a layer and direction, 24 and 3 in a validation; and twice a step's for the graphs of each member.
    """
    width, inputs, read = classifier.width, classifier.inputs, classifier.channels * classifier.folded
    copies = members if classifier.normalization == "channel" else 1
    weights, first, kept, stem, steps = 0, inputs, 0, 0, classifier.kept_steps
    for channels, kernel, stride in classifier.convolutions:
        weights += classifier.stem_width * (channels * kernel + 2)
        steps = -(-steps // stride)
        stem += steps * (channels * kernel + 6 * classifier.stem_width)
    for _ in range(classifier.layers):
        weights += 4 * width * (first + classifier.hidden_size + 2)
        kept += classifier.patches * (12 * width + first)
        first = width
    data = -(-classifier.kept_steps // classifier.folded) * read  # of a sequence
    always = 4 * (2 * copies * n * data + members * 4 * weights)
    if device == "cpu":
        return always + 4 * max(batch_size, EVALUATION_BATCH[device] // 4) * (kept + stem)
    rows = min(EVALUATION_BATCH[device], validated)
    trained = classifier.patches * (width * (21 + 9 * classifier.layers) + 2 * inputs) + 2 * stem
    tested = classifier.patches * (width * (24 + 3 * classifier.layers) + 2 * inputs) + stem
    step, validation = LEAST + 4 * batch_size * trained, LEAST + 4 * rows * tested
    return always + max(step, validation) + members * (2 * LEAST + 2 * step)


def release_memory(device: str) -> None:
    """Give back what dropped trainings have left behind: to the device, and to the system what malloc keeps."""
    gc.collect()
    if device != "cpu":
        with CAPTURING:
            torch.cuda.empty_cache()
    if os.name == "posix" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
