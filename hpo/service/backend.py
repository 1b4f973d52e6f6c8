"""What the routes share: the database, the artifact store, and the service's settings."""

from __future__ import annotations

import logging
import os
import queue
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from http import HTTPStatus
from pathlib import Path

from hpo.service.problems import Problem
from hpo.service.rate import Rate
from hpo.storage.access import Access
from hpo.storage.artifacts import ArtifactStore
from hpo.storage.connection import Connection
from hpo.storage.home import own_folder
from hpo.storage.keys import UPLOADS
from hpo.storage.leases import Leases
from hpo.storage.registry import Registry
from hpo.storage.sessions import Sessions
from hpo.storage.trials import TrialStorage, trial_storage

log = logging.getLogger("hpo")

MIB = 2**20
CONNECTIONS = 8  # to the database, each for one request at a time
RETRY_S = 5.0  # how long a request waits for a database that is out of reach
PROBE_S = 2.0  # … and how long the question does whether we are ready


@dataclass(frozen=True)
class Limits:
    """What requests may ask for, and how they are treated."""

    body: int = 1024 * MIB  # bytes of an upload
    text: int = MIB  # bytes of a study file, or of another small body
    json: int = 16 * MIB  # bytes of a prediction's JSON, which is parsed in memory
    rows: int = 10_000  # sequences of one prediction
    steps: int = 100_000  # of one of them
    numbers: int = 20_000_000  # of all of them: sequences * steps of the longest * features
    waiting: int = 256  # predictions that none is computed with yet
    connection_s: float = 5.0  # how long a request waits for a connection to the database
    page: int = 1000  # entries of a list
    writes: int = 600  # requests a minute of one owner that change something
    stall_s: float = 30.0  # without a byte, after which a body is given up
    keep_s: float = 7 * 86400.0  # a data file that nobody has sent, asked for or submitted for so long is removed
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

    @cached_property
    def sessions(self) -> Sessions:
        return Sessions(self.storage.connection)


@dataclass
class Backend:
    """No state of the service is in it: several processes with one of these serve the same clients."""

    url: str
    store: ArtifactStore
    limits: Limits = Limits()
    writes: Rate = field(init=False)
    _idle: queue.LifoQueue[Database | None] = field(default_factory=queue.LifoQueue)

    def __post_init__(self) -> None:
        self.writes = Rate(self.limits.writes)
        for _ in range(CONNECTIONS):
            self._idle.put(None)

    @contextmanager
    def database(self) -> Iterator[Database]:
        """A connection for the block; waits where all are in use, and raises Problem (503) if none gets free."""
        try:
            found = self._idle.get(timeout=self.limits.connection_s)
        except queue.Empty:
            reason = f"all {CONNECTIONS} connections to the database are in use: ask again in a moment"
            raise Problem(HTTPStatus.SERVICE_UNAVAILABLE, reason, {"Retry-After": "1"}) from None
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
        try:
            os.utime(path)  # in use: see remove_unused
        except FileNotFoundError:
            self.store.fetch(key, path)
        return path

    def remove_unused(self) -> None:
        """Remove the uploaded files that nobody has used for the time that they are kept; what is missing is fine, as
        others do the same. A study's data are stored apart from them when it is submitted.

        Raises ArtifactError.
        """
        for key, age_s in self.store.ages(UPLOADS).items():
            if age_s > self.limits.keep_s and self.store.ages(key).get(key, 0.0) > self.limits.keep_s:  # still
                self.store.delete(key)
                log.info("removed %s, which nobody has used for %g s", key, age_s)
        for path in own_folder("uploads").glob(f"{UPLOADS}*"):  # the copies on this machine
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > self.limits.keep_s:
                    path.unlink()
