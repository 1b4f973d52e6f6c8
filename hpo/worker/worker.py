"""One worker process: take a trial, run it, take the next, until the study is over or somebody says stop."""

from __future__ import annotations

import logging
import math
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import optuna

from hpo.datasets import Datasets
from hpo.logs import about, set_up
from hpo.models.data.sequences import Sequences
from hpo.models.machine import one_thread, prepare_process
from hpo.models.training.training import TrainingInterrupted
from hpo.notify import Settings, send_last, sending
from hpo.promote.promotion import promote_when_over
from hpo.storage.artifacts import artifact_store
from hpo.storage.database import database_url
from hpo.storage.errors import MissingRecord, PostgresError, StudyOver
from hpo.storage.leases import Lease, Leases
from hpo.storage.liveness import forget_end, note_end, worker_name
from hpo.storage.trials import trial_storage
from hpo.storage.url import mask
from hpo.study.lifecycle import OpenStudy, open_study, study_id_of
from hpo.study.record import WAITED
from hpo.track.tracker import Tracker
from hpo.trial.build import native_wanted
from hpo.trial.context import TrialContext, WorkerResources
from hpo.trial.device import choose_device, device_name, use_device
from hpo.trial.device_lock import SharedExclusiveLock
from hpo.trial.run import run_trial
from hpo.worker.quarantine import FAULTS, Quarantine
from hpo.worker.signals import StopSignals
from hpo.worker.slots import Places

log = logging.getLogger("hpo")

IDLE_S = 0.5  # between two looks for work when there is none
ORDER_S = 0.05  # … but where a trial waits for those before it: for so long, then an eighth of the wait so far
DEAD_S = 5.0  # between two looks for workers of this machine that died
SEEN_S = 2.0  # between two signs of life of a worker that has no study to take trials of
SHORT_RETRY_S = 1.0  # after a signal a lost database is not tried for longer


class Worker:
    """One process at work on one study, or on any open one, with one trial at a time in each of its slots."""

    def __init__(
        self,
        study: str | None,
        device: str | None = None,
        slots: int | None = 1,
        stop_requested: threading.Event | None = None,
    ) -> None:
        """slots: None chooses for each study by its sizes and the device's memory. stop_requested: once set, all slots
        end.
        """
        native_wanted()  # or it would fail trial after trial
        self.notices = Settings.of_environment()
        self.only = study
        self.url = database_url()
        self.storage = trial_storage(self.url)
        if study is None:  # it stands until it is asked to stop, also while the database is away
            self.storage.set_retry(math.inf)
        self.leases = Leases(self.storage)
        self.name = worker_name(os.getpid())
        self.device = device or choose_device()
        self.stop_requested = stop_requested or threading.Event()
        store = artifact_store()
        self.tracker = Tracker(self.url, self.stop_requested)
        self.resources = WorkerResources(
            self.name, self.device, store, Datasets(store), SharedExclusiveLock(), self.stop_requested, self.tracker
        )
        self.quarantine = Quarantine()
        self.over: set[str] = set()  # studies whose end is in the log
        self._finals: str | None = None  # of the one study, once they have begun
        self.promoting = threading.Lock()
        self.places = Places(slots)
        self._slots: set[threading.Thread] = set()  # but for the first, which is the main thread's
        self._slots_lock = threading.Lock()
        self._parked = 0  # slots that wait until they are wanted
        self._wanted = threading.Semaphore(0)
        self._all_done = False  # the first slot has ended
        self._held: set[Lease] = set()  # by its slots
        self._seen_s = time.monotonic()  # when the database last learnt that it lives
        self._looked_s = -math.inf  # when it last looked for dead workers
        self._failure: BaseException | None = None

    def run(self) -> None:
        """Work until the named study is over and promoted, or, without a name, until asked to stop."""
        log_path = os.environ.get("HPO_LOG")
        study_id = None if self.only is None else study_id_of(self.storage, self.only)
        named = device_name(self.device)
        self.leases.register(self.name, study_id, socket.gethostname(), os.getpid(), named, log_path)
        self.free_dead()  # what they held goes on first
        try:
            with self._telling(study_id):
                self._run_slots()
        finally:
            self._leave()

    @contextmanager
    def _telling(self, study_id: int | None) -> Iterator[None]:
        """Send notices while the block runs, where a secret is set; a launch sends those of its own study by itself."""
        if self.notices.secret is None or "HPO_WORKER_INDEX" in os.environ:
            yield
            return
        with sending(self.storage.connection, self.notices):
            yield
        if study_id is not None and not self.stop_requested.is_set():
            send_last(self.storage.connection, study_id)

    def _leave(self) -> None:
        self.tracker.close(wait=not self.stop_requested.is_set())
        try:
            self.leases.release_promotions(self.name)
            self.leases.retire(self.name)
            self.storage.close()
        except PostgresError:
            note_end(self.name)  # its slots could not give back their trials either
            raise

    @contextmanager
    def holding(self, lease: Lease) -> Iterator[None]:
        """Know of a slot's lease while the block runs, so that a signal can give it back."""
        self._held.add(lease)
        try:
            yield
        finally:
            self._held.discard(lease)

    def free_dead(self) -> None:
        """Free what workers of this machine hold whose processes are gone."""
        if time.monotonic() - self._looked_s < DEAD_S:
            return
        self._looked_s = time.monotonic()
        for name in self.leases.free_dead(socket.gethostname(), self.name):
            log.warning("the worker %s is gone; what it held is free", name)

    def shorten_retries(self) -> None:
        """Asked to stop: a database that is away, or does not answer, is not waited for."""
        self.storage.hurry(SHORT_RETRY_S)

    def give_back(self) -> None:
        """All that it holds, over a connection of its own: nobody knows what the others hang in."""
        note_end(self.name)  # the process ends before a database that is away comes back
        leases = Leases(trial_storage(self.url, retry_s=0.0))
        for lease in list(self._held):
            leases.release(lease)
        leases.release_promotions(self.name)
        leases.retire(self.name)
        forget_end(self.name)

    def offers(self) -> tuple[list[str], list[int] | None]:
        """The names of the studies to look for work in, in this order, and the ids of those that are set aside.

        None instead of the latter: it serves one study, and waits for no other's turn.
        """
        if self.only is not None:
            return [self.only] if self._finals is None else [self._finals, self.only], None
        now = time.monotonic()
        if now - self._seen_s >= SEEN_S:  # with no study to take trials of, nothing else would say so
            self._seen_s = now
            self.leases.renew(self.name, {})
        turns = self.leases.turns()
        aside = [study_id for study_id, name in turns.items() if name in self.quarantine]
        return [name for study_id, name in turns.items() if study_id not in aside], aside

    def look_for_finals(self, study: OpenStudy) -> None:
        """Serve the finals of the one study, too, from their begin on."""
        if self.only == study.name and self._finals is None:
            found = self.leases.finals(study.study_id)
            self._finals = None if found is None else found.name

    @contextmanager
    def guard(self, name: str) -> Iterator[None]:
        """Quarantine a study with a fault; the worker of that study alone ends with the error instead, for its
        launcher to show."""
        with self.quarantine.guard(name) if self.only is None else nullcontext():
            yield

    def rest(self, seconds: float = IDLE_S) -> None:
        """Wait a moment for work, or for a request to stop."""
        self.free_dead()
        self.stop_requested.wait(seconds)

    def add_slot(self, study_id: int) -> None:
        """Start or wake a slot where all are busy and the study allows one more trial."""
        with self._slots_lock:
            if self.places.fixed is not None or not self.places.wants(study_id, 1 + len(self._slots) - self._parked):
                return
            if self._parked:
                self._parked -= 1
                self._wanted.release()
            else:
                self._start_slot()

    def _start_slot(self) -> None:
        thread = threading.Thread(target=self._run_thread, name=f"slot-{1 + len(self._slots)}")
        self._slots.add(thread)
        thread.start()

    def _run_slots(self) -> None:
        """The first slot is this thread, each further one a thread of its own. What ends one of them with an error ends
        the worker, once the others gave back theirs."""
        with self._slots_lock:
            for _ in range(1, self.places.fixed or 1):
                self._start_slot()
        self._run_slot(Slot(self))
        self._all_done = True
        while threads := list(self._slots):
            for thread in threads:
                thread.join()
        if self._failure is not None:
            raise self._failure

    def _run_thread(self) -> None:
        slot = Slot(self, spare=self.places.fixed is None)
        self._run_slot(slot)
        while slot.crowded and self._is_wanted():
            self._run_slot(slot)
        with self._slots_lock:
            self._slots.discard(threading.current_thread())

    def _is_wanted(self) -> bool:
        """Wait until one more slot is wanted; False where none will be. Threads are kept rather than ended and started
        anew: each has a stream of its own on the device, and there are only so many."""
        with self._slots_lock:
            self._parked += 1
        while not self._wanted.acquire(timeout=IDLE_S):
            if self._all_done or self.stop_requested.is_set():
                return False
        return True

    def _run_slot(self, slot: Slot) -> None:
        try:
            one_thread()
            use_device(self.device)
            slot.run()
        except BaseException as error:
            self._failure = self._failure or error
            self.stop_requested.set()


class Slot:
    """Takes a trial, runs it, takes the next."""

    def __init__(self, worker: Worker, *, spare: bool = False) -> None:
        """spare: `run` returns where a study has work but does not allow another trial now."""
        self.worker, self.spare = worker, spare
        self.crowded = False  # so it was when it last looked for work
        self._studies: dict[str, OpenStudy] = {}  # a slot's own, as samplers serve one thread
        self._waits_since_s: float | None = None  # since when it has waited for trials in their order

    def run(self) -> None:
        self.crowded = False
        while not self.worker.stop_requested.is_set() and not (self.spare and self.crowded):
            try:
                if not self._work() and self.worker.only is not None:
                    return
            except TrainingInterrupted:  # asked to stop while it waited for the device, with no trial in hand
                return

    def _work(self) -> bool:
        """Run one trial or promote one model. False: the one study that this worker serves needs nothing more.

        Studies are looked at in the order of their turns. One that has a trial to take, but not one that fits beside
        those that this worker runs, is waited for: others get no trial before it, or it would wait for as long as they
        have any.
        """
        worker = self.worker
        names, aside = worker.offers()
        over, self.crowded = 0, False
        for name in names:
            with about(study=name), worker.guard(name):
                study = self._open(name)
                try:
                    with worker.places.place(study.study_id) as free:
                        if free and self._run_next(study, aside):
                            return True
                    if not free and worker.leases.offers_trial(study.study_id):
                        self.crowded = True
                        break
                except StudyOver as ended:
                    over += self._promote(study, ended)
                except MissingRecord:
                    if worker.leases.study(study.study_id) is not None:
                        raise
                    log.warning("study %s was deleted", name)
                    del self._studies[name]
                    return worker.only is None
        if self.crowded and self.spare:
            return True
        if not names or over < len(names):
            worker.rest(self._pause_s())
            return True
        if worker.only is None:
            worker.rest()
        return False

    def _run_next(self, study: OpenStudy, aside: list[int] | None) -> bool:
        """Take a trial and run it; whether there was one. Raises StudyOver."""
        worker = self.worker
        sequences = worker.resources.datasets.get(study.plan.train)  # before a trial waits for them
        with worker.resources.device_lock.shared(worker.stop_requested.is_set):
            if study.sampler.exhausted():
                worker.leases.exhaust(study.study_id, study.plan.revision)
            with worker.leases.take(study.study_id, worker.name, worker.device, aside, study.judge) as lease:
                self._note_wait(study, lease)
                if lease is not None:
                    self._run_trial(self._current(study, lease.revision), lease, sequences)
        if lease is not None:
            worker.quarantine.release(study.name)
        return lease is not None

    def _note_wait(self, study: OpenStudy, lease: Lease | None) -> None:
        """Keep with a trial how long its slot had to wait for those before it, under `[study] parallel`."""
        if lease is None:
            if self.worker.leases.awaits_order(study.study_id):
                self._waits_since_s = self._waits_since_s or time.monotonic()
        elif self._waits_since_s is not None:
            waited_s = round(time.monotonic() - self._waits_since_s, 3)
            study.storage.set_trial_user_attr(lease.trial_id, WAITED, waited_s)
            self._waits_since_s = None

    def _pause_s(self) -> float:
        """Until it looks for work again."""
        if self._waits_since_s is None:
            return IDLE_S
        return min(IDLE_S, max(ORDER_S, (time.monotonic() - self._waits_since_s) / 8))

    def _run_trial(self, study: OpenStudy, lease: Lease, sequences: Sequences) -> None:
        self.worker.add_slot(study.study_id)
        with self.worker.holding(lease), about(trial=lease.number):
            state = run_trial(TrialContext(study, lease, self.worker.resources, sequences))
        log.info("study %s, trial %d: %s", study.name, lease.number, "left" if state is None else state.name.lower())
        if state is not None:
            self.worker.tracker.note(self.worker.storage, study.name)

    def _promote(self, study: OpenStudy, ended: StudyOver) -> bool:
        """Whether nothing is left to do for this study, here or in another worker's hands."""
        worker = self.worker
        if study.name not in worker.over:
            log.info("study %s is over: %s", study.name, ended.reason)
            worker.over.add(study.name)
        if ended.reason == "stopped" or study.plan.finals:  # these end with their study
            return True
        row = worker.leases.study(study.study_id)
        study = study if row is None else self._current(study, row.config.get("revision", 0))
        with worker.promoting:  # the lease for it is the worker's, whichever slot asks
            over = promote_when_over(study, worker.resources, worker.leases)
        if not over:
            worker.look_for_finals(study)
        return over

    def _current(self, study: OpenStudy, revision: int) -> OpenStudy:
        """The study with the plan of that revision: with a wider space than when it was opened."""
        if study.plan.revision != revision:
            del self._studies[study.name]
        return self._open(study.name)

    def _open(self, name: str) -> OpenStudy:
        if name not in self._studies:
            study = open_study(name, self.worker.storage)
            self.worker.storage.keep_deadlines(study.plan.config.study.lease_s)
            self.worker.places.meet(study.study_id, name, study.plan, self.worker.device)
            self._studies[name] = study
        return self._studies[name]


def work(study: str | None, slots: int | None = 1) -> None:
    """The `hpo worker` command: one thread a slot, logging to the standard error. slots: None chooses."""
    set_up()
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # samplers comment on conditional parameters at each trial
    started = time.monotonic()
    signals = StopSignals()
    prepare_process()
    worker = signals.worker = Worker(study, slots=slots, stop_requested=signals.stop_requested)
    ready_s = time.monotonic() - started
    slots_text = "auto" if slots is None else slots
    log.info(
        "worker %s on %s, slots: %s, ready after %.2f s", worker.name, device_name(worker.device), slots_text, ready_s
    )
    try:
        worker.run()
    except (PostgresError, *FAULTS) as error:
        if not signals.received:
            raise
        log.warning("asked to stop, it could not give everything back: %s", mask(str(error)))
