"""Where the workers of a study write their logs."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpo.launcher.logs import log_folder


def test_studies_of_one_name_in_two_databases_have_logs_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HPO_HOME", str(tmp_path))
    assert log_folder("waves", "1_ab") == tmp_path / "logs" / "waves"
    assert log_folder("waves", "1_cd") == tmp_path / "logs" / "waves-1_cd"
    assert log_folder("waves", "1_ab") == tmp_path / "logs" / "waves"


def test_logs_of_an_earlier_version_are_the_first_studys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPO_HOME", str(tmp_path))
    (tmp_path / "logs" / "waves").mkdir(parents=True)
    (tmp_path / "logs" / "waves" / "worker-0.log").write_text("a line")
    assert log_folder("waves", "1") == tmp_path / "logs" / "waves"
