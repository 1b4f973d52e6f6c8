"""Who may do what over HTTP, who did what, and whose a study is."""

from alembic import op

revision = "0003"
down_revision = "0002"

TABLES = """
CREATE TABLE hpo.tokens (
    token_id text PRIMARY KEY, -- not secret: what lists and logs say
    digest bytea NOT NULL, -- SHA-256 of the secret, which is random and long enough for no other protection
    role text NOT NULL CHECK (role IN ('read', 'submit', 'admin')),
    owner text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT hpo.clock(),
    expires_at timestamptz,
    revoked_at timestamptz
);
COMMENT ON TABLE hpo.tokens IS 'who may use the service; secrets are not kept';
CREATE TABLE hpo.audit (
    entry bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    happened_at timestamptz NOT NULL DEFAULT hpo.clock(),
    owner text NOT NULL,
    token_id text,
    action text NOT NULL, -- as in "study.submit"
    subject text NOT NULL, -- the name of what was written to
    detail jsonb NOT NULL DEFAULT '{}'
);
COMMENT ON TABLE hpo.audit IS 'every write through the service';
CREATE TABLE hpo.submissions (
    owner text,
    idempotency_key text,
    study_name text NOT NULL,
    digest text NOT NULL, -- of what was submitted
    submitted_at timestamptz NOT NULL DEFAULT hpo.clock(),
    PRIMARY KEY (owner, idempotency_key)
);
COMMENT ON TABLE hpo.submissions IS 'which study a repeated submission means';
ALTER TABLE hpo.terms ADD owner text; -- who submitted it through the service; NULL: nobody did
"""


def upgrade() -> None:
    op.execute(TABLES)


def downgrade() -> None:
    op.execute("DROP TABLE hpo.tokens, hpo.audit, hpo.submissions; ALTER TABLE hpo.terms DROP owner")
