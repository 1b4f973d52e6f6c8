"""The storage beyond Optuna's contract: shared with stock Optuna, cheap, and safe against lost connections."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from functools import partial
from pathlib import Path

import optuna
import psycopg2
import pytest
import sqlalchemy as sa
from alembic.script import ScriptDirectory
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.exceptions import DuplicatedStudyError, UpdateFinishedTrialError
from optuna.storages._rdb.models import BaseModel
from optuna.study import StudyDirection
from optuna.trial import TrialState, create_trial

from hpo.storage import tables
from hpo.storage.connection import Connection, connect_arguments
from hpo.storage.errors import DatabaseUnavailable, SchemaError, StudyOver
from hpo.storage.heartbeat import Progress
from hpo.storage.leases import Leases
from hpo.storage.locks import Lock, exclusively
from hpo.storage.registry import ModelVersion, Registry
from hpo.storage.server import server as embedded
from hpo.storage.tables import migrate
from hpo.storage.terms import Terms
from hpo.storage.trials import TrialStorage, trial_storage

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["hpo.storage.leases"])
MAXIMIZE = [StudyDirection.MAXIMIZE]
X = FloatDistribution(0, 1)


@pytest.fixture
def other(database_url: str) -> Iterator[TrialStorage]:
    """The same database as another process sees it."""
    made = trial_storage(database_url)
    yield made
    made.close()


@pytest.fixture
def stock(database_url: str) -> Iterator[optuna.storages.BaseStorage]:
    """Optuna's own storage."""
    backend = optuna.storages.RDBStorage(database_url)
    yield optuna.storages.get_storage(backend)
    backend.remove_session()
    backend.engine.dispose()


def until(look: Callable[[], bool], patience_s: float = 60.0) -> None:
    deadline = time.monotonic() + patience_s
    while not look():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def objective(trial: optuna.Trial) -> float:
    """The benchmark's workload: 5 parameters, 20 reports and prune checks, 3 attributes."""
    value = sum((trial.suggest_float(f"x{i}", 0, 1) - 0.3) ** 2 for i in range(5))
    for step in range(20):
        trial.report(value + 1 / (step + 1), step)
        trial.should_prune()
    for name in ("a", "b", "c"):
        trial.set_user_attr(name, 1)
    return value


# -------------------------------------------------------------------------------------------------------------- tables


def migrate_and_add(url: str) -> None:
    trial_storage(url).create_new_study(MAXIMIZE)


def test_twenty_processes_may_start_on_an_empty_database(empty_database_url: str) -> None:
    processes = [PROCESSES.Process(target=migrate_and_add, args=(empty_database_url,)) for _ in range(20)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * 20
    with closing(psycopg2.connect(**connect_arguments(empty_database_url))) as connection:
        cursor = connection.cursor()
        cursor.execute(
            "SELECT (SELECT count(*) FROM studies), (SELECT array_agg(version_num) FROM hpo.revision), "
            "(SELECT array_agg(version_num) FROM alembic_version), (SELECT count(*) FROM version_info)"
        )
        counted = cursor.fetchone()
    assert counted == (20, [tables.HEAD], ["v3.2.0.a"], 1)


def test_settings_of_the_url_go_before_ours_of_the_same_name(database_url: str) -> None:
    given = {"options": "-c lock_timeout=3s --jit_above_cost=7"}
    with closing(Connection(sa.make_url(database_url).update_query_dict(given).render_as_string(False))) as connection:
        query = "SELECT current_setting('lock_timeout'), current_setting('jit'), current_setting('timezone')"
        assert connection.execute(query) == [("3s", "off", "UTC")]


def test_migrating_again_is_one_query(storage: TrialStorage) -> None:
    before = storage.connection.trips
    tables.ensure(storage.connection)
    assert storage.connection.trips == before + 1


def test_the_newest_migration_is_the_one_that_the_code_is_written_for() -> None:
    assert ScriptDirectory(tables.MIGRATIONS).get_current_head() == tables.HEAD


def test_no_table_of_ours_is_named_like_one_of_optunas(storage: TrialStorage) -> None:
    """For a database user called hpo PostgreSQL would look into our schema first."""
    rows = storage.connection.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'hpo'")
    ours = {name for (name,) in rows}
    assert {"terms", "leases", "revision"} <= ours
    assert not ours & {*BaseModel.metadata.tables, "alembic_version"}


def test_a_newer_database_is_refused(database_url: str, storage: TrialStorage) -> None:
    storage.connection.execute("UPDATE hpo.revision SET version_num = '9999'")
    with pytest.raises(SchemaError, match="at revision 9999, this code knows 0008: upgrade hpo"):
        trial_storage(database_url)


def test_a_database_made_by_stock_optuna_is_taken_over(empty_database_url: str) -> None:
    stock = optuna.storages.RDBStorage(empty_database_url)
    study = optuna.create_study(storage=stock, study_name="old")
    study.optimize(objective, n_trials=3)
    taken = optuna.load_study(study_name="old", storage=trial_storage(empty_database_url))
    assert taken.trials == study.trials
    stock.remove_session()
    stock.engine.dispose()


def test_another_database_system_is_refused() -> None:
    with pytest.raises(ValueError, match=r"live in PostgreSQL.*got sqlite"):
        trial_storage("sqlite:///x.db")


# ------------------------------------------------------------------------------------------------- with stock Optuna


def test_stock_optuna_reads_and_continues_our_study_and_we_its(
    storage: TrialStorage, stock: optuna.storages.BaseStorage
) -> None:
    ours = optuna.create_study(storage=storage, study_name="shared", direction="minimize")
    ours.enqueue_trial({"x0": 0.5})
    ours.optimize(objective, n_trials=3)
    theirs = optuna.load_study(study_name="shared", storage=stock)
    assert theirs.trials == ours.trials
    theirs.optimize(objective, n_trials=3)
    ours.optimize(objective, n_trials=3)
    assert ours.trials == theirs.trials
    assert [trial.number for trial in ours.trials] == list(range(9))
    assert ours.best_trial == theirs.best_trial
    optuna.delete_study(study_name="shared", storage=stock)
    assert storage.get_all_studies() == []


def create_trials(url: str, study_id: int, ours: bool) -> None:
    made = trial_storage(url) if ours else optuna.storages.RDBStorage(url)
    for _ in range(25):
        made.create_new_trial(study_id)


def test_numbers_are_gapless_while_stock_optuna_creates_trials_too(storage: TrialStorage, database_url: str) -> None:
    study_id = storage.create_new_study(MAXIMIZE)
    arguments = [(database_url, study_id, i % 2 == 0) for i in range(4)]
    processes = [PROCESSES.Process(target=create_trials, args=given) for given in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [trial.number for trial in storage.get_all_trials(study_id)] == list(range(100))


# ------------------------------------------------------------------------------------------------ what a trial costs


def test_a_trial_takes_at_most_forty_round_trips(storage: TrialStorage) -> None:
    study = optuna.create_study(storage=storage)
    study.optimize(objective, n_trials=12)  # the sampler's random start
    before = storage.connection.trips
    study.optimize(objective, n_trials=5)
    assert storage.connection.trips - before <= 5 * 40


def test_finished_trials_are_fetched_once(storage: TrialStorage, other: TrialStorage) -> None:
    study = optuna.create_study(storage=other)
    study.optimize(objective, n_trials=3)
    first = storage.get_all_trials(study._study_id, deepcopy=False)
    storage.connection.execute("UPDATE trial_values SET value = -1")
    assert storage.get_all_trials(study._study_id) == first
    assert storage.get_trial(first[0]._trial_id) is first[0]
    study.optimize(objective, n_trials=2)
    later = storage.get_all_trials(study._study_id, deepcopy=False)
    assert len(later) == 5
    assert all(old is new for old, new in zip(first, later, strict=False))


def test_the_cache_follows_trials_that_finish_out_of_order(storage: TrialStorage, other: TrialStorage) -> None:
    study_id = other.create_new_study(MAXIMIZE)
    ids = [other.create_new_trial(study_id) for _ in range(6)]
    complete = (TrialState.COMPLETE,)
    for finished, trial_id in enumerate([ids[4], ids[1], ids[5], ids[0]], 1):
        other.set_trial_state_values(trial_id, TrialState.COMPLETE, [float(trial_id)])
        storage.get_trial(trial_id)  # cached by itself, ahead of the list
        trials = storage.get_all_trials(study_id, deepcopy=False, states=complete)
        assert len(trials) == finished
        assert [t.number for t in trials] == sorted(t.number for t in trials)
        assert storage.get_best_trial(study_id).value == max(t.value or 0.0 for t in trials)
    assert [t.number for t in storage.get_all_trials(study_id)] == list(range(6))
    assert storage.get_n_trials(study_id, TrialState.RUNNING) == 2


def test_a_list_that_its_receiver_reordered_does_not_spoil_the_next(storage: TrialStorage) -> None:
    study_id = storage.create_new_study(MAXIMIZE)
    for value in (1.0, 3.0, 2.0):
        storage.create_new_trial(study_id, create_trial(value=value))
    storage.get_all_trials(study_id, deepcopy=False).sort(key=lambda trial: -(trial.value or 0.0))
    assert [trial.number for trial in storage.get_all_trials(study_id, deepcopy=False)] == [0, 1, 2]
    storage.get_all_trials(study_id, deepcopy=False).clear()
    assert [trial.number for trial in storage.get_all_trials(study_id)] == [0, 1, 2]


def test_writes_held_back_are_read_by_ourselves_at_once_and_by_others_soon(
    storage: TrialStorage, other: TrialStorage
) -> None:
    trial_id = storage.create_new_trial(storage.create_new_study(MAXIMIZE))
    storage.set_trial_param(trial_id, "x", 0.5, X)
    storage.set_trial_intermediate_value(trial_id, 0, 1.0)
    storage.set_trial_attrs(trial_id, {"u": 1}, {"s": 2})
    until(lambda: other.get_trial(trial_id).system_attrs == {"s": 2})
    storage.set_trial_intermediate_value(trial_id, 1, 2.0)
    assert storage.get_trial(trial_id) == other.get_trial(trial_id)
    assert other.get_trial(trial_id).intermediate_values == {0: 1.0, 1: 2.0}


def test_parameters_are_written_together_and_in_order(storage: TrialStorage, other: TrialStorage) -> None:
    study_id = storage.create_new_study(MAXIMIZE)
    trial_id = storage.create_new_trial(study_id)
    kinds = CategoricalDistribution(("a", "b"))
    storage.set_trial_params(trial_id, {"z": (0.5, X), "a": (1, kinds), "m": (0.25, X)})
    assert list(other.get_trial(trial_id).params.items()) == [("z", 0.5), ("a", "b"), ("m", 0.25)]
    later = other.create_new_trial(study_id)
    with pytest.raises(ValueError, match="CategoricalDistribution does not support dynamic value space"):
        other.set_trial_params(later, {"z": (0.5, X), "a": (0, CategoricalDistribution(("b", "a")))})
    assert storage.get_trial(later).params == {}


def test_a_trial_is_finished_in_one_round_trip(storage: TrialStorage, other: TrialStorage) -> None:
    trial_id = storage.create_new_trial(storage.create_new_study(MAXIMIZE))
    storage.set_trial_intermediate_value(trial_id, 0, 0.25)
    before = storage.connection.trips
    storage.finish_trial(trial_id, TrialState.COMPLETE, [0.5], {"device": "cpu"})
    assert storage.connection.trips == before + 1
    trial = other.get_trial(trial_id)
    assert (trial.value, trial.user_attrs, trial.intermediate_values) == (0.5, {"device": "cpu"}, {0: 0.25})


def test_a_trial_that_somebody_else_ended_takes_no_more_writes(storage: TrialStorage, other: TrialStorage) -> None:
    study_id = storage.create_new_study(MAXIMIZE)
    ended, running = (storage.create_new_trial(study_id) for _ in range(2))
    other.set_trial_state_values(ended, TrialState.FAIL)
    storage.set_trial_intermediate_value(ended, 0, 1.0)
    storage.set_trial_intermediate_value(running, 0, 2.0)
    assert storage.get_trial(ended).intermediate_values == {}
    assert storage.get_trial(running).intermediate_values == {0: 2.0}
    with pytest.raises(UpdateFinishedTrialError):
        storage.set_trial_intermediate_value(ended, 1, 1.0)
    with pytest.raises(UpdateFinishedTrialError):
        storage.set_trial_state_values(ended, TrialState.COMPLETE, [1.0])


@pytest.mark.parametrize("by_timer", [False, True])
def test_a_value_that_does_not_fit_fails_once_and_does_not_stay_in_the_way(
    storage: TrialStorage, by_timer: bool
) -> None:
    trial_id = storage.create_new_trial(storage.create_new_study(MAXIMIZE))
    storage.set_trial_user_attr(trial_id, "k" * 600, 1)
    if by_timer:
        until(lambda: not storage.session._pending)
    with pytest.raises(psycopg2.errors.StringDataRightTruncation):
        storage.get_trial(trial_id)
    storage.set_trial_user_attr(trial_id, "short", 1)
    assert storage.get_trial(trial_id).user_attrs == {"short": 1}


# --------------------------------------------------------------------------------------------- threads, forks, ends


def test_threads_share_a_storage_and_its_one_connection(storage: TrialStorage) -> None:
    study = optuna.create_study(storage=storage)
    study.optimize(objective, n_trials=12, n_jobs=4)
    assert [trial.number for trial in study.trials] == list(range(12))
    assert all(len(t.intermediate_values) == 20 and len(t.user_attrs) == 3 for t in study.trials)
    mine = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
    assert storage.connection.execute(mine) == [(1,)]


FORKING = """
import os, sys
from optuna.study import StudyDirection
from optuna.trial import TrialState
from hpo.storage.trials import trial_storage
storage = trial_storage(sys.argv[1])
study_id = storage.create_new_study([StudyDirection.MAXIMIZE], "forked")
parents = storage.create_new_trial(study_id)
storage.set_trial_user_attr(parents, "held", "back")
children = []
for i in range(3):
    child = os.fork()
    if child == 0:
        trial = storage.create_new_trial(study_id)
        storage.finish_trial(trial, TrialState.COMPLETE, [i])
        os._exit(0)
    children.append(child)
assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
storage.finish_trial(parents, TrialState.COMPLETE, [9.0])
left = storage.create_new_trial(study_id)
storage.set_trial_user_attr(left, "written", "at exit")
"""


def test_a_storage_survives_a_fork_and_writes_what_is_held_back_at_exit(
    storage: TrialStorage, database_url: str
) -> None:
    subprocess.run([sys.executable, "-c", FORKING, database_url], check=True, timeout=60)
    trials = storage.get_all_trials(storage.get_study_id_from_name("forked"))
    assert sorted(trial.value or 0.0 for trial in trials[:4]) == [0.0, 1.0, 2.0, 9.0]
    assert trials[0].user_attrs == {"held": "back"}
    assert trials[4].user_attrs == {"written": "at exit"}


# --------------------------------------------------------------------------------------------------- lost connections


class Cutter:
    """A TCP proxy to the server that can cut a connection after the server's answer, without passing it on."""

    def __init__(self, url: str) -> None:
        self.target = sa.make_url(url)
        self.listener = socket.create_server(("127.0.0.1", 0))
        port = self.listener.getsockname()[1]
        self.url = self.target.set(port=port).render_as_string(hide_password=False)
        self.skip = 0  # answers still to be passed on before
        self.cuts = 0  # answers to be swallowed
        self.refuse_until: Callable[[], bool] = lambda: True  # before the next connection is served
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                until(self.refuse_until)
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, socket.create_connection((self.target.host or "", self.target.port or 5432)) as server:
            back = threading.Thread(target=self._pass_on, args=(server, client, True), daemon=True)
            back.start()
            self._pass_on(client, server, False)
            back.join()

    def _pass_on(self, source: socket.socket, sink: socket.socket, answers: bool) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                if answers and self.skip:
                    self.skip -= 1
                elif answers and self.cuts:
                    self.cuts -= 1
                    break
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def cutter(database_url: str) -> Iterator[Cutter]:
    made = Cutter(database_url)
    yield made
    made.listener.close()


def test_a_lost_answer_neither_loses_nor_doubles_what_was_done(cutter: Cutter, other: TrialStorage) -> None:
    storage = trial_storage(cutter.url, retry_s=30)
    cutter.cuts = 1
    study_id = storage.create_new_study(MAXIMIZE, "s")
    assert [study.study_name for study in other.get_all_studies()] == ["s"]
    cutter.cuts = 1
    trial_id = storage.create_new_trial(study_id)
    cutter.cuts = 1
    storage.set_trial_params(trial_id, {"x": (0.5, X)})
    storage.set_trial_intermediate_value(trial_id, 0, 0.25)
    cutter.cuts = 1
    storage.finish_trial(trial_id, TrialState.COMPLETE, [0.5], {"a": 1})
    (trial,) = other.get_all_trials(study_id)
    assert (trial.value, trial.params, trial.user_attrs) == (0.5, {"x": 0.5}, {"a": 1})
    assert trial.intermediate_values == {0: 0.25}
    waiting = other.create_new_trial(study_id, create_trial(state=TrialState.WAITING))
    cutter.cuts = 1
    assert storage.set_trial_state_values(waiting, TrialState.RUNNING)
    assert [trial.number for trial in other.get_all_trials(study_id)] == [0, 1]
    cutter.cuts = 1
    storage.delete_study(study_id)
    assert other.get_all_studies() == []
    with pytest.raises(KeyError):
        storage.delete_study(study_id)
    storage.close()


@pytest.mark.parametrize("answer", range(1, 4))
def test_taking_a_trial_is_done_once_whichever_answer_is_lost(cutter: Cutter, other: TrialStorage, answer: int) -> None:
    storage = trial_storage(cutter.url, retry_s=30)
    leases = Leases(storage)
    study_id = storage.create_new_study(MAXIMIZE)
    leases.open_study(study_id, Terms(budget=1), {})
    cutter.skip = answer - 1
    cutter.cuts = 1
    lease = leases.acquire(study_id, "w")
    assert lease is not None
    assert (lease.number, lease.attempt) == (0, 1)
    assert leases.acquire(study_id, "w") is None
    assert len(other.get_all_trials(study_id)) == 1
    assert leases.renew("w", {lease: Progress(1)}).lost == frozenset()
    storage.close()


def test_a_checkpoint_whose_answer_was_lost_is_not_taken_for_refused(cutter: Cutter, other: TrialStorage) -> None:
    storage = trial_storage(cutter.url, retry_s=30)
    leases, elsewhere = Leases(storage), Leases(other)
    study_id = storage.create_new_study(MAXIMIZE)
    leases.open_study(study_id, Terms(budget=1, lease_s=0.5), {})
    lease = leases.acquire(study_id, "w")
    assert lease is not None
    leases.checkpoint(lease, "zero", 0)
    leases.checkpoint(lease, "one", 1)
    cutter.cuts = 1
    cutter.refuse_until = lambda: elsewhere.acquire(study_id, "adopter") is not None
    assert leases.checkpoint(lease, "two", 2) is None
    row = other.connection.execute("SELECT checkpoint_key, replaced_key, worker FROM hpo.leases")
    assert row == [("two", "one", "adopter")]
    storage.connection.close()


def promote(registry: Registry, name: str = "power") -> ModelVersion:
    return registry.promote(
        name, study_id=7, study_name="power", trial_number=3, scores={}, config={}, artifacts={"model": "key"}
    )


def test_a_change_of_the_registry_whose_answer_was_lost_is_made_once(cutter: Cutter, database_url: str) -> None:
    registry, other = Registry(cutter.url), Registry(database_url)
    cutter.cuts = 1
    model = promote(registry)
    assert model.version == 1
    cutter.cuts = 1
    assert registry.set_alias("power", "champion", "latest").aliases == ("champion", "latest")
    assert other.models() == [model]
    cutter.skip, cutter.cuts = 1, 1
    registry.drop_alias("power", "champion")
    assert other.models()[0].aliases == ("latest",)
    cutter.skip, cutter.cuts = 1, 1
    assert registry.delete("power", 1) == ["key"]
    assert other.models() == []


def test_a_name_that_is_taken_is_still_refused(storage: TrialStorage) -> None:
    storage.create_new_study(MAXIMIZE, "s")
    with pytest.raises(DuplicatedStudyError, match="'s' already exists"):
        storage.create_new_study(MAXIMIZE, "s")


def test_a_database_out_of_reach_is_an_error_without_the_password(cutter: Cutter) -> None:
    storage = trial_storage(cutter.url, retry_s=0.5)
    password = sa.make_url(cutter.url).password
    cutter.cuts = 10**6
    with pytest.raises(DatabaseUnavailable, match=r"did not answer for 0.5 s .*; start it again") as caught:
        storage.get_all_studies()
    assert password
    assert str(password) not in str(caught.value)


def test_a_refused_password_is_not_tried_again(database_url: str) -> None:
    wrong = sa.make_url(database_url).set(password="wrong").render_as_string(hide_password=False)
    with pytest.raises(DatabaseUnavailable, match="authentication failed"):
        trial_storage(wrong, retry_s=600)


# ------------------------------------------------------------------------------------------------- a server that dies

REPORTS = 12


def run_trials(url: str, study_id: int, worker: str) -> None:
    """Runs leased trials until there are none; every write goes through a server that comes and goes."""
    leases = Leases(trial_storage(url))
    storage = leases.storage
    while True:
        try:
            lease = leases.acquire(study_id, worker)
        except StudyOver:
            return
        if lease is None:
            time.sleep(0.02)
            continue
        storage.set_trial_param(lease.trial_id, "x", 0.5, X)
        for step in range(REPORTS):
            storage.set_trial_intermediate_value(lease.trial_id, step, lease.number + step / 100)
            storage.get_all_trials(study_id, deepcopy=False, states=(TrialState.COMPLETE,))
        storage.finish_trial(lease.trial_id, TrialState.COMPLETE, [lease.number], {"worker": worker})


def test_a_server_that_dies_and_returns_loses_and_doubles_nothing(
    short_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HPO_HOME", str(short_folder / "dying"))
    url = embedded.start()
    leases = Leases(trial_storage(url))
    study_id = leases.storage.create_new_study(MAXIMIZE)
    leases.open_study(study_id, Terms(budget=60, lease_s=60), {})
    processes = [PROCESSES.Process(target=run_trials, args=(url, study_id, f"w{i}")) for i in range(3)]
    for process in processes:
        process.start()
    for done, end in ((5, _kill_postmaster), (20, embedded.stop), (35, _kill_postmaster)):
        until(partial(_complete, leases, study_id, done))
        end()
        assert embedded.start() == url
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    trials = leases.storage.get_all_trials(study_id)
    leases.storage.close()
    embedded.stop()
    assert [trial.number for trial in trials] == list(range(60))
    for trial in trials:
        assert (trial.state, trial.value, trial.params) == (TrialState.COMPLETE, trial.number, {"x": 0.5})
        assert trial.intermediate_values == {s: trial.number + s / 100 for s in range(REPORTS)}


@pytest.fixture
def restartable(short_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """URL of a server of the test's own."""
    monkeypatch.setenv("HPO_HOME", str(short_folder / "restarted"))
    yield embedded.start()
    embedded.stop()


def _waits_for_a_lock(connection: Connection) -> bool:
    return connection.execute("SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND NOT granted") != []


def test_a_promotion_survives_a_restart_of_the_server_in_its_middle(restartable: str) -> None:
    registry, other = Registry(restartable), Connection(restartable)
    other.execute("SELECT pg_advisory_lock(hashtextextended('hpo.models power', 0))")
    with ThreadPoolExecutor(1) as pool:
        promotion = pool.submit(promote, registry)
        until(lambda: _waits_for_a_lock(other))
        _kill_postmaster()
        assert embedded.start() == restartable
        model = promotion.result(60)
    assert model.version == 1
    assert registry.models() == [model]
    other.close()


def test_an_exclusive_block_waits_for_the_one_before_also_over_a_restart(restartable: str) -> None:
    migrate(restartable)
    entered = threading.Event()

    def enter() -> None:
        with exclusively(restartable, "study waves"):
            entered.set()

    with ThreadPoolExecutor(1) as pool:
        with exclusively(restartable, "study waves"), exclusively(restartable, "study of another name"):
            second = pool.submit(enter)
            assert not entered.wait(0.5)
            _kill_postmaster()
            embedded.start()
            assert not entered.wait(0.5)  # everybody has time to renew
        second.result(60)


def test_a_lock_whose_holder_is_silent_is_anybodys(database_url: str) -> None:
    connection = Connection(database_url)
    silent, other = Lock(connection, "study waves"), Lock(connection, "study waves")
    assert (silent.take(), other.take(), silent.take()) == (True, False, True)
    assert (silent.held, other.held) == (True, False)
    connection.execute("UPDATE hpo.locks SET expires_at = now()")
    with exclusively(database_url, "study waves"):
        assert not silent.take()
        assert not silent.held
    assert connection.execute("SELECT name FROM hpo.locks") == []
    assert other.take()
    connection.close()


def _complete(leases: Leases, study_id: int, trials: int) -> bool:
    return leases.snapshot(study_id).counts["complete"] >= trials


def _kill_postmaster() -> None:
    data = embedded.status().data
    assert data is not None
    os.kill(int((data / "postmaster.pid").read_text().split()[0]), signal.SIGKILL)
