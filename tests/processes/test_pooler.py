"""A pooler between workers and Postgres: pgbouncer, which keeps a connection for a session or for a transaction."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import psycopg2
import pytest
from optuna.trial import FrozenTrial
from sqlalchemy import make_url

from hpo.storage.connection import Connection
from hpo.storage.errors import DatabaseUnavailable
from hpo.storage.statements import Statement
from tests.conftest import Cli, assert_exact, wait_for

PROGRAM = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
CONFIG = """[databases]
{database} = host={host} port={port} user={user} password={password}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {listen}
unix_socket_dir =
auth_type = any
pool_mode = {mode}
default_pool_size = {size}
max_client_conn = 100
"""

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="pgbouncer is not installed")


@pytest.fixture
def pooled(database_url: str, short_folder: Path) -> Iterator[Callable[[str], str]]:
    """pooled("session") starts a pooler before the test's database and gives its address."""
    running: list[subprocess.Popen[bytes]] = []
    url = make_url(database_url)

    def start(mode: str) -> str:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        file = short_folder / "pgbouncer.ini"
        names = {"database": url.database, "host": url.host, "port": url.port, "user": url.username}
        file.write_text(
            CONFIG.format(
                **names, password=url.password, listen=port, mode=mode, size=1 if mode == "transaction" else 20
            )
        )
        file.chmod(0o644)
        as_other = ["-u", "nobody"] if os.getuid() == 0 else []  # it does not run as root
        running.append(subprocess.Popen([str(PROGRAM), "--quiet", *as_other, str(file)]))
        address = url.set(port=port, password="any", drivername="postgresql").render_as_string(hide_password=False)
        wait_for(lambda: answers(address))
        return address

    yield start
    for process in running:
        process.kill()
        process.wait()


def answers(url: str) -> bool:
    with suppress(psycopg2.OperationalError):
        psycopg2.connect(url).close()
        return True
    return False


def test_workers_run_a_study_through_a_pooler_that_keeps_sessions(
    cli: Cli,
    study_file: Callable[..., Path],
    environment: dict[str, str],
    pooled: Callable[[str], str],
    trials: Callable[..., list[FrozenTrial]],
) -> None:
    done = cli("launch", study_file(), "--workers", 2, env=environment | {"HPO_DATABASE_URL": pooled("session")})
    assert done.returncode == 0, done.stderr
    assert_exact(trials(), 6)


def test_a_pooler_that_mixes_transactions_is_named(pooled: Callable[[str], str]) -> None:
    url, answer = pooled("transaction"), Statement("answer", "SELECT %(number)s", {"number": "int"}, prepared=True)
    with closing(Connection(url)) as first, closing(Connection(url)) as second:
        assert first.execute(answer, given={"number": 42}) == [(42,)]
        with pytest.raises(DatabaseUnavailable, match="set its pool_mode to session"):
            second.execute(answer, given={"number": 42})
