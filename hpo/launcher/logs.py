"""What a study's workers have logged: files of this machine, those of other nodes through Ray, or where they lie."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpo.errors import HpoError
from hpo.launcher.ray_import import ClusterError
from hpo.launcher.ray_local import runs_here
from hpo.launcher.workers import tail
from hpo.storage.home import own_folder
from hpo.storage.leases import Leases
from hpo.storage.masking import mask

ORIGIN = ".study"  # file in a folder of logs: the key of the study that they are of
LOOK_S = 0.5  # between two looks at the files that are followed


class LogsError(HpoError):
    """There is no log of such a worker."""


@dataclass(frozen=True)
class WorkerLog:
    """One log file, which workers of the same place write to one after another."""

    host: str
    path: str  # on that host
    workers: tuple[str, ...]  # HOST-PID, the latest last
    text: str  # its last lines, or why they are not here

    @property
    def title(self) -> str:
        return f"{', '.join(self.workers) or Path(self.path).stem} ({self.path} on {self.host})"

    @property
    def here(self) -> bool:
        return self.host == socket.gethostname() and Path(self.path).exists()

    def of(self, worker: str) -> bool:
        stem = Path(self.path).stem
        return worker in self.workers or worker in (stem, stem.removeprefix("worker-"))


def log_folder(name: str, store_key: str) -> Path:
    """Where a study's workers write on this machine: `HPO_HOME/logs/NAME`.

    A study of that name in another database, or one that was deleted, may have been there first: then a folder beside
    it, with the study's key. Raises OSError.
    """
    folder = own_folder("logs") / name
    folder.mkdir(parents=True, exist_ok=True)
    origin = folder / ORIGIN
    try:
        with origin.open("x") as file:  # an earlier version's logs are the study's that comes first
            file.write(store_key)
        return folder
    except FileExistsError:
        return folder if origin.read_text() in (store_key, "") else folder.with_name(f"{name}-{store_key}")


def read_logs(
    leases: Leases, study_id: int, name: str, worker: str | None, lines: int, address: str | None
) -> list[WorkerLog]:
    """The last lines of each log of a study, or of one worker's. Raises LogsError, ClusterError.

    address: of a Ray cluster to ask; None: RAY_ADDRESS, else the one that a launch has started here, if it runs.
    """
    known: dict[tuple[str, str], list[str]] = {}
    study = leases.study(study_id)
    folder = own_folder("logs") / name if study is None else log_folder(name, study.store_key)
    for path in sorted(folder.glob("*.log")):
        known[socket.gethostname(), str(path)] = []
    for row in leases.workers(study_id):
        if row.log:
            known.setdefault((row.host or "?", row.log), []).append(row.worker)
    found = [WorkerLog(host, path, tuple(workers), "") for (host, path), workers in known.items()]
    wanted = [log for log in found if worker is None or log.of(worker)]
    if not wanted:
        there = ", ".join(Path(log.path).stem for log in found) or "none"
        raise LogsError(f"study {name!r} has no log{f' of worker {worker!r}' if worker else ''}; logs: {there}")
    remote = _asked(name, lines, address) if address or not all(log.here for log in wanted) else {}
    return [WorkerLog(log.host, log.path, log.workers, _text(log, remote, lines)) for log in wanted]


def follow(leases: Leases, study_id: int, logs: Sequence[WorkerLog]) -> Iterator[str]:
    """Lines added to the files of this machine, until the study is over and nothing is added any more."""
    files = {log.path: Path(log.path).stat().st_size for log in logs if log.here}
    while True:
        over = leases.snapshot(study_id).status in ("finished", "stopped")
        added = [line for path in files for line in _added(files, path)]
        yield from added
        if over and not added:
            return
        time.sleep(LOOK_S)


def _added(files: dict[str, int], path: str) -> list[str]:
    """Whole lines after the offset in `files`, which moves on."""
    with Path(path).open("rb") as file:
        file.seek(files[path])
        whole, newline, _ = file.read().rpartition(b"\n")
    files[path] += len(whole) + len(newline)
    return mask(whole.decode(errors="replace")).splitlines()


def _asked(name: str, lines: int, address: str | None) -> dict[tuple[str, str], str]:
    """What actors hand out, where there is a cluster to ask. Raises ClusterError for one that was named and is not."""
    if not (address or os.environ.get("RAY_ADDRESS") or runs_here(name)):
        return {}
    from hpo.launcher.ray import Cluster, tails  # an optional dependency

    try:
        return tails(Cluster(address), name, lines)
    except ClusterError:
        if address:
            raise
        return {}


def _text(log: WorkerLog, remote: dict[tuple[str, str], str], lines: int) -> str:
    if (log.host, log.path) in remote:
        return remote[log.host, log.path]
    if log.here:
        return tail(Path(log.path), lines)
    return f"not on this machine: read {log.path} on {log.host}, or name a Ray cluster it is a node of with --address"
