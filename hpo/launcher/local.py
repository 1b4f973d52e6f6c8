"""Workers as processes of this machine: forked from a fork server where the platform allows it, else spawned."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hpo.launcher.forkserver import ForkedProcess, ForkServer, forks
from hpo.launcher.workers import PAUSE_S, RESTARTS, STOP_S, LaunchError, tail
from hpo.models.machine import ONE_THREAD
from hpo.storage.errors import PostgresError
from hpo.storage.home import own_folder
from hpo.storage.liveness import worker_name

if TYPE_CHECKING:
    from hpo.storage.leases import Leases

log = logging.getLogger("hpo")


@dataclass
class _Process:
    index: int
    log: Path
    popen: subprocess.Popen[bytes] | ForkedProcess
    restarts: int = 0
    due: float | None = None  # when it is to be started again, by the monotonic clock
    asked: subprocess.Popen[bytes] | ForkedProcess | None = None  # the last one whose trials were asked for

    @property
    def failed(self) -> bool:
        return self.popen.poll() not in (None, 0)


class LocalWorkers:
    """Worker processes of this machine. A context manager: leaving it ends those that still run, and the fork server.

    A worker that ends with an error is started again, RESTARTS times in a row. One that had brought a trial further, to
    its end or to another checkpoint, has all of them again: neither a few configurations that bring workers down end a
    study, nor something that kills them now and then. As what there is to train is counted, so are the restarts.

    slots: trials at once in each; None: as many as fit. server: what forks them; None: each is started on its own.
    folder: of their logs; None: that of the first study of this name. leases: of the study's database, to ask what a
    worker has done; None: nobody's restarts are given back.
    """

    def __init__(
        self,
        study: str,
        count: int,
        slots: int | None = 1,
        server: ForkServer | None = None,
        folder: Path | None = None,
        leases: Leases | None = None,
    ) -> None:
        self.study, self.count, self.slots, self.server, self.leases = study, count, slots, server, leases
        folder = folder or own_folder("logs") / study
        self.where_logs_are = str(folder)
        logs = [folder / f"worker-{index}.log" for index in range(count)]
        self.processes = [_Process(index, log, self._start(index, log)) for index, log in enumerate(logs)]

    def __enter__(self) -> LocalWorkers:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def tend(self) -> None:
        """Start those again that died, after a pause. Raises LaunchError when none is left that could go on."""
        for process in self.processes:
            if process.failed:
                self._forgive(process)
                if process.restarts < RESTARTS:
                    self._restart(process)
        if all(process.failed and process.restarts == RESTARTS for process in self.processes):
            raise LaunchError(
                f"every worker of study {self.study!r} ended with an error, {RESTARTS} restarts each; "
                f"the last lines of {self.processes[0].log}:\n{tail(self.processes[0].log)}"
            )

    def running(self) -> bool:
        """Whether some run, or will again."""
        return any(
            process.popen.poll() is None or (process.failed and process.restarts < RESTARTS)
            for process in self.processes
        )

    def rest(self, timeout_s: float) -> None:
        """Wait, at most until a worker begins or ends."""
        if self.server is None:
            time.sleep(timeout_s)
        else:
            self.server.receive(timeout_s)

    def stop(self) -> None:
        """SIGTERM: finish the batch, give the trial back, end; SIGKILL to what is left after STOP_S."""
        alive = [process.popen for process in self.processes if process.popen.poll() is None]
        for popen in alive:
            popen.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + STOP_S
        for popen in alive:
            try:
                popen.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                popen.kill()
                with suppress(subprocess.TimeoutExpired):  # of a fork server that hangs and cannot tell
                    popen.wait(STOP_S)
        if self.server is not None:
            self.server.close()

    def _forgive(self, process: _Process) -> None:
        """Give a worker its restarts back, once after each of its ends, where it got on."""
        if self.leases is None or process.restarts == 0 or process.asked is process.popen or process.popen.pid is None:
            return
        process.asked = process.popen
        with suppress(PostgresError):
            if self.leases.trials_advanced_by(worker_name(process.popen.pid)):
                process.restarts = 0

    def _restart(self, process: _Process) -> None:
        """Once its pause is over."""
        if process.due is None:
            process.due = time.monotonic() + PAUSE_S * 2**process.restarts
        if time.monotonic() >= process.due:
            self._replace_dead_server(process.log)
            process.popen, process.due = self._start(process.index, process.log), None
            process.restarts += 1

    def _replace_dead_server(self, log_path: Path) -> None:
        """A new fork server where the old one died; the log of the worker that notices gets its last output."""
        if self.server is None or self.server.status is None:
            return
        log.warning("the fork server ended with status %d, a new one is started; see %s", self.server.status, log_path)
        with log_path.open("a", encoding="utf-8", errors="replace") as file:
            file.write(self.server.last_output())
        self.server.close()
        self.server = ForkServer()

    def _start(self, index: int, log: Path) -> subprocess.Popen[bytes] | ForkedProcess:
        log.parent.mkdir(parents=True, exist_ok=True)  # also again, where HPO_HOME was removed
        environment = {"HPO_WORKER_INDEX": str(index), "HPO_WORKERS": str(self.count), "HPO_LOG": str(log)}
        if self.server is not None:
            return self.server.fork(index, log, environment, {"study": self.study, "slots": self.slots})
        slots = "auto" if self.slots is None else str(self.slots)
        command = [sys.executable, "-P", "-m", "hpo", "worker", "--study", self.study, "--slots", slots]
        with log.open("ab") as output:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=os.environ | ONE_THREAD | environment,
                start_new_session=True,  # a Ctrl-C reaches the launcher alone, which then asks the workers
            )


def start_forkserver() -> AbstractContextManager[ForkServer | None]:
    """A fork server that begins to import what workers need, or None where they are spawned.

    Raises ForkServerError.
    """
    return ForkServer() if forks() else nullcontext()
