"""How many workers one Postgres feeds: worker processes whose training only sleeps.

    python benchmarks/workers.py [--workers 64] [--seconds 60] [--epoch 0.2]

Every worker takes trials under a lease, draws parameters with the study's sampler, and reports each epoch, asks the
pruner and renews its lease from a thread, as `hpo worker` does; an epoch is a sleep of 0.2 s, a trial 20 of them.
Printed is the share of the workers' time that was spent in those sleeps, and what it cost the server, embedded on this
machine: connections, memory of each (shared pages divided among those that share them), time on the CPU.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

sys.path[:] = [
    path for path in sys.path if Path(path or ".").resolve() != Path(__file__).resolve().parent
]  # storage.py

EPOCHS = 20
STUDY = '[study]\nname = "sleep"\ntrials = 1000000\npruner = "none"\nsampler = "{sampler}"\n[data]\ntrain = "{data}"\n'


def child(index: int, seconds: float, epoch_s: float, start: Any, answers: Any) -> None:
    """Work for so long after `start`; answer (seconds asleep in epochs, seconds in all, trials)."""
    from optuna.trial import TrialState

    from hpo.storage.database import database_url
    from hpo.storage.leases import Progress
    from hpo.storage.trials import trial_storage
    from hpo.study.lifecycle import open_study

    storage = trial_storage(database_url())
    study = open_study("sleep", storage)
    start.wait()
    time.sleep(epoch_s * EPOCHS * index / 64)  # not all in step
    began, asleep, trials = time.monotonic(), 0.0, 0
    while time.monotonic() - began < seconds:
        with study.leases.take(study.study_id, f"sleeper-{index}", "cpu") as lease:
            assert lease is not None
            lease.heartbeat.progress = lambda: Progress(int(time.monotonic() * 1000))
            study.sampler.parameters(lease.trial_id)
            for epoch in range(1, EPOCHS + 1):
                time.sleep(epoch_s)
                asleep += epoch_s
                storage.set_trial_intermediate_value(lease.trial_id, epoch, 1 / epoch)
                study.optuna_study.pruner.prune(study.optuna_study, storage.get_trial(lease.trial_id))
            storage.finish_trial(lease.trial_id, TrialState.COMPLETE, [0.5], {"note": "slept well"})
        trials += 1
    answers.put((asleep, time.monotonic() - began, trials))
    storage.close()


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--workers", type=int, default=64)
    options.add_argument("--seconds", type=float, default=60.0)
    options.add_argument("--epoch", type=float, default=0.2, help="seconds")
    options.add_argument("--sampler", default="tpe")
    given = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="sleep-") as scratch:
        folder = Path(scratch)
        folder.chmod(0o711)  # root's server runs as another user
        os.environ |= {"HPO_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
        os.environ.pop("HPO_DATABASE_URL", None)
        from hpo.storage.server import server as embedded

        embedded.start()
        try:
            _prepare(folder, given.sampler)
            found = _measure(given.workers, given.seconds, given.epoch)
        finally:
            embedded.stop()
    trials = found.trials
    print(
        f"{given.workers} workers, sampler {given.sampler}, epochs of {given.epoch:g} s, {trials} trials in "
        f"{given.seconds:.0f} s: {100 * found.asleep_s / found.whole_s:.1f} % of their time in the objective "
        f"({os.cpu_count()} cores)\nserver: {found.connections} connections of {found.mib:.1f} MiB, "
        f"{100 * found.server_s / given.seconds:.0f} % of a core, {1000 * found.server_s / trials:.0f} ms a trial"
    )


def _prepare(folder: Path, sampler: str) -> None:
    """Create the study, in a process of its own: the one that forks has no connection."""
    process = multiprocessing.get_context("fork").Process(target=_create, args=(folder, sampler))
    process.start()
    process.join()
    assert process.exitcode == 0


def _create(folder: Path, sampler: str) -> None:
    from hpo.storage.artifacts import artifact_store
    from hpo.storage.database import database_url
    from hpo.storage.trials import trial_storage
    from hpo.study.config import load
    from hpo.study.lifecycle import create_or_open

    np.savez(folder / "data.npz", X=np.random.default_rng(0).normal(size=(60, 8, 1)), y=np.arange(60) % 2)
    (folder / "study.toml").write_text(STUDY.format(sampler=sampler, data=folder / "data.npz"))
    storage = trial_storage(database_url())
    create_or_open(load(folder / "study.toml"), storage, artifact_store())
    storage.close()


@dataclass(frozen=True)
class Found:
    asleep_s: float  # all workers together
    whole_s: float
    trials: int
    connections: int
    mib: float  # of memory a connection
    server_s: float  # on the CPU


def _measure(workers: int, seconds: float, epoch_s: float) -> Found:
    import optuna  # noqa: F401  (before the fork, so that the children share it)

    import hpo.study.lifecycle  # noqa: F401

    context = multiprocessing.get_context("fork")
    start, answers = context.Event(), context.Queue()
    children = [context.Process(target=child, args=(i, seconds, epoch_s, start, answers)) for i in range(workers)]
    for process in children:
        process.start()
    time.sleep(2.0 + workers / 16)  # connections
    before_s = _server_s()
    start.set()
    time.sleep(seconds)
    server_s, backends = _server_s() - before_s, [one for one in _server() if "127.0.0.1(" in " ".join(one.cmdline())]
    mib = sum(one.memory_full_info().pss for one in backends) / len(backends) / 2**20
    found = [answers.get(timeout=seconds + 120) for _ in children]
    for process in children:
        process.join()
    asleep_s, whole_s, trials = (sum(column) for column in zip(*found, strict=True))
    return Found(asleep_s, whole_s, trials, len(backends), mib, server_s)


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


def _server_s() -> float:
    """Seconds that the server's processes have been on a CPU."""
    seconds = 0.0
    for process in _server():
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            seconds += times.user + times.system
    return seconds


if __name__ == "__main__":
    main()
