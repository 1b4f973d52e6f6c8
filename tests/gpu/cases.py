"""Configurations and data for the checks of a GPU.

The configurations follow from the fields that there are, so that a field or a choice which is added is checked without
being named here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from hpo.models.config import ClassifierConfig, TrainingConfig
from hpo.models.data.sequences import Sequences, from_arrays
from hpo.models.fields import Rule, Value, rules
from hpo.models.training.training import Training
from tests.unit.test_mask import gapped

FEATURES, STEPS, N = 2, 24, 60
GIVEN = ("features", "classes", "steps")  # by the data
FIXED = ("metric", "epochs")  # what is trained and how it is scored do not touch the device
DRAWN = 24  # configurations in which all fields vary at once
Given = Mapping[str, Any]


def values(rule: Rule) -> tuple[Value, ...]:
    """Some of the values that a field admits, small ones: all of its choices, a number's least and ones near it."""
    if rule.kind is bool:
        return False, True
    if rule.names:
        return rule.names
    if rule.kind is int:
        return tuple(int(rule.low) + more for more in (0, 1, 3))
    step = 0.3 * (rule.high - rule.low) if rule.high <= 1 else 0.01
    return tuple(rule.low + part * step for part in (0, 1, 2) if rule.admits(rule.low + part * step))


def space() -> dict[str, tuple[Value, ...]]:
    """The values of every field that shapes a step."""
    found = rules(ClassifierConfig) | rules(TrainingConfig)
    return {name: values(rule) for name, rule in found.items() if name not in (*GIVEN, *FIXED)}


def configurations() -> Iterator[tuple[str, Given]]:
    """Every value of every field on its own, and DRAWN that are drawn at random, each with a name."""
    for name, choices in space().items():
        for value in choices:
            yield f"{name}={value}", {name: value}
    random = np.random.default_rng(0)
    for number in range(DRAWN):
        yield f"drawn-{number}", {name: choices[random.integers(len(choices))] for name, choices in space().items()}


CONFIGURATIONS = dict(configurations())


def sequences(classes: int = 2, *, variable: bool = True, n: int = N, steps: int = STEPS) -> Sequences:
    """Noise with an offset by class, with gaps; the lengths vary from a third of the steps on."""
    random = np.random.default_rng(0)
    labels = np.arange(n) % classes
    lengths = random.integers(steps // 3, steps + 1, n) if variable else np.full(n, steps)
    X = random.normal(0, 1, (n, steps, FEATURES)) + 0.4 * labels[:, None, None]
    return gapped(from_arrays([x[:length] for x, length in zip(X, lengths, strict=True)], labels))


def training(
    given: Given | None = None,
    device: str = "cpu",
    *,
    folds: int = 1,
    graphs: bool = True,
    classes: int = 2,
    variable: bool = True,
    n: int = N,
    steps: int = STEPS,
    weighted: bool = False,
    **more: Any,
) -> Training:
    """A training of this configuration; the rest of it is small. Fixed lengths where the network wants them.

    weighted: some sequences count more than others, and some not at all.
    """
    settings: dict[str, Any] = {"hidden_size": 6, "batch_size": 8, "learning_rate": 0.02} | dict(given or {}) | more
    if settings.get("pooling") == "flatten":
        variable = False
    if settings.get("threshold") == "chosen":
        classes = 2
    data = sequences(classes, variable=variable, n=n, steps=steps)
    if weighted:
        data = replace(data, weights=np.random.default_rng(2).integers(0, 4, n).astype(np.float64))
    network = {name: value for name, value in settings.items() if name in ClassifierConfig.__dataclass_fields__}
    how = {name: value for name, value in settings.items() if name not in network}
    classifier = ClassifierConfig(FEATURES, classes, steps, **network)
    rest: dict[str, Any] = {"metric": "log_loss", "epochs": 100, "patience": None} | how
    rows = np.random.default_rng(1).permutation(n)
    cuts = np.array_split(rows, max(folds, 4))[:folds]
    parts = [(np.sort(np.setdiff1d(rows, cut)), np.sort(cut)) for cut in cuts]
    return Training(data, parts, classifier, TrainingConfig(**rest), device, graphs=graphs, fixed_shapes=True)


def advanced(subject: Training, epochs: int = 3) -> Training:
    for _ in range(epochs):
        subject.advance()
    return subject


def bits(subject: Training) -> tuple[Any, ...]:
    """What must be equal where trainings are: every epoch's numbers, all that the models and optimisers hold."""
    numbers = [(epoch.train_loss, epoch.log_loss, epoch.value) for epoch in subject.history]
    states = [member.learner.state() for member in subject.members]
    held = [
        {name: tensor.numpy().tobytes() for name, tensor in state["model"].items()}
        | {
            f"{key} {name}": part.numpy().tobytes()
            for key, memory in state["optimizer"].items()
            for name, part in (memory.items() if isinstance(memory, dict) else [("", memory)])
        }
        for state in states
    ]
    best = [{name: tensor.numpy().tobytes() for name, tensor in weights.items()} for weights in subject.best_weights]
    return numbers, held, best


def reasons(subject: Training) -> set[str | None]:
    """Why its members' steps are not captured; {None} where all are."""
    return {member.fixed.reason for member in subject.members if member.fixed is not None}


def captured(subject: Training) -> int:
    """How many shapes its members have captured."""
    return sum(len(member.fixed.replays) for member in subject.members if member.fixed is not None)
