"""What it costs that a study's trials start in order: `[study] parallel` of 1, 2 and 4 times the workers, and off.

    python benchmarks/parallel.py [--workers 2 4 8] [--trials 12] [--epoch 0.1] [--even]

Workers whose training only sleeps, each a thread with connections of its own, take trials of one study, draw with its
sampler, report 20 epochs of `--epoch` seconds and ask its pruner, as `hpo worker` does, with its pauses where nothing
can be started. How long an epoch of a trial takes is drawn by the trial's number, the same ones for each K (lognormal,
the longest of a hundred some thirty times the shortest); --even: all alike. `--trials` is by worker.

Printed are, for each K: the share of the workers' time that was slept, from the begin to the start of the last trial,
so that the end, at which workers have nothing left to do whatever K is, is left out; the time of the whole study, also
as a multiple of that with `parallel` off; how long workers waited by their own account (`hpo status`).
"""

from __future__ import annotations

import argparse
import math
import os
import random
import sys
import tempfile
import threading
import time
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != HERE]  # storage.py

EPOCHS = 20
SPREAD = 0.7  # of the logarithm of an epoch's length
TIMES = (None, 1, 2, 4)  # of the workers; None: off
STUDY = """
[study]
name = "{name}"
trials = {trials}
sampler = "{sampler}"
finalists = 0
{parallel}
[data]
train = "data.npz"
[train]
epochs = {epochs}
"""


@dataclass
class Done:
    """What the workers of a study have done."""

    begins: list[float] = field(default_factory=list)  # of trials
    slept: list[tuple[float, float]] = field(default_factory=list)  # begin and end of each epoch
    errors: list[BaseException] = field(default_factory=list)

    def share(self, workers: int) -> float:
        """Of the workers' time between the first trial's begin and the last one's."""
        first, last = min(self.begins), max(self.begins)
        asleep = sum(max(0.0, min(end, last) - begin) for begin, end in self.slept)
        return asleep / (workers * (last - first))

    @property
    def seconds(self) -> float:
        """Of the whole study."""
        return max(end for _, end in self.slept) - min(self.begins)


def work(url: str, name: str, worker: str, epoch_s: float, even: bool, done: Done) -> None:
    """One worker: trial after trial until the study is over."""
    from hpo.storage.errors import StudyOver
    from hpo.storage.trials import trial_storage
    from hpo.study.lifecycle import open_study
    from hpo.study.record import WAITED
    from hpo.worker.worker import IDLE_S, ORDER_S

    with closing(trial_storage(url)) as storage:
        study, since_s = open_study(name, storage), None
        leases = study.leases
        try:
            while True:
                with leases.take(study.study_id, worker, "cpu") as lease:
                    if lease is not None:
                        if since_s is not None:
                            storage.set_trial_user_attr(lease.trial_id, WAITED, time.monotonic() - since_s)
                        since_s = None
                        one_trial(study, lease, epoch_s, even, done)
                        continue
                since_s = since_s or time.monotonic()
                ordered = leases.awaits_order(study.study_id)
                time.sleep(min(IDLE_S, max(ORDER_S, (time.monotonic() - since_s) / 8)) if ordered else IDLE_S)
        except StudyOver:
            return
        except BaseException as error:
            done.errors.append(error)
            raise


def one_trial(study: Any, lease: Any, epoch_s: float, even: bool, done: Done) -> None:
    """Draw it, sleep its epochs, heed the pruner."""
    from optuna.trial import TrialState

    chance = random.Random(lease.number)
    own_s = epoch_s * (1.0 if even else math.exp(chance.gauss(0.0, SPREAD)))
    done.begins.append(time.monotonic())
    study.sampler.parameters(lease.trial_id)
    good, state = chance.random(), TrialState.COMPLETE
    for epoch in range(1, EPOCHS + 1):
        began = time.monotonic()
        time.sleep(own_s)
        done.slept.append((began, time.monotonic()))
        value = good * epoch / EPOCHS + 0.1 * chance.random()
        study.storage.set_trial_intermediate_value(lease.trial_id, epoch, value)
        if epoch < EPOCHS and study.may_prune(lease.number, epoch) and study.should_prune(lease.trial_id):
            state = TrialState.PRUNED
            break
    study.storage.finish_trial(lease.trial_id, state, [value], {"seed": 0})


def measure(url: str, folder: Path, workers: int, times: int | None, given: argparse.Namespace) -> tuple[Done, Any]:
    """One study from so many workers."""
    from hpo.storage.artifacts import artifact_store
    from hpo.storage.trials import trial_storage
    from hpo.study.config import load
    from hpo.study.lifecycle import create_or_open

    name, done = f"sleep-{workers}-{times}", Done()
    parallel = "" if times is None else f"parallel = {times * workers}"
    values = {"trials": workers * given.trials, "sampler": given.sampler, "parallel": parallel, "epochs": EPOCHS}
    (folder / "study.toml").write_text(STUDY.format(name=name, **values))
    with closing(trial_storage(url)) as storage:
        study = create_or_open(load(folder / "study.toml"), storage, artifact_store())
        threads = [
            threading.Thread(target=work, args=(url, name, f"worker-{n}", given.epoch, given.even, done))
            for n in range(workers)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if done.errors:
            raise done.errors[0]
        assert len(done.begins) == workers * given.trials
        return done, study.leases.snapshot(study.study_id).in_order


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--workers", type=int, nargs="+", default=[2, 4, 8])
    options.add_argument("--trials", type=int, default=12, help="by worker")
    options.add_argument("--epoch", type=float, default=0.1, help="seconds")
    options.add_argument("--even", action="store_true", help="all epochs are of one length")
    options.add_argument("--sampler", default="random", help="others take a core's time, too")
    given = options.parse_args()
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="sleep-") as scratch:
        folder = Path(scratch)
        folder.chmod(0o711)  # root's server runs as another user
        os.environ |= {"HPO_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
        os.environ.pop("HPO_DATABASE_URL", None)
        from hpo.storage.server import server as embedded

        np.savez(folder / "data.npz", X=np.random.default_rng(0).normal(size=(60, 8, 1)), y=np.arange(60) % 2)
        url = embedded.start()
        try:
            print("| workers | parallel | slept until the last start | time of the study | waited |")
            print("|---|---|---|---|---|")
            for workers in given.workers:
                off = None
                for times in TIMES:
                    done, order = measure(url, folder, workers, times, given)
                    off = off or done.seconds
                    kind = "off" if times is None else f"{times * workers}"
                    waited = "" if order is None else f"{order.waited_s:.1f} s"
                    length = f"{done.seconds:.1f} s, {done.seconds / off:.3f}"
                    share = f"{100 * done.share(workers):.1f} %"
                    print(f"| {workers} | {kind} | {share} | {length} | {waited} |", flush=True)
        finally:
            embedded.stop()


if __name__ == "__main__":
    main()
