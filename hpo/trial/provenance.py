"""What a result was made with: versions, commit, threads."""

from __future__ import annotations

import platform
import subprocess
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch

from hpo.models.machine import cpu_name

PACKAGES = ("hpo", "torch", "optuna", "numpy", "SQLAlchemy", "safetensors")


@cache
def provenance() -> dict[str, str | int | None]:
    """Package versions, Python, platform, kind of CPU, threads and the git commit of a source checkout (else None)."""
    found: dict[str, str | int | None] = {name.lower(): version(name) for name in PACKAGES}
    return found | {
        "python": platform.python_version(),
        "cpu": cpu_name(),
        "platform": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "commit": _commit(),
    }


def _commit() -> str | None:
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        answer = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None
