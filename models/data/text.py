"""Text files: opened also where they are zipped with gzip, and read in UTF-8 or not at all."""

from __future__ import annotations

import gzip
import io
from pathlib import Path
from typing import BinaryIO, TextIO

from hpo.models.data.sizes import TEXT, check_content, most_content


def open_bytes(path: Path) -> BinaryIO:
    """The file's bytes, unzipped where its name ends in .gz. Raises DataError where that becomes far more."""
    if path.suffix.lower() != ".gz":
        return path.open("rb")
    with gzip.open(path) as file:
        content = file.read(most_content(path, TEXT) + 1)
    check_content(path, len(content), content.count(b"\n") + content.count(b"\r"), TEXT)
    return io.BytesIO(content)


def open_text(path: Path) -> TextIO:
    """The file as text with its own line ends, without a byte order mark."""
    return io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig", newline="")


def lines_of(text: str) -> list[str]:
    """The lines of a text, whichever system ended them: Unix, Windows or an old Mac."""
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
