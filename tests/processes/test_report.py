"""The report of real studies, from the command line to the HTML: with a model, without, and of earlier versions."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from optuna import create_trial
from optuna.trial import TrialState

import hpo
from hpo.models.bundle.bundle import load
from hpo.models.bundle.checksums import check_folder
from hpo.models.bundle.export import export
from hpo.promote import report as reports
from hpo.promote.promotion import promote_trial
from hpo.storage.artifacts import artifact_store
from hpo.storage.registry import Registry
from hpo.study.config import load as load_study
from hpo.study.lifecycle import create_or_open, open_study
from hpo.study.space import distributions
from tests.conftest import Cli
from tests.processes.test_stored_by_earlier_versions import stored, version
from tests.reports import check_report

__all__ = ["stored", "version"]  # fixtures
Study = Callable[..., Path]


@pytest.fixture
def patients(data: Path) -> Path:
    """The data as a table, with names of groups and sequences that are nobody else's business."""
    path = data.with_suffix(".csv")
    rows = ["id,step,label,group,a,b"]
    with np.load(data) as arrays:
        for i, (values, label, length) in enumerate(zip(arrays["X"], arrays["y"], arrays["lengths"], strict=True)):
            rows += [f"Ada {i},{t},{label},Patient {i % 12},{a},{b}" for t, (a, b) in enumerate(values[:length])]
    path.write_text("\n".join(rows) + "\n")
    return path


@pytest.fixture
def private_study(study_file: Study, patients: Path) -> Study:
    """As study_file, of these data."""

    def write(**given: object) -> Path:
        path = study_file(**given)
        path.write_text(path.read_text().replace("waves.npz", patients.name))
        return path

    return write


def report_of(cli: Cli, folder: Path, name: str = "waves") -> str:
    done = cli("report", name, "--out", "found.html")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout == f"the report of {name} is found.html\n"
    text = (folder / "found.html").read_text()
    check_report(text)
    return text


def test_a_study_with_finals_from_the_command_line_to_the_page(cli: Cli, private_study: Study, tmp_path: Path) -> None:
    private_study(trials=4, study='finalists = 2\nrepeats = 2\npruner = "none"')
    done = cli("launch", "waves.toml", "--workers", 2, "--json", "--quiet")
    assert done.returncode == 0, done.stderr
    assert "the model has no report" not in done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    folder = Path(summary["model"]["path"])
    shared = (folder / "report.html").read_text()
    found = check_report(shared)
    check_folder(folder)
    assert "report.html" in (folder / "SHA256SUMS").read_text()
    assert not re.search("Ada|Patient", shared)
    assert not re.search("Ada|Patient", (folder / "config.json").read_text())
    wanted = {"answer", "asked", "finals", "trials", "learning", "quality", "hard", "cost", "repeat"}
    assert wanted <= set(found.ids)
    estimate = summary["estimate"]
    assert f"<strong>{estimate['value']:.4f}</strong>" in shared
    text = report_of(cli, tmp_path)
    assert "Ada 1" in text
    assert "Patient" in text
    assert f"hpo reproduce waves --trial {summary['best']['number']}" in text
    assert "4 complete" in text
    again = load(export(folder, tmp_path / "out"))
    assert (tmp_path / "out" / "report.html").read_text() == shared
    assert again.config.estimate is not None


def test_a_study_that_nobody_works_on_and_one_that_failed(
    cli: Cli, study_file: Study, tmp_path: Path, environment: dict[str, str]
) -> None:
    study_file(trials=3)
    assert cli("launch", "waves.toml", "--detach").returncode == 0
    text = report_of(cli, tmp_path)
    assert "No trial has begun of 3 trials." in text
    assert "it may still change" in text
    done = cli("report", "nothing")
    assert (done.returncode, done.stdout) == (1, "")
    assert "'nothing'" in done.stderr
    assert "`hpo report waves`" in cli("report", "waves/finals").stderr
    assert "--out must name a file" in cli("report", "waves", "--out", "no/folder.html").stderr


def test_promoting_a_trial_again_is_the_same_version_whatever_its_report_says(
    cli: Cli, study_file: Study, tmp_path: Path
) -> None:
    study_file(trials=2, study='pruner = "none"')
    assert cli("launch", "waves.toml", "--quiet", "--workers", 1).returncode == 0
    assert cli("promote", "waves").returncode == 0
    assert len(json.loads(cli("models", "--json").stdout)) == 1
    assert cli("launch", "waves.toml", "--quiet", "--workers", 1, "--trials", 4).returncode == 0
    models = json.loads(cli("models", "--json").stdout)
    for number in {each["trial"] for each in models}:
        assert cli("promote", "waves", "--trial", number).returncode == 0
    assert len(json.loads(cli("models", "--json").stdout)) == len(models)


def test_a_report_that_fails_is_no_reason_for_a_model_to_be_lost(
    study_file: Study,
    environment: dict[str, str],
    cli: Cli,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    study_file(trials=1)
    assert cli("launch", "waves.toml", "--quiet", "--workers", 1).returncode == 0

    def fails(facts: object) -> str:
        raise ZeroDivisionError("no chart of nothing")

    monkeypatch.setattr(reports, "render", fails)
    with caplog.at_level(logging.WARNING), closing(hpo.storage_for()) as storage:
        model = promote_trial(storage, "waves", 0)
        assert Registry(storage.connection).diagnosis(model) is not None
    assert "the model has no report: ZeroDivisionError: no chart of nothing" in caplog.text


def test_a_model_that_an_earlier_version_promoted(stored: dict[str, str], cli: Cli, tmp_path: Path) -> None:
    done = cli("report", "done", "--out", "done.html", env=stored)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "done.html").read_text()
    found = check_report(text)
    assert "Model done, version 1" in text
    assert "quality" in found.ids
    assert "hard" not in found.ids
    waves = cli("report", "waves", "--out", "waves.html", env=stored)
    assert waves.returncode == 0, waves.stderr
    check_report((tmp_path / "waves.html").read_text())


def test_what_is_stored_of_the_data_is_told_by_one_statement_alone(
    cli: Cli, private_study: Study, environment: dict[str, str]
) -> None:
    private_study(trials=1)
    assert cli("launch", "waves.toml", "--quiet", "--workers", 1).returncode == 0
    registry = Registry(environment["HPO_DATABASE_URL"])
    (model,) = registry.models()
    assert set(model.config) == {"params"}
    found = registry.diagnosis(model)
    assert found is not None
    assert found["part"] == "test"
    assert all(each["id"].startswith("Ada ") for each in found["hardest"])
    assert model.artifacts["report.html"].endswith("-report.html")


def test_an_importance_goes_by_pruned_trials_too(
    cli: Cli, study_file: Study, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Larger networks are better here, and Optuna's own evaluator finds nothing else."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    space = "hidden_size = { low = 4, high = 64 }\nlearning_rate = { low = 0.001, high = 0.1 }\n"
    path = study_file(trials=40, space=space)
    with closing(hpo.storage_for()) as storage:
        study = create_or_open(load_study(path), storage, artifact_store())
        random = np.random.default_rng(0)
        known = distributions(study.plan.config.space)
        drawn = {name: known[name] for name in ("hidden_size", "learning_rate")}
        for _ in range(60):
            size, rate = int(random.integers(4, 65)), float(random.uniform(0.001, 0.1))
            pruned = size < 30
            study.optuna_study.add_trial(
                create_trial(
                    state=TrialState.PRUNED if pruned else TrialState.COMPLETE,
                    value=None if pruned else size / 64,
                    params={"hidden_size": size, "learning_rate": rate},
                    distributions=drawn,
                    intermediate_values={0: size / 64},
                )
            )
        found = reports._importances(open_study("waves", storage))
    assert found is not None
    assert found.trials == 60
    assert found.shares[0][0] == "hidden_size"
    assert found.shares[0][1] > 0.8
    assert sum(share for _, share in found.shares) == pytest.approx(1)
    first = found.slices[0]
    assert (len(first.points) + len(first.pruned), min(first.pruned) < 30) == (60, True)
