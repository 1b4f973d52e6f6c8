"""One file and one seed give one study, whatever it is called and wherever, when and beside what it runs.

Optuna's Hyperband chooses a trial's bracket by a hash of the study's name (HyperbandPruner's documentation: "Please
specify study_name to make the pruning algorithm reproducible"), so studies of other names pruned differently.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState

from hpo.datasets import Datasets
from hpo.models.machine import one_thread
from hpo.storage.artifacts import artifact_store
from hpo.storage.errors import StudyOver
from hpo.storage.trials import trial_storage
from hpo.study.config import PRUNERS, SAMPLERS, load
from hpo.study.lifecycle import create_or_open
from hpo.study.pruning import HyperbandPruner
from hpo.trial.context import TrialContext, WorkerResources
from hpo.trial.device_lock import SharedExclusiveLock
from hpo.trial.run import run_trial
from tests.conftest import STEPPED, fresh_database

ROOT = Path(__file__).resolve().parents[2]
STUDY = """
[study]
name = "{name}"
trials = 14
sampler = "{sampler}"
pruner = "{pruner}"
seed = 7
[data]
train = "waves.npz"
validation = 0.3
[train]
epochs = 9
[space]
{space}"""
PAIRS = [*((sampler, "hyperband") for sampler in SAMPLERS), *(("random", pruner) for pruner in PRUNERS[1:])]

History = list[tuple[Any, ...]]  # a trial each: parameters, state, values by epoch, value


def run_study(file: Path, url: str) -> History:
    """Run all trials of the study in this process, as a worker would, but for the promotion."""
    with closing(trial_storage(url)) as storage:
        store = artifact_store(str(file.parent / "artifacts"))
        study = create_or_open(load(file), storage, store)
        datasets, stop = Datasets(store), threading.Event()
        resources = WorkerResources("tester", "cpu", store, datasets, SharedExclusiveLock(), stop)
        sequences = datasets.get(study.plan.train)
        try:
            while True:
                with study.leases.take(study.study_id, "tester", "cpu") as lease:
                    assert lease is not None
                    run_trial(TrialContext(study, lease, resources, sequences))
        except StudyOver:
            found = storage.get_all_trials(study.study_id)
    return [(trial.params, trial.state.name, trial.intermediate_values, trial.value) for trial in found]


def run_all(folder: Path, url: str, name: str) -> list[History]:
    """A study for each sampler and each pruner over the data in the folder, one after another."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    one_thread()
    found = []
    for sampler, pruner in PAIRS:
        file = folder / f"{name}-{sampler}-{pruner}.toml"
        file.write_text(STUDY.format(space=STEPPED, name=file.stem, sampler=sampler, pruner=pruner))
        found.append(run_study(file, url))
    return found


@pytest.fixture(scope="module")
def histories(
    server: str, template: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], list[History]]:
    """Two runs of each study: here, and in a process and a database where nearly everything else is another."""
    here, there = tmp_path_factory.mktemp("here"), tmp_path_factory.mktemp("elsewhere")
    random = np.random.default_rng(0)
    labels = np.arange(60) % 2
    X = np.sin(np.arange(8)[None, :, None] * (1 + labels[:, None, None])) + random.normal(0, 1.5, (60, 8, 1))
    for folder in (here, there):
        np.savez(folder / "waves.npz", X=X, y=labels)
    with pytest.MonkeyPatch.context() as patch, fresh_database(server, template) as url:
        patch.setenv("HPO_HOME", str(here / "home"))
        first = run_all(here, url, "one")
    other = {"PYTHONHASHSEED": "4711", "TZ": "Pacific/Kiritimati", "LC_ALL": "C", "HPO_HOME": str(there / "home")}
    with fresh_database(server, template) as url:
        with closing(trial_storage(url)) as storage:
            for number in range(3):
                before = optuna.create_study(storage=storage, study_name=f"before-{number}")
                before.add_trial(optuna.create_trial(value=0.0, state=TrialState.COMPLETE))
        command = [sys.executable, "-m", "tests.postgres.test_repeats_itself", str(there), url, "quite-another-name"]
        environment = os.environ | other | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=there, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    runs = zip(_plain(first), json.loads(done.stdout), strict=True)
    return {pair: list(each) for pair, each in zip(PAIRS, runs, strict=True)}


def _plain(histories: list[History]) -> Any:
    """As JSON gives them, bit for bit."""
    return json.loads(json.dumps(histories))


@pytest.mark.parametrize(("sampler", "pruner"), PAIRS)
def test_name_database_folder_time_zone_and_hash_seed_are_no_inputs_of_a_study(
    histories: dict[tuple[str, str], list[History]], sampler: str, pruner: str
) -> None:
    one, other = histories[sampler, pruner]
    assert len(one) == 14
    assert one == other
    states = {state for _, state, _, _ in one}
    assert states == {"COMPLETE"} if pruner == "none" else "PRUNED" in states


def test_brackets_follow_from_seed_and_number_and_are_as_frequent_as_optunas() -> None:
    studies = [optuna.create_study(study_name=name) for name in ("one", "two")]
    shares = {}
    for seed in (0, 1):
        pruner = HyperbandPruner(seed, 1, 27)
        pruner._try_initialization(studies[0])
        trials = [
            optuna.trial.FrozenTrial(n, TrialState.RUNNING, None, None, None, {}, {}, {}, {}, {}, n)
            for n in range(3000)
        ]
        brackets = [[pruner._get_bracket_id(study, trial) for trial in trials] for study in studies]
        assert brackets[0] == brackets[1]
        shares[seed] = brackets[0]
    assert shares[0] != shares[1]
    budgets = np.array(pruner._trial_allocation_budgets)
    assert np.bincount(shares[0]) / 3000 == pytest.approx(budgets / budgets.sum(), abs=0.03)


if __name__ == "__main__":
    print(json.dumps(run_all(Path(sys.argv[1]), sys.argv[2], sys.argv[3])))  # noqa: T201
