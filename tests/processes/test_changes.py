"""Changing one's mind, by the commands: trials that are not to count, and their models; a space that is to be wider."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from optuna.distributions import CategoricalDistribution
from optuna.trial import FrozenTrial

from tests.conftest import Cli, assert_exact, reports_wait, wait_for


def test_a_winner_that_is_dropped_is_replaced_and_comes_back(cli: Cli, study_file: Callable[..., Path]) -> None:
    def run(*arguments: object) -> str:
        done = cli(*arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    file = study_file(trials=4, epochs=2, study='pruner = "none"')
    won = json.loads(run("launch", file, "--workers", 1, "--json").splitlines()[-1])["best"]["number"]
    said = run("trials", "drop", "waves", won, "--reason", "the wrong file")
    assert f"trial {won} of waves does not count: dropped " in said
    assert "the budget of 4 trials stays as it is spent: `hpo launch STUDY.toml --trials N` gives more" in said
    assert f"waves: version 1 is of trial {won}, which does not count: `hpo promote waves` makes one of trial " in said
    (row,) = json.loads(run("status", "waves", "--json"))
    assert ([each["reason"] for each in row["dropped"]], row["dropped_winner"]) == (["the wrong file"], won)
    second = row["best"]["number"]
    assert second != won
    assert f"waves: dropped trial {won}\n" in run("status")
    assert f"trial {won} does not count: dropped " in run("status", "waves")
    assert "dropped since and does not count: `hpo promote waves`" in run("launch", file, "--workers", 1)
    refused = cli("promote", "waves", "--trial", won)
    assert (refused.returncode, f"`hpo trials restore waves {won}` lets it count again" in refused.stderr) == (1, True)
    assert "(default)" in run("promote", "waves")
    models = json.loads(run("models", "--json"))
    assert [(each["trial"], each["default"]) for each in models] == [(won, False), (second, True)]
    summary = json.loads(run("launch", file, "--workers", 1, "--json").splitlines()[-1])
    assert (summary["model"]["version"], summary["best"]["number"], summary["winner_dropped"]) == (2, second, False)
    more = json.loads(run("launch", file, "--workers", 1, "--trials", 5, "--json").splitlines()[-1])
    assert sum(more["trials"].values()) == 5  # numbers and budget go on
    assert more["best"]["number"] != won
    assert "bit-equal" in run("reproduce", "waves", "--trial", won)
    assert f"trial {won} of waves counts" in run("trials", "restore", "waves", won)
    rows = json.loads(run("trials", "list", "waves", "--json"))
    assert [row["dropped"] for row in rows] == [None] * 5
    assert run("trials", "list", "waves", "--format", "csv", "--out", "waves.csv") == "5 trials in waves.csv\n"
    with (file.parent / "waves.csv").open(newline="") as table:
        lines = list(csv.DictReader(table))
    found = [(line["number"], line["value"]) for line in lines]
    assert found == [(str(number), repr(row["value"])) for number, row in enumerate(rows)]
    assert all(int(line["weight_count"]) > 0 and line["params.hidden_size"] and line["worker"] for line in lines)
    assert json.loads(run("trials", "waves", "--json")) == rows
    assert json.loads(run("trials", "list", "waves", "--format", "json"))[4]["epochs"] == rows[4]["epochs"] > 0
    for wrong, text in (
        (("--format", "json", "--json"), "two forms of the same"),
        (("--out", "x.csv"), "--out needs --format"),
        (("--format", "parquet"), "needs --out FILE"),
        (("--format", "csv", "--out", "no/folder/x.csv"), "a folder that exists"),
    ):
        refused = cli("trials", "list", "waves", *wrong)
        assert (refused.returncode, text in " ".join(refused.stderr.replace("│", " ").split())) == (2, True)
    missing = cli("trials", "drop", "waves", 17, "--reason", "x")
    assert (missing.returncode, "the study has trials 0 to 4, not 17" in missing.stderr) == (1, True)


def test_a_worker_at_work_ends_its_trial_and_draws_the_next_from_the_wider_space(
    cli: Cli,
    study_file: Callable[..., Path],
    environment: dict[str, str],
    database_url: str,
    trials: Callable[..., list[FrozenTrial]],
) -> None:
    def run(*arguments: object) -> str:
        done = cli(*arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    space = "layers = 1\nhead_size = 0\nbatch_size = 16\nhidden_size = "
    study = 'sampler = "random"\npruner = "none"'
    run("launch", study_file(3, 2, f"{space}[4, 8]", study=study), "--detach")
    command = [sys.executable, "-P", "-m", "hpo", "worker", "--study", "waves"]
    with ExitStack() as stack:
        with reports_wait(database_url):
            worker = stack.enter_context(subprocess.Popen(command, env=environment))
            wait_for(lambda: any(trial.params for trial in trials()))
            wider = study_file(9, 2, f"{space}[12, 8, 4]".replace("head_size = 0", "head_size = [4, 0]"), study=study)
            run("launch", wider, "--detach")
        assert worker.wait(120) == 0
    found = trials()
    assert_exact(found, 9)
    first, *later = [trial.user_attrs["params"] for trial in found]
    assert (first["hidden_size"] in (4, 8), first["head_size"]) == (True, 0)
    assert found[0].distributions["hidden_size"] == CategoricalDistribution((4, 8))
    assert all(trial.distributions["hidden_size"] == CategoricalDistribution((4, 8, 12)) for trial in found[1:])
    assert {params["head_size"] for params in later} == {0, 4}
    (change,) = json.loads(run("changes", "waves", "--json"))
    entries = {"hidden_size": {"from": [4, 8], "to": [4, 8, 12]}, "head_size": {"from": 0, "to": [4, 0]}}
    assert (change["what"], change["detail"]) == ("widen", {"space": entries, "started": 1})
    assert "widen space." in run("changes", "waves")
    assert "bit-equal" in run("reproduce", "waves", "--trial", 0)
    narrower = cli("launch", study_file(9, 2, f"{space}[4, 12]", study=study))
    assert narrower.returncode == 1
    assert "space.hidden_size: stored [4, 8, 12], file [4, 12]: a list of choices may get more" in narrower.stderr
