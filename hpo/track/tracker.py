"""Writes what has ended to where study files ask for, beside the work of a process, which it never fails or delays."""

from __future__ import annotations

import logging
import math
import random
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from hpo.errors import WorkerFault, legible
from hpo.storage.background import BackgroundLoop
from hpo.storage.errors import MissingRecord, PostgresError
from hpo.storage.locks import Lock
from hpo.storage.masking import mask
from hpo.storage.trials import TrialStorage, trial_storage
from hpo.study.config import TrackSection
from hpo.study.lifecycle import FINALS, study_id_of, track_of
from hpo.study.plan import MissingStudy
from hpo.track.ended import Ended, EndedTrial, ended_trials
from hpo.track.mlflow_runs import MlflowRuns
from hpo.track.settings import lacking
from hpo.track.tensorboard_runs import write_runs

log = logging.getLogger("hpo")

LOOK_S = 0.25  # between two looks at what is due
GATHER_S = 2.0  # after a trial has ended, for others that end soon
BUSY_S = 4.0  # about, until the next try where another process writes the study's runs
AGAIN_S = 30.0  # until the next try after a fault
UNTRACKED_S = 30.0  # after which a study without [track] is asked for some again
PATIENCE_S = 60.0  # that the end of a study waits for the next run to be written; a fault shows sooner
WRITTEN = "hpo:tracked"  # a study's system attribute: what stands for all that MLflow has of it
FAULT_MOST = 400  # characters of a fault


class LockLost(Exception):
    """Another process may write the same runs."""


class Tracker:
    """The runs of the studies that a process works on. Its thread, connection and libraries begin with the first trial
    of a study with [track]."""

    def __init__(self, url: str, stop_requested: threading.Event | None = None) -> None:
        """stop_requested: once set, nothing is waited for."""
        self._url, self._stop_requested = url, stop_requested or threading.Event()
        self._changed = threading.Condition()
        self._due: dict[str, float] = {}  # studies to write, and not before when, by the monotonic clock
        self._untracked: dict[str, float] = {}  # studies without [track], and until when that is believed
        self._at_work: str | None = None  # the study whose runs are being written
        self._awaited: set[str] = set()  # studies whose end somebody waits for
        self._faulty: set[str] = set()  # studies whose last try failed
        self._warned: set[tuple[str, str]] = set()  # study and key of [track]
        self._moved_s = time.monotonic()  # when it last got on
        self._loop: BackgroundLoop | None = None
        self._storage: TrialStorage | None = None  # the thread's own: it holds up nobody
        self._mlflow: dict[str, tuple[str, MlflowRuns]] = {}  # by study, with its address

    def note(self, storage: TrialStorage, study: str) -> None:
        """A trial of this study, or of these finals, has ended. Raises PostgresError."""
        name = study.removesuffix(FINALS)
        if time.monotonic() < self._untracked.get(name, -math.inf):
            return
        if not _is_tracked(storage, name):
            self._untracked[name] = time.monotonic() + UNTRACKED_S
        elif self._runs():
            with self._changed:
                self._due.setdefault(name, time.monotonic() + GATHER_S)

    def settle(self, storage: TrialStorage, study: str) -> None:
        """Write all of the study now, and wait until that is done or has failed; no longer than PATIENCE_S for the next
        run. Raises PostgresError."""
        if _is_tracked(storage, study) and self._runs():
            self._write_now(study)

    def close(self, *, wait: bool) -> None:
        """Write what is due, as `settle` does, but for what has just failed; or leave all of it to others."""
        if self._loop is None:
            return
        with self._changed:
            unwritten = [*self._due, *([self._at_work] if self._at_work else [])]
        for study in unwritten if wait else ():
            if study not in self._faulty:
                self._write_now(study)
        self._loop.stop(timeout_s=0.0)

    def _runs(self) -> bool:
        """Whether its thread runs, from now on if it can be started."""
        with self._changed:
            if self._loop is not None:
                return True
            loop = BackgroundLoop(
                self._round, LOOK_S, name="hpo-track", failure="runs wait to be written", expected=(PostgresError,)
            )
            try:
                loop.start()
            except WorkerFault as fault:
                log.warning("runs are left to other workers: %s", fault)
                return False
            self._loop = loop
            return True

    def _write_now(self, study: str) -> None:
        with self._changed:
            self._due[study], self._moved_s = -math.inf, time.monotonic()
            self._faulty.discard(study)
            self._awaited.add(study)
            while (study in self._due or study == self._at_work) and study not in self._faulty:
                left = self._moved_s + PATIENCE_S - time.monotonic()
                if left <= 0 or self._stop_requested.is_set():
                    log.warning("study %s: its runs are not all written yet; the next launch goes on", study)
                    break
                self._changed.wait(min(left, LOOK_S))
            self._awaited.discard(study)

    # --------------------------------------------------------------------------------------------- in its own thread

    def _round(self) -> None:
        for study, at in list(self._due.items()):
            if time.monotonic() >= at:
                self._take(study)

    def _take(self, study: str) -> None:
        """Write one study, and note when that is tried again."""
        with self._changed:
            del self._due[study]
            self._at_work = study
        again: float | None = AGAIN_S
        try:
            again = self._sync(study)
        finally:
            with self._changed:
                self._at_work = None
                if again is not None:
                    self._due.setdefault(study, time.monotonic() + again)
                (self._faulty.add if again == AGAIN_S else self._faulty.discard)(study)
                self._changed.notify_all()

    def _sync(self, study: str) -> float | None:
        """Write what is not there yet of a study; seconds until the next try, None where nothing is left."""
        if self._storage is None:
            self._storage = trial_storage(self._url, retry_s=0.0)
        storage = self._storage
        with closing(storage):  # for as long as something is written
            try:
                study_id = study_id_of(storage, study)
                lock = Lock(storage.connection, f"runs of study {study_id}")
                if not lock.take():
                    raise LockLost
                with lock.kept():
                    ended = ended_trials(storage, study_id)
                    targets = {key: value for key, value in vars(track_of(storage, study_id)).items() if value}
                    whole = [self._write(key, value, ended, study_id, lock) for key, value in targets.items()]
            except (MissingRecord, MissingStudy):
                return None
            except LockLost:
                return LOOK_S if study in self._awaited else BUSY_S * random.uniform(0.5, 1.5)
        return None if all(whole) else AGAIN_S

    def _write(self, key: str, target: str, ended: Ended, study_id: int, lock: Lock) -> bool:
        """Write the study's runs to one target, as long as the lock is held; whether all are there. A fault is one
        warning until it is over."""
        about = ended.study, key
        if (reason := lacking(key)) is not None:
            self._warn(about, f"{reason}; other workers write what they can")
            return True
        try:
            for _ in self._missing(key, target, ended, study_id):
                with self._changed:
                    self._moved_s = time.monotonic()
                if not lock.held:
                    raise LockLost
        except (PostgresError, LockLost):
            raise
        except Exception as error:  # a library's own, of whatever kind
            fault = legible(mask(f"{type(error).__name__}: {error}"), FAULT_MOST)
            self._warn(about, f"runs cannot be written to [track] {key}, which is tried again: {fault}")
            return False
        if about in self._warned:
            self._warned.discard(about)
            log.warning("study %s: runs are written to [track] %s again", *about)
        return True

    def _missing(self, key: str, target: str, ended: Ended, study_id: int) -> Iterator[EndedTrial]:
        """Write what a target lacks; yields each trial before its run is written."""
        if key == "tensorboard":
            yield from write_runs(Path(target), ended)
            return
        assert self._storage is not None
        digest = ended.digest(target)
        if self._storage.get_study_system_attrs(study_id).get(WRITTEN) == digest:
            return
        known = self._mlflow.get(ended.study)
        if known is None or known[0] != target:
            known = self._mlflow[ended.study] = target, MlflowRuns(target)
        yield from known[1].write(ended)
        self._storage.set_study_system_attr(study_id, WRITTEN, digest)

    def _warn(self, about: tuple[str, str], text: str) -> None:
        if about not in self._warned:
            self._warned.add(about)
            log.warning("study %s: %s", about[0], text)


def _is_tracked(storage: TrialStorage, study: str) -> bool:
    """Whether the study has [track]. Raises PostgresError."""
    try:
        return track_of(storage, study_id_of(storage, study)) != TrackSection()
    except (MissingRecord, MissingStudy):
        return False


def settle(storage: TrialStorage, study: str) -> None:
    """Write all runs of a study that are not there yet, by a process that ends; a fault is a warning."""
    tracker = Tracker(storage.url)
    try:
        tracker.settle(storage, study)
        tracker.close(wait=False)
    except PostgresError as error:
        log.warning("runs of study %s were not written: %s", study, mask(str(error)))
