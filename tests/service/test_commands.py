"""The commands where HPO_SERVER is set: no database, no store, the same output."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import hpo
from tests.conftest import wait_for
from tests.service.conftest import Service

pytestmark = pytest.mark.xdist_group("service-commands")


@pytest.fixture
def there(service: Service, tmp_path: Path, waves: Path, task: Callable[..., str]) -> Callable[..., list[str]]:
    """A folder with a study file, and the arguments of a process that knows the service alone."""
    (tmp_path / "waves.npz").write_bytes(waves.read_bytes())
    (tmp_path / "waves.toml").write_text(task("waves", "waves.npz"))
    return lambda *arguments: [sys.executable, "-P", "-m", "hpo", *map(str, arguments)]


@pytest.fixture
def environment(service: Service, tmp_path: Path) -> dict[str, str]:
    hidden = ("HPO_DATABASE_URL", "HPO_ARTIFACTS")
    kept = {name: value for name, value in service.environment.items() if name not in hidden}
    return {**kept, "HPO_HOME": str(tmp_path / "home"), "HPO_SERVER": service.url, "HPO_TOKEN": service.token()}


def test_the_main_job_from_another_machine(
    there: Callable[..., list[str]], environment: dict[str, str], service: Service, tmp_path: Path
) -> None:
    def run(*arguments: object) -> str:
        done = subprocess.run(
            there(*arguments), cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def work() -> None:
        with service.client() as client:
            wait_for(lambda: client.get("/v1/studies/waves").is_success)
        service.work("waves")

    worker = threading.Thread(target=work)
    worker.start()
    summary = json.loads(run("launch", "waves.toml", "--json").splitlines()[-1])
    worker.join()
    assert (summary["trials"]["complete"], summary["model"]["version"]) == (2, 1)
    (row,) = json.loads(run("status", "waves", "--json"))
    assert (row["status"], row["trials"]["complete"], row["best"]) == ("finished", 2, {
        "number": summary["best"]["number"], "value": summary["best"]["value"]
    })  # fmt: skip
    assert "waves" in run("status")
    assert 'DEBUG,"epoch 2: auroc' in run("logs", "waves", "--trial", "0")
    (model,) = json.loads(run("models", "--json"))
    assert (model["name"], model["version"], model["default"]) == ("waves", 1, True)
    assert "60 predictions in p.csv" in run("predict", "waves", "waves.npz", "--out", "p.csv")
    assert (tmp_path / "p.csv").read_text().startswith("id,predicted,probability_fast,probability_slow")
    run("export", "waves", "--out", "model")
    assert hpo.load(tmp_path / "model").config.classes == ("fast", "slow")
    assert "best is trial" in run("launch", "waves.toml")  # it is over: the same summary
    assert "is deleted" in run("delete", "waves", "--yes")
    assert not (tmp_path / "home" / "postgres").exists()  # no database of its own was started


def test_a_ctrl_c_leaves_the_study_there(
    there: Callable[..., list[str]], environment: dict[str, str], service: Service, tmp_path: Path
) -> None:
    command = there("launch", "waves.toml", "--set", "study.name=left")
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        process.stderr.readline()  # the study is followed
        os.kill(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert f"the study goes on at {service.url}: hpo status left; hpo stop left" in said
    with service.client() as client:
        assert client.get("/v1/studies/left").json()["status"] == "open"
    for arguments, expected in (
        (("launch", "waves.toml", "--workers", "2"), "the service of HPO_SERVER has workers of its own"),
        (("export", "left", "--out", "x", "--format", "onnx"), "export the model first"),
    ):
        done = subprocess.run(there(*arguments), cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 2
        assert expected in " ".join(done.stderr.split())
    wrong = {**environment, "HPO_TOKEN": "hpo_nonsense"}
    done = subprocess.run(there("status"), cwd=tmp_path, env=wrong, capture_output=True, text=True)
    assert (done.returncode, "this token is not known" in done.stderr) == (1, True)
