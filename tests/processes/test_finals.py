"""Finals by real processes: exact, adopted, stopped, extended (what kills do to them: test_chaos.py)."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import pytest
from optuna.trial import FrozenTrial, TrialState
from safetensors.numpy import load_file

import hpo
from hpo.models.bundle.bundle import Bundle
from hpo.models.data.sequences import Sequences
from hpo.storage.artifacts import artifact_store
from hpo.storage.keys import checkpoint_prefix
from hpo.study.lifecycle import finals_name
from hpo.study.ranking import rank
from tests.conftest import SMALL, Cli, assert_exact, reports_wait, wait_for

FINALS = 'finalists = 2\nrepeats = 3\npruner = "none"'  # which prunes none, or there may be one finalist alone
Read = Callable[..., list[FrozenTrial]]
Study = Callable[..., Path]


def summary(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def launch(cli: Cli, *more: object, workers: int = 2) -> dict[str, Any]:
    return summary(cli("launch", "waves.toml", "--workers", workers, "--json", "--quiet", *more))


def ended(found: list[FrozenTrial]) -> list[tuple[float | None, dict[str, Any], list[float]]]:
    """What is the same however often workers were lost."""
    return [(trial.value, trial.user_attrs["params"], trial.user_attrs["curve"]["value"]) for trial in found]


def test_the_best_are_trained_again_and_the_winners_trainings_are_the_model(
    cli: Cli, study_file: Study, trials: Read, data: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    study_file(trials=4, study=FINALS)
    found = launch(cli)
    own, finals = trials(), trials(finals_name("waves"))
    assert_exact(own, 4)
    assert_exact(finals, 6)
    assert {trial.state for trial in finals} == {TrialState.COMPLETE}  # nothing is pruned
    assert [trial.params for trial in finals] == [finals[0].params, finals[1].params] * 3
    assert len({trial.user_attrs["seed"] for trial in finals}) == 3
    assert not {trial.user_attrs["seed"] for trial in finals} & {trial.user_attrs["seed"] for trial in own}
    number = found["best"]["number"]
    mine = [trial for trial in finals if trial.params == own[number].params]
    assert len(mine) == 3
    estimate = found["estimate"]
    assert estimate["values"] == [trial.value for trial in mine]
    assert estimate["value"] == pytest.approx(mean(estimate["values"]))
    assert estimate["interval"][0] <= estimate["value"] <= estimate["interval"][1]
    assert estimate["selected"] == own[number].value == found["best"]["value"]
    model = hpo.load(found["model"]["path"])
    assert model.config.members == len(model.models) == 15
    assert model.config.estimate is not None
    assert list(model.config.estimate.values) == estimate["values"]
    sequences = hpo.read(data)
    assert isinstance(sequences, Sequences)
    plain = replace(model.config, temperature=1.0)  # before it, probabilities are means of the networks'
    averaged = Bundle(plain, model.models).predict(sequences).probabilities
    parts = [Bundle(plain, (each,)).predict(sequences).probabilities for each in model.models]
    assert averaged == pytest.approx(np.mean(parts, axis=0), abs=1e-6)
    card = (Path(found["model"]["path"]) / "README.md").read_text()
    assert f"Expect auroc **{estimate['value']:.4f}**" in card
    again = cli("reproduce", "waves/finals", "--trial", 3)
    assert again.returncode == 0, again.stderr
    said = cli("status", "waves").stdout
    assert "waves: 6 of 6 trainings of its finals have ended; hpo status waves/finals" in said
    assert "waves/finals" not in {row["study"] for row in json.loads(cli("status", "--json").stdout)}
    assert "trial 5" in cli("status", "waves/finals").stdout or "finished" in cli("status", "waves/finals").stdout


def test_more_trials_later_train_only_what_finals_lack(cli: Cli, study_file: Study, trials: Read) -> None:
    study_file(trials=3, study=FINALS)
    launch(cli)
    before = ended(trials(finals_name("waves")))
    launch(cli, "--trials", 8)
    finals = trials(finals_name("waves"))
    assert ended(finals)[:6] == before
    assert len(trials()) == 8
    assert_exact(finals, len(finals))
    assert len(finals) in (6, 9, 12)  # none, one or two of the finalists are new
    each = [json.dumps(trial.params, sort_keys=True) for trial in finals]
    assert all(each.count(one) == 3 for one in each)


def test_a_study_that_is_over_gets_finals_when_its_file_asks_for_them(
    cli: Cli, study_file: Study, trials: Read
) -> None:
    study_file(trials=3, study='pruner = "none"')
    assert launch(cli)["estimate"] is None
    before = ended(trials())
    study_file(trials=3, study=FINALS)
    found = launch(cli)
    assert ended(trials()) == before
    assert_exact(trials(finals_name("waves")), 6)
    assert len(found["estimate"]["values"]) == 3
    assert found["model"] | {"path": ""} == {"name": "waves", "version": 2, "default": 2, "path": ""}
    assert launch(cli)["model"]["version"] == 2  # nothing is left to do
    launch(cli, "--set", "study.repeats=4")
    assert_exact(trials(finals_name("waves")), 8)


def test_a_study_that_is_stopped_during_finals_goes_on_with_them(
    cli: Cli, study_file: Study, trials: Read, environment: dict[str, str], database_url: str
) -> None:
    path = study_file(trials=2, epochs=40, study=FINALS, train="patience = 0")
    command = [sys.executable, "-P", "-m", "hpo", "launch", str(path), "--workers", "2", "--quiet"]
    running = subprocess.Popen(command, env=environment, cwd=path.parent)
    name = finals_name("waves")

    def some() -> bool:
        try:
            return len(trials(name)) > 2
        except KeyError:  # they have not begun
            return False

    wait_for(some)
    with reports_wait(database_url):
        assert cli("stop", "waves").returncode == 0
    assert running.wait(60) != 0
    left = trials(name)
    assert any(not trial.state.is_finished() for trial in left) or len(left) < 6
    launch(cli)
    assert_exact(trials(name), 6)


def test_a_deleted_study_takes_its_finals_with_it(cli: Cli, study_file: Study, trials: Read, tmp_path: Path) -> None:
    study_file(trials=2, study=FINALS)
    launch(cli)
    assert cli("delete", "waves", "--yes").returncode == 0
    for name in ("waves", finals_name("waves")):
        with pytest.raises(KeyError):
            trials(name)
    kept = [path.name for path in (tmp_path / "artifacts").rglob("*") if path.is_file()]
    assert not [name for name in kept if name.startswith(("weights", "curve", "checkpoint", "log"))]


def test_no_checkpoint_is_left_of_finals(cli: Cli, study_file: Study, tmp_path: Path, database_url: str) -> None:
    """Also not one that a worker had written when it was killed, before any row named it."""
    study_file(trials=2, study=FINALS)
    launch(cli)
    with closing(hpo.storage_for(database_url)) as storage:
        (key,) = storage.connection.execute("SELECT store_key FROM hpo.terms WHERE finals_of IS NOT NULL")[0]
    store = artifact_store(str(tmp_path / "artifacts"))
    store.put(f"{checkpoint_prefix(key)}0-1-1-{64 * '0'}", b"nobody knows of it")
    launch(cli, "--set", "study.repeats=4")
    assert not list(store.keys("checkpoint-"))


def test_a_model_of_one_repeat_is_the_first_of_them(cli: Cli, study_file: Study, trials: Read) -> None:
    study_file(trials=2, study=FINALS, more='[promote]\nensemble = "none"')
    found = launch(cli)
    model = hpo.load(found["model"]["path"])
    assert model.config.members == 5
    finals = trials(finals_name("waves"))
    mine = [trial for trial in finals if trial.user_attrs["params"] == found["best"]["params"]]
    assert found["estimate"]["values"] == [trial.value for trial in mine]
    assert model.config.provenance["finals"] == {"1": mine[0].number}
    assert model.config.provenance["seed"] == [mine[0].user_attrs["seed"]]
    assert found["validation"]["auroc"] == mine[0].value
    assert "This model is one of these" in (Path(found["model"]["path"]) / "README.md").read_text()


def test_other_finalists_predict_with_the_winner_where_that_is_better(
    cli: Cli, study_file: Study, trials: Read, data: Path, tmp_path: Path
) -> None:
    """Which ones goes by the finals alone, so that another promotion gives the same model."""
    space = f"{SMALL}\npooling = ['mean', 'last']"
    asked = 'finalists = 4\nrepeats = 2\npruner = "none"\nmetric = "log_loss"\nsampler = "random"'
    file = study_file(trials=4, study=asked, space=space)
    plain = launch(cli)
    file.write_text(f'{file.read_text()}\n[promote]\nensemble = "greedy"\n')
    found, again = launch(cli), launch(cli)
    assert [each["model"]["version"] for each in (plain, found, again)] == [1, 2, 2]
    assert found["best"] == plain["best"]
    assert found["estimate"]["values"] == plain["estimate"]["values"]
    assert found["validation"]["log_loss"] <= plain["validation"]["log_loss"]
    model = hpo.load(found["model"]["path"])
    ensemble, config = model.config.provenance["ensemble"], model.config
    assert ensemble[0]["trial"] == found["best"]["number"]
    assert len(ensemble) == len(config.components) > 1
    assert [each["weight"] for each in ensemble] == pytest.approx([each.weight for each in config.components])
    assert len(model.models) == config.networks == 10 * len(ensemble)
    finals = trials(finals_name("waves"))
    for each in ensemble:
        assert {finals[number].user_attrs["params"]["hidden_size"] for number in each["finals"].values()} == {
            each["params"]["hidden_size"]
        }
    weights = load_file(Path(found["model"]["path"]) / "model.safetensors")
    assert found["footprint"]["size_mb"] * 1e6 == pytest.approx(sum(each.nbytes for each in weights.values()))
    assert "greedy selection" in (Path(found["model"]["path"]) / "README.md").read_text()
    done = cli("predict", found["model"]["path"], data, "--out", tmp_path / "predictions.csv")
    assert done.returncode == 0, done.stderr
    done = cli("export", "waves", "--out", tmp_path / "out", "--format", "onnx")
    assert done.returncode == 0, done.stderr
    file.write_text(f"{file.read_text()}\n[limits]\nsize_mb = {1.01 * plain['footprint']['size_mb']}\n")
    small = launch(cli)
    assert small["footprint"]["size_mb"] <= 1.01 * plain["footprint"]["size_mb"]


def test_finals_are_not_stopped_or_deleted_for_themselves(cli: Cli, study_file: Study, trials: Read) -> None:
    study_file(trials=2, study=FINALS)
    launch(cli)
    for command in (("stop", "waves/finals"), ("delete", "waves/finals", "--yes")):
        refused = cli(*command)
        assert refused.returncode == 1
        assert f"`hpo {command[0]} waves`" in refused.stderr
    assert_exact(trials(finals_name("waves")), 6)


def test_another_finalist_is_promoted_where_the_winner_does_not_count_any_more(cli: Cli, study_file: Study) -> None:
    study_file(trials=4, study=FINALS)
    number = launch(cli)["best"]["number"]
    assert cli("trials", "drop", "waves", number, "--reason", "a wrong label").returncode == 0
    done = cli("promote", "waves")
    assert done.returncode == 0, done.stderr
    assert f"trial {number}" not in done.stdout
    (newest,) = [each for each in json.loads(cli("models", "--json").stdout) if each["version"] == 2]
    assert newest["trial"] != number
    assert len(newest["estimate"]["values"]) == 3


def test_finals_that_ran_out_of_time_are_decided_by_what_is_whole(
    cli: Cli, study_file: Study, trials: Read, data: Path
) -> None:
    """The study's own part of its time is long over then; a training that was cut off says nothing."""
    study_file(
        trials=2,
        epochs=2_000,
        study='finalists = 2\nrepeats = 3\ntimeout = "8s"\npruner = "none"',
        train="patience = 0",
    )
    found = launch(cli)
    finals = trials(finals_name("waves"))
    assert 0 < len(finals) < 6
    assert not any(trial.state == TrialState.COMPLETE for trial in finals)
    assert found["estimate"] is None
    scores = {each.number: (each.value or 0.0, each.user_attrs["log_loss"]) for each in trials()}
    assert found["best"]["number"] == rank(scores, "auroc", 0.5 / len(np.load(data)["y"]))[0]
