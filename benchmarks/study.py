"""A whole study: `hpo launch` against a plain Optuna and PyTorch script (`plain_study.py`), in turns on one server.

    python benchmarks/study.py [--sets italy vowels levels] [--pruners none median] [--repeats 3] [--quick]
        [--default-threads] [--score] [--seconds]

Both get the same list of configurations, data, split, epochs and pruner, and two worker processes; neither stops a
trial early of its own. Measured is the wall time from the command to its end, by when both have saved their best
model and evaluated it on the test part. The plain script runs with one thread a process; --default-threads adds it at
torch's own number of threads (minutes). --score: each with its own search space (ours the default one, with its
pruner and patience) and the time until a trial completes that is as good as the plain script's best on the same
validation part. --seconds: ours alone, over its default space, and where its seconds go (`spans.py`). The embedded
server is started in a fresh home before all of it. Italy and vowels ship in examples/data; levels is made here: 2
classes, 20 to 200 steps, 4 features.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
# Python looks for modules beside the script first, where `storage` would be the benchmark of that name.
sys.path[:] = [*(path for path in sys.path if Path(path or ".").resolve() != HERE), str(HERE)]

from spans import Span, prepare, show, spans  # noqa: E402

from hpo.models.data.readers import read  # noqa: E402
from hpo.models.data.sequences import Sequences, from_arrays  # noqa: E402
from hpo.models.data.splits import split_share  # noqa: E402
from hpo.models.machine import ONE_THREAD  # noqa: E402
from hpo.models.seeds import derive  # noqa: E402

EXAMPLES = HERE.parent / "examples" / "data"
WORKERS = 2
SHARE = 0.2  # of the training part, for validation
STUDY = """[study]
name = "{name}"
metric = "{metric}"
trials = {trials}
finalists = 0
{options}
[data]
train = "{folder}/train.npz"
test = "{folder}/test.npz"
validation = {share}
[train]
epochs = {epochs}
"""
FIXED = """patience = 0
[space]
normalization = "none"
patch_length = 1
pooling = "last"
head_size = 0
layers = { low = 1, high = 2 }
hidden_size = { low = 8, high = 128, log = true }
bidirectional = [false, true]
dropout = { low = 0.0, high = 0.5 }
batch_size = [16, 32, 64]
optimizer = "adamw"
learning_rate = { low = 1e-3, high = 3e-2, log = true }
weight_decay = { low = 1e-6, high = 1e-2, log = true }
gradient_clip = 0.0
schedule = "constant"
"""


@dataclass(frozen=True)
class Case:
    """One data set with its budget."""

    name: str
    metric: str
    trials: int
    epochs: int
    target: float  # times faster than the plain script with one thread a process

    def sequences(self) -> tuple[Sequences, Sequences]:
        """Training and test part."""
        if self.name == "levels":
            return levels(600, 0), levels(300, 1)
        stem = {"italy": "ItalyPowerDemand", "vowels": "JapaneseVowels"}[self.name]
        train = read(EXAMPLES / f"{stem}_TRAIN.ts")
        return train, read(EXAMPLES / f"{stem}_TEST.ts", classes=train.classes)


CASES = (
    Case("italy", "auroc", 40, 50, 2.0),
    Case("vowels", "accuracy", 40, 50, 5.0),
    Case("levels", "accuracy", 16, 10, 5.0),
)


@dataclass(frozen=True)
class Run:
    """What one command did."""

    seconds: float  # from the command to its end
    cpu: float  # seconds of all its processes on a core, which other work on the machine changes less
    began: float  # of the machine's clock, as the database's times
    trials: list[tuple[str, float | None, int, float]]  # state, value, epochs, end (clock)

    @property
    def epochs(self) -> int:
        return sum(epochs for _, _, epochs, _ in self.trials)

    @property
    def best(self) -> float:
        return max(value for state, value, _, _ in self.trials if state == "COMPLETE" and value is not None)

    def reached(self, value: float) -> float:
        """Seconds from the command to the end of the first completed trial as good as this; inf: none was."""
        ends = (end for state, found, _, end in self.trials if state == "COMPLETE" and (found or 0.0) >= value - 1e-9)
        return min(ends, default=math.inf) - self.began


def levels(n: int, seed: int) -> Sequences:
    """Noise of 4 features, 20 to 200 steps: the first feature lies a little higher in one of the two classes."""
    random = np.random.default_rng(seed)
    labels, lengths = np.arange(n) % 2, random.integers(20, 201, n)
    X = random.normal(0, 1.0, (n, 200, 4))
    X[:, :, 0] += 0.3 * labels[:, None]
    return from_arrays(X, labels, lengths)


def write_data(case: Case, folder: Path) -> None:
    """The files of both sides: train.npz and test.npz for ours, plain.npz, with our validation part, for the script."""
    train, test = case.sequences()
    ((_, rows),) = split_share(train, SHARE, derive(0, "validation") % 2**32)
    arrays = {"X": train.values, "y": train.labels, "lengths": train.lengths}
    tests = {"X": test.values, "y": test.labels, "lengths": test.lengths}
    np.savez(folder / "train.npz", **arrays)
    np.savez(folder / "test.npz", **tests)
    validation = np.isin(np.arange(train.n), rows)
    np.savez(folder / "plain.npz", **arrays, **{f"test_{k}": v for k, v in tests.items()}, validation=validation)


def configurations(case: Case) -> list[dict[str, Any]]:
    """The list that both sides train."""
    random = np.random.default_rng(0)

    def log(low: float, high: float) -> float:
        return float(np.exp(random.uniform(np.log(low), np.log(high))))

    found = []
    for _ in range(case.trials):
        layers = int(random.integers(1, 3))
        found.append(
            {
                "layers": layers,
                "hidden_size": round(log(8, 128)),
                "bidirectional": bool(random.integers(2)),
                **({"dropout": float(random.uniform(0, 0.5))} if layers > 1 else {}),
                "batch_size": int(random.choice([16, 32, 64])),
                "learning_rate": log(1e-3, 3e-2),
                "weight_decay": log(1e-6, 1e-2),
            }
        )
    return found


def ours(case: Case, folder: Path, name: str, pruner: str | None, environment: dict[str, str] | None = None) -> Run:
    """`hpo launch` over the list, or, without a pruner named, over its default space with its default pruner."""
    from hpo.study.entries import show

    options = "" if pruner is None else f'pruner = "{pruner}"'
    text = STUDY.format(**vars(case) | {"name": name}, folder=folder, share=SHARE, options=options)
    if pruner is not None:
        text += FIXED
        for table in configurations(case):
            text += "[[enqueue]]\n" + "".join(f"{key} = {show(value)}\n" for key, value in table.items())
    path = folder / f"{name}.toml"
    path.write_text(text)
    command = [sys.executable, "-P", "-m", "hpo", "launch", str(path), "--workers", str(WORKERS), "--json", "--quiet"]
    return timed(command, environment or dict(os.environ), name, folder)


def seconds(case: Case, folder: Path, repeats: int) -> None:
    """Where the seconds of our launch over its default space go."""
    runs: list[tuple[list[Span], float, float, float]] = []
    for index in range(repeats):
        name = f"{case.name}-seconds-{index}"
        environment, began = prepare(folder / f"spans-{index}"), time.monotonic()
        run = ours(case, folder, name, None, environment)
        runs.append((spans(folder / f"spans-{index}"), began, began + run.seconds, run.cpu))
    print(f"\n{case.name}: {case.trials} trials of at most {case.epochs} epochs, {repeats} times, medians")
    show(runs)


def plain(case: Case, folder: Path, name: str, pruner: str, *, own_space: bool = False, threads: int = 1) -> Run:
    """The plain script over the list, or over its own space."""
    command = [sys.executable, "-P", str(HERE / "plain_study.py"), str(folder / "plain.npz"), name]
    command += [str(folder / f"{name}.pt"), "--trials", str(case.trials), "--epochs", str(case.epochs)]
    command += ["--metric", case.metric, "--pruner", pruner]
    command += ["--workers", str(WORKERS), "--threads", str(threads)]
    if not own_space:
        path = folder / "configurations.json"
        path.write_text(json.dumps(configurations(case)))
        command += ["--configurations", str(path)]
    from hpo.storage.database import database_url

    environment = os.environ | {"DATABASE_URL": database_url()}
    return timed(command, environment | (ONE_THREAD if threads == 1 else {}), name, folder)


def timed(command: list[str], environment: dict[str, str], name: str, folder: Path) -> Run:
    """Run a command to its end."""
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # what is compiled at each start is not what is measured here
    began, started, before = time.time(), time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    with (folder / f"{name}.log").open("w") as log:
        popen = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            status = popen.wait()
        finally:
            if popen.returncode is None:  # interrupted: with the processes that it has forked
                os.killpg(popen.pid, signal.SIGTERM)
                popen.wait()
    seconds, after = time.monotonic() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    if status:
        sys.exit(f"{name} ended with status {status}:\n{(folder / f'{name}.log').read_text()[-2000:]}")
    return Run(seconds, cpu, began, trials_of(name))


def trials_of(name: str) -> list[tuple[str, float | None, int, float]]:
    from hpo.storage.database import database_url
    from hpo.storage.trials import trial_storage

    storage = trial_storage(database_url())
    trials = storage.get_all_trials(storage.get_study_id_from_name(name), deepcopy=False)
    storage.close()
    ends = [trial.datetime_complete.timestamp() if trial.datetime_complete else math.inf for trial in trials]
    return [(t.state.name, t.value, len(t.intermediate_values), end) for t, end in zip(trials, ends, strict=True)]


@contextmanager
def server(folder: Path) -> Iterator[None]:
    """The embedded server in a fresh home, with Optuna's tables and ours."""
    os.environ |= {"HPO_HOME": str(folder / "home")}
    os.environ.pop("HPO_DATABASE_URL", None)
    from hpo.storage.database import database_url
    from hpo.storage.server import server as embedded
    from hpo.storage.trials import trial_storage

    embedded.start()
    try:
        trial_storage(database_url()).close()
        yield
    finally:
        embedded.stop()


def compare(case: Case, folder: Path, pruner: str, repeats: int) -> None:
    """Both over the list, in turns; a line of the table."""
    pairs = []
    for index in range(repeats):
        name, found = f"{case.name}-{pruner}-{index}", {}
        for side in ((ours, plain), (plain, ours))[index % 2]:
            found[side] = side(case, folder, f"{name}-{side.__name__}", pruner)
        pairs.append((found[ours], found[plain]))
        check_work(case, pruner, pairs[-1])
    own, other = [run.seconds for run, _ in pairs], [run.seconds for _, run in pairs]
    ratios = [b / a for a, b in zip(own, other, strict=True)]
    target = f"{case.target:g}" if pruner == "none" else ""
    print(
        f"| {case.name} | {pruner} | {spread(own, 2)} | {spread(other, 2)} | {spread(ratios, 2)} | {target} | "
        f"{statistics.median(r.cpu for r, _ in pairs):.1f} / {statistics.median(r.cpu for _, r in pairs):.1f} | "
        f"{statistics.median(r.epochs for r, _ in pairs):.0f} / {statistics.median(r.epochs for _, r in pairs):.0f} | "
        f"{statistics.median(r.best for r, _ in pairs):.4f} / {statistics.median(r.best for _, r in pairs):.4f} |",
        flush=True,
    )


def check_work(case: Case, pruner: str, pair: tuple[Run, Run]) -> None:
    """Both trained as many trials, and without a pruner as many epochs."""
    for side, run in zip(("ours", "the plain script"), pair, strict=True):
        if len(run.trials) != case.trials or (pruner == "none" and run.epochs != case.trials * case.epochs):
            sys.exit(f"{side} trained {len(run.trials)} trials and {run.epochs} epochs of {case}")


def spread(values: list[float], digits: int) -> str:
    """Median and range."""
    median, low, high = (f"{f(values):.{digits}f}" for f in (statistics.median, min, max))
    return median if len(values) == 1 else f"{median} ({low} to {high})"


def compare_scores(case: Case, folder: Path, repeats: int) -> None:
    """Each with its own space: when each had a trial as good as the plain script's best."""
    for index in range(repeats):
        other = plain(case, folder, f"{case.name}-space-{index}-plain", "median", own_space=True)
        own = ours(case, folder, f"{case.name}-space-{index}-ours", None)
        own_s, other_s = (f"{run.reached(other.best):.1f}" for run in (own, other))
        print(
            f"| {case.name} | {other.best:.4f} | {other_s} | {own_s} | {own.best:.4f} | "
            f"{other.seconds:.1f} | {own.seconds:.1f} |",
            flush=True,
        )


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--sets", nargs="+", default=[c.name for c in CASES], choices=[c.name for c in CASES])
    options.add_argument("--pruners", nargs="*", default=["none", "median"], choices=["none", "median"])
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--quick", action="store_true", help="six trials of five epochs, once")
    options.add_argument("--default-threads", action="store_true", help="also the plain script at torch's threads")
    options.add_argument("--score", action="store_true", help="also the time to the plain script's best score")
    options.add_argument("--seconds", action="store_true", help="ours alone, and where its seconds go")
    given = options.parse_args()
    cases = [case for case in CASES if case.name in given.sets]
    if given.quick:
        cases, given.repeats = [replace(case, trials=6, epochs=5) for case in cases], 1
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # through the clean-up below
    with tempfile.TemporaryDirectory(prefix="study-") as scratch:
        Path(scratch).chmod(0o711)  # root's server runs as another user
        with server(Path(scratch)):
            run(cases, Path(scratch), given)


def run(cases: list[Case], scratch: Path, given: argparse.Namespace) -> None:
    folders = {case.name: scratch / case.name for case in cases}
    for case in cases:
        folders[case.name].mkdir()
        write_data(case, folders[case.name])
    first, tiny = folders[cases[0].name], replace(cases[0], trials=2, epochs=1)
    ours(tiny, first, "warm-ours", "none")  # both once, so that all files are in memory
    if given.seconds:
        for case in cases:
            seconds(case, folders[case.name], given.repeats)
        return
    plain(tiny, first, "warm-plain", "none")
    print(f"{WORKERS} workers, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; seconds: median (range)")
    if given.pruners:
        print(
            "\n| set | pruner | ours, s | plain, s | ratio | target | CPU, s | epochs | best validation |\n|"
            + "---|" * 9
        )
    for pruner in given.pruners:
        for case in cases:
            compare(case, folders[case.name], pruner, given.repeats)
    if given.default_threads:
        print("\nThe plain script at torch's own number of threads, the list, no pruner:")
        for case in cases:
            found = plain(case, folders[case.name], f"{case.name}-threads", "none", threads=0)
            print(f"{case.name}: {found.seconds:.1f} s", flush=True)
    if given.score:
        print("\nEach with its own space; seconds from the command to a completed trial as good as the plain best:\n")
        print(
            "| set | plain best | plain at, s | ours at, s | ours best | plain all, s | ours all, s |\n|" + "---|" * 7
        )
        for case in cases:
            compare_scores(case, folders[case.name], given.repeats)


if __name__ == "__main__":
    main()
