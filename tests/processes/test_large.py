"""A launch on data of several times the memory that its processes may take for themselves."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import psutil
import pytest

from tests.processes.test_launch import summary_of

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the limit counts other memory elsewhere")

MIB = 2**20
N, T, F = 18_000, 500, 8  # 288 MB of float32, from a file of int8, a quarter of that
ROOM = 96 * MIB
STUDY = """
[study]
name = "{name}"
trials = 1
[data]
train = "{name}.npz"
validation = 0.2
[train]
epochs = 1
[space]
stem = "patch"
patch_length = 25
hidden_size = 6
normalization = "channel"
difference = true
jitter = 0.1
"""


def write(folder: Path, name: str, n: int) -> Path:
    """A study of so many sequences, whose class is the sign of their first steps."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 2, n)
    values = random.integers(-99, 100, (n, T, F), dtype=np.int8)
    values[:, :20] = np.where(labels, 50, -50)[:, None, None]
    np.savez(folder / f"{name}.npz", X=values, y=labels)
    (folder / f"{name}.toml").write_text(STUDY.format(name=name))
    return folder / f"{name}.toml"


def begin(file: Path, environment: dict[str, str], limit: int | None = None) -> subprocess.Popen[str]:
    """A launch whose processes may each have so many bytes of private memory that can be written to."""
    command = [sys.executable, "-P", "-m", "hpo", "launch", str(file), "--workers", "1", "--json", "--quiet"]

    def bound() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True, preexec_fn=bound)


def ended(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    out, err = process.communicate(timeout=500)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def most_private(process: subprocess.Popen[str]) -> int:
    """The most bytes of private memory that one of its processes has had at a look, until it ends."""
    most, own = 0, psutil.Process(process.pid)
    tick = threading.Event()
    while process.poll() is None:
        for each in [own, *own.children(recursive=True)]:
            try:
                lines = Path(f"/proc/{each.pid}/status").read_text().splitlines()
            except OSError:
                continue
            most = max([most, *(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData"))])
        tick.wait(0.01)
    return most


def test_a_study_of_data_larger_than_the_memory_for_them_is_promoted(
    environment: dict[str, str], tmp_path: Path
) -> None:
    """The limit is what a launch on 100 sequences takes, and ROOM: a third of the data."""
    small = begin(write(tmp_path, "small", 100), environment)
    needed = most_private(small)
    summary_of(ended(small))
    file = write(tmp_path, "large", N)
    assert 4 * N * T * F > 2.8 * ROOM
    summary = summary_of(ended(begin(file, environment, needed + ROOM)))
    assert summary["trials"]["complete"] == 1
    config = json.loads((Path(summary["model"]["path"]) / "config.json").read_text())
    assert config["test"]["sequences"] == N // 5
