"""A study's terms: how its trials are handed out, and what is stored of it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any


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
