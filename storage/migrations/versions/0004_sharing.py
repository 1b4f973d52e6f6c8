"""How standing workers share the studies, who is signed in, and what is still to be sent to whom."""

from alembic import op

revision = "0004"
down_revision = "0003"

TABLES = """
ALTER TABLE hpo.terms
    ADD priority integer NOT NULL DEFAULT 0, -- an owner's study with a higher one goes first
    ADD max_workers integer CHECK (max_workers > 0), -- trials at once; NULL: no limit
    ADD taken_at timestamptz, -- when a standing worker last began one of its trials
    ADD notify_url text, -- where notices of it are sent; NULL: nowhere
    ADD notify_on text[] NOT NULL DEFAULT '{}'; -- of what: end, failure, promotion
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
    study_id integer NOT NULL, -- which may be deleted by now
    study_name text NOT NULL,
    url text NOT NULL,
    event text NOT NULL, -- as in "study.end"
    body jsonb NOT NULL, -- without "trials" until it is first sent
    created_at timestamptz NOT NULL DEFAULT hpo.clock(),
    attempts integer NOT NULL DEFAULT 0,
    next_at timestamptz DEFAULT hpo.clock(), -- of the next attempt; NULL: none any more
    delivered_at timestamptz,
    fault text -- of the last attempt
);
CREATE INDEX notices_due ON hpo.notices (next_at) WHERE next_at IS NOT NULL;
CREATE INDEX notices_of_study ON hpo.notices (study_id);
COMMENT ON TABLE hpo.notices IS 'what is sent to the addresses that studies name';
"""

# In the transaction of what they tell of, whoever does it: none is lost, and none tells of what did not happen.
NOTICES = """
CREATE FUNCTION hpo.give_notice(study integer, happened text, more jsonb) RETURNS void LANGUAGE sql
SET search_path = pg_catalog AS $$
    INSERT INTO hpo.notices (study_id, study_name, url, event, body)
    SELECT study_id, name, notify_url, happened, jsonb_build_object('event', happened, 'study', name, 'owner', owner,
        'status', status, 'version', promoted_version, 'when', hpo.clock()) || more
    FROM hpo.terms CROSS JOIN LATERAL (SELECT coalesce(config #>> '{config,study,name}', study_id::text) AS name) n
    WHERE study_id = study AND notify_url IS NOT NULL AND split_part(happened, '.', 2) = ANY(notify_on)
$$;
COMMENT ON FUNCTION hpo.give_notice IS 'Writes a notice, where the study wants one of that.';
CREATE FUNCTION hpo.notice_of_end() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog AS $$
BEGIN
    PERFORM hpo.give_notice(NEW.study_id, 'study.end', '{}');
    IF NEW.status = 'finished' AND NEW.promoted_version IS NULL THEN
        PERFORM hpo.give_notice(NEW.study_id, 'study.failure', '{"reason": "it ended without a model"}');
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER notice_of_end AFTER UPDATE OF status ON hpo.terms FOR EACH ROW
    WHEN (OLD.status <> NEW.status AND NEW.status IN ('stopped', 'finished')) EXECUTE FUNCTION hpo.notice_of_end();
CREATE FUNCTION hpo.notice_of_model() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog AS $$
BEGIN
    PERFORM hpo.give_notice(NEW.study_id, 'model.promotion', jsonb_build_object('model', jsonb_build_object(
        'name', NEW.name, 'version', NEW.version, 'trial', NEW.trial_number, 'metric', NEW.scores -> 'metric',
        'value', NEW.scores -> 'value', 'test', NEW.scores -> 'test')));
    RETURN NULL;
END $$;
CREATE TRIGGER notice_of_model AFTER INSERT ON hpo.models
    FOR EACH ROW WHEN (NEW.study_id IS NOT NULL) EXECUTE FUNCTION hpo.notice_of_model();
"""


def upgrade() -> None:
    op.execute(TABLES)
    op.execute(NOTICES)


def downgrade() -> None:
    op.execute("DROP TRIGGER notice_of_end ON hpo.terms; DROP TRIGGER notice_of_model ON hpo.models")
    op.execute("DROP FUNCTION hpo.notice_of_end, hpo.notice_of_model, hpo.give_notice")
    op.execute("DROP TABLE hpo.sessions, hpo.notices; DROP INDEX hpo.leases_ended")
    op.execute("ALTER TABLE hpo.terms DROP priority, DROP max_workers, DROP taken_at")
    op.execute("ALTER TABLE hpo.terms DROP notify_url, DROP notify_on")
