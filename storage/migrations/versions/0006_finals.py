"""The finals of a study: a study of its own, whose trials train the best configurations again."""

from alembic import op

revision = "0006"
down_revision = "0005"

COLUMN = """
ALTER TABLE hpo.terms ADD COLUMN finals_of integer UNIQUE REFERENCES studies ON DELETE SET NULL;
COMMENT ON COLUMN hpo.terms.finals_of IS 'the study whose finals this one is: it is stopped, resumed and ended with it';
"""


def upgrade() -> None:
    op.execute(COLUMN)


def downgrade() -> None:
    op.execute("ALTER TABLE hpo.terms DROP COLUMN finals_of")
