"""The process's connection to Postgres: made when first used, renewed after a loss or a fork.

It may lead to a pooler that gives each transaction another of its own connections to the server. Then nothing is left
on a session: each transaction makes its settings itself, and no statement is prepared. That is known by the number of
the server's process, which poolers do not pass on: the one that libpq was told is not the one that answers.
"""

from __future__ import annotations

import logging
import os
import random
import re
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import psycopg2
from psycopg2 import extensions

from hpo.storage.deadlines import Deadline, Pause, shorten_all
from hpo.storage.errors import DatabaseRefusal, DatabaseUnavailable
from hpo.storage.statements import BoundStatement, Statement
from hpo.storage.url import parameters

log = logging.getLogger(__name__)

T = TypeVar("T")
Row = tuple[Any, ...]

# What every transaction relies on, whatever the server, the database or the role sets. Set by a statement, as poolers
# reject them as options of the connection; a server that does not know one keeps its own. Not among them:
# standard_conforming_strings, as psycopg2 quotes by what it was when the connection was made.
SETTINGS = {
    # What is written is read back to the bit.
    "datestyle": "ISO, MDY",
    "intervalstyle": "postgres",
    "extra_float_digits": "3",
    "bytea_output": "hex",
    "timezone": "UTC",
    "synchronous_commit": "on",
    "idle_in_transaction_session_timeout": "10s",  # a stopped process must not keep others waiting for its locks
    "transaction_timeout": "0",
    # Plans are kept while tables grow from nothing, so they must go by an index from the start.
    "enable_seqscan": "off",
    "enable_indexscan": "on",
    "enable_nestloop": "on",
    "jit": "off",
}
# … and what a session of our own has beside that.
SESSION = {
    # A commit is one, and sees what others have committed.
    "default_transaction_isolation": "read committed",
    "default_transaction_read_only": "off",
    "default_transaction_deferrable": "off",
    # A connection that is cut off must not last for hours.
    "idle_session_timeout": "0",
    "tcp_keepalives_idle": "10",
    "tcp_keepalives_interval": "5",
    "tcp_keepalives_count": "4",
    "plan_cache_mode": "force_generic_plan",
}
# How a transaction through a pooler begins; the rest is for a role or a database whose transactions only read.
TRANSACTION, WRITING = "SET TRANSACTION ISOLATION LEVEL READ COMMITTED", ", READ WRITE"
# Who answers; where Optuna's tables are: where ours say so, without any in a schema that there is; which of the
# settings the server knows; and whether it only reads until it is told to write.
FIRST = """SELECT pg_backend_pid(), coalesce((SELECT quote_literal(n.nspname)
    FROM pg_namespace m JOIN pg_class c ON c.relnamespace = m.oid JOIN pg_constraint k ON k.conrelid = c.oid
        JOIN pg_class t ON t.oid = k.confrelid JOIN pg_namespace n ON n.oid = t.relnamespace
    WHERE m.nspname = 'hpo' AND c.relname = 'terms' AND k.contype = 'f' LIMIT 1),
        CASE WHEN current_schema() IS NULL THEN quote_literal('public') END),
    ARRAY(SELECT name FROM unnest(%s) name WHERE current_setting(name, true) IS NOT NULL),
    current_setting('default_transaction_read_only')::bool AND NOT pg_is_in_recovery()"""
DEFAULTS = {
    "application_name": "hpo",
    "connect_timeout": 5,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 4,
    "tcp_user_timeout": 30_000,
}
DEADLINE_S = 10.0  # that a call may take at first; one that took longer is repeated with twice the time
# Errors that another try may get past: on the same connection (deadlock, lock timeout, full disk or memory) …
PATIENCE = ("40P01", "40001", "55P03", "53100", "53200")
# … or on a new one (shutting down, starting up, too many connections, a standby during failover, idle too long, a
# statement that took too long).
TRANSIENT = (*PATIENCE, "57P01", "57P02", "57P03", "53300", "25006", "25P03", "57P05", "57014")
PAUSE_S = 0.05  # before a lost connection is made again, twice as long before each further try
SILENCE_S = 2.0  # that a database may be away without a line in the log
# Statements that this connection has prepared are not known, or were prepared by another one.
MIXED = ("26000", "42P05")
# What a server or libpq says when no other try will help …
REJECTIONS = (
    "authentication failed",
    "does not exist",
    "no such database",
    "no such user",
    "no pg_hba.conf entry",
    "no password supplied",
    "could not translate host name",
    "not permitted to log in",
    "permission denied for database",
    "not currently accepting connections",
    "does not support SSL",
    "certificate verify failed",
    "server certificate for",
    "invalid",
)
# … and when one may, or another host of several.
PASSING = ("Temporary failure", "Connection refused", "timeout expired", "timed out", "unreachable", "starting up")


def connect_arguments(url: str) -> dict[str, Any]:
    """psycopg2's arguments for a SQLAlchemy or libpq address of PostgreSQL.

    Raises ValueError for another database's URL, and PostgresError for an address that libpq cannot read.
    """
    scheme, mark, _ = url.partition("://")
    if mark and scheme not in ("postgres", "postgresql", "postgresql+psycopg2"):
        raise ValueError(f"studies live in PostgreSQL: a postgresql:// URL is needed, got {scheme[:20]}://…")
    return {**DEFAULTS, **parameters(url, "the address"), "client_encoding": "UTF8"}


def _own_settings(arguments: dict[str, Any]) -> set[str]:
    """The settings that the URL makes itself; they go first."""
    return {name.lower() for name in re.findall(r"(?:-c\s*|--)(\w+)\s*=", arguments.get("options", ""))}


def _timeouts(seconds: float) -> dict[str, str]:
    """The settings for statements that may take so many seconds."""
    milliseconds = int(1000 * seconds)
    return {"statement_timeout": f"{milliseconds}", "lock_timeout": f"{int(0.8 * milliseconds)}"}


class _Lent(extensions.connection):
    """A connection that is cut after some time."""

    deadline: Deadline
    begin: bytes  # of each transaction


class _LentCursor(extensions.cursor):
    """Begins transactions as its connection says."""

    connection: _Lent

    def execute(self, query: Any, parameters: Any = None) -> None:
        if self.connection.begin and self.connection.status == extensions.STATUS_READY:
            super().execute(self.connection.begin)
        super().execute(query, parameters)


class Connection:
    """One psycopg2 connection in autocommit mode, one caller at a time.

    `execute` and `with_retries` repeat their work after a lost connection, with backoff, for `retry_s` seconds, so
    what they are given must be safe to repeat. A call without an answer within `deadline_s` is a lost connection too.
    They raise DatabaseUnavailable after that, DatabaseRefusal where another try would not help, and psycopg2's errors
    for data that the server rejects. `generation` counts connections made: a change means that commits made with
    synchronous_commit=off may be gone. `outage`: the last time in which the database was away. `pooled`, once there is
    a connection: whether a pooler is in front of the server. Then no session is ours, and a server that has restarted
    behind it is not noticed, so every commit must wait for the disk.
    """

    def __init__(self, url: str, retry_s: float = 60.0) -> None:
        self.url, self.retry_s, self.deadline_s = url, retry_s, DEADLINE_S
        self.lock = threading.RLock()
        self.generation = 0
        self.trips = 0  # statements sent, for the benchmarks
        self.outage = Pause()
        self.pooled = False
        self._arguments = connect_arguments(url)
        self._own = _own_settings(self._arguments)
        self._connection: extensions.connection | None = None
        self._deadline: Deadline | None = None  # of the connection's calls
        self._overdue = 0  # calls in a row that took too long
        self._prepared: set[Statement] = set()  # on this connection
        self._begin = b""  # of each transaction
        self._known: set[str] = set()  # settings that the server knows, but for those of the URL
        self._schema: str | None = None  # of Optuna's tables, as a literal; None: where the search path points to
        self._only_reads = False  # transactions that are not told to write
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
        new = [each for each, _ in bound if isinstance(each, Statement) and self._prepares(each)]
        texts = [each.prepare.encode() for each in new]
        for each, given in bound:
            texts.append(cursor.mogrify(self._text(each), given))
        self._prepared.update(new)
        try:
            self._send(cursor, b";\n".join(texts))
        except psycopg2.Error as error:
            if error.pgcode in MIXED and not self.pooled:
                log.info(
                    "a pooler in front of the database at %s mixes up what was prepared: no more of it", self.address
                )
                self.pooled = True
                self._drop()
                raise psycopg2.OperationalError("a pooler mixes up what was prepared") from error
            if new and not cursor.connection.closed:  # which of them the server got to is not known
                self._prepared.clear()
                self._send(cursor, b"DEALLOCATE ALL")
            raise
        return cursor.fetchall() if cursor.description else []

    def _prepares(self, given: Statement) -> bool:
        """Whether it is to be prepared on this connection now."""
        return given.prepared and not self.pooled and given not in self._prepared

    def _text(self, given: Statement | str) -> str:
        if isinstance(given, str):
            return given
        return given.direct if self.pooled else given.execute

    def with_retries(self, work: Callable[[extensions.cursor], T], retry_s: float | None = None) -> T:
        """Call `work(cursor)`, again after each loss of the connection. retry_s: instead of the connection's own."""
        began, pause, logged, lost = time.monotonic(), PAUSE_S, False, False
        with self.lock:
            while True:
                try:
                    with self._connected().cursor() as cursor:
                        found = work(cursor)
                    if logged:
                        log.warning("the database at %s is back", self.address)
                    if lost:
                        self.outage = Pause((now := time.monotonic()) - began, now)
                    self._overdue = 0
                    return found
                except (psycopg2.OperationalError, psycopg2.InterfaceError, psycopg2.InternalError) as error:
                    patience_s = self.retry_s if retry_s is None else retry_s  # which may shrink meanwhile
                    self._wait_or_raise(error, time.monotonic() + pause > began + patience_s, patience_s)
                    lost = lost or self._connection is None
                    logged = logged or self._log_loss(error, began)
                except (psycopg2.ProgrammingError, psycopg2.NotSupportedError) as error:
                    raise self._refusal(error) from error
                time.sleep(pause * random.uniform(0.5, 1.0))
                pause = min(2 * pause, 2.0)

    def hurry(self, seconds: float) -> None:
        """From now on nothing is waited for longer than this, not even the call in progress. From any thread."""
        self.retry_s, self.deadline_s = min(self.retry_s, seconds), min(self.deadline_s, seconds)
        if (deadline := self._deadline) is not None:
            deadline.shorten(seconds)

    def close(self) -> None:
        """Close the connection; the next use opens another."""
        with self.lock:
            self._drop()

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.close()
        if self._deadline is not None:
            self._deadline.close()
        self._connection = self._deadline = None

    def _send(self, cursor: extensions.cursor, text: bytes) -> None:
        """Send a query and wait for its answer, no longer than its deadline: the server's own, then ours."""
        deadline, seconds = self._deadline, self._patience_s
        assert deadline is not None
        self.trips += 1
        with deadline.within(seconds + min(1.0, seconds / 4)):
            cursor.execute(self._begin + text)

    @property
    def _patience_s(self) -> float:
        """What a call may take: twice as long after each one in a row that took too long."""
        return self.deadline_s * float(2**self._overdue)

    def _connected(self) -> extensions.connection:
        if self._connection is None or self._connection.closed:
            self._drop()
            timeout_s = max(2, min(int(self._arguments["connect_timeout"]), int(self._patience_s)))  # 2: libpq's least
            made = psycopg2.connect(**{**self._arguments, "connect_timeout": timeout_s})
            made.autocommit = True
            self._connection, self._deadline = made, Deadline(made.fileno())
            self._prepared.clear()
            try:
                with made.cursor() as cursor:
                    self._meet(cursor)
            except psycopg2.Error:
                made.close()  # without its settings it is of no use
                raise
            self.generation += 1
        return self._connection

    def _meet(self, cursor: extensions.cursor) -> None:
        """Learn whom a new connection leads to, and see to it that its settings are made."""
        self._begin, names = b"", [*SETTINGS, *SESSION, *_timeouts(0.0)]
        self._send(cursor, cursor.mogrify(FIRST, (names,)))
        ((process, self._schema, known, self._only_reads),) = cursor.fetchall()
        self._known = set(known) - self._own
        self.pooled = self.pooled or process != cursor.connection.info.backend_pid
        if self.pooled:
            self._begin = self._locally(self._patience_s)
        else:
            self._send(cursor, self._settings(SESSION, self._patience_s).encode())

    def _settings(self, more: Mapping[str, str], seconds: float, kind: str = "SET") -> str:
        """The statements that make all settings and `more`. seconds: that a statement may take."""
        wanted = {**SETTINGS, **more, **_timeouts(seconds)}
        values = {name: f"'{value}'" for name, value in wanted.items() if name in self._known}
        if self._schema is not None and "search_path" not in self._own:
            values["search_path"] = self._schema
        return ";\n".join(f"{kind} {name} = {value}" for name, value in values.items())

    def _locally(self, seconds: float) -> bytes:
        """What a transaction begins with on a session that is not ours: settings that end with it."""
        first = TRANSACTION + WRITING if self._only_reads else TRANSACTION
        return f"{first};\n{self._settings({}, seconds, 'SET LOCAL')};\n".encode()

    def lend(self, seconds: float) -> extensions.connection:
        """Another connection, for libraries that make statements of their own; it is cut after so many seconds."""
        self.with_retries(lambda _: None)  # so that the settings are known
        made: _Lent = psycopg2.connect(**self._arguments, connection_factory=_Lent, cursor_factory=_LentCursor)
        made.deadline = Deadline(made.fileno())
        made.deadline.end_after(seconds)
        made.begin = self._locally(seconds) if self.pooled else b""
        if not self.pooled:
            with made.cursor() as cursor:
                cursor.execute(self._settings(SESSION, seconds))
            made.commit()
        return made

    def _wait_or_raise(self, error: psycopg2.Error, too_late: bool, patience_s: float) -> None:
        """Return where another try may help, else raise."""
        reason = self._reason(error)
        if error.pgcode == "57014" or (self._deadline is not None and self._deadline.passed):
            self._overdue += 1
        if self._connection is not None and not self._connection.closed:
            if error.pgcode not in TRANSIENT:
                raise self._refusal(error) from error
            if error.pgcode not in PATIENCE:
                self._drop()
        else:
            self._drop()
            if any(words in reason for words in REJECTIONS) and not any(words in reason for words in PASSING):
                raise DatabaseRefusal(f"the database at {self.address} refuses us: {reason}") from error
        if too_late:
            raise DatabaseUnavailable(
                f"the database at {self.address} did not answer for {patience_s:g} s ({_last_line(reason)}); "
                "start it again or check HPO_DATABASE_URL"
            ) from error

    def _refusal(self, error: psycopg2.Error) -> DatabaseRefusal:
        """An error that another try does not get past, in one line with the way out."""
        reason = " ".join(self._reason(error).splitlines()[0].split())
        return DatabaseRefusal(f"the database at {self.address} refuses: {reason}; {_way_out(error.pgcode or '')}")

    def _log_loss(self, error: psycopg2.Error, began: float) -> bool:
        """Log a loss that lasts; whether it was logged."""
        if time.monotonic() < began + SILENCE_S or self._connection is not None:
            return False
        log.warning("the database at %s does not answer, trying again: %s", self.address, self._reason(error))
        return True

    def _reason(self, error: psycopg2.Error) -> str:
        if self._deadline is not None and self._deadline.passed:
            return f"no answer to a statement within {self._patience_s:g} s"
        return str(error).strip() or type(error).__name__

    def forget_parent(self) -> None:
        """In the child after a fork: the parent's socket and lock are not ours."""
        self.lock = threading.RLock()
        self._connection = None  # psycopg2 closes a connection only in the process that made it
        if self._deadline is not None:
            self._deadline.close()
            self._deadline = None


def _last_line(reason: str) -> str:
    """The last of libpq's lines, one for each host, without its questions below them."""
    return next((line for line in reversed(reason.splitlines()) if line[:1].strip()), reason)


def _way_out(code: str) -> str:
    """What a user can do about an error of that SQLSTATE."""
    if code == "42501":
        return "grant the role what it lacks; README.md lists the rights of owner, worker and reader"
    if code in ("42P01", "42703", "42883", "3F000"):
        return "its tables are missing or of another version: `hpo db check` says which, `hpo db upgrade` mends it"
    if code.startswith("53"):
        return "give the server more room"
    return "`hpo db check` says more"


_OPEN: weakref.WeakSet[Connection] = weakref.WeakSet()


def hurry_all(seconds: float) -> None:
    """`Connection.hurry` on every connection of the process, which is to end. From any thread."""
    for connection in list(_OPEN):
        connection.hurry(seconds)
    shorten_all(seconds)


def _after_fork() -> None:
    for connection in list(_OPEN):
        connection.forget_parent()


os.register_at_fork(after_in_child=_after_fork)
