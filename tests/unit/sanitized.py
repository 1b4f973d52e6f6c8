"""Trainings of many shapes on a library of the native kernel that was compiled with sanitizers.

    python -m tests.unit.sanitized LIBRARY

Prints a line a training; a sanitizer ends the process at the first wrong access.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hpo.models.config import ClassifierConfig, TrainingConfig
from hpo.models.data.sequences import from_arrays
from hpo.models.fields import rules
from hpo.models.kernel.native import LARGEST, Kernel
from hpo.models.training.training import Training

POOLINGS = rules(ClassifierConfig)["pooling"].names
OPTIMIZERS = rules(TrainingConfig)["optimizer"].names
MANY = 60  # random ones
EDGES: tuple[dict[str, Any], ...] = (  # steps, sequences, and what else is not as usual
    {"steps": 1, "n": 4, "batch_size": 1},
    {"steps": 1, "n": 4, "batch_size": 3, "stem": "conv", "stem_kernel": 9, "stem_stride": 1},
    {"steps": 2, "n": 6, "batch_size": 6, "stem": "conv", "stem_kernel": 2, "stem_stride": 2, "skip": True},
    {"steps": 40, "n": 9, "batch_size": 7, "hidden_size": LARGEST, "bidirectional": True, "layers": 2, "dropout": 0.5},
    {"steps": 9, "n": 70, "batch_size": 64, "hidden_size": 1, "pooling": "flatten", "equal": True},
    {"steps": 150, "n": 5, "batch_size": 5, "patch_length": 1, "hidden_size": 3, "pooling": "attention"},
    # whatever has the width of the data must not lie on the stack
    {"steps": 6, "n": 4, "features": 2**16, "patch_length": 6, "hidden_size": 1, "skip": True, "jitter": 0.1},
    {"steps": 30, "n": 8, "batch_size": 8, "stem": "conv", "stem_width": 100, "stem_layers": 4, "features": 70},
)


def drawn(number: int) -> dict[str, Any]:
    """The shape of random training `number`."""
    random = np.random.default_rng(number)
    equal = bool(random.integers(2))
    steps = int(random.integers(1, 25))
    given: dict[str, Any] = {
        "steps": steps,
        "n": int(random.integers(4, 40)),
        "features": int(random.integers(1, 20)),
        "equal": equal,
        "batch_size": int(random.integers(1, 20)),
        "hidden_size": int(random.integers(1, 80)),
        "layers": int(random.integers(1, 4)),
        "bidirectional": bool(random.integers(2)),
        "pooling": str(random.choice([each for each in POOLINGS if equal or each != "flatten"])),
        "skip": bool(random.integers(2)),
        "head_size": int(random.choice([0, 1, 40])),
        "dropout": float(random.choice([0.0, 0.4])),
        "mixup": float(random.choice([0.0, 0.4])),
        "jitter": float(random.choice([0.0, 0.1])),
        "class_weight": str(random.choice(["none", "balanced"])),
        "optimizer": str(random.choice(OPTIMIZERS)),
        "classes": int(random.integers(2, 5)),
    }
    if random.integers(2):
        given |= {"stem": "conv", "stem_layers": int(random.integers(1, 5)), "stem_width": int(random.integers(1, 50))}
        given |= {"stem_kernel": int(random.integers(1, 8)), "stem_stride": int(random.integers(1, min(steps, 4) + 1))}
    else:
        given["patch_length"] = int(random.integers(1, steps + 1))
    return given


def train(kernel: Kernel, given: dict[str, Any]) -> None:
    """One epoch and validation, through the network's code, and layer by layer under autograd."""
    given = dict(given)
    steps, n, features = given.pop("steps"), given.pop("n"), given.pop("features", 2)
    classes, equal = given.pop("classes", 3), given.pop("equal", False)
    random = np.random.default_rng(0)
    lengths = np.full(n, steps) if equal else np.append(random.integers(1, steps + 1, n - 1), steps)
    labels = np.arange(n) % min(classes, n)
    data = from_arrays([random.normal(0, 1, (length, features)) for length in lengths], labels)
    own = {name: given.pop(name) for name in list(given) if name in ClassifierConfig.__dataclass_fields__}
    shape = ClassifierConfig(features=features, classes=len(data.classes), steps=steps, **own)
    rows = np.arange(n)
    config = TrainingConfig(metric="log_loss", **given)
    subject = Training(data, [(rows, rows)], shape, config, kernel=kernel)
    subject.advance()
    member = subject.members[0]
    model = member.learner.model.train()
    batch = member.train.batch(rows)
    model.logits(batch.values, batch.lengths).sum().backward()  # type: ignore[no-untyped-call]


def main() -> None:
    torch.set_num_threads(1)
    kernel = Kernel(Path(sys.argv[1]), "sanitized")
    for number, given in enumerate(itertools.chain(EDGES, map(drawn, range(MANY)))):
        train(kernel, given)
        sys.stdout.write(f"{number} {given}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
