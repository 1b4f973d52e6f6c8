"""How many workers one Postgres feeds: worker processes whose training only sleeps.

    python benchmarks/workers.py [--workers 64] [--seconds 60]

Every worker takes trials under a lease, draws parameters with the study's sampler, and reports each epoch, asks the
pruner and renews its lease from a thread, as `hpo worker` does; an epoch is a sleep of 0.2 s, a trial 20 of them.
Printed is the share of the workers' time that was spent in those sleeps. Embedded server on this machine.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path[:] = [
    path for path in sys.path if Path(path or ".").resolve() != Path(__file__).resolve().parent
]  # storage.py

EPOCH_S = 0.2
EPOCHS = 20
STUDY = '[study]\nname = "sleep"\ntrials = 1000000\npruner = "none"\nsampler = "{sampler}"\n[data]\ntrain = "{data}"\n'


def child(index: int, seconds: float, start: Any, answers: Any) -> None:
    """Work for so long after `start`; answer (seconds asleep in epochs, seconds in all, trials)."""
    from optuna.trial import TrialState

    from hpo.study import ask, open_study
    from storage.leases import Beat
    from storage.postgres import database_url
    from storage.trials import trial_storage

    storage = trial_storage(database_url())
    opened = open_study("sleep", storage)
    lease = None
    done = threading.Event()

    def renew() -> None:
        while not done.wait(2.0):
            if lease is not None:
                opened.leases.renew(f"sleeper-{index}", {lease: Beat(int(time.monotonic() * 1000))})

    threading.Thread(target=renew, daemon=True).start()
    start.wait()
    time.sleep(EPOCH_S * EPOCHS * index / 64)  # not all in step
    began, asleep, trials = time.monotonic(), 0.0, 0
    while time.monotonic() - began < seconds:
        lease = opened.leases.take(opened.study_id, f"sleeper-{index}", "cpu")
        assert lease is not None
        ask(opened, lease)
        for epoch in range(1, EPOCHS + 1):
            time.sleep(EPOCH_S)
            asleep += EPOCH_S
            storage.set_trial_intermediate_value(lease.trial_id, epoch, 1 / epoch)
            opened.study.pruner.prune(opened.study, storage.get_trial(lease.trial_id))
        storage.finish_trial(lease.trial_id, TrialState.COMPLETE, [0.5], {"note": "slept well"})
        lease, trials = None, trials + 1
    answers.put((asleep, time.monotonic() - began, trials))
    done.set()
    storage.close()


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--workers", type=int, default=64)
    options.add_argument("--seconds", type=float, default=60.0)
    options.add_argument("--sampler", default="tpe")
    given = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="sleep-") as scratch:
        folder = Path(scratch)
        folder.chmod(0o711)  # root's server runs as another user
        os.environ |= {"HPO_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
        os.environ.pop("HPO_DATABASE_URL", None)
        from storage import postgres

        postgres.start()
        try:
            _prepare(folder, given.sampler)
            asleep, whole, trials = _measure(given.workers, given.seconds)
        finally:
            postgres.stop()
    print(
        f"{given.workers} workers, sampler {given.sampler}, {trials} trials in {given.seconds:.0f} s: "
        f"{100 * asleep / whole:.1f} % of their time in the objective ({os.cpu_count()} cores)"
    )


def _prepare(folder: Path, sampler: str) -> None:
    """Create the study, in a process of its own: the one that forks has no connection."""
    process = multiprocessing.get_context("fork").Process(target=_create, args=(folder, sampler))
    process.start()
    process.join()
    assert process.exitcode == 0


def _create(folder: Path, sampler: str) -> None:
    from hpo.config import load
    from hpo.study import create_or_open
    from storage.artifacts import artifact_store
    from storage.postgres import database_url
    from storage.trials import trial_storage

    np.savez(folder / "data.npz", X=np.random.default_rng(0).normal(size=(60, 8, 1)), y=np.arange(60) % 2)
    (folder / "study.toml").write_text(STUDY.format(sampler=sampler, data=folder / "data.npz"))
    storage = trial_storage(database_url())
    create_or_open(load(folder / "study.toml"), storage, artifact_store())
    storage.close()


def _measure(workers: int, seconds: float) -> tuple[float, float, int]:
    import optuna  # noqa: F401  (before the fork, so that the children share it)

    import hpo.study  # noqa: F401

    context = multiprocessing.get_context("fork")
    start, answers = context.Event(), context.Queue()
    children = [context.Process(target=child, args=(i, seconds, start, answers)) for i in range(workers)]
    for process in children:
        process.start()
    time.sleep(2.0 + workers / 16)  # connections
    start.set()
    found = [answers.get(timeout=seconds + 120) for _ in children]
    for process in children:
        process.join()
    return sum(row[0] for row in found), sum(row[1] for row in found), sum(row[2] for row in found)


if __name__ == "__main__":
    main()
