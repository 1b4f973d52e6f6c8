"""Data sets on this machine: fetched from the artifact store once, checked, and kept in a cache."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from contextlib import suppress
from pathlib import Path

from hpo.models.data.canonical import load
from hpo.models.data.sequences import Sequences
from hpo.storage.artifacts import ArtifactError, ArtifactStore, DamagedArtifactError, MissingArtifactError
from hpo.storage.files import locked
from hpo.storage.home import own_folder
from hpo.storage.keys import data_key
from hpo.temporary import remove_abandoned


class Datasets:
    """The data sets that a process uses, each mapped into memory once, whichever thread asks first."""

    def __init__(self, store: ArtifactStore) -> None:
        self._store = store
        self._known: dict[str, Sequences] = {}
        self._lock = threading.Lock()

    def get(self, key: str) -> Sequences:
        """Raises ArtifactError."""
        with self._lock:
            if key not in self._known:
                self._known[key] = fetch_sequences(self._store, key)
            return self._known[key]


def fetch_sequences(store: ArtifactStore, key: str) -> Sequences:
    """A data set by its artifact key, from this machine's cache: fetched once however many processes ask for it at
    once, and compared with the hash in its name on arrival. Raises ArtifactError.
    """
    path = own_folder("cache") / key
    if not _unchanged(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.with_name(f"{key}.lock")):
            if not _unchanged(path):  # nobody has done it while we waited
                _check_or_fetch(store, key, path)
    return load(path)


def _check_or_fetch(store: ArtifactStore, key: str, path: Path) -> None:
    """Leave the whole data set at `path`, and beside it what the file system says of it, for the next look."""
    marks = _marks(path) if path.exists() else None  # before it is read
    if marks is None or _key_of(path) != key:
        _remove_old_parts(path)
        try:
            store.fetch(key, path)
        except (DamagedArtifactError, MissingArtifactError) as error:
            raise type(error)(f"{error}; launch the study file again, which stores the data anew") from None
        marks = _marks(path)
        if _key_of(path) != key:
            path.unlink()
            raise ArtifactError(f"{path} is not what was written to it, the data set {key}; is its disk in order?")
    with suppress(OSError):  # then the next process reads the file again
        path.with_name(f"{key}.seen").write_text(json.dumps(marks))


def _remove_old_parts(path: Path) -> None:
    """What processes that were killed while they fetched have left; earlier versions in a folder of its own."""
    remove_abandoned(path.parent)
    shutil.rmtree(path.with_name(f"{path.name}.part"), ignore_errors=True)


def _unchanged(path: Path) -> bool:
    """Whether the file is the one that was hashed, unchanged since: a large one is not read again at each start.

    Whatever writes to a file or replaces it gives it another inode or time of change, which no program can set back.
    What the disk itself loses is not seen by this.
    """
    try:
        return bool(json.loads(path.with_name(f"{path.name}.seen").read_text()) == _marks(path))
    except (OSError, ValueError):
        return False


def _marks(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def _key_of(path: Path) -> str:
    """The key that the file's content has."""
    with path.open("rb") as file:
        return data_key(hashlib.file_digest(file, "sha256").hexdigest())
