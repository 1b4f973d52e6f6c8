"""The service's lists and pages over many studies: milliseconds a request.

    python benchmarks/lists.py [--studies 1000] [--trials 100] [--requests 30] [--target 50]

The studies are of seven owners, one in five is open; their trials have a value, a curve and a lease each. Requests go
over HTTP to an `hpo serve` of its own, one after another. Exit status 1 where a median is above the target. The
database is HPO_DATABASE_URL or the embedded server, in which a database is made and dropped.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import httpx
import psycopg2

# Python looks for modules beside the script first, where `storage` would be another benchmark.
sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != Path(__file__).resolve().parent]

from hpo.storage.access import Access  # noqa: E402
from hpo.storage.database import database_url  # noqa: E402
from hpo.storage.tables import migrate  # noqa: E402

FILL = """
INSERT INTO studies (study_name) SELECT 's' || n FROM generate_series(1, {studies}) n;
INSERT INTO study_directions (direction, study_id, objective) SELECT 'MAXIMIZE', study_id, 0 FROM studies;
INSERT INTO hpo.terms (study_id, config, budget, started, lease_s, stall_s, max_attempts, status, store_key, resolution,
    owner, priority)
SELECT study_id, '{{"config": {{"study": {{"metric": "auroc"}}}}}}', 2 * {trials}, {trials}, 60, 600, 3,
    CASE WHEN study_id % 5 = 0 THEN 'open' ELSE 'stopped' END, study_id, 0.001, 'owner' || study_id % 7, study_id % 3
FROM studies;
INSERT INTO trials (number, study_id, state, datetime_start, datetime_complete)
SELECT n, study_id, (CASE WHEN n % 3 = 0 THEN 'COMPLETE' ELSE 'PRUNED' END)::trialstate, now(), now()
FROM generate_series(0, {trials} - 1) n, studies;
INSERT INTO trial_values (trial_id, objective, value, value_type) SELECT trial_id, 0, random(), 'FINITE' FROM trials;
WITH curve AS (SELECT json_build_object('value', json_agg(random()))::text AS value FROM generate_series(1, 50))
INSERT INTO trial_user_attributes (trial_id, key, value_json)
SELECT trial_id, v.key, v.value FROM trials, curve, LATERAL (VALUES ('seed', '0'), ('log_loss', '0.5'),
    ('params', '{{"layers": 1}}'), ('curve', curve.value)) v (key, value);
INSERT INTO trial_intermediate_values (trial_id, step, intermediate_value, intermediate_value_type)
SELECT trial_id, n, random(), 'FINITE' FROM trials, generate_series(1, 10) n;
INSERT INTO hpo.workers (worker, started_at, seen_at) SELECT 'w' || n, now(), now() FROM generate_series(0, 49) n;
INSERT INTO hpo.leases (trial_id, study_id, worker, attempt, renewed_at, expires_at, progress_at, ended_at)
SELECT trial_id, study_id, 'w' || trial_id % 50, 1, now(), now(), now(), now() FROM trials;
INSERT INTO hpo.models (name, version, study_id, study_name, trial_number, scores, config, artifacts)
SELECT study_name, 1, study_id, study_name, 0, '{{"metric": "auroc", "value": 0.9, "test": {{"auroc": 0.9}}}}',
    '{{"params": {{}}}}', '{{}}' FROM studies WHERE study_id % 5 > 0;
INSERT INTO hpo.aliases (name, alias, version) SELECT name, 'latest', 1 FROM hpo.models;
VACUUM ANALYZE
"""


@contextmanager
def filled(studies: int, trials: int) -> Iterator[str]:
    """A database with so many studies of so many trials each, while the block runs."""
    server, name = database_url(), f"lists_{uuid.uuid4().hex[:8]}"
    url = server.rpartition("/")[0] + f"/{name}"
    with closing(psycopg2.connect(server.replace("+psycopg2", ""))) as connection:
        connection.autocommit = True
        cursor = connection.cursor()
        cursor.execute(f"CREATE DATABASE {name}")
        try:
            migrate(url)
            with closing(psycopg2.connect(url.replace("+psycopg2", ""))) as inside:
                inside.autocommit = True
                for statement in FILL.format(studies=studies, trials=trials).split(";"):
                    inside.cursor().execute(statement)
            yield url
        finally:
            cursor.execute(f"DROP DATABASE {name} WITH (FORCE)")


@contextmanager
def serving(url: str) -> Iterator[str]:
    """The address of a service on that database."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "HPO_DATABASE_URL": url, "HPO_ARTIFACTS": folder}
        command = [sys.executable, "-P", "-m", "hpo", "serve", "--port", "0"]
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            yield process.stdout.readline().split()[2].rstrip("/,")
            process.terminate()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=1000)
    parser.add_argument("--trials", type=int, default=100, help="of each study")
    parser.add_argument("--requests", type=int, default=30)
    parser.add_argument("--target", type=float, default=50.0, help="milliseconds")
    args = parser.parse_args()
    slowest = 0.0
    with filled(args.studies, args.trials) as url, serving(url) as address:
        token = Access(url).create("admin", "ada")[1]
        with httpx.Client(base_url=address, headers={"Authorization": f"Bearer {token}"}, trust_env=False) as client:
            signed_in = client.post("/login", data={"token": token}, headers={"Origin": address})
            assert signed_in.has_redirect_location, signed_in.text
            for path in (
                "/v1/studies",
                "/v1/studies?offset=500",
                "/v1/studies?limit=1000",
                "/v1/studies/s7",
                "/v1/studies/s7/trials",
                "/v1/studies/s7/trials/42",
                "/v1/models",
                "/",
                "/studies/s7",
                "/models/s7",
                "/metrics",
            ):
                took = []
                for _ in range(args.requests):
                    began = time.perf_counter()
                    answer = client.get(path)
                    took.append(1000 * (time.perf_counter() - began))
                median = statistics.median(took)
                print(
                    f"{path:28} {answer.status_code} {len(answer.content):9,} bytes"
                    f"  median {median:6.1f} ms  slowest {max(took):6.1f} ms",
                    flush=True,
                )
                slowest = max(slowest, median if "limit" not in path else 0.0)  # what nobody asks for by default
    return int(slowest > args.target)


if __name__ == "__main__":
    sys.exit(main())
