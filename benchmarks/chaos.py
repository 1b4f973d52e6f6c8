"""Kill everything and count: no trial lost, none doubled, no bit changed.

    python benchmarks/chaos.py [--trials 100] [--workers 4] [--every 2]
    python benchmarks/chaos.py --trials 1000 --pruner none --server 5 40     # about eight minutes
    python benchmarks/chaos.py --pooler 4     # all through pgbouncer with four connections to the server
    python benchmarks/chaos.py --finals 3 --trials 6 --epochs 60 --sequences 200 --workers 2    # about seven minutes

A study of real trials on an embedded server of its own. Every few seconds a random worker is killed with SIGKILL and
started again; once the server is stopped with `immediate`, once its postmaster is killed with kill -9, each time it
is started again. With --server it is the server alone that dies, at random times so many seconds apart, by turns in
these two ways, and then no trial may have lost an attempt. At the end every trial must have ended exactly once, and
every curve must be, bit for bit, that of the same configuration trained undisturbed; of a large study so many, drawn
by lot, are trained again. tests/processes/test_chaos.py runs both in a small form.

With --finals a study is launched twice, undisturbed and under fire: while trainings of its finals are left, a random
worker is killed every few seconds, however far it has come. The launch's fork server starts it again after the
launch's own pauses; a launch that gives its workers up is repeated. Winner, fresh values, curves and weights must be
the same, no training may be missing or doubled, and no checkpoint may be left.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import psycopg2

sys.path[:] = [
    path for path in sys.path if Path(path or ".").resolve() != Path(__file__).resolve().parent
]  # storage.py

POOLER = """[databases]
* = host={host} port={port} user={username} password={password}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {listen}
unix_socket_dir =
auth_type = any
pool_mode = {mode}
default_pool_size = {size}
max_client_conn = 1000
server_login_retry = 1
"""
REPEATS = 3  # of each finalist
LAUNCHES = 20  # of one study, at most

STUDY = """
[study]
name = "chaos"
trials = {trials}
sampler = "random"
pruner = "{pruner}"
lease = 3
attempts = {attempts}
finalists = 0
[data]
train = "waves.npz"
validation = {{ folds = 3 }}
[train]
epochs = {epochs}
[space]
hidden_size = {{ low = 8, high = 32 }}
"""


@dataclass
class Chaos:
    """What was done, and what came of it."""

    trials: int  # asked for
    kills: int = 0  # of workers
    stops: int = 0  # of the server, with `immediate`
    crashes: int = 0  # of the postmaster, with kill -9
    states: dict[str, int] | None = None
    numbers: list[int] | None = None
    adopted: int = 0  # trials that ended under a second lease or a later one
    lost: int = 0  # leases lost, over all trials
    most_lost: int | None = None  # that may be
    judged: int = 0  # trials that were trained again
    started: int = 0  # counted against the budget
    differing: list[str] | None = None  # trials whose curve is not that of an undisturbed training
    leftovers: list[str] | None = None  # checkpoints that nobody deleted
    seconds: float = 0.0

    def faults(self) -> list[str]:
        """What must not be."""
        found = []
        if self.numbers != list(range(self.trials)) or self.started != self.trials:
            found.append(f"{self.trials} trials asked for, {self.started} started, numbered {self.numbers}")
        if not self.states or set(self.states) - {"COMPLETE", "PRUNED"}:
            found.append(f"every trial must end complete or pruned, got {self.states}")
        if self.most_lost is not None and self.lost > self.most_lost:
            found.append(f"{self.lost} attempts of trials were lost")
        found += [f"not the bits of an undisturbed training: {text}" for text in self.differing or ()]
        found += [f"left in the artifact store: {key}" for key in self.leftovers or ()]
        return found


def write_study(folder: Path, trials: int, epochs: int, pruner: str, attempts: int, sequences: int = 120) -> Path:
    """Noisy waves of two frequencies in folder/waves.npz, and a study file over them."""
    noise = np.random.default_rng(0)
    labels = np.arange(sequences) % 2
    steps = np.arange(30)[None, :, None]
    X = np.sin(steps * (0.5 + 0.3 * labels[:, None, None])) + noise.normal(0, 1.0, (sequences, 30, 2))
    np.savez(folder / "waves.npz", X=X, y=labels, lengths=noise.integers(15, 31, sequences))
    path = folder / "chaos.toml"
    path.write_text(STUDY.format(trials=trials, epochs=epochs, pruner=pruner, attempts=attempts))
    return path


@contextmanager
def workers(count: int, folder: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Worker processes of the study, each started again by `revive`; ended at the end of the block."""
    running = [start_worker(folder) for _ in range(count)]
    try:
        yield running
    finally:
        for worker in running:
            worker.kill()
            worker.wait()


def start_worker(folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-P", "-m", "hpo", "worker", "--study", "chaos"]
    with (folder / "workers.log").open("ab") as log:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)


def revive(running: list[subprocess.Popen[bytes]], folder: Path) -> None:
    """Start those again that were killed or ended with an error."""
    for index, worker in enumerate(running):
        if worker.poll() not in (None, 0):
            running[index] = start_worker(folder)


@contextmanager
def pooler(
    url: str, folder: Path, mode: str = "transaction", size: int = 4, program: str = "pgbouncer"
) -> Iterator[str]:
    """The address of a pooler before the server of a URL, with so many connections to it for each database.

    folder: for its settings, which every user may enter.
    """
    from sqlalchemy import make_url

    parts = make_url(url)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    file = folder / f"pgbouncer-{port}.ini"
    given = {name: getattr(parts, name) for name in ("host", "port", "username", "password")}
    file.write_text(POOLER.format(**given, listen=port, mode=mode, size=size))
    file.chmod(0o644)
    as_other = ["-u", "nobody"] if os.getuid() == 0 else []  # it does not run as root
    running = subprocess.Popen([program, "--quiet", *as_other, str(file)])
    try:
        address = parts.set(port=port, password="any", drivername="postgresql").render_as_string(hide_password=False)
        while not _answers(address):
            if running.poll() is not None:
                raise SystemExit(f"{program} ended with {running.returncode}")
            time.sleep(0.05)
        yield address
    finally:
        running.kill()
        running.wait()


def _answers(url: str) -> bool:
    with suppress(psycopg2.OperationalError):
        psycopg2.connect(url).close()
        return True
    return False


def crash_postmaster() -> None:
    """kill -9 to the embedded server's first process."""
    from hpo.storage.server import server as embedded

    data = embedded.status().data
    assert data is not None
    os.kill(int((data / "postmaster.pid").read_text().split()[0]), signal.SIGKILL)


def stop_immediately() -> None:
    """What `pg_ctl stop -m immediate` does: SIGQUIT to the postmaster."""
    from hpo.storage.server import server as embedded

    data = embedded.status().data
    assert data is not None
    os.kill(int((data / "postmaster.pid").read_text().split()[0]), signal.SIGQUIT)


def run(
    folder: Path,
    *,
    trials: int,
    count: int,
    every_s: float,
    epochs: int = 12,
    pruner: str = "median",
    seed: int = 0,
    server_s: tuple[float, float] | None = None,
    judged: int = 300,
    tell: Callable[[str], None] = lambda _: None,
) -> Chaos:
    """One study under chaos. HPO_HOME and HPO_ARTIFACTS must name folders of this run's own; HPO_DATABASE_URL, if it is
    set, what leads to the embedded server.

    every_s: between two kills of a worker, longer where none came further since. server_s: only the server dies, so
    many seconds apart. judged: trials that are trained again, at most.
    """
    from hpo.storage.artifacts import artifact_store
    from hpo.storage.database import database_url
    from hpo.storage.server import server as embedded
    from hpo.storage.trials import trial_storage
    from hpo.study.config import load
    from hpo.study.lifecycle import create_or_open

    chance, report, started = random.Random(seed), Chaos(trials), time.monotonic()
    config = load(write_study(folder, trials, epochs, pruner, attempts=1 if server_s else 100))
    storage = trial_storage(database_url())
    study = create_or_open(config, storage, artifact_store())
    attacks: list[Callable[[], None]] = [stop_immediately, crash_postmaster]
    if server_s is not None:
        report.most_lost = 0
    with workers(count, folder) as running:
        last, before = time.monotonic(), None
        pause_s = every_s if server_s is None else chance.uniform(*server_s)
        while (state := study.leases.snapshot(study.study_id)).status != "finished":
            time.sleep(0.2)
            revive(running, folder)
            ended = sum(state.counts[name] for name in ("complete", "pruned", "failed"))
            if time.monotonic() - last < pause_s or ended == trials:
                continue
            if (reached := _reached(state)) == before:  # faster kills than workers can start would go on for ever
                continue
            last, before = time.monotonic(), reached
            if server_s is not None:
                pause_s = chance.uniform(*server_s)
                _attack(report, attacks[(report.stops + report.crashes) % 2], embedded.start)
            else:
                _kill(report, chance.choice(running))
                if report.stops + report.crashes < 2 and ended >= trials * (1 + report.stops) / 4:
                    _attack(report, attacks[report.stops], embedded.start)
            tell(
                f"{ended}/{trials} trials ended, {report.kills} workers killed, server stopped {report.stops} and "
                f"crashed {report.crashes} times"
            )
    report.lost = storage.connection.execute("SELECT sum(lost)::int FROM hpo.leases")[0][0]
    _judge(report, study, chance, judged)
    storage.close()
    report.seconds = time.monotonic() - started
    return report


@dataclass
class Finals:
    """What was done to a study's finals, and what came of them."""

    trainings: int  # asked for
    kills: int = 0  # of workers
    idle: int = 0  # times that a worker was to be killed and none was there
    launches: int = 1  # of `hpo launch`, one more for each that gave its workers up
    lost: int = 0  # leases, over all trainings
    adopted: int = 0  # trainings that ended under a second lease or a later one
    states: dict[str, int] | None = None
    numbers: list[int] | None = None
    winner: int | None = None
    values: list[float | None] | None = None  # fresh ones, by number
    curves: list[dict[str, list[float]]] | None = None
    weights: str | None = None  # the line of the model's file in SHA256SUMS
    versions: int = 0  # of the model
    leftovers: list[str] | None = None  # checkpoints that nobody deleted
    seconds: float = 0.0
    finals_s: float = 0.0  # of them from the first training of the finals to the end of the last

    def faults(self) -> list[str]:
        """What must not be."""
        found = []
        if self.numbers != list(range(self.trainings)) or self.states != {"COMPLETE": self.trainings}:
            found.append(f"{self.trainings} trainings asked for, got {self.states}, numbered {self.numbers}")
        if self.versions != 1:
            found.append(f"{self.versions} versions of the model")
        return found + [f"left in the artifact store: {key}" for key in self.leftovers or ()]

    def differences(self, other: Finals) -> list[str]:
        """In what it is not what other finals of the same study are."""
        names = ("winner", "values", "curves", "weights")
        return [
            f"{name}: {getattr(self, name)} and {getattr(other, name)}"
            for name in names
            if getattr(self, name) != getattr(other, name)
        ]


def run_finals(
    folder: Path,
    *,
    finalists: int,
    trials: int,
    count: int,
    epochs: int,
    every_s: float | None,
    sequences: int = 120,
    kills: int | None = None,
    seed: int = 0,
    tell: Callable[[str], None] = lambda _: None,
) -> Finals:
    """One launch of a study without pruning, whose workers are killed during its finals. HPO_HOME and HPO_ARTIFACTS
    must name folders of this run's own.

    every_s: between two kills; None: nobody is killed. kills: at most so many, of workers that have a training; None:
    any number, of all. A launch that gives its workers up is repeated, as its user would.
    """
    from hpo.storage.database import database_url
    from hpo.storage.trials import trial_storage
    from hpo.study.lifecycle import finals_name

    chance, report, started = random.Random(seed), Finals(REPEATS * finalists), time.monotonic()
    write_study(folder, trials, epochs, "none", attempts=100, sequences=sequences)
    with closing(trial_storage(database_url())) as storage:
        launch = start_launch(folder, count, finalists)
        try:
            while (status := _after(launch, every_s)) != 0:
                if status is not None:
                    if every_s is None or report.launches == LAUNCHES:
                        raise SystemExit(f"a launch ended with {status}: {(folder / 'launch.log').read_text()}")
                    launch, report.launches = start_launch(folder, count, finalists), report.launches + 1
                elif (kills is None or report.kills < kills) and (state := _unfinished(storage)) is not None:
                    _kill_forked(report, launch, chance, state if kills is not None else None)
                    tell(f"{_ended(state)}/{report.trainings} trainings ended, {report.kills} workers killed")
        finally:
            launch.terminate()
            launch.wait()
        report.seconds = time.monotonic() - started
        _look(report, storage, finals_name("chaos"))
    return report


def start_launch(folder: Path, count: int, finalists: int) -> subprocess.Popen[bytes]:
    """`hpo launch` of the study in `folder`."""
    command = [sys.executable, "-P", "-m", "hpo", "launch", str(folder / "chaos.toml"), "--workers", str(count)]
    for override in (f"study.finalists={finalists}", f"study.repeats={REPEATS}", "train.patience=0"):
        command += ["--set", override]
    with (folder / "launch.log").open("ab") as log:
        return subprocess.Popen(command, cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log)


def forked_workers(launcher: int) -> list[psutil.Process]:
    """The workers of a launch that run at this moment: what its fork server has forked."""
    found = []
    with suppress(psutil.NoSuchProcess):
        for server in psutil.Process(launcher).children():
            if "hpo.launcher.forkserver_process" in server.cmdline():
                found += [worker for worker in server.children() if worker.status() != psutil.STATUS_ZOMBIE]
    return found


def _kill_forked(report: Finals, launch: subprocess.Popen[bytes], chance: random.Random, state: Any | None) -> None:
    """One of a launch's workers, where one runs; state: of the finals, where it is to be one that has a training."""
    from hpo.storage.liveness import worker_name

    found = forked_workers(launch.pid)
    if state is not None:
        holding = {each.worker for each in state.in_flight}
        found = [each for each in found if worker_name(each.pid) in holding]
    if not found:
        report.idle += 1
        return
    with suppress(psutil.NoSuchProcess):  # it has just ended
        chance.choice(found).kill()
        report.kills += 1


def _after(launch: subprocess.Popen[bytes], every_s: float | None) -> int | None:
    """The status of a launch that ends within that time; None where it goes on."""
    with suppress(subprocess.TimeoutExpired):
        return launch.wait(every_s)
    return None


def _unfinished(storage: Any) -> Any | None:
    """The state of the finals; None before they begin and once all trainings have ended."""
    from hpo.storage.leases import Leases
    from hpo.study.lifecycle import finals_name

    try:
        study_id = storage.get_study_id_from_name(finals_name("chaos"))
        state = Leases(storage).snapshot(study_id)
    except KeyError:
        return None
    return state if _ended(state) < state.budget else None


def _ended(state: Any) -> int:
    return sum(state.counts[name] for name in ("complete", "pruned", "failed"))


def _look(report: Finals, storage: Any, name: str) -> None:
    """What the finals have come to."""
    from hpo.promote.versions import model_folder
    from hpo.storage.artifacts import artifact_store
    from hpo.storage.registry import Registry

    found = storage.get_all_trials(storage.get_study_id_from_name(name))
    report.numbers = sorted(trial.number for trial in found)
    report.states = dict(Counter(trial.state.name for trial in found))
    report.lost = sum(trial.user_attrs["attempt"] - 1 for trial in found)
    report.adopted = sum(trial.user_attrs["attempt"] > 1 for trial in found)
    report.values = [trial.value for trial in found]
    report.curves = [trial.user_attrs["curve"] for trial in found]
    began = min(trial.datetime_start for trial in found)
    report.finals_s = (max(trial.datetime_complete for trial in found) - began).total_seconds()
    models = Registry(storage.connection).models()
    report.versions, report.winner = len(models), models[0].trial_number
    sums = (model_folder("chaos", models[0].version) / "SHA256SUMS").read_text().splitlines()
    report.weights = next(line for line in sums if "safetensors" in line)
    report.leftovers = list(artifact_store().keys("checkpoint-"))


def _reached(state: Any) -> tuple[Any, ...]:
    """How far a study is: what has ended, and the epochs of what is in flight."""
    ended = sum(state.counts[name] for name in ("complete", "pruned", "failed"))
    return ended, sorted((trial.number, trial.epoch or 0) for trial in state.in_flight)


def _kill(report: Chaos, victim: subprocess.Popen[bytes]) -> None:
    if victim.poll() is None:
        os.kill(victim.pid, signal.SIGKILL)
        report.kills += 1


def _attack(report: Chaos, attack: Callable[[], None], restart: Callable[[], object]) -> None:
    attack()
    report.stops, report.crashes = (
        report.stops + (attack is stop_immediately),
        report.crashes + (attack is crash_postmaster),
    )
    time.sleep(0.5)
    restart()


def _judge(report: Chaos, study: Any, chance: random.Random, most: int) -> None:
    """Train configurations again, undisturbed, in this process."""
    from hpo.models.machine import prepare_process
    from hpo.promote.reproduce import reproduce
    from hpo.storage.artifacts import artifact_store

    prepare_process()
    found = study.optuna_study.get_trials(deepcopy=False)
    report.numbers = sorted(trial.number for trial in found)
    report.states = dict(Counter(trial.state.name for trial in found))
    report.adopted = sum(trial.user_attrs.get("attempt", 1) > 1 for trial in found)
    report.started = study.leases.study(study.study_id).started
    numbers = [trial.number for trial in found if "curve" in trial.user_attrs]
    chosen = chance.sample(numbers, min(most, len(numbers)))
    report.judged = len(chosen)
    again = (reproduce(study.storage, study.name, number) for number in chosen)
    report.differing = [f"trial {item.number}, {item.first_difference}" for item in again if not item.equal]
    report.leftovers = artifact_store().keys("checkpoint-")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--trials", type=int, default=100)
    options.add_argument("--workers", type=int, default=4)
    options.add_argument("--every", type=float, default=2.0, help="seconds between two kills")
    options.add_argument("--epochs", type=int, default=12)
    options.add_argument("--pruner", default="median")
    options.add_argument("--finals", type=int, metavar="FINALISTS", help="workers die during finals, and then alone")
    options.add_argument("--sequences", type=int, default=120, help="with --finals: of the data")
    options.add_argument("--seed", type=int, default=0, help="with --finals: who is killed")
    options.add_argument(
        "--server", type=float, nargs=2, metavar=("LEAST", "MOST"), help="only the server dies, so many seconds apart"
    )
    options.add_argument("--pooler", type=int, metavar="SIZE", help="through pgbouncer, with so many connections")
    given = options.parse_args()
    faults = _finals(given) if given.finals else _trials(given)
    print("\n".join(faults) or "nothing was lost, doubled or changed")
    sys.exit(bool(faults))


def _trials(given: argparse.Namespace) -> list[str]:
    """The faults of a study under chaos."""
    server_s = None if given.server is None else (given.server[0], given.server[1])
    with _home() as folder, leading(folder, given.pooler):
        report = run(
            folder,
            trials=given.trials,
            count=given.workers,
            every_s=given.every,
            epochs=given.epochs,
            pruner=given.pruner,
            server_s=server_s,
            tell=print,
        )
    print(
        f"{report.trials} trials on {given.workers} workers in {report.seconds:.0f} s: {report.kills} workers killed, "
        f"server stopped {report.stops} and crashed {report.crashes} time(s); {report.states}, "
        f"{report.adopted} adopted, {report.lost} attempts lost, {report.judged} trained again"
    )
    return report.faults()


def _finals(given: argparse.Namespace) -> list[str]:
    """The faults of finals under fire, and in what they differ from undisturbed ones."""
    study = {name: getattr(given, name) for name in ("trials", "epochs", "sequences")} | {"count": given.workers}
    reports = []
    for every_s in (None, given.every):
        with _home() as folder:
            report = run_finals(folder, **study, finalists=given.finals, every_s=every_s, seed=given.seed, tell=print)
        reports.append(report)
        print(
            f"{report.trainings} trainings of finals on {given.workers} workers in {report.finals_s:.0f} of "
            f"{report.seconds:.0f} s: {report.kills} workers killed, {report.idle} times none was there, "
            f"{report.lost} leases lost, {report.adopted} trainings adopted, {report.launches} launch(es); "
            f"winner trial {report.winner}, fresh values {report.values}, {report.weights}"
        )
    calm, fire = reports
    if fire.kills == 0:
        return ["the finals were over before anybody was killed"]
    return calm.faults() + fire.faults() + [f"undisturbed and under fire: {text}" for text in calm.differences(fire)]


@contextmanager
def leading(folder: Path, size: int | None) -> Iterator[None]:
    """With a size: lead all that connects through a pooler while the block runs."""
    from hpo.storage.server import server as embedded

    if size is None:
        yield
        return
    with pooler(embedded.start(), folder, size=size) as address:
        os.environ["HPO_DATABASE_URL"] = address
        yield


@contextmanager
def _home() -> Iterator[Path]:
    """A folder where the chaos has a home of its own."""
    with tempfile.TemporaryDirectory(prefix="chaos-") as scratch:
        folder = Path(scratch)
        folder.chmod(0o711)  # root's server runs as another user
        os.environ |= {"HPO_HOME": str(folder / "home"), "HPO_ARTIFACTS": str(folder / "artifacts")}
        os.environ |= {"OMP_NUM_THREADS": "1"}
        os.environ.pop("HPO_DATABASE_URL", None)
        from hpo.storage.server import server as embedded

        try:
            yield folder
        finally:
            embedded.stop()


if __name__ == "__main__":
    main()
