"""A study that ends when its trials bring nothing more: after how many of them, and that it did."""

from alembic import op

revision = "0007"
down_revision = "0006"

COLUMNS = """
ALTER TABLE hpo.terms
    ADD patience integer CHECK (patience > 0), -- so many trials in a row that bring nothing end the study
    ADD patient_from integer NOT NULL DEFAULT 0, -- number of the first trial that may be one of these
    ADD standstill jsonb -- since which trial nothing came, and how many trials that were, where this ended the study
"""


def upgrade() -> None:
    op.execute(COLUMNS)


def downgrade() -> None:
    op.execute("ALTER TABLE hpo.terms DROP patience, DROP patient_from, DROP standstill")
