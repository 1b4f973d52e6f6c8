"""Damaged study files: benchmarks/fuzz_study_files.py for a moment, and what it has found."""

from __future__ import annotations

import importlib.util
import sys
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpo.errors import HpoError
from hpo.study.config import from_dict, load
from hpo.study.plan import make_plan

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "fuzz_study_files.py"


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fuzz_study_files", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fuzz_study_files"] = module  # for its dataclasses
    spec.loader.exec_module(module)
    return module


def test_only_our_own_errors_come_of_damaged_files(fuzz: ModuleType) -> None:
    """A thousand inputs that are known, so that a failure is one that a change has brought."""
    tally = fuzz.fuzz(iter([*range(2000, 3000), None]).__next__)
    assert tally.failures == {}
    assert tally.accepted > 100
    assert tally.refused > 500


DEEP = ".".join(["a"] * 3000)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
TREES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner))
SECTIONS = st.sampled_from(["study", "data", "train", "space", "enqueue", "studdy"])
NAMES = ("name", "metric", "trials", "timeout", "seed", "train", "holdout", "validation", "epochs", "layers", "dropout")
KEYS = st.sampled_from(NAMES)


@given(st.dictionaries(SECTIONS, st.dictionaries(KEYS | st.text(max_size=8), TREES, max_size=4) | TREES, max_size=5))
@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
def test_whatever_the_tables_hold_it_is_read_or_refused(tables: dict[str, Any]) -> None:
    for content in (tables, {"data": {"train": "x.npz"}, **tables}):
        with suppress(HpoError):
            from_dict(content)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("a = " + "[" * 500, "must not nest", id="seed 1308"),
        pytest.param("a = " + "{a=" * 500, "must not nest", id="seed 3078"),
        pytest.param("a = " + "[" * 3000 + "]" * 3000, "must not nest", id="3,000 lists"),
        pytest.param(f"[study]\nname.{DEEP} = 1", "must not nest lists and tables more than 50 levels", id="deep name"),
        pytest.param(f"[data]\nvalidation.{DEEP} = 1", "more than 50 levels deep; a study needs four", id="deep part"),
        pytest.param(f"[space]\nlayers = {{ low.{DEEP} = 1, high = 2 }}", "more than 50 levels", id="deep entry"),
        pytest.param(f"[[enqueue]]\nlayers.{DEEP} = 1", "more than 50 levels", id="deep configuration"),
        pytest.param('[data]\ntest = "~nobody-of-that-name/x"\ntrain = "x.npz"', "data.test must name", id="test file"),
        pytest.param('[data]\ntrain = "' + "x" * 300 + '"', "must name a file: File name too long", id="seed 3067"),
        pytest.param('[data]\ntrain = "~nobody-of-that-name/x"', "must name a file", id="a user without a home"),
        pytest.param("[study]\ntimeout = '" + "9" * 117_000 + "m'", r"… \(117003 characters\)", id="seed 170192"),
        pytest.param(f"enque{'9' * 176_000} = 1", "unknown key enque9{95}; known are", id="seed 1034169"),
        pytest.param('"\\u001b[31m" = 1', r'unknown key "\\u001b\[31m"; known are', id="a key of control characters"),
        pytest.param("[data]\nholdout = 1e-320", "holdout must be at least 1e-09, got 1e-320", id="seed 128931"),
        pytest.param("[data]\nvalidation = 1e-320", "must be at least 1e-09, or { folds = 5 }", id="its like"),
        pytest.param("[space]\ndropout = { low = 0.0, high = 0.5, step = 1e-300 }", "at most 10{9} values", id="steps"),
        pytest.param(f"[space]\nbatch_size = {10**400}", "batch_size must be a whole number", id="seed 1024965"),
        pytest.param(
            f"[space]\nbatch_size = {{ low = 1, high = {10**400 + 1}, step = 10 }}\n[[enqueue]]\nbatch_size = 11\n",
            r"batch_size.high must be a whole number of at least 1 and at most 1e\+09",
            id="its like in a range",
        ),
    ],
)  # fmt: skip
def test_found_by_fuzzing(tmp_path: Path, text: str, message: str) -> None:
    np.savez(tmp_path / "x.npz", X=np.zeros((40, 3)), y=np.arange(40) % 2)
    if "train = " not in text:
        text = (
            text.replace("[data]\n", '[data]\ntrain = "x.npz"\n')
            if "[data]" in text
            else f'{text}\n[data]\ntrain = "x.npz"'
        )
    (tmp_path / "study.toml").write_text(text)
    with pytest.raises(HpoError, match=message):
        make_plan(load(tmp_path / "study.toml"))


def test_a_deep_override_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", X=np.zeros((40, 3)), y=np.arange(40) % 2)
    with pytest.raises(HpoError, match="more than 50 levels deep"):
        load(tmp_path / "x.npz", [f"study.name.{DEEP}=1"])


def test_a_class_whose_name_the_database_cannot_keep_is_refused(tmp_path: Path) -> None:
    """Seed 1031362: jsonb has no NUL."""
    rows = [f"{i / 7},{i % 5},{chr(0) if i % 2 else 'b'}" for i in range(40)]
    (tmp_path / "x.csv").write_text("\n".join(["t0,t1,label", *rows]))
    with pytest.raises(HpoError, match=r"x\.csv, row 3: the name of a class must hold neither a NUL nor half"):
        make_plan(load(tmp_path / "x.csv"))
