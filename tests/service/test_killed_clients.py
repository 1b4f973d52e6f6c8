"""A hundred clients that are killed at random moments while they submit, and repeat: one study each, and no litter."""

from __future__ import annotations

import multiprocessing
import random
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import numpy as np
import psycopg2
import pytest

from hpo.storage.keys import KEY, UPLOAD, UPLOADS
from tests.conftest import wait_for
from tests.service.conftest import Service, upload
from tests.service.processes import RESET, files_below
from tests.service.submitting import submit

pytestmark = pytest.mark.xdist_group("service-killed")

PROCESSES, SOCKETS = 80, 20
AT_ONCE = 8
BOUNDARY = "a-boundary-between-parts"

Kill = Callable[[int, Path], None]


def test_one_study_each(service: Service, task: Callable[..., str], tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.service.submitting"])
    token = service.token()
    for i in range(PROCESSES + SOCKETS):
        data = tmp_path / f"data{i}.csv"
        values = np.random.default_rng(i).normal(size=(40, 6)).round(3).tolist()
        rows = [",".join(map(str, [*row, "ab"[n % 2]])) for n, row in enumerate(values)]
        data.write_text("\n".join(["t0,t1,t2,t3,t4,t5,label", *rows]))
        data.with_suffix(".toml").write_text(task(f"study{i}", data.name))

    def client(study: Path) -> multiprocessing.process.BaseProcess:
        process = context.Process(target=submit, args=(service.url, token, study))
        process.start()
        return process

    began = time.monotonic()
    first = client(tmp_path / "data0.toml")
    first.join(60)
    whole_s = time.monotonic() - began

    def killed_processes(i: int) -> None:
        """Killed up to three times, then left alone."""
        moments = random.Random(i)
        for _ in range(moments.randint(1, 3)):
            process = client(tmp_path / f"data{i}.toml")
            process.join(moments.uniform(0, whole_s))
            process.kill()
            process.join()
        process = client(tmp_path / f"data{i}.toml")
        process.join(120)
        assert process.exitcode == 0

    def cut_connections(i: int) -> None:
        """The same over sockets that are reset, or closed, at a random byte; then with another client."""
        moments = random.Random(i)
        data = tmp_path / f"data{i}.csv"
        for _ in range(moments.randint(1, 3)):
            content = _upload_request(token, data)
            _send(service.url, content[: moments.randrange(len(content))], moments.random() < 0.5)
        with service.with_token(token) as http:
            tables = {"study": {"name": f"study{i}", "trials": 2}, "data": {"train": upload(http, data)}}
            request = http.build_request("POST", "/v1/studies", json=tables, headers={"Idempotency-Key": f"key{i}"})
            content = _raw(request)
            for _ in range(moments.randint(1, 3)):
                _send(service.url, content[: moments.randint(len(content) // 2, len(content))], moments.random() < 0.5)
            assert http.send(request).status_code in (200, 201)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        done = list(pool.map(killed_processes, range(PROCESSES)))
        done += pool.map(cut_connections, range(PROCESSES, PROCESSES + SOCKETS))
    assert len(done) == PROCESSES + SOCKETS
    _check_what_is_there(service)


def _check_what_is_there(service: Service) -> None:
    count = PROCESSES + SOCKETS
    names = {f"study{i}" for i in range(count)}
    with service.client("read") as client:
        found = client.get("/v1/studies", params={"limit": 1000}).json()
        assert {each["name"] for each in found} == names
        assert len(found) == count
        assert {(each["status"], each["owner"], each["budget"]) for each in found} == {("open", "ada", 2)}
    with closing(psycopg2.connect(service.database_url.replace("+psycopg2", ""))) as connection:
        cursor = connection.cursor()
        for what, expected in (
            ("studies", count),  # Optuna's, and none of them without terms
            ("hpo.terms JOIN studies USING (study_id)", count),
            ("hpo.submissions", count),
            ("trials", 0),
        ):
            cursor.execute(f"SELECT count(*) FROM {what}")
            assert cursor.fetchone() == (expected,), what
    artifacts, uploads = (Path(service.environment[name]) for name in ("HPO_ARTIFACTS", "HPO_HOME"))
    wait_for(lambda: all(UPLOAD.fullmatch(name) for name in files_below(uploads / "uploads")))  # copies, no parts
    stored = files_below(artifacts)
    assert all(KEY.fullmatch(name) for name in stored)
    assert len([name for name in stored if name.startswith(UPLOADS)]) == count
    assert len(stored) == 3 * count  # and the training and the test part of each study


def _upload_request(token: str, data: Path) -> bytes:
    headers = {"Authorization": f"Bearer {token}", "Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
    files = {"file": (data.name, data.read_bytes())}
    return _raw(httpx.Request("POST", "http://127.0.0.1/v1/data", headers=headers, files=files))


def _raw(request: httpx.Request) -> bytes:
    """A request as it goes over the wire."""
    head = b"".join(b"%s: %s\r\n" % pair for pair in request.headers.raw)
    return b"POST %s HTTP/1.1\r\n%s\r\n%s" % (request.url.raw_path, head, request.read())


def _send(url: str, content: bytes, reset: bool) -> None:
    """Send it and go, without a word or with a reset."""
    address = urlsplit(url)
    with socket.create_connection((address.hostname or "", address.port or 0)) as connection, suppress(OSError):
        connection.sendall(content)
        if reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
