"""Promoted versions on this machine: their folders, fetched from the artifact store where need be. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from hpo.storage.artifacts import artifact_store
from hpo.storage.database import database_url
from hpo.storage.home import home
from hpo.storage.registry import ModelVersion, Registry, materialise


def materialise_model(model: ModelVersion) -> Path:
    """The folder of a promoted version, fetched if need be."""
    folder = home() / "models" / model.name / f"v{model.version}"
    materialise(artifact_store(), model.artifacts, folder)
    return folder


def model_folder(model: str, version: int | None) -> Path:
    """A saved model folder by its path, or a promoted model by its name."""
    if Path(model).is_dir():
        return Path(model)
    return materialise_model(Registry(database_url()).get(model, version))
