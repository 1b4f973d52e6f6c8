"""HPO_HOME: the folder of everything that this machine keeps for the user."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from hpo.storage.errors import PostgresError


def home() -> Path:
    """HPO_HOME, else `hpo` in the user's data folder; absolute, created (for the user alone) if missing.

    Raises PostgresError where it cannot be created.
    """
    given = os.environ.get("HPO_HOME")
    try:
        path = Path(given).expanduser().absolute() if given else user_data_folder() / "hpo"
    except RuntimeError as error:  # ~ of a user who is not known, or has no home
        raise PostgresError(f"HPO_HOME must name a folder: {str(error).rstrip('.')}, got {given}") from None
    return made_folder(path).resolve()


def own_folder(name: str) -> Path:
    """A folder of HPO_HOME, created for the user alone if missing, also where HPO_HOME itself is open to others: data,
    logs and models are nobody else's.

    Raises PostgresError where it cannot be created.
    """
    path = home() / name
    try:
        path.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise PostgresError(f"cannot create {path}: {error.strerror}; set HPO_HOME to another folder") from None
    return path


def made_folder(path: Path) -> Path:
    """The folder, created if missing: mode 0700, for root 0711, so that PostgreSQL's `nobody` can pass through.

    Raises PostgresError where it cannot be created.
    """
    try:
        path.mkdir(parents=True)
        path.chmod(0o711 if os.geteuid() == 0 else 0o700)
    except FileExistsError:
        pass
    except OSError as error:
        raise PostgresError(f"cannot create {path}: {error.strerror}; set HPO_HOME to another folder") from None
    return path


def user_data_folder() -> Path:
    """XDG_DATA_HOME if absolute, else the platform's default. Raises PostgresError for a user without a home."""
    given = Path(os.environ.get("XDG_DATA_HOME", ""))
    if given.is_absolute():
        return given
    try:
        user = Path.home()
    except RuntimeError:
        raise PostgresError("this user has no home directory; set HPO_HOME to a folder") from None
    return user / ("Library/Application Support" if sys.platform == "darwin" else ".local/share")
