"""What goes over the wire. Imports neither torch nor Optuna, so that a client starts at once."""

from __future__ import annotations

import math
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

if TYPE_CHECKING:
    from hpo.models.bundle.predictions import Predictions


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


Number = Annotated[float | None, BeforeValidator(_finite)]  # JSON has neither NaN nor infinity

if TYPE_CHECKING:
    from hpo.models.bundle.predictions import Predictions


class DataFile(BaseModel):
    """A stored data file, and what was read from it."""

    key: str  # what a study file names as [data] train or test
    sequences: int
    steps: int
    features: list[str]
    classes: dict[str, int]  # sequences of each
    groups: int | None
    filled: int  # missing values
    warnings: list[str]


class StoredData(BaseModel):
    """A data file that the store has."""

    key: str


class Best(BaseModel):
    """The best of a study's trials."""

    number: int
    value: Number


class Dropped(BaseModel):
    """A trial that does not count any more."""

    number: int
    reason: str
    by: str
    when: datetime


class Finals(BaseModel):
    """How far the finals of a study are: the best configurations, trained again on fresh seeds and splits."""

    name: str
    ended: int  # trainings
    budget: int


class Standstill(BaseModel):
    """That a study ended by its patience: its last trials brought nothing better."""

    since: int  # number of the last trial that brought something
    trials: int  # that ended after it, before the study did


class BeyondLimits(BaseModel):
    """How many trials cannot be promoted, as a prediction of theirs takes more than the study's limits."""

    limits: dict[str, float]  # latency_ms, size_mb
    trials: int  # complete and pruned ones


class InOrder(BaseModel):
    """What it has cost that a study's trials start in their order."""

    parallel: int  # trial n starts when all up to n - parallel have ended
    waited_s: float  # of all workers together, with nothing to do but wait for earlier trials
    trained_s: float  # of all trials that have ended together


class Study(BaseModel):
    """A study at one moment."""

    name: str
    status: str  # open | stopped | exhausted | finished
    owner: str | None
    priority: int
    max_workers: int | None
    metric: str | None
    trials: dict[str, int]  # by state
    budget: int
    best: Best | None
    version: int | None  # of its promoted model
    workers: int
    per_hour: float | None
    seconds_left: float | None  # of its timeout
    dropped: list[Dropped] = []  # trials that do not count; `trials` has them still
    dropped_winner: int | None = None  # of which trial its model is, where that one does not count any more
    finals: Finals | None = None  # where they have begun
    patience: int | None = None  # so many trials in a row that bring nothing end it
    standstill: Standstill | None = None  # where they did
    beyond_limits: BeyondLimits | None = None  # where it has limits
    in_order: InOrder | None = None  # where study.parallel says so


class Trial(BaseModel):
    """A trial and its parameters."""

    number: int
    state: str
    value: Number
    params: dict[str, Any]
    started: datetime | None
    ended: datetime | None
    failure: str | None
    dropped: Dropped | None = None  # it does not count any more
    best_epoch: int | None = None  # from 1; this and what follows as far as it is known
    epochs: int | None = None  # trained
    log_loss: Number = None  # of the best epoch
    threshold: Number = None
    seed: int | None = None
    training_seconds: Number = None
    weight_count: int | None = None  # that were trained
    latency_ms: Number = None  # of a prediction of one sequence, by the model that it becomes
    size_mb: Number = None  # 10^6 bytes of that model's weights
    feasible: bool | None = None  # whether it is within the study's limits; null without any
    device: str | None = None
    worker: str | None = None  # that trains it, or did so last
    attempt: int | None = None  # leases that it took


class TrialDetails(Trial):
    """A trial with all that is kept of its training."""

    reports: dict[str, Number]  # the metric by epoch, from 1
    curve: dict[str, list[Number]]  # value, train_loss and log_loss of each epoch; of a trial that has ended
    seconds: float | None  # of training
    log: str | None  # CSV: time, level, message


class Log(BaseModel):
    """A file in which workers log, and its last lines."""

    host: str
    path: str  # on that host
    title: str  # whose it is and where it lies
    workers: list[str]
    text: str  # or where it can be read


class Change(BaseModel):
    """That a study was changed after it began."""

    when: datetime
    by: str
    what: str  # drop | restore | widen
    detail: dict[str, Any]  # trials and reason; or the entries of the space as they were and are


class Trials(BaseModel):
    """A page of a study's trials, by number."""

    total: int
    trials: list[Trial]


class Notice(BaseModel):
    """What a study's [notify] url is told, and how that went."""

    notice: int
    event: str  # study.end | study.failure | model.promotion
    state: str  # delivered | waiting | given up
    attempts: int
    fault: str | None  # of the last attempt that failed
    created: datetime
    next: datetime | None  # attempt
    delivered: datetime | None


class Reason(BaseModel):
    """Why a trial is not to count."""

    model_config = ConfigDict(extra="forbid")

    reason: str = Field(min_length=1, max_length=500, examples=["the sensor was wired wrongly"])


class Budget(BaseModel):
    """What a study may go on with."""

    model_config = ConfigDict(extra="forbid")

    trials: int | None = Field(default=None, strict=True, ge=1, le=2**31 - 1, examples=[80])  # None: as many as it had
    # None: as much as it had; 0: without end
    patience: int | None = Field(default=None, strict=True, ge=0, le=2**31 - 1, examples=[40])


class Model(BaseModel):
    """A promoted version."""

    name: str
    version: int
    aliases: list[str]  # the name alone means `latest`
    study: str | None
    trial: int | None
    created: datetime
    scores: dict[str, Any]  # metric, value, validation, test, intervals of the test part's (95 %), sequences of each, …
    params: dict[str, Any]


class Prediction(BaseModel):
    """What a model says of sequences."""

    model: str
    version: int
    classes: list[str]
    ids: list[str]
    labels: list[str]
    probabilities: list[list[float]]

    def predictions(self) -> Predictions:
        """What displays and `to_csv` take."""
        import numpy as np

        from hpo.models.bundle.predictions import Predictions

        return Predictions(
            classes=tuple(self.classes),
            probabilities=np.array(self.probabilities, np.float32),
            labels=np.array(self.labels),
            ids=tuple(self.ids),
        )


class Alias(BaseModel):
    """The version that an alias is to name."""

    model_config = ConfigDict(extra="forbid")

    version: int = Field(strict=True, ge=1, le=10**9, examples=[3])
