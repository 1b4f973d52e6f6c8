"""What this machine keeps for a user is that user's alone."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from hpo.errors import HpoError
from hpo.launcher.logs import log_folder
from hpo.storage.artifacts import artifact_store
from hpo.storage.home import home, own_folder


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def open_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """HPO_HOME that was there already, and that others may read."""
    folder = tmp_path / "shared"
    folder.mkdir(mode=0o755)
    monkeypatch.setenv("HPO_HOME", str(folder))
    monkeypatch.delenv("HPO_ARTIFACTS", raising=False)
    return folder


def test_data_logs_and_models_are_closed_in_a_home_that_is_open(open_home: Path) -> None:
    artifact_store().put("key", b"content")
    log_folder("waves", "1")
    own_folder("models")
    assert mode(home()) == 0o755  # as its owner wants it
    assert {path.name: mode(path) for path in open_home.iterdir()} == {
        "artifacts": 0o700,
        "logs": 0o700,
        "models": 0o700,
    }


def test_a_home_of_a_user_who_is_not_known_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPO_HOME", "~nosuchuser/x")
    with pytest.raises(
        HpoError, match=r"^HPO_HOME must name a folder: Could not determine home .*, got ~nosuchuser/x$"
    ):
        home()


def test_what_others_have_opened_stays_open(open_home: Path) -> None:
    own_folder("logs").chmod(0o750)
    assert mode(own_folder("logs")) == 0o750
