"""A process's session with the database: writes held back and sent along, fences, and calls that happen once.

Writes to a trial that this process runs are held back for a moment and go ahead of the next statement, in the same
round trip and transaction. Writes to a leased trial are fenced: the statement that writes also checks, and locks, the
lease. What must happen once is claimed in `hpo.calls` in its own transaction, so that a repetition after a lost
connection finds it. Reports are committed without waiting for the disk, but kept until a later commit waited, and
sent again to a server that came back without them.
"""

from __future__ import annotations

import atexit
import logging
import math
import os
import threading
import time
import uuid
import weakref
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import psycopg2
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState
from psycopg2.extensions import cursor as Cursor  # noqa: N812

from hpo.storage.cache import HeldTrials
from hpo.storage.connection import Connection, Row
from hpo.storage.errors import LeaseLost, MissingRecord
from hpo.storage.statements import BoundStatement, Statement, statement
from hpo.storage.writes import NO_WAIT, Fence, Writes, bind

log = logging.getLogger(__name__)

HELD_BACK_S = 0.2  # the longest that a write waits for a statement to go with …
REPORTS_S = 2.0  # … and reports of a leased trial, as displays learn as often from its heartbeat how far it is
_TRIAL_OWNER = statement("trial_owner")


class Session:
    """See the module. Shared by the threads of a process; a forked child begins with nothing to write."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._begin()
        _OPEN.add(self)

    def _begin(self) -> None:
        """Start with nothing to write: when new, and in the child after a fork."""
        self._client, self._call = str(uuid.uuid4()), 0
        self._own: dict[int, int] = {}  # trials that this process runs -> study
        self._fences: dict[int, Fence] = {}  # those attached
        self._lost: set[int] = set()  # attached trials whose lease is known to be lost
        self.trials = HeldTrials()  # those attached
        self._pending: dict[int, Writes] = {}  # held back
        self._due = math.inf  # when it is to be written at the latest, by the monotonic clock
        self._unsure: dict[int, Writes] = {}  # committed, perhaps not yet on the server's disk
        self._generation = 0  # the connection that `_unsure` was sent on
        self._waiting: threading.Event | None = None  # set while something is held back
        self._failed: psycopg2.DataError | None = None  # met by the thread, raised by the next call

    # ------------------------------------------------------------------------------------------------- statements

    def execute(self, *statements: Statement | str, given: Any = None, durable: bool = False) -> list[Row]:
        """One round trip: what is held back, then these, which must be safe to repeat; the rows of the last one.

        durable: the commit waits for the disk.
        """
        bound = [(each, given) for each in statements]
        return self.connection.with_retries(lambda cursor: self._execute_on(cursor, *bound, durable=durable))

    def execute_once(self, *statements: Statement, given: Mapping[str, Any]) -> list[Row]:
        """One durable transaction that happens once.

        The statements have the parameters `client` and `call` too, for which a repetition after a lost connection
        finds in `hpo.calls` what an earlier try has done.
        """
        with self.connection.lock:
            self._call += 1
            return self.execute(*statements, given={**given, "client": self._client, "call": self._call}, durable=True)

    def flush(self) -> None:
        """Write what is held back. A trial that was lost meanwhile raises at the next call that names it."""
        with self.connection.lock:
            if self._pending:
                self.connection.with_retries(self._write_pending)

    def _execute_on(self, cursor: Cursor, *bound: BoundStatement, durable: bool = False) -> list[Row]:
        if self._failed is not None:
            error, self._failed = self._failed, None
            raise error
        self._recall()
        if not self._pending:
            rows = self.connection.execute_on(cursor, *bound)
        else:
            batch = dict(self._pending)
            ahead = [bind(batch, self._fences)] if durable else [*self._no_wait, bind(batch, self._fences)]
            try:
                rows = self.connection.execute_on(cursor, *ahead, *bound)
            except psycopg2.DataError:  # a trial that may not be written to, or a value that the tables cannot hold
                self._write_pending(cursor)
                return self._execute_on(cursor, *bound, durable=durable)
            self._sent(batch)
        if durable and rows:  # something was written, and with it all that went before reached the disk
            self._unsure.clear()
        return rows

    @property
    def _no_wait(self) -> list[BoundStatement]:
        """What comes before writes whose commit need not wait for the disk, as a server that comes back without them is
        noticed; behind a pooler it is not."""
        return [] if self.connection.pooled else [NO_WAIT]

    def _write_pending(self, cursor: Cursor) -> None:
        """Write trial by trial, so that one lost trial does not hold up the others."""
        self._recall()
        for trial_id, writes in list(self._pending.items()):
            try:
                self.connection.execute_on(cursor, *self._no_wait, bind({trial_id: writes}, self._fences))
                self._sent({trial_id: writes})
            except psycopg2.errors.DivisionByZero:
                self._give_up(trial_id)
            except psycopg2.DataError:
                del self._pending[trial_id]
                self.trials.forget(trial_id)
                raise

    def _sent(self, batch: Mapping[int, Writes]) -> None:
        for trial_id, writes in batch.items():
            del self._pending[trial_id]
            self._unsure.setdefault(trial_id, Writes()).update(writes)
        if not self._pending:
            self._due = math.inf

    def _recall(self) -> None:
        """After a new connection: what was committed but may not have reached the disk is written again."""
        if self._generation != self.connection.generation:
            for trial_id, writes in self._unsure.items():
                writes.update(self._pending.get(trial_id, Writes()))
                self._pending[trial_id] = writes
                self._due = -math.inf
            self._unsure = {}
            self._generation = self.connection.generation

    # ----------------------------------------------------------------------------------------- writing to a trial

    def own(self, trial_id: int, study_id: int) -> None:
        """This process runs the trial: writes to it may be held back."""
        self._own[trial_id] = study_id

    def study_of(self, trial_id: int) -> int | None:
        """The study of a trial that this process runs."""
        return self._own.get(trial_id)

    def write(self, trial_id: int, writes: Writes) -> None:
        """Hold back for a trial that this process runs; write at once to any other.

        Raises LeaseLost, UpdateFinishedTrialError or MissingRecord for a trial that may not be written to.
        """
        with self.connection.lock:
            self.check(trial_id)
            if trial_id in self._own:
                self._hold_back(trial_id, writes).update(writes)
                self.trials.update(trial_id, writes)
                if self._waiting is None:
                    self.write_late()
                return
            written, given = bind({trial_id: writes}, {})
            try:
                self.execute(written, given=given, durable=True)
            except psycopg2.errors.DivisionByZero:
                self.explain_rejection(trial_id)

    def _hold_back(self, trial_id: int, writes: Writes) -> Writes:
        """The writes of a trial that wait for the next statement: HELD_BACK_S at the longest, or REPORTS_S.

        Where no thread can be started that sees to it, `_waiting` stays None.
        """
        only_reports = trial_id in self._fences and not (writes.params or writes.user or writes.system)
        self._due = min(self._due, time.monotonic() + (REPORTS_S if only_reports else HELD_BACK_S))
        if self._waiting is None:
            waiting = threading.Event()
            given = (weakref.ref(self), waiting)
            with suppress(RuntimeError):
                threading.Thread(target=_write_late, args=given, name="hpo-storage", daemon=True).start()
                weakref.finalize(self, waiting.set)  # the thread ends with the session
                self._waiting = waiting
        if self._waiting is not None:
            self._waiting.set()
        return self._pending.setdefault(trial_id, Writes())

    def write_due(self, waiting: threading.Event) -> None:
        """Write what no statement took along, if its time has come; `waiting` is cleared where nothing is left."""
        with self.connection.lock:
            if not self._pending or time.monotonic() >= self._due:
                waiting.clear()
                self.write_late()

    def write_late(self) -> None:
        """Write what no statement took along, once; a value that does not fit raises at the next call."""
        with self.connection.lock:
            try:
                if self._pending:
                    self.connection.with_retries(self._write_pending, retry_s=0.0)
            except psycopg2.DataError as error:
                self._failed = error
            except Exception as error:  # the next call meets the same error and raises it
                log.debug("could not write what was held back: %s", error)

    # ------------------------------------------------------------------------------------------------------ fences

    def attach(self, fence: Fence) -> None:
        """Fence every write to the trial: LeaseLost instead, once the lease is lost. Only `Leases` calls this."""
        with self.connection.lock:
            if self._fences.get(fence.trial_id) != fence:
                self._give_up(fence.trial_id)  # nothing of an earlier lease may pass under this one
            self._fences[fence.trial_id] = fence
            self._own[fence.trial_id] = fence.study_id
            self._lost.discard(fence.trial_id)

    def detach(self, fence: Fence) -> None:
        """Write what is held back, while the fence still holds, and take it away. Only `Leases` calls this."""
        with self.connection.lock:
            if self._fences.get(fence.trial_id) != fence:
                return
            try:
                if fence.trial_id in self._pending:
                    self.flush()
            finally:
                self._give_up(fence.trial_id)
                self.forget(fence.trial_id)

    def held(self) -> list[int]:
        """The trials that threads of this process hold, as far as is known."""
        return [trial_id for trial_id in self._fences if trial_id not in self._lost]

    def fence_of(self, trial_id: int) -> Fence | None:
        """The fence around a trial, if there is one."""
        return self._fences.get(trial_id)

    def forget(self, trial_id: int) -> None:
        """The trial ended or goes into other hands."""
        self._own.pop(trial_id, None)
        self._fences.pop(trial_id, None)
        self._lost.discard(trial_id)
        self.trials.forget(trial_id)

    def forget_study(self, study_id: int) -> None:
        """The study was deleted: nothing is written to its trials any more."""
        for trial_id in [i for i, study in self._own.items() if study == study_id]:
            self._pending.pop(trial_id, None)
            self._unsure.pop(trial_id, None)
            self.forget(trial_id)

    def check(self, trial_id: int) -> None:
        """Raise LeaseLost for a trial whose lease is known to be lost."""
        if trial_id in self._lost:
            fence = self._fences[trial_id]
            raise LeaseLost(
                f"worker {fence.worker} has lost its lease on trial {fence.number} (attempt {fence.attempt}); "
                "nothing more of it is written, another worker goes on with the trial"
            )

    def explain_rejection(self, trial_id: int) -> None:
        """Raise the reason why a trial could not be written to; return where it may be."""
        if trial_id in self._fences:
            self._give_up(trial_id)
            self.check(trial_id)
        _, number, state = self.owner(trial_id)
        if state.is_finished():
            raise UpdateFinishedTrialError(f"Trial#{number} has already finished and can not be updated.")

    def owner(self, trial_id: int) -> tuple[int, int, TrialState]:
        """Study, number and state of a trial. Raises MissingRecord."""
        rows = self.execute(_TRIAL_OWNER, given={"trial": trial_id})
        if not rows:
            raise MissingRecord(f"no trial has the id {trial_id}")
        study_id, number, state = rows[0]
        return study_id, number, TrialState[state]

    def _give_up(self, trial_id: int) -> None:
        """The trial is not ours any more: forget what was to be written."""
        self._pending.pop(trial_id, None)
        self._unsure.pop(trial_id, None)
        self._own.pop(trial_id, None)
        self.trials.forget(trial_id)
        if trial_id in self._fences:
            self._lost.add(trial_id)


def _write_late(reference: weakref.ref[Session], waiting: threading.Event) -> None:
    """The thread that writes what no statement took along."""
    while waiting.wait():
        time.sleep(HELD_BACK_S)
        session = reference()
        if session is None:
            return
        session.write_due(waiting)
        del session


_OPEN: weakref.WeakSet[Session] = weakref.WeakSet()


def _after_fork() -> None:
    """What was held back is the parent's to write."""
    for session in list(_OPEN):
        session._begin()


def _at_exit() -> None:
    for session in list(_OPEN):
        session.write_late()


os.register_at_fork(after_in_child=_after_fork)
atexit.register(_at_exit)
