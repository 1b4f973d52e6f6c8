"""First tables: terms, leases, workers, calls, models, aliases; indexes on Optuna's trials."""

from alembic import op

revision = "0001"
down_revision = None

TABLES = """
CREATE TABLE hpo.terms (
    study_id integer PRIMARY KEY REFERENCES studies ON DELETE CASCADE,
    config jsonb NOT NULL,
    budget integer NOT NULL,
    started integer NOT NULL DEFAULT 0,
    timeout_s double precision,
    opened_at timestamptz NOT NULL DEFAULT now(),
    deadline timestamptz,
    lease_s double precision NOT NULL,
    stall_s double precision NOT NULL,
    max_attempts integer NOT NULL,
    status text NOT NULL DEFAULT 'open',
    promoter text,
    promoter_expires_at timestamptz,
    promoted_version integer,
    CHECK (status IN ('open', 'stopped', 'exhausted', 'finished')),
    CHECK (started <= budget)
);
CREATE TABLE hpo.leases (
    trial_id integer PRIMARY KEY REFERENCES trials ON DELETE CASCADE,
    study_id integer NOT NULL REFERENCES studies ON DELETE CASCADE,
    worker text NOT NULL,
    attempt integer NOT NULL DEFAULT 1,
    lost integer NOT NULL DEFAULT 0,
    released boolean NOT NULL DEFAULT false,
    expires_at timestamptz NOT NULL,
    progress bigint NOT NULL DEFAULT 0,
    progress_at timestamptz NOT NULL,
    epoch integer,
    metric double precision,
    device text,
    checkpoint_key text,
    checkpoint_epoch integer,
    replaced_key text,
    ended_at timestamptz
);
CREATE INDEX ix_leases_in_flight ON hpo.leases (study_id, expires_at) WHERE ended_at IS NULL;
CREATE TABLE hpo.workers (
    worker text PRIMARY KEY,
    study_id integer,
    host text,
    pid integer,
    device text,
    log text,
    started_at timestamptz NOT NULL DEFAULT now(),
    seen_at timestamptz NOT NULL DEFAULT now(),
    stopped_at timestamptz
);
CREATE TABLE hpo.calls (
    client uuid PRIMARY KEY,
    call bigint NOT NULL,
    result integer,
    called_at timestamptz NOT NULL DEFAULT now()
);
CREATE TABLE hpo.models (
    name text,
    version integer,
    study_id integer,
    study_name text,
    trial_number integer,
    created_at timestamptz NOT NULL DEFAULT now(),
    scores jsonb NOT NULL DEFAULT '{}',
    config jsonb NOT NULL DEFAULT '{}',
    artifacts jsonb NOT NULL DEFAULT '{}',
    PRIMARY KEY (name, version)
);
CREATE TABLE hpo.aliases (
    name text,
    alias text,
    version integer NOT NULL,
    PRIMARY KEY (name, alias),
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
