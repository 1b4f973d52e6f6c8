"""Many training runs: studies of LSTM classifiers shared by many workers.

import hpo
summary = hpo.launch("study.toml", workers=4)
predictions = hpo.load(summary["model"]["path"]).predict(sequences)
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hpo.launcher.launch import (
    launch,  # after this line `hpo.launcher.launch` is the function; the module stays importable from
)

if TYPE_CHECKING:
    from hpo.models.bundle.bundle import Bundle

__all__ = ["launch", "load"]


def load(folder: str | Path, device: str = "cpu") -> Bundle:
    """A saved model folder, ready to predict. Needs no database."""
    from hpo.models.bundle.bundle import load as load_bundle

    return load_bundle(folder, device)
