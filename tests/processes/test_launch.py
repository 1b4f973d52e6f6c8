"""The main job through the real command line: real workers, a real Postgres, real interruptions."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from optuna.trial import FrozenTrial, TrialState

from hpo.models.bundle.bundle import load
from hpo.models.data.readers import read
from hpo.models.metrics import score
from hpo.storage.artifacts import artifact_store
from hpo.storage.leases import Leases
from hpo.storage.trials import TrialStorage, trial_storage
from tests.conftest import SMALL, Cli, assert_exact, reports_wait, wait_for


def summary_of(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def launching(file: Path, workers: int, environment: dict[str, str], *options: str) -> subprocess.Popen[str]:
    """A launch under way."""
    command = [sys.executable, "-P", "-m", "hpo", "launch", str(file), "--workers", str(workers), *options]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=file.parent, env=environment, stdout=pipe, stderr=pipe, text=True)


def test_a_data_file_alone_becomes_a_promoted_model(cli: Cli, data: Path, environment: dict[str, str]) -> None:
    settings = ["--set", "study.trials=4", "--set", "train.epochs=3", "--set", "space.hidden_size=6"]
    summary = summary_of(cli("launch", "waves.npz", "--workers", 2, "--json", *settings))
    assert summary["study"] == "waves"
    assert sum(summary["trials"].values()) == 4
    assert summary["best"]["params"]["hidden_size"] == 6
    assert summary["validation"]["auroc"] == summary["best"]["value"]
    folder = Path(summary["model"]["path"])
    assert (folder.parent / "v1").resolve() == folder.resolve()
    content = json.loads((folder / "config.json").read_text())
    assert (len(content["fill"]), content["gaps"]) == (len(content["features"]), [0.0] * len(content["features"]))
    for path in folder.iterdir():  # it is given to others
        written = b"\n".join(re.findall(rb"[ -~]{12,}", path.read_bytes()))  # a short name may stand among weights
        assert str(data.parent).encode() not in written
        assert f"{socket.gethostname()}-".encode() not in written
        assert f"{socket.gethostname()}:".encode() not in written
    names = {"model.safetensors", "config.json", "README.md", "curves.svg", "confusion.svg", "reliability.svg"}
    names.add("report.html")
    assert names <= {path.name for path in folder.iterdir()}
    assert load(folder).predict(read(data)).classes == ("fast", "slow")
    leftover = artifact_store(environment["HPO_ARTIFACTS"]).keys("checkpoint-")
    assert leftover == []


def test_the_main_job_from_study_file_to_predictions(
    cli: Cli, study_file: Callable[..., Path], trials: Callable[..., list[FrozenTrial]], tmp_path: Path
) -> None:
    summary = summary_of(cli("launch", study_file(), "--workers", 2, "--json"))
    found = trials()
    assert_exact(found, 6)
    complete = [trial for trial in found if trial.state == TrialState.COMPLETE]
    top = max(trial.value or 0.0 for trial in complete)
    alike = [trial for trial in complete if (trial.value or 0.0) >= top - 0.5 / 48]  # 60 less the holdout
    best = min(alike, key=lambda t: t.user_attrs["log_loss"])
    assert summary["best"] == {"number": best.number, "value": best.value, "params": best.user_attrs["params"]}
    for trial in found:
        names = {"seed", "device", "parameters", "worker", "provenance", "curve", "training_seconds"}
        assert names <= trial.user_attrs.keys()
        assert {"torch", "commit"} <= trial.user_attrs["provenance"].keys()
        assert list(trial.intermediate_values) == list(range(1, trial.user_attrs["epochs"] + 1))

    assert re.search(r"waves.* \d\.\d{4} \(48\) .* \d\.\d{4} \(12\) ", cli("models").stdout)
    assert summary["sequences"] == {"validation": 48, "test": 12}
    row = json.loads(cli("status", "waves", "--json").stdout)[0]
    assert (row["status"], row["version"], row["budget"]) == ("finished", 1, 6)
    assert cli("export", "waves", "--out", "out").returncode == 0
    done = cli("predict", "out", "waves.npz", "--out", "predictions.csv")
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "predictions.csv").read_text().splitlines()
    assert lines[0] == "id,predicted,probability_fast,probability_slow"
    assert len(lines) == 61
    assert "10 of 60 rows" in cli("predict", "waves", "waves.npz").stdout
    (tmp_path / "labelled.csv").write_text("id,step,label,x0,x1\na,0,slow,0,0\na,1,slow,1,1\n")
    judged = cli("evaluate", "waves", "labelled.csv", "--json")
    assert json.loads(judged.stdout)["sequences"] == 1, judged.stderr
    assert "1 sequence, " in cli("evaluate", "out", "labelled.csv", "--out", "judged.csv").stdout
    assert (tmp_path / "judged.csv").read_text().startswith("id,true,predicted,")
    other = next(t.number for t in found if t.state == TrialState.COMPLETE and t.number != best.number)
    assert cli("promote", "waves", "--trial", other).returncode == 0
    rows = json.loads(cli("models", "--json").stdout)
    assert rows[0]["sequences"] == summary["sequences"]
    assert [(row["version"], row["default"], row["test_looks"]) for row in rows] == [(1, True, 1), (2, False, 2)]
    assert cli("promote", "waves", "--trial", other, "--default").returncode == 0
    assert [row["default"] for row in json.loads(cli("models", "--json").stdout)] == [False, True]
    for number in (0, 5):
        again = cli("reproduce", "waves", "--trial", number)
        assert again.returncode == 0, again.stdout + again.stderr
        assert "bit-equal" in again.stdout
    assert cli("delete", "waves", "--yes").returncode == 0
    assert "waves" in cli("models").stdout
    gone = cli("status", "waves")
    assert gone.returncode == 1
    assert "there is no study named 'waves'" in gone.stderr


def test_a_relaunch_goes_on_to_a_raised_budget(
    cli: Cli, study_file: Callable[..., Path], trials: Callable[..., list[FrozenTrial]]
) -> None:
    file = study_file(trials=2, epochs=2)
    first = summary_of(cli("launch", file, "--workers", 1, "--json"))
    again = summary_of(cli("launch", file, "--workers", 1, "--json"))
    assert again["model"] == first["model"]
    assert_exact(trials(), 2)
    more = summary_of(cli("launch", file, "--workers", 2, "--json", "--trials", 5))
    assert_exact(trials(), 5)
    best_is_new = more["best"]["number"] != first["best"]["number"]
    assert more["model"]["default"] == more["model"]["version"] == 1 + best_is_new
    assert more["test_looks"] == 1 + best_is_new
    assert sum(more["trials"].values()) == 5


def test_a_lowered_budget_is_obeyed_as_far_as_trials_have_not_begun(
    cli: Cli, study_file: Callable[..., Path], trials: Callable[..., list[FrozenTrial]]
) -> None:
    """`--trials 6` on a study of 30 ran 30 without a word."""
    file = study_file(trials=30, epochs=1)
    assert "open for 30 trials" in cli("launch", file, "--detach").stdout
    assert "open for 3 trials" in cli("launch", file, "--detach", "--trials", 3).stdout
    first = cli("launch", file, "--workers", 1, "--json", "--trials", 3)
    assert sum(summary_of(first)["trials"].values()) == 3
    assert "more than" not in first.stderr
    second = cli("launch", file, "--workers", 1, "--json", "--set", "study.trials=2")
    assert sum(summary_of(second)["trials"].values()) == 3
    assert "study waves: 3 trials have begun, more than the 2 that are asked for; no more are started" in second.stderr
    assert_exact(trials(), 3)


def test_a_lowered_timeout_ends_a_study_and_a_raised_one_goes_on(
    cli: Cli, study_file: Callable[..., Path], trials: Callable[..., list[FrozenTrial]]
) -> None:
    """The time that a study has taken is that of its live workers, so one of a millisecond has passed."""
    file = study_file(trials=2, epochs=1, study='timeout = "1h"')
    assert summary_of(cli("launch", file, "--workers", 1, "--json"))["ended_by"] == "budget"
    more = ("--workers", 1, "--json", "--trials")
    lowered = summary_of(cli("launch", file, *more, 500, "--set", "study.timeout=0.001"))
    assert lowered["ended_by"] == "timeout"
    assert len(trials()) < 10
    begun = len(trials())
    raised = summary_of(cli("launch", file, *more, begun + 1, "--set", "study.timeout=2h"))
    assert raised["ended_by"] == "budget"
    assert_exact(trials(), begun + 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--detach", "--workers", "2"), "--detach starts no workers"),
        (("--detach", "--slots", "2"), "--detach starts no workers"),
        (("--trials", "3", "--set", "study.trials=4"), "trials are given twice"),
        (("--cpus", "2"), "--address, --cpus and --gpus go with --on ray"),
    ],
)
def test_options_that_would_be_ignored_are_refused(
    cli: Cli, study_file: Callable[..., Path], environment: dict[str, str], options: tuple[str, ...], message: str
) -> None:
    done = cli("launch", study_file(), *options, env=environment | {"COLUMNS": "300"})
    assert done.returncode != 0
    assert message in done.stderr


def test_a_contradicting_file_is_refused_with_the_difference(cli: Cli, study_file: Callable[..., Path]) -> None:
    file = study_file(trials=1, epochs=1)
    assert cli("launch", file, "--workers", 1).returncode == 0
    done = cli("launch", file, "--workers", 1, "--set", "space.layers=2")
    assert done.returncode == 1
    assert "space.layers: stored 1, file 2" in done.stderr


def test_interrupted_and_launched_again_it_ends_exactly(
    cli: Cli, study_file: Callable[..., Path], environment: dict[str, str], trials: Callable[..., list[FrozenTrial]]
) -> None:
    file = study_file(trials=5, epochs=40, space=SMALL + "\n", study='pruner = "none"')
    running = launching(file, 2, environment)
    wait_for(lambda: any(t.intermediate_values for t in _trials_or_none(trials)))
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 130
    assert "the same command goes on" in errors
    in_flight = [t for t in trials() if t.state == TrialState.RUNNING]
    summary_of(cli("launch", file, "--workers", 2, "--json"))
    found = trials()
    assert_exact(found, 5)
    for trial in in_flight:
        assert found[trial.number].params == trial.params
        assert list(found[trial.number].intermediate_values) == list(
            range(1, found[trial.number].user_attrs["epochs"] + 1)
        )


def _trials_or_none(trials: Callable[..., list[FrozenTrial]]) -> list[FrozenTrial]:
    try:
        return trials()
    except KeyError:
        return []


def test_a_killed_worker_loses_nothing_and_changes_no_value(
    cli: Cli,
    study_file: Callable[..., Path],
    environment: dict[str, str],
    trials: Callable[..., list[FrozenTrial]],
    database_url: str,
) -> None:
    file = study_file(trials=4, epochs=30, study='sampler = "random"\npruner = "none"\nlease = 2')
    with launching(file, 2, environment, "--json") as running:
        wait_for(lambda: any(t.intermediate_values for t in _trials_or_none(trials)))
        storage = trial_storage(database_url)
        os.kill(_a_busy_worker(storage), signal.SIGKILL)
        storage.close()
        output, _ = running.communicate(timeout=120)
    assert json.loads(output.splitlines()[-1])["trials"]["complete"] == 4
    found = trials()
    assert_exact(found, 4)
    summary_of(cli("launch", file, "--workers", 1, "--json", "--set", 'study.name="calm"'))
    calm = trials("calm")
    assert [t.params for t in found] == [t.params for t in calm]
    assert [t.value for t in found] == [t.value for t in calm]
    assert [t.user_attrs["curve"] for t in found] == [t.user_attrs["curve"] for t in calm]


def _a_busy_worker(storage: TrialStorage) -> int:
    """Process id of a worker that holds a trial."""
    leases = Leases(storage)
    state = leases.snapshot(storage.get_study_id_from_name("waves"))
    return int(state.in_flight[0].worker.rsplit("-", 1)[1])


def test_an_embedded_server_that_crashes_under_a_launch_comes_back(
    study_file: Callable[..., Path], environment: dict[str, str], short_folder: Path
) -> None:
    file = study_file(trials=3, epochs=30, study='pruner = "none"\nlease = 2')
    outside = {"HPO_HOME": str(short_folder / "crash")}
    environment = {name: value for name, value in environment.items() if name != "HPO_DATABASE_URL"} | outside
    with launching(file, 1, environment, "--json") as running:
        log = short_folder / "crash" / "logs" / "waves" / "worker-0.log"
        wait_for(lambda: log.exists() and "epoch 1" in log.read_text())
        data = next((short_folder / "crash").rglob("postmaster.pid"))
        os.kill(int(data.read_text().split()[0]), signal.SIGKILL)
        output, _ = running.communicate(timeout=120)
    stop = [sys.executable, "-P", "-m", "hpo", "db", "stop"]
    subprocess.run(stop, env=environment, check=True, capture_output=True)
    assert json.loads(output.splitlines()[-1])["trials"]["complete"] == 3


def test_a_study_gets_no_more_workers_than_trials(
    cli: Cli, study_file: Callable[..., Path], environment: dict[str, str]
) -> None:
    summary_of(cli("launch", study_file(trials=1, epochs=1), "--json"))
    logs = (Path(environment["HPO_HOME"]) / "logs" / "waves").glob("*.log")
    assert [log.name for log in logs] == ["worker-0.log"]


def test_enqueued_configurations_come_first(
    cli: Cli, study_file: Callable[..., Path], trials: Callable[..., list[FrozenTrial]]
) -> None:
    file = study_file(trials=3, epochs=1, more="[[enqueue]]\nhidden_size = 12\nlearning_rate = 0.01\n")
    summary_of(cli("launch", file, "--workers", 1, "--json"))
    first = trials()[0]
    assert (first.params["hidden_size"], first.params["learning_rate"]) == (12, 0.01)


def test_a_study_learns_from_another(
    cli: Cli, study_file: Callable[..., Path], trials: Callable[..., list[FrozenTrial]]
) -> None:
    file = study_file(trials=3, epochs=1, study='pruner = "none"')
    summary_of(cli("launch", file, "--workers", 1, "--json"))
    summary_of(
        cli("launch", file, "--workers", 1, "--json", "--set", "study.name=heir", "--set", "study.warm_start=waves")
    )
    copied = [t for t in trials("heir") if "copied_from" in t.user_attrs]
    own = [t for t in trials("heir") if "copied_from" not in t.user_attrs]
    assert [t.value for t in copied] == [t.value for t in trials("waves")]
    assert len(own) == 3


def test_a_finite_space_ends_the_study_early(
    cli: Cli, study_file: Callable[..., Path], trials: Callable[..., list[FrozenTrial]]
) -> None:
    constants = "\n".join(
        [
            "layers = 1\nhead_size = 0\nbatch_size = 16\nlearning_rate = 0.01\nweight_decay = 0.0",
            'optimizer = "adamw"\nbidirectional = false\npooling = "mean"\nstem = "none"',
            "difference = false\nskip = false\nlabel_smoothing = 0.0\nmixup = 0.0\njitter = 0.0",
            'normalization = "none"\nschedule = "constant"\nhidden_size = [4, 8, 12]',
        ]
    )
    summary = summary_of(cli("launch", study_file(trials=9, epochs=1, space=constants), "--workers", 1, "--json"))
    assert sum(summary["trials"].values()) == 3
    assert summary["ended_by"] == "exhausted space"
    assert {t.params["hidden_size"] for t in trials()} == {4, 8, 12}


def test_a_study_ends_when_its_trials_bring_nothing_more(
    cli: Cli, study_file: Callable[..., Path], trials: Callable[..., list[FrozenTrial]]
) -> None:
    file = study_file(trials=60, epochs=1, study='patience = 3\nmetric = "accuracy"\nfinalists = 0')
    summary = summary_of(cli("launch", file, "--workers", 2, "--json"))
    found = trials()
    assert_exact(found, len(found))
    assert len(found) < 60
    still = summary["standstill"]
    assert (summary["ended_by"], still["trials"] >= 3) == ("patience", True)
    in_order = sorted(found, key=lambda trial: (trial.datetime_complete or datetime.min, trial.number))
    after = in_order[in_order.index(found[still["since"]]) + 1 :]
    assert still["trials"] <= len(after) <= still["trials"] + 1  # one more was at work
    enough = (found[still["since"]].value or 0.0) + 0.5 / 48  # half of one of 48 validation sequences
    values = [trial.value or 0.0 for trial in after[: still["trials"]] if trial.state == TrialState.COMPLETE]
    assert max(values, default=0.0) <= enough
    said = f"{still['trials']} trials in a row brought nothing better than trial {still['since']}"
    assert f"waves: ended by patience: {said}" in cli("status").stdout
    (row,) = json.loads(cli("status", "waves", "--json").stdout)
    assert (row["status"], row["patience"], row["standstill"]) == ("finished", 3, still)
    for more in ((), ("--trials", 70)):  # what would bring nothing
        again = cli("launch", file, "--workers", 2, *more)
        assert f"waves: over by its patience, as {said}; a larger study.patience, or 0 for none" in again.stderr
        assert f"ended by patience ({said}); best is trial {summary['best']['number']}," in again.stdout
    assert len(trials()) == len(found)
    endless = ("--set", "study.patience=0", "--trials", len(found) + 2)
    went_on = summary_of(cli("launch", file, "--workers", 2, "--json", *endless))
    assert (went_on["ended_by"], went_on["standstill"]) == ("budget", None)
    assert_exact(trials(), len(found) + 2)


def test_one_worker_and_one_seed_repeat_a_study(
    cli: Cli, study_file: Callable[..., Path], trials: Callable[..., list[FrozenTrial]]
) -> None:
    space = "hidden_size = { low = 4, high = 12 }\nlayers = { low = 1, high = 2 }"
    file = study_file(trials=12, epochs=2, space=space, study="finalists = 0")
    for name in ("one", "two"):
        summary_of(cli("launch", file, "--workers", 1, "--json", "--set", f"study.name={name}"))
    one, two = trials("one"), trials("two")
    assert [(t.params, t.value) for t in one] == [(t.params, t.value) for t in two]


def test_a_trial_that_diverges_fails_with_its_reason_and_the_study_goes_on(
    cli: Cli, study_file: Callable[..., Path], trials: Callable[..., list[FrozenTrial]]
) -> None:
    wild = SMALL + 'optimizer = "sgd"\ngradient_clip = 0.0\nlearning_rate = [0.01, 1e38]\n'
    more = "[[enqueue]]\nlearning_rate = 1e38\n[[enqueue]]\nlearning_rate = 0.01\n"
    summary_of(cli("launch", study_file(trials=2, space=wild, more=more), "--workers", 1, "--json"))
    failed, fine = trials()
    assert failed.state == TrialState.FAIL
    assert failed.user_attrs["failure"].startswith("Diverged: ")
    assert fine.state == TrialState.COMPLETE


def test_a_stopped_study_ends_at_once_and_goes_on_at_the_next_launch(
    cli: Cli,
    study_file: Callable[..., Path],
    environment: dict[str, str],
    trials: Callable[..., list[FrozenTrial]],
) -> None:
    # longer than the worker takes to see it
    file = study_file(trials=3, epochs=1500, study='pruner = "none"\nlease = 2', train="patience = 0")
    with launching(file, 1, environment) as running:
        wait_for(lambda: any(t.intermediate_values for t in _trials_or_none(trials)))
        with reports_wait(environment["HPO_DATABASE_URL"]):
            assert cli("stop", "waves").returncode == 0
        _, errors = running.communicate(timeout=60)
    assert running.returncode == 130
    assert "was stopped" in errors
    assert any(trial.state == TrialState.RUNNING for trial in trials())
    summary_of(cli("launch", file, "--workers", 2, "--json"))
    assert_exact(trials(), 3)


def test_deleting_a_running_study_ends_launch_and_worker_without_a_trace(
    cli: Cli,
    study_file: Callable[..., Path],
    environment: dict[str, str],
    trials: Callable[..., list[FrozenTrial]],
) -> None:
    file = study_file(trials=3, epochs=5000, study='pruner = "none"', train="patience = 0")
    assert cli("launch", file, "--detach", "--set", "study.name=other").returncode == 0
    with launching(file, 1, environment) as running:
        wait_for(lambda: any(t.intermediate_values for t in _trials_or_none(trials)))
        workers = {row["study"]: row["workers"] for row in json.loads(cli("status", "--json").stdout)}
        assert workers == {"waves": 1, "other": 0}
        assert cli("delete", "waves", "--yes").returncode == 0
        _, errors = running.communicate(timeout=60)
    assert running.returncode == 1
    assert errors.splitlines()[-1].startswith("hpo: study 'waves' was deleted while it ran")
    assert "Traceback" not in errors + (Path(environment["HPO_HOME"]) / "logs/waves/worker-0.log").read_text()
    assert not [path for path in Path(environment["HPO_ARTIFACTS"]).iterdir() if not path.name.startswith("data-")]


def test_an_output_that_cannot_be_written_is_one_line(cli: Cli, tmp_path: Path) -> None:
    done = cli("predict", "waves", "waves.npz", "--out", tmp_path / "missing" / "p.csv")
    assert done.returncode == 2
    assert "must name a file in a folder that exists" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_a_home_of_nobody_is_one_line_wherever_a_path_is_given(
    cli: Cli, environment: dict[str, str], study_file: Callable[..., Path]
) -> None:
    """Python raises a RuntimeError for ~user where there is no such user; a shell leaves it as it is."""
    file, nobody = study_file(), "~nosuchuser/x"
    embedded = {name: value for name, value in environment.items() if name != "HPO_DATABASE_URL"}
    for command, given in [
        (("launch", f"{nobody}.toml"), environment),
        (("launch", f"{nobody}.npz"), environment),
        (("launch", file, "--set", f"data.train={nobody}"), environment),
        (("launch", file, "--set", f"data.test={nobody}"), environment),
        (("export", "waves", "--out", nobody), environment),
        (("predict", nobody, "waves.npz"), environment),
        (("status",), embedded | {"HPO_HOME": nobody}),
        (("launch", file), environment | {"HPO_ARTIFACTS": nobody}),
    ]:
        done = cli(*command, env=given)
        lines = done.stderr.splitlines()
        assert (done.returncode, len(lines)) == (1, 1), done.stderr
        assert lines[0].startswith("hpo: ")


def test_a_full_disk_is_a_clear_error_and_loses_no_finished_trial(
    cli: Cli,
    study_file: Callable[..., Path],
    environment: dict[str, str],
    tmp_path: Path,
    trials: Callable[..., list[FrozenTrial]],
) -> None:
    artifacts = Path(environment["HPO_ARTIFACTS"])
    artifacts.mkdir()
    mount = ["unshare", "--map-root-user", "--mount", "sh", "-c", 'mount -t tmpfs -o size=600k none "$0" && "$@"']
    if not shutil.which("unshare") or subprocess.run([*mount, str(artifacts), "true"], capture_output=True).returncode:
        pytest.skip("a full file system needs user namespaces, which this machine does not allow")
    space = SMALL.replace("hidden_size = { low = 4, high = 12, step = 4 }", "hidden_size = [4, 256]")
    more = "[[enqueue]]\nhidden_size = 4\n[[enqueue]]\nhidden_size = 256\n"
    file = study_file(trials=2, epochs=2, space=space, more=more)
    hasty = "import hpo.cli, hpo.launcher.local as local; local.PAUSE_S = 0.1; hpo.cli.main()"
    command = [*mount, str(artifacts), sys.executable, "-P", "-c", hasty, "launch", str(file), "--workers", "1"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "cannot write '" in done.stderr  # a checkpoint or, of a trial too short for one, its weights
    assert "MiB free" in done.stderr
    finished, waiting = trials()
    assert (finished.state, waiting.state) == (TrialState.COMPLETE, TrialState.RUNNING)
    summary_of(cli("launch", file, "--workers", 1, "--json"))  # on another disk, with an empty artifact store
    again = trials()
    assert_exact(again, 2)
    assert again[0].value == finished.value


def test_a_study_out_of_time_promotes_what_it_has(
    cli: Cli, study_file: Callable[..., Path], trials: Callable[..., list[FrozenTrial]]
) -> None:
    study = 'pruner = "none"\ntimeout = 8\nlease = 2\nfinalists = 0'
    file = study_file(trials=500, epochs=100000, study=study, train="patience = 0")
    summary = summary_of(cli("launch", file, "--workers", 1, "--json"))
    assert summary["ended_by"] == "timeout"
    assert summary["trials"]["complete"] == len(trials()) == 1


def test_the_test_score_is_that_of_the_saved_model(
    cli: Cli, data: Path, study_file: Callable[..., Path], tmp_path: Path
) -> None:
    arrays = dict(np.load(data))
    np.savez(tmp_path / "test.npz", **{name: value[:30] for name, value in arrays.items()})
    file = study_file(trials=2, epochs=2)
    file.write_text(file.read_text().replace('train = "waves.npz"', 'train = "waves.npz"\ntest = "test.npz"'))
    summary = summary_of(cli("launch", file, "--workers", 1, "--json"))
    test = read(tmp_path / "test.npz")
    predictions = load(summary["model"]["path"]).predict(test)
    assert test.labels is not None
    assert score("auroc", predictions.probabilities, test.labels) == pytest.approx(summary["test"]["auroc"], abs=1e-6)


def test_the_library_needs_no_main_guard(
    environment: dict[str, str], tmp_path: Path, study_file: Callable[..., Path]
) -> None:
    study_file(trials=2, epochs=1)
    script = tmp_path / "script.py"
    script.write_text(
        "import hpo\n"
        'summary = hpo.launch("waves.toml", workers=2)\n'
        'model = hpo.load(summary["model"]["path"])\n'
        'print(len(model.predict(hpo.read("waves.npz")).labels))\n'
    )
    done = subprocess.run([sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["60"]


def test_columns_have_any_names_in_the_study_and_in_new_data(cli: Cli, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).normal(size=(30, 4))
    rows = [f"p{i},{t},{noise[i, t] + i % 2:.3f},{'ab'[i % 2]}" for i in range(30) for t in range(4)]
    (tmp_path / "train.csv").write_text("\n".join(["patient,hour,value,state", *rows]))
    (tmp_path / "new.csv").write_text("\n".join(["person,when,value,outcome", *rows]))
    columns = 'label = "state"\nid = "patient"\nstep = "hour"\ngroup = "patient"'
    (tmp_path / "study.toml").write_text(
        f'[study]\nname = "columns"\ntrials = 1\n[data]\ntrain = "train.csv"\n{columns}\n'
        f"[train]\nepochs = 1\n[space]\n{SMALL}"
    )
    summary_of(cli("launch", "study.toml", "--workers", 1, "--json"))
    assert cli("predict", "columns", "train.csv", "--out", "found.csv").returncode == 0
    assert "\np0," in (tmp_path / "found.csv").read_text()
    refused = cli("predict", "columns", "new.csv")
    assert refused.returncode == 1
    assert "new.csv has no id column 'patient'; its columns are person, when, value, outcome" in refused.stderr
    named = ("--id", "person", "--step", "when")
    predicted = cli("predict", "columns", "new.csv", *named, "--out", "new-found.csv")
    assert predicted.returncode == 0, predicted.stderr
    assert (tmp_path / "new-found.csv").read_text() == (tmp_path / "found.csv").read_text()
    judged = cli("evaluate", "columns", "new.csv", *named, "--label", "outcome", "--group", "person", "--json")
    assert json.loads(judged.stdout)["sequences"] == 30
    refused = cli("evaluate", "columns", "new.csv", *named, "--label", "state")
    assert "has no label column 'state'; its columns are person, when, value, outcome" in refused.stderr


def test_a_study_in_the_order_of_time_with_weights(cli: Cli, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    noise, day, trust = random.normal(size=(60, 4)), random.permutation(60), random.integers(1, 4, 60)
    rows = [
        (
            f"p{i}",
            t,
            f"{np.datetime64('2024-01-01') + day[i]} 0{t}:30",
            trust[i],
            f"{noise[i, t] + i % 2:.3f}",
            "ab"[i % 2],
        )
        for i in range(60)
        for t in range(4)
    ]
    header = ("id", "step", "read", "trust", "value", "label")
    for name, names, kept in (
        ("train", header, range(6)),
        ("renamed", ("id", "step", "when", "worth", "value", "label"), range(6)),
        ("bare", header, (0, 1, 4, 5)),
    ):
        lines = [",".join(str(row[i]) for i in kept) for row in (names, *rows)]
        (tmp_path / f"{name}.csv").write_text("\n".join(lines))
    (tmp_path / "study.toml").write_text(
        '[study]\nname = "ordered"\ntrials = 2\n[data]\ntrain = "train.csv"\ntime = "read"\nweight = "trust"\n'
        f'gap = "1d"\nvalidation = {{ folds = 3 }}\n[train]\nepochs = 2\n[space]\n{SMALL}'
    )
    launched = cli("launch", "study.toml", "--workers", 2, "--json")
    summary = summary_of(launched)
    assert "test part: 12 sequences" in launched.stderr
    assert "validation on 3 rolling folds by 'read', 1d before it left out" in launched.stderr
    model = load(summary["model"]["path"])
    assert model.config.columns == {
        "label": "label", "id": "id", "step": "step", "group": "group", "time": "read", "weight": "trust",
    }  # fmt: skip
    assert (model.config.features, model.config.members) == (("value",), 1)
    assert model.config.validation is not None
    assert model.config.test is not None
    assert model.config.validation.weighted
    assert model.config.test.weighted

    whole = read(tmp_path / "train.csv", time="read", weight="trust")
    assert whole.moments is not None
    test = whole.take(np.sort(np.argsort(whole.moments)[-12:]))
    assert test.labels is not None
    p = model.predict(test).probabilities
    assert score("accuracy", p, test.labels, model.config.threshold, test.weights) == pytest.approx(
        summary["test"]["accuracy"]
    )

    weighted = json.loads(cli("evaluate", "ordered", "train.csv", "--json").stdout)
    plain = json.loads(cli("evaluate", "ordered", "bare.csv", "--json").stdout)
    assert weighted["confusion"] == plain["confusion"]
    assert weighted["metrics"]["log_loss"] != plain["metrics"]["log_loss"]
    named = ("--time", "when", "--weight", "worth")
    assert json.loads(cli("evaluate", "ordered", "renamed.csv", *named, "--json").stdout) == weighted
    refused = cli("evaluate", "ordered", "renamed.csv", "--weight", "price")
    assert "renamed.csv has no weight column 'price'; its columns are id, step, when, worth" in refused.stderr
    found = {cli("predict", "ordered", f"{name}.csv").stdout for name in ("train", "bare", "renamed")}
    assert len(found) == 1
    assert "bit-equal" in cli("reproduce", "ordered", "--trial", 0).stdout
    again = cli("launch", "study.toml", "--workers", 1, "--trials", 3, "--json")
    assert sum(summary_of(again)["trials"].values()) == 3
    changed = cli("launch", "study.toml", "--set", "data.gap=2d")
    assert "data.gap: stored 86400.0, file 172800.0" in changed.stderr


SHOWN = ("waves: training part: 48 sequences of ", "waves: 0/2 trials", "waves: 2/2 trials; 2 complete", "finished")


def test_the_library_shows_progress_unless_it_is_told_not_to(
    environment: dict[str, str], tmp_path: Path, study_file: Callable[..., Path]
) -> None:
    """It seemed to hang: a script showed nothing until its end."""
    study_file(trials=2, epochs=1, study='pruner = "none"')
    script = tmp_path / "script.py"
    script.write_text(
        "import hpo, logging, sys\n"
        "level = logging.getLogger('hpo').level\n"
        "hpo.launch('waves.toml', workers=1)\n"
        "assert logging.getLogger('hpo').level == level\n"
        "print('---', file=sys.stderr)\n"
        "hpo.launch('waves.toml', workers=1, quiet=True)\n"
        "hpo.launch('waves.toml', workers=1, show=lambda state: print(state.name, state.status))\n"
        "sys.stderr = None\n"  # as under pythonw
        "hpo.launch('waves.toml', workers=1)\n"
    )
    done = subprocess.run([sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shown, _, rest = done.stderr.partition("---\n")
    assert all(text in shown for text in SHOWN), shown
    assert "\x1b" not in shown
    assert len(shown.splitlines()) < 12
    assert rest == ""
    assert done.stdout == "waves finished\n"


# What rich asks a kernel of Jupyter for, and how it shows something there.
NOTEBOOK = """
import builtins, sys, types

class ZMQInteractiveShell:
    pass

IPython, display = types.ModuleType("IPython"), types.ModuleType("IPython.display")
display.display = lambda shown: print("<pre" in shown.html, shown.text, end="")
sys.modules |= {"IPython": IPython, "IPython.display": display}
builtins.get_ipython = ZMQInteractiveShell

import hpo
hpo.launch("waves.toml", workers=1)
"""


def test_in_a_notebook_it_shows_plain_lines_below_the_cell(
    environment: dict[str, str], tmp_path: Path, study_file: Callable[..., Path]
) -> None:
    """Without ipywidgets, which rich's live views ask for there with a warning."""
    study_file(trials=2, epochs=1, study='pruner = "none"')
    command = [sys.executable, "-W", "error", "-c", NOTEBOOK]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert all(line.startswith("True waves: ") for line in lines)
    assert all(text in done.stdout for text in SHOWN), done.stdout


def test_neither_help_nor_a_launcher_imports_torch() -> None:
    """The launcher's own imports would compete with the fork server's."""
    code = "import sys, hpo.cli, hpo.launcher.supervision, hpo.terminal; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
