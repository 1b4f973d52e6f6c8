"""One worker process: take a trial, run it, take the next, until the study is over or somebody says stop."""

from __future__ import annotations

import hashlib
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from hpo.slots import Room, choose_slots
from models.data import Sequences, load
from models.machine import one_thread, prepare_process
from models.training import Interrupted
from storage.artifacts import ArtifactStore, artifact_store
from storage.leases import Beat, Lease, Leases, StudyOver
from storage.postgres import database_url, home
from storage.trials import trial_storage

if TYPE_CHECKING:
    from hpo.study import OpenStudy
    from models.training import Training

log = logging.getLogger("hpo")

IDLE_S = 0.5  # between two looks for work when there is none
BEATS = 4  # renewals within the time of a lease …
BEAT_S = 2.0  # … and at least one in so long: a renewal also brings the news that a study was stopped


class Attention:
    """What a worker in training keeps an ear on: its lease, its study, its signals.

    A thread renews the lease and takes in the news; the training asks between two batches.
    """

    def __init__(
        self, leases: Leases, worker: str, told: threading.Event | None = None, room: Room | None = None
    ) -> None:
        """told: what tells all slots of the worker to end; room: the memory that they share."""
        self.leases, self.worker = leases, worker
        self.out_of_time = False  # the study's wall-clock budget is spent
        self._told = told or threading.Event()
        self._room = room or Room()
        self._queued = 0  # renewals while the trial waited for memory: waiting in line is progress
        self._in_line = False
        self._lost = False
        self._study_stopped = False
        self._patient = True
        self._lease: Lease | None = None
        self._training: Training | None = None

    def stop(self) -> None:
        """A signal: finish what is short, give the trial back, end."""
        self._told.set()

    @property
    def told(self) -> bool:
        """Whether the worker is to end."""
        return self._told.is_set()

    @property
    def asked_to_stop(self) -> bool:
        """Whether the trial in hand is to be given back: the worker is to end, or somebody stopped the study."""
        return self.told or self._study_stopped

    def rest(self) -> None:
        """Wait a moment for work, or for a signal."""
        self._told.wait(IDLE_S)

    def watch(self, lease: Lease, training: Training, *, patient: bool) -> None:
        """The training that the lease is renewed for; `patient`: its epochs are short enough to be finished."""
        self._lease, self._training, self._patient = lease, training, patient

    def forget_training(self) -> None:
        """Hold on to it no longer: its memory is wanted."""
        self._training = None

    def interrupted(self) -> bool:
        """Whether the running epoch should be given up between two batches."""
        return self._lost or ((self.asked_to_stop or self.out_of_time) and not self._patient)

    @contextmanager
    def beside_others(self) -> Iterator[None]:
        """Take and run a trial beside those of other slots. Raises Interrupted when told to end while it waits."""
        with self._room.shared(lambda: self.told):
            yield

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Within `beside_others`: wait until the other slots' trials have ended, and keep them out."""
        self._in_line = True
        with self._room.alone(lambda: self._lost or self.asked_to_stop or self.out_of_time):
            self._in_line = False
            yield

    @contextmanager
    def holding(self, lease: Lease, lease_s: float) -> Iterator[None]:
        """Renew the lease from a thread for as long as the block runs."""
        self._lease, self._training = lease, None
        self._lost = self._study_stopped = self.out_of_time = self._in_line = False
        done = threading.Event()
        thread = threading.Thread(target=self._renew, args=(done, min(lease_s / BEATS, BEAT_S)), daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            self._lease = self._training = None

    def _renew(self, done: threading.Event, interval_s: float) -> None:
        while not done.wait(interval_s):
            lease, training = self._lease, self._training
            assert lease is not None
            self._queued += self._in_line
            try:
                news = self.leases.renew(self.worker, {lease: _beat(training, self._queued)})
            except Exception:
                log.exception("the lease of trial %d could not be renewed", lease.number)
                continue
            self._lost = self._lost or lease in news.lost
            self._study_stopped = self._study_stopped or lease.study_id in news.stopped
            self.out_of_time = self.out_of_time or lease.study_id in news.out_of_time


def _beat(training: Training | None, queued: int) -> Beat:
    """Progress counted in batches: a hung training makes none, a long epoch does, and so does waiting in line."""
    if training is None:
        return Beat(queued)
    if not training.history:
        return Beat(queued + training.batches)
    last = training.history[-1]
    return Beat(queued + training.batches, last.number, last.value)


class Worker:
    """One process at work on one study, or on any open one, with one trial at a time in each of its slots."""

    def __init__(self, study: str | None, device: str | None = None, slots: int | None = 1) -> None:
        """slots: None chooses by the device's memory and the study's sizes."""
        self.only = study
        self.url = database_url()
        self.storage = trial_storage(self.url)
        self.leases = Leases(self.storage)
        self.store = artifact_store()
        self.name = f"{socket.gethostname()}-{os.getpid()}"
        self.device = device or choose_device()
        self.slots = self._choose_slots() if slots is None else slots
        self.told = threading.Event()
        self.room = Room()
        self.over: set[str] = set()  # studies whose end is in the log
        self._sequences: dict[str, Sequences] = {}
        self._lock = threading.Lock()
        self._failure: BaseException | None = None

    def run(self) -> None:
        """Work until the named study is over and promoted, or, without a name, until told to stop."""
        from hpo.study import study_id_of

        signal.signal(signal.SIGTERM, lambda *_: self.told.set())
        signal.signal(signal.SIGINT, lambda *_: self.told.set())
        log_path = os.environ.get("HPO_LOG")
        study_id = None if self.only is None else study_id_of(self.storage, self.only)
        self.leases.register(self.name, study_id, socket.gethostname(), os.getpid(), self.device, log_path)
        try:
            if self.slots == 1:
                Slot(self).run()
            else:
                self._run_slots()
        finally:
            self.leases.retire(self.name)
            self.storage.close()

    def sequences(self, key: str) -> Sequences:
        with self._lock:
            if key not in self._sequences:
                self._sequences[key] = fetch_sequences(self.store, key)
            return self._sequences[key]

    def _run_slots(self) -> None:
        """A thread a slot. What ends one of them with an error ends the worker, once the others gave back theirs."""
        threads = [threading.Thread(target=self._run_slot, name=f"slot-{index}") for index in range(self.slots)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self._failure is not None:
            raise self._failure

    def _run_slot(self) -> None:
        try:
            one_thread()
            Slot(self).run()
        except BaseException as error:
            self._failure = self._failure or error
            self.told.set()

    def _choose_slots(self) -> int:
        from hpo.study import open_study

        names = [self.only] if self.only is not None else [row.name for row in self.leases.open_studies()]
        if self.device == "cpu" or not names:
            return 1
        return min(choose_slots(open_study(name, self.storage).plan, self.device) for name in names)


class Slot:
    """Takes a trial, runs it, takes the next."""

    def __init__(self, worker: Worker) -> None:
        self.worker, self.storage, self.leases = worker, worker.storage, worker.leases
        self.attention = Attention(worker.leases, worker.name, worker.told, worker.room)
        self._studies: dict[str, OpenStudy] = {}

    def run(self) -> None:
        while not self.worker.told.is_set():
            try:
                if not self._work() and self.worker.only is not None:
                    return
            except Interrupted:  # told to end while it waited for memory, with no trial in hand
                return

    def _work(self) -> bool:
        """Run one trial or promote one model. False: the one study that this worker serves needs nothing more."""
        only = self.worker.only
        names = [only] if only is not None else [row.name for row in self.leases.open_studies()]
        over = 0
        for name in names:
            opened = self._open(name)
            try:
                if self._run_next(opened):
                    return True
            except StudyOver as ended:
                over += self._promote(opened, ended)
            except KeyError:
                if self.leases.study(opened.study_id) is not None:
                    raise
                log.warning("study %s was deleted", name)
                del self._studies[name]
                return only is None
        if not names or over < len(names):
            self.attention.rest()
            return True
        if only is None:
            self.attention.rest()
        return False

    def _run_next(self, opened: OpenStudy) -> bool:
        """Take a trial and run it; whether there was one. Raises StudyOver."""
        from hpo.study import exhausted

        with self.attention.beside_others():
            if exhausted(opened):
                self.leases.exhaust(opened.study_id)
            lease = self.leases.take(opened.study_id, self.worker.name, self.worker.device)
            if lease is not None:
                self._run_trial(opened, lease)
        return lease is not None

    def _run_trial(self, opened: OpenStudy, lease: Lease) -> None:
        from hpo.objective import Bench, run_trial

        row = self.leases.study(opened.study_id)
        assert row is not None
        worker = self.worker
        try:
            with self.attention.holding(lease, row.lease_s):
                bench = Bench(worker.name, worker.device, worker.store, worker.sequences(opened.plan.train))
                state = run_trial(opened, lease, bench, self.attention)
            log.info("trial %d: %s", lease.number, "left" if state is None else state.name.lower())
        finally:
            self.leases.release(lease)  # does nothing to a trial that has ended or was taken away

    def _promote(self, opened: OpenStudy, ended: StudyOver) -> bool:
        """Whether nothing is left to do for this study, here or in another worker's hands."""
        from hpo.promote import promote_once

        if opened.name not in self.worker.over:
            log.info("study %s is over: %s", opened.name, ended.reason)
            self.worker.over.add(opened.name)
        if ended.reason == "stopped":
            return True
        return promote_once(opened, self.worker.store, self.worker.name, self.worker.sequences(opened.plan.train))

    def _open(self, name: str) -> OpenStudy:
        from hpo.study import open_study

        if name not in self._studies:
            self._studies[name] = open_study(name, self.storage)
        return self._studies[name]


def fetch_sequences(store: ArtifactStore, key: str) -> Sequences:
    """A data set by its artifact key, from this machine's cache if it is there whole."""
    path = home() / "cache" / key
    if not path.exists() or _digest(path) != key:
        path.parent.mkdir(parents=True, exist_ok=True)
        store.fetch(key, path)
        if _digest(path) != key:
            path.unlink()
            raise ValueError(f"artifact {key} does not have the content that its name says; store it again")
    return load(path)


def _digest(path: Path) -> str:
    return f"data-{hashlib.sha256(path.read_bytes()).hexdigest()}.safetensors"


def choose_device() -> str:
    """The GPU that falls to this worker (HPO_WORKER_INDEX modulo the number of GPUs), else the CPU."""
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{int(os.environ.get('HPO_WORKER_INDEX', '0')) % torch.cuda.device_count()}"


def work(study: str | None, slots: int | None = 1) -> None:
    """The `hpo worker` command: one thread a slot, logging to the standard error. slots: None chooses."""
    import optuna

    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(process)d %(levelname)s %(message)s",
        datefmt="%Y-%m-%d %H:%M:%S",
    )
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # samplers comment on conditional parameters at each trial
    started = time.monotonic()
    prepare_process()
    worker = Worker(study, slots=slots)
    ready_s = time.monotonic() - started
    log.info("worker %s on %s with slots: %d, ready after %.2f s", worker.name, worker.device, worker.slots, ready_s)
    worker.run()
