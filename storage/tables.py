"""Our own tables, in the schema `hpo` beside Optuna's, and the migration that creates both.

No name of ours is one of Optuna's: for a database user called hpo, PostgreSQL looks into schema `hpo` first.
"""

from __future__ import annotations

import logging
from pathlib import Path

import psycopg2
import sqlalchemy as sa
from optuna.storages import RDBStorage
from optuna.storages._rdb.models import StudyModel, TrialModel
from sqlalchemy.dialects.postgresql import JSONB, UUID
from sqlalchemy.exc import IntegrityError, ProgrammingError

from hpo.storage.connection import Connection

HEAD = "0001"  # the revision in migrations/versions that this code is written for
LOCK = 0x68706F  # advisory lock of those who create or upgrade tables ("hpo")
MIGRATIONS = Path(__file__).parent / "migrations"

metadata = sa.MetaData(schema="hpo")
_time = sa.DateTime(timezone=True)
_now = sa.func.now()


def _study(primary_key: bool = False) -> sa.Column[int]:
    to = sa.ForeignKey(StudyModel.__table__.c.study_id, ondelete="CASCADE")
    return sa.Column("study_id", sa.Integer, to, primary_key=primary_key, autoincrement=False, nullable=False)


terms = sa.Table(
    "terms",
    metadata,
    _study(primary_key=True),
    sa.Column("config", JSONB, nullable=False),
    sa.Column("budget", sa.Integer, nullable=False),  # trials to start, over all workers
    sa.Column("started", sa.Integer, nullable=False, server_default="0"),  # of them started under a lease
    sa.Column("timeout_s", sa.Double),
    sa.Column("opened_at", _time, nullable=False, server_default=_now),
    sa.Column("deadline", _time),  # no trial starts after it
    sa.Column("lease_s", sa.Double, nullable=False),
    sa.Column("stall_s", sa.Double, nullable=False),  # a lease without progress for so long is not renewed
    sa.Column("max_attempts", sa.Integer, nullable=False),
    sa.Column("status", sa.Text, nullable=False, server_default="open"),  # open stopped exhausted finished
    sa.Column("promoter", sa.Text),  # the worker that promotes the best trial
    sa.Column("promoter_expires_at", _time),
    sa.Column("promoted_version", sa.Integer),
)

leases = sa.Table(
    "leases",
    metadata,
    sa.Column(
        "trial_id",
        sa.Integer,
        sa.ForeignKey(TrialModel.__table__.c.trial_id, ondelete="CASCADE"),
        primary_key=True,
        autoincrement=False,
    ),
    _study(),
    sa.Column("worker", sa.Text, nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False, server_default="1"),  # fencing token, +1 an adoption
    sa.Column("lost", sa.Integer, nullable=False, server_default="0"),  # expiries without a release
    sa.Column("released", sa.Boolean, nullable=False, server_default=sa.false()),  # given back cleanly
    sa.Column("expires_at", _time, nullable=False),
    sa.Column("progress", sa.BigInteger, nullable=False, server_default="0"),  # batches trained
    sa.Column("progress_at", _time, nullable=False),  # when `progress` last changed
    sa.Column("epoch", sa.Integer),
    sa.Column("metric", sa.Double),
    sa.Column("device", sa.Text),
    sa.Column("checkpoint_key", sa.Text),  # the only checkpoint that may be read
    sa.Column("checkpoint_epoch", sa.Integer),  # the last step that it holds
    sa.Column("replaced_key", sa.Text),  # the checkpoint before it
    sa.Column("ended_at", _time),  # set with the trial's final state
    sa.Index("ix_leases_in_flight", "study_id", "expires_at", postgresql_where=sa.text("ended_at IS NULL")),
)

workers = sa.Table(
    "workers",
    metadata,
    sa.Column("worker", sa.Text, primary_key=True),
    sa.Column("study_id", sa.Integer),  # null: a standing worker of any study
    sa.Column("host", sa.Text),
    sa.Column("pid", sa.Integer),
    sa.Column("device", sa.Text),
    sa.Column("log", sa.Text),
    sa.Column("started_at", _time, nullable=False, server_default=_now),
    sa.Column("seen_at", _time, nullable=False, server_default=_now),
    sa.Column("stopped_at", _time),
)

# The last call of each client that must not happen twice, so that a retry after a lost connection sees it.
calls = sa.Table(
    "calls",
    metadata,
    sa.Column("client", UUID, primary_key=True),
    sa.Column("call", sa.BigInteger, nullable=False),
    sa.Column("result", sa.Integer),
    sa.Column("called_at", _time, nullable=False, server_default=_now),
)

models = sa.Table(
    "models",
    metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("version", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("study_id", sa.Integer),  # no foreign key: a model outlives its study
    sa.Column("study_name", sa.Text),
    sa.Column("trial_number", sa.Integer),
    sa.Column("created_at", _time, nullable=False, server_default=_now),
    sa.Column("scores", JSONB, nullable=False, server_default=sa.text("'{}'::jsonb")),
    sa.Column("config", JSONB, nullable=False, server_default=sa.text("'{}'::jsonb")),
    sa.Column("artifacts", JSONB, nullable=False, server_default=sa.text("'{}'::jsonb")),  # file -> key
)

aliases = sa.Table(
    "aliases",
    metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("alias", sa.Text, primary_key=True),
    sa.Column("version", sa.Integer, nullable=False),
    sa.ForeignKeyConstraint(  # an alias goes with its version
        ["name", "version"],
        ["hpo.models.name", "hpo.models.version"],
        ondelete="CASCADE",
        name="aliases_model",
    ),
)


class SchemaError(RuntimeError):
    """The database was made by another version of this package or of Optuna."""


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
        rows = connection.run("SELECT version_num FROM hpo.revision")
    except psycopg2.errors.UndefinedTable:
        return None
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
