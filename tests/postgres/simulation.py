"""A simulated world for the lease rules: a clock that is set by hand, and connections that fail on demand.

The database is real. Its clock is the functions hpo.clock(), hpo.moment() and hpo.server_started(), replaced here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum

import psycopg2
import pytest
from psycopg2 import extensions

from hpo.storage import deadlines
from hpo.storage.connection import Connection

CLOCK = """
CREATE TABLE public.simulated AS
    SELECT '2026-01-01T00:00:00Z'::timestamptz AS clock, '2025-12-31T00:00:00Z'::timestamptz AS server_started;
CREATE OR REPLACE FUNCTION hpo.clock() RETURNS timestamptz LANGUAGE sql VOLATILE AS
    'SELECT clock FROM public.simulated';
CREATE OR REPLACE FUNCTION hpo.moment() RETURNS timestamptz LANGUAGE sql STABLE AS 'SELECT clock FROM public.simulated';
CREATE OR REPLACE FUNCTION hpo.server_started() RETURNS timestamptz LANGUAGE sql STABLE AS
    'SELECT server_started FROM public.simulated';
"""


class Clock:
    """The database's clock, set by hand. That of this process, which may wait for its turn, does not count."""

    def __init__(self, connection: Connection, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(deadlines, "FROZEN_S", math.inf)
        self._connection = connection
        connection.execute(CLOCK)

    def advance(self, seconds: float) -> None:
        """Let so much time pass."""
        self._connection.execute(
            "UPDATE public.simulated SET clock = clock + %(s)s * interval '1 s'", given={"s": seconds}
        )

    def restart_server(self) -> None:
        """The server has just started."""
        self._connection.execute("UPDATE public.simulated SET server_started = clock")


class Fault(Enum):
    """What becomes of one round trip."""

    NONE = "it succeeds"
    BEFORE = "the connection is lost before the server gets it"
    AFTER = "it is committed, and the answer is lost"


class FaultyConnection(Connection):
    """Its next round trips fail as they are told to, one fault each; after these all succeed."""

    def __init__(self, url: str, retry_s: float = 60.0) -> None:
        super().__init__(url, retry_s)
        self.faults: list[Fault] = []
        self.injected = 0

    def _send(self, cursor: extensions.cursor, text: bytes) -> None:
        fault = self.faults.pop(0) if self.faults else Fault.NONE
        if fault is not Fault.BEFORE:
            super()._send(cursor, text)
        if fault is not Fault.NONE:
            self.injected += 1
            cursor.connection.close()
            raise psycopg2.OperationalError(f"simulated: {fault.value}")


@contextmanager
def failing(connection: FaultyConnection, faults: list[Fault]) -> Iterator[None]:
    """Within the block the connection's round trips meet these faults."""
    connection.faults = list(faults)
    try:
        yield
    finally:
        connection.faults = []
