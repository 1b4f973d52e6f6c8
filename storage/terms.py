"""A study's terms: how its trials are handed out, and what is stored of it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from hpo.storage.connection import Row


@dataclass(frozen=True)
class Terms:
    """How a study's trials are handed out."""

    budget: int  # trials to start, over all workers; failed ones count, adopted ones are not new
    timeout_s: float | None = None  # seconds with a live worker after which the study ends
    lease_s: float = 60.0  # seconds; a worker not heard of for so long loses its trials
    stall_s: float = 600.0  # seconds; a training without a new batch for so long loses its lease
    max_attempts: int = 3  # leases that may be lost in a row, without getting further, before a trial fails
    resolution: float = 0.0  # values closer than this are equal
    priority: int = 0  # standing workers take an owner's study with a higher one first
    max_workers: int | None = None  # trials at once; None: no limit
    patience: int | None = None  # so many trials in a row that bring nothing end the study; None: however many
    finalists: int = 0  # configurations in its finals; 0: it has none
    repeats: int = 1  # trainings of each of them


@dataclass(frozen=True)
class Patience:
    """How long a study waits for something better."""

    trials: int  # so many in a row that bring nothing end it
    since: int = 0  # number of the first trial that may be one of these: earlier ones are of a narrower space


@dataclass(frozen=True)
class Standstill:
    """That trials in a row have brought nothing."""

    since: int  # number of the last trial that brought something
    trials: int  # that have ended since

    @property
    def said(self) -> str:
        """In words."""
        trials = "1 trial" if self.trials == 1 else f"{self.trials} trials in a row"
        return f"{trials} brought nothing better than trial {self.since}"


@dataclass(frozen=True)
class Judgement:
    """Whether a study has come to a standstill, and what that was judged by."""

    patience: Patience
    finished: int  # complete and pruned trials that the study had
    dropped: tuple[int, ...]  # ids of the trials that did not count, in order
    standstill: Standstill | None = None  # None: it goes on
    last: int = 0  # it is waited for trials up to this number, which began before those that brought nothing
    number: int | None = None  # of the trial whose start was judged, under `parallel`


@dataclass(frozen=True)
class Notify:
    """Who is told of a study."""

    url: str | None  # where notices are sent; None: nowhere
    on: tuple[str, ...]  # of end, failure, promotion


NOBODY = Notify(None, ())


@dataclass(frozen=True)
class FinalsRow:
    """The finals of a study."""

    study_id: int  # their own
    name: str
    over: bool  # nothing is left of them to train


@dataclass(frozen=True)
class StudyRow:
    """A study's terms and state, as stored."""

    study_id: int
    name: str
    config: dict[str, Any]
    budget: int
    started: int
    timeout_s: float | None
    opened_at: datetime
    elapsed_s: float  # with a live worker; counted where there is a timeout
    lease_s: float
    stall_s: float
    max_attempts: int
    status: str  # open | stopped | exhausted | finished
    promoter: str | None
    promoter_expires_at: datetime | None
    promoted_version: int | None
    out_of_time: bool  # by the study's clock
    resolution: float
    store_key: str  # what stands for the study in the keys of its artifacts
    owner: str | None  # who submitted it through the service
    priority: int
    max_workers: int | None
    finalists: int
    repeats: int
    patience: int | None
    standstill: Standstill | None  # what has ended it, if that was its patience


def read_study(row: Row) -> StudyRow:
    """The terms from the row of the statement `study_terms`."""
    *known, standstill = row
    fields: Row = (*known, read_standstill(standstill))
    return StudyRow(*fields)


def read_standstill(stored: dict[str, int] | None) -> Standstill | None:
    """A standstill as it is stored."""
    return None if stored is None else Standstill(**stored)
