"""A launch from study file to summary: create or find the study, tend its workers until it is promoted, sum it up."""

from __future__ import annotations

import importlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpo.launcher.count import count_workers
from hpo.launcher.forkserver import ForkServer
from hpo.launcher.local import LocalWorkers
from hpo.launcher.logs import log_folder
from hpo.launcher.workers import Interrupted, LaunchError, Workers
from hpo.notify import Settings, send_last
from hpo.promote.summary import NoModel, summary_of
from hpo.promote.versions import materialise_model
from hpo.storage.artifacts import artifact_store
from hpo.storage.background import BackgroundLoop
from hpo.storage.database import database_url
from hpo.storage.errors import MissingRecord, PostgresError
from hpo.storage.interrupts import calls_end_with_a_signal
from hpo.storage.leases import Leases
from hpo.storage.registry import Registry
from hpo.storage.server.server import revive
from hpo.storage.snapshot import Snapshot
from hpo.storage.trials import trial_storage
from hpo.study.config import ConfigError, StudyConfig, config_for_data, load
from hpo.study.lifecycle import OpenStudy, create_or_open
from hpo.track.settings import prepare
from hpo.track.tracker import settle

if TYPE_CHECKING:
    from hpo.launcher.ray import Cluster

log = logging.getLogger("hpo")

REVIVE_S = 2.0  # between two looks at the embedded server
HURRY_S = 1.0  # that a call to the database may take after a signal
LOOK_S = 0.25  # between two looks at the study, or less when a worker ends

Show = Callable[[Snapshot], None]


def create(config: StudyConfig) -> dict[str, Any]:
    """Create or find the study and leave it to standing workers."""
    with _study_of(config) as study:
        budget = study.leases.snapshot(study.study_id).budget
        return {"study": study.name, "trials": budget, "detached": True}


def run_here(
    config: StudyConfig, forkserver: ForkServer | None, workers: int | None, slots: int | None, show: Show
) -> dict[str, Any]:
    """Run the study on this machine to its end, and sum it up."""
    started = time.monotonic()
    count = count_workers(workers)
    with _study_of(config) as study:
        watched = WatchedStudy(study.leases, study.study_id, study.name)
        if workers is None:
            count = min(count, watched.state().budget)
        if (most := config.study.max_workers) is not None and count > most:
            log.info("%s: %d of %d workers, as study.max_workers says", study.name, most, count)
            count = most
        if (parallel := config.study.parallel) is not None and count > parallel:
            text = "%s: %d of %d workers have a trial at a time before its finals, as study.parallel says"
            log.info(text, study.name, parallel, count)
        folder = log_folder(study.name, watched.store_key())
        with (
            _told(study),
            _noted_signals() as stop,
            _server_kept_up(),
            LocalWorkers(study.name, count, slots, forkserver, folder, study.leases) as group,
        ):
            importlib.import_module("scipy.special")  # the summary's intervals need it: now, while workers begin
            wait(watched, group, stop, show)
        settle(study.storage, study.name)  # what workers could not write, or was asked for once all had ended
        return summary(study, time.monotonic() - started, group.where_logs_are)


def run_on_ray(
    config: StudyConfig, cluster: Cluster, workers: int | None, slots: int | None, show: Show
) -> dict[str, Any]:
    """Run the study on a Ray cluster to its end, and sum it up."""
    from hpo.launcher.ray import RayWorkers, connected  # an optional dependency

    started = time.monotonic()
    with _study_of(config) as study:
        watched = WatchedStudy(study.leases, study.study_id, study.name)
        most = min(watched.state().budget, config.study.max_workers or sys.maxsize)
        with (
            _told(study),
            connected(cluster, study.name),
            _noted_signals() as stop,
            _server_kept_up(),
            RayWorkers(study.name, workers, slots, cluster, most) as group,
        ):
            wait(watched, group, stop, show)
        settle(study.storage, study.name)  # what workers could not write, or was asked for once all had ended
        return summary(study, time.monotonic() - started, group.where_logs_are)


def read_config(
    study: str | os.PathLike[str] | StudyConfig, overrides: Sequence[str], trials: int | None
) -> StudyConfig:
    """The study of a file (TOML, or bare data) with overrides and another budget. Raises ConfigError."""
    if trials is not None and any(override.partition("=")[0].strip() == "study.trials" for override in overrides):
        raise ConfigError("trials are given twice, by --trials and by --set study.trials; leave one out")
    if isinstance(study, StudyConfig):
        if overrides:
            raise ConfigError(f"overrides go with a study file; change the configuration instead, got {overrides[0]!r}")
        config = study
    elif Path(study).suffix == ".toml":
        config = load(Path(study), overrides)
    else:
        config = config_for_data(Path(study), overrides)
    return config if trials is None else replace(config, study=replace(config.study, trials=trials))


@contextmanager
def _study_of(config: StudyConfig) -> Iterator[OpenStudy]:
    """Created or found; its connections are closed after the block."""
    prepare(config.track)
    storage = trial_storage(database_url())
    try:
        storage.keep_deadlines(config.study.lease_s)
        if config.notify.url is not None and Settings.of_environment().secret is None:
            text = (
                "study %s: HPO_NOTIFY_SECRET is not set here, so `hpo serve` or a standing worker must send its notices"
            )
            log.warning(text, config.study.name)
        yield create_or_open(config, storage, artifact_store())
    finally:
        storage.close()


@contextmanager
def _told(study: OpenStudy) -> Iterator[None]:
    """Send the study's notices at the end of the block, whatever that is."""
    try:
        yield
    finally:
        send_last(study.storage.connection, study.study_id)


class WatchedStudy:
    """A study as the launcher looks at it."""

    def __init__(self, leases: Leases, study_id: int, name: str) -> None:
        self.leases, self.study_id, self.name = leases, study_id, name

    def store_key(self) -> str:
        """What stands for the study in the names of its files. Raises LaunchError for a study that was deleted."""
        row = self.leases.study(self.study_id)
        if row is None:
            raise self._deleted()
        return row.store_key

    def state(self) -> Snapshot:
        """Raises LaunchError for a study that was deleted."""
        try:
            return self.leases.snapshot(self.study_id)
        except MissingRecord:
            raise self._deleted() from None

    def _deleted(self) -> LaunchError:
        return LaunchError(f"study {self.name!r} was deleted while it ran; launch it again to begin anew")


def wait(watched: WatchedStudy, group: Workers, stop: threading.Event, show: Show) -> None:
    """Until the study is promoted. Raises Interrupted once `stop` is set, and LaunchError."""
    name = watched.name
    while True:
        ended = not group.running()
        try:
            state = watched.state()
        except PostgresError:  # after a signal nobody waits for a database that is away
            if not stop.is_set():
                raise
        else:
            show(state)
            if state.status == "finished":
                return
        if stop.is_set():
            group.stop()
            with suppress(PostgresError):
                show(watched.state())
            raise Interrupted(f"study {name!r} was interrupted; trials in flight are kept: the same command goes on")
        if state.status == "stopped" and (ended or not any(trial.alive for trial in state.in_flight)):
            raise Interrupted(
                f"study {name!r} was stopped; launch it again to go on, or `hpo promote {name}` "
                "makes its best trial so far a model"
            )
        group.tend()
        if ended and not group.running():
            raise LaunchError(f"the workers ended before study {name!r} did; see {group.where_logs_are}")
        group.rest(LOOK_S)


@contextmanager
def _server_kept_up() -> Iterator[None]:
    """Start the embedded server again should it die while the block runs; a database of others is left to them."""
    if os.environ.get("HPO_DATABASE_URL"):
        yield
        return
    with BackgroundLoop(
        revive, REVIVE_S, name="hpo-revive", failure="the embedded server is down", expected=(PostgresError,)
    ):
        yield


@contextmanager
def _noted_signals() -> Iterator[threading.Event]:
    """SIGINT and SIGTERM set the event instead of being raised while the block runs (main thread only).

    Calls to a database that does not answer end soon after.
    """
    received = threading.Event()
    earlier: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            earlier[number] = signal.signal(number, lambda *_: received.set())
    try:
        with calls_end_with_a_signal(HURRY_S):
            yield received
    finally:
        for known, handler in earlier.items():
            signal.signal(known, handler)


# ----------------------------------------------------------------------------------------------------- the summary


def summary(study: OpenStudy, seconds: float, logs: str) -> dict[str, Any]:
    """What `hpo launch --json` prints in its last line. Raises LaunchError where no trial completed."""
    try:
        found = summary_of(study)
    except NoModel as error:
        raise LaunchError(f"{error}; logs: {logs}") from None
    model = Registry(study.storage.connection).get(study.name, found["model"]["version"])
    path = str(materialise_model(model))
    return {**found, "model": {**found["model"], "path": path}, "logs": logs, "seconds": round(seconds, 2)}
