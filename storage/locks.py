"""One process at a time, of all that share a database: a lock is a row that its holder renews."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress

from hpo.storage.background import BackgroundLoop
from hpo.storage.connection import Connection
from hpo.storage.errors import PostgresError
from hpo.storage.statements import statement

LEASE_S = 10.0  # without a renewal, after which others may take a lock
RENEWALS = 4  # within that time
LOOK_S = 0.05  # between two tries
_HOLD, _LEAVE = statement("hold_lock"), statement("leave_lock")


class Lock:
    """The lock of one name, for one holder."""

    def __init__(self, connection: Connection, name: str) -> None:
        self._connection, self._name = connection, name
        self._given = {"name": name, "holder": str(uuid.uuid4()), "lease_s": LEASE_S}
        self._until = -math.inf

    @property
    def held(self) -> bool:
        """Whether nobody else can have it at this moment."""
        return time.monotonic() < self._until

    def take(self) -> bool:
        """Take it for LEASE_S, or renew it; False where another holds it. Raises PostgresError."""
        asked = time.monotonic()
        taken = bool(self._connection.execute(_HOLD, given=self._given))
        self._until = asked + LEASE_S if taken else -math.inf
        return taken

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Renew the lock, which is held, while the block runs, and leave it at the end."""
        failure = f"the lock of {self._name} could not be renewed"
        try:
            with BackgroundLoop(
                self.take, LEASE_S / RENEWALS, name="hpo-lock", failure=failure, expected=(PostgresError,)
            ):
                yield
        finally:
            with suppress(PostgresError):  # it runs out by itself
                self._connection.execute(_LEAVE, given=self._given)


@contextmanager
def exclusively(url: str, name: str, retry_s: float = 60.0) -> Iterator[None]:
    """Hold the lock of that name while the block runs; waits for others without limit.

    retry_s: how long a database that is away is waited for before DatabaseUnavailable. A lock that could not be renewed
    for LEASE_S is anybody's, so what the block does must also be safe beside another that began since.
    """
    with closing(Connection(url, retry_s)) as connection:
        lock = Lock(connection, name)
        while not lock.take():
            time.sleep(LOOK_S)
        connection.retry_s = min(retry_s, LEASE_S / RENEWALS)
        with lock.kept():
            yield
