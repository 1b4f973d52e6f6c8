"""One clock for all decisions, the study's own time, and what tells a lost lease from a dead worker."""

from alembic import op

revision = "0002"
down_revision = "0001"

# Every decision asks these functions for the time. Simulations replace them.
CLOCK = """
CREATE FUNCTION hpo.clock() RETURNS timestamptz LANGUAGE sql VOLATILE AS 'SELECT clock_timestamp()';
COMMENT ON FUNCTION hpo.clock() IS 'this moment';
CREATE FUNCTION hpo.moment() RETURNS timestamptz LANGUAGE sql STABLE AS 'SELECT now()';
COMMENT ON FUNCTION hpo.moment() IS 'the moment at which the transaction began';
CREATE FUNCTION hpo.server_started() RETURNS timestamptz LANGUAGE sql STABLE AS 'SELECT pg_postmaster_start_time()';
COMMENT ON FUNCTION hpo.server_started() IS 'since when the server runs';
"""

COLUMNS = """
ALTER TABLE hpo.terms
    ADD elapsed_s double precision NOT NULL DEFAULT 0, -- time with a live worker, up to clock_at
    ADD clock_at timestamptz, -- when a worker of the study was last heard of
    ADD resolution double precision NOT NULL DEFAULT 0, -- values closer than this are equal
    ADD store_key text; -- what stands for the study in the keys of its artifacts
UPDATE hpo.terms SET elapsed_s = greatest(0, timeout_s - extract(epoch FROM deadline - now()))
    WHERE timeout_s IS NOT NULL;
UPDATE hpo.terms SET store_key = study_id, resolution = CASE
    WHEN config #>> '{config,study,metric}' = 'log_loss' OR NOT config ? 'sequences' THEN 0
    WHEN jsonb_typeof(config #> '{config,data,validation}') = 'number'
        THEN 0.5 / ((config #>> '{config,data,validation}')::float8 * (config ->> 'sequences')::float8)
    ELSE 0.5 / (config ->> 'sequences')::float8 END;
ALTER TABLE hpo.terms DROP deadline, ALTER store_key SET NOT NULL;
ALTER TABLE hpo.leases
    ADD renewed_at timestamptz, -- when the holder was last heard of
    ADD began_epoch integer, -- the checkpoint that this attempt began with
    ADD lost_attempt integer, -- the last attempt that was taken for dead …
    ADD lost_progress bigint, -- … and the batches that it had trained by then
    ADD replaced_epoch integer; -- of replaced_key
UPDATE hpo.leases l SET renewed_at = expires_at - lease_s * interval '1 s' FROM hpo.terms s
    WHERE s.study_id = l.study_id;
ALTER TABLE hpo.leases ALTER renewed_at SET NOT NULL;
ALTER TABLE hpo.workers
    ADD machine text, -- where its process number means something: the machine since its start, and the container
    ADD process_start bigint; -- when the process began, by the machine's own count
"""

# A trial under a lease changes its state by whoever holds that lease, stock Optuna and the dashboard included. Whoever
# does so names the lease in the setting hpo.lease; "any" is for those who have locked the study to take a trial.
GUARD = """
CREATE FUNCTION hpo.guard_state() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog AS $$
DECLARE
    given text := current_setting('hpo.lease', true);
    holder text;
BEGIN
    SELECT worker INTO holder FROM hpo.leases l WHERE l.trial_id = OLD.trial_id AND ended_at IS NULL
        AND given IS DISTINCT FROM 'any' AND given IS DISTINCT FROM concat_ws('/', l.trial_id, l.attempt, l.worker);
    IF FOUND THEN
        RAISE EXCEPTION USING ERRCODE = 'object_not_in_prerequisite_state',
            MESSAGE = format('trial %s is under a lease of the worker %s, and only that one ends it', OLD.number,
                holder),
            HINT = 'End the study with `hpo stop`, or wait for the trial.';
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER hpo_guard_state BEFORE UPDATE OF state ON trials FOR EACH ROW
    WHEN (OLD.state IS DISTINCT FROM NEW.state) EXECUTE FUNCTION hpo.guard_state();
"""


def upgrade() -> None:
    op.execute(CLOCK)
    op.execute(COLUMNS)
    op.execute(GUARD)


def downgrade() -> None:
    raise NotImplementedError("an older version would count a study's time twice: restore a dump instead")
