"""Arrays as large as a data set: in memory while they are small, else mapped from a temporary file without a name.

The kernel writes such a file's pages to the disk and takes their memory for others whenever it is short of it, so what
a process needs for itself does not grow with its data. What is computed of large arrays is computed a piece at a time.
"""

from __future__ import annotations

import ctypes
import logging
import math
import mmap
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from hpo.errors import StudyFault

log = logging.getLogger("hpo")

IN_MEMORY = 32 * 2**20  # bytes: an array of no more lies in memory, and is one piece
PIECE = 2**20  # bytes, about, of a piece of a larger one
MADVISE = None  # of the C library, where it has it
if hasattr(mmap, "MADV_WILLNEED"):
    MADVISE = ctypes.CDLL(None).madvise
    MADVISE.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def is_large(size: int) -> bool:
    """Whether an array of so many bytes is mapped."""
    return size > IN_MEMORY


def empty(shape: Sequence[int], dtype: DTypeLike) -> NDArray[Any]:
    """An array to write to: its content is anything.

    The file of a large one lies in TMPDIR, else in /var/tmp, which is on a disk where /tmp may be in memory. Where it
    has no room, or cannot be made, the array lies in memory after all, and the log says so.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if not is_large(size):
        return np.empty(shape, dtype)
    folder = temporary_files()
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            _reserve(file.fileno(), size)
            return np.memmap(file, dtype, "r+", shape=tuple(shape)).view(np.ndarray)
    except OSError as error:
        way_out = "it is held in memory; set TMPDIR to a folder on a disk with room for several times the data"
        log.warning("%s has no place for %d MiB of data (%s): %s", folder, size >> 20, error.strerror, way_out)
        return np.empty(shape, dtype)


def temporary_files() -> str:
    """The folder of the files that arrays are mapped from."""
    large = "/var/tmp"
    return large if "TMPDIR" not in os.environ and os.access(large, os.W_OK) else tempfile.gettempdir()


class NoRoom(StudyFault):
    """There is no room for temporary files. The message says where, and the way out."""


class Growing:
    """An array that gets its rows a block at a time. Its methods raise NoRoom."""

    def __init__(self) -> None:
        self._blocks: list[NDArray[Any]] = []
        self._size, self._rows = 0, 0
        self._file: IO[bytes] | None = None

    def append(self, block: NDArray[Any]) -> None:
        """Rows behind those there are; those of all blocks lie in a temporary file once they are large together."""
        self._blocks.append(block)
        self._size, self._rows = self._size + block.nbytes, self._rows + len(block)
        if is_large(self._size):
            with _room(self._size):
                self._file = self._file or tempfile.TemporaryFile(dir=temporary_files())  # noqa: SIM115
                for each in self._blocks:
                    self._file.write(np.ascontiguousarray(each).data)
            self._like, self._blocks = block[:0], []

    def whole(self) -> NDArray[Any]:
        """All rows."""
        if self._file is None:
            return np.concatenate(self._blocks)
        shape = (self._rows, *self._like.shape[1:])
        with _room(self._size), self._file:
            self._file.flush()
            return np.memmap(self._file, self._like.dtype, "r+", shape=shape).view(np.ndarray)


@contextmanager
def _room(size: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise NoRoom(
            f"{temporary_files()} has no room for {size >> 20} MiB of data ({error.strerror}): set TMPDIR to a folder "
            "on a disk with room for several times the data"
        ) from None


def at_once(count: int, size: int) -> int:
    """How many of so many, of that many bytes each, are looked at in one go: all where they are not large together."""
    return count if not is_large(count * size) else max(1, PIECE // size)


def pieces(rows: int, row_bytes: int, unit: int = 1) -> list[slice]:
    """Slices of so many rows, which cover them all in their order: one where they are not large together, else of a
    multiple of `unit` rows but for the last, and never of a single row."""
    some = at_once(rows, row_bytes)
    if some == rows:
        return [slice(0, rows)]
    starts = range(0, max(1, rows - 1), max(2, -(-some // unit) * unit))
    return [slice(start, end) for start, end in zip(starts, [*starts[1:], rows], strict=True)]


def pieces_of(array: NDArray[Any]) -> list[slice]:
    """`pieces` of an array's rows."""
    return pieces(len(array), _row_bytes(array))


def taken(array: NDArray[Any], at: NDArray[np.int64]) -> NDArray[Any]:
    """A copy of the rows at these places."""
    parts = pieces(len(at), _row_bytes(array))
    if len(parts) == 1:
        return np.asarray(array[at])
    found = empty((len(at), *array.shape[1:]), array.dtype)
    for part in parts:
        if array.flags.c_contiguous:
            ask_for(array.ctypes.data, _row_bytes(array), at[part])
        found[part] = array[at[part]]
    return found


def ask_for(address: int, size: int, rows: NDArray[np.int64]) -> None:
    """Ask the system for the pages of these rows, of so many bytes each, of an array that is mapped, all at once. Met
    one by one, each waits for the disk, and brings many with it that nobody reads."""
    if MADVISE is None:
        return
    for row in rows.tolist():
        begin, end = address + row * size, address + (row + 1) * size
        begin -= begin % mmap.PAGESIZE
        MADVISE(begin, end - begin, mmap.MADV_WILLNEED)


def copied(array: NDArray[Any], dtype: DTypeLike | None = None, places: Sequence[int] | None = None) -> NDArray[Any]:
    """A copy in C order: of another type if one is given, and of the last axis only these places, in that order."""
    shape = array.shape if places is None else (*array.shape[:-1], len(places))
    found = empty(shape, array.dtype if dtype is None else dtype)
    for part in pieces_of(array):
        found[part] = array[part] if places is None else array[part][..., places]
    return found


def contiguous(array: NDArray[Any]) -> NDArray[Any]:
    """The array, or a copy of it, in C order."""
    return array if array.flags.c_contiguous else copied(array)


def _row_bytes(array: NDArray[Any]) -> int:
    return math.prod(array.shape[1:]) * array.itemsize


def _reserve(descriptor: int, size: int) -> None:
    """Give a file its size and its place on the disk: a page without one would end the process when it is written."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.truncate(descriptor, size)
