"""Study files that are accepted and fail later: edge values of every key, each study run to its model.

    python benchmarks/fuzz_trials.py [--minutes 10] [--seed 0]

Makes study files that are valid by form, with values at the edges of what each key admits, over small data sets of
many kinds (few sequences, rare classes, groups, one step, one feature, features that do not vary), and goes the whole
way of `hpo launch` in this process: the study is created in a PostgreSQL of its own, its trials are taken, trained,
recorded and promoted. What is refused at the creation is in order. Printed is, once a kind, what was accepted and then
failed: a trial by an error, a worker or a promotion by an exception. What remains are trials that diverge, at rates or
decays that float32 holds but no network bears. `--only SEED` shows one input and its traceback.
`benchmarks/fuzz_study_files.py` damages files instead, and ends at the plan.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import re
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy as np
from fuzz_study_files import toml

log = logging.getLogger("hpo")

EPOCHS = (1, 2)
TRIALS = (2, 2, 2, 14)  # the more, the more of a sampler is met
CHANCE = 0.25  # of a key to be there at all

Range = dict[str, Any]

STUDY: dict[str, tuple[Any, ...]] = {
    "metric": ("accuracy", "balanced_accuracy", "f1", "macro_f1", "auroc", "average_precision", "log_loss"),
    "timeout": (1e-3, 5, "1d", 9.9e9),
    "sampler": ("tpe", "gp", "cmaes", "random", "qmc", "grid"),
    "pruner": ("hyperband", "halving", "median", "none"),
    "seed": (0, 1, 2**32 - 1),
    "lease": (1, 1.5, 60, "1d", 9.9e9),
    "attempts": (1, 3, 2**31 - 1),
}
DATA: dict[str, tuple[Any, ...]] = {
    "holdout": (1e-9, 0.01, 0.2, 0.5, 0.9, 0.999, 1 - 1e-9),
    "validation": (1e-9, 0.01, 0.2, 0.5, 0.9, 0.999, 1 - 1e-9, *({"folds": k} for k in (2, 3, 5, 10, 30))),
}
TRAIN: dict[str, tuple[Any, ...]] = {
    "patience": (0, 1, 2**31 - 1),
    "precision": ("float32", "bfloat16"),
    "keep_best": (1, 2, 2**31 - 1),
}
FLOATS = (0, 0.0, -0.0, 1e-320, 1e-308, 1e-46, 1e-45, 1e-38, 1e-30, 1e-7, 0.5, 1, 10.0, 1e10, 3e38, 3.5e38, 1e300)
SPACE: dict[str, tuple[Any, ...]] = {
    "normalization": ("none", "channel", "sequence"),
    "sequence_length": (0, 1, 2, 3, 7, 12),
    "patch_length": (1, 2, 3, 7, 12),
    "hidden_size": (1, 2, 7, 64, 300),
    "layers": (1, 2, 8),
    "bidirectional": (False, True),
    "pooling": ("last", "mean", "max", "attention", "flatten"),
    "head_size": (0, 1, 2, 300),
    "dropout": (0, 1e-320, 1e-8, 0.5, 0.999, 0.99999999, 0.9999999999999999),
    "batch_size": (1, 2, 7, 16, 30),
    "optimizer": ("adamw", "adam", "rmsprop", "sgd"),
    "learning_rate": FLOATS,
    "weight_decay": FLOATS,
    "gradient_clip": FLOATS,
    "schedule": ("constant", "cosine", "plateau"),
    "class_weight": ("none", "balanced"),
    "threshold": ("half", "chosen"),
}
NUMBERS = ("sequence_length", "patch_length", "hidden_size", "layers", "head_size", "dropout", "batch_size",
           "learning_rate", "weight_decay", "gradient_clip")  # fmt: skip


def make_data(rng: random.Random, folder: Path) -> str:
    """One small data set; what it is like."""
    noise = np.random.default_rng(rng.randrange(2**32))
    n, steps = rng.choice((4, 5, 8, 12, 30, 30, 60)), rng.choice((1, 2, 3, 7, 12, 12))
    features, classes = rng.choice((1, 1, 2, 5)), rng.choice((2, 2, 2, 3, 5))
    kind = rng.choice(("even", "even", "rare", "single", "sorted"))
    y = np.arange(n) % classes
    if kind == "rare":
        y = np.where(np.arange(n) < n - 2, 0, np.arange(n) % classes)
    elif kind == "single":
        y = np.where(np.arange(n) < n - 1, 0, 1)
    elif kind == "sorted":
        y = np.sort(y)
    X = noise.normal(0, 1, (n, steps, features)) * rng.choice((1, 1, 1, 0, 1e-30, 1e-40, 1e18, 1e30, 1e38))
    X += rng.choice((0, 0, 0, 1e6, 1e30))
    arrays: dict[str, Any] = {"X": X, "y": np.array([f"class {c}" for c in y])}
    if rng.random() < 0.4:
        arrays["lengths"] = noise.integers(1, steps + 1, n)
    if rng.random() < 0.3:
        arrays["groups"] = np.arange(n) // rng.choice((1, 2, 5, n))
    np.savez(folder / "train.npz", **arrays)
    test = rng.choice((None, None, "all", "one", "one class", "longer", "shorter"))
    if test is not None:
        rows = {"one": np.arange(1), "one class": np.flatnonzero(y == y[0])}.get(test, np.arange(n))
        part = {name: array[rows] for name, array in arrays.items() if name != "groups"}
        if test in ("longer", "shorter"):
            part["X"] = np.concatenate([X, X], axis=1) if test == "longer" else X[:, : max(steps // 2, 1)]
            part.pop("lengths", None)
        np.savez(folder / "test.npz", **part)
    return f"{n} x {steps} x {features}, {classes} classes ({kind}), {sorted(arrays)[1:]}, test {test}"


def make_entry(rng: random.Random, name: str) -> Any:
    """A constant, a list, or a range between two of the edge values."""
    values = SPACE[name]
    form = rng.random()
    if form < 0.5:
        return rng.choice(values)
    if form < 0.7 or name not in NUMBERS:
        return list(dict.fromkeys(rng.sample(values, rng.randrange(1, min(4, len(values) + 1)))))
    low, high = sorted(rng.sample(values, 2))
    table: Range = {"low": low, "high": high}
    if rng.random() < 0.4:
        table["log"] = True
    elif rng.random() < 0.3 and high > low:
        table["step"] = rng.choice((high - low, 1 if isinstance(low, int) else (high - low) / 4))
    return table


def make_study(rng: random.Random, folder: Path) -> dict[str, Any]:
    """The tables of one study file."""
    tables: dict[str, Any] = {
        "study": {"name": "fuzz", "trials": rng.choice(TRIALS)},
        "data": {"train": "train.npz"},
        "train": {"epochs": rng.choice(EPOCHS)},
        "space": {},
    }
    if (folder / "test.npz").exists():
        tables["data"]["test"] = "test.npz"
    for section, keys in (("study", STUDY), ("data", DATA), ("train", TRAIN)):
        for key, values in keys.items():
            if rng.random() < CHANCE and not (key == "holdout" and "test" in tables["data"]):
                tables[section][key] = rng.choice(values)
    chance = rng.choice((0.1, 0.3, 0.8))
    for name in SPACE:
        if rng.random() < chance:
            tables["space"][name] = make_entry(rng, name)
    if "hidden_size" not in tables["space"]:
        tables["space"]["hidden_size"] = 4
    if rng.random() < 0.3:
        own = {name: entry for name, entry in tables["space"].items() if not isinstance(entry, dict | list)}
        tables["enqueue"] = [own]
    return tables


def attempt(seed: int, url: str) -> list[str] | None:
    """What went wrong after the study of that seed was created; None where it was refused, as it may be."""
    from hpo.errors import HpoError
    from hpo.storage.artifacts import artifact_store
    from hpo.storage.trials import trial_storage
    from hpo.study.config import load
    from hpo.study.lifecycle import create_or_open, delete_study

    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as top, closing(trial_storage(url)) as storage:
        folder = Path(top)
        log.info("seed %d: %s", seed, make_data(rng, folder))
        tables = make_study(rng, folder)
        log.info("%s", json.dumps(tables))
        (folder / "study.toml").write_text(toml(tables))
        store = artifact_store(str(folder / "artifacts"))
        try:
            study = create_or_open(load(folder / "study.toml"), storage, store)
        except HpoError as error:
            log.info("refused: %s", error)
            return None
        try:
            return run(study, store)
        finally:
            delete_study(storage, store, study.name)


def run(study: Any, store: Any) -> list[str]:
    """Its trials and its promotion; the errors that they ended with."""
    from hpo.datasets import Datasets
    from hpo.promote.promotion import promote_when_over
    from hpo.storage.errors import StudyOver
    from hpo.study.record import failure_of
    from hpo.trial.context import TrialContext, WorkerResources
    from hpo.trial.device_lock import SharedExclusiveLock
    from hpo.trial.run import run_trial

    datasets = Datasets(store)
    resources = WorkerResources("fuzz", "cpu", store, datasets, SharedExclusiveLock(), threading.Event())
    try:
        sequences = datasets.get(study.plan.train)
        with suppress(StudyOver):
            while True:
                if study.sampler.exhausted():
                    study.leases.exhaust(study.study_id)
                with study.leases.take(study.study_id, "fuzz", "cpu") as lease:
                    assert lease is not None
                    run_trial(TrialContext(study, lease, resources, sequences))
        reasons = map(failure_of, study.storage.get_all_trials(study.study_id))
        wrong = [f"trial: {reason}" for reason in reasons if reason is not None]
        if not wrong:
            promote_when_over(study, resources, study.leases)
        return wrong
    except Exception as error:
        log.info("", exc_info=True)
        return [f"{type(error).__name__}: {error}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0, help="of the first input; the others follow")
    parser.add_argument("--only", type=int, help="try the input of this seed alone, and show it")
    given = parser.parse_args()

    import optuna

    from hpo.models.machine import one_thread, prepare_process
    from hpo.storage.database import database_url
    from hpo.storage.server.server import stop
    from hpo.storage.tables import migrate

    os.environ["HPO_HOME"] = tempfile.mkdtemp(prefix="hpo-fuzz-")
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("hpo").setLevel(logging.CRITICAL if given.only is None else logging.INFO)
    warnings.simplefilter("ignore")
    prepare_process()
    one_thread()
    outcomes: Counter[str] = Counter()
    failures: Counter[str] = Counter()
    end = time.monotonic() + 60 * given.minutes
    try:
        migrate(url := database_url())
        for seed in range(given.seed, sys.maxsize) if given.only is None else [given.only]:
            if time.monotonic() > end:
                break
            wrong = attempt(seed, url)
            outcomes["refused" if wrong is None else "failed" if wrong else "fine"] += 1
            for failure in wrong or ():
                failures[kind := re.sub(r"[-+]?\d[\d.e+-]*", "#", failure.splitlines()[0])[:160]] += 1
                if failures[kind] == 1:
                    print(f"seed {seed}: {failure.splitlines()[0][:400]}", flush=True)
    finally:
        stop()
    print(dict(outcomes))
    for kind, count in failures.most_common():
        print(f"{count:5} x {kind}")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
