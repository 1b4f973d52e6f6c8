"""Studies without training: what is drawn, by which sampler, what is repeated, what contradicts."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import psycopg2
import pytest
from optuna.study import StudyDirection
from optuna.trial import TrialState

from hpo.datasets import Datasets
from hpo.models.bundle.predictions import Predictions
from hpo.models.data.sequences import DataError
from hpo.storage.artifacts import artifact_store
from hpo.storage.errors import StudyOver
from hpo.storage.leases import Lease
from hpo.storage.trials import TrialStorage, trial_storage
from hpo.study.config import EVENTS, KEYS, SAMPLERS, StudyConfig, TrackSection, load, to_dict
from hpo.study.lifecycle import BEGUN, SEARCH_SHARE, OpenStudy, create_or_open, open_study, track_of
from hpo.study.plan import Plan, StudyError, make_plan
from hpo.study.pruning import make_pruner
from hpo.terminal import show_predictions
from hpo.trial.checkpoints import drop_spent_checkpoints
from hpo.trial.context import StopReason, TrialContext, WorkerResources
from hpo.trial.device_lock import SharedExclusiveLock
from tests.conftest import execute, wait_for

FINITE = """
normalization = "none"
bidirectional = false
pooling = "mean"
difference = false
stem = "none"
head_size = 0
label_smoothing = 0.0
mixup = 0.0
jitter = 0.0
skip = false
dropout = [0.1, 0.2]
batch_size = 16
optimizer = "adamw"
learning_rate = [0.001, 0.01]
weight_decay = 0.0
schedule = "constant"
hidden_size = [4, 8]
layers = [1, 2]
"""


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., StudyConfig]:
    """config(study="…", space="…") over a small npz file."""
    random = np.random.default_rng(0)
    np.savez(tmp_path / "waves.npz", X=random.normal(size=(60, 8, 2)), y=np.arange(60) % 2)

    def made(study: str = "", space: str = "", data: str = "") -> StudyConfig:
        text = f'[study]\nname = "waves"\n{study}\n[data]\ntrain = "waves.npz"\n{data}\n[space]\n{space}\n'
        (tmp_path / "waves.toml").write_text(text)
        return load(tmp_path / "waves.toml")

    return made


@pytest.fixture
def opened(config: Callable[..., StudyConfig], storage: TrialStorage, tmp_path: Path) -> Callable[..., OpenStudy]:
    return lambda **given: create_or_open(config(**given), storage, artifact_store(str(tmp_path / "artifacts")))


def acquire(study: OpenStudy, worker: str = "tester") -> Lease:
    """A trial's lease that nobody renews."""
    lease = study.leases.acquire(study.study_id, worker, "cpu")
    assert lease is not None
    return lease


def run(study: OpenStudy, count: int) -> list[dict[str, Any]]:
    """Take, draw and complete `count` trials, each worth its hidden size."""
    drawn = []
    for _ in range(count):
        lease = acquire(study)
        params = study.sampler.parameters(lease.trial_id)
        study.storage.finish_trial(lease.trial_id, TrialState.COMPLETE, [float(params["hidden_size"])])
        drawn.append(params)
    return drawn


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "grid"])
def test_every_sampler_draws_from_the_space_and_repeats_itself(
    opened: Callable[..., OpenStudy], sampler: str, storage: TrialStorage
) -> None:
    study = opened(study=f'sampler = "{sampler}"\ntrials = 14')
    first = run(study, 14)
    for params in first:
        assert 8 <= params["hidden_size"] <= 128
        assert (params["dropout"] == 0) == (params["layers"] == 1 and params["head_size"] == 0)
    storage.delete_study(study.study_id)
    again = run(opened(study=f'sampler = "{sampler}"\ntrials = 14'), 14)
    assert again == first


def test_the_grid_covers_a_finite_space_once_and_no_dropout_twice(opened: Callable[..., OpenStudy]) -> None:
    """One layer leaves dropout without effect: 2 rates x 2 sizes x (1 + 2) configurations."""
    study = opened(study='sampler = "grid"\ntrials = 50', space=FINITE)
    drawn = run(study, 12)
    assert len({tuple(params.items()) for params in drawn}) == 12
    assert study.sampler.exhausted()


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_a_small_space_is_drawn_without_repetition(opened: Callable[..., OpenStudy], sampler: str) -> None:
    study = opened(study=f'sampler = "{sampler}"\ntrials = 50', space=FINITE)
    drawn = run(study, 12)
    assert len({tuple(params.items()) for params in drawn}) == 12
    assert study.sampler.exhausted()
    study.leases.exhaust(study.study_id)
    with pytest.raises(StudyOver, match="exhausted"):
        acquire(study)


def test_a_continuous_range_has_no_grid(opened: Callable[..., OpenStudy]) -> None:
    with pytest.raises(StudyError, match=r'"grid" needs finite entries, but space.\w+ is continuous; list its values'):
        opened(study='sampler = "grid"')


def test_an_adopted_trial_keeps_its_parameters(opened: Callable[..., OpenStudy]) -> None:
    study = opened(study="trials = 1")
    lease = acquire(study, "one")
    params = study.sampler.parameters(lease.trial_id)
    study.leases.release(lease)
    adopted = acquire(study, "two")
    assert adopted.number == lease.number
    assert study.sampler.parameters(adopted.trial_id) == params


def test_alike_values_go_to_the_lower_log_loss(opened: Callable[..., OpenStudy]) -> None:
    """60 sequences less the 12 of the holdout: half a sequence's share is 0.0104."""
    study = opened(study="trials = 4")
    for value, log_loss in ((0.900, 0.7), (0.892, 0.3), (0.889, 0.1), (0.900, 0.5)):
        lease = acquire(study)
        study.sampler.parameters(lease.trial_id)
        attributes = {"log_loss": log_loss, "seed": 1}
        study.storage.finish_trial(lease.trial_id, TrialState.COMPLETE, [value], attributes)
    assert [record.number for record in study.best_first()] == [1, 3, 0, 2]


def test_a_plan_survives_the_database(opened: Callable[..., OpenStudy], storage: TrialStorage) -> None:
    study = opened(study='sampler = "gp"\ntimeout = "2h"', space="layers = [1, 2]", data="validation = { folds = 3 }")
    assert open_study("waves", storage).plan == study.plan
    assert Plan.from_json(study.plan.to_json()) == study.plan


@pytest.mark.parametrize("pruner", ["hyperband", "halving", "median", "none"])
def test_every_pruner_is_made_for_the_epochs_of_the_study(opened: Callable[..., OpenStudy], pruner: str) -> None:
    study = opened(study=f'pruner = "{pruner}"')
    lease = acquire(study)
    study.sampler.parameters(lease.trial_id)
    for epoch in range(1, 51):
        study.storage.set_trial_intermediate_value(lease.trial_id, epoch, epoch / 50)
        trial = study.storage.get_trial(lease.trial_id)
        assert not make_pruner(study.plan).prune(study.optuna_study, trial)  # a first trial has nobody to lose against


def test_other_data_under_the_same_name_are_refused(
    opened: Callable[..., OpenStudy], tmp_path: Path, config: Callable[..., StudyConfig]
) -> None:
    opened()
    np.savez(tmp_path / "waves.npz", X=np.ones((60, 8, 2)), y=np.arange(60) % 2)
    with pytest.raises(StudyError, match=r"data.train: the content of the file differs"):
        opened()


OTHER = {  # another value for each key of a study file
    "study.metric": '"accuracy"',
    "study.trials": "9",
    "study.timeout": "77",
    "study.patience": "5",
    "study.sampler": '"random"',
    "study.pruner": '"median"',
    "study.seed": "1",
    "study.lease": "7",
    "study.attempts": "4",
    "study.priority": "3",
    "study.max_workers": "2",
    "study.parallel": "2",
    "study.warm_start": '"before"',
    "study.finalists": "4",
    "study.repeats": "2",
    "promote.ensemble": '"none"',
    "promote.costs": "{ false_positive = 1, false_negative = 5 }",
    "limits.latency_ms": "5.0",
    "limits.size_mb": "0.5",
    "data.train": '"copy.npz"',
    "data.test": '"copy.npz"',
    "data.holdout": "0.3",
    "data.validation": "0.3",
    "data.label": '"target"',
    "data.id": '"name"',
    "data.step": '"time"',
    "data.group": '"patient"',
    "data.time": '"time"',
    "data.gap": "3",
    "data.weight": '"weight"',
    "data.positive": '"0"',
    "train.epochs": "7",
    "train.patience": "7",
    "train.precision": '"bfloat16"',
    "train.keep_best": "7",
    "notify.url": '"https://example.org/other"',
    "notify.on": '["end"]',
    "track.mlflow": '"http://localhost:5000"',
    "track.tensorboard": '"runs"',
    "space.layers": "2",
    "enqueue": "[{ layers = 1 }]",
}
OBEYED = {  # and where that is stored
    "study.trials": "budget",
    "study.timeout": "timeout_s",
    "study.patience": "patience",
    "study.priority": "priority",
    "study.max_workers": "max_workers",
    "study.finalists": "finalists",
    "study.repeats": "repeats",
}


def test_every_key_of_a_study_file_has_another_value_here() -> None:
    keys = {f"{section}.{key}" for section in KEYS for key in KEYS[section]}
    assert OTHER.keys() == keys - {"study.name"} | {"space.layers", "enqueue"}


@pytest.mark.parametrize("key", OTHER)
def test_a_changed_setting_of_a_study_that_exists_is_obeyed_or_refused(
    opened: Callable[..., OpenStudy], storage: TrialStorage, tmp_path: Path, key: str
) -> None:
    """`--trials 6` on a study of 30 ran 30 without a word."""
    study, store = opened(), artifact_store(str(tmp_path / "artifacts"))
    before = study.leases.study(study.study_id)
    assert before is not None
    optuna.create_study(study_name="before", storage=storage)
    shutil.copy(tmp_path / "waves.npz", tmp_path / "copy.npz")
    if key in ("data.time", "data.gap", "data.weight"):
        beside = {"weight" if key == "data.weight" else "time": np.arange(60)}
        np.savez(tmp_path / "waves.npz", **np.load(tmp_path / "waves.npz"), **beside)  # type: ignore[arg-type]
    given = {"notify.on": ["notify.url=https://example.org"], "data.gap": ["data.time=time"]}.get(key, [])
    changed = load(tmp_path / "waves.toml", [*given, f"{key}={OTHER[key]}"])
    if key.startswith("notify."):
        create_or_open(changed, storage, store)
        (found,) = storage.connection.execute("SELECT notify_url, notify_on FROM hpo.terms")
        assert found == (changed.notify.url, list(changed.notify.on)) != ("https://example.org", list(EVENTS))
    elif key.startswith("track."):
        create_or_open(changed, storage, store)
        assert track_of(storage, study.study_id) == changed.track != TrackSection()
        create_or_open(load(tmp_path / "waves.toml"), storage, store)
        assert track_of(storage, study.study_id) == TrackSection()
        assert study.leases.study(study.study_id) == before
    elif key == "data.train":  # the same content
        assert create_or_open(changed, storage, store).plan == study.plan
    elif key.startswith(("limits.", "promote.")):
        row = create_or_open(changed, storage, store).leases.study(study.study_id)
        assert row is not None
        section, _, name = key.partition(".")
        tables = {section: {**before.config["config"][section], name: to_dict(changed)[section][name]}}
        plan = before.config["config"] | tables, before.config["written"] | tables
        assert row == replace(before, config=before.config | {"config": plan[0], "written": plan[1], "revision": 1})
    elif key in OBEYED:
        row = create_or_open(changed, storage, store).leases.study(study.study_id)
        changes: dict[str, Any] = {OBEYED[key]: int(OTHER[key])}
        if key == "study.timeout":
            changes["timeout_s"] *= SEARCH_SHARE  # finals have the rest
        assert row == replace(before, **changes)
    else:
        with pytest.raises(StudyError, match=f"{key}: (stored|the content)") as raised:
            create_or_open(changed, storage, store)
        assert "change it back, choose another" in str(raised.value)
        assert study.leases.study(study.study_id) == before


def test_fewer_trials_than_have_begun_are_said_to_be_too_few(
    opened: Callable[..., OpenStudy], caplog: pytest.LogCaptureFixture
) -> None:
    study = opened(study="trials = 30")
    run(study, 3)
    row = opened(study="trials = 4").leases.study(study.study_id)
    assert row is not None
    assert row.budget == 4
    assert caplog.messages == []
    row = opened(study="trials = 2").leases.study(study.study_id)
    assert row is not None
    assert row.budget == 3
    assert caplog.messages == [
        "study waves: 3 trials have begun, more than the 2 that are asked for; no more are started"
    ]
    with pytest.raises(StudyOver, match="budget"):
        acquire(study)


def test_a_study_goes_on_although_the_one_that_it_learnt_from_is_gone(
    opened: Callable[..., OpenStudy], storage: TrialStorage
) -> None:
    optuna.create_study(study_name="before", storage=storage)
    study = opened(study='warm_start = "before"')
    storage.delete_study(storage.get_study_id_from_name("before"))
    assert opened(study='warm_start = "before"').study_id == study.study_id


# What Optuna's tables say beside the plan: optuna-dashboard and plain scripts write them too


def everything(storage: TrialStorage, tmp_path: Path) -> list[Any]:
    """All that a refusal could change."""
    tables = ["studies", "study_directions", "study_system_attributes", "study_user_attributes", "trials", "hpo.terms"]
    with closing(psycopg2.connect(storage.url.replace("+psycopg2", ""))) as connection:
        cursor, found = connection.cursor(), []
        for table in tables:
            cursor.execute(f"SELECT t::text FROM {table} t ORDER BY 1")
            found.append(cursor.fetchall())
    return [*found, sorted((tmp_path / "artifacts").glob("**/*"))]


@pytest.mark.parametrize("directions", [["minimize"], ["maximize", "minimize"]])
def test_a_study_with_other_directions_is_refused_as_it_is(
    opened: Callable[..., OpenStudy], storage: TrialStorage, tmp_path: Path, directions: list[str]
) -> None:
    """A study made in the dashboard with direction minimize had its AUROC minimised, exit status 0."""
    storage.create_new_study([StudyDirection[each.upper()] for each in directions], "waves")
    before = everything(storage, tmp_path)
    with pytest.raises(StudyError) as raised:
        opened(study='metric = "auroc"')
    assert str(raised.value) == (
        f"study 'waves' in the database has the directions [{', '.join(directions)}], but auroc is one value to "
        "maximize; choose another [study] name, or `hpo delete waves` and launch again"
    )
    assert everything(storage, tmp_path) == before


def test_an_empty_study_with_the_same_objective_is_taken_over(
    opened: Callable[..., OpenStudy], storage: TrialStorage
) -> None:
    made = optuna.create_study(study_name="waves", storage=storage, direction="minimize")
    assert opened(study='metric = "log_loss"').study_id == made._study_id


def test_an_empty_study_whose_objective_has_another_name_is_refused_as_it_is(
    opened: Callable[..., OpenStudy], storage: TrialStorage, tmp_path: Path
) -> None:
    made = optuna.create_study(study_name="waves", storage=storage, direction="maximize")
    storage.set_study_system_attr(made._study_id, "study:metric_names", ["throughput"])
    before = everything(storage, tmp_path)
    with pytest.raises(StudyError, match=r"was not made by `hpo launch`, with trials or an objective of its own"):
        opened()
    assert everything(storage, tmp_path) == before


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE study_directions SET direction = 'MINIMIZE'",
        "INSERT INTO study_directions (study_id, direction, objective) SELECT study_id, 'MAXIMIZE', 1 FROM studies",
        "DELETE FROM study_directions",
    ],
)
def test_directions_that_somebody_has_changed_stop_launch_and_worker(
    opened: Callable[..., OpenStudy], database_url: str, tmp_path: Path, config: Callable[..., StudyConfig], change: str
) -> None:
    opened()
    execute(database_url, change)
    with closing(trial_storage(database_url)) as other:
        before = everything(other, tmp_path)
        refusal = r"study 'waves' in the database has the directions \["
        with pytest.raises(StudyError, match=refusal):  # a worker's way
            open_study("waves", other)
        with pytest.raises(StudyError, match=refusal):
            create_or_open(config(study="trials = 99"), other, artifact_store(str(tmp_path / "artifacts")))
        assert everything(other, tmp_path) == before


def test_a_plan_of_another_version_stops_a_launch_by_name(opened: Callable[..., OpenStudy], database_url: str) -> None:
    for content in ("{}", "[]", '{"config": {}, "written": {}, "classes": [], "features": []}'):
        opened()
        execute(database_url, f"UPDATE hpo.terms SET config = '{content}'")
        with pytest.raises(StudyError, match="study 'waves' was made by another version of hpo"):
            opened()
        execute(database_url, "DELETE FROM hpo.terms")


def test_a_missing_study_names_the_known_ones(opened: Callable[..., OpenStudy], storage: TrialStorage) -> None:
    opened()
    with pytest.raises(StudyError, match="there is no study named 'wave'; known: waves"):
        open_study("wave", storage)


def test_an_unknown_warm_start_leaves_no_study_behind(opened: Callable[..., OpenStudy], storage: TrialStorage) -> None:
    with pytest.raises(StudyError, match=r"study.warm_start names the study 'ghost', which does not exist"):
        opened(study='warm_start = "ghost"')
    assert storage.get_all_studies() == []


def test_launches_of_one_file_at_once_fill_one_study_once(
    config: Callable[..., StudyConfig], opened: Callable[..., OpenStudy], database_url: str, tmp_path: Path
) -> None:
    run(opened(), 3)
    written = config(study='warm_start = "waves"', space="hidden_size = [8, 16]")
    written = replace(
        written, study=replace(written.study, name="learner"), enqueue=({"hidden_size": 8}, {"hidden_size": 16})
    )

    def launch(_: int) -> list[TrialState]:
        with closing(trial_storage(database_url)) as mine:
            study = create_or_open(written, mine, artifact_store(str(tmp_path / "artifacts")))
            return [trial.state for trial in study.optuna_study.get_trials()]

    with ThreadPoolExecutor(6) as pool:
        for states in pool.map(launch, range(6)):
            assert states.count(TrialState.WAITING) == 2


def test_a_study_half_made_by_a_launch_that_died_is_completed(
    config: Callable[..., StudyConfig], storage: TrialStorage, tmp_path: Path
) -> None:
    written = replace(config(), enqueue=({"hidden_size": 16}, {"hidden_size": 32}))
    study = optuna.create_study(study_name="waves", storage=storage, direction="maximize")
    storage.set_study_system_attr(study._study_id, BEGUN, True)
    study.enqueue_trial({"hidden_size": 16})
    found = create_or_open(written, storage, artifact_store(str(tmp_path / "artifacts")))
    fixed = [trial.system_attrs["fixed_params"] for trial in found.optuna_study.get_trials()]
    assert fixed == [{"hidden_size": 16}, {"hidden_size": 32}]


@pytest.mark.parametrize("data", ["validation = { folds = 100 }", "holdout = 0.99"])
def test_data_that_cannot_be_split_leave_no_study_behind(
    opened: Callable[..., OpenStudy], storage: TrialStorage, data: str
) -> None:
    expected = r"waves\.npz: (data\.validation = .* cannot be had beside a test part|no test part can be set aside)"
    with pytest.raises(DataError, match=expected):
        opened(data=data)
    assert storage.get_all_studies() == []


def test_a_failed_trial_leaves_no_checkpoint(opened: Callable[..., OpenStudy], tmp_path: Path) -> None:
    study, store = opened(), artifact_store(str(tmp_path / "artifacts"))
    leases = study.leases
    lease = acquire(study)
    store.put("checkpoint-1", b"state")
    leases.checkpoint(lease, "checkpoint-1", 1)
    drop_spent_checkpoints(leases, store, study.study_id)
    assert store.exists("checkpoint-1")
    study.storage.finish_trial(lease.trial_id, TrialState.FAIL, None)
    drop_spent_checkpoints(leases, store, study.study_id)
    assert not store.exists("checkpoint-1")


def test_a_stopped_study_ends_its_trial_and_a_signal_the_worker(
    opened: Callable[..., OpenStudy], tmp_path: Path
) -> None:
    study, store, stop = opened(study="lease = 1"), artifact_store(str(tmp_path / "artifacts")), threading.Event()
    resources = WorkerResources("tester", "cpu", store, Datasets(store), SharedExclusiveLock(), stop)
    sequences = resources.datasets.get(study.plan.train)
    leases = study.leases
    with leases.take(study.study_id, "tester", "cpu") as lease:
        assert lease is not None
        context = TrialContext(study, lease, resources, sequences)
        assert context.stop_reason is None
        leases.stop(study.study_id)
        wait_for(lambda: context.stop_reason is not None, 30)
        assert context.stop_reason is StopReason.STUDY_STOPPED
        assert not stop.is_set()
    leases.reopen(study.study_id)
    with leases.take(study.study_id, "tester", "cpu") as lease:
        assert lease is not None
        context = TrialContext(study, lease, resources, sequences)
        assert context.stop_reason is None
        stop.set()
        assert context.stop_reason is StopReason.WORKER_STOPS


def test_class_names_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    classes = ("[/]", "[bold]b")
    show_predictions(Predictions(classes, np.full((1, 2), 0.5, np.float32), np.array(["[/]"]), ("[red]1",)))
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("p([/])", "p([bold]b)", "[red]1"))


def test_a_class_of_one_is_refused(opened: Callable[..., OpenStudy], tmp_path: Path) -> None:
    opened()
    np.savez(tmp_path / "waves.npz", X=np.ones((20, 8, 2)), y=np.zeros(20))
    with pytest.raises(DataError, match="one class"):
        opened(study="seed = 1")


def test_a_study_of_earlier_rules_goes_on_with_its_own_parts(
    storage: TrialStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its test part lacks the rare class, which a new study's holds: the same file must still be the same study."""
    store = artifact_store(str(tmp_path / "artifacts"))
    y = np.where(np.isin(np.arange(300), (3, 130, 250)), "yes", "no")
    np.savez(tmp_path / "rare.npz", X=np.random.default_rng(0).normal(size=(300, 6, 1)), y=y)
    config = load(tmp_path / "rare.npz", ["study.seed=1"])
    with monkeypatch.context() as patch:
        patch.setattr("hpo.study.lifecycle.make_plan", lambda config, rules=1: make_plan(config, rules))
        begun = create_or_open(config, storage, store).plan
    assert begun.rules == 1
    assert create_or_open(config, storage, store).plan == begun
    assert make_plan(config)[0].train != begun.train
