"""How much a file may turn into, checked against its size on the disk before memory is taken for it.

Reading takes at most MEMORY bytes and MEMORY_TIMES the size of the file. Ordinary files take 3 to 30 times theirs; the
rest is for lines of one letter, zipped text and padding.
"""

from __future__ import annotations

from pathlib import Path

from hpo.models.data.sequences import DataError

SMALL, TIMES = 4 * 2**20, 30  # bytes, and times its size, that a file may become when it is unzipped or decoded
ROWS = 100_000  # lines or rows of a zipped file, beside one for each of its bytes
ROOM, PADDED = 16 * 2**20, 200  # bytes, and times the file's size, that sequences may take in float64 when padded
MEMORY, MEMORY_TIMES = 256 * 2**20, 1_000


def most_content(path: Path) -> int:
    """Bytes that a file may become, unzipped or decoded. Raises OSError."""
    return SMALL + TIMES * path.stat().st_size


def check_content(path: Path, size: int, rows: int = 0) -> None:
    """Raise DataError for a file that becomes more bytes or lines than its size makes likely."""
    most, way_out = most_content(path), "if that is right, write it without compression"
    if size > most:
        raise DataError(
            f"{path} becomes more than {most:,} bytes when it is unpacked, {TIMES} times its size: {way_out}"
        )
    if rows > ROWS + path.stat().st_size:
        raise DataError(f"{path} holds {rows:,} rows in {path.stat().st_size:,} bytes: {way_out}")


def check_padding(path: Path, n: int, steps: int, n_features: int) -> None:
    """Raise DataError for n sequences that, padded to the longest one's steps, are far larger than their file."""
    size = path.stat().st_size
    if 8 * n * steps * n_features > ROOM + PADDED * size:
        rule = f"padded to the {steps:,} steps of the longest one they take more than {PADDED} times the file's size"
        raise DataError(f"{path} holds {n:,} sequences; {rule}: cut the longest ones, or leave them out")
