"""Whether a process of this machine still runs: by its number, the time of its start, and the machine's own start.

A number alone says nothing: it is given again, and each container counts its own.
"""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from hpo.storage.errors import PostgresError
from hpo.storage.home import own_folder

SILENT_S = 10.0  # a machine that was restarted was away for longer than this

Fate = Literal["unknown", "died", "ended"]  # ended: by itself, or with its machine


@dataclass(frozen=True)
class Machine:
    """Where process numbers mean something: one start of one machine, and one container on it."""

    machine_id: str
    boot_id: str
    pid_namespace: str

    @classmethod
    def parse(cls, text: str) -> Machine:
        """From `str(machine)`."""
        machine_id, boot_id, pid_namespace = text.split("/")
        return cls(machine_id, boot_id, pid_namespace)

    def __str__(self) -> str:
        return f"{self.machine_id}/{self.boot_id}/{self.pid_namespace}"


def worker_name(pid: int) -> str:
    """Of a worker of this host, by its process."""
    return f"{socket.gethostname()}-{pid}"


@cache
def this_machine() -> Machine | None:
    """None where the operating system does not say."""
    try:
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return None
    return Machine(_machine_id(), boot_id, "".join(filter(str.isdigit, namespace)))


def process_start(pid: int) -> int | None:
    """When a process began, in clock ticks since the machine's start; None for one that does not run."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def fate(worker: str, machine: str, pid: int, start: int | None, silent_s: float) -> Fate:
    """What became of a worker's process that ran on a machine of this one's name.

    silent_s: seconds since it was last heard of. "unknown": it runs, or nobody here can tell.
    """
    here, there = this_machine(), Machine.parse(machine)
    if here is None or start is None:
        return "unknown"
    if here == there:
        if process_start(pid) == start:
            return "unknown"
        return "ended" if ended_by_itself(worker, start) else "died"
    restarted = here.boot_id != there.boot_id and here.machine_id == there.machine_id != ""
    return "ended" if restarted and silent_s > SILENT_S else "unknown"


def note_end(worker: str) -> None:
    """This process is about to end by itself.

    What it may be unable to give back to a database that is away was not lost by a crash: whoever finds the worker gone
    learns so from this note.
    """
    with suppress(OSError, PostgresError):
        path = _note(worker, process_start(os.getpid()))
        path.parent.mkdir(exist_ok=True)
        path.touch()


def forget_end(worker: str) -> None:
    """This process could give back everything after all: nobody will look for its note."""
    ended_by_itself(worker, process_start(os.getpid()))


def ended_by_itself(worker: str, start: int | None) -> bool:
    """Whether there is such a note; it is removed."""
    with suppress(OSError, PostgresError):
        _note(worker, start).unlink()
        return True
    return False


def _note(worker: str, start: int | None) -> Path:
    return own_folder("ended") / f"{worker}.{start}"


def _machine_id() -> str:
    for path in ("/etc/machine-id", "/var/lib/dbus/machine-id"):
        try:
            return Path(path).read_text().strip().replace("/", "")
        except OSError:
            continue
    return ""
