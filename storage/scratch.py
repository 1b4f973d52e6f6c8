"""Folders for work in progress, below HPO_HOME, where what a killed process leaves is found and removed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hpo.storage.home import home, made_folder
from hpo.temporary import temporary_folder


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A new folder, removed when the block ends. Raises PostgresError and OSError where it cannot be made."""
    with temporary_folder(made_folder(home() / "cache"), "scratch") as folder:
        yield folder
