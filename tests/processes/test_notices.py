"""Notices without a service: a launch sends those of its study, a standing worker those of all."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import Cli, execute
from tests.receiver import SECRET, Receiver, receiving


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as made:
        yield made


@pytest.fixture
def signing(environment: dict[str, str]) -> dict[str, str]:
    return {**environment, "HPO_NOTIFY_SECRET": SECRET, "HPO_NOTIFY_PRIVATE": "1"}


def test_a_launch_tells_of_its_study_and_so_do_commands(
    cli: Cli, study_file: Callable[..., Path], signing: dict[str, str], receiver: Receiver
) -> None:
    file = study_file(trials=2, epochs=1, more=f'[notify]\nurl = "{receiver.url}"\n')
    done = cli("launch", file, "--workers", 1, env=signing)
    assert done.returncode == 0, done.stderr
    told = {each.content["event"]: each.content for each in receiver.requests}
    assert told["study.end"]["status"] == "finished"
    assert told["model.promotion"]["model"]["version"] == 1
    other = 1 - told["model.promotion"]["model"]["trial"]
    assert cli("promote", "waves", "--trial", other, env=signing).returncode == 0
    assert receiver.requests[-1].content["model"]["version"] == 2
    rows = json.loads(cli("notices", "waves", "--json", env=signing).stdout)
    assert [(each["event"], each["state"], each["host"]) for each in rows[::-1]] == [
        ("model.promotion", "delivered", "127.0.0.1"),
        ("study.end", "delivered", "127.0.0.1"),
        ("model.promotion", "delivered", "127.0.0.1"),
    ]
    shown = cli("notices", env=signing).stdout
    assert "study.end of waves: delivered" in shown
    assert "hook" not in shown + json.dumps(rows)


def test_a_launch_without_a_secret_says_who_must_send(
    cli: Cli, study_file: Callable[..., Path], environment: dict[str, str], receiver: Receiver
) -> None:
    file = study_file(trials=1, epochs=1, more=f'[notify]\nurl = "{receiver.url}"\n')
    done = cli("launch", file, "--detach", env=environment)
    assert done.returncode == 0
    assert "waves: HPO_NOTIFY_SECRET is not set here, so `hpo serve` or a standing worker must send" in done.stderr
    assert cli("stop", "waves", env=environment).returncode == 0
    (row,) = json.loads(cli("notices", "--json", env=environment).stdout)
    assert (row["event"], row["state"], row["attempts"]) == ("study.end", "waiting", 0)
    assert receiver.requests == []


def test_a_standing_worker_tells_of_all_studies(
    cli: Cli, study_file: Callable[..., Path], signing: dict[str, str], receiver: Receiver
) -> None:
    file = study_file(trials=1, epochs=1, more=f'[notify]\nurl = "{receiver.url}"\n')
    assert cli("launch", file, "--detach", env=signing).returncode == 0
    worker = [sys.executable, "-P", "-m", "hpo", "worker"]
    with subprocess.Popen(worker, env=signing, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert {each.content["event"] for each in receiver.wait_for(2)} == {"model.promotion", "study.end"}
        finally:
            process.terminate()
            _, log = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "hook" not in log
    assert SECRET not in log


def test_a_promotion_that_fails_is_told_once(
    cli: Cli, study_file: Callable[..., Path], signing: dict[str, str], receiver: Receiver
) -> None:
    file = study_file(trials=1, epochs=1, more=f'[notify]\nurl = "{receiver.url}"\n')
    assert cli("launch", file, "--detach", env=signing).returncode == 0
    execute(
        signing["HPO_DATABASE_URL"],
        "CREATE FUNCTION spoil() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN NEW.value = 0.123; RETURN NEW; END $$",
        "CREATE TRIGGER spoil BEFORE INSERT OR UPDATE ON trial_values FOR EACH ROW EXECUTE FUNCTION spoil()",
    )
    done = cli("worker", "--study", "waves", env=signing)
    assert done.returncode == 1, done.stderr
    execute(signing["HPO_DATABASE_URL"], "DROP TRIGGER spoil ON trial_values")
    assert cli("worker", "--study", "waves", env=signing).returncode == 1
    rows = json.loads(cli("notices", "--json", env=signing).stdout)
    assert [each["event"] for each in rows] == ["study.failure"]
