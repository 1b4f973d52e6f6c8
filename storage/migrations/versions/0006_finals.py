"""The finals of a study: a study of its own, whose trials train the best configurations again."""

from alembic import op

revision = "0006"
down_revision = "0005"

COLUMNS = """
ALTER TABLE hpo.terms
    ADD finalists integer NOT NULL DEFAULT 0, -- configurations in the study's finals; 0: it has none
    ADD repeats integer NOT NULL DEFAULT 1 CHECK (repeats > 0), -- trainings of each
    ADD finals_of integer UNIQUE REFERENCES studies ON DELETE SET NULL; -- stopped, resumed and ended with that one
"""


def upgrade() -> None:
    op.execute(COLUMNS)


def downgrade() -> None:
    op.execute("ALTER TABLE hpo.terms DROP finalists, DROP repeats, DROP finals_of")
