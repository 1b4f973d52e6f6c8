"""A launch in a container that may use half a core, on a machine that has more: a real cgroup where one can be made."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hpo.launcher.cores import usable_cores
from tests.conftest import wait_for
from tests.processes.test_launch import summary_of

QUOTA, PERIOD = 50_000, 100_000  # microseconds: half a core
ENTER = 'echo $$ > "$0/cgroup.procs"; exec "$@"'  # $0: the group
MOUNT = 'mount --make-rprivate /; mount --bind "$0" "$1"; shift; exec "$@"'  # $0: a folder, over $1

pytestmark = pytest.mark.skipif(usable_cores() < 2, reason="this machine has no core to spare")


def _mount(kind: str, controller: str = "") -> Path:
    """Where a hierarchy of this version (cgroup, cgroup2) is mounted. Skips the test where none is."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        place, _, filesystem = line.partition(" - ")
        found, _, options = filesystem.split(" ", 2)
        if found == kind and (not controller or controller in options.split(",")):
            return Path(place.split(" ")[4])
    pytest.skip(f"no {kind} {controller} is mounted here")


@pytest.fixture
def group() -> Iterator[Path]:
    """A group of version 1 with a quota of half a core."""
    folder = _mount("cgroup", "cpu") / f"hpo-test-{os.getpid()}"
    try:
        folder.mkdir()
        (folder / "cpu.cfs_period_us").write_text(str(PERIOD))
        (folder / "cpu.cfs_quota_us").write_text(str(QUOTA))
    except OSError as error:
        pytest.skip(f"no group can be made: {error}")
    yield folder
    wait_for(lambda: not (folder / "cgroup.procs").read_text())
    folder.rmdir()


def check_launch(prefix: list[str], environment: dict[str, str], study_file: Callable[..., Path]) -> None:
    """Without a number of workers there is one, with one thread."""
    settings = {name: value for name, value in environment.items() if not name.endswith("_NUM_THREADS")}
    file = study_file(trials=2, epochs=1)
    command = [*prefix, sys.executable, "-P", "-m", "hpo", "launch", str(file), "--json", "--quiet"]
    done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=240)
    folder = Path(summary_of(done)["model"]["path"])
    assert json.loads((folder / "config.json").read_text())["provenance"]["threads"] == 1
    logs = list((Path(environment["HPO_HOME"]) / "logs").rglob("worker-*.log"))
    assert [log.name for log in logs] == ["worker-0.log"]


def test_of_version_1(group: Path, environment: dict[str, str], study_file: Callable[..., Path]) -> None:
    check_launch(["sh", "-c", ENTER, str(group)], environment, study_file)


def test_of_version_2(tmp_path: Path, environment: dict[str, str], study_file: Callable[..., Path]) -> None:
    """The files as the kernel lays them out, mounted over this machine's own: version 2 may have no CPU controller."""
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([unshare, "-m", "true"], capture_output=True).returncode:
        pytest.skip("no mount namespace can be made")
    root = tmp_path / "cgroup"
    root.mkdir()
    (root / "cpu.max").write_text(f"{QUOTA} {PERIOD}\n")
    prefix = [unshare, "-m", "sh", "-c", MOUNT, str(root), str(_mount("cgroup2"))]
    check_launch(prefix, environment, study_file)
