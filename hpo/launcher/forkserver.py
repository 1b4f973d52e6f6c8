"""A process that has imported all that a worker needs, and forks workers that are at work a moment later.

Importing torch and the rest takes seconds, a fork of a process that has done it some 10 ms. `hpo launch` starts a fork
server (`python -P -m hpo.launcher.forkserver_process`) before anything else and tells it over its standard input what
to fork; the server answers on its standard output, a JSON object a line:

    launcher -> server    {"index": 0, "log": "…/worker-0.log", "environment": {…}, "arguments": {"study": "waves"}}
    server -> launcher    {"index": 0, "pid": 71}              forked
                          {"index": 0, "status": 1}            could not be forked
                          {"pid": 71, "status": -9}            ended, as subprocess.Popen.returncode says it

This is the launcher's side of it. HPO_START=fork or spawn says how workers start; without it they are forked on Linux,
and elsewhere spawned, each one a process that imports everything itself.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from hpo.errors import HpoError
from hpo.models.machine import ONE_THREAD

UNSEEN = 255  # the status of a worker whose fork server died before it
LAST_BYTES = 4096  # of a fork server's standard error


class ForkServerError(HpoError):
    """HPO_START asks for what there is not."""


def forks() -> bool:
    """Whether workers are forked. Raises ForkServerError."""
    able = sys.platform == "linux" and hasattr(os, "pidfd_open")
    wanted = os.environ.get("HPO_START", "fork" if able else "spawn")
    if wanted not in ("fork", "spawn"):
        raise ForkServerError(f"HPO_START must be fork or spawn, got {wanted!r}")
    if wanted == "fork" and not able:
        raise ForkServerError(f"HPO_START=fork needs Linux, this is {sys.platform}; leave it unset or set it to spawn")
    return wanted == "fork"


class ForkServer:
    """The fork server as its launcher sees it. A context manager: leaving it ends the server."""

    def __init__(self) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - read when the server has died
        self._popen = subprocess.Popen(
            [sys.executable, "-P", "-m", "hpo.launcher.forkserver_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=os.environ | ONE_THREAD,
            start_new_session=True,  # a Ctrl-C reaches the launcher alone
        )
        assert self._popen.stdin is not None
        assert self._popen.stdout is not None
        self._orders, self._answers = self._popen.stdin, self._popen.stdout
        self._received = b""
        self._workers: dict[int, ForkedProcess] = {}  # by index, the latest of each

    def __enter__(self) -> ForkServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def status(self) -> int | None:
        """None while it runs."""
        return self._popen.returncode

    def fork(
        self, index: int, log: Path, environment: Mapping[str, str], arguments: Mapping[str, Any]
    ) -> ForkedProcess:
        """Have a worker forked that appends to `log`, with `environment` added to its own; `arguments` are those of
        `hpo.worker.worker.work`. Returns at once: a server that still imports forks it later.
        """
        worker = self._workers[index] = ForkedProcess(self)
        order = {"index": index, "log": str(log), "environment": dict(environment), "arguments": dict(arguments)}
        with suppress(BrokenPipeError):  # `receive` notices a server that has died
            self._orders.write(json.dumps(order).encode() + b"\n")
            self._orders.flush()
        return worker

    def receive(self, timeout_s: float = 0.0) -> None:
        """Read the answers that have come since, after waiting for one at most `timeout_s`."""
        if self.status is not None:
            time.sleep(timeout_s)
        elif _readable(self._answers.fileno(), timeout_s):
            read = os.read(self._answers.fileno(), 2**16)
            if not read:
                self._popen.wait()  # nobody else holds the pipe for longer than it takes to fork
            *lines, self._received = (self._received + read).split(b"\n")
            for line in lines:
                self._note(json.loads(line))

    def close(self) -> None:
        """End the server, also amidst its imports: it has nothing to lose. Workers that run get a SIGTERM."""
        with suppress(BrokenPipeError):
            self._orders.close()
        self._popen.kill()
        self._popen.wait()
        self._answers.close()
        self._errors.close()

    def last_output(self) -> str:
        """The end of the standard error of a server that ended unasked."""
        self._errors.seek(max(0, self._errors.seek(0, os.SEEK_END) - LAST_BYTES))
        return f"{self._errors.read().decode(errors='replace')}the fork server ended with status {self.status}\n"

    def _note(self, answer: dict[str, int]) -> None:
        if "index" not in answer:
            worker = next(worker for worker in self._workers.values() if worker.pid == answer["pid"])
            worker.status = answer["status"]
        elif "pid" in answer:
            self._workers[answer["index"]].began(answer["pid"])
        else:
            self._workers[answer["index"]].status = answer["status"]


class ForkedProcess:
    """A forked worker, with those of Popen's methods that a launcher needs."""

    def __init__(self, server: ForkServer) -> None:
        self.server = server
        self.pid: int | None = None  # once the server has forked it
        self.status: int | None = None
        self._handle: int | None = None  # a pidfd, which unlike a pid never comes to mean another process

    def began(self, pid: int) -> None:
        self.pid = pid
        with suppress(ProcessLookupError):  # it has ended already
            self._handle = os.pidfd_open(pid)

    def poll(self) -> int | None:
        """Its exit status, None while it runs or is still to be forked."""
        self.server.receive()
        if self.status is None and self.server.status is not None and self._has_ended(0.0):
            self.status = UNSEEN
        if self.status is not None and self._handle is not None:
            os.close(self._handle)
            self._handle = None
        return self.status

    def wait(self, timeout_s: float) -> int:
        """Its exit status. Raises TimeoutExpired."""
        deadline = time.monotonic() + timeout_s
        while (status := self.poll()) is None:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise subprocess.TimeoutExpired("worker", timeout_s)
            if self.server.status is None:
                self.server.receive(left_s)
            else:
                self._has_ended(left_s)
        return status

    def send_signal(self, number: int) -> None:
        """A worker that is still to be forked never will be: the server is closed next."""
        if self._handle is not None:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._handle, number)
        elif self.pid is None:
            self.status = -number

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _has_ended(self, timeout_s: float) -> bool:
        """Whether it no longer runs, or never did; after waiting for its end at most so long."""
        return self._handle is None or _readable(self._handle, timeout_s)


def _readable(descriptor: int, timeout_s: float) -> bool:
    poll = select.poll()  # unlike select(2) it takes descriptors above 1023
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(1000 * timeout_s))
