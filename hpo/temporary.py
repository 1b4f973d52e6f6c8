"""Names to write to until the content is whole. Each is held by a lock that ends with its process, so that what a
killed process leaves is known as such, and the next one that works in the folder removes it.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

if sys.platform != "win32":
    import fcntl

log = logging.getLogger("hpo")

_AGE_S = 24 * 3600.0  # another host's lock may not be seen from here: its names are left alone for so long
_LOCK = re.compile(r"\.hpo-(?P<host>.+)-[0-9a-f]{32}\.\w+\.lock")


@contextmanager
def temporary_name(folder: Path, ending: str) -> Iterator[Path]:
    """A free name in `folder` for a file or a folder; what has it when the block ends is removed.

    Raises OSError where the folder cannot be written to.
    """
    path = folder / f".hpo-{_host()}-{uuid4().hex}.{ending}"
    lock = path.with_name(f"{path.name}.lock")
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        _hold(descriptor)
        yield path
    finally:
        _remove(path)
        with suppress(OSError):
            lock.unlink()
        os.close(descriptor)


@contextmanager
def temporary_folder(folder: Path, ending: str) -> Iterator[Path]:
    """A new folder below `folder`, removed when the block ends. Those of processes that are gone are removed first.

    Raises OSError.
    """
    remove_abandoned(folder)
    with temporary_name(folder, ending) as path:
        path.mkdir()
        yield path


def remove_abandoned(folder: Path) -> None:
    """Remove what processes that are gone have left in a folder under temporary names."""
    with suppress(OSError):
        for lock in list(folder.glob(".hpo-*.lock")):
            with suppress(OSError):
                _remove_if_abandoned(lock)


def _remove_if_abandoned(lock: Path) -> None:
    named = _LOCK.fullmatch(lock.name)
    if named is None or sys.platform == "win32":
        return
    age_s = time.time() - lock.stat().st_mtime
    if named["host"] != _host() and age_s < _AGE_S:
        return
    descriptor = os.open(lock, os.O_RDWR | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # an OSError while its process lives
        path = lock.with_name(lock.name.removesuffix(".lock"))
        if _remove(path):
            log.info("removed %s: the process that wrote to it is gone", path)
            lock.unlink()
        elif age_s > _AGE_S:  # a younger one may be between its creation and its lock
            lock.unlink()
    finally:
        os.close(descriptor)


def _hold(descriptor: int) -> None:
    if sys.platform != "win32":
        with suppress(OSError):  # a file system without locks: then nobody takes it for abandoned either
            fcntl.flock(descriptor, fcntl.LOCK_EX)


def _remove(path: Path) -> bool:
    """Remove a file or a folder; whether there was one, and it could be."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()
    except OSError:
        return False
    return not os.path.lexists(path)


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", socket.gethostname())[:40] or "host"
