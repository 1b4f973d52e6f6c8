"""[track] by real processes: a server of MLflow, TensorBoard's files, and what is killed or lost in between."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import psycopg2
import pytest
from optuna.trial import FrozenTrial, TrialState

from hpo.study.lifecycle import finals_name
from tests.conftest import SMALL, Cli, wait_for
from tests.processes.test_finals import FINALS, launch, summary

Study = Callable[..., Path]
Read = Callable[..., list[FrozenTrial]]
STATUS = {TrialState.COMPLETE: "FINISHED", TrialState.PRUNED: "KILLED", TrialState.FAIL: "FAILED"}
PLAIN = 'finalists = 0\npruner = "none"'
pytestmark = pytest.mark.xdist_group("track")  # they share a server


@pytest.fixture
def environment(environment: dict[str, str]) -> dict[str, str]:
    """Of a machine on which a server may be slow."""
    return {**environment, "MLFLOW_HTTP_REQUEST_TIMEOUT": "60"}


def track(**given: str) -> str:
    return "[track]\n" + "\n".join(f'{key} = "{value}"' for key, value in given.items()) + "\n"


def free_port() -> int:
    with closing(socket.create_server(("127.0.0.1", 0))) as found:
        port: int = found.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def mlflow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of MLflow's own server."""
    folder, port = tmp_path_factory.mktemp("mlflow"), free_port()
    settings = {
        "_MLFLOW_SERVER_FILE_STORE": f"sqlite:///{folder}/runs.db",
        "_MLFLOW_SERVER_ARTIFACT_ROOT": str(folder / "artifacts"),
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    command = [sys.executable, "-m", "waitress", f"--listen=127.0.0.1:{port}", "mlflow.server:app"]
    url = f"http://127.0.0.1:{port}"
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, env=os.environ | settings, stdout=log, stderr=log)
    try:
        wait_for(lambda: answers(url), 120)
        yield url
    finally:
        process.terminate()
        process.wait(30)


def answers(url: str) -> bool:
    with suppress(httpx.HTTPError):
        return httpx.get(f"{url}/health", trust_env=False).status_code == 200
    return False


class Between(ThreadingHTTPServer):
    """Passes requests on to a server. Some wait for good before that, of some the answer is lost."""

    daemon_threads = True

    def __init__(self, url: str) -> None:
        super().__init__(("127.0.0.1", 0), _Passing)
        self.port = int(url.rsplit(":", 1)[1])
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.held: str | None = None  # ends the paths that wait
        self.lost = dict[str, int]()  # ends paths, of which so many answers are lost
        self.reached, self.ended = threading.Event(), threading.Event()

    def loses(self, path: str) -> bool:
        for ending, count in self.lost.items():
            if path.endswith(ending) and count:
                self.lost[ending] = count - 1
                return True
        return False


class _Passing(BaseHTTPRequestHandler):
    server: Between
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.do_POST()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.partition("?")[0]
        if self.server.held is not None and path.endswith(self.server.held):
            self.server.reached.set()
            self.server.ended.wait()
            self.close_connection = True
            return
        with closing(HTTPConnection("127.0.0.1", self.server.port, timeout=60)) as server:
            kept = {name: value for name, value in self.headers.items() if name.lower() != "host"}
            server.request(self.command, self.path, body, kept)
            answer = server.getresponse()
            content = answer.read()
        if self.server.loses(path):
            self.close_connection = True
            return
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.headers["Content-Type"])
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def between(mlflow: str) -> Iterator[Between]:
    with Between(mlflow) as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield made
        made.ended.set()
        made.shutdown()


Runs = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def runs(mlflow: str, database_url: str) -> Runs:
    """runs(name) are the runs of a study of this test, or of its finals, by the trials' numbers; deleted ones too where
    that is asked for."""

    def read_runs(name: str = "waves", *, deleted: bool = False) -> list[dict[str, Any]]:
        key = rows(
            database_url, f"SELECT store_key FROM hpo.terms JOIN studies USING (study_id) WHERE study_name = '{name}'"
        )
        with httpx.Client(base_url=f"{mlflow}/api/2.0/mlflow", trust_env=False, timeout=60) as client:
            experiment = client.get("experiments/get-by-name", params={"experiment_name": "waves"}).json()
            if "experiment" not in experiment or not key:
                return []
            asked = {
                "experiment_ids": [experiment["experiment"]["experiment_id"]],
                "filter": f"tags.`hpo.key` LIKE '{key[0][0]}/%'",
                "run_view_type": "ALL" if deleted else "ACTIVE_ONLY",
                "max_results": 1000,
            }
            found = client.post("runs/search", json=asked).json().get("runs", [])
        for run in found:
            run["tags"] = pairs(run["data"]["tags"])
        return sorted(found, key=lambda run: int(run["tags"]["hpo.trial"]))

    return read_runs


def rows(url: str, query: str) -> list[tuple[Any, ...]]:
    with closing(psycopg2.connect(url.replace("+psycopg2", ""))) as connection, connection.cursor() as cursor:
        cursor.execute(query)
        return cursor.fetchall()


def pairs(listed: list[dict[str, Any]]) -> dict[str, Any]:
    return {each["key"]: each["value"] for each in listed}


def history(mlflow: str, run: dict[str, Any], name: str) -> dict[int, float]:
    """A metric by epoch; each epoch stands there once."""
    asked = {"run_id": run["info"]["run_id"], "metric_key": name}
    answer = httpx.get(f"{mlflow}/api/2.0/mlflow/metrics/get-history", params=asked, trust_env=False, timeout=60)
    points = answer.json().get("metrics", [])
    found = {int(point.get("step", 0)): float(point["value"]) for point in points}
    assert len(found) == len(points)
    return found


def assert_one_whole_run_each(mlflow: str, found: list[dict[str, Any]], own: list[FrozenTrial]) -> None:
    assert [int(run["tags"]["hpo.trial"]) for run in found] == [trial.number for trial in own]
    for run, trial in zip(found, own, strict=True):
        assert run["info"]["status"] == STATUS[trial.state]
        if "curve" in trial.user_attrs:
            curve = dict(enumerate(trial.user_attrs["curve"]["value"], 1))
            assert history(mlflow, run, "auroc") == pytest.approx(curve)


def workers_of(url: str) -> list[int]:
    return [pid for (pid,) in rows(url, "SELECT pid FROM hpo.workers")]


WILD = (
    SMALL.replace("high = 12", "high = 48")
    + 'bidirectional = false\noptimizer = "sgd"\ngradient_clip = 0.0\nlearning_rate = [0.01, 1e38]\n'
)
THREE_ENDS = """
[[enqueue]]
hidden_size = 4
learning_rate = 1e38
[[enqueue]]
hidden_size = 48
learning_rate = 0.01
[[enqueue]]
hidden_size = 4
learning_rate = 0.01
[[enqueue]]
hidden_size = 8
learning_rate = 0.01
[limits]
size_mb = 0.04
"""  # one diverges, one is too large, others complete


def test_every_trial_that_has_ended_is_a_run_with_all_that_is_known_of_it(
    cli: Cli, study_file: Study, trials: Read, mlflow: str, runs: Runs
) -> None:
    study_file(trials=4, space=WILD, study=FINALS, more=THREE_ENDS + track(mlflow=mlflow))
    found = launch(cli)
    own, finals = trials(), trials(finals_name("waves"))
    assert {trial.state for trial in own} == set(STATUS)
    assert_one_whole_run_each(mlflow, runs(), own)
    assert_one_whole_run_each(mlflow, runs(finals_name("waves")), finals)
    for run, trial in zip(runs(), own, strict=True):
        info, data, tags = run["info"], run["data"], run["tags"]
        assert info["run_name"] == f"trial-{trial.number:04d}"
        assert trial.datetime_start is not None
        assert trial.datetime_complete is not None
        assert info["start_time"] == int(1000 * trial.datetime_start.timestamp())
        assert info["end_time"] == int(1000 * trial.datetime_complete.timestamp())
        assert tags["hpo.study"] == "waves"
        assert tags["hpo.state"] == trial.state.name.lower()
        assert tags["hpo.device"] == "cpu"
        assert "hpo.finals" not in tags
        params = trial.user_attrs.get("params", trial.params)
        assert pairs(data["params"]) == {name: str(value) for name, value in params.items()}
        if trial.state == TrialState.FAIL:
            assert tags["hpo.failure"].startswith("Diverged: ")
        if trial.state == TrialState.COMPLETE:
            assert tags["hpo.seed"] == str(trial.user_attrs["seed"])
            assert tags["hpo.worker"] == trial.user_attrs["worker"]
            metrics = pairs(data["metrics"])
            assert metrics["value"] == pytest.approx(trial.value)
            assert metrics["best_epoch"] == trial.user_attrs["best_epoch"]
            for name in ("train_loss", "log_loss"):
                assert list(history(mlflow, run, name).values()) == pytest.approx(trial.user_attrs["curve"][name])
    assert {run["tags"]["hpo.finals"] for run in runs(finals_name("waves"))} == {"true"}
    models = {int(run["tags"]["hpo.trial"]): run["tags"].get("hpo.model") for run in runs()}
    best = found["best"]["number"]
    assert models == {trial.number: "waves/1" if trial.number == best else None for trial in own}
    cli("trials", "drop", "waves", best, "--reason", "by mistake")
    (gone,) = (run for run in runs() if "hpo.dropped" in run["tags"])
    assert (gone["tags"]["hpo.trial"], gone["tags"]["hpo.dropped"]) == (str(best), "by mistake")
    cli("trials", "restore", "waves", best)
    assert not [run for run in runs() if "hpo.dropped" in run["tags"]]
    other = next(trial.number for trial in own if trial.state == TrialState.COMPLETE and trial.number != best)
    cli("promote", "waves", "--trial", other)
    models = {int(run["tags"]["hpo.trial"]): run["tags"].get("hpo.model") for run in runs()}
    assert (models[best], models[other]) == ("waves/1", "waves/2")
    assert_one_whole_run_each(mlflow, runs(deleted=True), own)


READ = """
import json, sys
from pathlib import Path
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
found = {}
for folder in sorted({file.parent for file in Path(sys.argv[1]).rglob("*tfevents*")}):
    events = EventAccumulator(str(folder)).Reload()
    found[str(folder.relative_to(sys.argv[1]))] = {
        tag: {each.step: each.value for each in events.Scalars(tag)} for tag in events.Tags()["scalars"]
    } | {"plugins": sorted(events.summary_metadata)}
print(json.dumps(found))
"""


def boards(folder: Path) -> dict[str, Any]:
    """What TensorBoard reads in a folder, by run."""
    done = subprocess.run([sys.executable, "-c", READ, str(folder)], capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_tensorboard_has_a_run_for_each_trial_and_relative_folders_lie_beside_the_study_file(
    cli: Cli, study_file: Study, trials: Read, tmp_path: Path, environment: dict[str, str]
) -> None:
    study_file(trials=4, space=WILD, study=FINALS, more=THREE_ENDS + track(tensorboard="boards"))
    (tmp_path / "elsewhere").mkdir()
    summary(cli("launch", "../waves.toml", "--workers", 2, "--json", cwd=tmp_path / "elsewhere"))
    found = boards(tmp_path / "boards")
    expected = {f"waves/trial-{trial.number:04d}": trial for trial in trials()}
    expected |= {f"waves/finals/trial-{trial.number:04d}": trial for trial in trials(finals_name("waves"))}
    assert found.keys() == expected.keys()
    for name, trial in expected.items():
        assert "_hparams_/experiment" in found[name]["plugins"]
        for series, values in trial.user_attrs.get("curve", {}).items():
            read = found[name]["auroc" if series == "value" else series]
            assert read == {str(epoch): pytest.approx(value) for epoch, value in enumerate(values, 1)}
        if trial.state == TrialState.COMPLETE:
            assert found[name]["value"] == {"0": pytest.approx(trial.value)}
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "boards").rglob("*") if file.is_file()}
    assert len(files) == len(expected)  # nothing temporary is left
    cli("launch", "waves.toml", "--trials", 5, "--workers", 1)
    assert all(file.stat().st_mtime_ns == when for file, when in files.items())
    assert "waves/trial-0004" in boards(tmp_path / "boards")
    summary_before = boards(tmp_path / "boards")["waves/trial-0001"]
    assert cli("delete", "waves", "--yes").returncode == 0
    launch(cli, workers=1)  # another study of that name takes their place
    again = boards(tmp_path / "boards")
    assert again.keys() >= {f"waves/trial-{number:04d}" for number in range(4)}
    assert len(list((tmp_path / "boards/waves/trial-0001").iterdir())) == 1
    assert again["waves/trial-0001"].keys() == summary_before.keys()


def test_what_is_named_later_has_all_trials_and_what_is_named_no_more_no_later_ones(
    cli: Cli, study_file: Study, trials: Read, mlflow: str, runs: Runs, tmp_path: Path
) -> None:
    study_file(trials=2, study=PLAIN)
    launch(cli, workers=1)
    assert runs() == []
    study_file(trials=2, study=PLAIN, more=track(mlflow=mlflow, tensorboard="boards"))
    launch(cli, workers=1)
    assert_one_whole_run_each(mlflow, runs(), trials())
    study_file(trials=3, study=PLAIN, more=track(tensorboard="boards"))
    launch(cli, workers=1)
    assert len(runs()) == 2
    assert boards(tmp_path / "boards").keys() == {f"waves/trial-000{number}" for number in range(3)}
    study_file(trials=4, study=PLAIN)
    launch(cli, workers=1)
    assert len(boards(tmp_path / "boards")) == 3


def test_runs_are_in_a_file_of_sqlite_too(cli: Cli, study_file: Study, tmp_path: Path) -> None:
    import sqlite3

    study_file(trials=3, study=PLAIN, more=track(mlflow="sqlite:///tracked/runs.db"))
    launch(cli)
    with closing(sqlite3.connect(tmp_path / "tracked/runs.db")) as connection:
        found = connection.execute("SELECT name, status FROM runs ORDER BY name").fetchall()
    assert found == [(f"trial-000{number}", "FINISHED") for number in range(3)]


@contextmanager
def launching(environment: dict[str, str], folder: Path, workers: int) -> Iterator[subprocess.Popen[str]]:
    command = [
        sys.executable,
        "-P",
        "-m",
        "hpo",
        "launch",
        "waves.toml",
        "--workers",
        str(workers),
        "--json",
        "--quiet",
    ]
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


@pytest.mark.parametrize("place", ["runs/create", "runs/log-batch", "runs/update"])
def test_a_worker_that_is_killed_while_it_writes_leaves_one_run_a_trial(
    environment: dict[str, str],
    study_file: Study,
    trials: Read,
    mlflow: str,
    between: Between,
    runs: Runs,
    tmp_path: Path,
    database_url: str,
    place: str,
) -> None:
    study_file(trials=6, study=PLAIN, more=track(mlflow=between.url))
    between.held = place
    with launching(environment, tmp_path, 2) as process:
        assert between.reached.wait(120)
        for pid in workers_of(database_url):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        between.held = None
        out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert json.loads(out.splitlines()[-1])["trials"]["complete"] == 6
    assert_one_whole_run_each(mlflow, runs(), trials())


def test_answers_that_are_lost_make_no_second_run(
    cli: Cli, study_file: Study, trials: Read, mlflow: str, between: Between, runs: Runs
) -> None:
    between.lost = {"runs/create": 3, "runs/log-batch": 1, "runs/update": 1}
    study_file(trials=4, study=PLAIN, more=track(mlflow=between.url))
    launch(cli)
    launch(cli)  # which writes what the first could not
    assert between.lost == {"runs/create": 0, "runs/log-batch": 0, "runs/update": 0}
    assert_one_whole_run_each(mlflow, runs(), trials())


def test_of_many_workers_and_slots_each_trial_is_one_run(
    environment: dict[str, str], study_file: Study, trials: Read, mlflow: str, runs: Runs, tmp_path: Path, cli: Cli
) -> None:
    study_file(trials=10, epochs=1, study=PLAIN, more=track(mlflow=mlflow))
    assert cli("launch", "waves.toml", "--detach").returncode == 0
    command = [sys.executable, "-P", "-m", "hpo", "worker", "--study", "waves", "--slots", "2"]
    started = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    for process in started:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    assert_one_whole_run_each(mlflow, runs(deleted=True), trials())  # without a launch that writes the last ones


@pytest.fixture(params=["silent", "refused"])
def nowhere(request: pytest.FixtureRequest) -> Iterator[str]:
    """A server that takes connections and never answers, or that is not there."""
    if request.param == "refused":
        yield f"http://127.0.0.1:{free_port()}"
        return
    with closing(socket.create_server(("127.0.0.1", 0))) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def test_a_server_that_is_away_fails_no_trial_and_is_one_warning(
    cli: Cli,
    study_file: Study,
    trials: Read,
    mlflow: str,
    runs: Runs,
    nowhere: str,
    environment: dict[str, str],
    tmp_path: Path,
) -> None:
    del environment["MLFLOW_HTTP_REQUEST_TIMEOUT"]
    study_file(trials=6, study=PLAIN, more=track(mlflow=nowhere, tensorboard="boards"))
    done = cli("launch", "waves.toml", "--workers", 1, "--json", "--quiet")
    assert summary(done)["trials"]["complete"] == 6
    warning = "study waves: runs cannot be written to [track] mlflow, which is tried again: "
    assert done.stderr.count(warning) == 1, done.stderr
    log = Path(environment["HPO_HOME"], "logs", "waves", "worker-0.log").read_text()
    assert log.count(warning) == log.count("WARNING") == 1
    assert len(boards(tmp_path / "boards")) == 6
    study_file(trials=6, study=PLAIN, more=track(mlflow=mlflow))
    launch(cli)
    assert_one_whole_run_each(mlflow, runs(), trials())


WITHOUT = "import sys; sys.modules['mlflow'] = None; from hpo.cli import main; main()"


def test_a_launch_without_the_extra_says_what_to_install_and_a_worker_goes_on_with_a_warning(
    cli: Cli, study_file: Study, trials: Read, mlflow: str, runs: Runs, environment: dict[str, str], tmp_path: Path
) -> None:
    study_file(trials=3, study=PLAIN, more=track(mlflow=mlflow))

    def without(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-P", "-c", WITHOUT, *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)

    refused = without("launch", "waves.toml")
    assert refused.returncode == 1
    assert refused.stderr.splitlines()[-1] == (
        "hpo: [track] mlflow needs a library that is not installed: pip install 'hpo[track]', on every machine with "
        "workers; or leave mlflow out of the study file"
    )
    assert cli("launch", "waves.toml", "--detach").returncode == 0
    worked = without("worker", "--study", "waves")
    assert worked.returncode == 0, worked.stderr
    assert worked.stderr.count("pip install 'hpo[track]'; other workers write what they can") == 1
    assert runs() == []
    launch(cli, workers=1)
    assert_one_whole_run_each(mlflow, runs(), trials())
