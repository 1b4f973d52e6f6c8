"""One process at a time, of all that share a database."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import psycopg2

from hpo.storage.connection import Connection
from hpo.storage.errors import DatabaseUnavailable, PostgresError
from hpo.storage.statements import statement
from hpo.storage.url import mask

_LOCK = statement("lock_exclusively")


@contextmanager
def exclusively(url: str, name: str) -> Iterator[None]:
    """Hold the lock of that name while the block runs; waits for others without limit.

    Raises PostgresError when the database goes away before the lock is held.
    """
    connection = Connection(url, retry_s=0.0)
    try:
        _lock(connection, name)
        yield
    finally:
        connection.close()  # the lock goes with the connection


def _lock(connection: Connection, name: str) -> None:
    try:
        connection.execute("SET lock_timeout = 0", _LOCK, given={"name": name})
    except (DatabaseUnavailable, psycopg2.OperationalError) as error:
        reason = mask(str(error.__cause__ or error)).strip()
        raise PostgresError(f"the database went away: {reason}; run the command again") from None
