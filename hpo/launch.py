"""Starts workers as processes of this machine, starts dead ones again, and waits until the study's best is promoted."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.machine import ONE_THREAD
from storage.postgres import PostgresError, database_url, home, revive

if TYPE_CHECKING:
    from hpo.config import StudyConfig
    from hpo.study import OpenStudy
    from storage.leases import Snapshot

log = logging.getLogger("hpo")

REVIVE_S = 2.0  # between two looks at the embedded server
LOOK_S = 0.25  # between two looks at the study
RESTARTS = 5  # of one worker that ends with an error, before it is left alone
STOP_S = 30.0  # that workers have to finish a batch and give their trial back


class LaunchError(RuntimeError):
    """The workers cannot go on, or the study ended without a model."""


class Interrupted(RuntimeError):
    """Asked to stop: trials in flight were given back, the next launch goes on with them."""


@dataclass
class _Process:
    index: int
    log: Path
    popen: subprocess.Popen[bytes]
    restarts: int = 0


class LocalWorkers:
    """Worker processes of this machine. A context manager: leaving it ends those that still run."""

    def __init__(self, study: str, count: int) -> None:
        self.study = study
        self.folder = home() / "logs" / study
        self.folder.mkdir(parents=True, exist_ok=True)
        self.processes = [self._start(index) for index in range(count)]

    def __enter__(self) -> LocalWorkers:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def tend(self) -> None:
        """Start those again that died. Raises LaunchError when none is left that could go on."""
        for process in self.processes:
            if process.popen.poll() not in (None, 0) and process.restarts < RESTARTS:
                restarted = self._start(process.index)
                process.popen, process.restarts = restarted.popen, process.restarts + 1
        if all(process.popen.poll() not in (None, 0) for process in self.processes):
            raise LaunchError(
                f"every worker of study {self.study!r} ended with an error, {RESTARTS} restarts each; "
                f"the last lines of {self.processes[0].log}:\n{_tail(self.processes[0].log)}"
            )

    def running(self) -> bool:
        return any(process.popen.poll() is None for process in self.processes)

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
                popen.wait()

    def _start(self, index: int) -> _Process:
        log = self.folder / f"worker-{index}.log"
        environment = os.environ | ONE_THREAD | {"HPO_WORKER_INDEX": str(index), "HPO_LOG": str(log)}
        command = [sys.executable, "-P", "-m", "hpo", "worker", "--study", self.study]
        with log.open("ab") as output:
            popen = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                start_new_session=True,  # a Ctrl-C reaches the launcher alone, which then asks the workers
            )
        return _Process(index, log, popen)


def launch(
    study: str | os.PathLike[str] | StudyConfig,
    *,
    workers: int | None = None,
    overrides: Sequence[str] = (),
    trials: int | None = None,
    detach: bool = False,
    show: Callable[[Snapshot], None] = lambda _: None,
) -> dict[str, Any]:
    """Create or go on with the study of a file (TOML, or bare data), run it to its end, and sum it up.

    workers: processes on this machine; None: one a CPU core, or one a GPU. overrides: as in
    `study.trials=10`. trials: a new budget for a study that exists. detach: create the study and return without
    starting anything. show: called with the state of the study a few times a second.
    Raises ConfigError, DataError, StudyError, LaunchError, and Interrupted after a Ctrl-C or SIGTERM.
    """
    from hpo.study import create_or_open
    from storage.artifacts import artifact_store
    from storage.trials import trial_storage

    started = time.monotonic()
    config = _config(study, overrides, trials)
    storage = trial_storage(database_url())
    try:
        opened = create_or_open(config, storage, artifact_store())
        if detach:
            return {"study": opened.name, "trials": config.study.trials, "detached": True}
        _wait(opened, workers or default_workers(), show)
        return summary(opened, time.monotonic() - started)
    finally:
        storage.close()


def _config(study: str | os.PathLike[str] | StudyConfig, overrides: Sequence[str], trials: int | None) -> StudyConfig:
    from hpo.config import StudyConfig, config_for_data, load

    if isinstance(study, StudyConfig):
        config = study
    elif Path(study).suffix == ".toml":
        config = load(Path(study), overrides)
    else:
        config = config_for_data(Path(study), overrides)
    if trials is not None:
        config = replace(config, study=replace(config.study, trials=trials))
    return config


def _wait(opened: OpenStudy, workers: int, show: Callable[[Snapshot], None]) -> None:
    """Until the study is promoted. SIGTERM counts as Ctrl-C."""
    asked = _Signals()
    with asked, _server_kept_up(), LocalWorkers(opened.name, workers) as group:
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
            if ended and state.status == "stopped":
                raise Interrupted(
                    f"study {opened.name!r} was stopped; launch it again to go on, or `hpo promote {opened.name}` "
                    "makes its best trial so far a model"
                )
            group.tend()
            if ended and not group.running():
                raise LaunchError(f"the workers ended before study {opened.name!r} did; see {group.folder}")
            time.sleep(LOOK_S)


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

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._earlier[number] = signal.signal(number, self._note)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    def _note(self, *_: object) -> None:
        self.received = True


def summary(opened: OpenStudy, seconds: float) -> dict[str, Any]:
    """What `hpo launch --json` prints in its last line. Raises LaunchError where no trial completed."""
    from hpo.promote import materialise_model
    from storage.registry import Registry

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


def _tail(path: Path, lines: int = 15) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
