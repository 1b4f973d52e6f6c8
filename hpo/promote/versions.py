"""Promoted versions on this machine: their folders, fetched from the artifact store where need be. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from contextlib import suppress
from pathlib import Path

from hpo.storage.artifacts import MissingArtifactError, artifact_store
from hpo.storage.database import database_url
from hpo.storage.home import own_folder
from hpo.storage.keys import content_hash
from hpo.storage.registry import ModelVersion, Registry, holds, materialise


def materialise_model(model: ModelVersion) -> Path:
    """The folder of a promoted version, fetched if need be, and again where it is damaged.

    Its name says its content: another database's version of that name and number has a folder of its own. `v1` beside
    it, for people, leads to the one that was fetched last. One that an earlier version of hpo has fetched stays in use.
    """
    versions = own_folder("models") / model.name
    short = versions / f"v{model.version}"
    if not short.is_symlink() and holds(short, model.artifacts):
        return short
    folder = versions / f"v{model.version}-{_content(model)}"
    try:
        materialise(artifact_store(), model.artifacts, folder, repair=True)
    except MissingArtifactError as error:
        again = f"or, `hpo promote {model.name} --trial {model.trial_number}` stores it anew"
        raise MissingArtifactError(f"{model.name} version {model.version}: {error}; {again}") from error
    if short.is_symlink() or not short.exists():
        with suppress(OSError):  # where there are no links there is still the folder
            _lead(short, folder)
    return folder


def _lead(link: Path, folder: Path) -> None:
    """Let the link lead to the folder beside it, whatever it led to."""
    new = link.with_name(f".{link.name}-{os.getpid()}-{threading.get_ident()}")
    new.symlink_to(folder.name, target_is_directory=True)
    new.replace(link)


def _content(model: ModelVersion) -> str:
    """What tells the version's files from others."""
    hashes = {name: content_hash(key) or key for name, key in model.artifacts.items()}
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()[:12]


def model_folder(model: str, version: int | None) -> Path:
    """A saved model folder by its path, or a promoted model by its name."""
    if Path(model).is_dir():
        return Path(model)
    return materialise_model(Registry(database_url()).get(model, version))
