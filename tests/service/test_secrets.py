"""A token's secret stands nowhere but in its holder's hands: not in logs, command lines, files or the database."""

from __future__ import annotations

import base64
import json
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import psycopg2
import pytest

from hpo.storage.access import Access
from tests.conftest import execute
from tests.service.conftest import Service, environment_of
from tests.service.processes import Server, command_lines

pytestmark = pytest.mark.xdist_group("service-secrets")


def rows(database_url: str) -> Iterator[tuple[str, str]]:
    """(table, row as text) of every row of every table; bytes as hexadecimal digits."""
    with closing(psycopg2.connect(database_url.replace("+psycopg2", ""))) as connection:
        cursor = connection.cursor()
        cursor.execute(
            "SELECT table_schema, table_name FROM information_schema.tables "
            "WHERE table_type = 'BASE TABLE' AND table_schema NOT IN ('pg_catalog', 'information_schema')"
        )
        for schema, table in cursor.fetchall():
            cursor.execute(f'SELECT t::text FROM "{schema}"."{table}" t')
            for (text,) in cursor.fetchall():
                yield f"{schema}.{table}", text


@dataclass
class Commands:
    """`hpo` in a folder and an environment; what it printed, on both streams, is kept."""

    folder: Path
    environment: dict[str, str]
    printed: list[str] = field(default_factory=list)

    def run(self, *arguments: str, token: str | None = None) -> str:
        environment = self.environment if token is None else {**self.environment, "HPO_TOKEN": token}
        command = [sys.executable, "-P", "-m", "hpo", *arguments]
        done = subprocess.run(
            command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        self.printed += [done.stdout, done.stderr]
        return done.stdout


def test_a_whole_study_leaves_no_credential(
    database_url: str, short_folder: Path, waves: Path, task: Callable[..., str], tmp_path: Path, free_port: int
) -> None:
    environment = environment_of(tmp_path, database_url)
    running = Server(environment, free_port, tmp_path / "server.log")
    running.start()
    with command_lines() as seen:
        secrets, printed = _drive(Service(running.url, database_url, environment), waves, task, tmp_path)
    running.stop()
    texts = {f"command line {line[:60]}": line for line in seen}
    texts |= {f"output {i}": text for i, text in enumerate(printed)}
    execute(database_url, "CHECKPOINT")  # what is in the tables is in their files
    texts |= {f"row {i} of {table}": text for i, (table, text) in enumerate(rows(database_url))}
    files = [path for path in (*tmp_path.rglob("*"), *(short_folder / "server").rglob("*")) if path.is_file()]
    _check_it_would_be_found(secrets[0], seen, texts, files)
    for secret in secrets:
        for form in forms(secret.split("_", 2)[-1]):
            for where, text in texts.items():
                assert form not in text, where
            for path in files:
                assert form.encode() not in content(path), path


def _drive(service: Service, waves: Path, task: Callable[..., str], folder: Path) -> tuple[list[str], list[str]]:
    """A study from its data to its predictions, and all that goes wrong with tokens.

    Returns the tokens and cookies that it used, and what the commands printed.
    """
    access = Access(service.database_url)
    here = Commands(folder, service.environment)
    submit, admin = (here.run("token", "create", "--role", r, "--owner", "ada").strip() for r in ("submit", "admin"))
    here.printed.clear()  # the one time that it is shown
    revoked, wrong = service.token("admin"), f"hpo_{'0' * 12}_{'w' * 43}"
    access.revoke(access.holder(revoked).token_id)  # type: ignore[union-attr]
    there = folder / "elsewhere"
    there.mkdir()
    (there / "waves.npz").write_bytes(waves.read_bytes())
    (there / "waves.toml").write_text(task("waves", "waves.npz"))
    environment = {name: value for name, value in service.environment.items() if name != "HPO_DATABASE_URL"}
    environment |= {"HPO_HOME": str(there / "home"), "HPO_SERVER": service.url, "HPO_TOKEN": submit}
    client = Commands(there, environment)
    client.run("launch", "--detach", "waves.toml")
    work = [sys.executable, "-P", "-m", "hpo", "worker", "--study", "waves"]
    with (
        (folder / "worker.log").open("w") as log,
        subprocess.Popen(work, env={**service.environment, "HPO_TOKEN": submit}, stderr=log) as worker,
    ):
        assert json.loads(client.run("launch", "waves.toml", "--json").splitlines()[-1])["model"]["version"] == 1
        assert worker.wait(60) == 0
    client.run("promote", "waves", "--trial", "0", "--json")
    assert "60 predictions" in client.run("predict", "waves", "waves.npz", "--out", "p.csv")
    client.run("export", "waves", "--out", "model")
    client.run("stop", "waves")
    for token in (wrong, revoked):
        assert client.run("status", token=token) == ""
    here.run("audit")
    cookie = _mistakes(service, submit, [submit, admin, revoked, wrong])
    return [submit, admin, revoked, wrong, cookie], here.printed + client.printed


def _check_it_would_be_found(token: str, seen: set[str], texts: dict[str, str], files: list[Path]) -> None:
    """The search looked where a secret might be: what is not secret is there."""
    assert any("worker --study waves" in line for line in seen)
    assert any(token.split("_")[1] in text for where, text in texts.items() if where.startswith("row"))
    assert {"server.log", "worker.log", "model.safetensors", "PG_VERSION"} <= {path.name for path in files}
    assert any(token.split("_")[1].encode() in content(path) for path in files if "pg_wal" in path.parts)


def content(path: Path) -> bytes:
    """Of a file, unless the server has removed it meanwhile."""
    with suppress(FileNotFoundError):
        return path.read_bytes()
    return b""


def forms(secret: str) -> list[str]:
    """The secret as it is, and as tables or headers may hold it."""
    return [secret, secret.encode().hex(), base64.b64encode(secret.encode()).decode().rstrip("=")[:-1]]


def _mistakes(service: Service, token: str, tokens: list[str]) -> str:
    """Requests that carry a token where it does not belong; and the cookie of a session that is signed in as it should
    be."""
    with service.with_token(None) as nobody, service.with_token(token) as holder:
        for text in tokens:
            assert nobody.get("/v1/studies", params={"token": text}).status_code == 401
            assert nobody.get(f"/v1/studies/{text}").status_code == 401
            assert nobody.get("/v1/studies", headers={"Authorization": f"Basic {text}"}).status_code == 401
            assert nobody.get("/v1/studies", headers={"X-Token": text}).status_code == 401
            assert holder.delete(f"/v1/studies/{text}").status_code == 404
            assert holder.post("/v1/studies", content=f'{text} = 1\ndata = {{ train = "{text}" }}').status_code == 422
            assert holder.post("/v1/data", files={"file": (f"{text}.csv", b"t0,label\nx,a\n")}).status_code == 422
            for path in (f"/v1/studies/{text}", f"/v1/models/{text}/latest", f"/v1/nowhere/{text}", f"/{text}"):
                assert text.split("_", 2)[2] not in holder.get(path).text
        address = urlsplit(service.url)
        with socket.create_connection((address.hostname or "", address.port or 0), timeout=10) as connection:
            connection.sendall(f"GET /{token} nonsense\r\nAuthorization Bearer {token}\r\n\r\n".encode())
            assert b" 400 " in connection.recv(1000)
        origin = {"Origin": service.url}
        assert nobody.post("/login", data={"token": f"{token}x"}, headers=origin).status_code == 401
        assert nobody.post("/login", data={"token": token}, headers=origin).status_code == 303
        (cookie,) = nobody.cookies.values()
        assert nobody.get("/").status_code == 200
        return cookie
