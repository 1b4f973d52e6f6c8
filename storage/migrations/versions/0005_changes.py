"""What people change of a study that exists: trials that no longer count, and the record of each change."""

from alembic import op

revision = "0005"
down_revision = "0004"

TABLES = """
CREATE TABLE hpo.dropped (
    trial_id integer PRIMARY KEY REFERENCES trials ON DELETE CASCADE,
    study_id integer NOT NULL REFERENCES studies ON DELETE CASCADE,
    reason text NOT NULL,
    dropped_by text NOT NULL,
    dropped_at timestamptz NOT NULL DEFAULT hpo.clock()
);
CREATE INDEX dropped_of_study ON hpo.dropped (study_id);
COMMENT ON TABLE hpo.dropped IS 'finished trials that no longer count; what is recorded of them stays';
CREATE TABLE hpo.changes (
    change bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    study_id integer NOT NULL REFERENCES studies ON DELETE CASCADE,
    changed_at timestamptz NOT NULL DEFAULT hpo.clock(),
    changed_by text NOT NULL,
    what text NOT NULL CHECK (what IN ('drop', 'restore', 'widen')),
    detail jsonb NOT NULL -- trials and reason, or the entries of the space as they were and are
);
CREATE INDEX changes_of_study ON hpo.changes (study_id, change);
COMMENT ON TABLE hpo.changes IS 'what was changed of studies after they began, by whom and when';
"""


def upgrade() -> None:
    op.execute(TABLES)


def downgrade() -> None:
    op.execute("DROP TABLE hpo.dropped, hpo.changes")
