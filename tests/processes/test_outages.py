"""What goes away and comes back: the server, a launch with its workers, answers, the night between two launches.

Each is a public report or a day's experience with a tuner: a trial is failed because the database was restarted; a
hung pooler holds a worker that Ctrl-C does not end; after a crash the relaunch waits for the dead worker's lease and
runs other trials first; the time limit runs out while nothing runs.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import psycopg2
import pytest
from optuna.trial import FrozenTrial, TrialState

from hpo.storage.trials import trial_storage
from tests.conftest import SMALL, Cli, assert_exact, execute, processes_of, reports_wait, wait_for
from tests.proxy import proxied

Trials = Callable[..., list[FrozenTrial]]


def launching(file: Path, environment: dict[str, str], *options: str, workers: int = 1) -> subprocess.Popen[str]:
    command = [sys.executable, "-P", "-m", "hpo", "launch", str(file), "--workers", str(workers), "--json", *options]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, cwd=file.parent, env=environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    )


def summary_of(output: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    return found


def rows(url: str, query: str) -> list[tuple[Any, ...]]:
    with closing(psycopg2.connect(url.replace("+psycopg2", ""))) as connection, connection.cursor() as cursor:
        cursor.execute(query)
        return cursor.fetchall()


def outcome(found: list[FrozenTrial]) -> list[Any]:
    """All that must not depend on what went wrong."""
    return [(t.number, t.state, t.params, t.value, t.intermediate_values, t.user_attrs["curve"]) for t in found]


def kill_all(environment: dict[str, str]) -> None:
    """What the out-of-memory killer, or a lost login, does to a launch: everything goes at once."""
    for process in processes_of(environment["HPO_HOME"]):
        process.kill()
    wait_for(lambda: not any(_lives(process) for process in processes_of(environment["HPO_HOME"])))


def _lives(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def test_a_launch_killed_with_its_worker_goes_on_at_once_and_repeats_the_undisturbed_study(
    cli: Cli, study_file: Callable[..., Path], environment: dict[str, str], trials: Trials, database_url: str
) -> None:
    file = study_file(trials=6, epochs=12, study='pruner = "median"\nseed = 5\nlease = "10m"')
    with reports_wait(database_url):
        running = launching(file, environment)
        wait_for(lambda: rows(database_url, "SELECT count(*) FROM hpo.leases") == [(1,)])
        kill_all(environment)
        running.communicate(timeout=60)
    again = cli("launch", file, "--workers", 1, "--json")  # within the lease of ten minutes, or it would take too long
    assert summary_of(again.stdout)["study"] == "waves"
    assert rows(database_url, "SELECT max(attempt) FROM hpo.leases") == [(2,)]
    cli("launch", file, "--workers", 1, "--json", "--set", 'study.name="calm"')
    assert outcome(trials()) == outcome(trials("calm"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_launch_whose_database_takes_everything_and_answers_nothing(
    number: signal.Signals,
    study_file: Callable[..., Path],
    environment: dict[str, str],
    database_url: str,
    trials: Trials,
    cli: Cli,
) -> None:
    file = study_file(trials=2, epochs=20_000, study='pruner = "none"', train="patience = 0")
    with proxied(database_url) as (proxy, url):
        running = launching(file, environment | {"HPO_DATABASE_URL": url})
        wait_for(lambda: rows(database_url, "SELECT count(*) FROM hpo.leases WHERE epoch > 1") == [(1,)])
        proxy.hang()
        time.sleep(1)  # so that calls hang by then
        running.send_signal(number)
        _, errors = running.communicate(timeout=60)
        wait_for(lambda: not any(_lives(process) for process in processes_of(environment["HPO_HOME"])))
    assert running.returncode == 130
    assert "the same command goes on" in errors
    assert "Traceback" not in errors
    (trial,) = trials()
    assert trial.state == TrialState.RUNNING


def test_a_command_whose_database_answers_nothing_ends_with_ctrl_c(
    environment: dict[str, str], database_url: str, tmp_path: Path
) -> None:
    with proxied(database_url) as (proxy, url):
        command = [sys.executable, "-P", "-m", "hpo", "status"]
        pipe = subprocess.PIPE
        proxy.swallow(2)
        status = subprocess.Popen(
            command, env=environment | {"HPO_DATABASE_URL": url}, stdout=pipe, stderr=pipe, text=True
        )
        wait_for(lambda: proxy.queries >= 2)
        status.send_signal(signal.SIGINT)
        _, errors = status.communicate(timeout=8)  # less than the call's own deadline
    assert status.returncode != 0
    assert "Traceback" not in errors


# ------------------------------------------------------------------------------------------------- the study's clock

NIGHT = """
CREATE OR REPLACE FUNCTION hpo.clock() RETURNS timestamptz LANGUAGE sql VOLATILE AS
    'SELECT clock_timestamp() + interval ''10 h''';
CREATE OR REPLACE FUNCTION hpo.moment() RETURNS timestamptz LANGUAGE sql STABLE AS 'SELECT now() + interval ''10 h'''
"""


def test_a_night_between_two_launches_costs_no_time(
    cli: Cli, study_file: Callable[..., Path], environment: dict[str, str], trials: Trials, database_url: str
) -> None:
    file = study_file(trials=3, epochs=10, space=SMALL, study='pruner = "none"\ntimeout = "1h"')
    with reports_wait(database_url):
        running = launching(file, environment)
        wait_for(lambda: rows(database_url, "SELECT count(*) FROM hpo.leases") == [(1,)])
        kill_all(environment)
        running.communicate(timeout=60)
    execute(database_url, NIGHT)
    assert summary_of(cli("launch", file, "--json").stdout)["ended_by"] == "budget"
    assert_exact(trials(), 3)
    (elapsed_s,) = rows(database_url, "SELECT elapsed_s FROM hpo.terms")[0]
    assert 0 < elapsed_s < 600


def test_a_study_that_waits_for_its_first_worker_loses_no_time(
    cli: Cli, study_file: Callable[..., Path], trials: Trials, database_url: str
) -> None:
    file = study_file(trials=2, epochs=2, study='timeout = "1h"')
    assert cli("launch", file, "--detach").returncode == 0
    execute(database_url, NIGHT)
    assert json.loads(cli("status", "waves", "--json").stdout)[0]["seconds_left"] == 3600
    assert summary_of(cli("launch", file, "--json").stdout)["ended_by"] == "budget"
    assert_exact(trials(), 2)


def test_what_was_in_flight_when_time_ran_out_ends_with_what_its_checkpoint_holds(
    cli: Cli, study_file: Callable[..., Path], environment: dict[str, str], trials: Trials, database_url: str
) -> None:
    file = study_file(trials=3, epochs=5000, study='pruner = "none"\ntimeout = "1h"', train="patience = 0")
    running = launching(file, environment)
    wait_for(lambda: rows(database_url, "SELECT count(checkpoint_key) FROM hpo.leases") == [(1,)])
    kill_all(environment)
    running.communicate(timeout=60)
    execute(database_url, "UPDATE hpo.terms SET elapsed_s = timeout_s")
    ((epoch,),) = rows(database_url, "SELECT checkpoint_epoch FROM hpo.leases")
    found = summary_of(cli("launch", file, "--json").stdout)
    assert found["ended_by"] == "timeout"
    (trial,) = trials()
    assert (trial.state, trial.user_attrs["epochs"], found["best"]["number"]) == (TrialState.COMPLETE, epoch, 0)


def test_a_worker_that_dies_is_noticed_by_another_of_its_machine(
    study_file: Callable[..., Path], environment: dict[str, str], database_url: str
) -> None:
    file = study_file(trials=2, epochs=30, study='pruner = "none"\nlease = "10m"')
    with launching(file, environment, workers=2) as running:
        wait_for(lambda: rows(database_url, "SELECT count(*) FROM hpo.leases WHERE ended_at IS NULL") == [(2,)])
        storage = trial_storage(database_url)
        ((pid,),) = rows(database_url, "SELECT pid FROM hpo.workers JOIN hpo.leases USING (worker) LIMIT 1")
        storage.close()
        os.kill(pid, signal.SIGKILL)
        output, errors = running.communicate(timeout=120)
    assert running.returncode == 0, errors
    assert summary_of(output)["trials"]["complete"] == 2
