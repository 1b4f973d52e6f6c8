"""The chaos of benchmarks/chaos.py in a small form: kills of workers and of the server change nothing."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from hpo.storage.server import server as embedded

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def chaos() -> ModuleType:
    spec = importlib.util.spec_from_file_location("chaos", ROOT / "benchmarks" / "chaos.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["chaos"] = module
    spec.loader.exec_module(module)
    return module


def test_kills_of_workers_and_of_the_server_lose_double_and_change_nothing(
    chaos: ModuleType, short_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HPO_HOME", str(short_folder / "chaos"))
    monkeypatch.setenv("HPO_ARTIFACTS", str(tmp_path / "artifacts"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("HPO_DATABASE_URL", raising=False)
    try:
        report = chaos.run(tmp_path, trials=120, count=3, every_s=1.5)
    finally:
        embedded.stop()
    assert report.faults() == []
    assert report.kills >= 2
    assert (report.stops, report.crashes) == (1, 1)
