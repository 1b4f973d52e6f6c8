"""Files and folders that appear whole or not at all, also after a loss of power."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hpo.temporary import remove_abandoned, temporary_folder, temporary_name


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to; the file replaces `path` when the block ends, and is removed if it raises.

    Raises OSError.
    """
    remove_abandoned(path.parent)
    with temporary_name(path.parent, "part") as beside:
        yield beside
        _flush(beside)
        beside.replace(path)
        _flush(path.parent)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A new folder beside `path` to write files into; it replaces the folder `path` when the block ends, and is
    removed if it raises. Folders above `path` are made.

    Raises OSError.
    """
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    _end_replacement(path)
    with temporary_folder(path.parent, "part") as beside:
        yield beside
        for written in (*beside.iterdir(), beside):
            _flush(written)
        _replace_folder(beside, path)
        _flush(path.parent)


def _replace_folder(beside: Path, path: Path) -> None:
    """Give `beside` the name `path`; a folder of that name is moved away first, and back if that fails."""
    if not path.exists() or not any(path.iterdir()):
        beside.rename(path)
        return
    path.rename(_old(path))
    try:
        beside.rename(path)
    except OSError:
        _old(path).rename(path)
        raise
    shutil.rmtree(_old(path))


def _end_replacement(path: Path) -> None:
    """What a process killed in the middle of `_replace_folder` left: the old folder comes back, or goes."""
    if not _old(path).exists():
        return
    if path.exists():
        shutil.rmtree(_old(path))
    else:
        _old(path).rename(path)


def _old(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def _flush(path: Path) -> None:
    """Wait until a file or a folder's entries are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
