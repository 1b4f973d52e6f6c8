"""The exceptions of the storage that more than one of its modules raises. Importing this imports no library."""

from __future__ import annotations

from typing import Literal

from hpo.errors import HpoError

Reason = Literal["budget", "stopped", "timeout", "exhausted", "patience"]


class PostgresError(HpoError):
    """No usable PostgreSQL: the rule, what was found, and the way out."""


class DatabaseUnavailable(PostgresError):
    """The database stayed out of reach for the whole of `retry_s`."""


class DatabaseRefusal(DatabaseUnavailable):
    """The database rejects the connection or the statement, and would do so again."""


class SchemaError(HpoError):
    """The database was made by another version of this package or of Optuna."""


class MissingRecord(HpoError, KeyError):
    """There is no such study or trial. Also a KeyError, which is what Optuna's contract asks for."""

    __str__ = Exception.__str__  # KeyError's shows the message in quotes


class LeaseLost(HpoError):
    """The trial is in other hands: its lease ran out, or another worker adopted it."""


class TrialLeased(HpoError):
    """Only the worker that holds the trial's lease ends it."""


class StudyOver(HpoError):
    """Nothing is left to take, and no trial is in flight. `reason`: budget, stopped, timeout, exhausted or patience."""

    def __init__(self, study_id: int, reason: Reason) -> None:
        super().__init__(f"study {study_id} is over: {reason}")
        self.reason = reason
