"""`hpo serve`: the application in one process, until a signal."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn

from hpo.errors import HpoError
from hpo.models.machine import prepare_process
from hpo.notify import Settings, sending
from hpo.service.app import make_app
from hpo.service.backend import Backend, Limits
from hpo.storage.artifacts import artifact_store
from hpo.storage.connection import Connection
from hpo.storage.database import database_url

GRACE_S = 5  # that requests in progress may take after a signal


class ServeError(HpoError):
    """The service cannot listen there."""


def serve(host: str, port: int, limits: Limits, ready: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT. `port` 0 takes a free one; `ready` is called with the URL once it listens.

    Raises ServeError where the address is taken.
    """
    prepare_process()
    url, notices = database_url(), Settings.of_environment()
    app = make_app(Backend(url, artifact_store(), limits))
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
    with listener:
        address, bound = listener.getsockname()[:2]
        config = uvicorn.Config(
            app,
            log_config=None,  # its lines go where ours do
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=GRACE_S,
        )
        ready(f"http://{f'[{address}]' if ':' in address else address}:{bound}/")
        with _sending(url, notices):
            uvicorn.Server(config).run(sockets=[listener])


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
