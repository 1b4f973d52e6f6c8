"""Our optimisers against torch's."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from hpo.models.config import TrainingConfig
from hpo.models.fields import rules
from hpo.models.training.optimizers import Optimizer

OPTIMIZERS = rules(TrainingConfig)["optimizer"].names
THEIRS = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD, "rmsprop": torch.optim.RMSprop}
SIZES = (301, 17)
TRAINING = """
import sys
import numpy as np
from hpo.models.config import ClassifierConfig
from hpo.models.data.sequences import from_arrays
from hpo.models.config import TrainingConfig
from hpo.models.training.training import Training
rows = np.arange(8)
sequences = from_arrays(np.random.default_rng(0).normal(size=(8, 3, 1)), rows % 2)
config = ClassifierConfig(features=1, classes=2, steps=3, hidden_size=4)
trained = Training(sequences, [(rows, rows)], config, TrainingConfig(metric="auroc"))
trained.advance()
print("torch._dynamo" in sys.modules)
"""


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("decay", [0.0, 1e-3])
def test_steps_are_those_of_torch_bit_for_bit(kind: str, decay: float) -> None:
    random = torch.Generator().manual_seed(0)
    ours, theirs = ([torch.ones(size).requires_grad_() for size in SIZES] for _ in range(2))
    gradients = [torch.zeros(size) for size in SIZES]
    config = TrainingConfig(metric="auroc", optimizer=kind, learning_rate=3e-3, weight_decay=decay)
    own = Optimizer(ours, gradients, config)
    more: dict[str, Any] = {} if kind == "rmsprop" else {"fused": True}
    more |= {"momentum": 0.9} if kind == "sgd" else {}
    reference = THEIRS[kind](theirs, lr=3e-3, weight_decay=decay, **more)
    for rate in (3e-3, 3e-3, 1e-3):
        own.set_rate(rate)
        reference.param_groups[0]["lr"] = rate
        for gradient, weights in zip(gradients, theirs, strict=True):
            gradient.copy_(torch.randn(len(gradient), generator=random))
            weights.grad = gradient.clone()
        own.step()
        reference.step()
    for mine, theirs_, state in zip(ours, theirs, own.state, strict=True):
        assert torch.equal(mine, theirs_)
        assert not torch.equal(mine, torch.ones_like(mine))
        known = reference.state[theirs_]
        assert set(state) == set(known) - ({"step"} if kind == "rmsprop" else set())
        assert all(torch.equal(value, known[name]) for name, value in state.items())


def test_training_does_not_import_the_compiler() -> None:
    done = subprocess.run([sys.executable, "-c", TRAINING], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
