"""[track] of study files: what may be named, what is refused, and where relative paths begin."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from hpo.study.config import ConfigError, TrackSection, differences, from_dict, load, to_dict
from hpo.track.settings import TrackError, prepare

STUDY = '[data]\ntrain = "waves.npz"\n[track]\n'


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "waves.npz").touch()
    return tmp_path / "waves.toml"


@pytest.mark.parametrize(
    "uri",
    ["http://localhost:5000", "https://mlflow.example.org/team/", "http://[::1]:5000", "sqlite:////srv/runs.db"],
)
def test_a_server_and_a_file_of_sqlite_are_taken_as_they_are(file: Path, uri: str) -> None:
    file.write_text(f'{STUDY}mlflow = "{uri}"')
    assert load(file).track == TrackSection(uri)


def test_relative_paths_begin_at_the_study_file(file: Path, tmp_path: Path) -> None:
    file.write_text(f'{STUDY}mlflow = "sqlite:///runs/all.db"\ntensorboard = "../boards"')
    assert load(file).track == TrackSection(f"sqlite:///{tmp_path}/runs/all.db", str(tmp_path.parent / "boards"))


def test_without_it_nothing_is_tracked(file: Path) -> None:
    file.write_text(STUDY)
    assert load(file).track == TrackSection()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('mlflow = ""', "track.mlflow must be the http:// or https:// URL of an MLflow server, or sqlite:///FILE.db"),
        ("mlflow = 5000", "track.mlflow must be the http:// or https:// URL .*, got 5000"),
        ('mlflow = "mlruns"', "track.mlflow must be the http:// or https:// URL"),
        ('mlflow = "file:///tmp/mlruns"', "track.mlflow must be the http:// or https:// URL"),
        ('mlflow = "postgresql://localhost/runs"', "track.mlflow must be the http:// or https:// URL"),
        ('mlflow = "sqlite:///"', "track.mlflow must be the http:// or https:// URL"),
        ('mlflow = "https://ada:secret-word@example.org"', "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"),
        ('mlflow = "https://example.org?token=secret-word"', "or MLFLOW_TRACKING_TOKEN, in the environment of launch"),
        ('tensorboard = ""', "track.tensorboard must be a string in quotes that is not empty"),
        ("tensorboard = true", "track.tensorboard must be a string in quotes that is not empty, got true"),
        ('tensorboard = "s3://bucket/runs"', "track.tensorboard must be the path of a folder"),
        ('wandb = "x"', "unknown key track.wandb"),
    ],
)
def test_what_cannot_be_tracked_to_is_refused_with_the_way_out_and_without_a_secret(
    file: Path, line: str, expected: str
) -> None:
    file.write_text(STUDY + line)
    with pytest.raises(ConfigError, match=expected) as raised:
        load(file)
    assert "secret-word" not in str(raised.value)


def test_it_is_in_no_plan_and_no_difference_between_studies() -> None:
    tables = {"data": {"train": "a.npz"}, "track": {"mlflow": "http://localhost:5000"}}
    tracked, plain = from_dict(tables), from_dict({"data": {"train": "a.npz"}})
    assert "track" not in to_dict(tracked)
    assert differences(plain, tracked) == differences(tracked, plain) == []


@pytest.mark.parametrize("key", ["mlflow", "tensorboard"])
def test_a_library_that_is_missing_is_named_with_its_extra(
    key: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, key, None)
    value = {"mlflow": "http://localhost:5000", "tensorboard": str(tmp_path / "boards")}[key]
    expected = rf"\[track\] {key} needs a library that is not installed: pip install 'hpo\[track\]', on every machine"
    with pytest.raises(TrackError, match=expected):
        prepare(TrackSection(**{key: value}))
    assert not (tmp_path / "boards").exists()


def test_folders_are_made_and_one_that_cannot_be_is_named(tmp_path: Path) -> None:
    prepare(TrackSection(f"sqlite:///{tmp_path}/runs/all.db", str(tmp_path / "boards")))
    assert (tmp_path / "runs").is_dir()
    assert (tmp_path / "boards").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(TrackError, match=r"track.tensorboard must lie in a folder that can be made: .*file"):
        prepare(TrackSection(tensorboard=str(tmp_path / "file" / "boards")))
