"""Files that appear whole, locks between processes, and artifact keys."""

from __future__ import annotations

import hashlib
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from hpo.storage.errors import MissingRecord
from hpo.storage.files import LockTimeout, is_locked, locked, part_file, write_whole
from hpo.storage.keys import (
    KEY,
    checkpoint_key,
    content_hash,
    data_key,
    model_key,
    model_prefix,
    study_prefixes,
    trial_key,
)


def test_a_file_is_written_whole_with_its_permissions(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_whole(path, "old", 0o600)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    write_whole(path, b"new")
    assert path.read_bytes() == b"new"
    with pytest.raises(UnicodeEncodeError), part_file(path) as part:
        part.write_text("half, then what cannot be written: \ud800")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_lock_is_held_by_one_and_shared_by_many_until_its_process_ends(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert not is_locked(path)
    with locked(path, timeout_s=0.0):
        assert is_locked(path)
        for shared in (False, True):
            with (
                pytest.raises(LockTimeout, match=r"another process has held .*lock for 0 s"),
                locked(path, timeout_s=0.0, shared=shared),
            ):
                pass
    with locked(path, shared=True), locked(path, shared=True, timeout_s=0.0):
        assert not is_locked(path)
        with pytest.raises(LockTimeout), locked(path, timeout_s=0.0):
            pass
    with locked(path) as descriptor:
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(descriptor,))
    assert is_locked(path)  # by the child, which inherited it
    child.communicate(b"\n")
    assert not is_locked(path)


def test_keys_name_their_content() -> None:
    content, digest = b"content", hashlib.sha256(b"content").hexdigest()
    keys = [
        data_key(digest),
        checkpoint_key("7_ab", 3, 2, 11, content),
        trial_key("7_ab", 3, 2, "weights.safetensors", content),
        model_key(model_prefix("7_ab", 3), digest, "config.json"),
    ]
    assert keys == [
        f"data-{digest}.safetensors",
        f"checkpoint-7_ab-3-2-11-{digest}",
        f"weights-7_ab-3-2-{digest}.safetensors",
        f"model-7_ab-3-{digest}-config.json",
    ]
    assert all(KEY.fullmatch(key) for key in keys)
    assert [content_hash(key) for key in keys] == [digest] * 4
    earlier = ["checkpoint-7-3-2-11", "weights-7-3-2.safetensors", "curve-7-3-2.svg"]
    assert [content_hash(key) for key in earlier] == [None] * 3
    assert study_prefixes("7") == ("checkpoint-7-", "weights-7-", "curve-7-", "log-7-")
    assert not any(key.startswith(study_prefixes("7")) for key in keys)


def test_a_missing_record_reads_without_quotes_and_is_a_key_error() -> None:
    with pytest.raises(KeyError) as caught:
        raise MissingRecord("no study has the id 7")
    assert str(caught.value) == "no study has the id 7"
