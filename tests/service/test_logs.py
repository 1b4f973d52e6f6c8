"""The service's log: JSON that a program reads, without secrets, and a line a request."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from hpo.storage.access import Access
from tests.conftest import execute, fresh_database
from tests.service.conftest import Service, environment_of, upload


@dataclass
class Run:
    """A service, and what it has written to its standard error by its end."""

    service: Service
    log: str = ""

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.splitlines()]


@pytest.fixture
def logged(server: str, template: str, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """`with logged("--log-format", "json") as run:` has a service; run.log after the block."""
    with fresh_database(server, template) as url:
        Access(url).create("read", "first")  # or the log says that nobody has a token

        @contextmanager
        def running(*options: str, **more: str) -> Iterator[Run]:
            environment = {**environment_of(tmp_path, url), **more}
            command = [sys.executable, "-P", "-m", "hpo", "serve", "--port", "0", *options]
            with (
                (tmp_path / "log").open("w") as log,
                subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=log) as process,
            ):
                assert process.stdout is not None
                run = Run(Service(process.stdout.readline().split()[2].rstrip("/,"), url, environment))
                try:
                    yield run
                finally:
                    os.kill(process.pid, signal.SIGTERM)
                    process.wait(30)
                    run.log = (tmp_path / "log").read_text()

        yield running


def test_every_line_is_json_and_a_request_is_told_with_its_id(
    logged: Callable[..., Any], waves: Path, task: Callable[..., str]
) -> None:
    with logged(HPO_LOG_FORMAT="json") as run, run.service.client() as client:
        began = datetime.now(UTC).replace(microsecond=0)  # a line says milliseconds
        answer = client.get("/v1/studies?secret=1", headers={"X-Request-Id": "from-the-proxy.7"})
        assert answer.headers["x-request-id"] == "from-the-proxy.7"
        made_up = client.get("/v1/models/a%0Ab/1", headers={"X-Request-Id": "no\tid"}).headers["x-request-id"]
        assert len(made_up) == 32
        with run.service.with_token(None) as nobody:
            assert len(nobody.get("/v1/studies").headers["x-request-id"]) == 32
            assert nobody.get("/healthz").status_code == nobody.get("/metrics").status_code == 200
        client.post("/v1/studies", content=task("waves", upload(client, waves)))
    lines = run.lines()
    assert all({"time", "level", "logger", "message", "pid"} <= line.keys() for line in lines)
    told = [line for line in lines if line["logger"] == "hpo.requests"]
    keys = ("method", "route", "path", "status", "owner", "request_id")
    token_id = client.headers["Authorization"].split("_")[1]
    assert [[line.get(key) for key in keys] for line in told[:2]] == [
        ["GET", "/v1/studies", "/v1/studies", 200, "ada", "from-the-proxy.7"],
        ["GET", "none", "/v1/models/a\\nb/1", 400, None, made_up],
    ]
    assert told[0]["token_id"] == token_id
    assert told[0]["ms"] > 0
    assert all(began <= datetime.fromisoformat(line["time"]) <= datetime.now(UTC) for line in told)
    assert [line["status"] for line in told] == [200, 400, 401, 201, 201]  # probes are left out
    assert "owner" not in told[2]
    (read,) = [line for line in lines if line["message"].startswith("waves: training part")]
    assert read["request_id"] == told[-1]["request_id"]
    assert client.headers["Authorization"].split("_", 2)[2] not in run.log


def test_faults_and_tracebacks_are_one_line_without_secrets(logged: Callable[..., Any]) -> None:
    with logged("--log-format", "json", PGPASSWORD='quo"ted secret') as run, run.service.client() as client:
        execute(run.service.database_url, "ALTER TABLE hpo.terms RENAME TO gone")
        assert client.get("/v1/studies").status_code == 503
        execute(run.service.database_url, "ALTER TABLE hpo.gone RENAME TO terms")
        execute(run.service.database_url, "ALTER TABLE hpo.audit RENAME action TO acted")
        with httpx.Client(base_url=run.service.url, trust_env=False) as nobody:
            bad = "postgresql://me:the-password@db/x"
            assert nobody.get(f"/{bad}").status_code == 404
    lines = run.lines()
    (fault,) = [line for line in lines if line["level"] == "WARNING"]
    assert "hpo.terms" in fault["message"]
    assert fault["request_id"]
    assert "the-password" not in run.log
    assert "quo" not in run.log


def test_text_has_a_line_a_request_where_that_is_asked_for(logged: Callable[..., Any]) -> None:
    with logged("--log-requests") as run, run.service.client() as client:
        client.get("/v1/studies", headers={"X-Request-Id": "7"})
        client.get("/v1/studies/a%1B%5B31mb")
    first, second, *_ = run.log.splitlines()
    assert " INFO GET /v1/studies: 200 in " in first
    assert first.endswith(" ms, ada (" + client.headers["Authorization"].split("_")[1] + "), request 7")
    assert "/v1/studies/a\\x1b[31mb: 400" in second
    with logged() as run, run.service.client() as client:
        client.get("/v1/studies")
    assert run.log == ""


def test_an_error_that_ends_it_is_a_line_too(logged: Callable[..., Any], free_port: int, tmp_path: Path) -> None:
    with logged("--log-format", "json") as run:
        port = run.service.url.rsplit(":", 1)[1]
        command = [sys.executable, "-P", "-m", "hpo", "serve", "--port", port, "--log-format", "json"]
        done = subprocess.run(command, env=run.service.environment, capture_output=True, text=True)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1
    assert json.loads(line)["level"] == "ERROR"
    assert "the service cannot listen on" in json.loads(line)["message"]
    wrong = {**run.service.environment, "HPO_LOG_FORMAT": "xml"}
    done = subprocess.run([sys.executable, "-P", "-m", "hpo", "serve"], env=wrong, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "hpo: HPO_LOG_FORMAT must be one of text, json, got 'xml'\n")
