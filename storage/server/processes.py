"""Who runs the server's programs, and which processes are the server's."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from hpo.storage.errors import PostgresError

if sys.platform != "win32":
    import pwd

PROGRAM_S = 300.0  # that a program may take: initdb on the slowest disk


def unprivileged() -> dict[str, Any]:
    """Arguments of subprocess.run: as root those of `nobody`, else none. Raises PostgresError without a `nobody`."""
    if os.geteuid() != 0:
        return {}
    try:
        nobody = pwd.getpwnam("nobody")
    except KeyError:
        raise PostgresError(
            "PostgreSQL does not run as root, and there is no user `nobody` here to run it; "
            "run as a plain user or set HPO_DATABASE_URL"
        ) from None
    return {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}


def run(
    command: list[Any], folder: Path, *, text: str = "", descriptors: tuple[int, ...] = ()
) -> subprocess.CompletedProcess[str]:
    """Run a program in the folder, in a session and an environment of its own, unprivileged.

    text: its standard input. descriptors: those that it inherits. Raises OSError and subprocess.SubprocessError.
    """
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH") if name in os.environ}
    return subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env={"PATH": "/usr/bin:/bin", "LC_ALL": "C", "PGDATA": ".", **kept},
        input=text,
        capture_output=True,
        text=True,
        timeout=PROGRAM_S,
        start_new_session=True,
        umask=0o077,
        pass_fds=descriptors,
        **unprivileged(),
    )


def may_enter(folder: Path) -> bool:
    """Whether the user who runs the server may enter the folder."""
    try:
        return run(["/bin/sh", "-c", 'cd -- "$0"', folder], Path("/")).returncode == 0
    except OSError as error:
        raise PostgresError(
            f"PostgreSQL does not run as root, and this process cannot become `nobody` ({error.strerror}); "
            "run as a plain user or set HPO_DATABASE_URL"
        ) from None


def postmaster(data: Path) -> tuple[int, int]:
    """(process id, port) of postmaster.pid; zeros where it does not say."""
    try:
        lines = (data / "postmaster.pid").read_text().splitlines()
    except FileNotFoundError:
        lines = []
    numbers = [int(lines[i]) if i < len(lines) and lines[i].strip().isdigit() else 0 for i in (0, 3)]
    return numbers[0], numbers[1]


def server_processes(data: Path) -> list[int]:
    """Live postgres processes whose working directory is the data folder: the server's own, and no other."""
    if not data.exists():
        return []
    if not Path("/proc/self/cwd").exists():
        command = ["lsof", "-t", "-a", "-c", "postgres", "-d", "cwd", "--", str(data)]
        return [int(pid) for pid in subprocess.run(command, capture_output=True, text=True).stdout.split()]
    found, wanted = [], data.stat()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # ended meanwhile, or another user's
            here = os.path.samestat((process / "cwd").stat(), wanted)
            if here and (process / "exe").readlink().name.split()[0] == "postgres":  # not "… (deleted)"
                found.append(int(process.name))
    return found
