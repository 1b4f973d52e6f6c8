"""Whether a launch's process can write to what [track] names; workers elsewhere only warn."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from hpo.errors import HpoError
from hpo.study.checks import SQLITE
from hpo.study.config import TrackSection

LIBRARIES = {"mlflow": "mlflow", "tensorboard": "tensorboard"}  # by the keys of [track]


class TrackError(HpoError):
    """Runs cannot be written as [track] asks for."""


def lacking(key: str) -> str | None:
    """What to install for a key of [track]; None where nothing is missing."""
    if find_spec(LIBRARIES[key]) is not None:
        return None
    return f"[track] {key} needs a library that is not installed: pip install 'hpo[track]'"


def prepare(track: TrackSection) -> None:
    """Check the libraries, and make the folders where they are missing. Raises TrackError."""
    for key, value in vars(track).items():
        if value is not None and (reason := lacking(key)) is not None:
            raise TrackError(f"{reason}, on every machine with workers; or leave {key} out of the study file")
    folders = {}
    if track.mlflow is not None and track.mlflow.startswith(SQLITE):
        folders["mlflow"] = Path(track.mlflow.removeprefix(SQLITE)).parent
    if track.tensorboard is not None:
        folders["tensorboard"] = Path(track.tensorboard)
    for key, folder in folders.items():
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrackError(
                f"track.{key} must lie in a folder that can be made: {error.strerror}, got {folder}"
            ) from None
