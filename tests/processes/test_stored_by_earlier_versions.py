"""What an earlier version stored is continued, promoted, reproduced and loaded by this one (see fixtures/)."""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psycopg2
import pytest
from optuna.trial import FrozenTrial, TrialState

import hpo
from hpo.promote.versions import model_folder
from tests.conftest import Cli, assert_exact

FIXTURES = Path(__file__).parents[1] / "fixtures"
FILES = FIXTURES / "before_the_redesign"  # study files and data, of all


@dataclass(frozen=True)
class Stored:
    """What one version left."""

    folder: Path
    best: float  # value of trial 1 of `waves`, as that version itself ended it
    best_epoch: int  # of that
    epochs: int  # of trial 1, that it left with a checkpoint


VERSIONS = {
    "before_the_redesign": (0.8940972222222222, 29, 51),
    "before_the_stem": (0.9253472222222222, 82, 24),
}


@pytest.fixture(params=VERSIONS)
def version(request: pytest.FixtureRequest) -> Stored:
    return Stored(FIXTURES / request.param, *VERSIONS[request.param])


@pytest.fixture
def stored(
    version: Stored, empty_database_url: str, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> dict[str, str]:
    """The environment of a database and a store as that version left them. It trained on torch's LSTM."""
    with closing(psycopg2.connect(empty_database_url.replace("+psycopg2", ""))) as connection:
        connection.autocommit = True
        connection.cursor().execute((version.folder / "studies.sql").read_text())
    shutil.copytree(version.folder / "artifacts", environment["HPO_ARTIFACTS"])
    environment |= {"HPO_DATABASE_URL": empty_database_url, "HPO_NATIVE": "0"}
    for name, value in environment.items():
        if name.startswith("HPO_"):
            monkeypatch.setenv(name, value)
    return environment


def trials_of(environment: dict[str, str], study: str) -> list[FrozenTrial]:
    with closing(hpo.storage_for(environment["HPO_DATABASE_URL"])) as storage:
        return storage.get_all_trials(storage.get_study_id_from_name(study))


def test_a_trial_in_flight_goes_on_from_its_checkpoint_to_the_same_end_and_is_promoted(
    version: Stored, stored: dict[str, str], cli: Cli, tmp_path: Path
) -> None:
    for name in ("waves.npz", "waves.toml"):
        shutil.copy(FILES / name, tmp_path)
    before = trials_of(stored, "waves")
    assert [trial.state for trial in before] == [TrialState.COMPLETE, TrialState.RUNNING]
    done = cli("launch", "waves.toml", "--workers", 1, "--json", "--quiet", env=stored)
    assert done.returncode == 0, done.stderr
    first, adopted = after = trials_of(stored, "waves")
    assert_exact(after, 2)
    assert (first.value, first.params, first.user_attrs) == (before[0].value, before[0].params, before[0].user_attrs)
    assert adopted.params == before[1].params
    assert (adopted.user_attrs["attempt"], adopted.user_attrs["epochs"]) == (2, 150)
    assert len(adopted.user_attrs["curve"]["value"]) == 150
    for epoch in range(1, version.epochs + 1):  # from the checkpoint, not trained again
        assert adopted.intermediate_values[epoch] == before[1].intermediate_values[epoch]
    assert (adopted.user_attrs["best_epoch"], adopted.value) == (version.best_epoch, version.best)
    summary = json.loads(done.stdout.splitlines()[-1])
    assert (summary["best"]["number"], summary["best"]["value"]) == (1, version.best)
    assert not list(Path(stored["HPO_ARTIFACTS"]).glob("checkpoint-*"))


def test_its_finished_study_shows_promotes_again_and_takes_more_trials(
    stored: dict[str, str], cli: Cli, tmp_path: Path
) -> None:
    for name in ("waves.npz", "done.toml"):
        shutil.copy(FILES / name, tmp_path)
    states = {row["study"]: row for row in json.loads(cli("status", "--json", env=stored).stdout)}
    assert states["done"]["status"] == "finished"
    (model,) = json.loads(cli("models", "--json", env=stored).stdout)
    assert (model["name"], model["version"], model["trial"]) == ("done", 1, 1)
    promoted = cli("promote", "done", "--trial", 0, env=stored)
    assert promoted.returncode == 0, promoted.stderr
    more = cli("launch", "done.toml", "--trials", 5, "--workers", 1, "--json", "--quiet", env=stored)
    assert more.returncode == 0, more.stderr
    assert_exact(trials_of(stored, "done"), 5)


def test_its_model_folder_and_registered_model_load_and_predict_alike(version: Stored, stored: dict[str, str]) -> None:
    X = np.load(FILES / "waves.npz")["X"]
    folder = hpo.load(version.folder / "model").predict(X)
    registered = hpo.load(model_folder("done", 1)).predict(X)
    assert folder.classes == ("fast", "slow")
    np.testing.assert_array_equal(folder.probabilities, registered.probabilities)


def test_its_model_is_scored_by_class_from_the_counts_that_it_has(stored: dict[str, str], cli: Cli) -> None:
    (row,) = json.loads(cli("status", "done", "--json", env=stored).stdout)
    (model,) = json.loads(cli("models", "--json", env=stored).stdout)
    for part in ("validation", "test"):
        found = row["scores"][part]
        assert (found is None) == (model[part] is None)
        assert found is None or [each["name"] for each in found["by_class"]] == ["fast", "slow"]
        assert found is None or (found["groups"], found["by_group"]) == (None, [])
    for file in Path(stored["HPO_ARTIFACTS"]).glob("model-*-config.json"):
        file.unlink()
    shown = cli("status", "done", env=stored)
    assert shown.returncode == 0
    assert "done version 1 has no scores by class here: the file config.json of a promoted" in shown.stderr
    (row,) = json.loads(cli("status", "done", "--json", env=stored).stdout)
    assert row["scores"] is None
