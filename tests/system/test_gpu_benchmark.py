"""benchmarks/gpu.py as far as it goes without a GPU: its sections, its checks, its table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from experiments.test_fused import INTERPRETED, need_triton

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu.py"


def run(folder: Path, *arguments: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"OUT": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_a_line_and_ends(tmp_path: Path) -> None:
    assert run(tmp_path).splitlines() == ["no CUDA device: nothing to measure (--cpu is a dry run of the logic)"]
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(INTERPRETED, reason="the sections interpret by themselves")
def test_a_dry_run_measures_every_variant_and_finds_equal_answers(tmp_path: Path) -> None:
    need_triton()
    run(tmp_path, "--cpu", "--sections", "limits", "costs")
    first = (tmp_path / "gpu.jsonl").read_text()
    table = run(tmp_path, "--cpu", "--go-on", "--sections", "costs", "fused", "shape-1", "processes")
    assert (tmp_path / "gpu.jsonl").read_text().startswith(first)
    rows = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert not [row for row in rows if "failed" in row]
    assert {row["check"] for row in rows if row.get("equal")} == {
        "fused trials give equal weights as a graph and eager",
        "padded units of fused trials stay zero",
    }
    assert [row["precision"] for row in rows if row.get("check") == "fused error" and row["ok"]] == [
        "ieee",
        "tf32",
        "bf16",
    ]
    variants = {row["variant"].split(",")[0] for row in rows if "rates" in row}
    assert variants == {"eager", "slots", "fused tf32", "fused bf16", "fused ieee"}
    assert all(rate > 0 for row in rows if "rates" in row for rate in row["rates"] + row["loops"])
    assert [row["section"] for row in rows if "section" in row] == ["limits", "costs", "fused", "shape-1", "processes"]
    assert len([row for row in rows if "costs" in row]) == 2
    assert [row["processes"] for row in rows if "beside" in row and row["rate"] > 0] == [1, 2]
    assert table.count("verdict, ") == 2
    assert "T, F, H, L, B = (to 8, 2, 3, 1, 8)" in table


def test_what_does_not_fit_into_its_time_is_named_and_left(tmp_path: Path) -> None:
    said = run(tmp_path, "--cpu", "--minutes", "0.1", "--sections", "limits", "processes")
    assert said.splitlines()[-1] == "left for a call with --go-on: limits, processes"
