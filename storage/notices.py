"""Notices to the addresses that studies name: kept until they are delivered, so that none is lost with a process.

Triggers write a notice in the transaction of what it tells of (migration 0004). Whoever sends takes one by setting the
time of its next attempt; hpo/notify.py sends.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from hpo.storage.connection import Connection
from hpo.storage.masking import mask
from hpo.storage.snapshot import RECENT, read_snapshot
from hpo.storage.statements import statement

FIRST_S, LONGEST_S = 20.0, 3600.0  # between two attempts at first, and at most
ATTEMPTS = 30  # in about a day, where somebody sends all the time
_CLAIM, _COMPLETE, _ONE = statement("claim_notices"), statement("complete_notice"), statement("one_notice")
_DELIVERED = [statement(name) for name in ("notice_delivered", "forget_old_notices")]
_FAILED = statement("notice_failed")
_NOTE_FAILURE, _NOTICES, _DUE = statement("note_failure"), statement("notices"), statement("notices_due")
_SNAPSHOTS = statement("snapshots")


@dataclass(frozen=True)
class Notice:
    """What an address is told, and how that went."""

    notice: int
    study_id: int
    study_name: str
    url: str
    event: str  # study.end | study.failure | model.promotion
    body: dict[str, Any]  # JSON
    created_at: datetime
    attempts: int  # begun
    next_at: datetime | None  # of the next attempt; None: there is none any more
    delivered_at: datetime | None
    fault: str | None  # of the last attempt that failed

    @property
    def state(self) -> str:
        """delivered, waiting, or given up."""
        return "delivered" if self.delivered_at else "waiting" if self.next_at else "given up"


class Notices:
    """The notices of a database whose tables are up to date. Raises PostgresError like its connection."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def claim(self, count: int, study_id: int | None = None) -> list[Notice]:
        """Take at most so many of those that are due, of one study or of any, for an attempt within FIRST_S."""
        given = {"study": study_id, "count": count, "first_s": FIRST_S, "longest_s": LONGEST_S, "most": ATTEMPTS}
        return [self._completed(Notice(*row)) for row in self._connection.execute(_CLAIM, given=given)]

    def due(self, study_id: int | None = None) -> int:
        """How many could be sent now."""
        count: int = self._connection.execute(_DUE, given={"study": study_id})[0][0]
        return count

    def delivered(self, notice: Notice) -> None:
        """It has arrived."""
        self._connection.execute(*_DELIVERED, given={"notice": notice.notice})

    def failed(self, notice: Notice, fault: str) -> None:
        """This attempt has failed."""
        given = {"notice": notice.notice, "attempts": notice.attempts, "fault": fault}
        self._connection.execute(_FAILED, given=given)

    def note_failure(self, study_id: int, reason: str) -> None:
        """Write that a study fails, unless that was the last thing to be said of it."""
        self._connection.execute(_NOTE_FAILURE, given={"study": study_id, "reason": mask(reason)})

    def last(self, study: str | None = None, most: int = 100) -> list[Notice]:
        """The newest first; of the studies of one name, or of all."""
        return [Notice(*row) for row in self._connection.execute(_NOTICES, given={"study": study, "most": most})]

    def _completed(self, notice: Notice) -> Notice:
        """With the study's trials and best value, as they are when it is first sent; each attempt says the same."""
        if "trials" in notice.body:
            return notice
        rows = self._connection.execute(_SNAPSHOTS, given={"studies": [notice.study_id], "recent": RECENT})
        more: dict[str, Any] = {"trials": {}, "budget": None, "metric": None, "best": None}  # the study was deleted
        if rows:
            state = read_snapshot(rows[0])
            best = None if state.best is None else {"number": state.best.number, "value": _finite(state.best.value)}
            more = {"trials": dict(state.counts), "budget": state.budget, "metric": state.metric, "best": best}
        given = {"notice": notice.notice, "more": json.dumps(more)}
        (row,) = self._connection.execute(_COMPLETE, _ONE, given=given)
        return Notice(*row)


def _finite(value: float) -> float | None:
    """JSON has no other numbers."""
    return value if math.isfinite(value) else None
