"""A process that has imported all that a worker needs, and forks workers that are at work a moment later.

Importing torch and the rest takes seconds, a fork of a process that has done it some 10 ms. `hpo launch` starts such a
host before anything else and tells it over its standard input what to fork; the host says
on its standard output what became of them, a JSON object a line:

    launcher -> host    {"index": 0, "log": "…/worker-0.log", "environment": {…}, "arguments": {"study": "waves"}}
    host -> launcher    {"index": 0, "pid": 71}              forked
                        {"index": 0, "status": 1}            could not be forked
                        {"pid": 71, "status": -9}            ended, as subprocess.Popen.returncode says it

What is forked must not be in use, so the host never trains, connects, starts a thread or touches CUDA. When the
launcher is gone it forks nothing more and ends with its last worker. When the host is gone, its workers get a SIGTERM.

HPO_START=fork or spawn says how workers start; without it they are forked on Linux, and elsewhere spawned, each one a
process that imports everything itself.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import logging
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from hpo.models.machine import ONE_THREAD, tune_allocator

PRELOADED = (
    "torch",
    "hpo.worker.worker",
    "hpo.trial.run",
    "hpo.promote.promotion",
    "hpo.study.pruning",
)
PR_SET_PDEATHSIG, PR_SET_NAME = 1, 15  # of prctl(2)
UNSEEN = 255  # the status of a worker whose host died before it
LAST_WORDS = 4096  # bytes of a host's standard error


class HostError(ValueError):
    """HPO_START asks for what there is not."""


def forks() -> bool:
    """Whether workers are forked from a host. Raises HostError."""
    able = sys.platform == "linux" and hasattr(os, "pidfd_open")
    wanted = os.environ.get("HPO_START", "fork" if able else "spawn")
    if wanted not in ("fork", "spawn"):
        raise HostError(f"HPO_START must be fork or spawn, got {wanted!r}")
    if wanted == "fork" and not able:
        raise HostError(f"HPO_START=fork needs Linux, this is {sys.platform}; leave it unset or set it to spawn")
    return wanted == "fork"


# ------------------------------------------------------------------------------------------------ the launcher's side


class Host:
    """A host as its launcher sees it. A context manager: leaving it ends the host."""

    def __init__(self) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - read when the host has died
        self._popen = subprocess.Popen(
            [sys.executable, "-P", "-m", "hpo.launcher.forkserver"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=os.environ | ONE_THREAD,
            start_new_session=True,  # a Ctrl-C reaches the launcher alone
        )
        assert self._popen.stdin is not None
        assert self._popen.stdout is not None
        self._orders, self._answers = self._popen.stdin, self._popen.stdout
        self._heard = b""
        self._workers: dict[int, Forked] = {}  # by index, the latest of each

    def __enter__(self) -> Host:
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

    def fork(self, index: int, log: Path, environment: Mapping[str, str], arguments: Mapping[str, Any]) -> Forked:
        """Have a worker forked that appends to `log`, with `environment` added to its own; `arguments` are those of
        `hpo.worker.worker.work`. Returns at once: a host that still imports forks it later.
        """
        worker = self._workers[index] = Forked(self)
        order = {"index": index, "log": str(log), "environment": dict(environment), "arguments": dict(arguments)}
        with suppress(BrokenPipeError):  # a host that has died says so where it is listened to
            self._orders.write(json.dumps(order).encode() + b"\n")
            self._orders.flush()
        return worker

    def hear(self, timeout_s: float = 0.0) -> None:
        """Take in what the host has said since, after waiting for it at most so long."""
        if self.status is not None:
            time.sleep(timeout_s)
        elif _readable(self._answers.fileno(), timeout_s):
            said = os.read(self._answers.fileno(), 2**16)
            if not said:
                self._popen.wait()  # nobody else holds the pipe for longer than it takes to fork
            *lines, self._heard = (self._heard + said).split(b"\n")
            for line in lines:
                self._take_in(json.loads(line))

    def close(self) -> None:
        """End the host, also amidst its imports: it has nothing to lose. Workers that run get their SIGTERM by it."""
        with suppress(BrokenPipeError):
            self._orders.close()
        self._popen.kill()
        self._popen.wait()
        self._answers.close()
        self._errors.close()

    def last_words(self) -> str:
        """What a host that ended unasked has to say for itself."""
        self._errors.seek(max(0, self._errors.seek(0, os.SEEK_END) - LAST_WORDS))
        return f"{self._errors.read().decode(errors='replace')}the host process ended with status {self.status}\n"

    def _take_in(self, answer: dict[str, int]) -> None:
        if "index" not in answer:
            worker = next(worker for worker in self._workers.values() if worker.pid == answer["pid"])
            worker.status = answer["status"]
        elif "pid" in answer:
            self._workers[answer["index"]].begun(answer["pid"])
        else:
            self._workers[answer["index"]].status = answer["status"]


class Forked:
    """A worker under a host, with those of Popen's methods that a launcher needs."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.pid: int | None = None  # once the host has forked it
        self.status: int | None = None
        self._handle: int | None = None  # a pidfd, which unlike a pid never comes to mean another process

    def begun(self, pid: int) -> None:
        self.pid = pid
        with suppress(ProcessLookupError):  # it has ended already
            self._handle = os.pidfd_open(pid)

    def poll(self) -> int | None:
        """Its exit status, None while it runs or is still to be forked."""
        self.host.hear()
        if self.status is None and self.host.status is not None and self._gone(0.0):
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
            if self.host.status is None:
                self.host.hear(left_s)
            else:
                self._gone(left_s)
        return status

    def send_signal(self, number: int) -> None:
        """A worker that is still to be forked never will be: the host is closed next."""
        if self._handle is not None:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._handle, number)
        elif self.pid is None:
            self.status = -number

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _gone(self, timeout_s: float) -> bool:
        """Whether it no longer runs, or never did; after waiting for its end at most so long."""
        return self._handle is None or _readable(self._handle, timeout_s)


def _readable(descriptor: int, timeout_s: float) -> bool:
    poll = select.poll()  # unlike select(2) it takes descriptors above 1023
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(1000 * timeout_s))


# ---------------------------------------------------------------------------------------------------- the host's side


def main() -> None:
    """Import, then fork as told until the launcher and all workers are gone."""
    orders, answers = os.dup(0), os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # a library that prints must not get between the answers
    preload()
    _Service(orders, answers).run()
    os._exit(0)  # without the interpreter's clean-up, which takes a second with torch loaded


def preload() -> None:
    """All that a worker imports up to its first training step and after it, of what takes long.

    Without the garbage collector, which takes a fifth of the time to find that modules are no garbage.
    """
    gc.disable()
    for name in PRELOADED:
        importlib.import_module(name)
    tune_allocator()
    gc.freeze()  # what is loaded is never looked through again, and its pages stay shared with the workers


class _Service:
    """The host's one loop: orders come in, children end."""

    def __init__(self, orders: int, answers: int) -> None:
        self.orders, self.answers = orders, answers
        self.wakened, waker = os.pipe()
        os.set_blocking(waker, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # with a handler, so that the wakeup below is written to
        signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
        self.pipes = (orders, answers, self.wakened, waker)
        self.children: set[int] = set()

    def run(self) -> None:
        poll, read, open_ = select.poll(), b"", True
        for descriptor in (self.orders, self.wakened):
            poll.register(descriptor, select.POLLIN)
        while open_ or self.children:
            for descriptor, _ in poll.poll():
                said = os.read(descriptor, 2**16)
                if descriptor == self.wakened:
                    self._reap()
                elif said:
                    *lines, read = (read + said).split(b"\n")
                    for line in lines:
                        self._fork(json.loads(line))
                else:  # the launcher is gone, or has closed its end
                    open_ = False
                    poll.unregister(self.orders)

    def _fork(self, order: dict[str, Any]) -> None:
        host = os.getpid()
        try:
            pid = os.fork()
        except OSError:  # no memory, too many processes: no reason to end those that run
            traceback.print_exc()
            return self._answer(index=order["index"], status=1)
        if pid == 0:
            _be_worker(order, host, self.pipes)
        self.children.add(pid)
        return self._answer(index=order["index"], pid=pid)

    def _reap(self) -> None:
        while self.children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            self.children.remove(pid)
            self._answer(pid=pid, status=os.waitstatus_to_exitcode(status))

    def _answer(self, **content: int) -> None:
        with suppress(BrokenPipeError):
            os.write(self.answers, json.dumps(content).encode() + b"\n")


def _be_worker(order: dict[str, Any], host: int, pipes: tuple[int, ...]) -> NoReturn:
    """In the child: a process like one that was started for it, except that it ends without the slow clean-up."""
    status = 1
    try:
        _end_with(host)
        _leave_host(order, pipes)
        from hpo.worker.worker import work

        work(**order["arguments"])
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(BaseException):
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _end_with(host: int) -> None:
    """Ask for a SIGTERM at the death of the host, which may have come before the asking."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != host:
        os.kill(os.getpid(), signal.SIGTERM)


def _leave_host(order: dict[str, Any], pipes: tuple[int, ...]) -> None:
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for pipe in pipes:
        os.close(pipe)
    os.setsid()
    log = os.open(order["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    ctypes.CDLL(None).prctl(PR_SET_NAME, f"hpo-worker-{order['index']}".encode())
    os.environ.update(order["environment"])
    gc.enable()


if __name__ == "__main__":
    main()
