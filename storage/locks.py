"""One process at a time, of all that share a database."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from hpo.storage.connection import Connection
from hpo.storage.statements import statement

LOOK_S = 0.05  # between two tries
_TRY_LOCK = statement("try_lock")


@contextmanager
def exclusively(url: str, name: str, retry_s: float = 60.0) -> Iterator[None]:
    """Hold the lock of that name while the block runs; waits for others without limit.

    retry_s: how long a database that is away is waited for before DatabaseUnavailable. A lock goes with its connection,
    so what the block does must also be safe beside another that began when that was lost.
    """
    connection = Connection(url, retry_s)
    try:
        while not connection.execute(_TRY_LOCK, given={"name": name})[0][0]:
            time.sleep(LOOK_S)
        yield
    finally:
        connection.close()
