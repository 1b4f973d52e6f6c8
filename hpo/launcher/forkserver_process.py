"""The fork server's own side: the process that imports, then forks a worker for each order (see `forkserver`).

What is forked must not be in use, so this process never trains, connects, starts a thread or touches CUDA. When the
launcher is gone it forks nothing more and ends with its last worker. When it is gone itself, its workers get a SIGTERM.
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
import sys
import traceback
from contextlib import suppress
from typing import Any, NoReturn

from hpo.errors import HpoError
from hpo.logs import say_defect, say_error
from hpo.models.machine import tune_allocator
from hpo.storage.masking import mask_errors

# All that a trial and a promotion import; scipy is for the intervals and the calibration of a promotion, Optuna's
# importances for its report.
PRELOADED = ("torch", "hpo.worker.worker", "scipy.special", "scipy.optimize", "optuna.importance")
SPARED = "sklearn"  # Optuna's importances import it where it is there, a second, and ours use nothing of it
WORKER = "hpo.worker.worker"
PR_SET_PDEATHSIG, PR_SET_NAME = 1, 15  # of prctl(2)


def main() -> None:
    """Import, then fork a worker for each order until the launcher and all workers are gone."""
    mask_errors()  # and with it that of the workers
    orders, answers = os.dup(0), os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # a library that prints must not get between the answers
    preload()
    _Server(orders, answers).run()
    os._exit(0)  # without the interpreter's clean-up, which takes a second with torch loaded


def preload() -> None:
    """All that a worker imports up to its first training step and after it.

    Without the garbage collector, which takes a fifth of the time to find that modules are no garbage.
    """
    gc.disable()
    sys.modules[SPARED] = None  # type: ignore[assignment]  # it cannot be imported …
    for name in PRELOADED:
        importlib.import_module(name)
    del sys.modules[SPARED]  # … until here
    tune_allocator()
    gc.freeze()  # what is loaded is never looked through again, and its pages stay shared with the workers


class _Server:
    """The server's one loop: orders come in, children end."""

    def __init__(self, orders: int, answers: int) -> None:
        self.orders, self.answers = orders, answers
        self.woken, waker = os.pipe()
        os.set_blocking(waker, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # with a handler, so that the wakeup below is written to
        signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
        self.pipes = (orders, answers, self.woken, waker)
        self.children: set[int] = set()

    def run(self) -> None:
        poll, read, open_ = select.poll(), b"", True
        for descriptor in (self.orders, self.woken):
            poll.register(descriptor, select.POLLIN)
        while open_ or self.children:
            for descriptor, _ in poll.poll():
                data = os.read(descriptor, 2**16)
                if descriptor == self.woken:
                    self._reap()
                elif data:
                    *lines, read = (read + data).split(b"\n")
                    for line in lines:
                        self._fork(json.loads(line))
                else:  # the launcher is gone, or has closed its end
                    open_ = False
                    poll.unregister(self.orders)

    def _fork(self, order: dict[str, Any]) -> None:
        server = os.getpid()
        try:
            pid = os.fork()
        except OSError:  # no memory, too many processes: no reason to end those that run
            traceback.print_exc()
            return self._answer(index=order["index"], status=1)
        if pid == 0:
            _be_worker(order, server, self.pipes)
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


def _be_worker(order: dict[str, Any], server: int, pipes: tuple[int, ...]) -> NoReturn:
    """In the child: a process like one that was started for it, except that it ends without the slow clean-up."""
    status = 1
    try:
        _end_with(server)
        _leave_server(order, pipes)
        importlib.import_module(WORKER).work(**order["arguments"])
        status = 0
    except HpoError as error:
        say_error(str(error))
    except BaseException as error:
        say_defect(error)
    finally:
        with suppress(BaseException):
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _end_with(server: int) -> None:
    """Ask for a SIGTERM at the end of the server, which may have come before the asking."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != server:
        os.kill(os.getpid(), signal.SIGTERM)


def _leave_server(order: dict[str, Any], pipes: tuple[int, ...]) -> None:
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
