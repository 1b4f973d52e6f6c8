"""The keys of all artifacts. A key is flat, and names what it holds.

    data-SHA256.safetensors                       a data set
    checkpoint-STUDY-NUMBER-ATTEMPT-EPOCH         a trial's state after an epoch
    weights-STUDY-NUMBER-ATTEMPT.safetensors      a trial's weights; `curve` and `log` likewise
    model-STUDY-NUMBER-SHA256-NAME                a file of a promoted model

STUDY is the study's id, NUMBER the trial's number, ATTEMPT the fencing token of the lease it was written under.
"""

from __future__ import annotations

import re

KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_DIGEST = re.compile(r"-([0-9a-f]{64})-")
_OF_TRIALS = ("checkpoint", "weights", "curve", "log")


def data_key(sha256: str) -> str:
    """The key of a data set by the hash of its canonical file."""
    return f"data-{sha256}.safetensors"


def checkpoint_key(study_id: int, number: int, attempt: int, epoch: int) -> str:
    """The key of a trial's state after an epoch."""
    return f"checkpoint-{study_id}-{number}-{attempt}-{epoch}"


def trial_key(study_id: int, number: int, attempt: int, file: str) -> str:
    """The key of a trial's file: "weights.safetensors", "curve.svg" or "log.csv"."""
    kind, _, ending = file.partition(".")
    return f"{kind}-{study_id}-{number}-{attempt}.{ending}"


def study_prefixes(study_id: int) -> tuple[str, ...]:
    """What the keys begin with that are deleted with the study."""
    return tuple(f"{kind}-{study_id}-" for kind in _OF_TRIALS)


def model_prefix(study_id: int, number: int) -> str:
    """What the keys of a trial's promoted model begin with."""
    return f"model-{study_id}-{number}"


def model_key(prefix: str, sha256: str, file: str) -> str:
    """The key of a model's file: other content has another key, and the same content is stored once."""
    return f"{prefix}-{sha256}-{file}"


def content_hash(key: str) -> str | None:
    """The SHA-256 that a model's key names."""
    found = _DIGEST.search(key)
    return found[1] if found else None
