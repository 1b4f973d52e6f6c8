"""Workers on a real Ray cluster: three nodes on this machine, their GPUs declared and masked out, nodes killed."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import psycopg2
import pytest
from optuna.trial import FrozenTrial
from sqlalchemy import make_url

from hpo.launcher.ray import Cluster, settings
from hpo.launcher.ray_import import ClusterError
from hpo.storage.artifacts import artifact_store
from hpo.storage.snapshot import WorkerRow
from hpo.storage.trials import trial_storage
from hpo.study.config import load
from hpo.study.lifecycle import OpenStudy, create_or_open
from tests.conftest import Cli, assert_exact, processes_of, reports_wait, wait_for

pytestmark = pytest.mark.xdist_group("ray")  # its tests share a cluster

Trials = Callable[..., list[FrozenTrial]]
Launched = Callable[..., subprocess.Popen[str]]
PATIENCE_S = 300.0  # a guard against hanging: a cluster takes minutes to come and go on busy cores
QUIET = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # loopback only
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_enable_worker_prestart": "0",
    "RAY_prestart_worker_first_driver": "0",
    "RAY_health_check_initial_delay_ms": "0",  # a dead node is noticed within a second
    "RAY_health_check_period_ms": "300",
    "RAY_health_check_failure_threshold": "3",
}
NODE = {"num_cpus": 1, "num_gpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}
PLACE = ("--cpus", "0.5", "--gpus", "0.75")  # one worker a node
MASKED = "99"  # the only GPU that the nodes may see, and there is no such one


@pytest.fixture(scope="module")
def nodes(server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A cluster of three nodes that know the database's password and nothing else of ours."""
    secret = tmp_path_factory.mktemp("secret") / "password"
    secret.write_text(str(make_url(server).password))
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("HPO_", "PG", "RAY_"))]:
            patch.delenv(name)
        for name, value in {**QUIET, "HPO_DATABASE_PASSWORD_FILE": str(secret), "CUDA_VISIBLE_DEVICES": MASKED}.items():
            patch.setenv(name, value)
        cluster_utils = pytest.importorskip("ray.cluster_utils")
        cluster = cluster_utils.Cluster(initialize_head=True, head_node_args=NODE)
        try:
            for _ in range(2):
                cluster.add_node(**NODE)
            yield cluster
        finally:
            cluster.shutdown()


@pytest.fixture
def ray_environment(environment: dict[str, str]) -> dict[str, str]:
    """Of a launcher."""
    kept = {name: value for name, value in environment.items() if not name.startswith(("RAY_", "CUDA_"))}
    return kept | QUIET


@pytest.fixture
def opened(
    study_file: Callable[..., Path], database_url: str, ray_environment: dict[str, str]
) -> Iterator[Callable[..., OpenStudy]]:
    """opened(trials=…, epochs=…) makes the study "waves", whose trials run all their epochs, its leases of 3 s."""
    storage = trial_storage(database_url)

    def make(trials: int, epochs: int) -> OpenStudy:
        file = study_file(trials=trials, epochs=epochs, study='pruner = "none"\nsampler = "random"\nlease = 3')
        file.write_text(file.read_text().replace("[train]", "[train]\npatience = 0"))
        return create_or_open(load(file), storage, artifact_store(ray_environment["HPO_ARTIFACTS"]))

    yield make
    storage.close()


@pytest.fixture
def launched(tmp_path: Path, ray_environment: dict[str, str]) -> Iterator[Launched]:
    """launched("--workers", 2, …) runs `hpo launch waves.toml --on ray …`; killed at the end if it still runs."""
    started = []

    def launch(*arguments: object) -> subprocess.Popen[str]:
        options = ["--on", "ray", "--json", *map(str, arguments)]
        command = [sys.executable, "-P", "-m", "hpo", "launch", "waves.toml", *options]
        pipe = subprocess.PIPE
        popen = subprocess.Popen(command, cwd=tmp_path, env=ray_environment, stdout=pipe, stderr=pipe, text=True)
        started.append(popen)
        return popen

    yield launch
    for popen in started:
        with popen:
            popen.kill()


def summary_of(popen: subprocess.Popen[str]) -> dict[str, Any]:
    output, errors = popen.communicate(timeout=PATIENCE_S)
    assert popen.returncode == 0, errors
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    return found


def workers(study: OpenStudy) -> dict[int, WorkerRow]:
    """Those that are alive, by process."""
    rows = study.leases.workers(study.study_id)
    return {row.pid: row for row in rows if row.pid and row.alive and psutil.pid_exists(row.pid)}


def at_work(study: OpenStudy) -> set[int]:
    """The processes that train."""
    busy = {trial.worker for trial in study.leases.snapshot(study.study_id).in_flight if trial.epoch and trial.alive}
    return {pid for pid, row in workers(study).items() if row.worker in busy}


def raylet(node: Any) -> int:
    pid: int = node.all_processes["raylet"][0].process.pid
    return pid


def on(node: Any, pids: set[int]) -> set[int]:
    return pids & {child.pid for child in psutil.Process(raylet(node)).children(recursive=True)}


def kill_node(cluster: Any, node: Any) -> None:
    """What runs on it is gone at once, as with the power."""
    for process in [*psutil.Process(raylet(node)).children(recursive=True), psutil.Process(raylet(node))]:
        process.kill()
    cluster.remove_node(node, allow_graceful=False)


def query(url: str, statement: str, *given: object) -> list[tuple[Any, ...]]:
    with closing(psycopg2.connect(url.replace("+psycopg2", ""))) as connection, connection.cursor() as cursor:
        connection.autocommit = True
        cursor.execute(statement, given)
        return cursor.fetchall()


def ended(study: OpenStudy) -> bool:
    return study.leases.snapshot(study.study_id).status == "finished"


def test_an_address_where_no_cluster_is_says_what_to_do(
    cli: Cli, study_file: Callable[..., Path], ray_environment: dict[str, str], tmp_path: Path
) -> None:
    """Before the other tests: once their cluster runs, `auto` finds it."""
    pytest.importorskip("ray")
    if any(process.info["name"] == "gcs_server" for process in psutil.process_iter(["name"])):
        pytest.skip("a Ray cluster runs on this machine, so `auto` finds it")
    given = ray_environment | {"RAY_TMPDIR": str(tmp_path)}  # where `auto` looks
    with socket.create_server(("127.0.0.1", 0)) as listener:
        nobody = f"127.0.0.1:{listener.getsockname()[1]}"
    for address in ("auto", nobody, f"ray://{nobody}"):
        done = cli("launch", study_file(), "--on", "ray", "--address", address, env=given)
        assert done.returncode == 1
        assert f"no Ray cluster at {address}" in done.stderr

    (tmp_path / "ray").mkdir(exist_ok=True)
    (tmp_path / "ray" / "ray_current_cluster").write_text(nobody)  # as a cluster leaves it that was killed
    done = cli("launch", study_file(), "--on", "ray", "--address", "auto", env=given)
    assert done.returncode == 1
    assert "no Ray cluster at auto" in done.stderr


def test_a_study_spreads_over_nodes_that_come_and_go(
    nodes: Any, opened: Callable[..., OpenStudy], launched: Launched, cli: Cli, trials: Trials, database_url: str
) -> None:
    study = opened(trials=6, epochs=5_000)  # trials last longer than a node needs to come
    launcher = launched("--address", nodes.address, *PLACE)
    victim, third = nodes.worker_nodes
    wait_for(lambda: all(len(on(node, at_work(study))) == 1 for node in (nodes.head_node, victim, third)), PATIENCE_S)

    (pid,) = on(victim, at_work(study))
    row = workers(study)[pid]
    assert row.device == "cpu"
    assert psutil.Process(pid).environ()["CUDA_VISIBLE_DEVICES"] == MASKED
    held = """SELECT number, checkpoint_epoch FROM hpo.leases JOIN trials USING (trial_id)
        WHERE worker = %s AND ended_at IS NULL AND checkpoint_epoch > 0"""
    found: list[Any] = []
    while not found:
        wait_for(lambda: query(database_url, held, row.worker) != [])
        with reports_wait(database_url):  # the trial may have ended by now
            if found := query(database_url, held, row.worker):
                kill_node(nodes, victim)
    ((number, epoch),) = found
    joined = [nodes.add_node(**NODE) for _ in range(2)]
    wait_for(lambda: all(on(node, set(workers(study))) for node in joined), PATIENCE_S)  # one replaced, one more

    assert summary_of(launcher)["trials"]["complete"] == 6
    assert_exact(trials(), 6)
    ended = "SELECT attempt FROM hpo.leases JOIN trials USING (trial_id) WHERE number = %s"
    assert query(database_url, ended, number) == [(2,)]
    logs = cli("logs", "waves", "--lines", 10_000)
    assert logs.returncode == 0, logs.stderr
    begun = sorted(int(first) for first in re.findall(rf"trial {number}: epoch (\d+),", logs.stdout))
    assert begun[0] == 1
    assert begun[1] > epoch  # it went on from its checkpoint
    password = str(make_url(database_url).password)
    written = Path(nodes.head_node.get_session_dir_path(), "logs").glob("*.*")
    assert not [path for path in written if password in path.read_text(errors="replace")]
    wait_for(lambda: workers(study) == {})


def test_the_next_launch_finds_the_workers_and_ctrl_c_ends_them(
    nodes: Any, opened: Callable[..., OpenStudy], launched: Launched, cli: Cli
) -> None:
    study = opened(trials=3, epochs=1_000_000)  # its trials do not end by themselves
    command = ("--address", nodes.address, "--workers", 1, *PLACE)
    first = launched(*command)
    wait_for(lambda: len(at_work(study)) == 1, PATIENCE_S)
    first.kill()
    (row,) = workers(study).values()
    logs = cli("logs", "waves", "--worker", row.worker, "--address", nodes.address)
    assert "trial 0: epoch 1," in logs.stdout, logs.stderr

    second = launched(*command)
    assert second.stderr is not None
    said = iter(second.stderr.readline, "")
    assert any("workers of an earlier launch, 1 in all, go on with its --slots" in line for line in said)
    assert any("0/3 trials" in line for line in said)
    second.send_signal(signal.SIGINT)
    _, errors = second.communicate(timeout=PATIENCE_S)
    assert second.returncode == 130, errors
    wait_for(lambda: workers(study) == {})
    assert [known.worker for known in study.leases.workers(study.study_id)] == [row.worker]  # no other was started
    state = study.leases.snapshot(study.study_id)
    assert [(trial.number, trial.alive) for trial in state.in_flight] == [(0, False)]  # given back


def test_ray_on_this_machine_alone_outlives_its_launcher_and_ends_with_the_study(
    opened: Callable[..., OpenStudy], launched: Launched, trials: Trials, ray_environment: dict[str, str]
) -> None:
    study, home = opened(trials=2, epochs=2_000), ray_environment["HPO_HOME"]
    launcher = launched("--cpus", 0.25)
    wait_for(lambda: len(at_work(study)) == 2, PATIENCE_S)
    listening = [c for process in processes_of(home) for c in process.net_connections() if c.status == "LISTEN"]
    assert {connection.laddr.ip.removeprefix("::ffff:") for connection in listening} == {"127.0.0.1"}
    launcher.kill()
    wait_for(lambda: ended(study), PATIENCE_S)
    wait_for(lambda: processes_of(home) == [])
    assert_exact(trials(), 2)
    assert len(study.leases.workers(study.study_id)) == 2  # not as many as fit: no more than trials


WITHOUT_RAY = "import sys; sys.modules['ray'] = None; from hpo.cli import main; main()"


def test_without_ray_the_extra_is_named(study_file: Callable[..., Path], ray_environment: dict[str, str]) -> None:
    command = [sys.executable, "-P", "-c", WITHOUT_RAY, "launch", str(study_file()), "--on", "ray"]
    done = subprocess.run(command, env=ray_environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "hpo: --on ray needs Ray: pip install 'hpo[ray]', on every node of the cluster\n"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"cpus": -1}, "--cpus must be at least 0, got -1"),
        ({"gpus": 2}, "--gpus must be between 0 and 1, as a worker trains on one GPU, got 2"),
        ({"cpus": 0}, "--cpus 0 needs a share of a GPU"),
        ({"cpus": float("nan")}, "--cpus must be at least 0, got nan"),
    ],
)
def test_what_no_worker_can_have_is_refused(given: dict[str, float], message: str) -> None:
    with pytest.raises(ClusterError, match=message):
        Cluster(**given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "url", ["postgresql://me:secret@db:5432/hpo", "postgresql://me@db/hpo?password=secret&sslmode=require"]
)
def test_what_actors_are_told_holds_no_password(url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HPO_HOME", str(tmp_path))
    monkeypatch.setenv("HPO_DATABASE_URL", url)
    monkeypatch.setenv("PGPASSWORD", "secret")
    told = settings()
    assert make_url(told["HPO_DATABASE_URL"]).host == "db"
    assert "secret" not in str(told)
    assert ("sslmode=require" in told["HPO_DATABASE_URL"]) == ("sslmode" in url)


def test_logs_of_another_machine_are_told_of_and_followed_ones_end_with_the_study(
    cli: Cli, study_file: Callable[..., Path], database_url: str
) -> None:
    assert cli("launch", study_file(trials=2, epochs=1), "--workers", 1, "--quiet").returncode == 0
    followed = cli("logs", "waves", "--follow")
    assert "study waves is over: budget" in followed.stdout
    query(database_url, "UPDATE hpo.workers SET host = 'far', log = '/logs/worker-far-3.log' RETURNING worker")
    there = cli("logs", "waves", "--worker", "worker-far-3")
    assert "not on this machine: read /logs/worker-far-3.log on far" in there.stdout
    unknown = cli("logs", "waves", "--worker", "worker-7")
    assert unknown.returncode == 1
    assert "has no log of worker 'worker-7'; logs: worker-0, worker-far-3" in unknown.stderr
