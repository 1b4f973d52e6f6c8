"""A proxy before a PostgreSQL server that goes wrong on demand. It knows the wire protocol's simple queries.

proxy.lose_answer(k)   the k-th query from now on is executed, then its connection is reset instead of the answer
proxy.refuse(k)        the k-th query is not passed on, its connection is reset
proxy.swallow(k)       from the k-th query on its connection takes everything and answers nothing
proxy.stall(k)         at the k-th query nothing moves for STALL_S seconds, then everything does
proxy.hang()           every connection does so, new ones too, until `resume`
proxy.half_open(k)     at the k-th query the server's side is closed, the client's is not, and hears nothing of it
"""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit

SSL_REQUEST = struct.pack("!I", 80877103)
STALL_S = 1.0
READY = b"Z\0\0\0\5"  # ReadyForQuery, before its status byte: the server is done with a query


class Proxy:
    """Listens on a free port of loopback."""

    def __init__(self, host: str, port: int) -> None:
        self._server = (host, port)
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=200)
        self.port: int = self._listener.getsockname()[1]
        self.queries = 0  # since the last fault was asked for
        self._fault: Callable[[_Link], bool] | None = None
        self._at = 0
        self._lock = threading.Lock()
        self.hanging = threading.Event()
        self.moving = threading.Event()
        self.moving.set()
        self._links: list[_Link] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def lose_answer(self, k: int) -> None:
        self._plan(k, _Link.lose_answer)

    def refuse(self, k: int) -> None:
        self._plan(k, _Link.refuse)

    def swallow(self, k: int) -> None:
        self._plan(k, _Link.swallow)

    def half_open(self, k: int) -> None:
        self._plan(k, _Link.half_open)

    def stall(self, k: int) -> None:
        self._plan(k, _Link.stall)

    def hang(self) -> None:
        self.hanging.set()

    def resume(self) -> None:
        self.hanging.clear()

    def close(self) -> None:
        self._listener.close()
        for link in self._links:
            link.reset()

    def count(self, link: _Link) -> bool:
        """A query arrives. Whether it is passed on."""
        with self._lock:
            self.queries += 1
            fault = self._fault if self.queries == self._at else None
        return fault is None or fault(link)

    def _plan(self, k: int, fault: Callable[[_Link], bool]) -> None:
        with self._lock:
            self.queries, self._at, self._fault = 0, k, fault

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(self._server)
            except OSError:
                client.close()
                continue
            self._links.append(_Link(self, client, server))


class _Link:
    """One client's connection and its own to the server."""

    def __init__(self, proxy: Proxy, client: socket.socket, server: socket.socket) -> None:
        self._proxy, self._client, self._server = proxy, client, server
        self._swallows = self._loses = False
        for work in (self._up, self._down):
            threading.Thread(target=self._guarded, args=(work,), daemon=True).start()

    def lose_answer(self) -> bool:
        self._loses = True
        return True

    def refuse(self) -> bool:
        self.reset()
        return False

    def swallow(self) -> bool:
        self._swallows = True
        return False

    def half_open(self) -> bool:
        self._swallows = True
        self._server.close()
        return False

    def stall(self) -> bool:
        self._proxy.moving.clear()
        threading.Timer(STALL_S, self._proxy.moving.set).start()
        return True

    def reset(self) -> None:
        for each in (self._client, self._server):
            with suppress(OSError):
                each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                each.shutdown(socket.SHUT_RDWR)
                each.close()

    def _guarded(self, work: Callable[[], None]) -> None:
        with suppress(OSError, EOFError, ValueError):
            work()
        if not self._swallows:
            self.reset()

    @property
    def _silent(self) -> bool:
        return self._swallows or self._proxy.hanging.is_set()

    def _up(self) -> None:
        while True:
            size = self._read(4)
            body = self._read(struct.unpack("!I", size)[0] - 4)
            self._pass_on(size + body)
            if body[:4] != SSL_REQUEST:
                break
        while True:
            head = self._read(5)
            body = self._read(struct.unpack("!I", head[1:])[0] - 4)
            if head[:1] != b"Q" or self._proxy.count(self):
                self._pass_on(head + body)

    def _pass_on(self, data: bytes) -> None:
        self._proxy.moving.wait()
        if not self._silent:
            self._server.sendall(data)

    def _read(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            more = self._client.recv(count - len(data))
            if not more:
                raise EOFError
            data += more
        return data

    def _down(self) -> None:
        lost = b""
        while data := self._server.recv(65536):
            if self._silent:
                continue
            if self._loses:
                lost += data
                if lost[-6:-1] == READY:
                    return
                continue
            self._proxy.moving.wait()
            self._client.sendall(data)


@contextmanager
def proxied(url: str) -> Iterator[tuple[Proxy, str]]:
    """A proxy before the server of this URL, and the URL through it."""
    parts = urlsplit(url)
    proxy = Proxy(parts.hostname or "127.0.0.1", parts.port or 5432)
    try:
        yield proxy, url.replace(f"@{parts.hostname}:{parts.port}/", f"@127.0.0.1:{proxy.port}/")
    finally:
        proxy.close()
