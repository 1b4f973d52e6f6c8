"""An HTTP server on loopback that notices are sent to, and that answers as it is told to."""

from __future__ import annotations

import hashlib
import hmac
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SECRET = "the secret of the tests, long enough"


@dataclass(frozen=True)
class Received:
    """One request."""

    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def content(self) -> dict[str, Any]:
        """The body, once its signature was found right."""
        parts = dict(part.split("=") for part in self.headers["X-Hpo-Signature"].split(","))
        signed = f"{parts['t']}.".encode() + self.body
        assert hmac.compare_digest(hmac.new(SECRET.encode(), signed, hashlib.sha256).hexdigest(), parts["v1"])
        found: dict[str, Any] = json.loads(self.body)
        assert found["event"] == self.headers["X-Hpo-Event"]
        return found


@dataclass
class Receiver:
    """What came, and what is answered."""

    port: int
    requests: list[Received] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)  # to the next requests; 204 after these
    location: str = "/"  # of redirects
    open: threading.Event = field(default_factory=threading.Event)  # cleared: nothing is answered
    _came: threading.Condition = field(default_factory=threading.Condition)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/hook?key=1"

    def wait_for(self, count: int, timeout_s: float = 60.0) -> list[Received]:
        """The requests, once there are so many."""
        with self._came:
            assert self._came.wait_for(lambda: len(self.requests) >= count, timeout_s), self.requests
            return list(self.requests)

    def note(self, request: Received) -> int:
        """The status of its answer."""
        with self._came:
            self.requests.append(request)
            self._came.notify_all()
            status = self.answers.pop(0) if self.answers else 204
        self.open.wait(60)
        return status


@contextmanager
def receiving() -> Iterator[Receiver]:
    """A receiver while the block runs."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            status = receiver.note(Received(self.path, dict(self.headers), body))
            try:
                self.send_response(status)
                if 300 <= status < 400:
                    self.send_header("Location", receiver.location)
                self.send_header("Content-Length", "0")
                self.end_headers()
            except OSError:  # whoever asked was killed
                pass

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    class Server(ThreadingHTTPServer):
        request_queue_size = 128  # socketserver's 5 are fewer than what senders open at once: the rest is reset

    with Server(("127.0.0.1", 0), Handler) as server:
        receiver = Receiver(server.server_address[1])
        receiver.open.set()
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield receiver
        finally:
            receiver.open.set()
            server.shutdown()
            thread.join()
