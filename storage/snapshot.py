"""The state of a study at one moment, for displays."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from hpo.storage.connection import Row
from hpo.storage.records import read_float
from hpo.storage.terms import Standstill, read_standstill

RECENT = 50  # ended trials that tell how fast a study goes: it may have rested for a night before
STATES = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "running", "WAITING": "waiting"}


@dataclass(frozen=True)
class InFlight:
    """A trial under an unended lease."""

    number: int
    worker: str
    host: str | None
    device: str | None
    attempt: int
    epoch: int | None
    metric: float | None
    alive: bool  # False: waits for adoption


@dataclass(frozen=True)
class Holder:
    """Who holds a trial, or held it last."""

    worker: str
    device: str | None
    attempt: int


@dataclass(frozen=True)
class WorkerRow:
    """A worker that served a study, as it made itself known."""

    worker: str
    host: str | None
    pid: int | None
    device: str | None
    log: str | None  # path on that host
    alive: bool  # not retired, and heard of within the study's lease


@dataclass(frozen=True)
class WorkerGroup:
    """Workers that are alive, of one study or standing, on one device of one machine."""

    host: str | None
    device: str | None
    workers: int


@dataclass(frozen=True)
class BestTrial:
    """The best of a study's trials: hpo/study/ranking.py has the rule."""

    number: int
    value: float
    ahead: tuple[int, float] | None = None  # number and value of one that is ahead by value, but equal by the rule

    @property
    def why(self) -> str | None:
        """In words, where the rule prefers it to a trial that is ahead by value."""
        if self.ahead is None:
            return None
        number, value = self.ahead
        return (
            f"trial {self.number} {self.value:.4f}, equal to trial {number}'s {value:.4f} within half a validation "
            "sequence, lower log-loss"
        )


@dataclass(frozen=True)
class Dropped:
    """A trial that does not count any more."""

    number: int
    reason: str
    by: str  # a token's owner, or USER@HOST
    when: datetime  # by the database's clock, with a time zone


@dataclass(frozen=True)
class Change:
    """That a study was changed after it began."""

    when: datetime  # by the database's clock, with a time zone
    by: str  # a token's owner, or USER@HOST
    what: str  # drop | restore | widen
    detail: dict[str, Any]  # trials and reason; or the entries of the space as they were and are, and the trials begun


@dataclass(frozen=True)
class FinalsProgress:
    """How far the finals of a study are."""

    name: str
    ended: int  # trainings
    budget: int


@dataclass(frozen=True)
class BeyondLimits:
    """How many trials cannot be promoted, as a prediction of theirs takes more than the study's limits."""

    limits: dict[str, float]  # by the keys of [limits]
    trials: int  # complete and pruned ones

    @property
    def said(self) -> str:
        """In words."""
        named = " and ".join(f"{name} {limit:g}" for name, limit in self.limits.items())
        return f"{self.trials} beyond {named}"


@dataclass(frozen=True)
class InOrder:
    """What it has cost that a study's trials start in their order."""

    parallel: int  # trial n starts when all up to n - parallel have ended
    waited_s: float  # of all workers together, with nothing to do but wait for earlier trials
    trained_s: float  # of all trials that have ended together

    @property
    def said(self) -> str:
        """In words."""
        share = self.waited_s / max(self.waited_s + self.trained_s, 1e-9)
        return f"workers waited {self.waited_s:.1f} s in all for earlier trials, {share:.1%} of their time"


@dataclass(frozen=True)
class Snapshot:
    """A study at one moment, for displays."""

    study_id: int
    name: str
    status: str
    budget: int
    started: int
    seconds_left: float | None  # of its timeout, at least 0; the clock stands while no worker lives
    promoted_version: int | None
    # complete, pruned, failed, running, waiting (enqueued, or for another worker to adopt it); copied, foreign ones too
    counts: dict[str, int]
    best: BestTrial | None  # of those that our workers trained
    in_flight: tuple[InFlight, ...]
    worker_groups: tuple[WorkerGroup, ...]  # by host and device
    rate_per_hour: float | None  # of trials ended under a lease: of the last RECENT, or of all since the first began
    first_started_at: datetime | None
    last_ended_at: datetime | None
    metric: str | None  # None: of a study that another version made
    owner: str | None  # who submitted it through the service
    priority: int
    max_workers: int | None
    dropped: tuple[Dropped, ...] = ()  # trials that do not count, by number; `counts` and `started` have them still
    dropped_winner: int | None = None  # number of the trial whose model was promoted, where it does not count any more
    patience: int | None = None  # so many trials in a row that bring nothing end it; None: however many
    standstill: Standstill | None = None  # what has ended it, if that was its patience
    finals: FinalsProgress | None = None  # None: they have not begun, or it wants none
    beyond: BeyondLimits | None = None  # None: it has no limits
    in_order: InOrder | None = None  # None: its trials start as workers are free

    @property
    def best_value(self) -> float | None:
        return None if self.best is None else self.best.value

    @property
    def best_number(self) -> int | None:
        return None if self.best is None else self.best.number

    @property
    def workers(self) -> int:
        """Workers that are alive, of this study or standing."""
        return sum(group.workers for group in self.worker_groups)


def read_snapshot(row: Row) -> Snapshot:
    """A snapshot from the row of the statement `snapshot`."""
    known, (counts, best, in_flight, groups, *rest, dropped, winner, patience, still) = row[:7], row[7:-3]
    finals, beyond, order = row[-3:]
    named = {name: (counts or {}).get(state, 0) for state, name in STATES.items()}
    trials = tuple(InFlight(*trial) for trial in in_flight or ())
    orphans = sum(not trial.alive for trial in trials)
    named |= {"running": named["running"] - orphans, "waiting": named["waiting"] + orphans}
    workers = tuple(WorkerGroup(*group) for group in groups or ())
    gone = tuple(Dropped(n, reason, by, datetime.fromisoformat(when)) for n, reason, by, when in dropped or ())
    fields: Row = (*known, named, _read_best(*best) if best else None, trials, workers, *rest, gone, winner)
    fields += (patience, read_standstill(still), FinalsProgress(*finals) if finals else None)
    fields += (BeyondLimits(*beyond) if beyond else None, InOrder(*order) if order else None)
    return Snapshot(*fields)


def _read_best(number: int, value: float | str, other: int | None, other_value: float | str) -> BestTrial:
    ahead = None if other is None else (other, read_float(other_value))
    return BestTrial(number, read_float(value), ahead)
