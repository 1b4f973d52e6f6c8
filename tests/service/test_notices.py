"""Notices by the real service and a real worker: they arrive, also where the service is killed in the middle."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hpo.storage.access import Access
from hpo.storage.connection import Connection
from hpo.storage.notices import LONGEST_S
from tests.conftest import execute, fresh_database
from tests.postgres.simulation import Clock
from tests.receiver import SECRET, Receiver, receiving
from tests.service.conftest import Service, environment_of, serving, upload

NOTIFY = '[notify]\nurl = "{url}"\n'


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as made:
        yield made


@pytest.fixture
def environment(server: str, template: str, tmp_path: Path) -> Iterator[dict[str, str]]:
    """Of a service that signs notices, with a database and a store of its own."""
    with fresh_database(server, template) as url:
        signing = {"HPO_NOTIFY_SECRET": SECRET, "HPO_NOTIFY_PRIVATE": "1"}
        yield {**environment_of(tmp_path, url), **signing}


@pytest.fixture
def submit(waves: Path, task: Callable[..., str], receiver: Receiver) -> Callable[[Service], None]:
    """submit(service) opens the study waves, which tells the receiver."""

    def submitted(service: Service) -> None:
        with service.client() as client:
            text = task("waves", upload(client, waves)) + NOTIFY.format(url=receiver.url)
            assert client.post("/v1/studies", content=text).status_code == 201

    return submitted


def test_a_study_tells_its_address_of_the_model_and_the_end(
    environment: dict[str, str], submit: Callable[[Service], None], receiver: Receiver, tmp_path: Path
) -> None:
    url = environment["HPO_DATABASE_URL"]
    with serving(environment) as address:
        service = Service(address, url, environment)
        submit(service)
        service.work("waves")
        found = {each.content["event"]: each.content for each in receiver.wait_for(2)}
        assert found.keys() == {"model.promotion", "study.end"}
        assert found["model.promotion"]["model"]["version"] == found["study.end"]["version"] == 1
        assert found["study.end"]["trials"]["complete"] == 2
        with service.client(owner="bob") as client:
            told = client.get("/v1/studies/waves/notices").json()
            assert client.get("/v1/studies/none/notices").status_code == 404
        assert {(each["event"], each["state"], each["attempts"]) for each in told} == {
            ("model.promotion", "delivered", 1),
            ("study.end", "delivered", 1),
        }
    stored = [path.read_bytes() for path in (tmp_path / "artifacts").iterdir() if path.is_file()]
    assert stored
    assert not any(b"hook?key=1" in content or SECRET.encode() in content for content in stored)
    connection = Connection(url)
    ((config,),) = connection.execute("SELECT config::text FROM hpo.terms")
    connection.close()
    assert "hook?key=1" not in config


def test_a_notice_arrives_although_its_sender_is_killed_in_the_middle(
    environment: dict[str, str],
    submit: Callable[[Service], None],
    receiver: Receiver,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url = environment["HPO_DATABASE_URL"]
    connection = Connection(url)
    Access(connection)
    clock = Clock(connection, monkeypatch)
    receiver.open.clear()
    command = [sys.executable, "-P", "-m", "hpo", "serve", "--port", "0"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address = process.stdout.readline().split()[2].rstrip("/,")
        service = Service(address, url, environment)
        submit(service)
        with service.client() as client:
            assert client.post("/v1/studies/waves/stop").status_code == 200
        receiver.wait_for(1)
        os.kill(process.pid, signal.SIGKILL)
    receiver.open.set()
    with serving(environment) as again:
        service = Service(again, url, environment)
        with service.client() as client:
            (waiting,) = client.get("/v1/studies/waves/notices").json()
            assert (waiting["state"], waiting["attempts"], waiting["fault"]) == ("waiting", 1, None)
            clock.advance(LONGEST_S)
            first, second = receiver.wait_for(2)
    assert first.headers["X-Hpo-Delivery"] == second.headers["X-Hpo-Delivery"]
    assert first.content == second.content
    connection.close()


def test_without_a_secret_the_service_says_so(
    environment: dict[str, str], submit: Callable[[Service], None], receiver: Receiver
) -> None:
    del environment["HPO_NOTIFY_SECRET"]
    command = [sys.executable, "-P", "-m", "hpo", "serve", "--port", "0"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, text=True, **pipes) as process:  # type: ignore[call-overload]
        address = process.stdout.readline().split()[2].rstrip("/,")
        service = Service(address, environment["HPO_DATABASE_URL"], environment)
        submit(service)
        execute(service.database_url, "UPDATE hpo.terms SET status = 'stopped'")
        line = next(line for line in process.stderr if "notices" in line)
        process.terminate()
        process.communicate(timeout=30)
    assert "1 notices wait to be sent: set HPO_NOTIFY_SECRET" in line
    assert receiver.requests == []
