"""Seeds that are functions of what they are for."""

from __future__ import annotations

import hashlib


def derive(*parts: object) -> int:
    """A 63-bit seed that is a function of the parts alone, in every process and on every machine."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
