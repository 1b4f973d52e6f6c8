"""`hpo.connect`: the service from Python, through restarts and lost connections."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import hpo
from hpo.client import Client
from tests.service.conftest import Service

pytestmark = pytest.mark.xdist_group("service-client")


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[Client]:
    with hpo.connect(service.url, service.token()) as made:
        yield made


def test_the_main_job(client: Client, service: Service, waves: Path, task: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "waves.npz").write_bytes(waves.read_bytes())
    (tmp_path / "waves.toml").write_text(task("waves", "waves.npz"))
    study = client.submit(tmp_path / "waves.toml")
    assert (study.name, study.status, study.owner, study.budget) == ("waves", "open", "ada", 2)
    assert client.submit(tmp_path / "waves.toml").name == "waves"
    with pytest.raises(hpo.ServiceError, match=r"train\.epochs: stored 2, file 3") as conflict:
        client.submit(tmp_path / "waves.toml", ["train.epochs=3"])
    assert conflict.value.status == 409
    with pytest.raises(hpo.ServiceError, match="study 'waves' is not over yet: it is open"):
        client.summary("waves")
    worker = threading.Thread(target=service.work, args=("waves",))
    worker.start()
    states = list(client.follow("waves"))
    worker.join(60)
    assert states[-1].status == "finished"
    summary = client.summary("waves")
    assert (summary["study"], summary["trials"]["complete"], summary["model"]["version"]) == ("waves", 2, 1)
    assert [trial.number for trial in client.trials("waves")] == [0, 1]
    (model,) = client.models()
    assert client.model("waves") == model
    local = hpo.load(client.download("waves", tmp_path / "model"))
    X = np.load(waves)["X"]
    expected = local.predict(X).probabilities
    np.testing.assert_allclose(client.predict("waves", waves).probabilities, expected, atol=1e-6)
    np.testing.assert_allclose(client.predict("waves", list(X[:2])).probabilities, expected[:2], atol=1e-6)
    with pytest.raises(hpo.ServiceError, match="is there already: name a new folder"):
        client.download("waves", tmp_path / "model")
    client.delete("waves")
    with pytest.raises(hpo.ServiceError, match="there is no study named 'waves'"):
        client.study("waves")


def test_a_data_file_alone_is_a_study_and_is_sent_once(client: Client, waves: Path, tmp_path: Path) -> None:
    file = tmp_path / "tides.npz"
    file.write_bytes(waves.read_bytes() + b"")
    first = client.upload(file)
    assert client.upload(file) == first
    assert client.submit(file, ["study.trials=1"]).name == "tides"
    assert client.stop("tides").status == "stopped"
    assert client.resume("tides", 3).budget == 3


def test_what_is_wrong_is_said(client: Client, service: Service, tmp_path: Path) -> None:
    with (
        hpo.connect(service.url, "hpo_nonsense") as stranger,
        pytest.raises(hpo.ServiceError, match="this token is not known") as error,
    ):
        stranger.models()
    assert error.value.status == 401
    with pytest.raises(hpo.ConfigError, match="no study file at"):
        client.submit(tmp_path / "nothing.toml")
    with pytest.raises(hpo.ConfigError, match=r"a study needs \[data\] train"):
        client.submit({"study": {"name": "x"}})
    with pytest.raises(hpo.ServiceError, match="the service wants a token"):
        hpo.connect(service.url)
    with (
        Client("http://127.0.0.1:9", "hpo_x", retry_s=0.1) as alone,
        pytest.raises(hpo.ServiceError, match="does not answer"),
    ):
        alone.models()


def test_a_client_needs_neither_torch_nor_optuna(service: Service) -> None:
    script = "import sys, hpo; hpo.connect('http://x', 'y'); print({'torch', 'optuna', 'fastapi'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, env=service.environment)
    assert done.stdout == "set()\n", done.stderr
