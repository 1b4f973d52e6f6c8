"""Creates and upgrades the tables: Optuna's, and ours beside them in the schema `hpo` (see migrations/versions).

No name of ours is one of Optuna's: for a database user called hpo, PostgreSQL looks into schema `hpo` first.
"""

from __future__ import annotations

import logging
from pathlib import Path

import psycopg2
import sqlalchemy as sa
from optuna.storages import RDBStorage
from sqlalchemy.exc import IntegrityError, ProgrammingError

from hpo.storage.connection import Connection
from hpo.storage.errors import DatabaseRefusal, SchemaError

HEAD = "0002"  # the revision in migrations/versions that this code is written for
LOCK = 0x68706F  # advisory lock of those who create or upgrade tables ("hpo")
MIGRATIONS = Path(__file__).parent / "migrations"


def migrate(url: str) -> None:
    """Create or upgrade Optuna's tables and ours, once; safe in any number of processes at once.

    One query when everything is up to date. Raises SchemaError for tables newer than this code.
    """
    connection = Connection(url)
    try:
        ensure(connection)
    finally:
        connection.close()


def ensure(connection: Connection) -> None:
    """`migrate` on a connection at hand."""
    if _revision(connection) != HEAD:
        _create(connection)


def _revision(connection: Connection) -> str | None:
    """The revision of our tables, None where there are none: one query."""
    try:
        rows = connection.execute("SELECT version_num FROM hpo.revision")
    except DatabaseRefusal as error:
        if isinstance(error.__cause__, psycopg2.errors.UndefinedTable):
            return None
        raise
    return str(rows[0][0]) if rows else None


def _create(connection: Connection) -> None:
    """Under the advisory lock: Optuna's tables as Optuna makes them, then ours."""
    url = sa.make_url(connection.url).set(drivername="postgresql+psycopg2")
    engine = sa.create_engine(url, poolclass=sa.NullPool)
    with engine.connect() as locked:
        locked.execute(sa.select(sa.func.pg_advisory_lock(LOCK)))
        locked.commit()
        revision = _revision(connection)
        if revision == HEAD:
            return
        if revision is not None and revision > HEAD:
            raise SchemaError(f"the database's tables are at revision {revision}, this code knows {HEAD}: upgrade hpo")
        _optuna_tables(url.render_as_string(hide_password=False))
        _upgrade(locked)


def _optuna_tables(url: str) -> None:
    """Let Optuna create its own tables and version rows; a plain script may be doing so at this moment."""
    for last in (False, False, True):
        try:
            RDBStorage(url, engine_kwargs={"poolclass": sa.NullPool})
            return
        except (IntegrityError, ProgrammingError):
            if last:
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
