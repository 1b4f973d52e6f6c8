"""How many CPU cores and how much memory this process may use, also by the limits of the container that it runs in."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

from hpo.models.machine import ONE_THREAD

ROOT = Path("/")  # of /proc and /sys


def usable_cores(root: Path = ROOT) -> int:
    """Whole cores, at least one: those of the affinity mask, and no more than the cgroups' CPU quotas allow."""
    return max(1, math.floor(min(_affinity(), cpu_quota(root))))


def limit_threads(root: Path = ROOT) -> None:
    """Let numpy's and torch's libraries start no more threads than the cgroups allow cores, where nobody has said how
    many; they go by the affinity mask alone. For a program's start, before they are loaded.
    """
    cores = usable_cores(root)
    if cores < _affinity():
        for name in ONE_THREAD:
            os.environ.setdefault(name, str(cores))


def _affinity() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def cpu_quota(root: Path = ROOT) -> float:
    """Cores that the cgroups of this process allow it at once: the least quota up to the root; infinite without one."""
    folders = {folder for mount, own in _hierarchies(root, "cpu") for folder in _up(mount, own)}
    return min((quota for folder in folders if (quota := _quota(folder)) is not None), default=math.inf)


def usable_memory(root: Path = ROOT) -> tuple[float, float]:
    """Bytes that are free, and bytes in all: the machine's, or what the tightest cgroup leaves and allows.

    Infinite where the system does not say. What a group only caches counts as free.
    """
    machine = {name.rstrip(":"): 1024 * int(value) for name, value, *_ in map(str.split, _lines(root / "proc/meminfo"))}
    found = [(machine.get("MemAvailable", math.inf), machine.get("MemTotal", math.inf))]
    for mount, own in _hierarchies(root, "memory"):
        found += [room for folder in _up(mount, own) if (room := _memory(folder)) is not None]
    return min(free for free, _ in found), min(total for _, total in found)


def _memory(folder: Path) -> tuple[float, float] | None:
    """What a group's own limit leaves, and the limit; None where it has none."""
    with suppress(ValueError, IndexError):
        for limit, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            if (lines := _lines(folder / limit)) and lines[0] != "max" and (total := int(lines[0])) < 2**60:
                kept = dict(line.split() for line in _lines(folder / "memory.stat"))
                cached = int(kept.get("total_inactive_file", kept.get("inactive_file", 0)))
                return total - int(_lines(folder / used)[0]) + cached, total
    return None


def _hierarchies(root: Path, controller: str) -> Iterator[tuple[Path, PurePosixPath]]:
    """Where a controller's hierarchy is mounted, and this process's group below it (cgroups(7), "/proc files")."""
    groups = {}
    for line in _lines(root / "proc/self/cgroup"):  # 4:cpu,cpuacct:/group, or of version 2 0::/group
        _, controllers, group = line.split(":", 2)
        groups.update({name: PurePosixPath(group) for name in controllers.split(",")})
    for line in _lines(
        root / "proc/self/mountinfo"
    ):  # 30 23 0:26 /group /sys/fs/cgroup/cpu rw … - cgroup cgroup rw,cpu
        mount, _, filesystem = line.partition(" - ")
        kind, _, options = filesystem.split(" ", 2)
        own_kind = kind == "cgroup" and controller in options.split(",")
        name = "" if kind == "cgroup2" else controller if own_kind else None
        if name is not None and name in groups:
            _, _, _, shown, place, *_ = mount.split(" ")
            own = groups[name]
            # A container sees its own group as the mount's root, under a path of the host.
            inside = own.relative_to(shown) if own.is_relative_to(shown) else PurePosixPath()
            yield root / place.lstrip("/"), inside


def _up(mount: Path, own: PurePosixPath) -> Iterator[Path]:
    """The folders of a group and of those above it, up to the mount: a quota binds all below it."""
    parts = [part for part in own.parts if part not in ("/", "..")]
    for count in range(len(parts), -1, -1):
        yield mount.joinpath(*parts[:count])


def _quota(folder: Path) -> float | None:
    """A group's own quota in cores; None where it has none."""
    with suppress(ValueError, ZeroDivisionError):
        if lines := _lines(folder / "cpu.max"):  # version 2: "50000 100000" or "max 100000", in microseconds
            quota, period = lines[0].split()
            return None if quota == "max" else int(quota) / int(period)
        quotas, periods = _lines(folder / "cpu.cfs_quota_us"), _lines(folder / "cpu.cfs_period_us")
        if quotas and periods and int(quotas[0]) > 0:  # version 1: -1 is no quota
            return int(quotas[0]) / int(periods[0])
    return None


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
