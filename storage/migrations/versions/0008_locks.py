"""Locks as rows: a lock of a session is nobody's behind a pooler that shares sessions."""

from alembic import op

revision = "0008"
down_revision = "0007"

TABLES = """
CREATE TABLE hpo.locks (
    name text PRIMARY KEY,
    holder uuid NOT NULL,
    expires_at timestamptz NOT NULL -- unless its holder renews it
);
COMMENT ON TABLE hpo.locks IS 'what one process at a time does';
"""


def upgrade() -> None:
    op.execute(TABLES)


def downgrade() -> None:
    op.execute("DROP TABLE hpo.locks")
