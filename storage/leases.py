"""Who works on which trial: budget, leases, adoption of orphans, and the right to promote.

A lease is one row of `hpo.leases` for each trial started under it; the database's clock decides whether it is alive.
Its `attempt` is the fencing token: an adopter raises it, and what carries an older one is refused; the worker's name
goes with it, for a database that comes back without its last commits. A RUNNING trial without such a row belongs to
somebody else (a plain Optuna script): not counted, never adopted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from hpo.storage.connection import Prepared, Row
from hpo.storage.trials import CLAIM, LOCK_STUDY, UTC_NOW, LeaseLost, TrialStorage, stored_float

__all__ = [
    "Beat",
    "InFlight",
    "Lease",
    "LeaseLost",
    "Leases",
    "News",
    "Place",
    "Snapshot",
    "StudyOver",
    "StudyRow",
    "Terms",
    "WorkerRow",
]

Reason = Literal["budget", "stopped", "timeout", "exhausted"]


@dataclass(frozen=True)
class Terms:
    """How a study's trials are handed out."""

    budget: int  # trials to start, over all workers; failed ones count, adopted ones are not new
    timeout_s: float | None = None  # wall-clock budget of the study, from its opening
    lease_s: float = 60.0  # a worker not heard of for so long loses its trials
    stall_s: float = 600.0  # a training without a new batch for so long loses its lease
    max_attempts: int = 3  # leases that may be lost on a trial before it fails


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


@dataclass(frozen=True)
class Beat:
    """How far a training is."""

    progress: int  # batches, ever growing
    epoch: int | None = None
    metric: float | None = None


@dataclass(frozen=True)
class News:
    """What a worker learns when it renews its leases."""

    lost: frozenset[Lease]
    stopped: frozenset[int]  # studies that were stopped
    out_of_time: frozenset[int]  # studies whose deadline has passed


@dataclass(frozen=True)
class StudyRow:
    """A study's terms and state, as stored."""

    study_id: int
    name: str
    config: dict[str, Any]
    budget: int
    started: int
    timeout_s: float | None
    opened_at: datetime
    deadline: datetime | None
    lease_s: float
    stall_s: float
    max_attempts: int
    status: str  # open | stopped | exhausted | finished
    promoter: str | None
    promoter_expires_at: datetime | None
    promoted_version: int | None
    out_of_time: bool  # by the database's clock


@dataclass(frozen=True)
class InFlight:
    """A trial under an unended lease."""

    number: int
    worker: str
    host: str | None
    device: str | None
    attempt: int
    epoch: int | None
    metric: float | None
    alive: bool  # False: waits for adoption


@dataclass(frozen=True)
class WorkerRow:
    """A worker that served a study, as it made itself known."""

    worker: str
    host: str | None
    pid: int | None
    device: str | None
    log: str | None  # path on that host
    alive: bool  # not retired, and heard of within the study's lease


@dataclass(frozen=True)
class Place:
    """Workers that are alive, of one study or standing, on one device of one machine."""

    host: str | None
    device: str | None
    workers: int


@dataclass(frozen=True)
class Snapshot:
    """A study at one moment, for displays."""

    study_id: int
    name: str
    status: str
    budget: int
    started: int
    deadline: datetime | None
    seconds_left: float | None  # to the deadline, at least 0
    promoted_version: int | None
    counts: dict[str, int]  # complete, pruned, failed, running, waiting; copied and foreign trials too
    best_value: float | None
    best_number: int | None
    in_flight: tuple[InFlight, ...]
    places: tuple[Place, ...]  # by host and device
    rate_per_hour: float | None  # of trials ended under a lease: of the last RECENT, or of all since the first began
    first_started_at: datetime | None
    last_ended_at: datetime | None

    @property
    def workers(self) -> int:
        """Workers that are alive, of this study or standing."""
        return sum(place.workers for place in self.places)


class StudyOver(RuntimeError):
    """Nothing is left to take, and no trial is in flight. `reason`: budget, stopped, timeout or exhausted."""

    def __init__(self, study_id: int, reason: Reason) -> None:
        super().__init__(f"study {study_id} is over: {reason}")
        self.reason = reason


# ------------------------------------------------------------------------------------------------------------- studies

OUT_OF_TIME = "coalesce(deadline <= clock_timestamp(), false)"
OPEN = """
INSERT INTO hpo.terms (study_id, config, budget, timeout_s, deadline, lease_s, stall_s, max_attempts)
SELECT study_id, %(config)s, %(budget)s, %(timeout_s)s, now() + %(timeout_s)s * interval '1 s', %(lease_s)s,
    %(stall_s)s, %(max_attempts)s
FROM studies WHERE study_id = %(study)s ON CONFLICT DO NOTHING"""
STUDY = f"""
SELECT study_id, study_name, config, budget, started, timeout_s, opened_at, deadline, lease_s, stall_s, max_attempts,
    status, promoter, promoter_expires_at, promoted_version, {OUT_OF_TIME}
FROM hpo.terms JOIN studies USING (study_id) WHERE """
REOPEN = """
UPDATE hpo.terms SET budget = greatest(budget, %(trials)s), status = 'open', promoter = NULL,
    promoter_expires_at = NULL, promoted_version = NULL
WHERE study_id = %(study)s AND (status = 'stopped' OR %(trials)s > budget)"""
MORE_TIME = f"""
UPDATE hpo.terms SET timeout_s = %(timeout_s)s,
    deadline = greatest(deadline, now()) + (%(timeout_s)s - coalesce(timeout_s, 0)) * interval '1 s',
    status = CASE WHEN status = 'finished' AND {OUT_OF_TIME} THEN 'open' ELSE status END,
    promoted_version = CASE WHEN status = 'finished' AND {OUT_OF_TIME} THEN NULL ELSE promoted_version END
WHERE study_id = %(study)s AND %(timeout_s)s > coalesce(timeout_s, 0)"""
SET_STATUS = "UPDATE hpo.terms SET status = %s WHERE study_id = %s AND status = ANY(%s)"

# -------------------------------------------------------------------------------------------------------------- taking

# One round trip and transaction under the lock on the study's row, in statements of their own, so that each sees what
# was committed while an earlier one waited. Whether a lease has run out is asked as of the transaction's begin, now(),
# so that they agree. The trial taken is left in `hpo.calls`: a repetition finds it there and takes nothing more.
TAKE_TYPES = {"study": "int", "worker": "text", "device": "text", "client": "uuid", "call": "bigint"}
GOING_ON = "(status IN ('open', 'exhausted') AND NOT coalesce(deadline <= now(), false))"
CALL = "client = %(client)s AND call = %(call)s"
LEASE_END = "clock_timestamp() + lease_s * interval '1 s'"
# Without waiting for the thread of the same worker that renews its leases, which does so too.
SEEN = """
UPDATE hpo.workers SET seen_at = clock_timestamp()
WHERE worker = (SELECT worker FROM hpo.workers WHERE worker = %(worker)s FOR NO KEY UPDATE SKIP LOCKED)"""
# Somebody else ended the trial: a plain script, a dashboard.
END_FOREIGN = """
UPDATE hpo.leases l SET ended_at = clock_timestamp() FROM trials t
WHERE l.study_id = %(study)s AND l.ended_at IS NULL AND l.trial_id = t.trial_id AND t.state <> 'RUNNING'"""
FAIL_SPENT = f"""
WITH spent AS (UPDATE hpo.leases l SET ended_at = clock_timestamp(), lost = lost + 1 FROM hpo.terms s
    WHERE l.study_id = %(study)s AND s.study_id = l.study_id AND ended_at IS NULL AND expires_at <= now()
    AND NOT released AND lost + 1 >= max_attempts RETURNING trial_id, worker, lost, epoch),
failed AS (UPDATE trials t SET state = 'FAIL', datetime_complete = {UTC_NOW} FROM spent s
    WHERE t.trial_id = s.trial_id AND t.state = 'RUNNING' RETURNING t.trial_id)
INSERT INTO trial_user_attributes (trial_id, key, value_json)
SELECT trial_id, 'failure', to_json('given up after ' || lost || ' attempts: each time its worker went silent or '
    'made no progress, the last time ' || worker || coalesce(' after epoch ' || epoch, ''))
FROM spent JOIN failed USING (trial_id)
ON CONFLICT (trial_id, key) DO UPDATE SET value_json = excluded.value_json"""
ADOPT = f"""
WITH adopted AS (UPDATE hpo.leases l SET attempt = attempt + 1, lost = lost + (NOT released)::int, released = false,
        worker = %(worker)s, device = %(device)s, progress = 0, progress_at = clock_timestamp(),
        epoch = checkpoint_epoch, metric = NULL, expires_at = {LEASE_END}
    FROM hpo.terms s
    WHERE s.study_id = %(study)s AND {GOING_ON} AND NOT EXISTS (SELECT FROM hpo.calls WHERE {CALL})
    AND trial_id = (SELECT trial_id FROM hpo.leases WHERE study_id = %(study)s AND ended_at IS NULL
        AND expires_at <= now() ORDER BY expires_at LIMIT 1 FOR UPDATE)
    RETURNING trial_id)
INSERT INTO hpo.calls (client, call, result) SELECT %(client)s, %(call)s, trial_id FROM adopted {CLAIM}"""
FORGET_REPORTS = f"""
DELETE FROM trial_intermediate_values i USING hpo.calls c, hpo.leases l
WHERE {CALL} AND l.trial_id = c.result AND l.attempt > 1 AND i.trial_id = l.trial_id
AND i.step > coalesce(l.checkpoint_epoch, -1)"""
START = f"""
WITH counted AS (UPDATE hpo.terms SET started = started + 1
    WHERE study_id = %(study)s AND {GOING_ON} AND status = 'open' AND started < budget
    AND NOT EXISTS (SELECT FROM hpo.calls WHERE {CALL}) RETURNING lease_s),
popped AS (UPDATE trials SET state = 'RUNNING', datetime_start = {UTC_NOW}
    WHERE EXISTS (TABLE counted) AND trial_id = (SELECT trial_id FROM trials
        WHERE study_id = %(study)s AND state = 'WAITING' ORDER BY number LIMIT 1 FOR UPDATE SKIP LOCKED)
    RETURNING trial_id),
made AS (INSERT INTO trials (study_id, number, state, datetime_start)
    SELECT %(study)s, coalesce((SELECT max(number) + 1 FROM trials WHERE study_id = %(study)s), 0), 'RUNNING', {UTC_NOW}
    FROM counted WHERE NOT EXISTS (TABLE popped) RETURNING trial_id),
taken AS (TABLE popped UNION ALL TABLE made),
granted AS (INSERT INTO hpo.leases (trial_id, study_id, worker, device, expires_at, progress_at)
    SELECT trial_id, %(study)s, %(worker)s, %(device)s, {LEASE_END}, clock_timestamp() FROM taken, counted)
INSERT INTO hpo.calls (client, call, result) SELECT %(client)s, %(call)s, trial_id FROM taken {CLAIM}"""
TAKEN = f"""
SELECT l.study_id, l.trial_id, t.number, l.worker, l.attempt, l.attempt > 1, l.checkpoint_key, l.checkpoint_epoch,
    s.status, coalesce(deadline <= now(), false), started >= budget, EXISTS (SELECT FROM hpo.leases f
        WHERE f.study_id = %(study)s AND f.ended_at IS NULL AND (f.expires_at > now() OR {GOING_ON}))
FROM hpo.terms s LEFT JOIN hpo.calls c ON {CALL} LEFT JOIN hpo.leases l ON l.trial_id = c.result
    LEFT JOIN trials t ON t.trial_id = l.trial_id
WHERE s.study_id = %(study)s"""
TAKE = [
    Prepared(f"hpo_take_{step}", text, **{name: kind for name, kind in TAKE_TYPES.items() if f"%({name})s" in text})
    for step, text in enumerate((LOCK_STUDY, SEEN, END_FOREIGN, FAIL_SPENT, ADOPT, FORGET_REPORTS, START, TAKEN))
]

# ------------------------------------------------------------------------------------------------------------- holding

# A lease that has run out stays so, and one without progress for `stall_s` is left to run out.
RENEW = f"""
WITH beats AS (SELECT * FROM unnest(%(trials)s::int[], %(attempts)s::int[], %(progress)s::bigint[], %(epochs)s::int[],
    %(metrics)s::float8[]) AS b (trial_id, attempt, progress, epoch, metric)),
seen AS ({SEEN}),
renewed AS (UPDATE hpo.leases l SET epoch = b.epoch, metric = b.metric, progress = b.progress,
        progress_at = CASE WHEN b.progress <> l.progress THEN clock_timestamp() ELSE l.progress_at END,
        expires_at = CASE WHEN b.progress <> l.progress
            OR l.progress_at > clock_timestamp() - s.stall_s * interval '1 s'
            THEN clock_timestamp() + s.lease_s * interval '1 s' ELSE l.expires_at END
    FROM beats b, hpo.terms s
    WHERE l.trial_id = b.trial_id AND l.attempt = b.attempt AND l.worker = %(worker)s AND s.study_id = l.study_id
    AND l.ended_at IS NULL AND l.expires_at > clock_timestamp() RETURNING l.trial_id)
SELECT b.trial_id, b.attempt, l.study_id, s.status, coalesce(s.deadline <= clock_timestamp(), false),
    b.trial_id IN (TABLE renewed) OR l.attempt = b.attempt AND l.ended_at IS NOT NULL
FROM beats b LEFT JOIN hpo.leases l USING (trial_id) LEFT JOIN hpo.terms s USING (study_id)"""
HELD = """
WHERE trial_id = %(trial)s AND attempt = %(attempt)s AND worker = %(worker)s AND ended_at IS NULL
AND expires_at > clock_timestamp()"""
CHECKPOINT = f"""
WITH named AS (UPDATE hpo.leases SET checkpoint_key = %(key)s, checkpoint_epoch = %(epoch)s,
    replaced_key = CASE WHEN checkpoint_key = %(key)s THEN replaced_key ELSE checkpoint_key END {HELD}
    RETURNING trial_id)
INSERT INTO hpo.calls (client, call, result) SELECT %(client)s, %(call)s, trial_id FROM named {CLAIM}"""
REPLACED = f"SELECT replaced_key FROM hpo.leases JOIN hpo.calls ON trial_id = result WHERE {CALL}"
SPENT = """
SELECT key FROM hpo.leases, unnest(ARRAY[checkpoint_key, replaced_key]) AS key
WHERE study_id = %(study)s AND ended_at IS NOT NULL AND key IS NOT NULL"""
FORGET = """
UPDATE hpo.leases SET checkpoint_key = CASE WHEN checkpoint_key <> ALL(%(keys)s) THEN checkpoint_key END,
    replaced_key = CASE WHEN replaced_key <> ALL(%(keys)s) THEN replaced_key END
WHERE study_id = %(study)s AND ended_at IS NOT NULL
AND (checkpoint_key = ANY(%(keys)s) OR replaced_key = ANY(%(keys)s))"""
RELEASE = f"UPDATE hpo.leases SET expires_at = clock_timestamp(), released = true {HELD}"

REGISTER = """
DELETE FROM hpo.calls WHERE called_at < now() - interval '1 day';
DELETE FROM hpo.workers WHERE seen_at < now() - interval '30 days';
INSERT INTO hpo.workers (worker, study_id, host, pid, device, log) VALUES (%s, %s, %s, %s, %s, %s)
ON CONFLICT (worker) DO UPDATE SET study_id = excluded.study_id, host = excluded.host, pid = excluded.pid,
    device = excluded.device, log = excluded.log, started_at = now(), seen_at = now(), stopped_at = NULL"""
RETIRE = "UPDATE hpo.workers SET stopped_at = now(), seen_at = now() WHERE worker = %s"

# ----------------------------------------------------------------------------------------------------------- promoting

# Over: nothing more is started, no lease is alive, and, but for a deadline, none waits for adoption.
TAKE_PROMOTION = f"""
UPDATE hpo.terms s SET promoter = %(worker)s,
    promoter_expires_at = clock_timestamp() + lease_s * interval '1 s'
WHERE study_id = %(study)s AND status IN ('open', 'exhausted') AND promoted_version IS NULL
AND (promoter IS NULL OR promoter = %(worker)s OR promoter_expires_at <= clock_timestamp())
AND (status = 'exhausted' OR started >= budget OR {OUT_OF_TIME})
AND NOT EXISTS (SELECT FROM hpo.leases l JOIN trials t USING (trial_id)
    WHERE l.study_id = s.study_id AND l.ended_at IS NULL AND t.state = 'RUNNING'
    AND (l.expires_at > clock_timestamp() OR NOT {OUT_OF_TIME}))
RETURNING study_id"""
RELEASE_PROMOTIONS = """
UPDATE hpo.terms SET promoter = NULL, promoter_expires_at = NULL
WHERE promoter = %s AND status IN ('open', 'exhausted') RETURNING study_id"""
FINISH_PROMOTION = """
UPDATE hpo.terms SET promoted_version = %(version)s, status = 'finished', promoter_expires_at = NULL
WHERE study_id = %(study)s AND promoter = %(worker)s AND
    (promoter_expires_at > clock_timestamp() OR status = 'finished'
    AND promoted_version IS NOT DISTINCT FROM %(version)s)
RETURNING study_id"""

# ---------------------------------------------------------------------------------------------------------- displaying

RECENT = 50  # ended trials that tell how fast a study goes: it may have rested for a night before
SNAPSHOT = f"""
SELECT s.study_id, n.study_name, s.status, s.budget, s.started, s.deadline,
    CASE WHEN s.deadline IS NOT NULL
        THEN greatest(0, extract(epoch FROM s.deadline - clock_timestamp()))::float8 END, s.promoted_version,
    (SELECT json_object_agg(state, n) FROM (SELECT state, count(*) AS n FROM trials t
        WHERE t.study_id = s.study_id GROUP BY state) c),
    (SELECT json_build_array(CASE v.value_type WHEN 'FINITE' THEN to_json(v.value) ELSE to_json(v.value_type) END,
            t.number)
        FROM trials t JOIN trial_values v USING (trial_id)
        WHERE t.study_id = s.study_id AND t.state = 'COMPLETE' AND v.objective = 0
        ORDER BY CASE WHEN d.direction = 'MAXIMIZE' THEN -1 ELSE 1 END
            * CASE v.value_type WHEN 'FINITE' THEN v.value WHEN 'INF_POS' THEN 'inf' ELSE '-inf' END, t.number
        LIMIT 1),
    (SELECT json_agg(json_build_array(t.number, l.worker, w.host, coalesce(l.device, w.device), l.attempt, l.epoch,
            CASE WHEN l.metric NOT IN ('NaN', 'Infinity', '-Infinity') THEN l.metric END,
            l.expires_at > clock_timestamp()) ORDER BY t.number)
        FROM hpo.leases l JOIN trials t USING (trial_id) LEFT JOIN hpo.workers w USING (worker)
        WHERE l.study_id = s.study_id AND l.ended_at IS NULL AND t.state = 'RUNNING'),
    (SELECT json_agg(json_build_array(host, device, n) ORDER BY host, device) FROM (SELECT host, device, count(*) AS n
        FROM hpo.workers w WHERE (w.study_id = s.study_id OR w.study_id IS NULL) AND w.stopped_at IS NULL
        AND w.seen_at > clock_timestamp() - s.lease_s * interval '1 s' GROUP BY host, device) p),
    least(r.n, {RECENT}) * 3600.0::float8
        / nullif(extract(epoch FROM e.ended - CASE WHEN r.n > {RECENT} THEN r.since ELSE e.started END)::float8, 0),
    e.started, e.ended
FROM hpo.terms s JOIN studies n USING (study_id)
    JOIN study_directions d ON d.study_id = s.study_id AND d.objective = 0
    CROSS JOIN LATERAL (SELECT min(t.datetime_start AT TIME ZONE 'UTC') AS started, max(l.ended_at) AS ended
        FROM hpo.leases l JOIN trials t USING (trial_id)
        WHERE l.study_id = s.study_id AND l.ended_at IS NOT NULL) e
    CROSS JOIN LATERAL (SELECT count(*) AS n, min(ended_at) AS since FROM (SELECT ended_at FROM hpo.leases l
        WHERE l.study_id = s.study_id AND ended_at IS NOT NULL ORDER BY ended_at DESC LIMIT {RECENT} + 1) l) r
WHERE s.study_id = %s"""
WORKERS = """
SELECT worker, host, pid, device, log, stopped_at IS NULL AND seen_at > clock_timestamp() - lease_s * interval '1 s'
FROM hpo.workers w JOIN hpo.terms s ON s.study_id = %(study)s
WHERE w.study_id = s.study_id OR EXISTS (
    SELECT FROM hpo.leases l WHERE l.study_id = s.study_id AND l.worker = w.worker)
ORDER BY started_at, worker"""
STATES = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "running", "WAITING": "waiting"}


class Leases:
    """The leases of the studies in one storage."""

    def __init__(self, storage: TrialStorage) -> None:
        self.storage = storage

    # ------------------------------------------------------------------------------------------------------ studies

    def open_study(self, study_id: int, terms: Terms, config: dict[str, Any]) -> StudyRow:
        """Store terms and configuration with the study, or leave what an earlier caller stored; what is stored."""
        if terms.budget < 0 or terms.max_attempts < 1 or terms.lease_s <= 0:
            raise ValueError(f"budget must be at least 0, max_attempts 1 and lease_s above 0, got {terms}")
        given = {**vars(terms), "study": study_id, "config": json.dumps(config)}
        rows = self.storage.ask(f"{OPEN};{STUDY}study_id = %(study)s", given, durable=True)
        if not rows:
            raise _not_opened(study_id)
        return StudyRow(*rows[0])

    def study(self, study_id: int) -> StudyRow | None:
        """The stored terms, or None for a study that was not opened here."""
        rows = self.storage.ask(STUDY + "study_id = %s", (study_id,))
        return StudyRow(*rows[0]) if rows else None

    def _row(self, study_id: int) -> StudyRow:
        row = self.study(study_id)
        if row is None:
            raise _not_opened(study_id)
        return row

    def studies(self) -> list[StudyRow]:
        """Every study with terms, oldest first."""
        return [StudyRow(*row) for row in self.storage.ask(STUDY + "true ORDER BY study_id")]

    def open_studies(self) -> list[StudyRow]:
        """Those on which there may be work: neither stopped nor finished."""
        return [row for row in self.studies() if row.status in ("open", "exhausted")]

    def set_budget(self, study_id: int, trials: int) -> StudyRow:
        """Raise the number of trials; a study that was over is open again. Raises ValueError for fewer."""
        row = self._row(study_id)
        if trials < row.budget:
            raise ValueError(f"the budget can only be raised: it is {row.budget} trials, got {trials}")
        return self.reopen(study_id, trials=trials)

    def reopen(self, study_id: int, *, trials: int | None = None, timeout_s: float | None = None) -> StudyRow:
        """Go on with a study that was stopped, or that more trials or more time are given to.

        trials: the new budget, where it is more than the old one. timeout_s: the new wall-clock budget, where it is
        more than the old one; what it is more is added to the time left. A finished study that gets neither
        stays finished, one that gets either is promoted again when it is over.
        """
        given = {"study": study_id, "trials": trials or 0, "timeout_s": timeout_s}
        self.storage.ask(REOPEN + ";" + MORE_TIME, given, durable=True)
        return self._row(study_id)

    def stop(self, study_id: int) -> None:
        """Nothing more is taken; workers learn of it when they renew. `reopen` goes on."""
        self._set_status(study_id, "stopped", ["open", "exhausted"])

    def exhaust(self, study_id: int) -> None:
        """No configuration is left to try: nothing new is started."""
        self._set_status(study_id, "exhausted", ["open"])

    def _set_status(self, study_id: int, status: str, earlier: list[str]) -> None:
        self.storage.ask(SET_STATUS, (status, study_id, earlier), durable=True)

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
        """Make a worker known to displays. study_id None: it takes trials of any study."""
        self.storage.ask(REGISTER, (worker, study_id, host, pid, device, log), durable=True)

    def retire(self, worker: str) -> None:
        """The worker ends."""
        self.storage.ask(RETIRE, (worker,), durable=True)

    # ------------------------------------------------------------------------------------------------ taking a trial

    def take(self, study_id: int, worker: str, device: str | None = None) -> Lease | None:
        """Adopt an orphan, or start a waiting or a new trial, under a lease that the storage is attached to.

        Returns None when there is nothing to take but trials are in flight: ask again later. Raises StudyOver
        when nothing will come. Trials that were lost max_attempts times are failed on the way. A study that was
        stopped, or is out of time, keeps its orphans until it is opened again.
        """
        with self.storage.connection.lock:
            rows = self.storage.ask_once(*TAKE, given={"study": study_id, "worker": worker, "device": device})
            if not rows:
                raise _not_opened(study_id)
            *lease, status, out_of_time, spent, in_flight = rows[0]
            if lease[0] is not None:
                self.storage.attach(taken := Lease(*lease))
                return taken
        if in_flight:
            return None
        raise StudyOver(study_id, _reason(status, out_of_time, spent))

    # ------------------------------------------------------------------------------------------------- holding a trial

    def renew(self, worker: str, progress: Mapping[Lease, Beat]) -> News:
        """Renew all of a worker's leases in one statement, and say that the worker lives.

        Over a connection of its own: nothing else that the process does can hold it up. A lease that has run
        out is not revived, one without new batches for `stall_s` is left to run out.
        """
        given = {
            "worker": worker,
            "trials": [lease.trial_id for lease in progress],
            "attempts": [lease.attempt for lease in progress],
            "progress": [beat.progress for beat in progress.values()],
            "epochs": [beat.epoch for beat in progress.values()],
            "metrics": [beat.metric for beat in progress.values()],
        }
        rows = self.storage.heart.run(RENEW, given)
        held = {(trial_id, attempt) for trial_id, attempt, _, _, _, held in rows if held}
        return News(
            lost=frozenset(lease for lease in progress if (lease.trial_id, lease.attempt) not in held),
            stopped=frozenset(study_id for _, _, study_id, status, _, _ in rows if status == "stopped"),
            out_of_time=frozenset(study_id for _, _, study_id, _, out_of_time, _ in rows if out_of_time),
        )

    def checkpoint(self, lease: Lease, key: str, epoch: int) -> str | None:
        """Name the artifact that holds the trial's state after the step `epoch`; it must be there already.

        Returns the key that it replaces, for the caller to delete, if any. Raises LeaseLost; then `key` itself
        may be deleted.
        """
        given = {**_fence(lease), "key": key, "epoch": epoch}
        rows = self.storage.ask_once(CHECKPOINT, REPLACED, given=given)
        if not rows:
            raise LeaseLost(f"trial {lease.number} has left worker {lease.worker} (attempt {lease.attempt})")
        replaced: str | None = rows[0][0]
        return replaced

    def spent_checkpoints(self, study_id: int) -> list[str]:
        """Keys of the checkpoints of ended trials that nobody has reported as deleted: by a worker that was killed
        before it could, or of a trial that failed because its workers were lost."""
        return [key for (key,) in self.storage.ask(SPENT, {"study": study_id})]

    def forget_checkpoints(self, study_id: int, keys: Sequence[str]) -> None:
        """These checkpoints of ended trials have been deleted."""
        self.storage.ask(FORGET, {"study": study_id, "keys": list(keys)}, durable=True)

    def release(self, lease: Lease) -> None:
        """Give the trial back at once, to be adopted from its last checkpoint; this does not count as lost.

        Does nothing to a trial that has ended or was taken away.
        """
        self.storage.ask(RELEASE, _fence(lease), durable=True)
        self.storage.detach(lease)

    # ------------------------------------------------------------------------------------------------------ promoting

    def take_promotion(self, study_id: int, worker: str) -> bool:
        """Whether this worker is the one to promote the study's best trial.

        True at most for one worker at a time, and only once the study is over: for `lease_s`, and again at each
        call by the same worker. Not for a study that was stopped.
        """
        return bool(self.storage.ask(TAKE_PROMOTION, {"study": study_id, "worker": worker}, durable=True))

    def release_promotions(self, worker: str) -> None:
        """Leave what this worker has begun to promote to whoever comes next."""
        self.storage.ask(RELEASE_PROMOTIONS, (worker,), durable=True)

    def finish_promotion(self, study_id: int, worker: str, version: int | None) -> None:
        """Record the promoted version, None where no trial completed, and with it that the study is finished.

        Raises LeaseLost where the promotion has passed to another worker.
        """
        given = {"study": study_id, "worker": worker, "version": version}
        if not self.storage.ask(FINISH_PROMOTION, given, durable=True):
            raise LeaseLost(f"the promotion of study {study_id} has left worker {worker}")

    # ----------------------------------------------------------------------------------------------------- displaying

    def snapshot(self, study_id: int) -> Snapshot:
        """The state of a study, in one query. Raises KeyError."""
        rows = self.storage.ask(SNAPSHOT, (study_id,))
        if not rows:
            raise _not_opened(study_id)
        known, (counts, best, in_flight, places, *rest) = rows[0][:8], rows[0][8:]
        named = {name: (counts or {}).get(state, 0) for state, name in STATES.items()}
        value, number = (stored_float(best[0]), best[1]) if best else (None, None)
        trials = tuple(InFlight(*row) for row in in_flight or ())
        fields: Row = (*known, named, value, number, trials, tuple(Place(*row) for row in places or ()), *rest)
        return Snapshot(*fields)

    def workers(self, study_id: int) -> list[WorkerRow]:
        """Those that were started for the study or hold one of its trials, oldest first."""
        return [WorkerRow(*row) for row in self.storage.ask(WORKERS, {"study": study_id})]


def _fence(lease: Lease) -> dict[str, Any]:
    return {"trial": lease.trial_id, "attempt": lease.attempt, "worker": lease.worker}


def _not_opened(study_id: int) -> KeyError:
    return KeyError(f"study {study_id} does not exist or has no terms; open it with Leases.open_study")


def _reason(status: str, out_of_time: bool, spent: bool) -> Reason:
    if status == "stopped":
        return "stopped"
    if spent:
        return "budget"
    return "timeout" if out_of_time else "exhausted"
