"""A hundred clients that are killed at random moments while they submit, and repeat: one study each, and no litter."""

from __future__ import annotations

import json
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
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

pytestmark = pytest.mark.xdist_group("service-killed")

PROCESSES, SOCKETS = 80, 20
AT_ONCE = 8
BOUNDARY = "a-boundary-between-parts"


def test_one_study_each(service: Service, task: Callable[..., str], tmp_path: Path) -> None:
    token, count = service.token(), PROCESSES + SOCKETS
    for i in range(count):
        _write_study(tmp_path, i, task)
    *_, (_, whole_s) = _submit_with_kills(service, token, tmp_path, [0, 0], None)  # what one takes that is left alone
    with ThreadPoolExecutor(AT_ONCE) as pool:
        processes = [
            pool.submit(_submit_with_kills, service, token, tmp_path, range(first, PROCESSES, AT_ONCE), 2 * whole_s)
            for first in range(AT_ONCE)  # several at once take longer
        ]
        sockets = [pool.submit(_submit_with_cuts, service, token, tmp_path, i) for i in range(PROCESSES, count)]
    killed = [status == -signal.SIGKILL for each in processes for status, _ in each.result()]
    assert PROCESSES // 2 < sum(killed) < len(killed) - PROCESSES // 2
    for cut in sockets:
        cut.result()
    _check_what_is_there(service)


def _write_study(folder: Path, i: int, task: Callable[..., str]) -> None:
    values = np.random.default_rng(i).normal(size=(40, 6)).round(3).tolist()
    rows = [",".join(map(str, [*row, "ab"[n % 2]])) for n, row in enumerate(values)]
    (folder / f"data{i}.csv").write_text("\n".join(["t0,t1,t2,t3,t4,t5,label", *rows]))
    (folder / f"data{i}.toml").write_text(task(f"study{i}", f"data{i}.csv"))


def _submit_with_kills(
    service: Service, token: str, folder: Path, numbers: Iterable[int], longest_s: float | None
) -> list[tuple[int, float]]:
    """Each study by clients that are killed up to three times, within `longest_s`, then by one that is left alone.

    Returns the exit status of each client, and the seconds that it took.
    """
    done = []
    command = [sys.executable, "-m", "tests.service.submitting"]
    root = Path(__file__).resolve().parents[2]
    with subprocess.Popen(
        command, cwd=root, env=service.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as clients:
        assert clients.stdin is not None
        assert clients.stdout is not None
        for i in numbers:
            moments = random.Random(i)
            kills = [] if longest_s is None else [moments.uniform(0, longest_s) for _ in range(moments.randint(1, 3))]
            for kill_after_s in (*kills, None):
                began = time.monotonic()
                line = json.dumps([service.url, token, str(folder / f"data{i}.toml"), kill_after_s])
                clients.stdin.write(f"{line}\n")
                clients.stdin.flush()
                status = int(clients.stdout.readline())
                assert status in ((0,) if kill_after_s is None else (0, -signal.SIGKILL))
                done.append((status, time.monotonic() - began))
        clients.stdin.close()
    return done


def _submit_with_cuts(service: Service, token: str, folder: Path, i: int) -> None:
    """A study over connections that are reset, or closed, at a random byte; then over one that is not."""
    moments, data = random.Random(i), folder / f"data{i}.csv"
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
