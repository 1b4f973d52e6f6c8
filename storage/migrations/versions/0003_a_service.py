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
CREATE TABLE hpo.alias_changes (
    change bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name text NOT NULL,
    alias text NOT NULL,
    version integer, -- NULL: taken away
    changed_at timestamptz NOT NULL DEFAULT hpo.clock()
);
COMMENT ON TABLE hpo.alias_changes IS 'which versions an alias has named';
INSERT INTO hpo.alias_changes (name, alias, version) SELECT name, alias, version FROM hpo.aliases;
ALTER TABLE hpo.terms ADD owner text; -- who submitted it through the service; NULL: nobody did
"""


# Whoever changes an alias, the promotion of a better version included.
HISTORY = """
CREATE FUNCTION hpo.note_alias() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog AS $$
BEGIN
    IF TG_OP = 'DELETE' THEN
        INSERT INTO hpo.alias_changes (name, alias) VALUES (OLD.name, OLD.alias);
    ELSIF TG_OP = 'INSERT' OR OLD.version <> NEW.version THEN
        INSERT INTO hpo.alias_changes (name, alias, version) VALUES (NEW.name, NEW.alias, NEW.version);
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER note_alias AFTER INSERT OR UPDATE OR DELETE ON hpo.aliases
    FOR EACH ROW EXECUTE FUNCTION hpo.note_alias();
"""


def upgrade() -> None:
    op.execute(TABLES)
    op.execute(HISTORY)


def downgrade() -> None:
    op.execute("DROP TRIGGER note_alias ON hpo.aliases; DROP FUNCTION hpo.note_alias")
    op.execute("DROP TABLE hpo.tokens, hpo.audit, hpo.submissions, hpo.alias_changes; ALTER TABLE hpo.terms DROP owner")
