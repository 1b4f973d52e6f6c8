"""Who works on which trial: budget, leases, adoption of orphans, and the right to promote.

A lease is one row of `hpo.leases` for each trial started under it. Its `attempt` is the fencing token: an adopter
raises it, and writes with an older one are rejected; the worker's name goes with it, for a database that comes back
without its last commits. A lease that was not renewed in time, by the database's clock, may be taken over; until
somebody does so its holder goes on. Time in which the database was away is added: the server's own, and that in which
the taker could not reach it. A RUNNING trial without such a row belongs to somebody else (a plain Optuna script): not
counted, never adopted.

`Leases.take` is the one owner of a lease. Nothing but this module attaches or detaches fences.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from hpo.errors import WorkerFault
from hpo.storage.background import BackgroundLoop
from hpo.storage.connection import Row
from hpo.storage.deadlines import last_freeze
from hpo.storage.errors import LeaseLost, MissingRecord, PostgresError, Reason, StudyOver
from hpo.storage.heartbeat import BEATS, Heartbeat, Progress, Renewals
from hpo.storage.liveness import Fate, fate, process_start, this_machine
from hpo.storage.masking import mask
from hpo.storage.snapshot import RECENT, Holder, Snapshot, WorkerRow, read_snapshot
from hpo.storage.statements import statement
from hpo.storage.terms import NOBODY, FinalsRow, Judgement, Notify, Patience, StudyRow, Terms, read_study
from hpo.storage.trials import TrialStorage
from hpo.storage.writes import NO_WAIT, Fence

_OPEN_STUDY, _SET_NOTIFY = statement("open_study"), statement("set_notify")
_STUDY_TERMS, _STUDY_IDS = statement("study_terms"), statement("study_ids")
_REOPEN_STUDY = [statement(name) for name in ("reopen_study", "reopen_finals")]
_EXTEND_FINALS, _FINALS = statement("extend_finals"), statement("finals")
_SET_STATUS, _EXHAUST = statement("set_status"), statement("exhaust_study")
_REGISTER_WORKER = [
    statement(name) for name in ("forget_old_calls", "forget_old_workers", "lapse_workers", "register_worker")
]
_RETIRE_WORKER = statement("retire_worker")
_LAPSE_WORKERS, _WORKERS_OF_HOST = statement("lapse_workers"), statement("workers_of_host")
_WORKERS, _SNAPSHOTS, _HOLDERS = statement("workers"), statement("snapshots"), statement("holders")
_STEPS = (
    *("lock", "touch", "tick", "end_foreign", "lapse", "fail_spent", "stand_still"),
    *("adopt", "forget_reports", "start", "result"),
)
_TAKE = [statement(f"take_{step}") for step in _STEPS]
_TURNS, _SHARE = statement("turns"), statement("share")
_OFFERS_TRIAL, _TRIALS_ADVANCED_BY = statement("offers_trial"), statement("trials_advanced_by")
_RENEW, _RELEASE, _LAPSE_TRIAL = statement("renew"), statement("release"), statement("lapse_trial")
_CHECKPOINT = statement("checkpoint")
_DROP_CHECKPOINT = [statement(name) for name in ("drop_checkpoint", "drop_reports", "last_checkpoint")]
_KEPT_CHECKPOINTS = statement("kept_checkpoints")
_SPENT_CHECKPOINTS, _FORGET_CHECKPOINTS = statement("spent_checkpoints"), statement("forget_checkpoints")
_ACQUIRE_PROMOTION = statement("acquire_promotion")
_RELEASE_PROMOTIONS = statement("release_promotions")
_FINISH_PROMOTION = [statement(name) for name in ("lock_study", "finish_promotion")]
_FINISH_FINALS, _WANT_FINALS = statement("finish_finals"), statement("want_finals")
_SET_PROMOTION = statement("set_promotion")
_PROMOTE_AGAIN = [statement(name) for name in ("lock_study", "promote_again")]


class Unchanged:
    """That a setting is to stay as it is."""


UNCHANGED = Unchanged()
JUDGED_MOST = 5  # times that a study is judged anew, as trials have ended meanwhile, before the caller comes again
Judge = Callable[[Patience], Judgement]  # whether a study that has some patience has come to a standstill
_NOT_JUDGED: dict[str, Any] = {
    **dict.fromkeys(("patience", "since", "finished", "standstill", "last", "next")),
    "dropped": [],
}


@dataclass(frozen=True)
class Lease:
    """The right to write to one trial."""

    study_id: int
    trial_id: int
    number: int
    worker: str
    attempt: int  # 1, and one more for each adoption
    adopted: bool
    checkpoint_key: str | None
    checkpoint_epoch: int | None  # reported values after this step have been removed
    lease_s: float  # seconds that the lease lasts after a renewal
    store_key: str  # what stands for the study in the keys of artifacts
    lost: int = 0  # attempts in a row that were lost without getting further
    revision: int = 0  # of the study's plan when it was taken
    heartbeat: Heartbeat = field(default_factory=Heartbeat, compare=False, repr=False)

    @property
    def fence(self) -> Fence:
        """What the trial's writes are checked against."""
        return Fence(self.study_id, self.trial_id, self.number, self.worker, self.attempt)


@dataclass(frozen=True)
class RenewResult:
    """What a worker learns when it renews its leases."""

    lost: frozenset[Lease]
    stopped: frozenset[int]  # studies that were stopped
    out_of_time: frozenset[int]  # studies whose time is spent


class Leases:
    """The leases of the studies in one storage."""

    def __init__(self, storage: TrialStorage) -> None:
        self.storage = storage
        self._session = storage.session
        self._execute_durably = partial(storage.session.execute, durable=True)
        self._renewals = Renewals(self._beat)
        self._renewed: set[Lease] = set()  # those that `take` holds
        self._fault: WorkerFault | None = None  # of this process, which takes nothing more
        self._patience: dict[int, Patience] = {}  # of studies that have some, as of the last look
        self._awaiting_order: set[int] = set()  # studies whose next trial had to wait for others, as of the last look

    # ------------------------------------------------------------------------------------------------------ studies

    def open_study(
        self,
        study_id: int,
        terms: Terms,
        config: dict[str, Any],
        owner: str | None = None,
        notify: Notify = NOBODY,
        finals_of: int | None = None,
    ) -> StudyRow:
        """Store terms and configuration with the study, or leave what an earlier caller stored; what is stored.

        owner: who submitted it through the service. notify: who is told of it from now on. finals_of: the study whose
        finals it is; then it is stopped, resumed and ended with that one.
        """
        if terms.budget < 0 or terms.max_attempts < 1 or terms.lease_s <= 0:
            raise ValueError(f"budget must be at least 0, max_attempts 1 and lease_s above 0, got {terms}")
        given = {**vars(terms), "study": study_id, "config": json.dumps(config), "owner": owner, **_told(notify)}
        given["finals_of"] = finals_of
        rows = self._session.execute(_OPEN_STUDY, _SET_NOTIFY, _STUDY_TERMS, given=given, durable=True)
        if not rows:
            raise _not_opened(study_id)
        return read_study(rows[0])

    def set_notify(self, study_id: int, notify: Notify) -> None:
        """Who is told of the study from now on."""
        self._session.execute(_SET_NOTIFY, given={"study": study_id, **_told(notify)}, durable=True)

    def study(self, study_id: int) -> StudyRow | None:
        """The stored terms; None for a study without any."""
        rows = self._session.execute(_STUDY_TERMS, given={"study": study_id})
        return read_study(rows[0]) if rows else None

    def _row(self, study_id: int) -> StudyRow:
        row = self.study(study_id)
        if row is None:
            raise _not_opened(study_id)
        return row

    def study_ids(self, most: int | None = None, skip: int = 0) -> list[int]:
        """The studies with terms, the newest first, but for the first `skip`; at most so many."""
        return [study_id for (study_id,) in self._session.execute(_STUDY_IDS, given={"most": most, "skip": skip})]

    def turns(self, aside: Sequence[int] = ()) -> dict[int, str]:
        """Id and name of the studies on which there may be work, in the order in which a standing worker looks at them.

        They are shared among owners first, then by priority, then by age, as sql/sharing.sql says. aside: studies that
        the caller cannot work on.
        """
        return dict(self._session.execute(_TURNS, given={"held": self._session.held(), "aside": list(aside)}))

    def reopen(
        self,
        study_id: int,
        *,
        trials: int | None = None,
        timeout_s: float | Unchanged | None = UNCHANGED,
        patience: int | Unchanged | None = UNCHANGED,
    ) -> StudyRow:
        """Go on with a study that was stopped, under a new budget; what is stored then.

        trials: at least those that have begun; None leaves it. timeout_s, patience: None for no limit. A study that is
        over stays so, unless it gets more of what it had no more of: then it is promoted again when it is over. One
        that came to a standstill needs more patience: more trials alone would bring no more.
        """
        timed, patient = (not isinstance(each, Unchanged) for each in (timeout_s, patience))
        given = {"study": study_id, "trials": trials, "timed": timed, "timeout_s": timeout_s if timed else None}
        given |= {"patient": patient, "patience": patience if patient else None}
        self._session.execute(*_REOPEN_STUDY, given=given, durable=True)
        return self._row(study_id)

    def want_finals(self, study_id: int, *, finalists: int, repeats: int) -> None:
        """Set how many configurations are in the study's finals, and how often each is trained there.

        A study that is finished is promoted again once these are over, where that changes something. Finals that have
        begun go on.
        """
        given = {"study": study_id, "finalists": finalists, "repeats": repeats}
        self._session.execute(_WANT_FINALS, given=given, durable=True)

    def set_promotion(self, study_id: int, limits: Mapping[str, float], promote: Mapping[str, Any]) -> None:
        """Set what may be promoted and how: [limits] and [promote] by their keys. A finished study is promoted anew."""
        given = {"study": study_id, "limits": json.dumps(dict(limits)), "promote": json.dumps(dict(promote))}
        self._session.execute(_SET_PROMOTION, given=given, durable=True)

    def share(self, study_id: int, *, priority: int, max_workers: int | None) -> None:
        """Set how the study shares the standing workers, and how many of its trials run at once (None: no limit).

        Trials that run go on.
        """
        given = {"study": study_id, "priority": priority, "max_workers": max_workers}
        self._session.execute(_SHARE, given=given, durable=True)

    def finals(self, study_id: int) -> FinalsRow | None:
        """The finals of a study; None where they have not begun."""
        rows = self._session.execute(_FINALS, given={"study": study_id})
        return FinalsRow(*rows[0]) if rows else None

    def extend_finals(
        self, study_id: int, config: dict[str, Any], *, revision: int, budget: int, timeout_s: float | None
    ) -> None:
        """Open finals again for more trainings, by the plan that follows the one of that revision; nothing where
        somebody has stored one already."""
        given = {"study": study_id, "revision": revision, "config": json.dumps(config)}
        given |= {"budget": budget, "timeout_s": timeout_s}
        self._session.execute(_EXTEND_FINALS, given=given, durable=True)

    def stop(self, study_id: int) -> None:
        """Nothing more is taken, of its finals neither; workers learn of it when they renew. `reopen` goes on."""
        given = {"status": "stopped", "study": study_id, "earlier": ["open", "exhausted"]}
        self._session.execute(_SET_STATUS, given=given, durable=True)

    def exhaust(self, study_id: int, revision: int = 0) -> None:
        """No configuration is left to try in the space of that revision: nothing new is started."""
        self._session.execute(_EXHAUST, given={"study": study_id, "revision": revision}, durable=True)

    # ------------------------------------------------------------------------------------------------------ workers

    def register(
        self,
        worker: str,
        study_id: int | None = None,
        host: str | None = None,
        pid: int | None = None,
        device: str | None = None,
        log: str | None = None,
    ) -> None:
        """Make a worker known to displays, and to others of its machine. study_id None: it takes trials of any study.

        What a former process of that name held is free.
        """
        given = {
            "worker": worker,
            "study": study_id,
            "host": host,
            "pid": pid,
            "device": device,
            "log": log,
            "machine": None if (machine := this_machine()) is None else str(machine),
            "process_start": None if pid is None else process_start(pid),
            "workers": [worker],
            "counted": True,
        }
        self._session.execute(*_REGISTER_WORKER, given=given, durable=True)

    def free_dead(self, host: str, worker: str) -> list[str]:
        """Free what workers of this host hold whose processes are gone, but for `worker`; their names.

        A process that died counts as a lost lease. One that ended by itself while the database was away, or went down
        with its machine, does not.
        """
        found: dict[Fate, list[str]] = {"died": [], "ended": [], "unknown": []}
        rows = self._session.execute(_WORKERS_OF_HOST, given={"host": host, "worker": worker})
        for name, machine, pid, start, silent_s in rows:
            found[fate(name, machine, pid, start, silent_s)].append(name)
        for workers, counted in ((found["died"], True), (found["ended"], False)):
            if workers:
                given = {"workers": workers, "counted": counted}
                self._session.execute(_LAPSE_WORKERS, given=given, durable=True)
        return found["died"] + found["ended"]

    def retire(self, worker: str) -> None:
        """The worker ends."""
        self._session.execute(_RETIRE_WORKER, given={"worker": worker}, durable=True)

    # ------------------------------------------------------------------------------------------------ taking a trial

    @contextmanager
    def take(
        self,
        study_id: int,
        worker: str,
        device: str | None = None,
        aside: Sequence[int] | None = None,
        judge: Judge | None = None,
    ) -> Iterator[Lease | None]:
        """Hold a trial while the block runs: acquire it, renew its lease from a thread, give it back at the end.

        A WorkerFault in the block is the end of its holder: the trial is free at once and counts as lost, by the rule
        for workers that died. Nothing more can then be taken by these `Leases`, from any thread: whatever asks has the
        same fault.

        Yields None when there is nothing to take but trials are in flight. Raises StudyOver when nothing will come,
        and MissingRecord for a study without terms.
        """
        lease = self.acquire(study_id, worker, device, aside, judge)
        if lease is None:
            yield None
            return
        try:
            with self._renewing(lease):
                yield lease
        except WorkerFault as fault:
            self._lapse(lease, fault)
            raise
        except BaseException:
            self._leave(lease)
            raise
        self._leave(lease)

    def _leave(self, lease: Lease) -> None:
        """Give the trial back, unless this process has ended it."""
        if self._session.fence_of(lease.trial_id) == lease.fence:
            self.release(lease)

    @contextmanager
    def _renewing(self, lease: Lease) -> Iterator[None]:
        """Renew the lease, together with all others, while the block runs."""
        lease.heartbeat.renewed_by(self._renewals)
        self._renewed.add(lease)
        try:
            with self._renewals.holding(lease.lease_s):
                yield
        finally:
            self._renewed.discard(lease)

    def _beat(self) -> None:
        """One renewal of all leases: one round trip for each worker, which is one as a rule."""
        held = list(self._renewed)
        for worker in {lease.worker for lease in held}:
            progress = {lease: lease.heartbeat.progress() for lease in held if lease.worker == worker}
            result = self.renew(worker, progress)
            for lease in progress:
                lease.heartbeat.learn(
                    lost=lease in result.lost,
                    study_stopped=lease.study_id in result.stopped,
                    out_of_time=lease.study_id in result.out_of_time,
                )

    def acquire(
        self,
        study_id: int,
        worker: str,
        device: str | None = None,
        aside: Sequence[int] | None = None,
        judge: Judge | None = None,
    ) -> Lease | None:
        """Adopt an orphan, or start a waiting or a new trial, under a lease that fences all writes to it.

        aside: for a standing worker, the studies that it cannot work on; it takes nothing while it is another study's
        turn. None: the worker is this study's own. judge: of a study that has patience, which starts no trial without:
        it is asked again where trials have ended meanwhile.

        Nothing renews the lease by itself: `take` does. Returns None when there is nothing to take now but may be
        later, as trials are in flight or others have their turn. Raises StudyOver when nothing will come, and
        MissingRecord for a study without terms. Trials that were lost max_attempts times in a row are failed on the
        way. A study that was stopped keeps its orphans until it is opened again; one that is out of time gives them out
        to be ended with what they have.
        """
        with self.storage.connection.lock:
            if self._fault is not None:
                raise self._fault
            given = {"study": study_id, "worker": worker, "device": device, "held": self._session.held()}
            given |= {"standing": aside is not None, "aside": list(aside or ())} | self._outages()
            for _ in range(JUDGED_MOST):
                rows = self._session.execute_once(*_TAKE, given={**given, **self._judged(study_id, judge)})
                if not rows:
                    raise _not_opened(study_id)
                *lease, status, out_of_time, spent, still, in_flight, patience, since, unjudged, early = rows[0]
                self._note_order(study_id, early=early and lease[0] is None)
                if lease[0] is not None:
                    taken = Lease(*lease)
                    taken.heartbeat.learn(lost=False, study_stopped=False, out_of_time=out_of_time)
                    self._session.attach(taken.fence)
                    return taken
                self._note_patience(study_id, patience, since)
                if not unjudged:
                    break
        if in_flight:
            return None
        raise StudyOver(study_id, "patience" if still else _reason(status, out_of_time, spent))

    def awaits_order(self, study_id: int) -> bool:
        """Whether `acquire` gave nothing the last time because the next trial waits for those before it."""
        return study_id in self._awaiting_order

    def _note_order(self, study_id: int, *, early: bool) -> None:
        (self._awaiting_order.add if early else self._awaiting_order.discard)(study_id)

    def _note_patience(self, study_id: int, trials: int | None, since: int) -> None:
        if trials is None:
            self._patience.pop(study_id, None)
        else:
            self._patience[study_id] = Patience(trials, since)

    def _judged(self, study_id: int, judge: Judge | None) -> dict[str, Any]:
        """What the study's judge says, for the statements that take a trial; without a judge where it has no patience,
        as far as is known. Raises ValueError without one where it has some."""
        patience = self._patience.get(study_id)
        if patience is None:
            return _NOT_JUDGED
        if judge is None:
            raise ValueError(f"study {study_id} ends by its patience: its trials are taken with a judge")
        found = judge(patience)
        return {
            "patience": patience.trials,
            "since": patience.since,
            "finished": found.finished,
            "dropped": list(found.dropped),
            "standstill": None if found.standstill is None else json.dumps(vars(found.standstill)),
            "last": found.last,
            "next": found.number,
        }

    def _outages(self) -> dict[str, list[float]]:
        """For how many seconds this process could not reach the database, or did not run, and how long ago that ended.

        The others were as badly off: they get that time too.
        """
        found = [self.storage.connection.outage, self.storage.heartbeat_connection.outage, last_freeze()]
        return {"away_s": [each.seconds for each in found], "back_s": [each.ended_ago_s for each in found]}

    def release(self, lease: Lease) -> None:
        """Give the trial back at once, to be adopted from its last checkpoint; this does not count as lost.

        Does nothing to a trial that has ended or was taken away.
        """
        try:
            self._session.execute(_RELEASE, given=_fence(lease), durable=True)
        finally:  # also where the database is away: this process has nothing more to write to it
            self._session.detach(lease.fence)

    def _lapse(self, lease: Lease, fault: WorkerFault) -> None:
        """Its holder is as good as dead. Does nothing to a trial that has ended or was taken away."""
        with self.storage.connection.lock:  # nobody takes it in this process in between
            self._fault = self._fault or fault
            try:
                given = {**_fence(lease), "reason": mask(str(fault))}
                self._session.execute(_LAPSE_TRIAL, given=given, durable=True)
            finally:
                self._session.detach(lease.fence)

    def offers_trial(self, study_id: int) -> bool:
        """Whether `acquire` would find a trial of the study. It changes nothing."""
        rows = self._session.execute(_OFFERS_TRIAL, given={"study": study_id, "held": self._session.held()})
        return bool(rows) and bool(rows[0][0])

    def trials_advanced_by(self, worker: str) -> int:
        """How many trials a worker has trained to their end, or brought further and nobody else has taken since."""
        count: int = self._session.execute(_TRIALS_ADVANCED_BY, given={"worker": worker})[0][0]
        return count

    # ------------------------------------------------------------------------------------------------- holding a trial

    def renew(self, worker: str, progress: Mapping[Lease, Progress]) -> RenewResult:
        """Renew a worker's leases in one statement, and say that the worker lives, also without leases.

        Over a connection of its own: nothing else that the process does can hold it up. One without new batches for
        `stall_s` is left to run out. One that has run out and was not taken over goes on. It does not wait for the
        disk: a renewal that is lost with the server is like one that was not made.
        """
        given = {
            "worker": worker,
            "trials": [lease.trial_id for lease in progress],
            "attempts": [lease.attempt for lease in progress],
            "progress": [each.progress for each in progress.values()],
            "epochs": [each.epoch for each in progress.values()],
            "metrics": [each.metric for each in progress.values()],
        }
        rows = self.storage.heartbeat_connection.with_retries(
            lambda cursor: self.storage.heartbeat_connection.execute_on(cursor, NO_WAIT, (_RENEW, given))
        )
        held = {(trial_id, attempt) for trial_id, attempt, _, _, _, held in rows if held}
        return RenewResult(
            lost=frozenset(lease for lease in progress if (lease.trial_id, lease.attempt) not in held),
            stopped=frozenset(study_id for _, _, study_id, status, _, _ in rows if status == "stopped"),
            out_of_time=frozenset(study_id for _, _, study_id, _, out_of_time, _ in rows if out_of_time),
        )

    def checkpoint(self, lease: Lease, key: str, epoch: int) -> str | None:
        """Name the artifact that holds the trial's state after the step `epoch`; it must be there already.

        The one before is kept. Returns the key of the one before that, for the caller to delete, if any. Raises
        LeaseLost; then `key` itself may be deleted.
        """
        rows = self._session.execute_once(_CHECKPOINT, given={**_fence(lease), "key": key, "epoch": epoch})
        if not rows:
            raise _lost(lease)
        dropped: str | None = rows[0][0]
        return dropped

    def drop_checkpoint(self, lease: Lease, key: str) -> tuple[str | None, int | None]:
        """Go back from a checkpoint that cannot be used to the one before it: its key and epoch, None for none.

        Reports of later epochs are removed with it. Raises LeaseLost.
        """
        rows = self._session.execute(*_DROP_CHECKPOINT, given={**_fence(lease), "key": key}, durable=True)
        if not rows:
            raise _lost(lease)
        return rows[0][0], rows[0][1]

    def spent_checkpoints(self, study_id: int) -> list[str]:
        """Keys of the checkpoints of ended trials that nobody has reported as deleted: by a worker that was killed
        before it could, or of a trial that failed because its workers were lost."""
        return [key for (key,) in self._session.execute(_SPENT_CHECKPOINTS, given={"study": study_id})]

    def kept_checkpoints(self, study_id: int) -> list[str]:
        """Keys of the checkpoints of trials that have not ended."""
        return [key for (key,) in self._session.execute(_KEPT_CHECKPOINTS, given={"study": study_id})]

    def forget_checkpoints(self, study_id: int, keys: Sequence[str]) -> None:
        """These checkpoints of ended trials have been deleted."""
        self._session.execute(_FORGET_CHECKPOINTS, given={"study": study_id, "keys": list(keys)}, durable=True)

    # ------------------------------------------------------------------------------------------------------ promoting

    @contextmanager
    def promotion(self, study_id: int, worker: str) -> Iterator[bool]:
        """Hold the lease to promote the study's best trial while the block runs.

        Yields False where another worker holds it or the study is not over; see `acquire_promotion`. At the end the
        lease is left to `finish_promotion`, to `release_promotions`, or to run out.
        """
        lease_s = self._acquire_promotion(self._execute_durably, study_id, worker)
        if lease_s is None:
            yield False
            return
        renew = partial(self._acquire_promotion, self.storage.heartbeat_connection.execute, study_id, worker)
        failure = f"the promotion of study {study_id} could not be renewed"
        with BackgroundLoop(renew, lease_s / BEATS, name="hpo-promotion", failure=failure, expected=(PostgresError,)):
            yield True

    def acquire_promotion(self, study_id: int, worker: str) -> bool:
        """Whether this worker is the one to promote the study's best trial.

        True at most for one worker at a time, and only once the study is over: for `lease_s`, and again at each
        call by the same worker. Not for a study that was stopped.
        """
        return self._acquire_promotion(self._execute_durably, study_id, worker) is not None

    @staticmethod
    def _acquire_promotion(execute: Callable[..., list[Row]], study_id: int, worker: str) -> float | None:
        """The seconds that the promotion's lease lasts from now on; None where it was not to be had."""
        rows = execute(_ACQUIRE_PROMOTION, given={"study": study_id, "worker": worker})
        return rows[0][0] if rows else None

    def release_promotions(self, worker: str) -> None:
        """Leave what this worker has begun to promote to whoever comes next."""
        self._session.execute(_RELEASE_PROMOTIONS, given={"worker": worker}, durable=True)

    def finish_promotion(self, study_id: int, worker: str, version: int | None) -> None:
        """Record the promoted version, None where no trial completed, and with it that the study is finished.

        Raises LeaseLost where the promotion has passed to another worker, or the version's trial was dropped meanwhile:
        whoever promotes next finds another best one.
        """
        given = {"study": study_id, "worker": worker, "version": version}
        if not self._session.execute(*_FINISH_PROMOTION, given=given, durable=True):
            raise LeaseLost(
                f"the promotion of study {study_id} has left worker {worker}, or its trial was dropped meanwhile"
            )
        self._session.execute(_FINISH_FINALS, given={"study": study_id}, durable=True)

    def promote_again(self, study_id: int, version: int) -> None:
        """Record that version as what the study has brought, if it is over and its own is of a trial that was dropped
        since, or it has none."""
        self._session.execute(*_PROMOTE_AGAIN, given={"study": study_id, "version": version}, durable=True)

    # ----------------------------------------------------------------------------------------------------- displaying

    def snapshot(self, study_id: int) -> Snapshot:
        """The state of a study. Raises MissingRecord."""
        found = self.snapshots([study_id])
        if not found:
            raise _not_opened(study_id)
        return found[0]

    def snapshots(self, study_ids: Sequence[int]) -> list[Snapshot]:
        """The state of those of the studies that there are, oldest first, in one query."""
        rows = self._session.execute(_SNAPSHOTS, given={"studies": list(study_ids), "recent": RECENT})
        return [read_snapshot(row) for row in rows]

    def workers(self, study_id: int) -> list[WorkerRow]:
        """Those that were started for the study or hold one of its trials, oldest first."""
        return [WorkerRow(*row) for row in self._session.execute(_WORKERS, given={"study": study_id})]

    def holders(self, trial_ids: Sequence[int]) -> dict[int, Holder]:
        """Who holds each of these trials, or held it last, by the trial's id; without those that nobody took."""
        rows = self._session.execute(_HOLDERS, given={"trials": list(trial_ids)})
        return {trial_id: Holder(*row) for trial_id, *row in rows}


def _told(notify: Notify) -> dict[str, Any]:
    return {"url": notify.url, "events": list(notify.on)}


def _fence(lease: Lease) -> dict[str, Any]:
    return {"trial": lease.trial_id, "attempt": lease.attempt, "worker": lease.worker}


def _lost(lease: Lease) -> LeaseLost:
    return LeaseLost(f"trial {lease.number} has left worker {lease.worker} (attempt {lease.attempt})")


def _not_opened(study_id: int) -> MissingRecord:
    return MissingRecord(f"study {study_id} does not exist or has no terms; open it with Leases.open_study")


def _reason(status: str, out_of_time: bool, spent: bool) -> Reason:
    if status == "stopped":
        return "stopped"
    if spent:
        return "budget"
    return "timeout" if out_of_time else "exhausted"
