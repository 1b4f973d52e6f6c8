"""Creates and upgrades the tables: Optuna's, and ours beside them in the schema `hpo` (see migrations/versions).

No name of ours is one of Optuna's: for a database user called hpo, PostgreSQL looks into schema `hpo` first.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import psycopg2
import sqlalchemy as sa
from optuna.exceptions import OptunaError
from optuna.storages import RDBStorage
from sqlalchemy.exc import DBAPIError, IntegrityError, ProgrammingError

from hpo.storage.connection import Connection
from hpo.storage.errors import DatabaseRefusal, SchemaError

HEAD = "0008"  # the revision in migrations/versions that this code is written for
LOCK = 0x68706F  # advisory lock of those who create or upgrade tables ("hpo")
DEADLINE_S = 20.0  # to create the tables of an empty database
LOOK_S = 0.05  # between two looks whether another process has done it
MIGRATIONS = Path(__file__).parent / "migrations"


def migrate(url: str, deadline_s: float = DEADLINE_S) -> None:
    """Create or upgrade Optuna's tables and ours, once; safe in any number of processes at once.

    One query when everything is up to date. deadline_s: what that may take. Raises SchemaError for tables newer than
    this code, and PostgresError where the database does not let us.
    """
    connection = Connection(url)
    try:
        ensure(connection, deadline_s)
    finally:
        connection.close()


def ensure(connection: Connection, deadline_s: float = DEADLINE_S) -> None:
    """`migrate` on a connection at hand; begins again after a lost one, as each step finds what was done."""
    if revision(connection) != HEAD:
        connection.with_retries(lambda _: _create(connection, deadline_s))
        connection.close()  # the next use opens another, which finds the tables where they are


def revision(connection: Connection) -> str | None:
    """The revision of our tables, None where there are none: one query."""
    try:
        rows = connection.execute("SELECT version_num FROM hpo.revision")
    except DatabaseRefusal as error:
        if isinstance(error.__cause__, psycopg2.errors.UndefinedTable):
            return None
        raise
    return str(rows[0][0]) if rows else None


def _create(connection: Connection, deadline_s: float) -> None:
    """Optuna's tables as Optuna makes them, then ours, by one process at a time. Raises psycopg2's errors."""
    found = revision(connection)
    if found is not None and found > HEAD:
        raise SchemaError(f"the database's tables are at revision {found}, this code knows {HEAD}: upgrade hpo")
    # One connection for all that Optuna does, which it would else use two of at once: a pooler may have no more.
    settings: dict[str, Any] = {"poolclass": sa.StaticPool, "creator": lambda: connection.lend(deadline_s)}
    engine = sa.create_engine("postgresql+psycopg2://", **settings)
    try:
        _optuna_tables(settings)
        with engine.connect() as alone:
            while not alone.scalar(sa.select(sa.func.pg_try_advisory_xact_lock(LOCK))):
                alone.rollback()
                time.sleep(LOOK_S)
            _upgrade(alone)  # where another process was first, nothing
            alone.commit()  # and with it the lock ends
    except (DBAPIError, OptunaError) as error:
        raise _cause(connection, error) from error
    finally:
        engine.dispose()


def _cause(connection: Connection, error: Exception) -> Exception:
    """The client library's error behind SQLAlchemy's or Optuna's, as `with_retries` knows it."""
    found = error if isinstance(error, DBAPIError) else error.__cause__
    if not isinstance(found, DBAPIError) or not isinstance(found.orig, psycopg2.Error):
        return error
    if found.orig.pgcode is None:  # no error of a statement: the connection was lost
        connection.close()
    return found.orig


def _optuna_tables(settings: dict[str, Any]) -> None:
    """Let Optuna create its own tables and version rows. Others may be doing so at this moment: what fails is then
    there, its tables at the first try, either version's row at a later one."""
    for tries_left in (3, 2, 1, 0):
        try:
            RDBStorage("postgresql+psycopg2://", engine_kwargs=settings).engine.dispose()
            return
        except (IntegrityError, ProgrammingError):
            if tries_left == 0:
                raise
        except RuntimeError as error:
            raise SchemaError(str(error)) from error


def _upgrade(connection: sa.Connection) -> None:
    from alembic import command
    from alembic.config import Config

    logging.getLogger("alembic").setLevel(logging.WARNING)
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    command.upgrade(config, HEAD)
