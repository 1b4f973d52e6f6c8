"""Our storage beside stock Optuna's, in one run on one server; prints ratios.

    python benchmarks/storage.py [--quick] [--trials 2000] [--url postgresql+psycopg2://…]

One trial: 5 parameters, 20 reports with a prune check each, 3 attributes, an objective that costs nothing. Optuna's
default sampler (TPE) on both sides; its median pruner on stock, ours (the same decisions) on ours. Both work in turns,
a few trials each, so that a machine that slows down slows both down. The database is HPO_DATABASE_URL or the
embedded server; the studies made are deleted.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import optuna
from optuna.distributions import FloatDistribution, distribution_to_json
from optuna.storages import BaseStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState, create_trial

# Python looks for modules beside the script first, where `storage` would be this file.
sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != Path(__file__).resolve().parent]

from hpo.storage.database import database_url  # noqa: E402
from hpo.storage.errors import StudyOver  # noqa: E402
from hpo.storage.heartbeat import Progress  # noqa: E402
from hpo.storage.leases import Leases  # noqa: E402
from hpo.storage.terms import Terms  # noqa: E402
from hpo.storage.trials import TrialStorage, trial_storage  # noqa: E402
from hpo.study.pruning import MedianPruner  # noqa: E402

PROCESSES = multiprocessing.get_context("forkserver")
DISTRIBUTION = FloatDistribution(0, 1)
TURN = 5  # trials of one side before the other's turn

FILL = """
WITH t AS (INSERT INTO trials (study_id, number, state, datetime_start, datetime_complete)
    SELECT %(study)s, n, %(state)s::trialstate, now(), now() FROM generate_series(%(first)s, %(last)s) n
    RETURNING trial_id),
v AS (INSERT INTO trial_values (trial_id, objective, value, value_type)
    SELECT trial_id, 0, random(), 'FINITE' FROM t WHERE %(state)s = 'COMPLETE'),
p AS (INSERT INTO trial_params (trial_id, param_name, param_value, distribution_json)
    SELECT trial_id, 'x' || i, random(), %(text)s FROM t, generate_series(0, 4) i),
a AS (INSERT INTO trial_user_attributes (trial_id, key, value_json)
    SELECT trial_id, k, '1' FROM t, unnest(ARRAY['a', 'b', 'c']) k)
INSERT INTO trial_intermediate_values (trial_id, step, intermediate_value, intermediate_value_type)
SELECT trial_id, s, random() + 1.0 / (s + 1), 'FINITE' FROM t, generate_series(0, 19) s"""


def objective(trial: optuna.Trial) -> float:
    value = sum((trial.suggest_float(f"x{i}", 0, 1) - 0.3) ** 2 for i in range(5))
    for step in range(20):
        trial.report(value + 1 / (step + 1), step)
        trial.should_prune()
    for name in ("a", "b", "c"):
        trial.set_user_attr(name, 1)
    return value


@contextlib.contextmanager
def filled(url: str, finished: int, running: int = 0) -> Iterator[str]:
    """Name of a study with so many finished and RUNNING trials, deleted at the end."""
    storage = trial_storage(url)
    name = f"benchmark-{uuid.uuid4().hex[:8]}"
    study_id = storage.create_new_study([optuna.study.StudyDirection.MINIMIZE], name)
    text = distribution_to_json(DISTRIBUTION)
    for state, first, last in (("COMPLETE", 0, finished - 1), ("RUNNING", finished, finished + running - 1)):
        given = {"study": study_id, "state": state, "first": first, "last": last, "text": text}
        storage.connection.execute(FILL, given=given)
    storage.connection.execute("ANALYZE")
    yield name
    storage.delete_study(study_id)
    storage.close()


def stock_storage(url: str) -> BaseStorage:
    return optuna.storages.get_storage(url)


def load(storage: BaseStorage, name: str, sampler: optuna.samplers.BaseSampler | None = None) -> optuna.Study:
    """The study as a worker has it: with a pruner, everything cached, the first trial behind it."""
    pruner = MedianPruner() if isinstance(storage, TrialStorage) else optuna.pruners.MedianPruner()
    study = optuna.load_study(study_name=name, storage=storage, sampler=sampler, pruner=pruner)
    study.optimize(objective, n_trials=1)
    return study


def turns(studies: list[optuna.Study], trials: int) -> list[float]:
    """Milliseconds a trial of each study, in turns: the median over the turns."""
    spent: list[list[float]] = [[] for _ in studies]
    for _ in range(max(1, trials // TURN)):
        for study, times in zip(studies, spent, strict=True):
            began = time.perf_counter()
            study.optimize(objective, n_trials=TURN)
            times.append((time.perf_counter() - began) / TURN * 1e3)
    return [statistics.median(times) for times in spent]


def report(what: str, stock: float | None, ours: float, wanted: str, unit: str = "ms") -> None:
    ratio = "" if stock is None else f"{stock / ours:6.1f}x"
    left = "" if stock is None else f"{stock:9.1f}"
    print(f"{what:<52}{left:>10}{ours:10.1f} {unit:<3}{ratio:>8}   {wanted}", flush=True)


# ---------------------------------------------------------------------------------------------------------- the cases


def one_worker(url: str, finished: int, running: int, trials: int, wanted: str) -> None:
    with filled(url, finished, running) as one, filled(url, finished, running) as two:
        ours = trial_storage(url)
        studies = [load(stock_storage(url), one), load(ours, two)]
        before = ours.connection.trips
        stock_ms, ours_ms = turns(studies, trials)
        trips = (ours.connection.trips - before) / (max(1, trials // TURN) * TURN)
        others = f", {running} others RUNNING" if running else ""
        report(f"one worker at {finished} trials{others}", stock_ms, ours_ms, wanted)
        if not running:
            report("  round trips of a trial", None, trips, "at most 40", "")
        ours.close()


def work(url: str, name: str, ours: bool, trials: int, start: float) -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = load(trial_storage(url) if ours else stock_storage(url), name)
    time.sleep(max(0.0, start - time.time()))
    study.optimize(objective, n_trials=trials)


def workers(url: str, finished: int, count: int, trials: int, wanted: str) -> None:
    """Wall time of a trial with `count` processes at work, from a common start."""
    taken = []
    for ours in (False, True):
        with filled(url, finished) as name:
            start = time.time() + 8 + finished / 500
            arguments = (url, name, ours, trials, start)
            processes = [PROCESSES.Process(target=work, args=arguments) for _ in range(count)]
            for process in processes:
                process.start()
            for process in processes:
                process.join()
            taken.append((time.time() - start) / (trials * count) * 1e3)
    report(f"{count} workers at {finished} trials", taken[0], taken[1], wanted)


def cold_start(url: str, finished: int, wanted: str) -> None:
    with filled(url, finished) as name:
        spent: list[list[float]] = [[], []]
        for _ in range(5):
            for make, times in zip((stock_storage, trial_storage), spent, strict=True):
                began = time.perf_counter()
                storage = make(url)
                storage.get_all_trials(storage.get_study_id_from_name(name), deepcopy=False)
                times.append((time.perf_counter() - began) * 1e3)
    stock_ms, ours_ms = map(statistics.median, spent)
    report(f"cold start: open and load {finished} trials", stock_ms, ours_ms, wanted)


def growth(url: str, small: int, large: int, trials: int) -> None:
    """With a random sampler, which looks at no earlier trial."""
    with filled(url, small) as one, filled(url, large) as two:
        storages = [trial_storage(url), trial_storage(url)]
        random = optuna.samplers.RandomSampler
        studies = [load(storage, name, random()) for storage, name in zip(storages, (one, two), strict=True)]
        small_ms, large_ms = turns(studies, trials)
        for storage in storages:
            storage.close()
    print(f"random sampler, {small} trials: {small_ms:.1f} ms, {large} trials: {large_ms:.1f} ms, "
          f"{large_ms / small_ms:.2f}x (at most 1.3x)", flush=True)  # fmt: skip


def other_ends(finished: int, trials: int, folder: str) -> None:
    journal = optuna.storages.JournalStorage(JournalFileBackend(str(Path(folder) / "journal.log")))
    for what, storage in (("JournalFile", journal), ("in memory", optuna.storages.InMemoryStorage())):
        study = optuna.create_study(storage=storage, study_name="s", pruner=optuna.pruners.MedianPruner())
        with filled_trials(finished) as copies:
            study.add_trials(copies)
        (ms,) = turns([study], trials)
        report(f"for comparison: {what}, one worker at {finished} trials", None, ms, "")


@contextlib.contextmanager
def filled_trials(count: int) -> Iterator[list[optuna.trial.FrozenTrial]]:
    import random

    draw = random.Random(0).random
    names = [f"x{i}" for i in range(5)]
    yield [
        create_trial(
            params={name: draw() for name in names},
            distributions=dict.fromkeys(names, DISTRIBUTION),
            value=draw(),
            intermediate_values={step: draw() for step in range(20)},
            user_attrs={"a": 1, "b": 1, "c": 1},
        )
        for _ in range(count)
    ]


def sleep_worker(url: str, study_id: int, worker: str, epochs: int, epoch_s: float, start: float) -> None:
    """A worker whose training is asleep: everything that it does for a trial but the training."""
    storage = trial_storage(url)
    leases = Leases(storage)
    name = storage.get_study_name_from_id(study_id)
    pruner, study = MedianPruner(), optuna.load_study(study_name=name, storage=storage)
    leases.register(worker, study_id, "benchmark", os.getpid(), "cpu")
    time.sleep(max(0.0, start - time.time()))
    asleep, trials, began = 0.0, -1, 0.0
    while True:
        try:
            lease = leases.acquire(study_id, worker)
        except StudyOver:
            break
        if lease is None:  # the last trials of others: not this worker's time
            break
        trials += 1
        if trials == 1:  # the first trial, where everything is for the first time, was not counted
            asleep, began = 0.0, time.perf_counter()
        storage.set_trial_params(lease.trial_id, {f"x{i}": (0.5, DISTRIBUTION) for i in range(5)})
        for epoch in range(epochs):
            before = time.perf_counter()
            time.sleep(epoch_s)
            asleep += min(epoch_s, time.perf_counter() - before)
            storage.set_trial_intermediate_value(lease.trial_id, epoch, 0.5)
            pruner.prune(study, storage.get_trial(lease.trial_id))
            if epoch % 10 == 5:
                leases.renew(worker, {lease: Progress(epoch, epoch, 0.5)})
                leases.checkpoint(lease, f"{lease.trial_id}-{epoch}", epoch)
        storage.finish_trial(lease.trial_id, TrialState.COMPLETE, [0.5], {"a": 1, "b": 2, "c": 3})
    storage.set_study_user_attr(study_id, worker, [asleep, time.perf_counter() - began, trials])
    storage.close()


def sleepers(url: str, count: int, trials: int, epochs: int = 20, epoch_s: float = 0.2) -> None:
    """Share of their time that many workers spend in the objective."""
    with filled(url, 0) as name:
        storage = trial_storage(url)
        study_id = storage.get_study_id_from_name(name)
        Leases(storage).open_study(study_id, Terms(budget=count * trials), {})
        start = time.time() + 5 + count / 8
        processes = [
            PROCESSES.Process(target=sleep_worker, args=(url, study_id, f"w{i}", epochs, epoch_s, start))
            for i in range(count)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        measured = storage.get_study_user_attrs(study_id).values()
        shares = sorted(asleep / wall for asleep, wall, trials in measured if trials > 0)
        started = sum(trials for _, _, trials in measured)
        storage.close()
    print(f"{count} workers asleep in the objective: {100 * statistics.mean(shares):.1f} % of their time, least "
          f"{100 * shares[0]:.1f} %, {started} trials (at least 90 %)", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="default: HPO_DATABASE_URL, else the embedded server")
    parser.add_argument("--trials", type=int, default=2000, help="finished trials in the study")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions, smaller studies")
    parser.add_argument("--only", help="run the cases whose name contains this")
    chosen = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    PROCESSES.set_forkserver_preload(["hpo.storage.leases", "hpo.study.pruning"])
    url, n, few = chosen.url or database_url(), chosen.trials, chosen.quick
    repeat = 10 if few else 40
    with tempfile.TemporaryDirectory() as folder:
        cases: dict[str, Callable[[], None]] = {
            "one": lambda: one_worker(url, n, 0, repeat, "at least 4x"),
            "four": lambda: workers(url, n, 4, repeat, "at least 4x"),
            "64": lambda: one_worker(url, n, 64, repeat // 2, "at least 15x"),
            "256": lambda: one_worker(url, n, 256, repeat // 2, "at least 30x"),
            "cold": lambda: cold_start(url, n, "at least 8x"),
            "growth": lambda: growth(url, 500, 2000 if few else 20000, 5 * repeat),
            "ends": lambda: other_ends(n, repeat, folder),
            "sleepers": lambda: sleepers(url, 16 if few else 64, 3 if few else 6),
        }
        print(f"{'':<52}{'stock':>10}{'ours':>10}{'':>4}{'ratio':>8}")
        for name, case in cases.items():
            if chosen.only is None or chosen.only in name:
                case()


if __name__ == "__main__":
    main()
