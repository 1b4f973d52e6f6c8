"""Files and folders that appear whole or not at all, also after a loss of power."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to; the file replaces `path` when the block ends, and is removed if it raises.

    Raises OSError.
    """
    beside = _beside(path)
    try:
        yield beside
        _flush(beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A new folder beside `path` to write files into; it replaces the folder `path` when the block ends, and is
    removed if it raises. Folders above `path` are made.

    Raises OSError.
    """
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = _beside(path)
    beside.mkdir()
    try:
        yield beside
        for written in (*beside.iterdir(), beside):
            _flush(written)
        _replace_folder(beside, path)
        _flush(path.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid4().hex[:8]}")


def _replace_folder(beside: Path, path: Path) -> None:
    """Give `beside` the name `path`; a folder of that name is moved away first, and back if that fails."""
    if not path.exists() or not any(path.iterdir()):
        beside.rename(path)
        return
    old = beside.with_name(f"{beside.name}.old")
    path.rename(old)
    try:
        beside.rename(path)
    except OSError:
        old.rename(path)
        raise
    shutil.rmtree(old)


def _flush(path: Path) -> None:
    """Wait until a file or a folder's entries are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
