"""Files that appear whole or not at all, and locks between processes."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hpo.errors import HpoError
from hpo.temporary import remove_abandoned, temporary_name

if sys.platform != "win32":
    import fcntl

_LOOK_S = 0.02  # between two tries to get a lock that has a time limit


class LockTimeout(HpoError):
    """Another process holds the lock."""


@contextmanager
def part_file(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to; at the end it is flushed to the disk and takes the name `path`.

    After an exception it is removed, and `path` is as before. Raises OSError.
    """
    with temporary_name(path.parent, "part") as part:
        yield part
        _flush(part)
        part.replace(path)
        _flush(path.parent)


def write_whole(path: Path, content: bytes | str, mode: int = 0o644) -> None:
    """Write a file with these permissions, whole or not at all. Raises OSError."""
    data = content.encode() if isinstance(content, str) else content
    with part_file(path) as part, os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(data)
        file.flush()


def remove_old_parts(folder: Path, age_s: float) -> None:
    """Remove the part files of processes that are gone, and those that earlier versions left `age_s` ago or earlier."""
    remove_abandoned(folder)
    for part in folder.glob(".*.part"):
        with suppress(OSError):
            if time.time() - part.stat().st_mtime > age_s and not part.name.startswith(".hpo-"):
                part.unlink()


@contextmanager
def locked(path: Path, *, timeout_s: float | None = None, shared: bool = False) -> Iterator[int]:
    """Hold the lock on a file, which is created (0600) if missing; yields its descriptor, open for reading and writing.

    timeout_s: how long to wait for other processes, None without limit, 0 for one try; LockTimeout after it.
    shared: hold it beside others who share it. A process that inherits the descriptor holds the lock too, and the lock
    of one that dies is free.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        if sys.platform != "win32":
            _lock(descriptor, path, fcntl.LOCK_SH if shared else fcntl.LOCK_EX, timeout_s)
        yield descriptor
    finally:
        os.close(descriptor)


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock on the file alone; False where there is no such file."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        if sys.platform != "win32":
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)


def _lock(descriptor: int, path: Path, kind: int, timeout_s: float | None) -> None:
    if timeout_s is None:
        fcntl.flock(descriptor, kind)
        return
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise LockTimeout(f"another process has held {path} for {timeout_s:g} s") from None
            time.sleep(_LOOK_S)


def _flush(path: Path) -> None:
    """Write a file or a folder through to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
