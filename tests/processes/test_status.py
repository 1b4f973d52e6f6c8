"""What `hpo status` and `hpo launch` show: on a terminal, off one, and as JSON."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

import optuna
import pytest
from optuna.trial import TrialState

from hpo.storage.heartbeat import Progress
from hpo.storage.leases import Lease, Leases
from hpo.storage.terms import Terms
from hpo.storage.trials import trial_storage
from tests.conftest import Cli, execute, reports_wait

UP = "\x1b[1A"  # a terminal's cursor goes back over what is shown, to show it anew
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal:
    """A command of hpo on a terminal of its own, killed at the end of the block if it still runs."""

    def __init__(self, *args: object, cwd: Path, env: dict[str, str], columns: int = 150) -> None:
        self._master, slave = pty.openpty()
        sized = {**env, "TERM": "xterm", "COLUMNS": str(columns), "LINES": "50"}
        command = [sys.executable, "-P", "-m", "hpo", *map(str, args)]
        self.process = subprocess.Popen(command, cwd=cwd, env=sized, stdin=slave, stdout=slave, stderr=slave)
        os.close(slave)
        self.shown = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)

    def until(self, pattern: str) -> None:
        """Read until that is shown."""
        while not re.search(pattern, CONTROL.sub("", self.shown)):
            assert self._read(), self.shown

    def end(self) -> int:
        """Read to the end; the exit status."""
        while self._read():
            pass
        return self.process.wait(60)

    def _read(self) -> bool:
        try:
            piece = os.read(self._master, 2**16)
        except OSError:  # the terminal's other end is closed
            return False
        self.shown += piece.decode(errors="replace")
        return bool(piece)


@pytest.fixture
def leases(database_url: str) -> Iterator[Leases]:
    storage = trial_storage(database_url)
    yield Leases(storage)
    storage.close()


@pytest.fixture
def held(leases: Leases) -> Lease:
    """A study named power: three trials have ended, one is in its third epoch, four workers are alive."""
    study = optuna.create_study(storage=leases.storage, study_name="power", direction="maximize")
    plan = {"config": {"study": {"metric": "accuracy"}}}
    leases.open_study(study._study_id, Terms(budget=1000, timeout_s=100), plan)
    for worker, host, device in (("w1", "near", "cpu"), ("w2", "near", "cpu"), ("w3", "far", "cuda:1")):
        leases.register(worker, study._study_id, host, 1, device)
    leases.register("standing", None, "far", 2, "cuda:0")
    for state, value in ((TrialState.COMPLETE, 0.5), (TrialState.COMPLETE, 0.75), (TrialState.PRUNED, 0.1)):
        leases.storage.finish_trial(_take(leases).trial_id, state, [value], {"seed": 0})
    lease = _take(leases)
    leases.renew("w1", {lease: Progress(12, 3, 0.625)})
    return lease


def _take(leases: Leases) -> Lease:
    lease = leases.acquire(leases.storage.get_study_id_from_name("power"), "w1", "cpu")
    assert lease is not None
    return lease


def test_the_table_tells_trials_best_workers_by_place_rate_and_time_left(cli: Cli, held: Lease) -> None:
    shown = cli("status").stdout
    names = ("study", "complete", "pruned", "failed", "running", "waiting", "best", "workers", "per hour", "left")
    assert all(name in shown for name in names)
    cells = [cell.strip() for line in shown.splitlines() if "power" in line for cell in line.split("│")]
    assert cells[1:9] == ["power", "open", "2", "1", "0", "1", "0", "1000"]
    assert cells[9] == "accuracy 0.7500 (trial 1)"
    for place in ("2 on near cpu", "1 on far cuda:0", "1 on far cuda:1"):
        assert place in shown
    assert float(cells[11]) > 0
    assert re.fullmatch(r"[01]:\d\d min", cells[12])  # to the deadline, as that comes first
    assert "in flight" not in shown
    detailed = cli("status", "power").stdout
    flight = [cell.strip() for line in detailed.splitlines() if "0.6250" in line for cell in line.split("│")]
    assert flight[1:-1] == ["3", "3", "0.6250", "w1", "near", "cpu", "1"]


def test_status_says_where_equal_values_decide(cli: Cli, leases: Leases, held: Lease) -> None:
    """An acceptance run: displays called trial 6 the best, summary and model trial 0."""
    execute(leases.storage.url, "UPDATE hpo.terms SET resolution = 0.1")
    for value, log_loss in ((0.9747, 0.2), (0.9769, 0.3)):
        attributes = {"seed": 0, "log_loss": log_loss}
        leases.storage.finish_trial(_take(leases).trial_id, TrialState.COMPLETE, [value], attributes)
    why = "trial 4 0.9747, equal to trial 5's 0.9769 within half a validation sequence, lower log-loss"
    shown = cli("status").stdout
    assert "0.9747 (trial 4)" in shown
    assert f"power: {why}\n" in shown
    (row,) = json.loads(cli("status", "--json").stdout)
    assert (row["best"], row["best_why"]) == ({"number": 4, "value": 0.9747}, why)


def test_json_tells_the_same(cli: Cli, held: Lease) -> None:
    (row,) = json.loads(cli("status", "--json").stdout)
    assert row["trials"] == {"complete": 2, "pruned": 1, "failed": 0, "running": 1, "waiting": 0}
    assert (row["study"], row["budget"], row["best"]) == ("power", 1000, {"number": 1, "value": 0.75})
    assert row["metric"] == "accuracy"
    assert row["workers"] == 4
    assert {"host": "near", "device": "cpu", "workers": 2} in row["places"]
    assert row["per_hour"] > 0
    assert 0 < row["seconds_left"] <= 100
    (flight,) = row["in_flight"]
    assert (flight["trial"], flight["epoch"], flight["metric"], flight["host"]) == (3, 3, 0.625, "near")


@pytest.mark.parametrize("columns", [40, 80])
def test_on_a_narrow_terminal_all_of_it_is_there_in_lines(
    columns: int, environment: dict[str, str], held: Lease, tmp_path: Path
) -> None:
    """A day as a new user: at 80 and at 40 columns the table was cut to nothing."""
    with Terminal("status", "power", cwd=tmp_path, env=environment, columns=columns) as terminal:
        assert terminal.end() == 0
    shown = " ".join(CONTROL.sub("", terminal.shown).split())
    assert shown.startswith("power: open, 3/1000 trials 2 complete, 1 pruned, 0 failed, 1 running best accuracy 0.7500")
    assert "1 on far cuda:0, 1 on far cuda:1, 2 on near cpu" in shown
    assert "trial 3: epoch 3, 0.6250 on cpu (w1)" in shown
    assert all(len(line) <= columns for line in CONTROL.sub("", terminal.shown).splitlines())


def test_a_trial_that_waits_for_another_worker_does_not_count_as_running(cli: Cli, held: Lease, leases: Leases) -> None:
    leases.release(held)
    (row,) = json.loads(cli("status", "--json").stdout)
    assert row["trials"] == {"complete": 2, "pruned": 1, "failed": 0, "running": 0, "waiting": 1}


def test_many_places_are_counted(cli: Cli, held: Lease, leases: Leases) -> None:
    for number in range(5):
        leases.register(f"more{number}", None, f"host{number}", 1, "cpu")
    assert "9 on 7 hosts" in cli("status").stdout
    assert "1 on host4 cpu" in cli("status", "power").stdout


def test_a_study_of_a_plain_script_has_no_status(cli: Cli, leases: Leases) -> None:
    optuna.create_study(storage=leases.storage, study_name="plain")
    done = cli("status", "plain")
    assert (done.returncode, done.stderr) == (
        1,
        "hpo: study 'plain' was not made by `hpo launch`; see it with `hpo dashboard`\n",
    )


OURS = {"seed": 0}  # what our workers record of a trial tells it from a stranger's


def test_off_a_terminal_watching_prints_what_changes_until_the_study_is_over(
    environment: dict[str, str], held: Lease, leases: Leases
) -> None:
    command = [sys.executable, "-P", "-m", "hpo", "status", "power", "--watch"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as watching:
        assert watching.stdout is not None
        expected = "power: 3/1000 trials; 2 complete, 1 pruned, 0 failed, 1 running; best accuracy 0.7500 (trial 1)\n"
        assert watching.stdout.readline() == expected
        leases.storage.finish_trial(held.trial_id, TrialState.COMPLETE, [0.875], OURS)
        expected = "power: 4/1000 trials; 3 complete, 1 pruned, 0 failed, 0 running; best accuracy 0.8750 (trial 3)"
        assert watching.stdout.readline() == expected + "\n"
        leases.stop(held.study_id)
        assert watching.stdout.read() == expected + "; stopped\n"
        assert watching.wait(30) == 0


def test_on_a_terminal_watching_refreshes_in_place_and_ctrl_c_ends_it(
    environment: dict[str, str], held: Lease, leases: Leases, tmp_path: Path
) -> None:
    with Terminal("status", "--watch", cwd=tmp_path, env=environment) as terminal:
        terminal.until("0.7500 .trial 1")
        leases.storage.finish_trial(held.trial_id, TrialState.COMPLETE, [0.875], OURS)
        terminal.until("0.8750 .trial 3")
        assert UP in terminal.shown
        terminal.process.send_signal(signal.SIGINT)
        assert terminal.end() == 0
        assert "Traceback" not in terminal.shown


def test_watching_as_json_prints_a_line_a_study(environment: dict[str, str], held: Lease, leases: Leases) -> None:
    leases.stop(held.study_id)
    command = [sys.executable, "-P", "-m", "hpo", "status", "power", "--watch", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    (line,) = done.stdout.splitlines()
    assert json.loads(line)["status"] == "stopped"


def test_on_a_terminal_a_launch_shows_a_bar_the_best_and_a_line_for_each_trial(
    environment: dict[str, str], study_file: Callable[..., Path], tmp_path: Path
) -> None:
    file = study_file(trials=3, epochs=30, study='pruner = "none"')
    with Terminal("launch", file, "--workers", 1, cwd=tmp_path, env=environment) as terminal:
        with reports_wait(environment["HPO_DATABASE_URL"]):
            terminal.until(r"trial 0: (starting|epoch \d+, \d\.\d{4}) on cpu \(\S+-\d+\)")
        assert terminal.end() == 0
    assert UP in terminal.shown
    last = CONTROL.sub("", terminal.shown.rsplit(UP, 1)[-1])
    assert re.search(r"waves ━+ 3/3 trials", last)
    assert re.search(r"best auroc \d\.\d{4} \(trial \d\); 3 complete, 0 pruned, 0 failed, 0 running; .*finished", last)
    assert "model waves version 1: " in last
    assert re.search(r"metric +┃ validation \(48 sequences\) ┃ test \(12 sequences\) ┃", last)
    with Terminal("models", cwd=tmp_path, env=environment, columns=80) as terminal:
        terminal.until(r"auroc: validation \d\.\d{4} \(48\); test \d\.\d{4} \(12\), \d\.\d{4} to \d\.\d{4}")
        terminal.until("in brackets: the number of sequences that a score is of")
        assert terminal.end() == 0


def test_off_a_terminal_a_launch_prints_plain_lines_and_a_quiet_one_none(
    cli: Cli, study_file: Callable[..., Path]
) -> None:
    file = study_file(trials=2, epochs=2)
    done = cli("launch", file, "--workers", 1)
    lines = done.stderr.splitlines()
    assert re.fullmatch(
        r"waves: 2/2 trials; [12] complete, [01] pruned, 0 failed, 0 running; "
        r"best auroc \d\.\d{4} \(trial \d\); finished",
        lines[-1],
    )
    assert all(line.startswith("waves: ") for line in lines)
    assert "\x1b" not in done.stderr + done.stdout
    quiet = cli("launch", file, "--workers", 1, "--quiet", "--trials", 3)
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "", "")
