"""Changing one's mind, by the commands: trials that are not to count, and what becomes of their models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from tests.conftest import Cli


def test_a_winner_that_is_dropped_is_replaced_and_comes_back(cli: Cli, study_file: Callable[..., Path]) -> None:
    def run(*arguments: object) -> str:
        done = cli(*arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    file = study_file(trials=4, epochs=2)
    won = json.loads(run("launch", file, "--workers", 1, "--json").splitlines()[-1])["best"]["number"]
    said = run("trials", "drop", "waves", won, "--reason", "the wrong file")
    assert f"trial {won} of waves does not count: dropped " in said
    assert (
        "the budget of 4 trials stays as it is spent: `hpo launch STUDY.toml --trials N` with more gives more" in said
    )
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
    missing = cli("trials", "drop", "waves", 17, "--reason", "x")
    assert (missing.returncode, "the study has trials 0 to 4, not 17" in missing.stderr) == (1, True)
