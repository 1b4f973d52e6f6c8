"""The container's limits count: half a core by cgroup gave two workers on a machine of two cores."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from hpo.launcher import count
from hpo.launcher.cores import cpu_quota, limit_threads, usable_cores, usable_memory

V2 = "29 23 0:26 {shown} /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"
V1 = "33 25 0:29 {shown} /sys/fs/cgroup/cpu,cpuacct rw,nosuid shared:9 - cgroup cgroup rw,cpu,cpuacct"
OTHERS = "21 26 0:20 / /proc rw - proc proc rw\n34 25 0:30 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"


def write(root: Path, cgroup: str, mounts: str, **files: str) -> Path:
    """A machine's /proc and /sys. files: cgroup files by their path below /sys/fs/cgroup, / written as __."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(cgroup)
    (root / "proc/self/mountinfo").write_text(OTHERS + mounts + "\n")
    for name, content in files.items():
        path = root / "sys/fs/cgroup" / name.replace("__", "/").replace("-", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n")
    return root


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"cpu.max": "50000 100000"}, 0.5),
        ({"cpu.max": "max 100000"}, math.inf),
        ({}, math.inf),
        ({"pod__box__cpu.max": "max 100000", "pod__cpu.max": "150000 100000"}, 1.5),
        ({"pod__box__cpu.max": "400000 100000", "pod__cpu.max": "max 100000", "cpu.max": "250000 100000"}, 2.5),
        ({"pod__box__cpu.max": "50000 100000", "pod__cpu.max": "150000 100000"}, 0.5),
        ({"pod__other__cpu.max": "1000 100000"}, math.inf),
        ({"cpu.max": "nonsense"}, math.inf),
        ({"cpu.max": ""}, math.inf),
        ({"cpu.max": "50000 0"}, math.inf),
    ],
)
def test_of_version_2_the_least_quota_up_to_the_root_counts(
    tmp_path: Path, files: dict[str, str], quota: float
) -> None:
    root = write(tmp_path, "0::/pod/box\n", V2.format(shown="/"), **files)
    assert cpu_quota(root) == quota


def test_of_version_1_a_negative_quota_is_none(tmp_path: Path) -> None:
    cgroup = "5:memory:/pod\n4:cpu,cpuacct:/pod/box\n0::/elsewhere\n"
    files = {
        "cpu,cpuacct__pod__box__cpu.cfs_quota_us": "-1",
        "cpu,cpuacct__pod__box__cpu.cfs_period_us": "100000",
        "cpu,cpuacct__pod__cpu.cfs_quota_us": "70000",
        "cpu,cpuacct__pod__cpu.cfs_period_us": "50000",
    }
    assert cpu_quota(write(tmp_path, cgroup, V1.format(shown="/"), **files)) == 1.4


@pytest.mark.parametrize("shown", ["/docker/abc", "/"])
def test_in_a_container_the_mount_is_its_own_group_whatever_the_host_calls_it(tmp_path: Path, shown: str) -> None:
    """Docker with version 1 shows the host's path in /proc/self/cgroup; a private namespace shows / or /.. ."""
    files = {"cpu,cpuacct__cpu.cfs_quota_us": "50000", "cpu,cpuacct__cpu.cfs_period_us": "100000"}
    assert cpu_quota(write(tmp_path, "4:cpu,cpuacct:/docker/abc\n", V1.format(shown=shown), **files)) == 0.5


def test_a_group_outside_of_the_namespace_is_looked_for_at_the_mount(tmp_path: Path) -> None:
    root = write(tmp_path, "0::/../other\n", V2.format(shown="/"), **{"cpu.max": "50000 100000"})
    assert cpu_quota(root) == 0.5


def test_a_machine_without_cgroups_has_no_quota(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path) == math.inf


@pytest.mark.parametrize(("quota", "cores"), [("50000", 1), ("100000", 1), ("199999", 1), ("300000", 3), ("max", 8)])
def test_there_are_whole_cores_and_at_least_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str, cores: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    root = write(tmp_path, "0::/\n", V2.format(shown="/"), **{"cpu.max": f"{quota} 100000"})
    assert usable_cores(root) == cores


@pytest.mark.parametrize(("quota", "threads"), [("50000", "1"), ("350000", "3"), ("900000", None), ("max", None)])
def test_libraries_start_no_more_threads_than_the_quota_has_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str, threads: str | None
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(os, "environ", {"MKL_NUM_THREADS": "5"})
    limit_threads(write(tmp_path, "0::/\n", V2.format(shown="/"), **{"cpu.max": f"{quota} 100000"}))
    found = [os.environ.get(name) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")]
    assert found == [threads, threads, "5"]


def test_a_launch_takes_as_many_workers_as_it_may_use_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPO_DEVICE", "cpu")
    monkeypatch.setattr(count, "usable_cores", lambda: 3)
    assert count.count_workers() == 3
    assert count.count_workers(5) == 5


MEMINFO = "MemTotal:        8000 kB\nMemFree:         1000 kB\nMemAvailable:    4000 kB\nHugePages_Total:       0\n"
KB = 1024


def test_without_a_limit_the_memory_is_the_machines(tmp_path: Path) -> None:
    root = write(tmp_path, "0::/\n", V2.format(shown="/"), **{"memory.max": "max"})
    (root / "proc/meminfo").write_text(MEMINFO)
    assert usable_memory(root) == (4000 * KB, 8000 * KB)


def test_of_version_2_the_tightest_memory_limit_counts_and_caches_are_free(tmp_path: Path) -> None:
    files = {
        "pod__box__memory.max": "max",
        "pod__memory.max": str(1000 * KB),
        "pod__memory.current": str(700 * KB),
        "pod__memory.stat": f"anon {400 * KB}\ninactive_file {300 * KB}",
    }
    root = write(tmp_path, "0::/pod/box\n", V2.format(shown="/"), **files)
    (root / "proc/meminfo").write_text(MEMINFO)
    assert usable_memory(root) == (600 * KB, 1000 * KB)


@pytest.mark.parametrize(("limit", "total"), [(str(2000 * KB), 2000 * KB), ("9223372036854771712", 8000 * KB)])
def test_of_version_1_a_huge_memory_limit_is_none(tmp_path: Path, limit: str, total: int) -> None:
    mounts = "34 25 0:30 / /sys/fs/cgroup/mem rw - cgroup cgroup rw,memory"
    files = {"mem__memory.limit_in_bytes": limit, "mem__memory.usage_in_bytes": str(500 * KB)}
    root = write(tmp_path, "5:memory:/\n4:cpu,cpuacct:/\n", mounts, **files)
    (root / "proc/meminfo").write_text(MEMINFO)
    assert usable_memory(root) == (min(4000 * KB, total - 500 * KB), total)


def test_a_system_that_does_not_say_has_no_limit(tmp_path: Path) -> None:
    assert usable_memory(tmp_path) == (math.inf, math.inf)
