"""Under `[study] parallel` real workers, forked and spawned, few and many, killed or not, make the same studies."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hpo
from hpo.launcher.forkserver import ForkedProcess, ForkServer
from hpo.promote.versions import model_folder
from hpo.storage.leases import Leases
from hpo.storage.registry import Registry
from hpo.storage.server import server as embedded
from hpo.storage.snapshot import Snapshot
from hpo.storage.trials import trial_storage
from hpo.study.config import SAMPLERS
from tests.conftest import STEPPED, Cli, command_environment, execute, fresh_database, wait_for

STUDY = """
[study]
name = "{sampler}"
trials = 12
sampler = "{sampler}"
pruner = "{pruner}"
parallel = 3
lease = 3
attempts = 1000
finalists = {finalists}
repeats = 2
[data]
train = "waves.npz"
validation = 0.3
[train]
epochs = 54
[space]
{space}"""
PRUNED = ("hyperband", "halving", "median", "none", "hyperband", "median")  # by sampler
TRIALS = "SELECT trial_id FROM trials JOIN studies USING (study_id) WHERE"
ENQUEUED = "[[enqueue]]\nhidden_size = 8"
EACH = 5  # trials end between two kills
LONG_S = 300.0  # a guard against hanging

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux"),
    pytest.mark.xdist_group("parallel"),  # its tests compare with one run
]
indices = count()  # of all workers
Process = ForkedProcess | subprocess.Popen[bytes]


@dataclass
class Place:
    """A database, an artifact store and a home of a run's own, and its workers."""

    folder: Path
    environment: dict[str, str]
    hosts: list[ForkServer | None] = field(default_factory=list)  # what forks each worker; None: it is spawned
    running: list[Process] = field(default_factory=list)

    def start(self, host: ForkServer | None) -> Process:
        """A standing worker."""
        index = next(indices)
        log = self.folder / f"worker-{index}.log"
        if host is not None:
            forked = host.fork(index, log, self.environment, {"study": None, "slots": 1})
            wait_for(lambda: forked.poll() is not None or forked.pid is not None)
            return forked
        with log.open("ab") as stream:
            command = [sys.executable, "-P", "-m", "hpo", "worker"]
            return subprocess.Popen(command, env=self.environment, stdout=stream, stderr=stream)

    def run(self, hosts: list[ForkServer | None], disturb: Callable[[], None] | None = None) -> int:
        """Make the studies and let so many workers end and promote them; how often they were disturbed on the way."""
        for sampler, pruner in zip(SAMPLERS, PRUNED, strict=True):
            file = self.folder / f"{sampler}.toml"
            file.write_text(
                STUDY.format(space=STEPPED, sampler=sampler, pruner=pruner, finalists=2 if sampler == "random" else 0)
            )
            hpo.launch(file, detach=True)
        self.hosts, self.running = hosts, [self.start(host) for host in hosts]
        disturbed, began = 0, time.monotonic()
        with closing(trial_storage(self.environment["HPO_DATABASE_URL"])) as storage:
            leases = Leases(storage)
            try:
                while not _over(states := leases.snapshots(leases.study_ids())):
                    assert time.monotonic() - began < LONG_S, "they are not over"
                    time.sleep(0.02)
                    ended = sum(state.counts[name] for state in states for name in ("complete", "pruned"))
                    if disturb is not None and ended >= EACH * (disturbed + 1):
                        disturb()
                        disturbed += 1
            finally:
                for index in range(len(hosts)):
                    self.kill(index)
        return disturbed

    def kill(self, index: int) -> None:
        self.running[index].kill()
        self.running[index].wait(30)

    def outcomes(self) -> dict[str, Any]:
        return {sampler: outcome(self, sampler) for sampler in SAMPLERS}


@contextmanager
def place(folder: Path, url: str) -> Iterator[Place]:
    """A place with the data while the block runs."""
    noise = np.random.default_rng(0)
    labels = np.arange(60) % 2
    X = np.sin(np.arange(12)[None, :, None] * (1 + labels[:, None, None])) + noise.normal(0, 1.5, (60, 12, 1))
    np.savez(folder / "waves.npz", X=X, y=labels)
    own = command_environment(folder, url)
    with pytest.MonkeyPatch.context() as patch:
        for key, value in own.items():
            if key.startswith("HPO_"):
                patch.setenv(key, value)
        yield Place(folder, own)


@pytest.fixture(scope="module")
def host() -> Iterator[ForkServer]:
    with ForkServer() as warm:
        yield warm


@pytest.fixture(scope="module")
def alone(server: str, template: str, host: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one worker, which nobody disturbs, makes of the studies."""
    with fresh_database(server, template) as url, place(tmp_path_factory.mktemp("alone"), url) as at:
        assert at.run([host]) == 0
        return at.outcomes()


def _over(states: Sequence[Snapshot]) -> bool:
    return all(state.status == "finished" for state in states)


def outcome(place: Place, sampler: str) -> dict[str, Any]:
    """What a study has come to, to the last bit."""
    with closing(trial_storage(place.environment["HPO_DATABASE_URL"])) as storage:
        (model,) = [each for each in Registry(storage.connection).models() if each.name == sampler]
        sums = (model_folder(sampler, model.version) / "SHA256SUMS").read_text().splitlines()
        studies = [each for each in storage.get_all_studies() if each.study_name.split("/")[0] == sampler]
        trials = {
            study.study_name: [
                (
                    trial.number,
                    trial.state.name,
                    trial.params,
                    trial.user_attrs["epochs"],
                    trial.intermediate_values,
                    trial.values,
                    trial.user_attrs["log_loss"],
                )
                for trial in storage.get_all_trials(study._study_id)
            ]
            for study in studies
        }
    return {"trials": trials, "winner": model.trial_number, "weights": [s for s in sums if "safetensors" in s]}


def _assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for sampler in SAMPLERS:
        assert found[sampler] == expected[sampler], sampler
        assert expected[sampler]["weights"]
    assert len(expected["random"]["trials"]) == 2  # the study and its finals
    states = {trial[1] for each in expected.values() for trials in each["trials"].values() for trial in trials}
    assert states == {"COMPLETE", "PRUNED"}


def test_eight_workers_make_the_same_studies(
    alone: dict[str, Any], host: ForkServer, server: str, template: str, tmp_path: Path
) -> None:
    with fresh_database(server, template) as url, place(tmp_path, url) as at:
        at.run([host] * 8)
        _assert_equal(at.outcomes(), alone)


def test_four_workers_that_are_killed_make_the_same_studies(
    alone: dict[str, Any], host: ForkServer, server: str, template: str, tmp_path: Path
) -> None:
    chance = random.Random(1)
    with fresh_database(server, template) as url, place(tmp_path, url) as at:

        def killed() -> None:
            index = chance.randrange(len(at.running))
            at.kill(index)
            at.running[index] = at.start(at.hosts[index])

        assert at.run([host, host, host, None], killed) >= 5
        _assert_equal(at.outcomes(), alone)


def test_two_workers_whose_server_is_restarted_make_the_same_studies(
    alone: dict[str, Any], short_folder: Path, tmp_path: Path
) -> None:
    home = str(short_folder / "parallel")

    def on_the_server(call: Callable[[], Any]) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("HPO_HOME", home)
            patch.delenv("HPO_DATABASE_URL", raising=False)
            return call()

    def restarted() -> None:
        on_the_server(embedded.stop)
        assert on_the_server(embedded.start) == url

    url = on_the_server(embedded.start)
    try:
        with place(tmp_path, url) as at:
            assert at.run([None, None], restarted) >= 5
            _assert_equal(at.outcomes(), alone)
    finally:
        on_the_server(embedded.stop)


def test_a_study_is_run_again_to_the_first_trial_that_differs(
    cli: Cli, study_file: Callable[..., Path], database_url: str
) -> None:
    options = 'parallel = 2\nfinalists = 1\nrepeats = 2\nsampler = "tpe"'
    launched = cli(
        "launch", study_file(trials=6, epochs=6, study=options, more=ENQUEUED), "--workers", 2, timeout_s=600
    )
    assert launched.returncode == 0, launched.stderr
    again = cli("reproduce", "waves", "--study", timeout_s=600)
    assert again.returncode == 0, again.stdout + again.stderr
    equal = "run again, all bit-equal: parameters, states, values of every epoch"
    assert again.stdout == f"waves: 6 trials and 2 of its finals {equal}\n"
    seed = "UPDATE trial_user_attributes SET value_json = '0' WHERE key = 'seed' AND trial_id IN"
    execute(database_url, f"{seed} ({TRIALS} study_name = 'waves/finals')")
    again = cli("reproduce", "waves", "--study", timeout_s=600)
    assert again.returncode == 1
    assert "waves differs, after 6 equal trials, from trial 0 of its finals: " in again.stdout
    value = "UPDATE trial_intermediate_values SET intermediate_value = 0.25 WHERE step = 1 AND trial_id ="
    execute(database_url, f"{value} ({TRIALS} study_name = 'waves' AND number = 3)")
    again = cli("reproduce", "waves", "--study", timeout_s=600)
    assert again.returncode == 1
    assert "waves differs, after 3 equal trials, from trial 3: value of epoch 1: recorded 0.25, now " in again.stdout
    for wrong in ([], ["--study", "--trial", 1]):
        refused = cli("reproduce", "waves", *wrong)
        assert refused.returncode == 2
        assert "either --trial N or --study" in " ".join(refused.stderr.split())
