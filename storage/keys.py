"""The keys of all artifacts. A key is flat, and names what it holds and the SHA-256 of its content.

    data-SHA256.safetensors                              a data set
    checkpoint-STUDY-NUMBER-ATTEMPT-EPOCH-SHA256         a trial's state after an epoch
    weights-STUDY-NUMBER-ATTEMPT-SHA256.safetensors      a trial's weights; `curve` and `log` likewise
    model-STUDY-NUMBER-SHA256-NAME                       a file of a promoted model
    upload-SHA256-NAME                                   a data file that was sent to the service, as it was

STUDY is the study's store key: its id in the database and what tells it from those of other databases that share the
store. NUMBER is the trial's number, ATTEMPT the fencing token of the lease it was written under. Earlier versions
stored with the id alone, and checkpoints, weights, curves and logs without their hash.
"""

from __future__ import annotations

import hashlib
import re

KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_DIGEST = re.compile(r"-([0-9a-f]{64})(?=[-.]|$)")
UPLOADS = "upload-"  # what their keys begin with
UPLOAD = re.compile(r"upload-[0-9a-f]{64}-[A-Za-z0-9._-]{1,100}")
_OF_TRIALS = ("checkpoint", "weights", "curve", "log")
_KINDS = {"data": "a data set", **{kind: f"the {kind} of a trial" for kind in _OF_TRIALS}}


def data_key(sha256: str) -> str:
    """The key of a data set by the hash of its canonical file."""
    return f"data-{sha256}.safetensors"


def upload_key(sha256: str, name: str) -> str:
    """The key of a data file as it was sent, under the name that it had; of letters, digits, '.', '_' and '-'."""
    return f"{UPLOADS}{sha256}-{name}"


def uploaded_name(key: str) -> str:
    """The name that an uploaded file had."""
    return key.split("-", 2)[2]


def checkpoint_key(study: str, number: int, attempt: int, epoch: int, content: bytes) -> str:
    """The key of a trial's state after an epoch."""
    return f"checkpoint-{study}-{number}-{attempt}-{epoch}-{_sha256(content)}"


def checkpoint_prefix(study: str) -> str:
    """What the keys of a study's checkpoints begin with."""
    return f"checkpoint-{study}-"


def trial_key(study: str, number: int, attempt: int, file: str, content: bytes) -> str:
    """The key of a trial's file: "weights.safetensors", "curve.svg" or "log.csv"."""
    kind, _, ending = file.partition(".")
    return f"{kind}-{study}-{number}-{attempt}-{_sha256(content)}.{ending}"


def study_prefixes(study: str) -> tuple[str, ...]:
    """What the keys begin with that are deleted with the study, and no other study's do."""
    return tuple(f"{kind}-{study}-" for kind in _OF_TRIALS)


def model_prefix(study: str, number: int) -> str:
    """What the keys of a trial's promoted model begin with."""
    return f"model-{study}-{number}"


def model_key(prefix: str, sha256: str, file: str) -> str:
    """The key of a model's file: other content has another key, and the same content is stored once."""
    return f"{prefix}-{sha256}-{file}"


def described(key: str) -> str:
    """What a key stands for, in the words of a user, who has never seen it."""
    kind, found = key.partition("-")[0], _DIGEST.search(key)
    if kind == "model" and found:
        return f"the file {key[found.end() + 1 :]} of a promoted model"
    return _KINDS.get(kind, "a file")


def content_hash(key: str) -> str | None:
    """The SHA-256 that a key names; None for one that names none."""
    found = _DIGEST.search(key)
    return found[1] if found else None


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
