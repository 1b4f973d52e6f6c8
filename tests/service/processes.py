"""Processes of the service that a test ends and starts again, and a relay in front of them that listens in."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from tests.conftest import wait_for

RESET = struct.pack("ii", 1, 0)  # SO_LINGER of a socket whose end the other side meets as an error


class Server:
    """`hpo serve` on one port, however often it is started; its standard error goes to a file."""

    def __init__(self, environment: dict[str, str], port: int, log: Path, *options: str) -> None:
        self.environment, self.port, self.log, self._options = environment, port, log, options
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Returns when it answers."""
        command = [sys.executable, "-P", "-m", "hpo", "serve", "--port", str(self.port), *self._options]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(command, env=self.environment, stdout=subprocess.DEVNULL, stderr=log)
        wait_for(self._answers)

    def kill(self) -> None:
        """SIGKILL: nothing of it runs on."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def stop(self) -> None:
        """SIGTERM, if it runs; it ends well."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            assert self._process.wait(30) == 0

    def _answers(self) -> bool:
        with suppress(httpx.TransportError):
            return httpx.get(f"{self.url}/healthz", trust_env=False).is_success
        return False


@dataclass
class _Watch:
    """What is to happen once, when so many bytes have followed a text."""

    text: bytes
    offset: int
    action: Callable[[int], None]


class Relay:
    """Passes on connections in turn to several ports, as a TCP load balancer does; to the next where one is closed."""

    def __init__(self, ports: list[int]) -> None:
        self._ports, self._next, self._lock = ports, 0, threading.Lock()
        self._requests: _Watch | None = None
        self._answers: _Watch | None = None
        self._refusals: list[bytes] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def on_request(self, text: bytes, offset: int, action: Callable[[int], None]) -> None:
        """Once, when a client has sent `offset` bytes from `text` on: action(the server's index), then go on."""
        self._requests = _Watch(text, offset, action)

    def on_answer(self, text: bytes, action: Callable[[int], None]) -> None:
        """Once, when a server answers with this text, of which the client gets nothing."""
        self._answers = _Watch(text, 0, action)

    def refuse(self, *answers: bytes) -> None:
        """Answer the next connections with these, as a load balancer does of which no server is ready."""
        self._refusals = list(answers)

    @property
    def done(self) -> bool:
        """Whether all has happened that was to."""
        return self._requests is None and self._answers is None and not self._refusals

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self._refusals:
                with client:
                    client.recv(65536)
                    client.sendall(self._refusals.pop(0))
                continue
            index, server = self._connect()
            if server is None:
                client.close()
                continue
            for source, target, up in ((client, server, True), (server, client, False)):
                threading.Thread(target=self._pass_on, args=(source, target, index, up), daemon=True).start()

    def _connect(self) -> tuple[int, socket.socket | None]:
        for _ in self._ports:
            index, self._next = self._next, (self._next + 1) % len(self._ports)
            with suppress(OSError):
                return index, socket.create_connection(("127.0.0.1", self._ports[index]))
        return 0, None

    def _pass_on(self, source: socket.socket, target: socket.socket, index: int, up: bool) -> None:
        seen: int | None = None  # bytes since the text that is watched for
        with suppress(OSError):
            while data := source.recv(65536):
                with self._lock:
                    watch = self._requests if up else self._answers
                    if watch is not None and (at := data.find(watch.text)) >= 0:
                        seen = -at
                    if watch is not None and seen is not None and (seen := seen + len(data)) > watch.offset:
                        self._requests, self._answers = (None, self._answers) if up else (self._requests, None)
                        watch.action(index)
                        if not up:
                            break
                target.sendall(data)
        for each in (source, target):
            with suppress(OSError):  # the other direction was first
                each.shutdown(socket.SHUT_RDWR)
            each.close()


def files_below(folder: Path) -> set[str]:
    """The names of all files, hidden ones too."""
    return {name for _, _, names in os.walk(folder) for name in names}


@contextmanager
def command_lines() -> Iterator[set[str]]:
    """What `ps` shows of all processes while the block runs."""
    seen: set[str] = set()
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.02):
            for process in psutil.process_iter(["cmdline"]):
                seen.add(" ".join(process.info["cmdline"] or ()))

    looking = threading.Thread(target=look)
    looking.start()
    try:
        yield seen
    finally:
        over.set()
        looking.join()
