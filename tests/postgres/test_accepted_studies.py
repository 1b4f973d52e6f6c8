"""What a launch accepts ends with a model: benchmarks/fuzz_trials.py for a moment."""

from __future__ import annotations

import importlib
from pathlib import Path

import optuna
import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.mark.filterwarnings("ignore")  # of samplers, about spaces at the edge of what they can do
def test_studies_of_edge_values_are_refused_at_once_or_end_with_a_model(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sixty inputs that are known. A trial may diverge: that depends on what it learns."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("HPO_HOME", str(tmp_path / "home"))
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    found = {seed: importlib.import_module("fuzz_trials").attempt(seed, database_url) for seed in range(60)}
    accepted = {seed: wrong for seed, wrong in found.items() if wrong is not None}
    assert len(accepted) > 12
    failures = {seed: [each for each in wrong if "Diverged" not in each] for seed, wrong in accepted.items()}
    assert not any(failures.values()), {seed: wrong for seed, wrong in failures.items() if wrong}
