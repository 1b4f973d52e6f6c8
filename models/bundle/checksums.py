"""The file SHA256SUMS of a saved model, in the format of sha256sum: `sha256sum -c SHA256SUMS` checks it, too."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from hpo.models.bundle.config import BundleError

SUMS = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64}) [ *]([^/\\\0]+)")


def write_checksums(folder: Path) -> None:
    """Write SHA256SUMS over the other files of a flat folder."""
    names = sorted(path.name for path in folder.iterdir() if path.name != SUMS)
    (folder / SUMS).write_text("".join(f"{_sha256(folder / name)}  {name}\n" for name in names), encoding="utf-8")


def check_folder(folder: Path) -> None:
    """Compare the files of a saved model with its SHA256SUMS; earlier versions wrote none, and nothing is compared.

    Raises BundleError, which names the file that is missing or has other content.
    """
    if not (folder / SUMS).is_file():
        return
    way_out = f"fetch or export the model again, or remove {SUMS} if the change is yours"
    text = (folder / SUMS).read_text(encoding="utf-8", errors="replace")
    lines = [_LINE.fullmatch(line) for line in text.removesuffix("\n").split("\n")]
    if not text.endswith("\n") or None in lines:
        raise BundleError(f"{folder / SUMS} is damaged; {way_out}")
    for sha256, name in (line.groups() for line in lines if line is not None):
        if not (folder / name).is_file():
            raise BundleError(f"{folder} lacks {name}, which its {SUMS} lists; {way_out}")
        if _sha256(folder / name) != sha256:
            raise BundleError(f"{folder / name} does not have the content that {SUMS} says; {way_out}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
