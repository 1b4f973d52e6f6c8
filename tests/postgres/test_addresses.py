"""Addresses as libpq writes them: its URLs and key=value strings, several hosts, sockets, services; and SQLAlchemy's.

libpq's manual, 32.1.1 "Connection Strings" and 32.1.1.3 "Specifying Multiple Hosts", and SQLAlchemy's "Specifying
multiple fallback hosts" of the psycopg2 dialect.
"""

from __future__ import annotations

import socket
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote
from uuid import uuid4

import optuna
import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st
from psycopg2.extensions import make_dsn, parse_dsn

import hpo
from hpo.storage.connection import connect_arguments
from hpo.storage.database import database_url, wait_ready
from hpo.storage.errors import PostgresError
from hpo.storage.url import normalized, parameters, without_password
from tests.conftest import Cli

PARTS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=8)


def read_by_sqlalchemy(url: str) -> dict[str, str]:
    """psycopg2's arguments as SQLAlchemy makes them of a URL."""
    found: Mapping[str, Any] = sa.make_url(url).get_dialect()().create_connect_args(sa.make_url(url))[1]
    return {key: str(value) for key, value in found.items() if str(value).strip(",")}


@pytest.fixture(autouse=True)
def _no_password_around(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PGPASSWORD", "HPO_DATABASE_PASSWORD_FILE", "PGSERVICE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("address", "url"),
    [
        ("postgresql://me:pw@db:5433/x?sslmode=require", "postgresql+psycopg2://me:pw@db:5433/x?sslmode=require"),
        ("postgres://db", "postgresql+psycopg2://db"),
        ("postgresql+psycopg2://db/x", "postgresql+psycopg2://db/x"),
        (
            "postgresql://h1:5432,h2:5433/x?target_session_attrs=read-write",
            "postgresql+psycopg2:///x?host=h1%2Ch2&port=5432%2C5433&target_session_attrs=read-write",
        ),
        ("postgresql://h1,h2/x", "postgresql+psycopg2:///x?host=h1%2Ch2"),
        ("host=h1,h2 port=5433 dbname=x", "postgresql+psycopg2:///x?host=h1%2Ch2&port=5433%2C5433"),
        ("postgresql+psycopg2:///x?host=h1:1&host=h2:2", "postgresql+psycopg2:///x?host=h1%2Ch2&port=1%2C2"),
        ("postgresql://%2Fvar%2Frun/x", "postgresql+psycopg2:///x?host=%2Fvar%2Frun"),
        ("postgresql://me@/x?host=/var/run&port=5433", "postgresql+psycopg2://me@/x?host=%2Fvar%2Frun&port=5433"),
        ("host=/var/run dbname='a b' user=me", "postgresql+psycopg2://me@/a%20b?host=%2Fvar%2Frun"),
        ("postgresql://[::1]:5433/x", "postgresql+psycopg2://[::1]:5433/x"),
        ("postgresql://[::1],[::2]/x", "postgresql+psycopg2:///x?host=%3A%3A1%2C%3A%3A2"),
        ("postgresql:///x", "postgresql+psycopg2:///x"),
        ("postgresql://", "postgresql+psycopg2://"),
        ("postgresql://:pw@db/x", "postgresql+psycopg2://:pw@db/x"),
        ("service=production", "postgresql+psycopg2://?service=production"),
        ("postgresql://?service=production", "postgresql+psycopg2://?service=production"),
        ("postgresql://db/x?ssl=true", "postgresql+psycopg2://db/x?sslmode=require"),
        ("postgresql://db/x?options=-c%20a%3Db", "postgresql+psycopg2://db/x?options=-c%20a%3Db"),
        ("postgresql+psycopg2://db/x?options=-c+a%3Db", "postgresql+psycopg2://db/x?options=-c%20a%3Db"),
    ],
)
def test_an_address_that_libpq_reads_is_accepted(address: str, url: str) -> None:
    assert normalized(address) == url
    assert normalized(url) == url
    expected = parameters(address)
    assert {**expected, "port": ""} == {**parameters(url), "port": ""}
    assert read_by_sqlalchemy(url) == parameters(url)
    assert connect_arguments(address).items() >= expected.items()


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("postgresql://db/x?nonsense=1", "invalid URI query parameter; write special characters"),
        ("host=db nonsense=1", "invalid connection option; write values in"),
        ("host=db password='x", "unterminated quoted string in connection info string; write values in"),
        ("postgresql://me:p@ss@db/x", "has an @ too many; write special characters of user and password as %XX"),
        ("postgresql://me:1/2@db/x", "has an @ too many; write special characters"),
        ("postgresql://me:50%@db/x", "invalid percent-encoded token; write special characters"),
        ("postgresql://me:secret", "has a port that is no number of 1 to 65535"),
        ("postgresql://db:70000/x", "has a port that is no number of 1 to 65535"),
        ("postgresql://db:0/x", "has a port that is no number of 1 to 65535"),
        ("host=h1,h2,h3 port=1,2", "has 2 ports for 3 hosts: give one for all, or one each"),
        ("postgresql://[::1/x", "is no address that libpq reads"),
        ("mysql://me:secret@db/x", "must be a PostgreSQL URL .* got 'mysql://…'; unset it"),
        ("db.example.org", "must be a PostgreSQL URL .* got 'db.example.org'; unset it"),
        ("me:secret@db", "must be a PostgreSQL URL .* got 12 characters; unset it"),
    ],
)
def test_what_libpq_does_not_read_is_refused_with_the_reason(
    address: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HPO_DATABASE_URL", address)
    with pytest.raises(PostgresError, match=f"HPO_DATABASE_URL.* {reason}") as raised:
        database_url()
    assert "secret" not in str(raised.value)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "user": PARTS,
            "password": PARTS,
            "dbname": PARTS,
            "host": st.sampled_from(["db", "h1,h2", "/var/run", "::1", "/a,b", "h,::1", "a_b.c-d", "fe80::1%eth0"]),
            "application_name": PARTS,
            "options": PARTS,
            "service": PARTS,
        },
    ),
    st.sampled_from(["", "5433"]),
)
def test_libpq_and_sqlalchemy_read_the_same_of_what_is_written(given: dict[str, str], port: str) -> None:
    if port:
        given["port"] = ",".join([port] * (1 + given.get("host", "").count(",")))
    url = normalized(make_dsn(**given)) if given else normalized("postgresql://")
    found = parameters(url)
    found.pop("password" if "password" not in given else "", None)
    assert found == given
    assert read_by_sqlalchemy(url) == parameters(url)
    assert parse_dsn(url.replace("+psycopg2", "", 1)) == parameters(url)
    kept = parameters(without_password(url))
    assert kept == {key: value for key, value in given.items() if key != "password"}


def test_a_password_goes_along_without_a_user_and_a_services_own_goes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLAlchemy drops a password where no user is named."""
    monkeypatch.setenv("PGPASSWORD", "from environment")
    assert read_by_sqlalchemy(normalized("postgresql://db/x"))["password"] == "from environment"
    assert "password" not in parameters(normalized("service=production"))
    (tmp_path / "secret").write_bytes("pässword\r\n".encode())
    monkeypatch.setenv("HPO_DATABASE_PASSWORD_FILE", str(tmp_path / "secret"))
    assert parameters(normalized("service=production"))["password"] == "pässword"


def test_reading_addresses_loads_no_client_library_before_there_is_one() -> None:
    code = "import sys, hpo.storage.url; sys.exit(bool({'psycopg2', 'sqlalchemy'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


# Against a real server


@pytest.fixture
def closed_port() -> int:
    with closing(socket.create_server(("127.0.0.1", 0))) as found:
        port: int = found.getsockname()[1]
    return port


@pytest.fixture
def relayed_socket(short_folder: Path, server: str) -> Iterator[Path]:
    """A folder with a socket as PostgreSQL's, which leads to the server: the embedded one listens on TCP alone."""
    given = parameters(server)
    folder = short_folder / f"socket-{uuid4().hex[:6]}"
    folder.mkdir()

    class Server(socketserver.ThreadingUnixStreamServer):
        daemon_threads, block_on_close = True, False  # pools keep connections open

    class Relay(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with socket.create_connection((given["host"], int(given["port"]))) as there:
                back = threading.Thread(target=copy_bytes, args=(there, self.request), daemon=True)
                back.start()
                copy_bytes(self.request, there)
                back.join()

    with Server(str(folder / f".s.PGSQL.{given['port']}"), Relay) as relay:
        threading.Thread(target=relay.serve_forever, args=(0.05,)).start()
        yield folder
        relay.shutdown()


def copy_bytes(source: socket.socket, target: socket.socket) -> None:
    """Until the source ends."""
    with suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    with suppress(OSError):
        target.shutdown(socket.SHUT_WR)


@pytest.fixture(
    params=["two hosts", "pairs", "pairs of two hosts", "socket", "socket in query", "service", "variables"]
)
def address(
    request: pytest.FixtureRequest,
    database_url: str,
    relayed_socket: Path,
    closed_port: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> str:
    """The test's database in another notation."""
    given = parameters(database_url)
    user, password, name = given["user"], given["password"], given["dbname"]
    host, port = given["host"], given["port"]
    userinfo = f"{user}:{quote(password, safe='')}"
    folder = str(relayed_socket)
    (tmp_path / "services").write_text(f"[mine]\nhost={host}\nport={port}\nuser={user}\npassword={password}\n")
    monkeypatch.setenv("PGSERVICEFILE", str(tmp_path / "services"))
    if request.param == "variables":
        for variable, value in {"PGHOST": host, "PGPORT": port, "PGUSER": user, "PGPASSWORD": password}.items():
            monkeypatch.setenv(variable, value)
    forms = {
        "two hosts": f"postgresql://{userinfo}@{host}:{closed_port},{host}:{port}/{name}?target_session_attrs=read-write",
        "pairs": make_dsn(**given),
        "pairs of two hosts": make_dsn(**given | {"host": f"{host},{host}", "port": f"{closed_port},{port}"}),
        "socket": f"postgresql://{userinfo}@{quote(folder, safe='')}:{port}/{name}",
        "socket in query": f"postgresql://{userinfo}@/{name}?host={folder}&port={port}",
        "service": f"service=mine dbname={name}",
        "variables": f"postgresql:///{name}",
    }
    return forms[request.param]


def test_a_study_lives_at_every_address(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through all that connects: libpq for us, SQLAlchemy for Optuna's tables and the migrations."""
    monkeypatch.setenv("HPO_DATABASE_URL", address)
    wait_ready(database_url(), 5)
    wait_ready(address, 5)
    for number, storage in enumerate((hpo.storage_for(), hpo.storage_for(address))):
        with closing(storage):
            study = optuna.create_study(study_name=f"s{number}", storage=storage)
            study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=1)
    plain = optuna.load_study(study_name="s0", storage=database_url())
    assert len(plain.trials) == 1


def test_an_empty_database_gets_its_tables_through_two_hosts(empty_database_url: str, closed_port: int) -> None:
    given = parameters(empty_database_url)
    hosts = {"host": f"{given['host']},{given['host']}", "port": f"{closed_port},{given['port']}"}
    with closing(hpo.storage_for(make_dsn(**given | hosts))) as storage:
        assert storage.get_all_studies() == []


def test_the_commands_take_an_address_of_pairs_and_show_no_password(
    cli: Cli, environment: dict[str, str], database_url: str, closed_port: int
) -> None:
    given = parameters(database_url)
    pairs = make_dsn(**given | {"host": f"{given['host']},{given['host']}", "port": f"{closed_port},{given['port']}"})
    here = environment | {"HPO_DATABASE_URL": pairs}
    shown = cli("db", "url", env=here)
    assert shown.returncode == 0, shown.stderr
    assert "hpo:***@" in shown.stdout
    assert given["password"] not in shown.stdout
    assert given["password"] in cli("db", "url", "--show-password", env=here).stdout
    assert cli("status", env=here).returncode == 0


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("postgresql://me:se@cret@127.0.0.1:1/x", "hpo: HPO_DATABASE_URL has an @ too many; "),
        ("postgresql://me:s%zecret@127.0.0.1:1/x", "hpo: HPO_DATABASE_URL is no address that libpq reads: "),
    ],
)
def test_a_malformed_address_is_one_line_without_its_password(
    cli: Cli, environment: dict[str, str], address: str, shown: str
) -> None:
    done = cli("status", env=environment | {"HPO_DATABASE_URL": address})
    assert done.returncode == 1
    assert done.stderr.startswith(shown)
    assert done.stderr.count("\n") == 1
    assert "cret" not in done.stdout + done.stderr
