"""How many CPU cores this process may use: by its affinity, and by the quota of the container that it runs in."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

ROOT = Path("/")  # of /proc and /sys


def usable_cores(root: Path = ROOT) -> int:
    """Whole cores, at least one: those of the affinity mask, and no more than the cgroups' CPU quotas allow."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return max(1, math.floor(min(cores, cpu_quota(root))))


def cpu_quota(root: Path = ROOT) -> float:
    """Cores that the cgroups of this process allow it at once: the least quota up to the root; infinite without one."""
    folders = {folder for mount, own in _hierarchies(root) for folder in _up(mount, own)}
    return min((quota for folder in folders if (quota := _quota(folder)) is not None), default=math.inf)


def _hierarchies(root: Path) -> Iterator[tuple[Path, PurePosixPath]]:
    """Where a hierarchy with CPU quotas is mounted, and this process's group below it (cgroups(7), "/proc files")."""
    groups = {}
    for line in _lines(root / "proc/self/cgroup"):  # 4:cpu,cpuacct:/group, or of version 2 0::/group
        _, controllers, group = line.split(":", 2)
        groups.update({name: PurePosixPath(group) for name in controllers.split(",")})
    for line in _lines(
        root / "proc/self/mountinfo"
    ):  # 30 23 0:26 /group /sys/fs/cgroup/cpu rw … - cgroup cgroup rw,cpu
        mount, _, filesystem = line.partition(" - ")
        kind, _, options = filesystem.split(" ", 2)
        name = "" if kind == "cgroup2" else "cpu" if kind == "cgroup" and "cpu" in options.split(",") else None
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
