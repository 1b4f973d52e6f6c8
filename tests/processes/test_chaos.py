"""The chaos of benchmarks/chaos.py in a small form: kills of workers and of the server change nothing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from hpo.storage.server import server as embedded


@pytest.fixture
def folder(short_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the chaos has a home of its own."""
    monkeypatch.setenv("HPO_HOME", str(short_folder / "chaos"))
    monkeypatch.setenv("HPO_ARTIFACTS", str(tmp_path / "artifacts"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("HPO_DATABASE_URL", raising=False)
    yield tmp_path
    embedded.stop()
    shutil.rmtree(short_folder / "chaos")


def test_kills_of_workers_and_of_the_server_lose_double_and_change_nothing(chaos: ModuleType, folder: Path) -> None:
    report = chaos.run(folder, trials=60, count=3, every_s=1.5)
    assert report.faults() == []
    assert report.kills >= 2
    assert (report.stops, report.crashes) == (1, 1)


def test_a_server_that_dies_again_and_again_costs_no_attempt(chaos: ModuleType, folder: Path) -> None:
    report = chaos.run(folder, trials=100, count=2, every_s=0, server_s=(1.0, 3.0), judged=20)
    assert report.faults() == []
    assert report.lost == 0
    assert report.stops >= 1


def test_kills_during_finals_change_neither_winner_nor_weights(chaos: ModuleType, folder: Path) -> None:
    study = {"finalists": 2, "trials": 2, "count": 2, "epochs": 40}
    fire = chaos.run_finals(folder, **study, every_s=0.25, kills=4)
    assert fire.faults() == []
    assert fire.adopted >= 1
    embedded.stop()
    for name in ("HPO_HOME", "HPO_ARTIFACTS"):
        shutil.rmtree(os.environ[name])
    calm = chaos.run_finals(folder, **study, every_s=None)
    assert calm.faults() == []
    assert (calm.kills, calm.lost) == (0, 0)
    assert fire.differences(calm) == []
