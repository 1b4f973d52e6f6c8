"""A worker's log in JSON: each line of its standard error, with the study and the trial that it is about."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Cli


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("given", ["option", "environment"])
def test_a_worker_says_in_json_what_it_does(
    cli: Cli, study_file: Callable[..., Path], environment: dict[str, str], given: str
) -> None:
    assert cli("launch", study_file(trials=2, epochs=1), "--detach").returncode == 0
    options = ["--log-format", "json"] if given == "option" else []
    more = {} if options else {"HPO_LOG_FORMAT": "json"}
    done = cli("worker", "--study", "waves", *options, env={**environment, **more})
    assert done.returncode == 0
    found = lines(done.stderr)
    assert all({"time", "level", "logger", "message", "pid"} <= line.keys() for line in found)
    assert len({line["pid"] for line in found}) == 1
    ended = [line for line in found if line["message"].endswith(": complete")]
    assert [line["study"] for line in ended] == ["waves", "waves"]
    trained = {line["trial"] for line in found if "trial" in line}
    assert trained == {0, 1}
    over = next(line for line in found if line["message"].startswith("study waves is over"))
    assert over["study"] == "waves"
    assert "trial" not in over


def test_what_ends_a_worker_is_json_too(cli: Cli, study_file: Callable[..., Path], environment: dict[str, str]) -> None:
    json_lines = {**environment, "HPO_LOG_FORMAT": "json"}
    done = cli("worker", "--study", "nobody", env=json_lines)
    assert done.returncode == 1
    assert lines(done.stderr)[-1]["level"] == "ERROR"
    assert lines(done.stderr)[-1]["message"] == "there is no study named 'nobody'; known: none yet"
    # What nobody foresaw: whoever starts workers gives them a number.
    done = cli("worker", env={**json_lines, "HPO_WORKER_INDEX": "first"})
    assert done.returncode == 1
    last = lines(done.stderr)[-1]
    assert last["level"] == "CRITICAL"
    assert last["exception"].startswith("Traceback (most recent call last):\n")


def test_the_workers_of_a_launch_log_as_it_says(cli: Cli, study_file: Callable[..., Path], tmp_path: Path) -> None:
    file = study_file(trials=2, epochs=1)
    assert cli("launch", file, "--workers", 1, "--log-format", "json").returncode == 0
    (log,) = (tmp_path / "home" / "logs" / "waves").glob("*.log")
    assert {line["trial"] for line in lines(log.read_text()) if "trial" in line} == {0, 1}
    wrong = cli("worker", "--log-format", "xml")
    assert wrong.returncode == 2
    assert "'xml'" in wrong.stderr
