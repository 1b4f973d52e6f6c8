"""What `hpo db check` finds out about a database: whether it is there, fits, and lets this role do its work."""

from __future__ import annotations

from dataclasses import dataclass

from hpo.storage.connection import Connection
from hpo.storage.errors import PostgresError
from hpo.storage.statements import statement
from hpo.storage.tables import HEAD, revision

LEAST_VERSION = 130000  # of the server, as it counts: 13.0


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    what: str
    ok: bool
    detail: str  # what was found, and the way out where that is not right


def check(url: str) -> list[Finding]:
    """Everything up to the first thing without which the others cannot be looked at."""
    connection = Connection(url, retry_s=0.0)
    try:
        (version, role), *_ = connection.execute("SELECT current_setting('server_version_num')::int, current_user")
    except PostgresError as error:
        return [Finding("connection", False, str(error))]
    try:
        found = [Finding("connection", True, f"{connection.address} as {role}"), _server(version), _tables(connection)]
        return [*found, _rights(connection)] if found[-1].ok else found
    finally:
        connection.close()


def _server(version: int) -> Finding:
    name = f"PostgreSQL {version // 10000}.{version % 10000}"
    if version < LEAST_VERSION:
        return Finding("server", False, f"{name} is too old: at least {LEAST_VERSION // 10000} is needed")
    return Finding("server", True, name)


def _tables(connection: Connection) -> Finding:
    try:
        found = revision(connection)
    except PostgresError as error:
        return Finding("tables", False, str(error))
    if found is None:
        return Finding("tables", False, "none yet; `hpo db upgrade` makes them")
    if found > HEAD:
        return Finding("tables", False, f"at revision {found}, this code knows {HEAD}: upgrade hpo")
    if found < HEAD:
        return Finding(
            "tables", False, f"at revision {found}, this code needs {HEAD}; `hpo db upgrade` brings them there"
        )
    return Finding("tables", True, f"at revision {found}")


def _rights(connection: Connection) -> Finding:
    """What the role may do with the tables as a whole."""
    missing: dict[str, list[str]] = {"read": [], "write": []}
    for table, reads, writes in connection.execute(statement("rights")):
        for kind, has in (("read", reads), ("write", writes)):
            if not has:
                missing[kind].append(table)
    if missing["read"]:
        return Finding("this role may", False, f"not read {', '.join(missing['read'])}; README.md lists the rights")
    if missing["write"]:
        return Finding("this role may", True, "read studies and models, not work on them: README.md lists the rights")
    return Finding("this role may", True, "read, and work on studies")
