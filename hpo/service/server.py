"""`hpo serve`: the application in one process, until a signal."""

from __future__ import annotations

import gc
import ipaddress
import os
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import uvicorn

from hpo.errors import HpoError
from hpo.models.machine import prepare_process
from hpo.notify import Settings, sending
from hpo.service.app import make_app
from hpo.service.backend import Backend, Limits
from hpo.service.hosts import Hosts, names
from hpo.storage.artifacts import artifact_store
from hpo.storage.background import BackgroundLoop
from hpo.storage.connection import Connection
from hpo.storage.database import database_url
from hpo.storage.errors import PostgresError
from hpo.storage.home import own_folder

HOUR_S = 3600.0
GRACE_S = 5  # that requests in progress may take after a signal


class ServeError(HpoError):
    """The service cannot listen there."""


def serve(
    host: str,
    port: int,
    limits: Limits,
    ready: Callable[[str, bool], None],
    allowed_hosts: Sequence[str] = (),
) -> None:
    """Serve until SIGTERM or SIGINT. `port` 0 takes a free one.

    `ready` is called once it listens, with the URL and whether there is a token that opens it. allowed_hosts: names by
    which browsers may ask for pages beside those of this machine and those in HPO_SERVE_HOSTS. Raises ServeError where
    the address is taken.
    """
    prepare_process()
    gc.freeze()  # what the imports made stays: looking through it for garbage again and again takes 0.1 s each time
    notices = Settings.of_environment()
    backend = Backend(database_url(), artifact_store(), limits)
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise ServeError(f"the service cannot listen on {host}:{port}: {error}; choose another --port") from None
    # Accepted connections have it from here. Without it an answer of two parts waits for the client's delayed
    # acknowledgement, 40 ms; asyncio sets it for sockets that name their protocol, which this one does not.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)  # uvicorn raises them again once it has ended in good order
    tempfile.tempdir = str(own_folder("uploads"))  # there is room, and nobody else reads there
    with listener, _housekeeping(backend):
        address, bound = listener.getsockname()[:2]
        allowed = (*allowed_hosts, *names(os.environ.get("HPO_SERVE_HOSTS", "")))
        app = make_app(backend, Hosts(allowed, reachable=not ipaddress.ip_address(address).is_loopback))
        anybody = True
        with suppress(PostgresError), backend.database() as database:  # which may come later than the service
            anybody = database.access.any()
        config = uvicorn.Config(
            app,
            log_config=None,  # its lines go where ours do
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=GRACE_S,
        )
        ready(f"http://{f'[{address}]' if ':' in address else address}:{bound}/", anybody)
        with _sending(backend.url, notices):
            uvicorn.Server(config).run(sockets=[listener])


def _housekeeping(backend: Backend) -> BackgroundLoop:
    """Removes the uploaded files that nobody uses, while the block runs; every process of the service does."""
    return BackgroundLoop(
        backend.remove_unused,
        min(HOUR_S, backend.limits.keep_s / 2),
        name="housekeeping",
        failure="data files that nobody uses could not be removed",
        expected=(HpoError, OSError),
    )


@contextmanager
def _sending(url: str, notices: Settings) -> Iterator[None]:
    """Send the notices of the database over a connection of its own while the block runs."""
    connection = Connection(url)
    try:
        with sending(connection, notices):
            yield
    finally:
        connection.hurry(1.0)  # in the midst of an attempt to reach a database that is away
        connection.close()
