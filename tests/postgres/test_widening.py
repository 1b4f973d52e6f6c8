"""A study whose file has a wider space goes on with the same trials; one with a narrower space is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution, IntDistribution
from optuna.storages import RDBStorage
from optuna.trial import TrialState

from hpo.dashboard.server import wsgi_app
from hpo.storage.artifacts import artifact_store
from hpo.storage.changes import drop, history
from hpo.storage.leases import Lease, Leases
from hpo.storage.trials import trial_storage
from hpo.study.config import SAMPLERS, load
from hpo.study.lifecycle import OpenStudy, create_or_open, open_study
from hpo.study.plan import StudyConflict
from tests.postgres.test_dashboard import ask, serving

SMALL = {
    "normalization": '"none"',
    "bidirectional": "false",
    "pooling": '["mean", "last"]',
    "difference": "false",
    "stem": '"none"',
    "label_smoothing": "0.0",
    "mixup": "0.0",
    "jitter": "0.0",
    "skip": "false",
    "head_size": "0",
    "dropout": "0.0",
    "batch_size": "16",
    "optimizer": '"adamw"',
    "learning_rate": "0.01",
    "weight_decay": "0.0",
    "schedule": '"constant"',
    "layers": "1",
    "hidden_size": "{ low = 8, high = 16 }",
}
WIDER = {
    "hidden_size": "{ low = 4, high = 64 }",
    "pooling": '["max", "mean", "last"]',
    "learning_rate": "{ low = 1e-3, high = 1e-1, log = true }",
    "layers": "[1, 2]",
    "dropout": "{ low = 0.0, high = 0.5 }",
}


@pytest.fixture
def launched(database_url: str, tmp_path: Path) -> Iterator[Callable[..., OpenStudy]]:
    """launched("trials = 20", layers="[1, 2]") is the study of a file with the small space and these entries."""
    random = np.random.default_rng(0)
    np.savez(tmp_path / "waves.npz", X=random.normal(size=(60, 8, 2)), y=np.arange(60) % 2)
    store, storages = artifact_store(str(tmp_path / "artifacts")), []

    def made(study: str = "trials = 20", more: str = "", **space: str) -> OpenStudy:
        entries = "\n".join(f"{name} = {entry}" for name, entry in {**SMALL, **space}.items() if entry)
        path = tmp_path / f"{uuid4()}.toml"
        study = f'[study]\nname = "waves"\nfinalists = 0\n{study}'
        text = f'{study}\n[data]\ntrain = "waves.npz"\n[space]\n{entries}\n{more}\n'
        path.write_text(text)
        storages.append(trial_storage(database_url))
        return create_or_open(load(path), storages[-1], store)

    yield made
    for storage in storages:
        storage.close()


def take(study: OpenStudy, worker: str = "tester") -> Lease:
    lease = study.leases.acquire(study.study_id, worker, "cpu")
    assert lease is not None
    return lease


def run(study: OpenStudy, count: int = 1) -> list[dict[str, Any]]:
    """Take, draw and complete trials as a worker does, each worth its hidden size."""
    drawn = []
    for _ in range(count):
        lease = take(study)
        params = study.sampler.parameters(lease.trial_id)
        attributes = {"seed": 0, "params": params, "log_loss": 1.0}
        study.storage.finish_trial(lease.trial_id, TrialState.COMPLETE, [float(params["hidden_size"])], attributes)
        drawn.append(params)
    return drawn


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "grid"])
def test_every_sampler_goes_on_with_the_same_trials_in_the_wider_space(
    launched: Callable[..., OpenStudy], sampler: str
) -> None:
    chosen = f'sampler = "{sampler}"\n'
    first = launched(f"{chosen}trials = 15")
    earlier = run(first, 15)
    assert {params["hidden_size"] for params in earlier} <= set(range(8, 17))
    before = first.storage.get_all_trials(first.study_id)
    study = launched(f"{chosen}trials = 50", **WIDER)
    later = run(study, 35)
    assert [trial.number for trial in study.storage.get_all_trials(study.study_id)] == list(range(50))
    assert study.storage.get_all_trials(study.study_id)[:15] == before
    assert any(not 8 <= params["hidden_size"] <= 16 for params in later)
    assert {params["pooling"] for params in later} == {"max", "mean", "last"}
    assert {params["layers"] for params in later} == {1, 2}
    assert len({params["learning_rate"] for params in later}) > 10
    for params in later:
        assert 4 <= params["hidden_size"] <= 64
        assert (params["dropout"] == 0) == (params["layers"] == 1)


@pytest.mark.parametrize("sampler", ["tpe", "gp", "cmaes"])
def test_what_earlier_trials_have_shown_counts_in_the_wider_space(
    launched: Callable[..., OpenStudy], sampler: str
) -> None:
    """The sampler sees them as drawn from it: with all that was fixed, and no parameter falls out of their common
    space."""
    first = launched(f'sampler = "{sampler}"\ntrials = 12')
    run(first, 12)
    study = launched(f'sampler = "{sampler}"\ntrials = 40', **WIDER)
    seen = study.optuna_study.get_trials(deepcopy=False)
    common = optuna.search_space.intersection_search_space(seen)
    assert common.keys() == {"hidden_size", "pooling", "learning_rate", "layers"}  # one layer leaves dropout idle
    assert common["hidden_size"] == IntDistribution(4, 64)
    assert common["pooling"] == CategoricalDistribution(("mean", "last", "max"))
    assert {(trial.params["layers"], trial.params["learning_rate"]) for trial in seen} == {(1, 0.01)}
    drawn = run(study, 14)
    if sampler != "cmaes":  # which begins anew
        assert max(params["hidden_size"] for params in drawn[:8]) > 16  # larger was better


def test_a_grid_gets_the_points_that_it_lacks(launched: Callable[..., OpenStudy]) -> None:
    fixed = {"hidden_size": "[4, 8]", "pooling": '"mean"'}
    first = launched('sampler = "grid"\ntrials = 99', **fixed)
    run(first, 2)
    assert first.sampler.exhausted()
    first.leases.exhaust(first.study_id, first.plan.revision)
    study = launched('sampler = "grid"\ntrials = 99', hidden_size="[16, 8, 4]", pooling='["last", "mean"]')
    assert study.leases.snapshot(study.study_id).status == "open"
    drawn = run(study, 4)
    assert {(params["hidden_size"], params["pooling"]) for params in drawn} == {
        (16, "mean"), (16, "last"), (8, "last"), (4, "last")
    }  # fmt: skip
    assert study.sampler.exhausted()
    first.leases.exhaust(first.study_id, first.plan.revision)  # a worker that knows the narrower space alone
    assert study.leases.snapshot(study.study_id).status == "open"


@pytest.mark.parametrize(
    ("space", "said"),
    [
        ({"hidden_size": "{ low = 9, high = 64 }"},
         "space.hidden_size: stored { low = 8, high = 16 }, file { low = 9, high = 64 }: a range may be widened, not "
         "narrowed"),
        ({"hidden_size": "{ low = 8, high = 64, log = true }"}, "log and step of a range stay as they are"),
        ({"hidden_size": "{ low = 8, high = 64, step = 2 }"}, "log and step of a range stay as they are"),
        ({"hidden_size": "[8, 16, 32]"}, "a range may be widened, not narrowed, and stays a range"),
        ({"hidden_size": "16"}, "a range may be widened, not narrowed, and stays a range"),
        ({"pooling": '["mean", "max"]'}, 'a list of choices may get more of them, none less: "last" is missing'),
        ({"pooling": '"mean"'}, "a list of choices may get more of them, none less, and stays a list"),
        ({"layers": "2"}, "space.layers: stored 1, file 2: its trials have 1, which must stay in it"),
        ({"learning_rate": "{ low = 2e-2, high = 1e-1, log = true }"}, "its trials have 0.01, which must stay in it"),
        ({"dropout": ""}, ""),
    ],
)  # fmt: skip
def test_a_narrower_space_is_refused_with_the_ways_out(
    launched: Callable[..., OpenStudy], space: dict[str, str], said: str
) -> None:
    study = launched()
    if not said:  # the default holds what was fixed
        assert launched(**space).plan.revision == 1
        return
    with pytest.raises(StudyConflict) as refused:
        launched("trials = 99", **space)
    message = str(refused.value)
    assert said in message
    assert (
        'choose another [study] name, with warm_start = "waves" to begin with those of its trials that lie in'
        in message
    )
    assert study.leases.snapshot(study.study_id).budget == 20
    assert history(study.storage, study.study_id) == []


def test_steps_of_a_wider_range_meet_the_earlier_ones(launched: Callable[..., OpenStudy]) -> None:
    launched(hidden_size="{ low = 8, high = 16, step = 4 }")
    with pytest.raises(StudyConflict, match="a wider range goes on in the steps of the earlier one"):
        launched(hidden_size="{ low = 6, high = 18, step = 4 }")
    assert launched(hidden_size="{ low = 4, high = 20, step = 4 }").plan.revision == 1


def test_the_same_in_another_order_or_form_is_no_change(launched: Callable[..., OpenStudy]) -> None:
    study = launched()
    again = launched(pooling='["last", "mean"]', layers="[1]", head_size="{ low = 0, high = 0 }")
    assert again.plan == study.plan
    assert history(study.storage, study.study_id) == []


def test_what_no_file_names_stays_as_the_study_began(
    launched: Callable[..., OpenStudy], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after an update, whose default range may be another one."""
    from hpo.study import space as spaces
    from hpo.study.entries import Range

    study = launched(hidden_size="")
    monkeypatch.setitem(spaces.DEFAULTS, "hidden_size", Range(32, 64, log=True))
    wider = launched(hidden_size="", layers="[1, 2]")
    assert wider.plan.config.space["hidden_size"] == study.plan.config.space["hidden_size"]
    assert wider.plan.config.space["layers"] != study.plan.config.space["layers"]


def test_the_change_is_on_record_and_every_other_key_stays_refused(launched: Callable[..., OpenStudy]) -> None:
    study = launched()
    run(study, 3)
    launched("trials = 30\ntimeout = 600", layers="[1, 2]")
    (change,) = history(study.storage, study.study_id)
    assert (change.what, change.detail) == ("widen", {"space": {"layers": {"from": 1, "to": [1, 2]}}, "started": 3})
    row = study.leases.study(study.study_id)
    assert row is not None
    assert (row.budget, row.timeout_s, row.config["revision"]) == (30, 600.0, 1)
    attributes = study.storage.get_study_system_attrs(study.study_id)
    assert "**Wider:** space.layers from 1 to [1, 2]" in attributes["dashboard:note_str:0"]
    with pytest.raises(StudyConflict, match=r"study\.pruner: stored .*\nchange it back, choose another \[s"):
        launched('trials = 30\npruner = "none"', layers="[1, 2]", head_size="[0, 4]")
    assert len(history(study.storage, study.study_id)) == 1


def test_of_two_launches_at_once_the_second_is_compared_with_what_the_first_has_stored(
    launched: Callable[..., OpenStudy], database_url: str
) -> None:
    study = launched()

    def launch(space: dict[str, str]) -> OpenStudy | str:
        try:
            return launched(**space)
        except StudyConflict as error:
            return str(error)

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(launch, ({"layers": "[1, 2]"}, {"head_size": "[0, 4]"})))
    refused = [each for each in found if isinstance(each, str)]
    opened = [each for each in found if not isinstance(each, str)]
    assert len(refused) == len(opened) == 1
    assert "a list of choices may get more of them, none less" in refused[0]
    plan = open_study("waves", study.storage).plan
    assert plan == opened[0].plan
    assert plan.revision == 1
    both = launched(layers="[1, 2]", head_size="[0, 4]")
    assert (both.plan.revision, both.plan.fixed) == (2, {"layers": 1, "head_size": 0})


def test_trials_that_were_drawn_before_are_adopted_as_they_were_drawn(
    launched: Callable[..., OpenStudy], elsewhere: Leases
) -> None:
    study = launched()
    lease = take(study)
    drawn = study.sampler.parameters(lease.trial_id)
    unlucky = take(study)  # its worker dies before it has drawn
    study.leases.release(lease)
    study.leases.release(unlucky)
    launched(**WIDER)
    other = open_study("waves", elsewhere.storage)
    adopted = take(other, "other")
    assert (adopted.trial_id, adopted.revision, other.plan.revision) == (lease.trial_id, 1, 1)
    assert other.sampler.parameters(adopted.trial_id) == drawn
    redrawn = take(other, "other")
    assert redrawn.trial_id == unlucky.trial_id
    assert other.sampler.parameters(redrawn.trial_id).keys() == drawn.keys()


def test_a_trial_of_a_space_of_one_is_adopted_as_it_was(launched: Callable[..., OpenStudy], elsewhere: Leases) -> None:
    """It has no parameter in Optuna's tables by which others would know that it was drawn."""
    one = {"hidden_size": "8", "pooling": '"mean"', "gradient_clip": "1.0", "class_weight": '"none"'}
    study = launched(**one)
    lease = take(study)
    drawn = study.sampler.parameters(lease.trial_id)
    study.storage.set_trial_intermediate_value(lease.trial_id, 1, 0.5)
    study.leases.checkpoint(lease, "key", 1)
    study.leases.release(lease)
    launched(**{**one, "hidden_size": "{ low = 8, high = 512 }"})
    other = open_study("waves", elsewhere.storage)
    assert other.sampler.parameters(take(other, "other").trial_id) == drawn


def test_what_is_queued_runs_as_it_was_queued(launched: Callable[..., OpenStudy]) -> None:
    queued = '[[enqueue]]\nhidden_size = 12\npooling = "last"\n'
    launched(more=queued)
    study = launched(more=queued, **WIDER)
    (first,) = run(study)
    assert (first["hidden_size"], first["pooling"], first["layers"], first["learning_rate"]) == (12, "last", 1, 0.01)


def test_a_space_that_was_fixed_is_drawn_from_once_it_is_wider(launched: Callable[..., OpenStudy]) -> None:
    fixed = {"pooling": '"mean"', "hidden_size": "8"}
    run(launched(**fixed))
    later = run(launched(**{**fixed, "hidden_size": "{ low = 4, high = 64 }"}), 6)
    assert len({params["hidden_size"] for params in later}) > 3


def test_a_study_that_is_over_goes_on_where_trials_are_left(launched: Callable[..., OpenStudy]) -> None:
    few = {"hidden_size": "[8, 16]", "pooling": '"mean"'}
    study = launched("trials = 4", **few)
    run(study, 2)
    leases = study.leases
    leases.exhaust(study.study_id)
    assert leases.acquire_promotion(study.study_id, "tester")
    leases.finish_promotion(study.study_id, "tester", 1)
    wider = launched("trials = 4", **few, layers="[1, 2]")
    shown = leases.snapshot(study.study_id)
    assert (shown.status, shown.started, shown.promoted_version) == ("open", 2, None)
    assert {params["layers"] for params in run(wider, 2)} == {2}


def test_other_programs_read_the_trials_of_both_spaces(launched: Callable[..., OpenStudy], database_url: str) -> None:
    run(launched("trials = 3"), 3)
    run(launched("trials = 9", **WIDER), 6)
    stock = optuna.load_study(study_name="waves", storage=RDBStorage(database_url))
    poolings = [trial.params["pooling"] for trial in stock.trials]
    assert poolings == [trial.params["pooling"] for trial in optuna.load_study(
        study_name="waves", storage=trial_storage(database_url)).trials]  # fmt: skip
    assert stock.trials[0].distributions["pooling"] == CategoricalDistribution(("mean", "last"))
    assert stock.trials[8].distributions["pooling"] == CategoricalDistribution(("mean", "last", "max"))


def test_a_dropped_trial_stays_so_in_the_wider_space(launched: Callable[..., OpenStudy]) -> None:
    study = launched()
    run(study, 3)
    drop(study.storage, study.study_id, [1], "wrong", "ada")
    wider = launched(**WIDER)
    assert [trial.number for trial in wider.optuna_study.trials] == [0, 2]
    assert json.dumps(wider.plan.to_json())


def test_the_dashboard_shows_the_trials_of_both_spaces(launched: Callable[..., OpenStudy], tmp_path: Path) -> None:
    run(launched("trials = 10"), 10)
    study = launched("trials = 30", hidden_size=WIDER["hidden_size"], pooling=WIDER["pooling"])
    run(study, 20)
    with serving(wsgi_app(study.storage, artifact_store(str(tmp_path / "artifacts")))) as url:
        detail = ask(f"{url}/api/studies/{study.study_id}").json
        found = ask(f"{url}/api/studies/{study.study_id}/param_importances").json["param_importances"][0]
    shown = [{each["name"]: each["param_external_value"] for each in trial["params"]} for trial in detail["trials"]]
    assert [params["pooling"] for params in shown] == [trial.params["pooling"] for trial in study.optuna_study.trials]
    assert {each["name"] for each in found} == {"hidden_size", "pooling"}
