"""What the routes share: the database, the artifact store, promoted models in memory, and the service's limits."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from hpo.storage.access import Access
from hpo.storage.artifacts import ArtifactStore
from hpo.storage.connection import Connection
from hpo.storage.home import own_folder
from hpo.storage.leases import Leases
from hpo.storage.registry import Registry
from hpo.storage.trials import TrialStorage, trial_storage

MIB = 2**20
CONNECTIONS = 8  # to the database, each for one request at a time
RETRY_S = 5.0  # how long a request waits for a database that is out of reach
PROBE_S = 2.0  # … and how long the question does whether we are ready


@dataclass(frozen=True)
class Limits:
    """What one request may ask for."""

    body: int = 1024 * MIB  # bytes of an upload
    text: int = MIB  # bytes of a study file, or of another small body
    rows: int = 10_000  # sequences of one prediction
    page: int = 1000  # entries of a list
    log_requests: bool = False


class Database:
    """One connection, as one request uses it."""

    def __init__(self, url: str) -> None:
        self.storage: TrialStorage = trial_storage(url, RETRY_S)

    @cached_property
    def leases(self) -> Leases:
        return Leases(self.storage)

    @cached_property
    def registry(self) -> Registry:
        return Registry(self.storage.connection)

    @cached_property
    def access(self) -> Access:
        return Access(self.storage.connection)


@dataclass
class Backend:
    """No state of the service is in it: several processes with one of these serve the same clients."""

    url: str
    store: ArtifactStore
    limits: Limits = Limits()
    _idle: queue.LifoQueue[Database | None] = field(default_factory=queue.LifoQueue)

    def __post_init__(self) -> None:
        for _ in range(CONNECTIONS):
            self._idle.put(None)

    @contextmanager
    def database(self) -> Iterator[Database]:
        """A connection for the block; waits where all are in use."""
        found = self._idle.get()
        try:
            found = found or Database(self.url)
            yield found
        finally:
            self._idle.put(found)

    @cached_property
    def probe(self) -> Connection:
        """For the question whether we are ready, which waits neither for requests nor long for the database."""
        connection = Connection(self.url)
        connection.hurry(PROBE_S)
        return connection

    def close(self) -> None:
        """Close the connections that no request uses."""
        if "probe" in vars(self):
            self.probe.close()
        for _ in range(self._idle.qsize()):
            if (found := self._idle.get_nowait()) is not None:
                found.storage.close()
            self._idle.put(None)

    def upload(self, key: str) -> Path:
        """An uploaded file on this machine, fetched once. Raises ArtifactError."""
        path = own_folder("uploads") / key
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            self.store.fetch(key, path)
        return path
