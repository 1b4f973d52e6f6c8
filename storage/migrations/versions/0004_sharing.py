"""How standing workers share the studies, who is signed in, and what is still to be sent to whom."""

from alembic import op

revision = "0004"
down_revision = "0003"

TABLES = """
ALTER TABLE hpo.terms
    ADD priority integer NOT NULL DEFAULT 0, -- an owner's study with a higher one goes first
    ADD max_workers integer CHECK (max_workers > 0), -- trials at once; NULL: no limit
    ADD taken_at timestamptz; -- when a standing worker last began one of its trials
CREATE INDEX leases_ended ON hpo.leases (study_id, ended_at) INCLUDE (trial_id) WHERE ended_at IS NOT NULL;
CREATE TABLE hpo.sessions (
    digest bytea PRIMARY KEY, -- SHA-256 of what the browser's cookie holds, which is random
    token_id text NOT NULL REFERENCES hpo.tokens ON DELETE CASCADE, -- revoked, it ends its sessions
    created_at timestamptz NOT NULL DEFAULT hpo.clock(),
    expires_at timestamptz NOT NULL
);
COMMENT ON TABLE hpo.sessions IS 'browsers that are signed in; cookies are not kept';
CREATE TABLE hpo.notices (
    notice bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    study_name text NOT NULL,
    url text NOT NULL,
    event text NOT NULL, -- as in "study.end"
    body jsonb NOT NULL,
    created_at timestamptz NOT NULL DEFAULT hpo.clock(),
    attempts integer NOT NULL DEFAULT 0,
    next_at timestamptz DEFAULT hpo.clock(), -- of the next attempt; NULL: none any more
    delivered_at timestamptz,
    fault text -- of the last attempt
);
CREATE INDEX notices_due ON hpo.notices (next_at) WHERE next_at IS NOT NULL;
COMMENT ON TABLE hpo.notices IS 'what is sent to the addresses that studies name';
"""


def upgrade() -> None:
    op.execute(TABLES)


def downgrade() -> None:
    op.execute("DROP TABLE hpo.sessions, hpo.notices; DROP INDEX hpo.leases_ended")
    op.execute("ALTER TABLE hpo.terms DROP priority, DROP max_workers, DROP taken_at")
