"""One worker process: take a trial, run it, take the next, until the study is over or somebody says stop."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy.exc import OperationalError

from hpo.models.data import Sequences, load
from hpo.models.machine import one_thread, prepare_process
from hpo.models.training import Interrupted
from hpo.promote.promotion import PromotionError
from hpo.storage.artifacts import ArtifactError, ArtifactStore, artifact_store
from hpo.storage.database import database_url
from hpo.storage.errors import PostgresError, StudyOver
from hpo.storage.heartbeat import Progress
from hpo.storage.home import home
from hpo.storage.leases import Lease, Leases
from hpo.storage.registry import RegistryError
from hpo.storage.trials import trial_storage
from hpo.storage.url import mask
from hpo.worker.slots import Room, choose_slots

if TYPE_CHECKING:
    from hpo.models.training import Training
    from hpo.study.lifecycle import OpenStudy

log = logging.getLogger("hpo")

IDLE_S = 0.5  # between two looks for work when there is none
BEAT_S = 2.0  # between two signs of life of a worker without a trial
LEAVE_S = 6.0  # after a signal a worker ends, whatever it hangs in …
GIVE_BACK_S = 1.5  # … and tries for so long to give back what it holds
HURRY_S = 1.0  # after a signal a lost database is not tried for longer
ASIDE_S, ASIDE_MOST_S = 5.0, 300.0  # until a study that cannot be worked on is looked at again, doubling

# What makes one study unworkable for a standing worker, and others not: its data, its plan, its model; the store or the
# database gone in the middle of it.
FAULTS = (ArtifactError, PromotionError, RegistryError, ValueError, OSError, OperationalError)


class Attention:
    """What a worker in training keeps an ear on: its lease, its study, its signals.

    A thread renews the lease and takes in the news; the training asks between two batches.
    """

    def __init__(
        self, leases: Leases, worker: str, told: threading.Event | None = None, room: Room | None = None
    ) -> None:
        """told: what tells all slots of the worker to end; room: the memory that they share."""
        self.leases, self.worker = leases, worker
        self._told = told or threading.Event()
        self._room = room or Room()
        self._queued = 0  # renewals while the trial waited for memory: waiting in line is progress
        self._in_line = False
        self._patient = True
        self._lease: Lease | None = None
        self._training: Training | None = None

    def stop(self) -> None:
        """A signal: finish what is short, give the trial back, end."""
        self._told.set()

    @property
    def _lost(self) -> bool:
        return self._lease is not None and self._lease.heartbeat.lost

    @property
    def _study_stopped(self) -> bool:
        return self._lease is not None and self._lease.heartbeat.study_stopped

    @property
    def out_of_time(self) -> bool:
        """Whether the study's wall-clock budget is spent."""
        return self._lease is not None and self._lease.heartbeat.out_of_time

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

    @property
    def lease(self) -> Lease | None:
        """The one that is held."""
        return self._lease

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
    def holding(self, lease: Lease) -> Iterator[None]:
        """Tell the lease's heartbeat of the progress for as long as the block runs."""
        self._lease, self._training, self._in_line = lease, None, False
        lease.heartbeat.progress = self._progress
        try:
            yield
        finally:
            self._lease = self._training = None

    def _progress(self) -> Progress:
        self._queued += self._in_line
        return _beat(self._training, self._queued)


def _beat(training: Training | None, queued: int) -> Progress:
    """Progress counted in batches: a hung training makes none, a long epoch does, and so does waiting in line."""
    if training is None:
        return Progress(queued)
    if not training.history:
        return Progress(queued + training.batches)
    last = training.history[-1]
    return Progress(queued + training.batches, last.number, last.value)


class Signals:
    """SIGTERM and SIGINT: the slots are told to end, and the process ends LEAVE_S later, whatever it hangs in.

    A thread of its own hears them, through the interpreter's wake-up pipe: the main thread runs no handler while it
    is in C, waiting for a database that does not answer, say. What is not given back by then is given back here.
    """

    def __init__(self) -> None:
        self.told = threading.Event()
        self.worker: Worker | None = None
        self._heard, waker = os.pipe()
        os.set_blocking(waker, False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)  # with a handler, so that the pipe is written to
        signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
        threading.Thread(target=self._obey, name="signals", daemon=True).start()

    def _obey(self) -> None:
        os.read(self._heard, 1)
        self.told.set()
        if self.worker is not None:
            self.worker.hurry()
            time.sleep(LEAVE_S)
            log.warning("ended by a signal in the middle of its work")
            last = threading.Thread(target=self.worker.give_back, daemon=True)
            last.start()
            last.join(GIVE_BACK_S)
        os._exit(0)


@dataclass(frozen=True)
class _Aside:
    """A study that could not be worked on."""

    fault: str
    pause_s: float
    until: float  # by the monotonic clock


class Worker:
    """One process at work on one study, or on any open one, with one trial at a time in each of its slots."""

    def __init__(
        self, study: str | None, device: str | None = None, slots: int | None = 1, told: threading.Event | None = None
    ) -> None:
        """slots: None chooses by the device's memory and the study's sizes. told: once set, all slots end."""
        self.only = study
        self.url = database_url()
        self.storage = trial_storage(self.url)
        if study is None:  # it stands until it is told to end, also while the database is away
            self.storage.set_retry(math.inf)
        self.leases = Leases(self.storage)
        self.store = artifact_store()
        self.name = f"{socket.gethostname()}-{os.getpid()}"
        self.device = device or choose_device()
        self.told = told or threading.Event()
        self.room = Room()
        self.over: set[str] = set()  # studies whose end is in the log
        self._seen_s = time.monotonic()  # when it last told the database that it lives
        self._asides: dict[str, _Aside] = {}  # by name
        self.slots = self._choose_slots() if slots is None else slots
        self._attentions: list[Attention] = []
        self._sequences: dict[str, Sequences] = {}
        self.promoting = threading.Lock()
        self._lock = threading.Lock()
        self._failure: BaseException | None = None

    def run(self) -> None:
        """Work until the named study is over and promoted, or, without a name, until told to stop."""
        from hpo.study.lifecycle import study_id_of

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

    def attention(self) -> Attention:
        """That of a new slot."""
        self._attentions.append(Attention(self.leases, self.name, self.told, self.room))
        return self._attentions[-1]

    def hurry(self) -> None:
        """Told to end: a database that is away is not waited for."""
        self.storage.set_retry(HURRY_S)

    def give_back(self) -> None:
        """All that it holds, over a connection of its own: nobody knows what the others hang in."""
        leases = Leases(trial_storage(self.url, retry_s=0.0))
        for lease in [attention.lease for attention in self._attentions]:
            if lease is not None:
                leases.release(lease)
        leases.release_promotions(self.name)
        leases.retire(self.name)

    def offers(self) -> list[str]:
        """The names of the studies to look for work in."""
        if self.only is not None:
            return [self.only]
        now = time.monotonic()
        if now - self._seen_s >= BEAT_S:  # with no study to take trials of, nothing else would say so
            self._seen_s = now
            self.leases.renew(self.name, {})
        names = [row.name for row in self.leases.open_studies()]
        return [name for name in names if name not in self._asides or self._asides[name].until <= now]

    @contextmanager
    def bearing(self, name: str) -> Iterator[None]:
        """What is at fault with one study does not end a standing worker: it says so once, goes on with the others, and
        looks at that one again after a pause."""
        try:
            yield
        except FAULTS as error:
            if self.only is not None:
                raise
            earlier = self._asides.get(name)
            pause_s = ASIDE_S if earlier is None else min(2 * earlier.pause_s, ASIDE_MOST_S)
            if earlier is None or earlier.fault != str(error):
                log.warning("study %s is set aside: %s", name, mask(str(error)))
            self._asides[name] = _Aside(str(error), pause_s, time.monotonic() + pause_s)

    def worked(self, name: str) -> None:
        """Nothing is at fault with the study any more."""
        self._asides.pop(name, None)

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
        from hpo.study.lifecycle import open_study

        names = [self.only] if self.only is not None else [row.name for row in self.leases.open_studies()]
        if self.device == "cpu" or not names:
            return 1
        found = [1]
        for name in names:
            with self.bearing(name):
                found.append(choose_slots(open_study(name, self.storage).plan, self.device))
        return min(found[1:] or found)


class Slot:
    """Takes a trial, runs it, takes the next."""

    def __init__(self, worker: Worker) -> None:
        self.worker, self.storage, self.leases = worker, worker.storage, worker.leases
        self.attention = worker.attention()
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
        only, names = self.worker.only, self.worker.offers()
        over = 0
        for name in names:
            with self.worker.bearing(name):
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
        from hpo.study.lifecycle import exhausted

        sequences = self.worker.sequences(opened.plan.train)  # before a trial waits for them
        with self.attention.beside_others():
            if exhausted(opened):
                self.leases.exhaust(opened.study_id)
            with self.leases.take(opened.study_id, self.worker.name, self.worker.device) as lease:
                if lease is not None:
                    self._run_trial(opened, lease, sequences)
            if lease is not None:
                self.worker.worked(opened.name)
        return lease is not None

    def _run_trial(self, opened: OpenStudy, lease: Lease, sequences: Sequences) -> None:
        from hpo.trial.run import Bench, run_trial

        worker = self.worker
        with self.attention.holding(lease):
            bench = Bench(worker.name, worker.device, worker.store, sequences)
            state = run_trial(opened, lease, bench, self.attention)
        ending = "left" if state is None else state.name.lower()
        log.info("study %s, trial %d: %s", opened.name, lease.number, ending)

    def _promote(self, opened: OpenStudy, ended: StudyOver) -> bool:
        """Whether nothing is left to do for this study, here or in another worker's hands."""
        from hpo.promote.promotion import promote_once

        if opened.name not in self.worker.over:
            log.info("study %s is over: %s", opened.name, ended.reason)
            self.worker.over.add(opened.name)
        if ended.reason == "stopped":
            return True
        with self.worker.promoting:  # the lease for it is the worker's, whichever slot asks
            return promote_once(opened, self.worker.store, self.worker.name, self.worker.sequences(opened.plan.train))

    def _open(self, name: str) -> OpenStudy:
        from hpo.study.lifecycle import open_study

        if name not in self._studies:
            self._studies[name] = open_study(name, self.storage)
        return self._studies[name]


def fetch_sequences(store: ArtifactStore, key: str) -> Sequences:
    """A data set by its artifact key, from this machine's cache: fetched once however many processes ask for it at
    once, and held against the hash in its name on arrival. Raises ArtifactError.
    """
    path = home() / "cache" / key
    if not _known_good(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(path.with_name(f"{key}.lock")):
            if not _known_good(path):  # nobody has done it while we waited
                _check_or_fetch(store, key, path)
    return load(path)


def _check_or_fetch(store: ArtifactStore, key: str, path: Path) -> None:
    """Leave the whole data set at `path`, and beside it what the file system says of it, for the next look."""
    marks = _marks(path) if path.exists() else None  # before it is read
    if marks is None or _digest(path) != key:
        part = path.with_name(f"{key}.part")  # a folder, so that nothing stays of a process killed here
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        store.fetch(key, part / key)
        if _digest(part / key) != key:
            shutil.rmtree(part)
            raise ArtifactError(f"artifact {key} does not have the content that its name says; store it again")
        (part / key).replace(path)
        part.rmdir()
        marks = _marks(path)
    path.with_name(f"{key}.seen").write_text(json.dumps(marks))


def _known_good(path: Path) -> bool:
    """Whether the file is the one that was hashed, unchanged since: a large one is not read again at each start.

    Whatever writes to a file or replaces it gives it another inode or time of change, which no program can set back.
    What the disk itself loses is not seen by this.
    """
    try:
        return bool(json.loads(path.with_name(f"{path.name}.seen").read_text()) == _marks(path))
    except (OSError, ValueError):
        return False


def _marks(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """One process of this machine at a time; the lock of one that dies is free."""
    with lock.open("a") as file:
        if sys.platform != "win32":
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return f"data-{hashlib.file_digest(file, 'sha256').hexdigest()}.safetensors"


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
    signals = Signals()
    prepare_process()
    worker = signals.worker = Worker(study, slots=slots, told=signals.told)
    ready_s = time.monotonic() - started
    log.info("worker %s on %s with slots: %d, ready after %.2f s", worker.name, worker.device, worker.slots, ready_s)
    try:
        worker.run()
    except (PostgresError, *FAULTS) as error:
        if not signals.told.is_set():
            raise
        log.warning("told to end, it could not give everything back: %s", mask(str(error)))
