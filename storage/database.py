"""Which database: the one of HPO_DATABASE_URL, or the embedded server's."""

from __future__ import annotations

import os
import time

from hpo.storage.errors import PostgresError
from hpo.storage.server import server
from hpo.storage.url import mask, normalized


def database_url() -> str:
    """URL (postgresql+psycopg2://…, password included) of HPO_DATABASE_URL, else of the embedded server.

    The embedded server is started if it does not run. A password that HPO_DATABASE_URL lacks is taken from
    the file HPO_DATABASE_PASSWORD_FILE or from PGPASSWORD. Raises PostgresError.
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
    from sqlalchemy import make_url

    dsn = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            psycopg2.connect(dsn, connect_timeout=max(2, int(deadline - time.monotonic()))).close()
            return
        except psycopg2.Error as error:  # a ProgrammingError: the URL itself is wrong
            reason, final = mask(str(error)).strip(), not isinstance(error, psycopg2.OperationalError)
        if final or time.monotonic() > deadline or "authentication failed" in reason:
            raise PostgresError(f"no connection to {mask(url)} within {timeout_s:g} s: {reason}") from None
        time.sleep(0.1)
