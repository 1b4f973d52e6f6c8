"""What a report says, gathered from a study by `hpo/promote/report.py` and drawn by `rendering.py`.

Everything that a study need not have is None or empty, and its section is left out. JSON-like values alone: no torch,
no database.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from hpo.models.bundle.config import BundleConfig
from hpo.models.class_scores import ModelScores
from hpo.models.diagnosis import Diagnosis

Curve = Mapping[str, Sequence[float | None]]  # "value", "train_loss", "log_loss", a number an epoch
STATES = ("complete", "pruned", "failed", "running", "waiting")


@dataclass(frozen=True)
class Asked:
    """What was asked."""

    metric: str
    maximize: bool
    budget: int  # trials
    timeout_s: float | None
    patience: int | None
    sampler: str
    pruner: str
    finalists: int
    repeats: int
    data: str  # name of the training file
    test: str | None  # how the test part was made; None: there is none
    validation: str  # how validation parts are made
    classes: tuple[str, ...]
    features: tuple[str, ...]
    sequences: int  # of the training part
    steps: int
    members: int  # networks of a trial
    limits: Mapping[str, float]  # by name: latency_ms, size_mb
    columns: Mapping[str, str]


@dataclass(frozen=True)
class TrialFact:
    """One trial. What is not known is None; values and losses are finite."""

    number: int
    state: str  # one of STATES
    value: float | None
    params: Mapping[str, Any]
    training_s: float | None  # in epochs
    span: tuple[datetime, datetime] | None  # its begin and its end, with waits and adoptions between them
    worker: str | None
    device: str | None
    failure: str | None
    dropped: bool
    curve: Curve
    latency_ms: float | None = None  # of one prediction by its networks together
    size_mb: float | None = None
    feasible: bool | None = None  # None: there are no limits, or it is not known

    @property
    def held_s(self) -> float | None:
        """Seconds from its begin to its end."""
        return None if self.span is None else max(0.0, (self.span[1] - self.span[0]).total_seconds())

    @property
    def counts(self) -> bool:
        """Whether it is complete, has a value and was not dropped."""
        return self.state == "complete" and self.value is not None and not self.dropped


@dataclass(frozen=True)
class FinalistFact:
    """A configuration in the finals."""

    trial: int
    selected: float  # its value in the study
    values: tuple[float, ...]  # fresh ones, by repeat
    weights: int  # of its networks
    equal: bool  # its values do not tell it from the best mean
    winner: bool
    curves: tuple[Curve, ...]  # by repeat

    @property
    def mean(self) -> float:
        return sum(self.values) / len(self.values)

    @property
    def error(self) -> float | None:
        """Standard error of the mean; None of one value."""
        n = len(self.values)
        if n < 2:
            return None
        return math.sqrt(sum((value - self.mean) ** 2 for value in self.values) / (n - 1) / n)


@dataclass(frozen=True)
class Slice:
    """One parameter's values and what trials with them scored."""

    name: str
    importance: float  # share of all, 0 to 1
    log: bool
    points: tuple[tuple[Any, float, int], ...]  # (value, score, trial) of complete trials
    pruned: tuple[Any, ...] = ()  # values of pruned ones


@dataclass(frozen=True)
class Importances:
    """Which parameters told good trials from others."""

    shares: tuple[tuple[str, float], ...]  # (parameter, share of all), the largest first
    slices: tuple[Slice, ...]  # of the most important ones
    trials: int  # complete and pruned ones, that it was found by
    quantile: float  # share of the trials that count as good


@dataclass(frozen=True)
class ModelFact:
    """The promoted model."""

    name: str
    version: int | None  # None: it is being promoted
    trial: int
    value: float  # by which the trial was selected
    config: BundleConfig
    scores: ModelScores
    diagnosis: Diagnosis | None  # None: an earlier version of hpo has promoted it
    test_looks: int | None  # versions measured on the test part so far


@dataclass(frozen=True)
class Cost:
    """Time that trials took, those of finals apart."""

    wall_s: float | None  # from the first begin to the last end, finals included
    began: datetime | None
    ended: datetime | None
    trials: tuple[TrialFact, ...]
    finals: tuple[TrialFact, ...]


@dataclass(frozen=True)
class Repeat:
    """All that it takes to repeat the study."""

    versions: Mapping[str, Any]  # packages, Python, platform, threads, commit
    devices: tuple[str, ...]
    kernels: tuple[str, ...]
    seed: int  # of the study
    checksums: Mapping[str, str]  # SHA-256 of the data, by part
    commands: tuple[str, ...]
    study_file: str  # TOML, every default written out


@dataclass(frozen=True)
class Facts:
    """A study's report."""

    study: str
    over: bool
    state: str  # of the study, in a word
    ended_by: str | None  # why it ended, where it is over
    asked: Asked
    trials: tuple[TrialFact, ...]
    best: int | None  # number of the best trial
    finals: tuple[FinalistFact, ...]  # the best mean first
    resolution: float  # values closer than this are equal
    importances: Importances | None
    model: ModelFact | None
    cost: Cost
    repeat: Repeat
    private: bool = field(default=False)  # with what is the data owner's alone: ids, values, names of groups

    @property
    def winner(self) -> int | None:
        """Number of the trial that the report is about: the model's, else the finals' winner, else the best one."""
        if self.model is not None:
            return self.model.trial
        return next((each.trial for each in self.finals if each.winner), self.best)

    def trial(self, number: int | None) -> TrialFact | None:
        return next((each for each in self.trials if each.number == number), None)

    def count(self, state: str) -> int:
        return sum(each.state == state for each in self.trials)
