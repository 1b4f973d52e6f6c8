"""Optuna's storage on PostgreSQL, in Optuna's own tables: one statement a write, one query a read.

Three things make it cheap. Finished trials are kept in the process and never fetched twice. Writes to a trial that
this process runs are held back for a moment and ride ahead of the next statement, in the same round trip and
transaction. Numbering a trial is an index look-up under the lock on the study's row that stock Optuna takes too.

Three things make it safe. Writes to a leased trial are fenced: the statement that writes also checks, and locks, the
lease. What must happen once is claimed in `hpo.calls` in its own transaction, so that a repetition after a lost
connection finds it. Reports are committed without waiting for the disk, but kept until a later commit waited, and
sent again to a server that came back without them.
"""

from __future__ import annotations

import atexit
import copy
import json
import logging
import os
import threading
import time
import uuid
import weakref
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import psycopg2
from optuna.distributions import (
    BaseDistribution,
    check_distribution_compatibility,
    distribution_to_json,
    json_to_distribution,
)
from optuna.exceptions import DuplicatedStudyError, UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.study._frozen import FrozenStudy
from optuna.trial import FrozenTrial, TrialState
from psycopg2.extensions import cursor as Cursor  # noqa: N812

from hpo.storage.connection import Connection, Part, Prepared, Row
from hpo.storage.tables import ensure

if TYPE_CHECKING:
    from hpo.storage.leases import Lease

log = logging.getLogger(__name__)

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
UNFINISHED = (TrialState.RUNNING, TrialState.WAITING)
HELD_BACK_S = 0.2  # the longest that a write waits for a statement to ride on
UTC_NOW = "clock_timestamp() AT TIME ZONE 'UTC'"

Parameters = Mapping[str, tuple[float, BaseDistribution]]  # name -> internal value, distribution


class LeaseLost(RuntimeError):
    """The trial is in other hands: its lease ran out, or another worker adopted it."""


def trial_storage(url: str, retry_s: float = 60.0) -> TrialStorage:
    """The storage for every part of the project; creates the tables where there are none.

    retry_s: how long a lost connection is tried again before DatabaseUnavailable.
    """
    return TrialStorage(url, retry_s)


@dataclass
class _Writes:
    """What is to be written to one trial: JSON texts, and floats with NaN and infinities."""

    params: dict[str, tuple[float, str]] = field(default_factory=dict)  # name -> internal value, distribution
    user: dict[str, str] = field(default_factory=dict)
    system: dict[str, str] = field(default_factory=dict)
    reports: dict[int, float] = field(default_factory=dict)  # step -> value

    def update(self, later: _Writes) -> None:
        self.params.update(later.params)
        self.user.update(later.user)
        self.system.update(later.system)
        self.reports.update(later.reports)


class _Study:
    """What this process knows of a study. Lists are replaced, never changed: they have been handed out."""

    def __init__(self) -> None:
        self.name: str | None = None
        self.directions: list[StudyDirection] | None = None
        self.next = 0  # every trial of a lower number is cached as finished or listed in `unfinished`
        self.unfinished: set[int] = set()
        self.ahead: dict[int, int] = {}  # cached finished trials of number `next` or more: id -> number
        self.distributions: dict[str, BaseDistribution] = {}
        self.finished: dict[tuple[TrialState, ...], list[FrozenTrial]] = {FINISHED: []}
        self._copies: dict[tuple[TrialState, ...], list[FrozenTrial]] = {}
        self.best: FrozenTrial | None = None

    def add(self, trials: list[FrozenTrial]) -> None:
        """Cache finished trials, given in the order of their numbers."""
        for states, known in self.finished.items():
            new = [trial for trial in trials if trial.state in states]
            if new:
                joined = known + new
                if known and known[-1].number > new[0].number:
                    joined.sort(key=_number)
                self.finished[states] = joined
        for trial in trials:
            self.unfinished.discard(trial._trial_id)
            for name, distribution in trial.distributions.items():
                self.distributions.setdefault(name, distribution)
            if trial.state == TrialState.COMPLETE:
                self._compare(trial)

    def of(self, states: tuple[TrialState, ...]) -> list[FrozenTrial]:
        if states not in self.finished:
            self.finished[states] = [trial for trial in self.finished[FINISHED] if trial.state in states]
        return self.finished[states]

    def handed(self, states: tuple[TrialState, ...]) -> list[FrozenTrial]:
        """A copy of the list, the same one until it grows, or until its receiver is seen to have changed it."""
        known, copied = self.of(states), self._copies.get(states, [])
        if len(copied) != len(known) or (known and (copied[0] is not known[0] or copied[-1] is not known[-1])):
            copied = self._copies[states] = list(known)
        return copied

    def _compare(self, trial: FrozenTrial) -> None:
        if self.directions is None or len(self.directions) != 1:
            return
        sign = -1.0 if self.directions[0] == StudyDirection.MAXIMIZE else 1.0
        if self.best is None or _rank(trial, sign) < _rank(self.best, sign):
            self.best = trial


def _number(trial: FrozenTrial) -> int:
    return trial.number


def _rank(trial: FrozenTrial, sign: float) -> tuple[float, int]:
    assert trial.value is not None
    return sign * trial.value, trial.number


# --------------------------------------------------------------------------------------------------- reading a trial

FLOAT_JSON = "CASE {type} WHEN 'FINITE' THEN to_json({value}) ELSE to_json({type}) END"
DETAILS = f"""json_build_array(
    (SELECT json_agg({FLOAT_JSON.format(type="value_type", value="value")} ORDER BY objective)
     FROM trial_values d WHERE d.trial_id = t.trial_id),
    (SELECT json_agg(json_build_array(param_name, param_value, distribution_json) ORDER BY param_id)
     FROM trial_params d WHERE d.trial_id = t.trial_id),
    (SELECT json_object_agg(key, value_json) FROM trial_user_attributes d WHERE d.trial_id = t.trial_id),
    (SELECT json_object_agg(key, value_json) FROM trial_system_attributes d WHERE d.trial_id = t.trial_id),
    (SELECT json_object_agg(step,
        {FLOAT_JSON.format(type="intermediate_value_type", value="intermediate_value")})
     FROM trial_intermediate_values d WHERE d.trial_id = t.trial_id))"""
COLUMNS = "t.trial_id, t.number, t.state, t.datetime_start, t.datetime_complete"

GET_TRIAL = Prepared(
    "hpo_trial", f"SELECT {COLUMNS}, {DETAILS}, t.study_id FROM trials t WHERE t.trial_id = %(trial)s", trial="int"
)

# New trials, and those known as unfinished that now have one of the states: details for these states only.
NEWS = Prepared(
    "hpo_news",
    f"""
SELECT {COLUMNS}, CASE WHEN t.state = ANY(%(states)s) THEN {DETAILS} END
FROM studies s LEFT JOIN LATERAL (
    SELECT * FROM trials WHERE study_id = s.study_id AND number >= %(next)s AND trial_id <> ALL(%(ahead)s)
    UNION ALL
    SELECT * FROM trials WHERE trial_id = ANY(%(unfinished)s) AND state = ANY(%(states)s)
) t ON true
WHERE s.study_id = %(study)s ORDER BY t.number""",
    study="int",
    next="int",
    unfinished="int[]",
    ahead="int[]",
    states="trialstate[]",
)

# What a float reads as in JSON, and its type where it is not finite.
ODD_FLOATS = {"INF_POS": float("inf"), "INF_NEG": float("-inf"), "NAN": float("nan")}


def stored_float(value: float | str) -> float:
    return ODD_FLOATS[value] if value in ODD_FLOATS else float(value)


@lru_cache(maxsize=4096)
def _distribution(text: str) -> BaseDistribution:
    return json_to_distribution(text)


def _local(moment: datetime | None) -> datetime | None:
    """Naive UTC, as the tables have it, to naive local time, as FrozenTrial has it."""
    return moment and moment.replace(tzinfo=UTC).astimezone().replace(tzinfo=None)


def _utc(moment: datetime | None) -> datetime | None:
    return moment and moment.astimezone(UTC).replace(tzinfo=None)


def _frozen(row: Row) -> FrozenTrial:
    trial_id, number, state, started, completed, (values, params, user, system, reports) = row[:6]
    distributions = {name: _distribution(text) for name, _, text in params or ()}
    return FrozenTrial(
        number=number,
        state=TrialState[state],
        value=None,
        values=[stored_float(value) for value in values] if values else None,
        datetime_start=_local(started),
        datetime_complete=_local(completed),
        params={name: distributions[name].to_external_repr(float(value)) for name, value, _ in params or ()},
        distributions=distributions,
        user_attrs={key: json.loads(text) for key, text in (user or {}).items()},
        system_attrs={key: json.loads(text) for key, text in (system or {}).items()},
        intermediate_values={int(step): stored_float(value) for step, value in (reports or {}).items()},
        trial_id=trial_id,
    )


# --------------------------------------------------------------------------------------------------- writing a trial

# The trials of a batch that may be written to, locked until the writes are committed: those with a lease by
# their lease (an adopter waits), the others by their state.
ALIVE = """
WITH asked AS (SELECT * FROM unnest(%(trials)s::int[], %(attempts)s::int[], %(workers)s::text[])
    AS a (trial_id, attempt, worker)),
free AS (SELECT t.trial_id FROM asked a JOIN trials t USING (trial_id)
    WHERE a.attempt IS NULL AND t.state IN ('RUNNING', 'WAITING') FOR SHARE OF t),
leased AS (SELECT l.trial_id FROM asked a JOIN hpo.leases l USING (trial_id) JOIN trials t USING (trial_id)
    WHERE l.attempt = a.attempt AND l.worker = a.worker AND l.ended_at IS NULL AND l.expires_at > clock_timestamp()
    AND t.state = 'RUNNING' FOR SHARE OF l),
alive AS (TABLE free UNION ALL TABLE leased)"""
WRITE_PARAMS = """,
params AS (INSERT INTO trial_params (trial_id, param_name, param_value, distribution_json)
    SELECT trial_id, name, value, distribution
    FROM unnest(%(p_trial)s::int[], %(p_name)s::text[], %(p_value)s::float8[], %(p_text)s::text[])
        WITH ORDINALITY AS p (trial_id, name, value, distribution, n) JOIN alive USING (trial_id) ORDER BY n
    ON CONFLICT (trial_id, param_name)
    DO UPDATE SET param_value = excluded.param_value, distribution_json = excluded.distribution_json)"""
WRITE_ATTRIBUTES = """,
{kind}s AS (INSERT INTO trial_{kind}_attributes (trial_id, key, value_json)
    SELECT trial_id, key, value
    FROM unnest(%({kind}_trial)s::int[], %({kind}_key)s::text[], %({kind}_text)s::text[])
        WITH ORDINALITY AS a (trial_id, key, value, n) JOIN alive USING (trial_id) ORDER BY n
    ON CONFLICT (trial_id, key) DO UPDATE SET value_json = excluded.value_json)"""
WRITE_REPORTS = """,
reports AS (INSERT INTO trial_intermediate_values
        (trial_id, step, intermediate_value, intermediate_value_type)
    SELECT trial_id, step, value, type::trialintermediatevaluetype
    FROM unnest(%(r_trial)s::int[], %(r_step)s::int[], %(r_value)s::float8[], %(r_type)s::text[])
        AS r (trial_id, step, value, type) JOIN alive USING (trial_id)
    ON CONFLICT (trial_id, step) DO UPDATE SET intermediate_value = excluded.intermediate_value,
        intermediate_value_type = excluded.intermediate_value_type)"""
# All or nothing: where a trial of the batch may not be written to, the division by zero undoes the whole.
ALL_ALIVE = "\nSELECT 1 / (count(*) = %(count)s)::int FROM alive"
ONLY_REPORTS = {
    "trials": "int[]",
    "attempts": "int[]",
    "workers": "text[]",
    "count": "int",
    "r_trial": "int[]",
    "r_step": "int[]",
    "r_value": "float8[]",
    "r_type": "text[]",
}
REPORTS = Prepared("hpo_reports", ALIVE + WRITE_REPORTS + ALL_ALIVE, **ONLY_REPORTS)
NO_WAIT: Part = ("SET LOCAL synchronous_commit = off", None)


def _stored(value: float) -> tuple[float | None, str]:
    """A float as Optuna's tables keep it: value and type."""
    if value != value:
        return None, "NAN"
    if value in (float("inf"), float("-inf")):
        return None, "INF_POS" if value > 0 else "INF_NEG"
    return float(value), "FINITE"


def _columns(rows: list[Row], *names: str) -> dict[str, list[Any]]:
    return {name: [row[i] for row in rows] for i, name in enumerate(names)}


def _write(batch: Mapping[int, _Writes], leases: Mapping[int, Lease]) -> Part:
    """The one statement that writes a batch, with its parameters."""
    sql, held = ALIVE, [leases.get(trial_id) for trial_id in batch]
    given: dict[str, Any] = {
        "trials": list(batch),
        "attempts": [lease and lease.attempt for lease in held],
        "workers": [lease and lease.worker for lease in held],
        "count": len(batch),
    }
    params: list[Row] = [(i, name, *p) for i, w in batch.items() for name, p in w.params.items()]
    if params:
        sql += WRITE_PARAMS
        given |= _columns(params, "p_trial", "p_name", "p_value", "p_text")
    for kind in ("user", "system"):
        attributes: list[Row] = [(i, *a) for i, w in batch.items() for a in getattr(w, kind).items()]
        if attributes:
            sql += WRITE_ATTRIBUTES.format(kind=kind)
            given |= _columns(attributes, f"{kind}_trial", f"{kind}_key", f"{kind}_text")
    reports: list[Row] = [(i, step, *_stored(v)) for i, w in batch.items() for step, v in w.reports.items()]
    if reports:
        sql += WRITE_REPORTS
        given |= _columns(reports, "r_trial", "r_step", "r_value", "r_type")
    hot = len(given) == len(ONLY_REPORTS)
    return REPORTS if hot and reports else sql + ALL_ALIVE, given


# ------------------------------------------------------------------------------------------- what must happen once

# Each statement below leaves its result in `hpo.calls` under (client, call), in its own transaction.
CALLED = "SELECT result FROM hpo.calls WHERE client = %(client)s AND call = %(call)s"
CLAIM = """
    ON CONFLICT (client) DO UPDATE SET call = excluded.call, result = excluded.result, called_at = now()
    WHERE calls.call < excluded.call"""

CREATE_STUDY = f"""
WITH claim AS (INSERT INTO hpo.calls (client, call, result)
    SELECT %(client)s, %(call)s, nextval('studies_study_id_seq') {CLAIM} RETURNING result),
study AS (INSERT INTO studies (study_id, study_name) SELECT result, %(name)s FROM claim)
INSERT INTO study_directions (study_id, objective, direction)
SELECT result, n - 1, d::studydirection FROM claim, unnest(%(directions)s::text[]) WITH ORDINALITY AS d (d, n)"""

# The lock is a statement of its own, so that the next one sees the trials committed while it waited.
LOCK_STUDY = "SELECT FROM studies WHERE study_id = %(study)s FOR NO KEY UPDATE"
CREATE_TRIAL = f"""
WITH claim AS (INSERT INTO hpo.calls (client, call, result)
    SELECT %(client)s, %(call)s, nextval('trials_trial_id_seq') FROM studies WHERE study_id = %(study)s {CLAIM}
    RETURNING result AS trial_id),
trial AS (INSERT INTO trials (trial_id, study_id, number, state, datetime_start, datetime_complete)
    SELECT trial_id, %(study)s, coalesce((SELECT max(number) + 1 FROM trials WHERE study_id = %(study)s), 0),
        %(state)s::trialstate, {{start}}, %(complete)s FROM claim RETURNING trial_id)"""
NEW_TRIAL = Prepared(
    "hpo_new_trial",
    CREATE_TRIAL.format(start=UTC_NOW) + "\nSELECT FROM trial",
    study="int",
    client="uuid",
    call="bigint",
    state="text",
    complete="timestamp",
)
COPY_TRIAL = Prepared(
    "hpo_copy_trial",
    CREATE_TRIAL.format(start="%(start)s")
    + """,
trial_value AS (INSERT INTO trial_values (trial_id, objective, value, value_type)
    SELECT trial_id, n - 1, value, type::trialvaluetype FROM trial,
        unnest(%(v_value)s, %(v_type)s) WITH ORDINALITY AS v (value, type, n)),
params AS (INSERT INTO trial_params (trial_id, param_name, param_value, distribution_json)
    SELECT trial_id, name, value, text FROM trial,
        unnest(%(p_name)s, %(p_value)s, %(p_text)s)
        WITH ORDINALITY AS p (name, value, text, n) ORDER BY n),
users AS (INSERT INTO trial_user_attributes (trial_id, key, value_json)
    SELECT trial_id, key, text FROM trial, unnest(%(user_key)s, %(user_text)s) AS a (key, text)),
systems AS (INSERT INTO trial_system_attributes (trial_id, key, value_json)
    SELECT trial_id, key, text FROM trial,
        unnest(%(system_key)s, %(system_text)s) AS a (key, text)),
reports AS (INSERT INTO trial_intermediate_values
        (trial_id, step, intermediate_value, intermediate_value_type)
    SELECT trial_id, step, value, type::trialintermediatevaluetype FROM trial,
        unnest(%(r_step)s, %(r_value)s, %(r_type)s) AS r (step, value, type))
SELECT FROM trial""",
    study="int",
    client="uuid",
    call="bigint",
    state="text",
    start="timestamp",
    complete="timestamp",
    v_value="float8[]",
    v_type="text[]",
    p_name="text[]",
    p_value="float8[]",
    p_text="text[]",
    user_key="text[]",
    user_text="text[]",
    system_key="text[]",
    system_text="text[]",
    r_step="int[]",
    r_value="float8[]",
    r_type="text[]",
)

# With a fence: only under that lease, locked against an adopter.
FENCE = """fence AS (SELECT trial_id FROM hpo.leases WHERE trial_id = %(trial)s
    AND (%(attempt)s IS NULL OR attempt = %(attempt)s AND worker = %(worker)s AND ended_at IS NULL
        AND expires_at > clock_timestamp()) FOR UPDATE),"""
SET_STATE = Prepared(
    "hpo_set_state",
    f"""
WITH {FENCE}
changed AS (UPDATE trials SET state = %(state)s::trialstate,
        datetime_start = CASE WHEN %(state)s = 'RUNNING' THEN {UTC_NOW} ELSE datetime_start END,
        datetime_complete = CASE WHEN %(finished)s THEN {UTC_NOW} ELSE datetime_complete END
    WHERE trial_id = %(trial)s AND state = ANY(%(earlier)s)
    AND (%(attempt)s IS NULL OR EXISTS (TABLE fence)) RETURNING trial_id),
result AS (INSERT INTO trial_values (trial_id, objective, value, value_type)
    SELECT trial_id, n - 1, value, type::trialvaluetype
    FROM changed, unnest(%(v_value)s::float8[], %(v_type)s::text[]) WITH ORDINALITY AS v (value, type, n)
    ON CONFLICT (trial_id, objective) DO UPDATE SET value = excluded.value, value_type = excluded.value_type),
lease AS (UPDATE hpo.leases l SET ended_at = clock_timestamp() FROM changed c
    WHERE l.trial_id = c.trial_id AND %(finished)s)
INSERT INTO hpo.calls (client, call, result) SELECT %(client)s, %(call)s, trial_id FROM changed {CLAIM}""",
    trial="int",
    attempt="int",
    worker="text",
    state="text",
    finished="bool",
    earlier="trialstate[]",
    v_value="float8[]",
    v_type="text[]",
    client="uuid",
    call="bigint",
)

DELETE_STUDY = f"""
SELECT FROM studies WHERE study_id = %(study)s FOR UPDATE;
WITH gone AS (SELECT trial_id FROM trials WHERE study_id = %(study)s),
{
    "".join(
        f"{table}_gone AS (DELETE FROM {table} d USING gone WHERE d.trial_id = gone.trial_id)," + chr(10)
        for table in (
            "trial_values",
            "trial_params",
            "trial_user_attributes",
            "trial_system_attributes",
            "trial_intermediate_values",
            "trial_heartbeats",
        )
    )
}trials_gone AS (DELETE FROM trials WHERE study_id = %(study)s),
directions_gone AS (DELETE FROM study_directions WHERE study_id = %(study)s),
users_gone AS (DELETE FROM study_user_attributes WHERE study_id = %(study)s),
systems_gone AS (DELETE FROM study_system_attributes WHERE study_id = %(study)s),
study_gone AS (DELETE FROM studies WHERE study_id = %(study)s RETURNING study_id)
INSERT INTO hpo.calls (client, call, result) SELECT %(client)s, %(call)s, study_id FROM study_gone {CLAIM}"""

# ------------------------------------------------------------------------------------------------------------- studies

SET_STUDY_ATTRIBUTE = """
INSERT INTO study_{kind}_attributes (study_id, key, value_json)
SELECT study_id, %s, %s FROM studies WHERE study_id = %s
ON CONFLICT (study_id, key) DO UPDATE SET value_json = excluded.value_json RETURNING study_id"""
STUDY_ATTRIBUTES = """
SELECT a.key, a.value_json FROM studies s LEFT JOIN study_{kind}_attributes a USING (study_id)
WHERE s.study_id = %s"""
ALL_STUDIES = """
SELECT s.study_id, s.study_name,
    (SELECT json_agg(direction ORDER BY objective) FROM study_directions d WHERE d.study_id = s.study_id),
    (SELECT json_object_agg(key, value_json) FROM study_user_attributes a WHERE a.study_id = s.study_id),
    (SELECT json_object_agg(key, value_json) FROM study_system_attributes a WHERE a.study_id = s.study_id)
FROM studies s ORDER BY s.study_id"""
DIRECTIONS = """
SELECT direction FROM study_directions WHERE study_id = %s ORDER BY objective"""
EARLIER_DISTRIBUTION = """
SELECT distribution_json FROM trial_params JOIN trials USING (trial_id)
WHERE study_id = %s AND param_name = %s LIMIT 1"""
WHOSE = """
SELECT t.study_id, t.number, t.state, l.worker, l.attempt FROM trials t LEFT JOIN hpo.leases l USING (trial_id)
WHERE t.trial_id = %s"""


class TrialStorage(BaseStorage):
    """See the module. May be shared by threads, forked and pickled.

    All of it goes over one connection, so that `heart`, the other one, is free for a thread that renews leases.
    """

    def __init__(self, url: str, retry_s: float = 60.0) -> None:
        self.url, self.retry_s = url, retry_s
        self.connection, self.heart = Connection(url, retry_s), Connection(url, retry_s)
        ensure(self.connection)
        self._studies: dict[int, _Study] = {}
        self._finished: dict[int, FrozenTrial] = {}
        self._begin()
        _OPEN.add(self)

    def _begin(self) -> None:
        """Start with nothing to write: when new, and in the child after a fork."""
        self._client, self._call = str(uuid.uuid4()), 0
        self._own: dict[int, int] = {}  # trials that this process runs -> study
        self._leases: dict[int, Lease] = {}  # those attached
        self._lost: set[int] = set()  # attached trials whose lease is known to be lost
        self._pending: dict[int, _Writes] = {}  # held back
        self._unsure: dict[int, _Writes] = {}  # committed, perhaps not yet on the server's disk
        self._generation = 0  # the connection that `_unsure` was sent on
        self._waiting: threading.Event | None = None  # set while something is held back
        self._failed: psycopg2.DataError | None = None  # met by the thread, raised by the next call

    def __getstate__(self) -> tuple[str, float]:
        self.flush()
        return self.url, self.retry_s

    def __setstate__(self, state: tuple[str, float]) -> None:
        TrialStorage.__init__(self, *state)

    def close(self) -> None:
        """Write what is held back and close the connections; the next use opens others."""
        self.flush()
        self.connection.close()
        self.heart.close()

    def remove_session(self) -> None:
        """Write what is held back. The connection belongs to all threads and stays."""
        self.flush()

    # ------------------------------------------------------------------------------------------------------- trips

    def flush(self) -> None:
        """Write what is held back. A trial that was lost meanwhile raises at the next call that names it."""
        with self.connection.lock:
            if self._pending:
                self.connection.do(self._flush)

    def ask(self, sql: str | Prepared, parameters: Any = None, *, durable: bool = False) -> list[Row]:
        """One round trip: what is held back, then this. durable: its commit waits for the disk."""
        return self.connection.do(lambda cursor: self.execute(cursor, (sql, parameters), durable=durable))

    def execute(self, cursor: Cursor, *parts: Part, durable: bool = False) -> list[Row]:
        """`ask` on a cursor at hand. Must be safe to repeat."""
        if self._failed is not None:
            error, self._failed = self._failed, None
            raise error
        self._recall()
        if not self._pending:
            rows = self.connection.execute(cursor, *parts)
        else:
            batch = dict(self._pending)
            ahead = [_write(batch, self._leases)] if durable else [NO_WAIT, _write(batch, self._leases)]
            try:
                rows = self.connection.execute(cursor, *ahead, *parts)
            except psycopg2.DataError:  # a trial that is not alive, or a value that the tables cannot hold
                self._flush(cursor)
                return self.execute(cursor, *parts, durable=durable)
            self._sent(batch)
        if durable and rows:  # something was written, and with it all that went before reached the disk
            self._unsure.clear()
        return rows

    def _flush(self, cursor: Cursor) -> None:
        """Write trial by trial, so that one lost trial does not hold up the others."""
        self._recall()
        for trial_id, writes in list(self._pending.items()):
            try:
                self.connection.execute(cursor, NO_WAIT, _write({trial_id: writes}, self._leases))
                self._sent({trial_id: writes})
            except psycopg2.errors.DivisionByZero:
                self._give_up(trial_id)
            except psycopg2.DataError:
                del self._pending[trial_id]
                raise

    def _sent(self, batch: Mapping[int, _Writes]) -> None:
        for trial_id, writes in batch.items():
            del self._pending[trial_id]
            self._unsure.setdefault(trial_id, _Writes()).update(writes)

    def _recall(self) -> None:
        """After a new connection: what was committed but may not have reached the disk is written again."""
        if self._generation != self.connection.generation:
            for trial_id, writes in self._unsure.items():
                writes.update(self._pending.get(trial_id, _Writes()))
                self._pending[trial_id] = writes
            self._unsure = {}
            self._generation = self.connection.generation

    def _give_up(self, trial_id: int) -> None:
        """The trial is not ours any more: forget what was to be written."""
        self._pending.pop(trial_id, None)
        self._unsure.pop(trial_id, None)
        self._own.pop(trial_id, None)
        if trial_id in self._leases:
            self._lost.add(trial_id)

    def once(self, *statements: str | Prepared, given: dict[str, Any]) -> int | None:
        """Run statements of which the last claims this call; what it left as the result, None for nothing."""
        rows = self.ask_once(*statements, CALLED, given=given)
        return rows[0][0] if rows else None

    def ask_once(self, *statements: str | Prepared, given: dict[str, Any]) -> list[Row]:
        """Run statements in one durable transaction, with the `client` and the `call` for which a repetition after a
        lost connection finds in `hpo.calls` what an earlier try has done."""
        with self.connection.lock:
            self._call += 1
            given = {**given, "client": self._client, "call": self._call}
            parts = [(statement, given) for statement in statements]
            return self.connection.do(lambda cursor: self.execute(cursor, *parts, durable=True))

    def _hold_back(self, trial_id: int) -> _Writes:
        """The writes of a trial that wait for the next statement, HELD_BACK_S at the longest."""
        if self._waiting is None:
            self._waiting = threading.Event()
            weakref.finalize(self, self._waiting.set)  # the thread ends with the storage
            given = (weakref.ref(self), self._waiting)
            threading.Thread(target=_write_late, args=given, name="hpo-storage", daemon=True).start()
        self._waiting.set()
        return self._pending.setdefault(trial_id, _Writes())

    def _flush_late(self) -> None:
        with self.connection.lock:
            try:
                if self._pending:
                    self.connection.do(self._flush, retry_s=0.0)
            except psycopg2.DataError as error:
                self._failed = error
            except Exception as error:  # the next call meets the same error and raises it
                log.debug("could not write what was held back: %s", error)

    # ------------------------------------------------------------------------------------------------------ leases

    def attach(self, lease: Lease) -> None:
        """Fence every write of this storage to the lease's trial: LeaseLost instead, once the lease is lost."""
        with self.connection.lock:
            if self._leases.get(lease.trial_id) != lease:
                self._give_up(lease.trial_id)  # nothing of an earlier lease may pass under this one
            self._leases[lease.trial_id] = lease
            self._own[lease.trial_id] = lease.study_id
            self._lost.discard(lease.trial_id)

    def detach(self, lease: Lease) -> None:
        """Write what is held back, while the fence still holds, and take it away."""
        with self.connection.lock:
            if self._leases.get(lease.trial_id) == lease:
                if lease.trial_id in self._pending:
                    self.flush()
                self._forget(lease.trial_id)

    def _forget(self, trial_id: int) -> None:
        """The trial ended or goes into other hands."""
        self._own.pop(trial_id, None)
        self._leases.pop(trial_id, None)
        self._lost.discard(trial_id)

    def _check(self, trial_id: int) -> None:
        if trial_id in self._lost:
            raise LeaseLost(self._lost_message(trial_id))

    def _lost_message(self, trial_id: int) -> str:
        lease = self._leases[trial_id]
        return (
            f"worker {lease.worker} has lost its lease on trial {lease.number} (attempt {lease.attempt}); "
            "nothing more of it is written, another worker goes on with the trial"
        )

    def _refuse(self, trial_id: int) -> None:
        """Raise the reason why a trial could not be written to."""
        if trial_id in self._leases:
            self._give_up(trial_id)
            self._check(trial_id)
        rows = self.ask(WHOSE, (trial_id,))
        if not rows:
            raise KeyError(f"no trial has the id {trial_id}")
        if TrialState[rows[0][2]].is_finished():
            raise UpdateFinishedTrialError(f"Trial#{rows[0][1]} has already finished and can not be updated.")

    # ----------------------------------------------------------------------------------------------------- studies

    def create_new_study(self, directions: Sequence[StudyDirection], study_name: str | None = None) -> int:
        name = f"no-name-{uuid.uuid4()}" if study_name is None else study_name
        try:
            study_id = self.once(CREATE_STUDY, given={"name": name, "directions": [d.name for d in directions]})
        except psycopg2.errors.UniqueViolation:
            raise DuplicatedStudyError(
                f"Another study with name {name!r} already exists. Please specify a different name, or reuse "
                "the existing one by setting `load_if_exists` (for Python API) or "
                "`--skip-if-exists` flag (for CLI)."
            ) from None
        assert study_id is not None
        return study_id

    def delete_study(self, study_id: int) -> None:
        if self.once(DELETE_STUDY, given={"study": study_id}) is None:
            raise _no_study(study_id)
        with self.connection.lock:
            known = self._studies.pop(study_id, _Study())
            for trial in known.of(FINISHED):
                self._finished.pop(trial._trial_id, None)
            for trial_id in [i for i, study in self._own.items() if study == study_id]:
                self._pending.pop(trial_id, None)
                self._unsure.pop(trial_id, None)
                self._forget(trial_id)

    def set_study_user_attr(self, study_id: int, key: str, value: Any) -> None:
        self._set_study_attribute("user", study_id, key, value)

    def set_study_system_attr(self, study_id: int, key: str, value: Any) -> None:
        self._set_study_attribute("system", study_id, key, value)

    def _set_study_attribute(self, kind: str, study_id: int, key: str, value: Any) -> None:
        sql = SET_STUDY_ATTRIBUTE.format(kind=kind)
        if not self.ask(sql, (key, json.dumps(value), study_id), durable=True):
            raise _no_study(study_id)

    def get_study_id_from_name(self, study_name: str) -> int:
        rows = self.ask("SELECT study_id FROM studies WHERE study_name = %s", (study_name,))
        if not rows:
            raise KeyError(f"no study is named {study_name!r}")
        study_id: int = rows[0][0]
        self._study(study_id).name = study_name
        return study_id

    def get_study_name_from_id(self, study_id: int) -> str:
        known = self._studies.get(study_id)
        if known is not None and known.name is not None:
            return known.name
        rows = self.ask("SELECT study_name FROM studies WHERE study_id = %s", (study_id,))
        if not rows:
            raise _no_study(study_id)
        name: str = rows[0][0]
        self._study(study_id).name = name
        return name

    def get_study_directions(self, study_id: int) -> list[StudyDirection]:
        known = self._studies.get(study_id)
        if known is not None and known.directions is not None:
            return list(known.directions)
        rows = self.ask(DIRECTIONS, (study_id,))
        if not rows:
            raise _no_study(study_id)
        directions = [StudyDirection[name] for (name,) in rows]
        self._study(study_id).directions = directions
        return list(directions)

    def get_study_user_attrs(self, study_id: int) -> dict[str, Any]:
        return self._study_attributes("user", study_id)

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        return self._study_attributes("system", study_id)

    def _study_attributes(self, kind: str, study_id: int) -> dict[str, Any]:
        rows = self.ask(STUDY_ATTRIBUTES.format(kind=kind), (study_id,))
        if not rows:
            raise _no_study(study_id)
        return {key: json.loads(text) for key, text in rows if key is not None}

    def get_all_studies(self) -> list[FrozenStudy]:
        return [
            FrozenStudy(
                study_name=name,
                direction=None,
                directions=[StudyDirection[direction] for direction in directions or ()],
                user_attrs={key: json.loads(text) for key, text in (user or {}).items()},
                system_attrs={key: json.loads(text) for key, text in (system or {}).items()},
                study_id=study_id,
            )
            for study_id, name, directions, user, system in self.ask(ALL_STUDIES)
        ]

    def _study(self, study_id: int) -> _Study:
        with self.connection.lock:
            return self._studies.setdefault(study_id, _Study())

    # ---------------------------------------------------------------------------------------------- creating, ending

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        sql, given = _creation(template_trial)
        with self.connection.lock:
            trial_id = self.once(LOCK_STUDY, sql, given={**given, "study": study_id})
            if trial_id is None:
                raise _no_study(study_id)
            if given["state"] == "RUNNING":
                self._own[trial_id] = study_id
            return trial_id

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        with self.connection.lock:
            self._check(trial_id)
            if self._change(trial_id, state, values):
                return True
            self._refuse(trial_id)
            return False

    def finish_trial(
        self,
        trial_id: int,
        state: TrialState,
        values: Sequence[float] | None,
        user_attrs: Mapping[str, Any] | None = None,
    ) -> None:
        """End a trial and set user attributes, in one round trip and transaction. Raises like its two parts."""
        with self.connection.lock:
            self.set_trial_attrs(trial_id, user_attrs or {})
            self.set_trial_state_values(trial_id, state, values)

    def _change(self, trial_id: int, state: TrialState, values: Sequence[float] | None) -> bool:
        """Set the state, and end the lease with the trial. False: it was not in a state to change from."""
        lease = self._leases.get(trial_id)
        stored = [_stored(value) for value in values or ()]
        given = {
            "trial": trial_id,
            "attempt": lease and lease.attempt,
            "worker": lease and lease.worker,
            "state": state.name,
            "finished": state.is_finished(),
            "earlier": ["WAITING"] if state == TrialState.RUNNING else ["WAITING", "RUNNING"],
            **_columns(stored, "v_value", "v_type"),
        }
        if self.once(SET_STATE, given=given) is None:
            return False
        if state.is_finished():
            self._forget(trial_id)
        elif state == TrialState.RUNNING and lease is None:
            self._own[trial_id] = self._whose(trial_id)[0]
        return True

    def _whose(self, trial_id: int) -> tuple[int, int, TrialState]:
        """Study, number and state of a trial. Raises KeyError."""
        rows = self.ask(WHOSE, (trial_id,))
        if not rows:
            raise KeyError(f"no trial has the id {trial_id}")
        study_id, number, state = rows[0][:3]
        return study_id, number, TrialState[state]

    # ------------------------------------------------------------------------------------------ writing to a trial

    def set_trial_param(
        self, trial_id: int, param_name: str, param_value_internal: float, distribution: BaseDistribution
    ) -> None:
        with self.connection.lock:
            self._compare(trial_id, param_name, distribution)
            text = distribution_to_json(distribution)
            self._put(trial_id, _Writes(params={param_name: (float(param_value_internal), text)}))

    def set_trial_params(self, trial_id: int, params: Parameters) -> None:
        """All parameters of a trial, in one statement, at once. Raises as `set_trial_param` does."""
        with self.connection.lock:
            for name, (_, distribution) in params.items():
                self._compare(trial_id, name, distribution)
            texts = {name: (float(value), distribution_to_json(d)) for name, (value, d) in params.items()}
            self._put(trial_id, _Writes(params=texts))
            self.flush()
            self._check(trial_id)

    def set_trial_intermediate_value(self, trial_id: int, step: int, intermediate_value: float) -> None:
        self._put(trial_id, _Writes(reports={step: intermediate_value}))

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        self.set_trial_attrs(trial_id, {key: value})

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        self.set_trial_attrs(trial_id, {}, {key: value})

    def set_trial_attrs(self, trial_id: int, user: Mapping[str, Any], system: Mapping[str, Any] | None = None) -> None:
        """Any number of user and system attributes, in one statement."""
        texts = [{key: json.dumps(value) for key, value in kind.items()} for kind in (user, system or {})]
        self._put(trial_id, _Writes(user=texts[0], system=texts[1]))

    def _put(self, trial_id: int, writes: _Writes) -> None:
        """Hold back for a trial that this process runs; write at once to any other."""
        with self.connection.lock:
            self._check(trial_id)
            if trial_id in self._own:
                self._hold_back(trial_id).update(writes)
                return
            try:
                self.ask(*_write({trial_id: writes}, {}), durable=True)
            except psycopg2.errors.DivisionByZero:
                self._refuse(trial_id)

    def _compare(self, trial_id: int, name: str, distribution: BaseDistribution) -> None:
        """Raise ValueError for a distribution unlike the one that the name has had in this study."""
        self._check(trial_id)
        study_id = self._own.get(trial_id)
        if study_id is None:
            study_id, number, state = self._whose(trial_id)
            if state.is_finished():
                raise UpdateFinishedTrialError(f"Trial#{number} has already finished and can not be updated.")
        known = self._study(study_id).distributions
        if name not in known:
            rows = self.ask(EARLIER_DISTRIBUTION, (study_id, name))
            known[name] = _distribution(rows[0][0]) if rows else distribution
        check_distribution_compatibility(known[name], distribution)

    # ---------------------------------------------------------------------------------------------- reading trials

    def get_trial(self, trial_id: int) -> FrozenTrial:
        with self.connection.lock:
            if trial_id in self._finished:
                return self._finished[trial_id]
            rows = self.ask(GET_TRIAL, {"trial": trial_id})
            self._check(trial_id)
            if not rows:
                raise KeyError(f"no trial has the id {trial_id}")
            trial = _frozen(rows[0])
            if trial.state.is_finished():
                self._cache(rows[0][6], [trial])
            return trial

    def get_trial_id_from_study_id_trial_number(self, study_id: int, trial_number: int) -> int:
        rows = self.ask("SELECT trial_id FROM trials WHERE study_id = %s AND number = %s", (study_id, trial_number))
        if not rows:
            raise KeyError(f"study {study_id} has no trial of number {trial_number}")
        trial_id: int = rows[0][0]
        return trial_id

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        finished = tuple(state for state in FINISHED if states is None or state in states)
        unfinished = tuple(state for state in UNFINISHED if states is None or state in states)
        with self.connection.lock:
            running = self._update(study_id, unfinished)
            trials = self._study(study_id).handed(finished)
        if running:
            trials = sorted(trials + running, key=_number)
        return copy.deepcopy(trials) if deepcopy else trials

    def get_best_trial(self, study_id: int) -> FrozenTrial:
        directions = self.get_study_directions(study_id)
        if len(directions) > 1:
            raise RuntimeError("Best trial can be obtained only for single-objective optimization.")
        with self.connection.lock:
            self._update(study_id, ())
            best = self._study(study_id).best
        if best is None:
            raise ValueError("No trials are completed yet.")
        return best

    def _update(self, study_id: int, unfinished: tuple[TrialState, ...]) -> list[FrozenTrial]:
        """Fetch the trials that finished since the last time into the cache; return those in `unfinished` states."""
        study = self._studies.get(study_id, _Study())
        given = {
            "study": study_id,
            "next": study.next,
            "unfinished": list(study.unfinished),
            "ahead": list(study.ahead),
            "states": [state.name for state in FINISHED + unfinished],
        }
        rows = self.ask(NEWS, given)
        if not rows:
            raise _no_study(study_id)
        if study_id not in self._studies or study.directions is None:
            self.get_study_directions(study_id)
            study = self._study(study_id)
        rows = [row for row in rows if row[0] is not None]
        study.next = max([study.next, *(row[1] + 1 for row in rows), *(n + 1 for n in study.ahead.values())])
        study.ahead = {}
        study.unfinished.update(row[0] for row in rows)
        trials = [_frozen(row) for row in rows if row[5] is not None]
        self._cache(study_id, [trial for trial in trials if trial.state.is_finished()])
        return [trial for trial in trials if not trial.state.is_finished()]

    def _cache(self, study_id: int, trials: list[FrozenTrial]) -> None:
        if not trials:
            return
        self.get_study_directions(study_id)
        study = self._study(study_id)
        study.add(trials)
        for trial in trials:
            self._finished[trial._trial_id] = trial
            if trial.number >= study.next:
                study.ahead[trial._trial_id] = trial.number


def _no_study(study_id: int) -> KeyError:
    return KeyError(f"no study has the id {study_id}")


def _creation(template: FrozenTrial | None) -> Part:
    """The statement that makes a trial, RUNNING or like a template, and its parameters but the study."""
    if template is None:
        return NEW_TRIAL, {"state": "RUNNING", "complete": None}
    params = [(name, template.distributions[name].to_internal_repr(value)) for name, value in template.params.items()]
    texts = [(name, value, distribution_to_json(template.distributions[name])) for name, value in params]
    given = {
        "state": template.state.name,
        "start": _utc(template.datetime_start),
        "complete": _utc(template.datetime_complete),
        **_columns([_stored(value) for value in template.values or ()], "v_value", "v_type"),
        **_columns(texts, "p_name", "p_value", "p_text"),
        **_columns([(k, json.dumps(v)) for k, v in template.user_attrs.items()], "user_key", "user_text"),
        **_columns([(k, json.dumps(v)) for k, v in template.system_attrs.items()], "system_key", "system_text"),
        **_columns(
            [(step, *_stored(v)) for step, v in template.intermediate_values.items()],
            "r_step",
            "r_value",
            "r_type",
        ),
    }
    return COPY_TRIAL, given


def _write_late(reference: weakref.ref[TrialStorage], waiting: threading.Event) -> None:
    """The thread that writes what no statement took along."""
    while waiting.wait():
        time.sleep(HELD_BACK_S)
        waiting.clear()
        storage = reference()
        if storage is None:
            return
        storage._flush_late()
        del storage


_OPEN: weakref.WeakSet[TrialStorage] = weakref.WeakSet()


def _after_fork() -> None:
    """What was held back is the parent's to write."""
    for storage in list(_OPEN):
        storage._begin()


def _at_exit() -> None:
    for storage in list(_OPEN):
        storage._flush_late()


os.register_at_fork(after_in_child=_after_fork)
atexit.register(_at_exit)
