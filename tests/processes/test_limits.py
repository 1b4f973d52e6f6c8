"""Studies with [limits], by real processes: from the file to the model that is promoted, or to why none is."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import FrozenTrial, TrialState
from safetensors.torch import load_file

import hpo
from hpo.models.costs import Costs
from tests.conftest import SMALL, Cli
from tests.processes.test_finals import launch

Study = Callable[..., Path]
Read = Callable[..., list[FrozenTrial]]
LARGE = 48  # hidden size that is enqueued beside a space of smaller ones
SPACE = SMALL.replace("high = 12", "high = 48") + "bidirectional = false\n"


def limits(**given: float) -> str:
    return "[limits]\n" + "\n".join(f"{name} = {limit!r}" for name, limit in given.items()) + "\n"


def stored_mb(folder: str) -> float:
    tensors = load_file(Path(folder) / "model.safetensors")
    return sum(each.nbytes for each in tensors.values()) / 1e6


def test_the_winner_is_within_the_limits_and_what_is_too_large_takes_no_epoch(
    cli: Cli, study_file: Study, trials: Read
) -> None:
    large = f"[[enqueue]]\nhidden_size = {LARGE}\n"
    study_file(trials=6, space=SPACE, more=large + limits(size_mb=0.1, latency_ms=1e9), study='pruner = "none"')
    found = launch(cli)
    own = trials()
    assert len(own) == 6
    first, *others = own
    assert first.params["hidden_size"] == LARGE
    assert (first.state, first.intermediate_values) == (TrialState.PRUNED, {})
    assert first.user_attrs["size_mb"] > 0.1
    assert first.constraints["size_mb"] == first.user_attrs["size_mb"] / 0.1 - 1 > 0
    for trial in others:
        assert trial.state == TrialState.COMPLETE
        assert trial.user_attrs["size_mb"] <= 0.1
        assert trial.user_attrs["latency_ms"] > 0
        assert trial.constraints["size_mb"] <= 0
        assert trial.constraints["latency_ms"] <= 0
    assert found["beyond_limits"] == {"limits": {"size_mb": 0.1, "latency_ms": 1e9}, "trials": 1}
    assert found["footprint"]["size_mb"] == stored_mb(found["model"]["path"]) <= 0.1
    assert found["footprint"]["size_mb"] == own[found["best"]["number"]].user_attrs["size_mb"]
    config = hpo.load(found["model"]["path"]).config
    assert config.footprint is not None
    assert config.footprint.latency_ms == found["footprint"]["latency_ms"] > 0
    assert config.footprint.steps == 12
    assert "on one thread of" in (Path(found["model"]["path"]) / "README.md").read_text()
    rows = list(csv.DictReader(io.StringIO(cli("trials", "list", "waves", "--format", "csv").stdout)))
    assert [row["feasible"] for row in rows] == ["false", *["true"] * 5]
    assert [row["size_mb"] for row in rows] == [repr(trial.user_attrs["size_mb"]) for trial in own]
    assert "1 beyond size_mb 0.1 and latency_ms 1e+09" in cli("status", "waves").stdout
    status = json.loads(cli("status", "waves", "--json").stdout.splitlines()[0])
    (status,) = status if isinstance(status, list) else (status,)
    assert status["beyond_limits"]["trials"] == 1
    again = cli("reproduce", "waves", "--trial", found["best"]["number"])
    assert again.returncode == 0, again.stderr


@pytest.fixture
def too_slow(study_file: Study) -> Path:
    return study_file(trials=3, study='sampler = "random"', more=limits(latency_ms=1e-6))


def test_without_a_trial_within_the_limits_nothing_is_promoted_until_one_is_raised(
    cli: Cli, too_slow: Path, trials: Read
) -> None:
    refused = cli("launch", too_slow, "--workers", 2, "--json", "--quiet")
    assert refused.returncode != 0
    figures = {trial.number: trial.user_attrs["latency_ms"] for trial in trials() if trial.state == TrialState.COMPLETE}
    nearest = min(figures, key=lambda number: figures[number])
    reason = (
        f"no completed trial is within [limits] latency_ms at most 1e-06: the nearest, trial {nearest}, has latency_ms "
        f"{figures[nearest]:.4g} and size_mb"
    )
    out = "raise the limit and launch again, or narrow [space] in a study of another name; `hpo promote waves --trial "
    for said in (refused.stderr, cli("promote", "waves").stderr):
        assert reason in " ".join(said.split())
        assert f"{out}{nearest}` takes it all the same" in " ".join(said.split())
    status = cli("status", "waves").stdout
    assert "finished" in status
    taken = cli("promote", "waves", "--trial", nearest)
    assert taken.returncode == 0, taken.stderr
    too_slow.write_text(too_slow.read_text().replace("latency_ms = 1e-06", "latency_ms = 1e9"))
    found = launch(cli)
    assert len(trials()) == 3  # none was trained again
    assert found["best"]["number"] in figures
    assert found["model"]["default"] == found["model"]["version"]


def test_the_repeats_of_finals_are_one_model_only_within_the_limits(
    cli: Cli, study_file: Study, trials: Read, tmp_path: Path
) -> None:
    finals = 'finalists = 2\nrepeats = 2\npruner = "none"'
    file = study_file(trials=3, space=SPACE.replace("48", "12"), study=finals)
    found = launch(cli)
    number = found["best"]["number"]
    own = trials()[number].user_attrs["size_mb"]
    assert found["footprint"]["size_mb"] == stored_mb(found["model"]["path"]) == pytest.approx(2 * own)
    most = max(trial.user_attrs["size_mb"] for trial in trials())
    file.write_text(f"{file.read_text()}\n[limits]\nsize_mb = {1.5 * most}\n")
    again = launch(cli)
    assert again["best"]["number"] == number
    small = 2 * own > 1.5 * most
    assert (
        again["footprint"]["size_mb"] == stored_mb(again["model"]["path"]) == pytest.approx(own if small else 2 * own)
    )
    file.write_text(file.read_text().replace(f"size_mb = {1.5 * most}", f"size_mb = {1.01 * own}"))
    last = launch(cli)
    assert last["footprint"]["size_mb"] == stored_mb(last["model"]["path"]) <= 1.01 * own


def test_a_study_that_is_over_is_promoted_anew_by_other_costs(cli: Cli, study_file: Study, trials: Read) -> None:
    file = study_file(trials=2)
    first = launch(cli)
    file.write_text(f"{file.read_text()}\n[promote]\ncosts = {{ false_negative = 50 }}\n")
    second, again = launch(cli), launch(cli)
    assert len(trials()) == 2
    assert first["best"] == second["best"]
    assert [each["model"]["version"] for each in (first, second, again)] == [1, 2, 2]
    before, after = (hpo.load(each["model"]["path"]).config for each in (first, second))
    assert before.costs is None
    assert after.costs == Costs(1.0, 50.0)
    assert after.threshold < before.threshold


def test_figures_are_there_without_limits_and_do_not_belong_to_what_repeats(
    cli: Cli, study_file: Study, trials: Read
) -> None:
    study_file(trials=2, study='pruner = "none"')
    found = launch(cli, workers=1)
    assert found["beyond_limits"] is None
    assert found["footprint"]["latency_ms"] > 0
    for trial in trials():
        assert trial.user_attrs["latency_ms"] > 0
        assert trial.user_attrs["size_mb"] > 0
        assert trial.constraints == {}
    shown: dict[str, Any] = json.loads(cli("trials", "list", "waves", "--format", "json").stdout)[0]
    assert shown["feasible"] is None
    assert cli("promote", "waves").returncode == 0
    (model,) = json.loads(cli("models", "--json").stdout)  # measured once, it is the same version
    assert model["footprint"] == found["footprint"]
    calibration = hpo.load(found["model"]["path"]).config.calibration
    assert model["calibration"] == {part: each.summary for part, each in calibration.items()}
    assert "prediction takes" in cli("launch", "waves.toml").stdout
