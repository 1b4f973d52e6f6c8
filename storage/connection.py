"""The process's connection to Postgres: made when first used, renewed after a loss or a fork."""

from __future__ import annotations

import logging
import os
import random
import re
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import psycopg2
from psycopg2 import extensions
from sqlalchemy import make_url
from sqlalchemy.dialects.postgresql.psycopg2 import PGDialect_psycopg2

from hpo.storage.errors import DatabaseUnavailable
from hpo.storage.statements import BoundStatement, Statement

log = logging.getLogger(__name__)

T = TypeVar("T")
Row = tuple[Any, ...]

# A stopped or cut-off process must not keep others waiting for its locks, nor its socket for hours. Plans are kept
# while tables grow from nothing, so they must go by an index from the start.
# Set by a statement, as poolers reject them as options of the connection.
SETTINGS = {
    "idle_in_transaction_session_timeout": "10s",
    "lock_timeout": "10s",
    "timezone": "UTC",
    "plan_cache_mode": "force_generic_plan",
    "enable_seqscan": "off",
    "jit": "off",
    "tcp_keepalives_idle": "10",
    "tcp_keepalives_interval": "5",
    "tcp_keepalives_count": "4",
}
DEFAULTS = {
    "application_name": "hpo",
    "connect_timeout": 10,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 4,
    "tcp_user_timeout": 30_000,
}
# Errors that another try may get past: on the same connection (deadlock, lock timeout, full disk or memory) …
PATIENCE = ("40P01", "40001", "55P03", "53100", "53200")
# … or on a new one (shutting down, starting up, too many connections, a standby during failover, idle too long).
TRANSIENT = (*PATIENCE, "57P01", "57P02", "57P03", "53300", "25006", "25P03")
SILENCE_S = 2.0  # that a database may be away without a line in the log
# Statements that this connection has prepared are not known, or were prepared by another one.
MIXED = ("26000", "42P05")
REJECTIONS = ("authentication failed", "does not exist", "no pg_hba.conf entry", "no password supplied")


def connect_arguments(url: str) -> dict[str, Any]:
    """psycopg2's arguments for a SQLAlchemy or libpq URL of PostgreSQL. Raises ValueError for another database's."""
    parsed = make_url(url)
    if parsed.get_backend_name() not in ("postgresql", "postgres"):
        raise ValueError(f"studies live in PostgreSQL: a postgresql:// URL is needed, got {parsed.drivername}://…")
    arguments = PGDialect_psycopg2().create_connect_args(parsed)[1]  # type: ignore[no-untyped-call]
    return {**DEFAULTS, **arguments}


class Connection:
    """One psycopg2 connection in autocommit mode, one caller at a time.

    `execute` and `with_retries` repeat their work after a lost connection, with backoff, for `retry_s` seconds, so
    what they are given must be safe to repeat. They raise DatabaseUnavailable after that, and psycopg2's errors for a
    statement that the server rejects. `generation` counts connections made: a change means that commits made with
    synchronous_commit=off may be gone.
    """

    def __init__(self, url: str, retry_s: float = 60.0) -> None:
        self.url, self.retry_s = url, retry_s
        self.lock = threading.RLock()
        self.generation = 0
        self.trips = 0  # statements sent, for the benchmarks
        self._arguments = connect_arguments(url)
        own = set(re.findall(r"(?:-c\s*|--)(\w+)\s*=", self._arguments.get("options", "")))  # the URL's go first
        self._settings = ";".join(f"SET {name} = '{value}'" for name, value in SETTINGS.items() if name not in own)
        self._connection: extensions.connection | None = None
        self._prepared: set[Statement] = set()  # on this connection
        _OPEN.add(self)

    @property
    def address(self) -> str:
        """Host, port and database, without user and password."""
        get = self._arguments.get
        return f"{get('host', 'localhost')}:{get('port', 5432)}/{get('dbname', '')}"

    def execute(self, *statements: Statement | str, given: Any = None) -> list[Row]:
        """Execute statements with the parameters `given` in one round trip; the rows of the last one."""
        return self.with_retries(lambda cursor: self.execute_on(cursor, *((each, given) for each in statements)))

    def execute_on(self, cursor: extensions.cursor, *bound: BoundStatement) -> list[Row]:
        """`execute` on the cursor that `with_retries` gives. The statements go together, in one transaction."""
        new = [
            each for each, _ in bound if isinstance(each, Statement) and each.prepared and each not in self._prepared
        ]
        texts = [each.prepare.encode() for each in new]
        for each, given in bound:
            texts.append(cursor.mogrify(each.execute if isinstance(each, Statement) else each, given))
        self.trips += 1
        self._prepared.update(new)
        try:
            cursor.execute(b";\n".join(texts))
        except psycopg2.Error as error:
            if error.pgcode in MIXED:
                raise DatabaseUnavailable(
                    f"the database at {self.address} mixes up what its clients have prepared: a pooler in front of it "
                    "gives each transaction another connection; set its pool_mode to session"
                ) from error
            if new and not cursor.connection.closed:  # which of them the server got to is not known
                self._prepared.clear()
                cursor.execute("DEALLOCATE ALL")
            raise
        return cursor.fetchall() if cursor.description else []

    def with_retries(self, work: Callable[[extensions.cursor], T], retry_s: float | None = None) -> T:
        """Call `work(cursor)`, again after each loss of the connection. retry_s: instead of the connection's own."""
        began, pause, logged = time.monotonic(), 0.05, False
        with self.lock:
            while True:
                try:
                    with self._connected().cursor() as cursor:
                        if logged:
                            log.warning("the database at %s is back", self.address)
                        return work(cursor)
                except (psycopg2.OperationalError, psycopg2.InterfaceError, psycopg2.InternalError) as error:
                    patience_s = self.retry_s if retry_s is None else retry_s  # which may shrink meanwhile
                    self._wait_or_raise(error, time.monotonic() + pause > began + patience_s)
                    logged = logged or self._log_loss(error, began)
                time.sleep(pause * random.uniform(0.5, 1.0))
                pause = min(2 * pause, 2.0)

    def close(self) -> None:
        """Close the connection; the next use opens another."""
        with self.lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    def _connected(self) -> extensions.connection:
        if self._connection is None or self._connection.closed:
            made = psycopg2.connect(**self._arguments)
            made.autocommit = True
            with made.cursor() as cursor:
                cursor.execute(self._settings)
            self._connection = made
            self._prepared.clear()
            self.generation += 1
        return self._connection

    def _wait_or_raise(self, error: psycopg2.Error, too_late: bool) -> None:
        """Return where another try may help, else raise."""
        reason = _reason(error)
        rejected = any(words in reason for words in REJECTIONS)
        if self._connection is not None and not self._connection.closed:
            if error.pgcode not in TRANSIENT:
                raise error
            if error.pgcode not in PATIENCE:
                self.close()
        elif rejected:
            raise DatabaseUnavailable(f"the database at {self.address} refuses us: {reason}") from error
        if too_late:
            raise DatabaseUnavailable(
                f"the database at {self.address} did not answer for {self.retry_s:g} s ({reason.splitlines()[-1]}); "
                "start it again or check HPO_DATABASE_URL"
            ) from error

    def _log_loss(self, error: psycopg2.Error, began: float) -> bool:
        """Log a loss that lasts; whether it was logged."""
        if time.monotonic() < began + SILENCE_S or (self._connection is not None and not self._connection.closed):
            return False
        log.warning("the database at %s does not answer, trying again: %s", self.address, _reason(error))
        return True

    def forget_parent(self) -> None:
        """In the child after a fork: the parent's socket and lock are not ours."""
        self.lock = threading.RLock()
        self._connection = None  # psycopg2 closes a connection only in the process that made it


def _reason(error: psycopg2.Error) -> str:
    return str(error).strip() or type(error).__name__


_OPEN: weakref.WeakSet[Connection] = weakref.WeakSet()


def _after_fork() -> None:
    for connection in list(_OPEN):
        connection.forget_parent()


os.register_at_fork(after_in_child=_after_fork)
