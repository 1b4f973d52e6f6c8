"""The numbers of a database that a monitoring system asks for, in one statement."""

from __future__ import annotations

from dataclasses import dataclass

from hpo.storage.connection import Connection
from hpo.storage.snapshot import STATES
from hpo.storage.statements import statement

_METRICS = statement("metrics")
STUDY_STATES = ("open", "stopped", "exhausted", "finished")
NOTICE_STATES = ("waiting", "delivered", "given up")


@dataclass(frozen=True)
class Numbers:
    """Of all studies that `hpo` has made."""

    studies: dict[str, int]  # by status
    trials: dict[str, int]  # by state: complete, pruned, failed, running, waiting
    held: int  # trials under a lease
    queued: int  # trials that open studies may still begin
    workers: int  # alive
    notices: dict[str, int]  # by state


def read_numbers(connection: Connection) -> Numbers:
    """As they are now. Raises PostgresError."""
    ((studies, trials, held, queued, workers, notices),) = connection.execute(_METRICS)
    return Numbers(
        studies={status: (studies or {}).get(status, 0) for status in STUDY_STATES},
        trials={name: (trials or {}).get(state, 0) for state, name in STATES.items()},
        held=held,
        queued=queued,
        workers=workers,
        notices={state: (notices or {}).get(state, 0) for state in NOTICE_STATES},
    )
