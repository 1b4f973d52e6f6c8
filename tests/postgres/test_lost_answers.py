"""A small study through a proxy that goes wrong at its k-th query: the study ends as if nothing had happened.

HPO_EVERY_QUERY=1 tries every k instead of some.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpo.storage import connection as connection_module
from hpo.storage import tables
from hpo.storage.artifacts import artifact_store
from hpo.storage.leases import Leases
from hpo.storage.registry import Registry
from hpo.storage.trials import TrialStorage, trial_storage
from hpo.study.config import StudyConfig, load
from hpo.study.lifecycle import create_or_open
from hpo.worker.worker import Worker
from tests.conftest import fresh_database
from tests.proxy import Proxy, proxied

STEP = 1 if os.environ.get("HPO_EVERY_QUERY") else 13
STUDY = """
[study]
name = "{name}"
trials = 3
lease = "1s"
seed = 3
pruner = "median"
[data]
train = "waves.npz"
[train]
epochs = 2
[space]
hidden_size = [4, 8]
layers = 1
head_size = 0
batch_size = 16
"""


@pytest.fixture
def config(tmp_path: Path) -> Callable[[str], StudyConfig]:
    random = np.random.default_rng(0)
    np.savez(tmp_path / "waves.npz", X=random.normal(size=(60, 8, 2)), y=np.arange(60) % 2)

    def made(name: str) -> StudyConfig:
        (tmp_path / "study.toml").write_text(STUDY.format(name=name))
        return load(tmp_path / "study.toml")

    return made


@pytest.fixture
def through(database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Proxy, str]]:
    """A proxy before the test's database, and the URL through it, which is the process's."""
    monkeypatch.setattr(connection_module, "DEADLINE_S", 0.5)
    monkeypatch.setenv("HPO_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HPO_ARTIFACTS", str(tmp_path / "artifacts"))
    with proxied(database_url) as (proxy, url):
        monkeypatch.setenv("HPO_DATABASE_URL", url)
        yield proxy, url


def run(config: StudyConfig, url: str) -> None:
    """The study from its creation to its promoted model, launcher and worker in this process."""
    storage = trial_storage(url)
    create_or_open(config, storage, artifact_store())
    storage.close()
    Worker(config.study.name).run()


def result(storage: TrialStorage, name: str) -> list[Any]:
    """Parameters, state, values and curve of each trial, and what the promoted model's files hold."""
    study_id = storage.get_study_id_from_name(name)
    trials = [
        (trial.number, trial.state.name, trial.value, sorted(trial.params.items()), trial.intermediate_values)
        for trial in storage.get_all_trials(study_id)
    ]
    (model,) = [model for model in Registry(storage.connection).models() if model.name == name]
    weights = [artifact_store().get(key) for file, key in model.artifacts.items() if file.endswith(".safetensors")]
    row = Leases(storage).study(study_id)
    assert row is not None
    assert (row.status, row.started, model.version) == ("finished", 3, 1)
    return [*trials, *(hashlib.sha256(content).hexdigest() for content in weights)]


FAULTS = ["lose_answer", "refuse", "swallow", "half_open", "stall"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_study_ends_as_if_undisturbed_whichever_query_goes_wrong(
    fault: str, through: tuple[Proxy, str], config: Callable[[str], StudyConfig], storage: TrialStorage
) -> None:
    """Reported of Optuna's storage: a commit whose answer is lost is made twice; a dead connection is waited for."""
    proxy, url = through
    run(config("undisturbed"), url)
    whole, queries = result(storage, "undisturbed"), proxy.queries
    offset = FAULTS.index(fault)
    tried = range(1 + 2 * offset if STEP > 1 else 1, queries + 1, STEP)
    assert len(tried) > 5
    for k in tried:
        getattr(proxy, fault)(k)
        run(config(f"{fault}-{k}"), url)
        assert result(storage, f"{fault}-{k}") == whole, f"{fault} at query {k}"


@pytest.mark.parametrize("fault", ["lose_answer", "refuse"])
def test_tables_are_made_whichever_query_goes_wrong(fault: str, server: str, template: str) -> None:
    """Reported as 125 lines of SQLAlchemy's where the connection was lost in a migration."""
    k, queries = 1 + (fault == "refuse"), 10**6
    while k <= queries:
        with fresh_database(server, "template0") as empty, proxied(empty) as (proxy, url):
            getattr(proxy, fault)(k)
            storage = trial_storage(url)
            assert tables.revision(storage.connection) == tables.HEAD
            queries = proxy.queries
            storage.close()
        k += STEP
    assert k > 3 * STEP
