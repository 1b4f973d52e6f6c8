"""Temporary names end with their process: what is killed is removed, what lives is left alone."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hpo.models.files import whole_file, whole_folder
from hpo.storage.artifacts import artifact_store
from hpo.storage.files import part_file
from hpo.storage.scratch import scratch_folder
from hpo.temporary import remove_abandoned, temporary_folder, temporary_name

HOLD = """
import sys
from pathlib import Path
from hpo.models.files import whole_file, whole_folder
from hpo.storage.files import part_file
from hpo.storage.scratch import scratch_folder
from hpo.temporary import temporary_folder
folder = Path(sys.argv[1])
with {held} as name:
    if not name.exists():
        name.write_text("half")
    else:
        (name / "half").write_text("half")
    print(name, flush=True)
    input()
"""
KINDS = {
    "part_file": 'part_file(folder / "a")',
    "whole_file": 'whole_file(folder / "a")',
    "whole_folder": 'whole_folder(folder / "a")',
    "scratch_folder": "scratch_folder()",
}


@contextmanager
def holder(kind: str, folder: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A process that holds a name of that kind, with something in it."""
    command = [sys.executable, "-c", HOLD.format(held=KINDS[kind]), str(folder)]
    environment = os.environ | {"HPO_HOME": str(folder / "home")}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        yield process, Path(process.stdout.readline().strip())
        process.kill()


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_killed_process_leaves_is_removed_at_the_next_use_and_named(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL runs no destructor (Dicklesworthstone/mcp_agent_mail_rust, issue 308: 41 MB a killed run). A lock ends
    with its process, an age does not say whether one still writes (systemd, TEMPORARY_DIRECTORIES.md)."""
    monkeypatch.setenv("HPO_HOME", str(tmp_path / "home"))

    def use() -> None:
        if kind == "part_file":
            artifact_store(str(tmp_path)).put("b", b"")
        elif kind == "scratch_folder":
            with scratch_folder():
                pass
        elif kind == "whole_file":
            with whole_file(tmp_path / "b") as name:
                name.touch()
        else:
            with whole_folder(tmp_path / "b"):
                pass

    with holder(kind, tmp_path) as (process, name):
        use()
        assert name.exists()
        process.kill()
        process.wait()
        assert name.exists()
        with caplog.at_level(logging.INFO, "hpo"):
            use()
        assert not name.exists()
        assert f"removed {name}: the process that wrote to it is gone" in caplog.text
    assert list(name.parent.glob(".*")) == []


def test_the_names_of_another_host_are_left_alone_for_a_day(tmp_path: Path) -> None:
    """A lock that is held there may not be seen here: NFS with local locks."""
    name = tmp_path / f".hpo-elsewhere-{'a' * 32}.part"
    lock = tmp_path / f"{name.name}.lock"
    for path in (name, lock):
        path.touch()
    remove_abandoned(tmp_path)
    assert name.exists()
    day_ago = time.time() - 25 * 3600
    os.utime(lock, (day_ago, day_ago))
    remove_abandoned(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_nothing_but_our_own_names_is_removed(tmp_path: Path) -> None:
    others = [".a.lock", ".hpo-notes.lock", ".hpo-a", ".git.part"]
    for name in others:
        (tmp_path / name).touch()
    with temporary_folder(tmp_path, "part") as folder:
        (folder / "file").touch()
    with temporary_name(tmp_path, "part") as name_of_a_file:
        name_of_a_file.touch()
    with part_file(tmp_path / "whole") as part:
        part.touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*others, "whole"])


def test_a_folder_whose_replacement_was_cut_short_comes_back(tmp_path: Path) -> None:
    (tmp_path / ".a.old").mkdir()
    (tmp_path / ".a.old" / "old").touch()
    with pytest.raises(ValueError, match="cut short"), whole_folder(tmp_path / "a"):
        raise ValueError("cut short")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["old"]
    (tmp_path / ".a.old").mkdir()  # killed after the new folder had its name
    with whole_folder(tmp_path / "a") as beside:
        (beside / "new").touch()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
