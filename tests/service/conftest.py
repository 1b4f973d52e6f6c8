"""A real service for the tests of a file: `hpo serve` as a process, on a database and a store of its own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import pytest

from hpo.storage.access import Access
from hpo.storage.artifacts import FolderStore
from hpo.storage.registry import Registry, publish
from tests.browser import browser, chromium
from tests.conftest import fresh_database

__all__ = ["browser", "chromium"]  # fixtures

TASK = """
[study]
name = "{name}"
trials = {trials}
sampler = "random"
pruner = "none"
[data]
train = "{key}"
validation = 0.25
[train]
epochs = 2
[space]
hidden_size = {{ low = 4, high = 12, step = 4 }}
layers = 1
batch_size = 16
head_size = 4
"""


def publish_model(service: Service, name: str, folder: Path, trial: int = 0) -> int:
    """Register a saved model as the next version of a name, as a promotion does; its number."""
    store = FolderStore(Path(service.environment["HPO_ARTIFACTS"]))
    given = {"study_id": 1, "study_name": name, "scores": {}, "config": {"params": {}}}
    registry = Registry(service.database_url)
    keys = publish(store, folder, f"model-{name}")
    return registry.promote(name, trial_number=trial, artifacts=keys, **given).version  # type: ignore[arg-type]


@dataclass(frozen=True)
class Service:
    """A running service, and what stands behind it."""

    url: str
    database_url: str
    environment: dict[str, str]

    def client(self, role: str = "submit", owner: str = "ada") -> httpx.Client:
        """An HTTP client that knows nothing of the project, with a token."""
        return self.with_token(self.token(role, owner))

    def token(self, role: str = "submit", owner: str = "ada") -> str:
        return Access(self.database_url).create(role, owner)[1]

    def with_token(self, token: str | None) -> httpx.Client:
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60, trust_env=False)

    def work(self, study: str) -> None:
        """A real worker, until the study is over and promoted."""
        command = [sys.executable, "-P", "-m", "hpo", "worker", "--study", study]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr


def environment_of(folder: Path, database_url: str) -> dict[str, str]:
    outside = ("HPO_", "PG", "COV", "PYTEST_", "XDG_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(outside)}
    own = {"HPO_HOME": str(folder / "home"), "HPO_ARTIFACTS": str(folder / "artifacts"), "HPO_DEVICE": "cpu"}
    return {**kept, **own, "HPO_DATABASE_URL": database_url, "OMP_NUM_THREADS": "1"}


@contextmanager
def serving(environment: dict[str, str], *options: str) -> Iterator[str]:
    """The URL of `hpo serve` while the block runs."""
    command = [sys.executable, "-P", "-m", "hpo", "serve", "--port", "0", *options]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("service at http://"), line
            yield line.split()[2].rstrip("/,")
        finally:
            process.terminate()
            assert process.wait(30) == 0


@pytest.fixture(scope="module")
def service(server: str, template: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("service")
    with fresh_database(server, template) as url:
        environment = environment_of(folder, url)
        with serving(environment) as address:
            yield Service(address, url, environment)


@pytest.fixture(scope="session")
def waves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 noisy sines of two frequencies."""
    random = np.random.default_rng(0)
    slow = np.arange(60) % 2 == 0
    steps = np.arange(12)
    X = np.sin(steps * np.where(slow, 0.5, 1.1)[:, None] + random.uniform(0, 6, 60)[:, None])
    path = tmp_path_factory.mktemp("data") / "waves.npz"
    np.savez(path, X=X[:, :, None] + 0.1 * random.normal(size=(60, 12, 1)), y=np.where(slow, "slow", "fast"))
    return path


@pytest.fixture(scope="session")
def task() -> Callable[..., str]:
    """task(name, key, trials) is a study file."""

    def write(name: str, key: str, trials: int = 2) -> str:
        return TASK.format(name=name, key=key, trials=trials)

    return write


@pytest.fixture
def free_port() -> int:
    """One that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module")
def two_free_ports() -> list[int]:
    """Two that were free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        return [int(each.getsockname()[1]) for each in (one, other)]


def upload(client: httpx.Client, path: Path, **columns: str) -> str:
    """The key of a data file."""
    with path.open("rb") as file:
        answer = client.post("/v1/data", files={"file": (path.name, file)}, params=columns)
    assert answer.status_code == 201, answer.text
    return str(answer.json()["key"])
