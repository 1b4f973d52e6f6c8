"""A pooler between everybody and Postgres: pgbouncer, which keeps a connection for a session or for a transaction.

For a transaction is the harder one: of eight clients each transaction goes over another of four connections, on which
nothing may be left. Nothing says that a pooler is there.
"""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from types import ModuleType

import httpx
import psycopg2
import pytest
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from hpo.storage.access import Access
from hpo.storage.connection import Connection
from hpo.storage.errors import StudyOver
from hpo.storage.leases import Leases
from hpo.storage.locks import Lock, exclusively
from hpo.storage.server import server as embedded
from hpo.storage.statements import Statement
from hpo.storage.tables import migrate
from hpo.storage.terms import Terms
from hpo.storage.trials import trial_storage
from tests.conftest import Cli, assert_exact, execute, wait_for
from tests.programs import program
from tests.service.conftest import upload
from tests.service.processes import Server

Pooled = Callable[..., str]
SHARED = 4  # connections to the server
OF_THE_POOLER = {"application_name", "client_encoding", "DateStyle", "TimeZone", "standard_conforming_strings"}
OF_THE_TRANSACTION = {"transaction_isolation", "transaction_read_only", "transaction_deferrable"}  # set anew by each


@pytest.fixture(scope="module")
def pgbouncer() -> str:
    return program("pgbouncer", "pgbouncer")


@pytest.fixture
def pooled(chaos: ModuleType, pgbouncer: str, short_folder: Path) -> Iterator[Pooled]:
    """pooled(url, "session") starts a pooler before a database and gives its address."""
    with ExitStack() as running:

        def start(url: str, mode: str = "transaction", size: int = SHARED) -> str:
            address: str = running.enter_context(chaos.pooler(url, short_folder, mode, size, pgbouncer))
            return address

        yield start


@pytest.fixture
def address(pooled: Pooled, database_url: str) -> str:
    """The test's database through a pooler in transaction mode."""
    return pooled(database_url)


@pytest.mark.parametrize("mode", ["session", "transaction"])
def test_a_launch_runs_a_study_through_a_pooler(
    cli: Cli,
    study_file: Callable[..., Path],
    environment: dict[str, str],
    pooled: Pooled,
    database_url: str,
    trials: Callable[..., list[FrozenTrial]],
    mode: str,
) -> None:
    url = pooled(database_url, mode, SHARED if mode == "transaction" else 20)
    done = cli("launch", study_file(), "--workers", 3, env=environment | {"HPO_DATABASE_URL": url})
    assert done.returncode == 0, done.stderr
    assert_exact(trials(), 6)
    if mode == "transaction":
        assert left_on(url) == (set(), 0, 0)


def left_on(url: str) -> tuple[set[str], int, int]:
    """What is left on a pooler's connections: settings, prepared statements, locks of sessions."""
    asked = """SELECT ARRAY(SELECT name FROM pg_settings WHERE source = 'session'),
        (SELECT count(*) FROM pg_prepared_statements), (SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'
            AND database = (SELECT oid FROM pg_database WHERE datname = current_database())), pg_backend_pid()"""
    settings, prepared, locks = set[str](), 0, 0
    with ExitStack() as stack:  # each has one of the connections as long as its transaction lasts
        for _ in range(SHARED):
            cursor = stack.enter_context(closing(psycopg2.connect(url))).cursor()
            cursor.execute(asked)
            ((names, statements, held, _),) = cursor.fetchall()
            settings, prepared, locks = settings | set(names), prepared + statements, max(locks, held)
    return settings - OF_THE_POOLER - OF_THE_TRANSACTION, prepared, locks


def test_workers_that_are_killed_lose_nothing_behind_a_pooler(
    chaos: ModuleType, pooled: Pooled, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HPO_DATABASE_URL", pooled(embedded.start()))
    report = chaos.run(home, trials=24, count=3, every_s=1.5)
    assert report.faults() == []
    assert report.kills >= 2
    assert (report.stops, report.crashes) == (1, 1)


def test_reports_outlast_servers_that_crash_behind_a_pooler(
    chaos: ModuleType, pooled: Pooled, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who waits for nothing at that moment does not notice it."""
    url = pooled(embedded.start())
    with closing(trial_storage(url)) as storage:
        study_id = storage.create_new_study([StudyDirection.MAXIMIZE])
        trial_id = storage.create_new_trial(study_id)
        for step in range(5):
            storage.set_trial_intermediate_value(trial_id, step, step / 2)
            storage.session.flush()
            chaos.crash_postmaster()
            embedded.start()
        generation = storage.connection.generation
        storage.finish_trial(trial_id, TrialState.COMPLETE, [1.0])
        (trial,) = storage.get_all_trials(study_id)
        assert trial.intermediate_values == {step: step / 2 for step in range(5)}
        assert storage.connection.generation >= generation


@pytest.fixture
def home(short_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where an embedded server is that a test may crash."""
    monkeypatch.setenv("HPO_HOME", str(short_folder / "pooled"))
    monkeypatch.setenv("HPO_ARTIFACTS", str(tmp_path / "artifacts"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("HPO_DATABASE_URL", raising=False)
    yield tmp_path
    embedded.stop()
    shutil.rmtree(short_folder / "pooled")


@pytest.mark.parametrize("size", [1, SHARED])
def test_tables_are_made_once_by_many_at_once(pooled: Pooled, empty_database_url: str, size: int) -> None:
    url = pooled(empty_database_url, size=size)
    with ThreadPoolExecutor(8) as pool:
        for made in [pool.submit(migrate, url) for _ in range(8)]:
            made.result(120)
    with closing(Connection(url)) as connection:
        assert connection.execute("SELECT count(*) FROM hpo.revision, alembic_version, version_info") == [(1,)]


def test_who_serves_and_who_shows_work_through_a_pooler(
    environment: dict[str, str], address: str, data: Path, tmp_path: Path, cli: Cli
) -> None:
    through = environment | {"HPO_DATABASE_URL": address}
    with closing(Connection(address)) as connection:
        _, token = Access(connection).create("admin", "me")
    server = Server(through, free_port(), tmp_path / "service.log")
    server.start()
    try:
        with httpx.Client(
            base_url=server.url, headers={"Authorization": f"Bearer {token}"}, trust_env=False, timeout=60
        ) as client:
            key = upload(client, data)
            text = f'[study]\nname = "served"\ntrials = 2\n[data]\ntrain = "{key}"\n[train]\nepochs = 2\n'
            made = client.post("/v1/studies", content=text, headers={"Content-Type": "application/toml"})
            assert made.status_code == 201, made.text
            worked = cli("worker", "--study", "served", env=through)
            assert worked.returncode == 0, worked.stderr
            assert client.get("/v1/studies/served").json()["status"] == "finished"
            shown = client.post("/v1/models/served/1/predict", json={"sequences": [[[0.0, 0.0]] * 12]})
            assert shown.status_code == 200, shown.text
            assert client.delete("/v1/models/served/1").is_success
    finally:
        server.stop()
    port = free_port()
    command = [sys.executable, "-P", "-m", "hpo", "dashboard", "--port", str(port)]
    dashboard = subprocess.Popen(command, env=through, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: "served" in asked(f"http://127.0.0.1:{port}/api/studies"))
    finally:
        dashboard.send_signal(signal.SIGINT)
        dashboard.wait(30)
    assert left_on(address) == (set(), 0, 0)


def asked(url: str) -> str:
    try:
        return httpx.get(url, trust_env=False).text
    except httpx.TransportError:
        return ""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


def test_locks_hold_across_the_connections_of_a_pooler(address: str) -> None:
    inside, most = set[int](), 0
    guard = threading.Lock()

    def enter(number: int) -> None:
        nonlocal most
        with exclusively(address, "one at a time"):
            with guard:
                inside.add(number)
                most = max(most, len(inside))
            with guard:
                inside.discard(number)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(enter, range(16)))
    assert most == 1
    with closing(Connection(address)) as connection:
        first, second = Lock(connection, "a"), Lock(connection, "a")
        assert (first.take(), second.take(), first.take()) == (True, False, True)


def test_clients_see_their_own_settings_whatever_the_role_has(address: str, database_url: str) -> None:
    """Those of others, which a pooler leaves on its connections, change nothing either."""
    with closing(psycopg2.connect(address)) as other:
        other.autocommit = True
        for setting in ("extra_float_digits = -15", "bytea_output = escape", "search_path = nowhere"):
            other.cursor().execute(f"SET {setting}")
        database = database_url.rsplit("/", 1)[1]
        execute(database_url, f"ALTER DATABASE {database} SET default_transaction_read_only = on")
        with closing(trial_storage(address)) as storage:
            study_id = storage.create_new_study([StudyDirection.MINIMIZE])
            trial_id = storage.create_new_trial(study_id)
            storage.finish_trial(trial_id, TrialState.COMPLETE, [1 / 3])
            (trial,) = storage.get_all_trials(study_id)
            assert trial.value == 1 / 3
            (asked,) = storage.connection.execute("SELECT current_setting('bytea_output')")
            assert asked == ("hex",)
        cursor = other.cursor()
        cursor.execute("SHOW bytea_output")
        assert cursor.fetchall() in ([("escape",)], [("hex",)])  # which connection answers is the pooler's choice


def test_a_pooler_is_known_by_the_process_that_answers(address: str, database_url: str) -> None:
    with closing(Connection(address)) as through, closing(Connection(database_url)) as past:
        assert (through.execute("SELECT 1"), past.execute("SELECT 1")) == ([(1,)], [(1,)])
        assert (through.pooled, past.pooled) == (True, False)


def test_a_pooler_that_is_not_known_is_when_it_mixes_up_what_is_prepared(database_url: str) -> None:
    answer = Statement("answer", "SELECT %(number)s", {"number": "int"}, prepared=True)
    with closing(Connection(database_url)) as connection:
        assert connection.execute(answer, given={"number": 42}) == [(42,)]
        connection.execute("DEALLOCATE ALL")  # as another connection would know nothing of it
        assert connection.execute(answer, given={"number": 43}) == [(43,)]
        assert connection.pooled
        assert connection.execute("SELECT count(*) FROM pg_prepared_statements") == [(0,)]


def test_a_study_ends_exactly_with_more_clients_than_connections(address: str) -> None:
    """Eight clients, each with two connections to the pooler, and four to the server."""
    with closing(trial_storage(address)) as storage:
        study_id = storage.create_new_study([StudyDirection.MAXIMIZE])
        Leases(storage).open_study(study_id, Terms(budget=40), {})

        def work(number: int) -> int:
            done = 0
            with closing(trial_storage(address)) as own:
                leases = Leases(own)
                with suppress(StudyOver):
                    while True:
                        with leases.take(study_id, f"w{number}") as lease:
                            if lease is None:
                                continue
                            for step in range(5):
                                own.set_trial_intermediate_value(lease.trial_id, step, lease.number + step / 8)
                            leases.renew(lease.worker, {lease: lease.heartbeat.progress()})
                            own.finish_trial(lease.trial_id, TrialState.COMPLETE, [lease.number])
                            done += 1
            return done

        with ThreadPoolExecutor(8) as pool:
            assert sum(pool.map(work, range(8))) == 40
        found = storage.get_all_trials(study_id)
        assert_exact(found, 40)
        for trial in found:
            assert trial.intermediate_values == {step: trial.number + step / 8 for step in range(5)}
