"""How much a file may turn into, checked against its size on the disk before memory is taken for it.

Reading takes at most MEMORY bytes and MEMORY_TIMES the size of the file. Ordinary files take 3 to 30 times theirs; the
rest is for what zips well (zeros behind short sequences, columns that repeat), lines of one letter, and padding.
"""

from __future__ import annotations

from pathlib import Path

from hpo.models.data.sequences import DataError

# Bytes, and times its size, that a file may become when it is unzipped or decoded: numbers, and text, of which each
# byte takes more.
NUMBERS, TEXT = (256 * 2**20, 1_000), (16 * 2**20, 50)
ROWS, A_BYTE = 1_000_000, 8  # lines or rows of a zipped file: so many, and so many for each of its bytes
ROOM, PADDED = 64 * 2**20, 1_000  # bytes, and times the file's size, that sequences may take in float64 when padded
MEMORY, MEMORY_TIMES = 2**30, 3_000


def most_content(path: Path, kind: tuple[int, int]) -> int:
    """Bytes that a file may become, unzipped or decoded. Raises OSError."""
    small, times = kind
    return small + times * path.stat().st_size


def check_content(path: Path, size: int, rows: int = 0, kind: tuple[int, int] | None = None) -> None:
    """Raise DataError for a file that becomes more bytes or lines than its size makes likely; kind: NUMBERS."""
    kind = kind or NUMBERS
    most, way_out = most_content(path, kind), "if that is right, write it without compression"
    if size > most:
        raise DataError(
            f"{path} becomes more than {most:,} bytes when it is unpacked, {kind[1]:,} times its size: {way_out}"
        )
    if rows > ROWS + A_BYTE * path.stat().st_size:
        raise DataError(f"{path} holds {rows:,} rows in {path.stat().st_size:,} bytes: {way_out}")


def check_padding(path: Path, n: int, steps: int, n_features: int) -> None:
    """Raise DataError for n sequences that, padded to the longest one's steps, are far larger than their file."""
    size = path.stat().st_size
    if 8 * n * steps * n_features > ROOM + PADDED * size:
        rule = f"padded to the {steps:,} steps of the longest one they take more than {PADDED:,} times the file's size"
        raise DataError(f"{path} holds {n:,} sequences; {rule}: cut the longest ones, or leave them out")
