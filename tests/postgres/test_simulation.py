"""The lease rules as a system: logical workers on a real database whose clock and answers are in the test's hands.

Each step of a story is an operation of one worker, an event (time passes, a worker dies, the server restarts), or a
stranger's write. Any round trip may succeed, fail before it reaches the server, or be committed and lose its answer.
After each step the invariants of the design are looked up in the tables themselves. HPO_SIMULATION_EXAMPLES says how
many stories are told.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from optuna.distributions import FloatDistribution
from optuna.study import StudyDirection
from optuna.trial import TrialState

from hpo.storage import connection as connection_module
from hpo.storage import leases as leases_module
from hpo.storage import session as session_module
from hpo.storage.connection import Connection
from hpo.storage.errors import DatabaseUnavailable, LeaseLost, StudyOver, TrialLeased
from hpo.storage.heartbeat import Progress
from hpo.storage.leases import Lease, Leases
from hpo.storage.registry import Registry
from hpo.storage.terms import Terms
from hpo.storage.trials import TrialStorage
from tests.conftest import fresh_database
from tests.postgres.simulation import Clock, Fault, FaultyConnection, failing

EXAMPLES = int(os.environ.get("HPO_SIMULATION_EXAMPLES", "300"))
LEASE_S, STALL_S, TIMEOUT_S, ATTEMPTS = 10.0, 60.0, 100.0, 2
WORKERS = ("ann", "bob", "cy")
PARAMS = {"x": (0.25, FloatDistribution(0, 1))}
FAULTS = st.lists(st.sampled_from(Fault), max_size=3)
WORKER = st.sampled_from(WORKERS)

TRIALS = """
SELECT t.trial_id, t.number, t.state, l.worker, l.attempt, l.ended_at IS NOT NULL, l.released, l.checkpoint_key,
    l.checkpoint_epoch, l.lost,
    (SELECT json_object_agg(step, intermediate_value) FROM trial_intermediate_values i WHERE i.trial_id = t.trial_id),
    (SELECT json_agg(value) FROM trial_values v WHERE v.trial_id = t.trial_id),
    (SELECT json_object_agg(key, value_json) FROM trial_user_attributes a WHERE a.trial_id = t.trial_id),
    (SELECT json_object_agg(param_name, param_value) FROM trial_params p WHERE p.trial_id = t.trial_id)
FROM trials t LEFT JOIN hpo.leases l USING (trial_id) WHERE t.study_id = %(study)s ORDER BY t.number
"""


class SimulatedStorage(TrialStorage):
    connects: ClassVar[type[Connection]] = FaultyConnection
    connection: FaultyConnection
    heartbeat_connection: FaultyConnection


@dataclass
class Row:
    """A trial as the tables hold it."""

    trial_id: int
    number: int
    state: str
    worker: str | None
    attempt: int | None
    ended: bool
    released: bool
    checkpoint_key: str | None
    checkpoint_epoch: int | None
    lost: int
    reports: dict[str, float] | None
    values: list[float] | None
    attributes: dict[str, str] | None
    params: dict[str, float] | None


@dataclass
class Held:
    """A lease, as the worker that took it remembers it."""

    lease: Lease
    epoch: int = -1  # the last one trained
    batches: int = 0


@dataclass
class Process:
    """One life of a logical worker: what dies with it."""

    name: str
    pid: int
    storage: SimulatedStorage
    leases: Leases
    held: list[Held] = field(default_factory=list)


class World:
    """What outlives the stories: the database, its clock, and an observer that meets no faults."""

    def __init__(self, url: str, patch: pytest.MonkeyPatch) -> None:
        self.observer = TrialStorage(url)
        self.clock = Clock(self.observer.connection, patch)
        self.storages = {name: SimulatedStorage(url) for name in WORKERS}  # connections are kept from life to life
        self.counted: Counter[str] = Counter()  # of all stories: examples, steps, faults, …
        self.pids = count(1)
        self.dead: set[int] = set()


class LeaseStory(RuleBasedStateMachine):
    """One study, from its opening until its budget is used up."""

    world: ClassVar[World]

    def __init__(self) -> None:
        super().__init__()
        self.files: set[str] = set()  # the artifact store
        self.finished: dict[int, Row] = {}  # as they were when they ended
        self.processes: dict[str, Process] = {}
        self.deaths: Counter[int] = Counter()  # by trial number: holders that died or fell silent
        self.versions: set[int] = set()
        self._rows: list[Row] | None = None
        self.world.counted["stories"] += 1

    @initialize(budget=st.integers(1, 4), timed=st.booleans())
    def open(self, budget: int, timed: bool) -> None:
        storage = self.world.observer
        self.study_id = storage.create_new_study([StudyDirection.MAXIMIZE])
        self.leases = Leases(storage)
        terms = Terms(budget, TIMEOUT_S if timed else None, LEASE_S, STALL_S, ATTEMPTS)
        self.leases.open_study(self.study_id, terms, {})
        for name in WORKERS:
            self.start(name)

    # ------------------------------------------------------------------------------------------------------ helpers

    def start(self, name: str) -> None:
        storage = self.world.storages[name]
        storage.set_retry(60.0)
        process = self.processes[name] = Process(name, next(self.world.pids), storage, Leases(storage))
        process.leases.register(name, self.study_id, "host", process.pid)
        self._rows = None

    def rows(self) -> list[Row]:
        """The study's trials, looked up once after each operation."""
        if self._rows is None:
            found = self.world.observer.connection.execute(TRIALS, given={"study": self.study_id})
            self._rows = [Row(*row) for row in found]
        return self._rows

    def row(self, trial_id: int) -> Row:
        return next(row for row in self.rows() if row.trial_id == trial_id)

    def attempt(self, process: Process, faults: list[Fault], call: Callable[[], Any]) -> Any:
        """Make a call that meets faults on its way; a LeaseLost or a StudyOver is an answer too."""
        self.world.counted["operations"] += 1
        self._rows = None
        connection = process.storage.connection
        before = connection.injected
        try:
            with failing(connection, faults):
                return call()
        except (LeaseLost, StudyOver) as error:
            return error
        finally:
            self.world.counted["faults"] += connection.injected - before

    def is_current(self, held: Held) -> bool:
        """Whether the tables say that this lease is the trial's."""
        row = self.row(held.lease.trial_id)
        return (row.worker, row.attempt, row.ended) == (
            held.lease.worker,
            held.lease.attempt,
            False,
        ) and not row.released

    def ended(self, process: Process, held: Held) -> None:
        process.held.remove(held)

    # -------------------------------------------------------------------------------------------- what workers do

    @rule(name=WORKER, faults=FAULTS)
    def take(self, name: str, faults: list[Fault]) -> None:
        self._take(name, faults)

    @rule(name=WORKER, seconds=st.sampled_from([0.0, 0.0, LEASE_S + 1]))
    def take_undisturbed(self, name: str, seconds: float) -> None:
        self.world.clock.advance(seconds)
        self._take(name, [])

    @precondition(lambda self: not any(process.held for process in self.processes.values()))
    @rule(faults=FAULTS)
    def first_takes(self, faults: list[Fault]) -> None:
        self._take(WORKERS[0], faults)

    @rule(name=WORKER, epochs=st.integers(1, 3))
    def trains_undisturbed(self, name: str, epochs: int) -> None:
        """A trial from its lease to its end."""
        process = self.processes[name]
        self._take(name, [])
        for held in process.held[-1:]:
            for _ in range(epochs):
                if held in process.held:
                    self._report(process, held, [], 0.5)
            if held in process.held:
                self._checkpoint(process, held, [])
            if held in process.held:
                self._finish(process, held, [], complete=True)

    def _take(self, name: str, faults: list[Fault]) -> None:
        process = self.processes[name]
        before = {row.number: row for row in self.rows()}
        lease = self.attempt(process, faults, lambda: process.leases.acquire(self.study_id, name))
        if not isinstance(lease, Lease):
            return
        self.world.counted["taken"] += 1
        row = self.row(lease.trial_id)
        assert (row.worker, row.attempt, row.state, row.ended) == (name, lease.attempt, "RUNNING", False)
        if lease.adopted:
            self.world.counted["adopted"] += 1
            assert lease.attempt == (before[lease.number].attempt or 0) + 1
            assert lease.checkpoint_key is None or lease.checkpoint_key in self.files
            kept = lease.checkpoint_epoch if lease.checkpoint_epoch is not None else -1
            assert all(int(step) <= kept for step in row.reports or {})
        else:
            assert before.get(lease.number) is None
            process.storage.set_trial_params(lease.trial_id, PARAMS)
            self._rows = None
        process.held.append(Held(lease, -1 if lease.checkpoint_epoch is None else lease.checkpoint_epoch))

    @rule(name=WORKER, faults=FAULTS, batches=st.sampled_from([0, 1, 5]))
    def renew(self, name: str, faults: list[Fault], batches: int) -> None:
        process = self.processes[name]
        for held in process.held:
            held.batches += batches
        progress = {held.lease: Progress(held.batches, held.epoch) for held in process.held}
        self._rows = None
        with failing(process.storage.heartbeat_connection, faults):
            lost = process.leases.renew(name, progress).lost
        for held in list(process.held):
            row = self.row(held.lease.trial_id)
            given_up = row.ended and row.attempt == held.lease.attempt  # its next write is rejected
            assert (held.lease in lost) != (self.is_current(held) or given_up)
            if not self.is_current(held):
                process.held.remove(held)

    @precondition(lambda self: any(process.held for process in self.processes.values()))
    @rule(data=st.data(), faults=FAULTS, value=st.floats(0, 1))
    def report(self, data: st.DataObject, faults: list[Fault], value: float) -> None:
        self._report(*self.some_held(data), faults, value)

    def _report(self, process: Process, held: Held, faults: list[Fault], value: float) -> None:
        current = self.is_current(held)
        held.epoch += 1
        held.batches += 1

        def write() -> None:
            process.storage.set_trial_intermediate_value(held.lease.trial_id, held.epoch, value)
            process.storage.session.flush()
            process.storage.session.check(held.lease.trial_id)

        answer = self.attempt(process, faults, write)
        assert isinstance(answer, LeaseLost) != current
        if current:
            assert (self.row(held.lease.trial_id).reports or {})[str(held.epoch)] == value
        else:
            self.ended(process, held)

    @precondition(lambda self: any(process.held for process in self.processes.values()))
    @rule(data=st.data(), faults=FAULTS)
    def checkpoint(self, data: st.DataObject, faults: list[Fault]) -> None:
        self._checkpoint(*self.some_held(data), faults)

    def _checkpoint(self, process: Process, held: Held, faults: list[Fault]) -> None:
        if held.epoch < 0:
            return
        lease, current = held.lease, self.is_current(held)
        key = f"{lease.trial_id}-{lease.attempt}-{held.epoch}"
        self.files.add(key)
        answer = self.attempt(process, faults, lambda: process.leases.checkpoint(lease, key, held.epoch))
        assert isinstance(answer, LeaseLost) != current
        if isinstance(answer, LeaseLost):
            self.ended(process, held)
            if self.row(lease.trial_id).checkpoint_key != key:
                self.files.discard(key)

    @precondition(lambda self: any(process.held for process in self.processes.values()))
    @rule(data=st.data(), faults=FAULTS, complete=st.booleans())
    def finish(self, data: st.DataObject, faults: list[Fault], complete: bool) -> None:
        self._finish(*self.some_held(data), faults, complete=complete)

    def _finish(self, process: Process, held: Held, faults: list[Fault], *, complete: bool) -> None:
        current, trial_id = self.is_current(held), held.lease.trial_id
        state = TrialState.COMPLETE if complete else TrialState.PRUNED
        attributes = {"seed": 1, "worker": process.name}
        answer = self.attempt(process, faults, lambda: process.storage.finish_trial(trial_id, state, [0.5], attributes))
        assert isinstance(answer, LeaseLost) != current
        self.ended(process, held)
        if current:
            row = self.row(trial_id)
            assert (row.state, row.values, row.ended) == (state.name, [0.5], True)
            assert (row.attributes or {})["worker"] == f'"{process.name}"'

    @precondition(lambda self: any(process.held for process in self.processes.values()))
    @rule(data=st.data(), faults=FAULTS)
    def release(self, data: st.DataObject, faults: list[Fault]) -> None:
        process, held = self.some_held(data)
        self.attempt(process, faults, lambda: process.leases.release(held.lease))
        self.ended(process, held)
        assert not self.is_current(held)

    @rule(name=WORKER, faults=FAULTS)
    def promote(self, name: str, faults: list[Fault]) -> None:
        process = self.processes[name]
        if not self.attempt(process, faults, lambda: process.leases.acquire_promotion(self.study_id, name)):
            return
        assert not any(row.state == "RUNNING" for row in self.rows())
        registry = Registry(process.storage.connection)
        given: dict[str, Any] = {"name": f"study-{self.study_id}", "study_id": self.study_id, "study_name": "s"}
        model = self.attempt(
            process,
            faults,
            lambda: registry.promote(**given, trial_number=0, scores={}, config={}, artifacts={"a": "b"}),
        )
        self.versions.add(model.version)
        self.attempt(process, faults, lambda: process.leases.finish_promotion(self.study_id, name, model.version))
        assert self.leases._row(self.study_id).promoted_version == model.version
        self.world.counted["promoted"] += 1

    @rule(name=WORKER, faults=FAULTS, more=st.integers(0, 2))
    def reopen(self, name: str, faults: list[Fault], more: int) -> None:
        process, budget = self.processes[name], self.leases._row(self.study_id).budget
        row = self.attempt(process, faults, lambda: process.leases.reopen(self.study_id, trials=budget + more))
        assert row.budget == budget + more

    @rule(faults=FAULTS, name=WORKER, meant=st.sampled_from([False, False, False, True]))
    def stop(self, name: str, faults: list[Fault], meant: bool) -> None:
        process = self.processes[name]
        if not meant:
            return
        self.attempt(process, faults, lambda: process.leases.stop(self.study_id))

    # ------------------------------------------------------------------------------------------------ what happens

    @rule(seconds=st.sampled_from([0.5, 3.0, LEASE_S + 1, STALL_S + 1, TIMEOUT_S]))
    def time_passes(self, seconds: float) -> None:
        self.world.clock.advance(seconds)

    @rule()
    def server_restarts(self) -> None:
        self.world.clock.restart_server()

    @rule(name=WORKER)
    def dies(self, name: str) -> None:
        """A process is killed, and another one of that name begins, as in a container that starts again."""
        self.world.counted["killed"] += 1
        self.bury(self.processes[name])
        self.start(name)
        assert not [row for row in self.rows() if row.worker == name and not row.ended and not self.is_free(row)]

    @rule(name=WORKER, other=WORKER, faults=FAULTS)
    def dies_and_another_looks(self, name: str, other: str, faults: list[Fault]) -> None:
        """A process is killed, and another one of its machine looks for dead ones."""
        if name == other:
            return
        process, looking = self.processes[name], self.processes[other]
        held = {each.lease.trial_id for each in process.held if self.is_current(each)}
        self.world.dead.add(process.pid)
        self.bury(process)
        freed = self.attempt(looking, faults, lambda: looking.leases.free_dead("host", other))
        assert name in freed or Fault.AFTER in faults
        assert all(self.is_free(row) for row in self.rows() if row.trial_id in held)
        self.start(name)

    @rule(name=WORKER, faults=FAULTS)
    def dies_within(self, name: str, faults: list[Fault]) -> None:
        """A process is killed while it takes a trial: what was committed of that is nobody's."""
        process = self.processes[name]
        process.storage.set_retry(0.0)
        dying = failing(process.storage.connection, [*faults, Fault.AFTER])
        with dying, suppress(DatabaseUnavailable, StudyOver):
            process.leases.acquire(self.study_id, name)
        self._rows = None
        self.dies(name)

    @rule(data=st.data())
    def stranger_ends_a_trial(self, data: st.DataObject) -> None:
        running = [row for row in self.rows() if row.state == "RUNNING"]
        if not running:
            return
        row = data.draw(st.sampled_from(running))
        with pytest.raises(TrialLeased):
            self.world.observer.set_trial_state_values(row.trial_id, TrialState.COMPLETE, [0.9999])

    # -------------------------------------------------------------------------------------------------- what holds

    @invariant()
    def what_was_promised_holds(self) -> None:
        if not hasattr(self, "study_id"):
            return
        self.world.counted["steps"] += 1
        rows, study = self.rows(), self.leases._row(self.study_id)
        assert [row.number for row in rows] == list(range(len(rows)))
        assert study.started == len(rows) <= study.budget
        for row in rows:
            assert row.worker is not None
            assert row.ended == (row.state != "RUNNING")
            assert row.checkpoint_key is None or row.checkpoint_key in self.files
            assert row.lost <= ATTEMPTS
            if row.number in self.finished:
                assert row == self.finished[row.number]
            elif row.ended:
                self.finished[row.number] = row
                if row.state == "FAIL":
                    self.world.counted["given up"] += 1
                    assert (row.attempt or 0) >= ATTEMPTS
        for trial_id in (row.trial_id for row in rows):
            holders = [held for p in self.processes.values() for held in p.held if held.lease.trial_id == trial_id]
            assert sum(map(self.is_current, holders)) <= 1
        assert len(self.versions) <= 1

    def teardown(self) -> None:
        """Somebody ends the study: every trial of the budget is there, and ended once."""
        if not hasattr(self, "study_id"):
            return
        for process in self.processes.values():
            self.bury(process)
        self.start("ann")
        process = self.processes["ann"]
        self.leases.reopen(self.study_id, timeout_s=None)
        self.world.clock.advance(LEASE_S + 1)
        self.world.clock.advance(2 * LEASE_S)
        for _ in range(50):
            try:
                lease = process.leases.acquire(self.study_id, "ann")
            except StudyOver:
                break
            assert lease is not None
            process.storage.finish_trial(lease.trial_id, TrialState.COMPLETE, [0.5])
            self._rows = None
        else:
            raise AssertionError("the study does not end")
        self.what_was_promised_holds()
        rows, study = self.rows(), self.leases._row(self.study_id)
        assert all(row.ended for row in rows)
        if study.status == "open":
            assert len(rows) == study.budget
            assert process.leases.acquire_promotion(self.study_id, "ann")
        self.bury(process)

    def is_free(self, row: Row) -> bool:
        free = "SELECT released OR lost_attempt IS NOT DISTINCT FROM attempt FROM hpo.leases WHERE trial_id = %(t)s"
        return bool(self.world.observer.connection.execute(free, given={"t": row.trial_id})[0][0])

    def bury(self, process: Process) -> None:
        """A killed process writes nothing more."""
        process.storage.session._begin()
        process.held.clear()
        self._rows = None

    def some_held(self, data: st.DataObject) -> tuple[Process, Held]:
        every = [(process, held) for process in self.processes.values() for held in process.held]
        return data.draw(st.sampled_from(every))


@pytest.fixture
def world(server: str, template: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setattr(connection_module, "PAUSE_S", 0.0)
    monkeypatch.setattr(session_module, "HELD_BACK_S", 1e6)  # nothing is written but by a step of the story
    monkeypatch.setattr(leases_module, "process_start", lambda pid: pid)
    with fresh_database(server, template) as url:
        made = World(url, monkeypatch)
        monkeypatch.setattr(leases_module, "fate", lambda _, __, pid, *___: "died" if pid in made.dead else "unknown")
        yield made
        for storage in (made.observer, *made.storages.values()):
            storage.close()


@pytest.mark.timeout(600 + 2 * EXAMPLES)
def test_every_story_of_workers_faults_and_restarts_ends_well(world: World) -> None:
    LeaseStory.world = world
    story = settings(
        max_examples=EXAMPLES,
        stateful_step_count=25,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    try:
        run_state_machine_as_test(LeaseStory, settings=story)
    finally:
        logging.getLogger(__name__).warning("%s", dict(world.counted))
