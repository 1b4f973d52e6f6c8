"""Starts workers as processes of this machine, starts dead ones again, and waits until the study's best is promoted.

Workers are forked from a warm host where the platform allows it, else each is a process of its own.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpo.models.machine import ONE_THREAD
from hpo.storage.database import database_url
from hpo.storage.errors import PostgresError
from hpo.storage.home import home
from hpo.storage.server.server import revive

if TYPE_CHECKING:
    from hpo.launcher.forkserver import Forked, Host
    from hpo.launcher.ray import Cluster, RayWorkers
    from hpo.storage.snapshot import Snapshot
    from hpo.study.config import StudyConfig
    from hpo.study.lifecycle import OpenStudy

log = logging.getLogger("hpo")

REVIVE_S = 2.0  # between two looks at the embedded server
LOOK_S = 0.25  # between two looks at the study, or less when a worker ends
RESTARTS = 5  # of one worker that ends with an error, before it is left alone
PAUSE_S = 1.0  # before the first restart of a worker, twice as long before each further one
STOP_S = 30.0  # that workers have to finish a batch and give their trial back


class LaunchError(RuntimeError):
    """The workers cannot go on, or the study ended without a model."""


class Interrupted(RuntimeError):
    """Asked to stop: trials in flight were given back, the next launch goes on with them."""


@dataclass
class _Process:
    index: int
    log: Path
    popen: subprocess.Popen[bytes] | Forked
    restarts: int = 0
    due: float | None = None  # when it is to be started again, by the monotonic clock

    @property
    def failed(self) -> bool:
        return self.popen.poll() not in (None, 0)


class LocalWorkers:
    """Worker processes of this machine. A context manager: leaving it ends those that still run, and their host.

    slots: trials at once in each; None: as many as fit. host: what forks them; None: each is started on its own.
    """

    def __init__(self, study: str, count: int, slots: int | None = 1, host: Host | None = None) -> None:
        self.study, self.slots, self.host = study, slots, host
        self.folder = home() / "logs" / study
        self.folder.mkdir(parents=True, exist_ok=True)
        logs = [self.folder / f"worker-{index}.log" for index in range(count)]
        self.processes = [_Process(index, log, self._start(index, log)) for index, log in enumerate(logs)]

    def __enter__(self) -> LocalWorkers:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def tend(self) -> None:
        """Start those again that died, after a pause. Raises LaunchError when none is left that could go on."""
        for process in self.processes:
            if process.failed and process.restarts < RESTARTS:
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
        if self.host is None:
            time.sleep(timeout_s)
        else:
            self.host.hear(timeout_s)

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
                with suppress(subprocess.TimeoutExpired):  # of a host that hangs and cannot tell
                    popen.wait(STOP_S)
        if self.host is not None:
            self.host.close()

    def _restart(self, process: _Process) -> None:
        """Once its pause is over."""
        if process.due is None:
            process.due = time.monotonic() + PAUSE_S * 2**process.restarts
        if time.monotonic() >= process.due:
            self._revive_host(process.log)
            process.popen, process.due = self._start(process.index, process.log), None
            process.restarts += 1

    def _revive_host(self, log_path: Path) -> None:
        """A new host where the old one died; the log of the worker that notices gets its last words."""
        from hpo.launcher.forkserver import Host

        if self.host is None or self.host.status is None:
            return
        log.warning("the host process ended with status %d, a new one is started; see %s", self.host.status, log_path)
        with log_path.open("a") as file:
            file.write(self.host.last_words())
        self.host.close()
        self.host = Host()

    def _start(self, index: int, log: Path) -> subprocess.Popen[bytes] | Forked:
        environment = {"HPO_WORKER_INDEX": str(index), "HPO_LOG": str(log)}
        if self.host is not None:
            return self.host.fork(index, log, environment, {"study": self.study, "slots": self.slots})
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


def warm_host() -> AbstractContextManager[Host | None]:
    """A host that begins to import what workers need, or None where they are spawned. Raises HostError."""
    from hpo.launcher.forkserver import Host, forks

    return Host() if forks() else nullcontext()


def launch(
    study: str | os.PathLike[str] | StudyConfig,
    *,
    workers: int | None = None,
    slots: int | None = 1,
    cluster: Cluster | None = None,
    overrides: Sequence[str] = (),
    trials: int | None = None,
    detach: bool = False,
    show: Callable[[Snapshot], None] = lambda _: None,
    host: Host | None = None,
) -> dict[str, Any]:
    """Create or go on with the study of a file (TOML, or bare data), run it to its end, and sum it up.

    workers: processes on this machine; None: one a CPU core, or one a GPU, but no more than trials. slots: trials at
    once in each; None: as many as fit the GPU. cluster: Ray's, to place the workers on instead, without `workers` as
    many as fit, and no more than trials either. overrides: as in `study.trials=10`. trials: a new budget for a study
    that exists. detach: create the study and return without starting anything. show: called with the state of the
    study a few times a second.
    host: a `warm_host()` that the caller has started already, to be ended here.
    Raises ConfigError, DataError, StudyError, LaunchError, and Interrupted after a Ctrl-C or SIGTERM.
    """
    started = time.monotonic()
    elsewhere = host is not None or detach or cluster is not None
    with nullcontext(host) if elsewhere else warm_host() as warm:  # imports while this process does
        from hpo.storage.artifacts import artifact_store
        from hpo.storage.trials import trial_storage
        from hpo.study.lifecycle import create_or_open

        config = _config(study, overrides, trials)
        storage = trial_storage(database_url())
        try:
            opened = create_or_open(config, storage, artifact_store())
            if detach:
                return {"study": opened.name, "trials": config.study.trials, "detached": True}
            if cluster is not None:
                _run_on(cluster, opened, workers, slots, show)
                return summary(opened, time.monotonic() - started)
            count = workers or min(default_workers(), _state(opened).budget)
            with _Signals() as asked, _server_kept_up(), LocalWorkers(opened.name, count, slots, warm) as group:
                _wait(opened, group, asked, show)
            return summary(opened, time.monotonic() - started)
        finally:
            storage.close()


def _run_on(
    cluster: Cluster, opened: OpenStudy, count: int | None, slots: int | None, show: Callable[[Snapshot], None]
) -> None:
    from hpo.launcher.ray import RayWorkers, connected

    with (
        connected(cluster, opened.name),
        _Signals() as asked,
        _server_kept_up(),
        RayWorkers(opened.name, count, slots, cluster, _state(opened).budget) as group,
    ):
        _wait(opened, group, asked, show)


def _config(study: str | os.PathLike[str] | StudyConfig, overrides: Sequence[str], trials: int | None) -> StudyConfig:
    from hpo.study.config import StudyConfig, config_for_data, load

    if isinstance(study, StudyConfig):
        config = study
    elif Path(study).suffix == ".toml":
        config = load(Path(study), overrides)
    else:
        config = config_for_data(Path(study), overrides)
    if trials is not None:
        config = replace(config, study=replace(config.study, trials=trials))
    return config


def _wait(
    opened: OpenStudy, group: LocalWorkers | RayWorkers, asked: _Signals, show: Callable[[Snapshot], None]
) -> None:
    """Until the study is promoted. SIGTERM counts as Ctrl-C."""
    while True:
        ended = not group.running()
        state = _state(opened)
        show(state)
        if state.status == "finished":
            return
        if asked.received:
            group.stop()
            show(_state(opened))
            raise Interrupted(
                f"study {opened.name!r} was interrupted; trials in flight are kept: the same command goes on"
            )
        if state.status == "stopped" and (ended or not any(trial.alive for trial in state.in_flight)):
            raise Interrupted(
                f"study {opened.name!r} was stopped; launch it again to go on, or `hpo promote {opened.name}` "
                "makes its best trial so far a model"
            )
        group.tend()
        if ended and not group.running():
            raise LaunchError(f"the workers ended before study {opened.name!r} did; see {group.folder}")
        group.rest(LOOK_S)


@contextmanager
def _server_kept_up() -> Iterator[None]:
    """Start the embedded server again should it die while the block runs; a database of others is left to them."""
    done = threading.Event()

    def look() -> None:
        while not done.wait(REVIVE_S):
            try:
                revive()
            except PostgresError:
                log.exception("the embedded server is down")

    thread = threading.Thread(target=look, daemon=True)
    if not os.environ.get("HPO_DATABASE_URL"):
        thread.start()
    try:
        yield
    finally:
        done.set()


def _state(opened: OpenStudy) -> Snapshot:
    try:
        return opened.leases.snapshot(opened.study_id)
    except KeyError:
        raise LaunchError(f"study {opened.name!r} was deleted while it ran; launch it again to begin anew") from None


class _Signals:
    """SIGINT and SIGTERM are noted instead of raised while the block runs (main thread only)."""

    def __init__(self) -> None:
        self.received = False
        self._earlier: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._earlier[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    def _note(self, *_: object) -> None:
        self.received = True


def summary(opened: OpenStudy, seconds: float) -> dict[str, Any]:
    """What `hpo launch --json` prints in its last line. Raises LaunchError where no trial completed."""
    from hpo.promote.promotion import materialise_model
    from hpo.storage.registry import Registry

    state, row = _state(opened), opened.leases.study(opened.study_id)
    if state.promoted_version is None:
        raise LaunchError(no_model(opened))
    out_of_time = row is not None and row.out_of_time
    model = Registry(database_url()).get(opened.name, state.promoted_version)
    scores = model.scores
    return {
        "study": opened.name,
        "ended_by": "budget" if state.started >= state.budget else "timeout" if out_of_time else "exhausted space",
        "trials": {name: state.counts.get(name, 0) for name in ("complete", "pruned", "failed")},
        "best": {
            "number": model.trial_number,
            "value": scores["value"],
            "params": model.config["params"],
        },
        "model": {"name": model.name, "version": model.version, "path": str(materialise_model(model))},
        "validation": scores["validation"],
        "test": scores.get("test"),
        "seconds": round(seconds, 2),
    }


def no_model(opened: OpenStudy) -> str:
    """Why a study ended without a model."""
    failures = [
        trial.user_attrs["failure"]
        for trial in opened.study.get_trials(deepcopy=False)
        if "failure" in trial.user_attrs
    ]
    reason = f"the first of {len(failures)} failures: {failures[0]}; " if failures else ""
    row = opened.leases.study(opened.study_id)
    if row is not None and row.out_of_time:
        reason += f"its study.timeout of {row.timeout_s:g} s ran out: give it more and launch it again; "
    logs = home() / "logs" / opened.name
    return f"study {opened.name!r} ended without a completed trial; {reason}logs: {logs}"


def default_workers() -> int:
    """One worker a GPU, or without a GPU one a CPU core that this process may use."""
    gpus = Path("/proc/driver/nvidia/gpus")
    if gpus.is_dir() and (count := len(list(gpus.iterdir()))):
        return count
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def tail(path: Path, lines: int = 15) -> str:
    """The last lines of a file."""
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
