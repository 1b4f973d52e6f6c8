"""What people change of a study that exists: trials that no longer count, a wider space, and the record of all changes.

A trial that was dropped keeps its number, its place in the budget and all that is recorded of it. Who draws, prunes,
ranks or promotes leaves it out; see `TrialStorage.dropped` and the statement `snapshots`.
"""

from __future__ import annotations

import getpass
import json
import os
import socket
from collections.abc import Mapping, Sequence
from typing import Any

from hpo.errors import HpoError, legible
from hpo.storage.errors import MissingRecord
from hpo.storage.snapshot import Change, Dropped
from hpo.storage.statements import statement
from hpo.storage.terms import read_study
from hpo.storage.trials import TrialStorage

LONGEST_REASON = 500  # characters
FINISHED = ("COMPLETE", "PRUNED", "FAIL")
_LOCK_STUDY, _AS_THEY_ARE = statement("lock_study"), statement("trials_as_they_are")
_WIDEN, _CHANGES = statement("widen_study"), statement("changes")
_REOPEN, _TERMS = statement("reopen_study"), statement("study_terms")
_DROP, _RESTORE, _DROPPED = statement("drop_trials"), statement("restore_trials"), statement("dropped_trials")


class ReasonError(HpoError):
    """A reason must be a text, of at most LONGEST_REASON characters."""


class UnfinishedTrial(HpoError):
    """The trial has not ended, so there is nothing of it that counts."""


def somebody() -> str:
    """Who asks, as USER@HOST, where no token says it."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a number without a name, as containers have it
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


def drop(storage: TrialStorage, study_id: int, numbers: Sequence[int], reason: str, by: str) -> None:
    """Let finished trials count no more: all of these, or none.

    Those that were dropped stay as they are, with their first reason. Raises MissingRecord, UnfinishedTrial and
    ReasonError.
    """
    if not reason.strip() or "\0" in reason or len(reason) > LONGEST_REASON:
        raise ReasonError(f"say why in 1 to {LONGEST_REASON} characters, got {legible(reason, 400)!r}")
    wanted = sorted(set(numbers))
    given = {"study": study_id, "numbers": wanted, "reason": reason, "who": by}
    _check(storage.session.execute_once(_LOCK_STUDY, _DROP, _AS_THEY_ARE, given=given), study_id, wanted)


def restore(storage: TrialStorage, study_id: int, numbers: Sequence[int], by: str) -> None:
    """Let trials count again: all of these, or none. Nothing changes for those that do. Raises like `drop`."""
    wanted = sorted(set(numbers))
    given = {"study": study_id, "numbers": wanted, "who": by}
    _check(storage.session.execute_once(_LOCK_STUDY, _RESTORE, _AS_THEY_ARE, given=given), study_id, wanted)


def dropped(storage: TrialStorage, study_id: int) -> dict[int, Dropped]:
    """The study's trials that do not count, by number."""
    rows = storage.session.execute(_DROPPED, given={"study": study_id})
    return {number: Dropped(number, reason, by, when) for number, reason, by, when in rows}


def widen(
    storage: TrialStorage,
    study_id: int,
    config: Mapping[str, Any],
    detail: Mapping[str, Any],
    by: str,
    *,
    revision: int,
    trials: int,
    timeout_s: float | None,
    patience: int | None,
) -> bool:
    """Store a plan whose space is wider than that of the `revision` before it, and the study's budget, in one
    transaction. detail: the entries as they were and are, for the record. Whether it is what is stored now.
    """
    stored = json.dumps(config)
    given = {
        "study": study_id,
        "revision": revision,
        "config": stored,
        "detail": json.dumps(detail),
        "who": by,
        "trials": trials,
        "timed": True,
        "timeout_s": timeout_s,
        "patient": True,
        "patience": patience,
    }
    rows = storage.session.execute(_LOCK_STUDY, _WIDEN, _REOPEN, _TERMS, given=given, durable=True)
    return bool(rows) and read_study(rows[0]).config == json.loads(stored)


def history(storage: TrialStorage, study_id: int) -> list[Change]:
    """What was changed of a study after it began, oldest first."""
    return [Change(*row) for row in storage.session.execute(_CHANGES, given={"study": study_id})]


def _check(rows: list[tuple[int | None, str | None, int]], study_id: int, wanted: Sequence[int]) -> None:
    """Raise the reason why nothing was changed."""
    if not rows:
        raise MissingRecord(f"no study has the id {study_id}")
    states, total = {number: state for number, state, _ in rows}, rows[0][2]
    for number in wanted:
        if number not in states:
            has = f"trials 0 to {total - 1}" if total else "no trials yet"
            raise MissingRecord(f"the study has {has}, not {number}; nothing was changed")
        if states[number] not in FINISHED:
            state = (states[number] or "").lower()
            raise UnfinishedTrial(
                f"only a trial that has ended can be dropped or restored, and trial {number} is {state}: it does not "
                "count yet, do it once it has ended; nothing was changed"
            )
