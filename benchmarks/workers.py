"""How many workers one Postgres feeds: workers whose training only sleeps.

    python benchmarks/workers.py [--workers 64] [--seconds 60] [--epoch 0.2]
    python benchmarks/workers.py --workers 1000 --processes 8 --epoch 5 --sampler random
    python benchmarks/workers.py --pooler 8      # all through pgbouncer, with so many connections to the server

Every worker takes trials under a lease, draws parameters with the study's sampler, and reports each epoch, asks the
pruner and renews its lease from a thread, as `hpo worker` does; an epoch is a sleep of 0.2 s, a trial 20 of them.
Each is a process, or one of the slots of a process, which share two connections and renew their leases together.
Printed is the share of the workers' time that was spent in those sleeps, and what it cost the server, embedded on this
machine: connections, memory of each (shared pages divided among those that share them), time on the CPU. A trial is 20
epochs that ended in time. --seconds should be that of two trials at least.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

HERE = Path(__file__).resolve().parent
sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != HERE]  # storage.py

EPOCHS = 20
STUDY = (
    '[study]\nname = "sleep"\ntrials = 1000000\npruner = "{pruner}"\nsampler = "{sampler}"\n[data]\ntrain = "{data}"\n'
)


class Slept:
    """What the slots of one process have done."""

    def __init__(self) -> None:
        self.asleep_s, self.whole_s, self.epochs, self.lost = 0.0, 0.0, 0, 0
        self._lock = threading.Lock()

    def add(self, whole_s: float, epochs: int, epoch_s: float, *, lost: bool) -> None:
        with self._lock:
            self.whole_s, self.epochs, self.lost = self.whole_s + whole_s, self.epochs + epochs, self.lost + lost
            self.asleep_s += epochs * epoch_s


def child(
    place: tuple[int, int], slots: int, seconds: float, epoch_s: float, start: Any, measured: Any, answers: Any
) -> None:
    """Work in so many slots for so long after `start`; answer what they have done. place: of how many, and which."""
    from hpo.storage.database import database_url
    from hpo.storage.leases import Leases
    from hpo.storage.trials import trial_storage
    from hpo.study.lifecycle import open_study

    storage = trial_storage(database_url())
    leases, studies, done = Leases(storage), [open_study("sleep", storage) for _ in range(slots)], Slept()
    processes, index = place
    worker = f"sleeper-{index}"
    leases.register(worker, studies[0].study_id, "benchmark", os.getpid(), "cpu")
    start.wait()
    ends_at = time.monotonic() + seconds
    delays_s = [epoch_s * EPOCHS * (index + slot / slots) / processes for slot in range(slots)]  # not all in step
    threads = [
        threading.Thread(target=work, args=(study, leases, worker, epoch_s, delay_s, ends_at, done))
        for study, delay_s in zip(studies, delays_s, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    measured.wait()  # its connections are part of that
    answers.put((done.asleep_s, done.whole_s, done.epochs, done.lost))
    storage.close()


def work(study: Any, leases: Any, worker: str, epoch_s: float, delay_s: float, ends_at: float, done: Slept) -> None:
    """One slot: trial after trial, the last one given back."""
    time.sleep(delay_s)
    while (taken_at := time.monotonic()) < ends_at:
        epochs = [0]
        try:
            one_trial(study, leases, worker, epoch_s, ends_at, epochs)
        except Exception as error:
            print(f"{worker}: {type(error).__name__}: {error}", file=sys.stderr)
            done.add(time.monotonic() - taken_at, epochs[0], epoch_s, lost=True)
        else:
            done.add(min(time.monotonic(), ends_at) - taken_at, epochs[0], epoch_s, lost=False)


def one_trial(study: Any, leases: Any, worker: str, epoch_s: float, ends_at: float, epochs: list[int]) -> None:
    """Take a trial and end it, or give it back after `ends_at`; epochs[0] counts those until then."""
    from optuna.trial import TrialState

    from hpo.storage.heartbeat import Progress

    storage = study.storage
    with leases.take(study.study_id, worker, "cpu") as lease:
        assert lease is not None
        lease.heartbeat.progress = lambda: Progress(int(time.monotonic() * 1000))
        study.sampler.parameters(lease.trial_id)
        for epoch in range(1, EPOCHS + 1):
            time.sleep(epoch_s)
            if time.monotonic() > ends_at:
                return
            epochs[0] = epoch
            storage.set_trial_intermediate_value(lease.trial_id, epoch, 1 / epoch)
            study.should_prune(lease.trial_id)
        storage.finish_trial(lease.trial_id, TrialState.COMPLETE, [0.5], {"note": "slept well"})


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--workers", type=int, default=64)
    options.add_argument("--processes", type=int, help="that they are slots of; default: one for each")
    options.add_argument("--seconds", type=float, default=60.0)
    options.add_argument("--epoch", type=float, default=0.2, help="seconds")
    options.add_argument("--sampler", default="tpe")
    options.add_argument("--pruner", default="none", help="is asked, but nobody heeds it")
    options.add_argument("--pooler", type=int, metavar="SIZE", help="through pgbouncer, with so many connections")
    given = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="sleep-") as scratch:
        folder = Path(scratch)
        folder.chmod(0o711)  # root's server runs as another user
        os.environ |= {"HPO_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
        os.environ.pop("HPO_DATABASE_URL", None)
        from hpo.storage.server import server as embedded

        url = embedded.start()
        try:
            with _pooler(url, folder, given.pooler):
                _prepare(folder, given.sampler, given.pruner)
                found = _measure(given.workers, given.processes or given.workers, given.seconds, given.epoch)
        finally:
            embedded.stop()
    trials = found.epochs / EPOCHS
    print(
        f"{given.workers} workers in {given.processes or given.workers} processes, sampler {given.sampler}, epochs of "
        f"{given.epoch:g} s, {trials:.1f} trials in {given.seconds:.0f} s, {found.lost} lost: "
        f"{100 * found.asleep_s / found.whole_s:.1f} % of their time in the objective "
        f"({os.cpu_count()} cores, load {os.getloadavg()[0]:.0f})\nserver: {found.connections} connections of "
        f"{found.mib:.1f} MiB, {100 * found.server_s / given.seconds:.0f} % of a core, "
        f"{1000 * found.server_s / trials:.1f} ms a trial; workers: {1000 * found.clients_s / trials:.0f} ms a trial"
    )


def _pooler(url: str, folder: Path, size: int | None) -> Any:
    """A pooler of chaos.py, if one is asked for; it leads all that connects."""
    if size is None:
        return nullcontext()
    sys.path.append(str(HERE))
    from chaos import leading  # type: ignore[import-not-found]  # (takes the folder away again)

    return leading(folder, size)


def _prepare(folder: Path, sampler: str, pruner: str) -> None:
    """Create the study, in a process of its own: the one that forks has no connection."""
    process = multiprocessing.get_context("fork").Process(target=_create, args=(folder, sampler, pruner))
    process.start()
    process.join()
    assert process.exitcode == 0


def _create(folder: Path, sampler: str, pruner: str) -> None:
    from hpo.storage.artifacts import artifact_store
    from hpo.storage.database import database_url
    from hpo.storage.trials import trial_storage
    from hpo.study.config import load
    from hpo.study.lifecycle import create_or_open

    np.savez(folder / "data.npz", X=np.random.default_rng(0).normal(size=(60, 8, 1)), y=np.arange(60) % 2)
    text = STUDY.format(sampler=sampler, pruner=pruner, data=folder / "data.npz")
    (folder / "study.toml").write_text(text)
    storage = trial_storage(database_url())
    create_or_open(load(folder / "study.toml"), storage, artifact_store())
    storage.close()


@dataclass(frozen=True)
class Found:
    asleep_s: float  # all workers together
    whole_s: float
    epochs: int
    lost: int
    connections: int
    mib: float  # of memory a connection
    server_s: float  # on the CPU
    clients_s: float


def _measure(workers: int, processes: int, seconds: float, epoch_s: float) -> Found:
    import optuna  # (before the fork, so that the children share it)

    import hpo.study.lifecycle  # noqa: F401

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    context = multiprocessing.get_context("fork")
    start, measured, answers = context.Event(), context.Event(), context.Queue()
    slots = [workers // processes + (index < workers % processes) for index in range(processes)]
    children = [
        context.Process(target=child, args=((processes, i), slots[i], seconds, epoch_s, start, measured, answers))
        for i in range(processes)
    ]
    for process in children:
        process.start()
    time.sleep(4.0 + workers / 32)  # connections
    before_s, clients_s = _cpu_s(_server()), _cpu_s([psutil.Process(one.pid) for one in children])
    start.set()
    time.sleep(seconds)
    backends = [one for one in _server() if "127.0.0.1(" in _command(one)]
    memory = list(filter(None, map(_memory, backends)))
    server_s = _cpu_s(_server()) - before_s
    clients_s = _cpu_s([psutil.Process(one.pid) for one in children]) - clients_s
    measured.set()
    found = [answers.get(timeout=seconds + 600) for _ in children]
    for process in children:
        process.join()
    asleep_s, whole_s, epochs, lost = (sum(column) for column in zip(*found, strict=True))
    mib = sum(memory) / max(1, len(memory)) / 2**20
    return Found(asleep_s, whole_s, epochs, lost, len(backends), mib, server_s, clients_s)


def _server() -> list[psutil.Process]:
    from hpo.storage.server import server as embedded
    from hpo.storage.server.processes import server_processes

    data = embedded.status().data
    assert data is not None
    found = []
    for pid in server_processes(data):
        with suppress(psutil.NoSuchProcess):  # an autovacuum worker that has just ended
            found.append(psutil.Process(pid))
    return found


def _command(process: psutil.Process) -> str:
    with suppress(psutil.NoSuchProcess):
        return " ".join(process.cmdline())
    return ""


def _memory(process: psutil.Process) -> int | None:
    with suppress(psutil.NoSuchProcess, FileNotFoundError):
        pss: int = process.memory_full_info().pss
        return pss
    return None


def _cpu_s(processes: list[psutil.Process]) -> float:
    """Seconds that they have been on a CPU."""
    seconds = 0.0
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            seconds += times.user + times.system
    return seconds


if __name__ == "__main__":
    main()
