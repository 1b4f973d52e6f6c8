"""Optuna's storage on PostgreSQL, in Optuna's own tables: one statement a write, one query a read.

Finished trials are kept in the process and never fetched twice (see cache.py), writes are held back, fenced and sent
again where needed (see session.py), and numbering a trial is an index look-up under the lock on the study's row that
stock Optuna takes too.
"""

from __future__ import annotations

import copy
import json
import uuid
from collections.abc import Container, Mapping, Sequence
from typing import Any, ClassVar

import psycopg2
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    check_distribution_compatibility,
    distribution_to_json,
)
from optuna.exceptions import DuplicatedStudyError, UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.study._frozen import FrozenStudy
from optuna.trial import FrozenTrial, TrialState

from hpo.storage.cache import FINISHED, StudyCache, number_of
from hpo.storage.connection import Connection, Row
from hpo.storage.errors import MissingRecord, TrialLeased
from hpo.storage.heartbeat import BEATS
from hpo.storage.records import (
    columns,
    float_columns,
    frozen_trial,
    read_attributes,
    read_distribution,
    template_columns,
)
from hpo.storage.session import Session
from hpo.storage.statements import statement
from hpo.storage.tables import ensure
from hpo.storage.writes import Writes

UNFINISHED = (TrialState.RUNNING, TrialState.WAITING)

Parameters = Mapping[str, tuple[float, BaseDistribution]]  # name -> internal value, distribution


def trial_storage(url: str, retry_s: float = 60.0) -> TrialStorage:
    """The storage of a PostgreSQL URL, for any Optuna script; creates the tables where there are none.

    retry_s: how long a lost connection is tried again before DatabaseUnavailable. Raises SchemaError.
    """
    return TrialStorage(url, retry_s)


class TrialStorage(BaseStorage):
    """See the module. May be shared by threads, forked and pickled.

    All of it goes over one connection, so that `heartbeat_connection` is free for a thread that renews leases.
    """

    connects: ClassVar[type[Connection]] = Connection
    shows_reports: ClassVar[bool] = True  # of running trials in `get_all_trials`

    def __init__(self, url: str, retry_s: float = 60.0) -> None:
        """retry_s: how long a lost connection is tried again before DatabaseUnavailable. Raises SchemaError."""
        self.url, self.retry_s = url, retry_s
        self.connection, self.heartbeat_connection = self.connects(url, retry_s), self.connects(url, retry_s)
        ensure(self.connection)
        self.session = Session(self.connection)
        self._studies: dict[int, StudyCache] = {}
        self._finished: dict[int, FrozenTrial] = {}

    def __getstate__(self) -> tuple[str, float]:
        self.session.flush()
        return self.url, self.retry_s

    def __setstate__(self, state: tuple[str, float]) -> None:
        TrialStorage.__init__(self, *state)

    def set_retry(self, retry_s: float) -> None:
        """How long a lost connection is tried again from now on, also by a call that is trying at this moment."""
        self.retry_s = self.connection.retry_s = self.heartbeat_connection.retry_s = retry_s

    def keep_deadlines(self, lease_s: float) -> None:
        """A call that hangs is noticed while a lease of so many seconds can still be renewed."""
        self.connection.deadline_s = min(self.connection.deadline_s, lease_s)
        self.heartbeat_connection.deadline_s = min(self.heartbeat_connection.deadline_s, lease_s / BEATS)

    def hurry(self, seconds: float) -> None:
        """The process ends: nothing is waited for longer than this, no call in progress either. From any thread."""
        self.connection.hurry(seconds)
        self.heartbeat_connection.hurry(seconds)

    def close(self) -> None:
        """Write what is held back and close the connections; the next use opens others."""
        self.session.flush()
        self.connection.close()
        self.heartbeat_connection.close()

    def remove_session(self) -> None:
        """Write what is held back. The connection belongs to all threads and stays."""
        self.session.flush()

    # ----------------------------------------------------------------------------------------------------- studies

    def create_new_study(self, directions: Sequence[StudyDirection], study_name: str | None = None) -> int:
        name = f"no-name-{uuid.uuid4()}" if study_name is None else study_name
        try:
            study_id = self._once("new_study", given={"name": name, "directions": [d.name for d in directions]})
        except psycopg2.errors.UniqueViolation:
            raise DuplicatedStudyError(
                f"Another study with name {name!r} already exists. Please specify a different name, or reuse "
                "the existing one by setting `load_if_exists` (for Python API) or "
                "`--skip-if-exists` flag (for CLI)."
            ) from None
        assert study_id is not None
        return study_id

    def delete_study(self, study_id: int) -> None:
        if self._once("lock_study_to_delete", "delete_study", given={"study": study_id}) is None:
            raise _no_study(study_id)
        with self.connection.lock:
            known = self._studies.pop(study_id, StudyCache())
            for trial in known.of(FINISHED):
                self._finished.pop(trial._trial_id, None)
            self.session.forget_study(study_id)

    def set_study_user_attr(self, study_id: int, key: str, value: Any) -> None:
        self._set_study_attribute("set_study_user_attribute", study_id, key, value)

    def set_study_system_attr(self, study_id: int, key: str, value: Any) -> None:
        self._set_study_attribute("set_study_system_attribute", study_id, key, value)

    def _set_study_attribute(self, name: str, study_id: int, key: str, value: Any) -> None:
        if not self._query(name, durable=True, study=study_id, key=key, text=json.dumps(value)):
            raise _no_study(study_id)

    def get_study_id_from_name(self, study_name: str) -> int:
        rows = self._query("study_id", name=study_name)
        if not rows:
            raise MissingRecord(f"no study is named {study_name!r}")
        study_id: int = rows[0][0]
        self._study(study_id).name = study_name
        return study_id

    def get_study_name_from_id(self, study_id: int) -> str:
        known = self._studies.get(study_id)
        if known is not None and known.name is not None:
            return known.name
        rows = self._query("study_name", study=study_id)
        if not rows:
            raise _no_study(study_id)
        name: str = rows[0][0]
        self._study(study_id).name = name
        return name

    def get_study_directions(self, study_id: int) -> list[StudyDirection]:
        known = self._studies.get(study_id)
        if known is not None and known.directions is not None:
            return list(known.directions)
        rows = self._query("study_directions", study=study_id)
        if not rows:
            raise _no_study(study_id)
        directions = [StudyDirection[name] for (name,) in rows]
        self._study(study_id).directions = directions
        return list(directions)

    def get_study_user_attrs(self, study_id: int) -> dict[str, Any]:
        return self._study_attributes("study_user_attributes", study_id)

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        return self._study_attributes("study_system_attributes", study_id)

    def _study_attributes(self, name: str, study_id: int) -> dict[str, Any]:
        rows = self._query(name, study=study_id)
        if not rows:
            raise _no_study(study_id)
        return read_attributes({key: text for key, text in rows if key is not None})

    def get_all_studies(self) -> list[FrozenStudy]:
        return [
            FrozenStudy(
                study_name=name,
                direction=None,
                directions=[StudyDirection[direction] for direction in directions or ()],
                user_attrs=read_attributes(user),
                system_attrs=read_attributes(system),
                study_id=study_id,
            )
            for study_id, name, directions, user, system in self._query("all_studies")
        ]

    def _study(self, study_id: int) -> StudyCache:
        with self.connection.lock:
            return self._studies.setdefault(study_id, StudyCache())

    def _query(self, which: str, /, *, durable: bool = False, **given: Any) -> list[Row]:
        """Execute the statement of that name with its parameters."""
        return self.session.execute(statement(which), given=given, durable=durable)

    def _once(self, *names: str, given: dict[str, Any]) -> int | None:
        """Execute statements of which the last claims the call, once; what it left as the result, None for nothing."""
        rows = self.session.execute_once(*map(statement, names), statement("call_result"), given=given)
        return rows[0][0] if rows else None

    # ---------------------------------------------------------------------------------------------- creating, ending

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        name, given = "new_trial", dict[str, Any](state="RUNNING", complete=None)
        if template_trial is not None:
            name, given = "copy_trial", template_columns(template_trial)
        with self.connection.lock:
            trial_id = self._once("lock_study", name, given={**given, "study": study_id})
            if trial_id is None:
                raise _no_study(study_id)
            if given["state"] == "RUNNING":
                self.session.own(trial_id, study_id)
            return trial_id

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        with self.connection.lock:
            self.session.check(trial_id)
            if self._change(trial_id, state, values):
                return True
            self.session.explain_rejection(trial_id)
            if state.is_finished():
                raise TrialLeased(
                    f"trial {trial_id} is under the lease of a worker, and only that one ends it; end the study with "
                    "`hpo stop`, or wait for the trial"
                )
            return False

    def finish_trial(
        self,
        trial_id: int,
        state: TrialState,
        values: Sequence[float] | None,
        user_attrs: Mapping[str, Any] | None = None,
        system_attrs: Mapping[str, Any] | None = None,
    ) -> None:
        """End a trial and set attributes, in one round trip and transaction. Raises like its two parts."""
        with self.connection.lock:
            self.set_trial_attrs(trial_id, user_attrs or {}, system_attrs)
            self.set_trial_state_values(trial_id, state, values)

    def _change(self, trial_id: int, state: TrialState, values: Sequence[float] | None) -> bool:
        """Set the state, and end the lease with the trial. False: it was not in a state to change from."""
        fence = self.session.fence_of(trial_id)
        stored = [float_columns(value) for value in values or ()]
        given = {
            "trial": trial_id,
            "attempt": fence and fence.attempt,
            "worker": fence and fence.worker,
            "state": state.name,
            "finished": state.is_finished(),
            "earlier": ["WAITING"] if state == TrialState.RUNNING else ["WAITING", "RUNNING"],
            **columns(stored, "v_value", "v_type"),
        }
        names = ("set_state",) if fence is None else ("name_lease", "set_state")
        if self._once(*names, given=given) is None:
            return False
        if state.is_finished():
            self.session.forget(trial_id)
        elif state == TrialState.RUNNING and fence is None:
            self.session.own(trial_id, self.session.owner(trial_id)[0])
        return True

    # ------------------------------------------------------------------------------------------ writing to a trial

    def set_trial_param(
        self, trial_id: int, param_name: str, param_value_internal: float, distribution: BaseDistribution
    ) -> None:
        with self.connection.lock:
            self._compare(trial_id, param_name, distribution)
            text = distribution_to_json(distribution)
            self.session.write(trial_id, Writes(params={param_name: (float(param_value_internal), text)}))

    def set_trial_params(
        self, trial_id: int, params: Parameters, system_attrs: Mapping[str, Any] | None = None
    ) -> None:
        """All parameters of a trial and, with them, system attributes, in one statement, at once. Raises as
        `set_trial_param` does, but that a list of choices may have grown: earlier ones keep their places."""
        with self.connection.lock:
            for name, (_, distribution) in params.items():
                self._compare(trial_id, name, distribution, grows=True)
            texts = {name: (float(value), distribution_to_json(d)) for name, (value, d) in params.items()}
            system = {key: json.dumps(value) for key, value in (system_attrs or {}).items()}
            self.session.write(trial_id, Writes(params=texts, system=system))
            self.session.flush()
            self.session.check(trial_id)

    def set_trial_intermediate_value(self, trial_id: int, step: int, intermediate_value: float) -> None:
        self.session.write(trial_id, Writes(reports={step: intermediate_value}))

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        self.set_trial_attrs(trial_id, {key: value})

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        self.set_trial_attrs(trial_id, {}, {key: value})

    def set_trial_attrs(self, trial_id: int, user: Mapping[str, Any], system: Mapping[str, Any] | None = None) -> None:
        """Any number of user and system attributes, in one statement."""
        texts = [{key: json.dumps(value) for key, value in kind.items()} for kind in (user, system or {})]
        self.session.write(trial_id, Writes(user=texts[0], system=texts[1]))

    def _compare(self, trial_id: int, name: str, distribution: BaseDistribution, *, grows: bool = False) -> None:
        """Raise ValueError for a distribution unlike the one that the name has had in this study."""
        self.session.check(trial_id)
        study_id = self.session.study_of(trial_id)
        if study_id is None:
            study_id, number, state = self.session.owner(trial_id)
            if state.is_finished():
                raise UpdateFinishedTrialError(f"Trial#{number} has already finished and can not be updated.")
        known = self._study(study_id).distributions
        if name not in known:
            rows = self._query("earlier_distribution", study=study_id, name=name)
            known[name] = read_distribution(rows[0][0]) if rows else distribution
        if not (grows and _has_grown(known[name], distribution)):
            check_distribution_compatibility(known[name], distribution)

    # ---------------------------------------------------------------------------------------------- reading trials

    def get_trial(self, trial_id: int) -> FrozenTrial:
        with self.connection.lock:
            if trial_id in self._finished:
                return self._finished[trial_id]
            self.session.check(trial_id)
            if (held := self.session.trials.get(trial_id)) is not None:
                return held
            rows = self._query("trial", trial=trial_id)
            self.session.check(trial_id)
            if not rows:
                raise MissingRecord(f"no trial has the id {trial_id}")
            trial = frozen_trial(rows[0])
            if trial.state.is_finished():
                self._cache(rows[0][6], [trial])
            elif self.session.fence_of(trial_id) is not None:
                self.session.trials.keep(trial)
            return trial

    def get_trial_id_from_study_id_trial_number(self, study_id: int, trial_number: int) -> int:
        rows = self._query("trial_id", study=study_id, number=trial_number)
        if not rows:
            raise MissingRecord(f"study {study_id} has no trial of number {trial_number}")
        trial_id: int = rows[0][0]
        return trial_id

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        finished = tuple(state for state in FINISHED if states is None or state in states)
        unfinished = tuple(state for state in UNFINISHED if states is None or state in states)
        with self.connection.lock:
            running = self._update(study_id, unfinished)
            trials = self._study(study_id).handed_out(finished)
        if running:
            trials = sorted(trials + running, key=number_of)
        return copy.deepcopy(trials) if deepcopy else trials

    def drawn_trials(self, study_id: int) -> list[FrozenTrial]:
        """All trials, for a sampler: those that our workers run are as they were when all their parameters were there,
        and are not fetched again. Not the caller's to change."""
        with self.connection.lock:
            known = self._studies.get(study_id, StudyCache()).drawn
            running = self._update(study_id, UNFINISHED, drawn=list(known))
            study = self._study(study_id)
            fetched = {trial._trial_id for trial in running}
            running += [trial for trial_id, trial in study.drawn.items() if trial_id not in fetched]
            trials = study.handed_out(FINISHED)
        return sorted(trials + running, key=number_of) if running else trials

    def dropped(self, study_id: int) -> frozenset[int]:
        """The ids of the trials that do not count any more, as of the last `get_all_trials`."""
        return self._study(study_id).dropped

    def page(self, study_id: int, first: int, most: int) -> tuple[list[FrozenTrial], int]:
        """At most so many trials from that number on, and how many the study has; nothing is cached.

        Raises MissingRecord.
        """
        rows = self._query("trial_page", study=study_id, first=first, most=most)
        if not rows:
            raise _no_study(study_id)
        return [frozen_trial(row) for row in rows if row[0] is not None], rows[0][6]

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

    def _update(
        self, study_id: int, unfinished: tuple[TrialState, ...], drawn: Sequence[int] = ()
    ) -> list[FrozenTrial]:
        """Fetch the trials that finished since the last time into the cache; return those in `unfinished` states, but
        for those of `drawn` that still run."""
        study = self._studies.get(study_id, StudyCache())
        rows = self._query(
            "changed_trials",
            study=study_id,
            next=study.next,
            unfinished=list(study.unfinished),
            ahead=list(study.ahead),
            states=[state.name for state in FINISHED + unfinished],
            drawn=list(drawn),
            reports=self.shows_reports,
        )
        if not rows:
            raise _no_study(study_id)
        if study_id not in self._studies or study.directions is None:
            self.get_study_directions(study_id)
            study = self._study(study_id)
        dropped = frozenset(rows[0][6] or ())
        rows = [row for row in rows if row[0] is not None]
        study.next = max([study.next, *(row[1] + 1 for row in rows), *(n + 1 for n in study.ahead.values())])
        study.ahead = {}
        study.dropped = dropped
        study.unfinished.update(row[0] for row in rows)
        trials = [frozen_trial(row) for row in rows if row[5] is not None]
        self._cache(study_id, [trial for trial in trials if trial.state.is_finished()])
        running = [trial for trial in trials if not trial.state.is_finished()]
        leased = {row[0] for row in rows if row[7]}
        study.drawn.update((each._trial_id, each) for each in running if each.params and each._trial_id in leased)
        return running

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


def _has_grown(one: BaseDistribution, other: BaseDistribution) -> bool:
    """Whether one of two lists of choices begins with the other."""
    if not isinstance(one, CategoricalDistribution) or not isinstance(other, CategoricalDistribution):
        return False
    both = min(len(one.choices), len(other.choices))
    return CategoricalDistribution(one.choices[:both]) == CategoricalDistribution(other.choices[:both])


def _no_study(study_id: int) -> MissingRecord:
    return MissingRecord(f"no study has the id {study_id}")
