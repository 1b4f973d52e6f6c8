"""Standing workers: any open study is theirs, a signal ends them whatever they hang in, a machine fetches data once."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import psycopg2
import pytest
from optuna.trial import FrozenTrial
from sqlalchemy import make_url

import hpo
from hpo.datasets import fetch_sequences
from hpo.launcher.forkserver import ForkedProcess, ForkServer
from hpo.models.data.canonical import fingerprint, save
from hpo.models.data.readers import read
from hpo.promote.versions import model_folder
from hpo.storage.artifacts import ArtifactError, artifact_store
from hpo.storage.keys import data_key
from hpo.storage.server import server as embedded
from hpo.storage.server.processes import server_processes
from hpo.storage.server.programs import candidates
from hpo.storage.trials import trial_storage
from hpo.study.lifecycle import delete_study
from tests.conftest import assert_exact, execute, wait_for

END_S = 10  # a worker that is asked to stop has so long


class Standing:
    """A worker process with its log."""

    def __init__(self, process: ForkedProcess | subprocess.Popen[bytes], log: Path) -> None:
        self.process, self.log_path = process, log

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    def has_said(self, *texts: str) -> bool:
        assert self.process.poll() is None, self.log
        return all(text in self.log for text in texts)

    def tell(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def ended(self, timeout_s: float = END_S) -> None:
        """In time and content."""
        assert self.process.wait(timeout_s) == 0, self.log
        assert "Traceback" not in self.log, self.log


Start = Callable[..., Standing]
Detach = Callable[..., None]


@pytest.fixture(scope="module")
def host() -> Iterator[ForkServer]:
    """What has imported everything: a worker forked from it is at work a moment later."""
    with ForkServer() as made:
        yield made


@pytest.fixture
def start(host: ForkServer, environment: dict[str, str], tmp_path: Path) -> Iterator[Start]:
    """start(study, HPO_HOME=…) starts a standing worker; what still runs at the end is killed."""
    started: list[Standing] = []

    def begin(study: str | None = None, **settings: str) -> Standing:
        index = len(started)
        log = tmp_path / f"worker-{index}.log"
        log.touch()
        forked = host.fork(index, log, environment | settings, {"study": study, "slots": 1})
        started.append(worker := Standing(forked, log))
        wait_for(lambda: forked.poll() is None and forked.pid is not None and "ready after" in worker.log)
        return worker

    yield begin
    for worker in started:
        worker.process.kill()
        worker.process.wait(END_S)


@pytest.fixture
def detached(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Detach:
    """detached(file, "study.name=other", HPO_ARTIFACTS=…) creates a study for standing workers."""

    def create(file: Path, *overrides: str, **settings: str) -> None:
        for name, value in (environment | settings).items():
            if name.startswith(("HPO_", "AWS_")):
                monkeypatch.setenv(name, value)
        hpo.launch(file, overrides=overrides, detach=True)

    return create


@pytest.fixture
def endless(study_file: Callable[..., Path]) -> Path:
    """A study of trials that end when somebody ends them."""
    return study_file(trials=1, epochs=100_000, study='pruner = "none"\nlease = 60', train="patience = 0")


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """A real S3 server in a process of its own: the settings that lead to it, its process, its access log."""
    import boto3

    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    log = tmp_path_factory.mktemp("s3") / "access.log"
    with log.open("wb") as output:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        popen = subprocess.Popen(command, stdout=output, stderr=output)
    names = {"AWS_ACCESS_KEY_ID": "somebody", "AWS_SECRET_ACCESS_KEY": "a-secret", "AWS_DEFAULT_REGION": "us-east-1"}
    settings = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", **names}
    wait_for(lambda: b"Running on" in log.read_bytes())
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket="studies")
    yield SimpleNamespace(settings=settings, process=psutil.Process(popen.pid), log=log)
    popen.kill()
    popen.wait()


def rows(url: str, query: str) -> list[tuple[Any, ...]]:
    with closing(psycopg2.connect(url.replace("+psycopg2", ""))) as connection, connection.cursor() as cursor:
        cursor.execute(query)
        return cursor.fetchall()


def promoted(url: str) -> list[str]:
    """The name of each version of a model."""
    return [name for (name,) in rows(url, "SELECT name FROM hpo.models ORDER BY name")]


def held(url: str, column: str = "worker") -> Any:
    """A column of the one lease, None before there is one."""
    found = rows(url, f"SELECT {column} FROM hpo.leases")
    return found[0][0] if found else None


# ------------------------------------------------------------------------------------------------------ what it serves


def test_four_workers_are_shared_by_three_studies_of_two_owners(
    start: Start, detached: Detach, endless: Path, database_url: str
) -> None:
    """Each owner has two of them; hers go by priority, and beyond what a study allows to the next one."""
    for name, priority, most in (("old", 0, 4), ("urgent", 1, 1), ("his", 0, 4)):
        settings = (f"study.priority={priority}", f"study.max_workers={most}", "study.trials=4")
        detached(endless, f"study.name={name}", *settings)
    owner = "CASE study_name WHEN 'his' THEN 'bob' ELSE 'ada' END FROM studies n WHERE n.study_id = terms.study_id"
    execute(database_url, f"UPDATE hpo.terms SET owner = {owner}")
    workers = [start() for _ in range(4)]
    shares = "SELECT study_name, count(*) FROM hpo.leases JOIN studies USING (study_id) GROUP BY 1 ORDER BY 1"
    wait_for(lambda: sum(count for _, count in rows(database_url, shares)) == 4)
    assert rows(database_url, shares) == [("his", 2), ("old", 1), ("urgent", 1)]
    for worker in workers:
        worker.tell()
    for worker in workers:
        worker.ended()


def test_a_standing_worker_serves_every_open_study_and_those_that_come(
    start: Start,
    detached: Detach,
    study_file: Callable[..., Path],
    environment: dict[str, str],
    database_url: str,
    trials: Callable[..., list[FrozenTrial]],
    tmp_path: Path,
) -> None:
    file = study_file(trials=2, epochs=2)
    for name in ("one", "two"):
        detached(file, f"study.name={name}")
    worker = start()
    command = [sys.executable, "-P", "-m", "hpo", "worker", "--study", "two"]
    with (tmp_path / "named.log").open("wb") as log:
        named = Standing(subprocess.Popen(command, env=environment, stdout=log, stderr=log), tmp_path / "named.log")
    wait_for(lambda: worker.has_said("study one is over"))
    detached(file, "study.name=three")
    wait_for(lambda: promoted(database_url) == ["one", "three", "two"])
    named.ended(60)  # its study is over
    worker.tell()
    worker.ended()
    for name in ("one", "two", "three"):
        assert_exact(trials(name), 2)
    assert "study one" not in named.log
    assert "study three" not in named.log


def test_a_study_that_cannot_be_worked_on_does_not_keep_a_worker_from_the_others(
    start: Start,
    detached: Detach,
    study_file: Callable[..., Path],
    environment: dict[str, str],
    endless: Path,
    database_url: str,
    trials: Callable[..., list[FrozenTrial]],
    tmp_path: Path,
) -> None:
    detached(endless, "study.name=gone")
    file = study_file(trials=1, epochs=1)
    detached(file, "study.name=newer")
    execute(database_url, "UPDATE hpo.terms SET config = config || '{\"moons\": 2}' WHERE study_id = 2")
    detached(file, "study.name=fine")
    arrays = dict(np.load(tmp_path / "waves.npz"))
    np.savez(tmp_path / "waves.npz", **{name: value[:50] for name, value in arrays.items()})
    detached(file, "study.name=blind")
    key = rows(database_url, "SELECT config ->> 'train' FROM hpo.terms WHERE study_id = 4")[0][0]
    artifact = Path(environment["HPO_ARTIFACTS"]) / key
    content = artifact.read_bytes()
    artifact.unlink()

    worker = start()
    wait_for(lambda: worker.has_said("trial 0: epoch 1"))
    with closing(trial_storage(database_url)) as storage:
        delete_study(storage, artifact_store(), "gone")
    wait_for(lambda: worker.has_said("study blind is set aside: a data set is not in"))
    artifact.write_bytes(content)
    wait_for(lambda: promoted(database_url) == ["blind", "fine"])
    worker.tell()
    worker.ended()
    assert worker.log.count("study blind is set aside") == 1
    assert worker.log.count("study newer is set aside: study 'newer' was made by another version of hpo") == 1
    assert_exact(trials("fine"), 1)
    assert trials("newer") == []


def test_a_worker_without_a_study_still_counts_as_alive(start: Start, database_url: str) -> None:
    worker = start()
    execute(database_url, "UPDATE hpo.workers SET seen_at = seen_at - interval '1 day'")
    wait_for(lambda: rows(database_url, "SELECT seen_at > now() - interval '1 h' FROM hpo.workers") == [(True,)])
    worker.tell()
    worker.ended()


# --------------------------------------------------------------------------------------------------------- told to end


def test_a_trial_given_back_goes_on_in_another_worker_long_before_its_lease_ends(
    start: Start, detached: Detach, endless: Path, database_url: str
) -> None:
    detached(endless)
    first = start()
    wait_for(lambda: held(database_url, "checkpoint_epoch") is not None)
    second = start()
    first.tell()
    first.ended()
    wait_for(lambda: held(database_url, "attempt") == 2 and held(database_url, "epoch > checkpoint_epoch"))
    assert held(database_url, "lost") == 0  # given back, not run out
    (began,) = (line for line in second.log.splitlines() if "trial 0: epoch" in line)
    assert "trial 0: epoch 1," not in began
    second.tell()
    second.ended()
    steps = [step for (step,) in rows(database_url, "SELECT step FROM trial_intermediate_values ORDER BY step")]
    assert steps == list(range(1, len(steps) + 1))
    assert rows(database_url, "SELECT count(*) FROM hpo.workers WHERE stopped_at IS NULL") == [(0,)]


def test_a_signal_ends_workers_that_hang_in_the_store_and_frees_the_trial(
    start: Start, detached: Detach, endless: Path, database_url: str, s3: SimpleNamespace, tmp_path: Path
) -> None:
    settings = s3.settings | {"HPO_ARTIFACTS": "s3://studies/hanging"}
    detached(endless, "study.trials=2", **settings)
    training = start(**settings)
    wait_for(lambda: held(database_url, "checkpoint_epoch") is not None)
    s3.process.suspend()
    try:
        fetching = start(**settings, HPO_HOME=str(tmp_path / "elsewhere"))
        wait_for(lambda: list((tmp_path / "elsewhere").glob("cache/.*.part")) != [])
        for worker in (training, fetching):
            worker.tell()
        for worker in (training, fetching):
            worker.ended()
    finally:
        s3.process.resume()
    assert rows(database_url, "SELECT attempt, lost, released FROM hpo.leases") == [(1, 0, True)]
    assert list(tmp_path.glob("*/ended/*")) == []  # they could give back everything: no note says that they could not


def test_a_signal_ends_a_worker_that_promotes_and_the_next_one_promotes_at_once(
    start: Start, detached: Detach, study_file: Callable[..., Path], database_url: str
) -> None:
    detached(study_file(trials=1, epochs=1))
    waiting = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
    plain = database_url.replace("+psycopg2", "")
    with closing(psycopg2.connect(plain)) as other, other.cursor() as cursor:
        cursor.execute("SELECT pg_advisory_lock(hashtextextended('hpo.models waves', 0))")  # another promotion's
        worker = start()
        wait_for(lambda: rows(database_url, waiting) == [(1,)])
        worker.tell()
        worker.ended()
    assert rows(database_url, "SELECT promoter, promoted_version FROM hpo.terms") == [(None, None)]
    start("waves").ended(60)
    assert promoted(database_url) == ["waves"]


@pytest.fixture
def own_server(short_folder: Path) -> Iterator[SimpleNamespace]:
    """A server that a test may freeze and stop."""

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HPO_HOME", str(short_folder / "frozen"))
        patch.delenv("HPO_DATABASE_URL", raising=False)
        url = embedded.start()
        data = embedded.status().data
    assert data is not None

    def each(action: str) -> None:
        for pid in server_processes(data):
            with suppress(psutil.NoSuchProcess):
                getattr(psutil.Process(pid), action)()

    def stop() -> None:
        each("resume")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("HPO_HOME", str(short_folder / "frozen"))
            embedded.stop()

    yield SimpleNamespace(url=url, each=each, stop=stop)
    stop()


def test_a_signal_ends_workers_whose_database_hangs_or_is_gone(
    start: Start, detached: Detach, endless: Path, own_server: SimpleNamespace
) -> None:
    url = {"HPO_DATABASE_URL": own_server.url}
    detached(endless, "study.trials=2", **url)
    workers = [start(**url) for _ in range(3)]
    wait_for(lambda: rows(own_server.url, "SELECT count(*) FROM hpo.leases WHERE epoch > 1") == [(2,)])
    own_server.each("suspend")
    hanging, *bereft = workers
    hanging.tell()
    hanging.ended()
    own_server.stop()
    for worker in bereft:
        wait_for(lambda worker=worker: worker.has_said("does not answer, trying again"))  # type: ignore[misc]
        worker.tell()
    for worker in bereft:
        worker.ended()
    assert not any(str(make_url(own_server.url).password) in worker.log for worker in workers)


# --------------------------------------------------------------------------------------------------- one copy a machine

FETCH = """
import os, sys
from hpo.datasets import fetch_sequences
from hpo.storage.artifacts import artifact_store
go, gone = os.pipe()
for _ in range(2):
    if os.fork() == 0:
        os.close(gone)
        store = artifact_store()
        os.read(go, 1)
        os._exit(fetch_sequences(store, sys.argv[1]).n)
os.close(gone)
print([os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(2)])
"""


def test_processes_of_one_machine_fetch_a_data_set_once_and_hash_it_once(
    environment: dict[str, str], tmp_path: Path, s3: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.savez(tmp_path / "large.npz", X=np.zeros((60, 20_000, 1), np.float32), y=np.arange(60) % 2)
    sequences, whole = read(tmp_path / "large.npz"), tmp_path / "large"
    save(sequences, whole)
    key = data_key(fingerprint(sequences))
    settings = environment | s3.settings | {"HPO_ARTIFACTS": "s3://studies/once"}
    for name, value in settings.items():
        if name.startswith(("AWS_", "HPO_")):
            monkeypatch.setenv(name, value)
    store = artifact_store()
    store.put(key, whole)

    def gets() -> int:
        access: str = s3.log.read_text()
        return access.count(f'"GET /studies/once/{key}')

    two = subprocess.run([sys.executable, "-P", "-c", FETCH, key], env=settings, capture_output=True, text=True)
    assert two.stdout == "[60, 60]\n", two.stderr
    assert gets() == 1
    before = psutil.Process().io_counters().read_chars
    assert fetch_sequences(store, key).n == 60
    assert psutil.Process().io_counters().read_chars - before < 2**20 < whole.stat().st_size  # mapped, not read
    cached = Path(environment["HPO_HOME"]) / "cache" / key
    times = cached.stat()
    with cached.open("r+b") as file:  # damaged, of the same size, and dated back
        file.seek(-4, os.SEEK_END)
        file.write(b"oops")
    os.utime(cached, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert fetch_sequences(store, key).n == 60
    assert cached.read_bytes() == whole.read_bytes()
    assert gets() == 2


def test_data_that_is_not_what_its_name_says_is_refused_and_not_kept(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HPO_HOME", environment["HPO_HOME"])
    store = artifact_store(environment["HPO_ARTIFACTS"])
    key = f"data-{'0' * 64}.safetensors"
    store.put(key, b"something else")
    for _ in range(2):
        with pytest.raises(ArtifactError, match=rf"{key} does not have the content that its name says"):
            fetch_sequences(store, key)
    left = {path.name for path in (Path(environment["HPO_HOME"]) / "cache").iterdir()}
    assert left == {f"{key}.lock"}


# -------------------------------------------------------------------------------------------------- backup and restore


@pytest.fixture
def restored_url(server: str, template: str) -> Iterator[str]:
    """Another database, in which somebody was quick to make the tables."""
    execute(server, f"CREATE DATABASE hpo_restored TEMPLATE {template}")
    yield f"{server.rsplit('/', 1)[0]}/hpo_restored"
    execute(server, "DROP DATABASE hpo_restored WITH (FORCE)")


def test_a_dump_and_then_a_copy_of_the_artifacts_restore_models_studies_and_trials_in_flight(
    start: Start,
    detached: Detach,
    study_file: Callable[..., Path],
    endless: Path,
    environment: dict[str, str],
    database_url: str,
    restored_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = endless.read_text()
    detached(study_file(trials=1, epochs=1), "study.name=done")
    endless.write_text(text)
    detached(endless, "study.lease=2")
    worker = start()
    wait_for(lambda: rows(database_url, "SELECT 1 FROM hpo.leases WHERE checkpoint_epoch > 1") == [(1,)])
    worker.process.kill()

    def program(name: str, url: str, *options: object) -> None:
        parts = make_url(url)
        address = {"PGHOST": parts.host, "PGPORT": str(parts.port), "PGUSER": parts.username}
        settings = {**os.environ, **address, "PGPASSWORD": str(parts.password)}
        command = [next(candidates()) / name, "--dbname", parts.database, *options]
        subprocess.run(list(map(str, command)), env=settings, check=True, capture_output=True)  # type: ignore[arg-type]

    program("pg_dump", database_url, "--format=custom", "--file", tmp_path / "hpo.dump")
    shutil.copytree(environment["HPO_ARTIFACTS"], tmp_path / "copy")
    program("pg_restore", restored_url, "--clean", "--if-exists", "--no-owner", tmp_path / "hpo.dump")

    settings = {
        "HPO_DATABASE_URL": restored_url,
        "HPO_ARTIFACTS": str(tmp_path / "copy"),
        "HPO_HOME": str(tmp_path / "other"),
    }
    again = start(**settings)
    query = "SELECT 1 FROM hpo.leases WHERE attempt = 2 AND epoch > checkpoint_epoch"
    wait_for(lambda: rows(restored_url, query) == [(1,)])
    again.tell()
    again.ended()
    (began,) = (line for line in again.log.splitlines() if "trial 0: epoch" in line)
    assert "trial 0: epoch 1," not in began
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert model_folder("done", None).joinpath("model.safetensors").is_file()
