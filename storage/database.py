"""Which database: the one of HPO_DATABASE_URL, or the embedded server's."""

from __future__ import annotations

import os
import time
from typing import Any

from hpo.storage.errors import PostgresError
from hpo.storage.server import server
from hpo.storage.url import mask, normalized, parameters


def database_url() -> str:
    """URL (postgresql+psycopg2://…, password included) of HPO_DATABASE_URL, else of the embedded server.

    HPO_DATABASE_URL is any address that libpq reads: a URL, also with several hosts, or key=value pairs. A password
    that it lacks is taken from the file HPO_DATABASE_PASSWORD_FILE or from PGPASSWORD. The embedded server is started
    if it does not run. Raises PostgresError.
    """
    given = os.environ.get("HPO_DATABASE_URL")
    return normalized(given) if given else server.start()


def status() -> server.Status:
    """Whether the database answers, and where it is; starts nothing. Raises PostgresError."""
    if not os.environ.get("HPO_DATABASE_URL"):
        return server.status()
    url = database_url()
    try:
        wait_ready(url, 0.0)
    except PostgresError:
        return server.Status(False, mask(url), None, None)
    return server.Status(True, mask(url), None, None)


def wait_ready(url: str, timeout_s: float = 30.0) -> None:
    """Return once a connection to the URL succeeds.

    Raises PostgresError after `timeout_s` seconds, or at once where the password is rejected.
    """
    import psycopg2

    given: dict[str, Any] = dict(parameters(url))
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            psycopg2.connect(**given | {"connect_timeout": str(max(2, int(deadline - time.monotonic())))}).close()
            return
        except psycopg2.Error as error:  # a ProgrammingError: the URL itself is wrong
            reason, final = mask(str(error)).strip(), not isinstance(error, psycopg2.OperationalError)
        if final or time.monotonic() > deadline or "authentication failed" in reason:
            raise PostgresError(f"no connection to {mask(url)} within {timeout_s:g} s: {reason}") from None
        time.sleep(0.1)
