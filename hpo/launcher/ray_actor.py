"""The Ray actor of one worker: starts it on the actor's node, and starts it again when it dies."""

from __future__ import annotations

import math
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from hpo.launcher.ray_import import import_ray
from hpo.launcher.workers import PAUSE_S, RESTARTS, STOP_S, tail
from hpo.models.machine import ONE_THREAD
from hpo.storage.home import home

FAREWELL_S = 30.0  # that an actor which gave up stays, so that its launcher can ask why
# Run before the worker, which takes its place: a SIGTERM to it when its actor dies, so that it gives its trial back.
WITH_ACTOR = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


class Report(NamedTuple):
    """What an actor knows of its worker."""

    host: str
    log: str
    failures: int  # ends with an error, in this actor's life
    last_output: str  # "" unless it gave up


class WorkerActor:
    """Keeps a worker process running on its node until that ends well, and leaves with it."""

    def __init__(self, study: str, index: int, slots: int | None, settings: Mapping[str, str], gpus: float) -> None:
        self.command = ["-P", "-m", "hpo", "worker", "--study", study, "--slots", str(slots or "auto")]
        self.environment = environment(settings)
        if gpus == 0:
            self.environment["CUDA_VISIBLE_DEVICES"] = ""  # those of others; else as Ray has set it
        folder = Path(self.environment.get("HPO_HOME") or home()) / "logs" / study
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / f"worker-{socket.gethostname()}-{index}.log"
        on_card = str(max(1, math.floor(1 / gpus + 1e-6)) if gpus else 1)  # it sees that one alone
        self.environment |= {"HPO_WORKER_INDEX": str(index), "HPO_WORKERS": on_card, "HPO_LOG": str(self.log)}
        self.me = import_ray().get_runtime_context().current_actor
        self.stop_requested = threading.Event()
        self.popen: subprocess.Popen[bytes] | None = None
        self.failures, self.last_output = 0, ""
        self.thread = threading.Thread(target=self._keep, daemon=True)
        self.thread.start()

    def look(self) -> Report:
        return Report(socket.gethostname(), str(self.log), self.failures, self.last_output)

    def tail(self, lines: int) -> str:
        """The last lines of the log."""
        return tail(self.log, lines)

    def stop(self) -> None:
        """SIGTERM to the worker, SIGKILL after STOP_S; returns when it has ended."""
        self.stop_requested.set()
        popen = self.popen
        if popen is None:
            return
        popen.send_signal(signal.SIGTERM)
        try:
            popen.wait(STOP_S)
        except subprocess.TimeoutExpired:
            popen.kill()
            popen.wait()

    def _keep(self) -> None:
        """In one thread: the worker gets its SIGTERM when the thread that started it ends, not with the process."""
        while not self.stop_requested.is_set():
            self.popen = self._start()
            if self.stop_requested.is_set():  # after it was looked for
                self.popen.terminate()
            if self.popen.wait() == 0 or self.stop_requested.is_set():
                break
            if self.failures == RESTARTS:
                self.last_output = tail(self.log) or "nothing was logged"
                self.stop_requested.wait(FAREWELL_S)
                break
            self.stop_requested.wait(PAUSE_S * 2**self.failures)
            self.failures += 1
        import_ray().kill(self.me, no_restart=True)

    def _start(self) -> subprocess.Popen[bytes]:
        begin = [sys.executable, "-I", "-S", "-c", WITH_ACTOR, str(os.getpid())]
        with self.log.open("ab") as output:
            return subprocess.Popen(
                [*begin, *self.command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=self.environment,
                start_new_session=True,
            )


def environment(settings: Mapping[str, str]) -> dict[str, str]:
    """Of a worker on this node: the node's own goes before what the launcher says. Its home only on its machine."""
    given = dict(settings)
    if given.pop("host", None) != socket.gethostname():
        given.pop("HPO_HOME", None)
    return given | dict(os.environ) | ONE_THREAD
