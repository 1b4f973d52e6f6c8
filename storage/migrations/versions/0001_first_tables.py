"""First tables: terms, leases, workers, calls, models, aliases; indexes on Optuna's trials."""

from alembic import op

revision = "0001"
down_revision = None

TABLES = """
CREATE TABLE hpo.terms (
    study_id integer PRIMARY KEY REFERENCES studies ON DELETE CASCADE,
    config jsonb NOT NULL,
    budget integer NOT NULL, -- trials to start, over all workers
    started integer NOT NULL DEFAULT 0, -- of them started under a lease
    timeout_s double precision,
    opened_at timestamptz NOT NULL DEFAULT now(),
    deadline timestamptz, -- no trial starts after it
    lease_s double precision NOT NULL,
    stall_s double precision NOT NULL, -- a lease without progress for so long is not renewed
    max_attempts integer NOT NULL,
    status text NOT NULL DEFAULT 'open',
    promoter text, -- the worker that promotes the best trial
    promoter_expires_at timestamptz,
    promoted_version integer,
    CHECK (status IN ('open', 'stopped', 'exhausted', 'finished')),
    CHECK (started <= budget)
);
CREATE TABLE hpo.leases (
    trial_id integer PRIMARY KEY REFERENCES trials ON DELETE CASCADE,
    study_id integer NOT NULL REFERENCES studies ON DELETE CASCADE,
    worker text NOT NULL,
    attempt integer NOT NULL DEFAULT 1, -- fencing token, one more for each adoption
    lost integer NOT NULL DEFAULT 0, -- times that it ran out without being given back
    released boolean NOT NULL DEFAULT false, -- given back
    expires_at timestamptz NOT NULL,
    progress bigint NOT NULL DEFAULT 0, -- batches trained
    progress_at timestamptz NOT NULL, -- when progress last changed
    epoch integer,
    metric double precision,
    device text,
    checkpoint_key text, -- the only checkpoint that may be read
    checkpoint_epoch integer, -- the last epoch that it holds
    replaced_key text, -- the checkpoint before it
    ended_at timestamptz -- set with the trial's final state
);
CREATE INDEX ix_leases_in_flight ON hpo.leases (study_id, expires_at) WHERE ended_at IS NULL;
CREATE TABLE hpo.workers (
    worker text PRIMARY KEY,
    study_id integer, -- null: a standing worker of any study
    host text,
    pid integer,
    device text,
    log text,
    started_at timestamptz NOT NULL DEFAULT now(),
    seen_at timestamptz NOT NULL DEFAULT now(),
    stopped_at timestamptz
);
-- The last call of each client that must not happen twice, so that a retry after a lost connection sees it.
CREATE TABLE hpo.calls (
    client uuid PRIMARY KEY,
    call bigint NOT NULL,
    result integer,
    called_at timestamptz NOT NULL DEFAULT now()
);
CREATE TABLE hpo.models (
    name text,
    version integer,
    study_id integer, -- no foreign key: a model outlives its study
    study_name text,
    trial_number integer,
    created_at timestamptz NOT NULL DEFAULT now(),
    scores jsonb NOT NULL DEFAULT '{}',
    config jsonb NOT NULL DEFAULT '{}',
    artifacts jsonb NOT NULL DEFAULT '{}', -- file -> key
    PRIMARY KEY (name, version)
);
CREATE TABLE hpo.aliases (
    name text,
    alias text,
    version integer NOT NULL,
    PRIMARY KEY (name, alias),
    -- An alias goes with its version.
    CONSTRAINT aliases_model FOREIGN KEY (name, version) REFERENCES hpo.models ON DELETE CASCADE
);
"""

# So that numbering a trial and finding a waiting one cost the same in a large study as in a small one.
TRIAL_INDEXES = """
CREATE INDEX ix_hpo_trials_number ON trials (study_id, number);
CREATE INDEX ix_hpo_trials_waiting ON trials (study_id, number) WHERE state = 'WAITING';
"""


def upgrade() -> None:
    op.execute(TABLES)
    op.execute(TRIAL_INDEXES)


def downgrade() -> None:
    op.execute("DROP INDEX ix_hpo_trials_number, ix_hpo_trials_waiting")
    op.execute("DROP TABLE hpo.aliases, hpo.models, hpo.calls, hpo.workers, hpo.leases, hpo.terms")
