"""Trials that are not to count: left out by sampler, pruner, ranking and promotion; kept as they are; restored."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from optuna.trial import TrialState

from hpo.dashboard.study_json import DROPPED, StudyJson
from hpo.storage.artifacts import artifact_store
from hpo.storage.changes import ReasonError, UnfinishedTrial, drop, dropped, restore
from hpo.storage.errors import LeaseLost, MissingRecord
from hpo.storage.leases import Leases
from hpo.storage.registry import Registry
from hpo.storage.trials import TrialStorage, trial_storage
from hpo.study.config import load
from hpo.study.lifecycle import OpenStudy, create_or_open, open_study
from tests.proxy import proxied

SPACE = """
normalization = "none"
bidirectional = false
pooling = "mean"
difference = false
stem = "none"
label_smoothing = 0.0
mixup = 0.0
jitter = 0.0
skip = false
head_size = 0
dropout = 0.0
batch_size = 16
optimizer = "adamw"
learning_rate = 0.01
weight_decay = 0.0
schedule = "constant"
layers = 1
"""


@pytest.fixture
def opened(storage: TrialStorage, tmp_path: Path) -> Callable[..., OpenStudy]:
    """opened(space="hidden_size = [4, 8]", study="trials = 20") over a small npz file, in this test's database."""
    random = np.random.default_rng(0)
    np.savez(tmp_path / "waves.npz", X=random.normal(size=(60, 8, 2)), y=np.arange(60) % 2)

    def made(space: str = "hidden_size = [4, 8]", study: str = "", name: str = "waves", rest: str = SPACE) -> OpenStudy:
        text = f'[study]\nname = "{name}"\n{study}\n[data]\ntrain = "waves.npz"\n[space]\n{rest}{space}\n'
        (tmp_path / "waves.toml").write_text(text)
        return create_or_open(load(tmp_path / "waves.toml"), storage, artifact_store(str(tmp_path / "artifacts")))

    return made


def run(study: OpenStudy, value: float | None = None, state: TrialState = TrialState.COMPLETE) -> dict[str, Any]:
    """Take, draw and end a trial as a worker does; worth its hidden size where nothing is said."""
    lease = study.leases.acquire(study.study_id, "tester", "cpu")
    assert lease is not None
    params = study.sampler.parameters(lease.trial_id)
    value = float(params["hidden_size"]) if value is None else value
    values = [value] if state == TrialState.COMPLETE else None
    study.storage.finish_trial(lease.trial_id, state, values, {"seed": 0, "params": params, "log_loss": 1.0})
    return params


def test_a_dropped_trial_is_neither_ranked_nor_shown_as_the_best_and_keeps_its_record(
    opened: Callable[..., OpenStudy],
) -> None:
    study = opened("hidden_size = { low = 4, high = 64 }", 'sampler = "random"')
    for value in (0.7, 0.9, 0.8):
        run(study, value)
    before = study.storage.get_all_trials(study.study_id)
    drop(study.storage, study.study_id, [1], "wrong file", "ada")
    assert [record.number for record in study.best_first()] == [2, 0]
    shown = study.leases.snapshot(study.study_id)
    assert (shown.best_number, shown.best_value) == (2, 0.8)
    assert (shown.counts["complete"], shown.started) == (3, 3)  # it stays in the budget
    (found,) = shown.dropped
    assert (found.number, found.reason, found.by) == (1, "wrong file", "ada")
    assert dropped(study.storage, study.study_id) == {1: found}
    fresh = trial_storage(study.storage.url)
    assert fresh.get_all_trials(study.study_id) == before
    fresh.close()
    restore(study.storage, study.study_id, [1], "ada")
    assert [record.number for record in study.best_first()] == [1, 2, 0]
    shown = study.leases.snapshot(study.study_id)
    assert (shown.best_number, shown.dropped) == (1, ())


def test_the_dashboard_shows_it_with_its_reason_and_another_best(opened: Callable[..., OpenStudy]) -> None:
    study = opened("hidden_size = { low = 4, high = 64 }", 'sampler = "random"')
    for value in (0.7, 0.9):
        run(study, value)
    served = StudyJson(study.storage)

    def look() -> tuple[list[int], dict[str, str]]:
        answer = json.loads(served.study(study.study_id, 0) or b"")
        attributes = {each["key"]: each["value"] for each in answer["trials"][1]["user_attrs"]}
        return [trial["number"] for trial in answer["best_trials"]], attributes

    assert look()[0] == [1]
    drop(study.storage, study.study_id, [1], "wrong file", "ada")
    best, attributes = look()
    assert best == [0]
    assert "wrong file (ada, " in attributes[DROPPED]
    restore(study.storage, study.study_id, [1], "ada")
    best, attributes = look()
    assert best == [1]
    assert DROPPED not in attributes


def test_all_or_none_are_dropped_and_only_what_has_ended(opened: Callable[..., OpenStudy]) -> None:
    study = opened("hidden_size = [4, 8, 12, 16]", 'sampler = "random"')
    run(study)
    lease = study.leases.acquire(study.study_id, "tester", "cpu")
    assert lease is not None
    refused = "only a trial that has ended can be dropped or restored, and trial 1 is running.*nothing was changed"
    with pytest.raises(UnfinishedTrial, match=refused):
        drop(study.storage, study.study_id, [0, 1], "why", "ada")
    with pytest.raises(UnfinishedTrial, match=refused):
        restore(study.storage, study.study_id, [1], "ada")
    with pytest.raises(MissingRecord, match="the study has trials 0 to 1, not 17; nothing was changed"):
        drop(study.storage, study.study_id, [0, 17], "why", "ada")
    with pytest.raises(MissingRecord, match="no study has the id 4711"):
        drop(study.storage, 4711, [0], "why", "ada")
    for reason in (" ", "x" * 501, "a\0b"):
        with pytest.raises(ReasonError, match="say why in 1 to 500 characters"):
            drop(study.storage, study.study_id, [0], reason, "ada")
    assert dropped(study.storage, study.study_id) == {}


def test_twice_is_like_once(opened: Callable[..., OpenStudy]) -> None:
    study = opened()
    run(study)
    for reason in ("first", "second"):
        drop(study.storage, study.study_id, [0, 0], reason, "ada")
    assert dropped(study.storage, study.study_id)[0].reason == "first"
    for _ in range(2):
        restore(study.storage, study.study_id, [0], "ada")
    rows = study.storage.session.execute("SELECT what, detail, changed_by FROM hpo.changes ORDER BY change")
    assert rows == [("drop", {"trials": [0], "reason": "first"}, "ada"), ("restore", {"trials": [0]}, "ada")]


def test_a_call_whose_answer_is_lost_happens_once(opened: Callable[..., OpenStudy]) -> None:
    study = opened()
    run(study)
    with proxied(study.storage.url) as (proxy, url):
        far = trial_storage(url)
        changes: list[tuple[Callable[[int], None], Callable[[], None]]] = [
            (proxy.lose_answer, lambda: drop(far, study.study_id, [0], "why", "ada")),
            (proxy.lose_answer, lambda: restore(far, study.study_id, [0], "ada")),
            (proxy.refuse, lambda: drop(far, study.study_id, [0], "why", "ada")),
        ]
        for count, (fault, change) in enumerate(changes, 1):
            fault(1)
            change()
            assert study.storage.session.execute("SELECT count(*) FROM hpo.changes") == [(count,)]
        far.close()
    assert list(dropped(study.storage, study.study_id)) == [0]


def test_a_dropped_configuration_may_be_drawn_again(opened: Callable[..., OpenStudy]) -> None:
    """Of a space of two, the sampler has had both: the dropped one is what is left."""
    study = opened(study='sampler = "random"\ntrials = 9')
    sizes = [run(study)["hidden_size"] for _ in range(2)]
    assert study.sampler.exhausted()
    drop(study.storage, study.study_id, [0], "wrong", "ada")
    assert not study.sampler.exhausted()
    assert run(study)["hidden_size"] == sizes[0]
    assert study.sampler.exhausted()


def test_the_sampler_of_another_worker_sees_it_at_its_next_draw(
    opened: Callable[..., OpenStudy], elsewhere: Leases
) -> None:
    """With it, and without it, TPE draws what it draws where the trial was never, or always, there."""
    study = opened("hidden_size = { low = 4, high = 512, log = true }", "trials = 40")
    for number in range(14):
        run(study, 1.0 if number == 3 else 0.1 * number / 14)
    other = open_study("waves", elsewhere.storage)

    def draws() -> list[float]:
        """What the other worker's sampler would draw for trial 14, with nothing recorded."""
        other.sampler._had()
        return [float(other.sampler._draw(frozen, {}, attempt)["hidden_size"][0]) for attempt in range(5)]

    lease = elsewhere.acquire(other.study_id, "other", "cpu")
    assert lease is not None
    frozen = elsewhere.storage.get_trial(lease.trial_id)
    with_it = draws()
    drop(study.storage, study.study_id, [3], "wrong", "ada")
    without_it = draws()
    assert without_it != with_it
    restore(study.storage, study.study_id, [3], "ada")
    assert draws() == with_it


@pytest.mark.parametrize("pruner", ["median", "halving", "hyperband"])
def test_its_curve_is_not_what_others_are_compared_with(opened: Callable[..., OpenStudy], pruner: str) -> None:
    """Good curves prune a poorer trial; with the good ones dropped it is the best there is."""
    study = opened("hidden_size = { low = 4, high = 64 }", f'sampler = "random"\npruner = "{pruner}"\ntrials = 99')
    for value in (0.5,) * 6 + (0.9,) * 24:
        lease = study.leases.acquire(study.study_id, "tester", "cpu")
        assert lease is not None
        study.sampler.parameters(lease.trial_id)
        for epoch in range(1, 30):
            study.storage.set_trial_intermediate_value(lease.trial_id, epoch, value)
            study.should_prune(lease.trial_id)
        study.storage.finish_trial(lease.trial_id, TrialState.COMPLETE, [value], {"seed": 0})

    def pruned() -> bool:
        """Whether a further trial is pruned."""
        lease = study.leases.acquire(study.study_id, "tester", "cpu")
        assert lease is not None
        asked = []
        for epoch in range(1, 30):
            study.storage.set_trial_intermediate_value(lease.trial_id, epoch, 0.6)
            asked.append(study.should_prune(lease.trial_id))
        study.storage.finish_trial(lease.trial_id, TrialState.FAIL, None)
        return any(asked)

    assert pruned()
    good = list(range(6, 30))
    drop(study.storage, study.study_id, good, "another metric", "ada")
    assert not pruned()
    restore(study.storage, study.study_id, good, "ada")
    assert pruned()


def test_cmaes_goes_on_from_what_it_had_learnt_before(opened: Callable[..., OpenStudy]) -> None:
    space = "hidden_size = { low = 4, high = 512 }\nsequence_length = { low = 2, high = 8 }"
    study = opened(space, 'sampler = "cmaes"\ntrials = 99')
    for _ in range(24):
        run(study)
    kept = [t.number for t in study.optuna_study.trials if any(k.startswith("cma:opt") for k in t.system_attrs)]
    assert kept
    drop(study.storage, study.study_id, [kept[-1] - 1], "wrong", "ada")
    left = [t.number for t in study.optuna_study.trials if any(k.startswith("cma:opt") for k in t.system_attrs)]
    assert left == kept[:-1]
    assert 4 <= run(study)["hidden_size"] <= 512


def test_a_study_that_learns_from_another_copies_none_of_its_dropped_trials(opened: Callable[..., OpenStudy]) -> None:
    first = opened("hidden_size = [4, 8]", 'sampler = "random"', name="first")
    for _ in range(2):
        run(first)
    drop(first.storage, first.study_id, [0], "wrong", "ada")
    second = opened("hidden_size = [4, 8]", 'sampler = "random"\nwarm_start = "first"', name="second")
    (copied,) = second.storage.get_all_trials(second.study_id)
    assert copied.user_attrs == {"copied_from": "first/1"}


def test_a_study_learns_from_what_another_had_fixed_or_still_drew(opened: Callable[..., OpenStudy]) -> None:
    first = opened("hidden_size = [4, 8, 16]", 'sampler = "random"', name="first")
    sizes = [run(first)["hidden_size"] for _ in range(6)]
    drawing = SPACE.replace("layers = 1", "layers = [1, 2]").replace("skip = false", "skip = [false, true]")
    study = 'sampler = "random"\nwarm_start = "first"'
    wider = opened("hidden_size = [4, 8, 16]", study, name="wider", rest=drawing)
    copied = [trial.params for trial in wider.storage.get_all_trials(wider.study_id)]
    assert copied == [{"hidden_size": size, "layers": 1, "skip": False} for size in sizes]
    narrower = opened("hidden_size = 8", study, name="narrower")
    assert len(narrower.storage.get_all_trials(narrower.study_id)) == sizes.count(8)
    without = SPACE.replace("layers = 1", "layers = [2, 3]")
    elsewhere = opened("hidden_size = [4, 8, 16]", study, name="elsewhere", rest=without)
    assert elsewhere.storage.get_all_trials(elsewhere.study_id) == []


def test_many_drop_and_restore_at_once_while_trials_run(opened: Callable[..., OpenStudy]) -> None:
    study = opened("hidden_size = { low = 4, high = 512 }", 'sampler = "random"\ntrials = 30')
    for _ in range(10):
        run(study)

    def change(number: int) -> None:
        storage = trial_storage(study.storage.url)
        for _ in range(5):
            drop(storage, study.study_id, [number], "why", f"client {number}")
            restore(storage, study.study_id, [number], f"client {number}")
        drop(storage, study.study_id, [number], "why", f"client {number}")
        storage.close()

    with ThreadPoolExecutor(4) as pool:
        work = [pool.submit(change, number) for number in (0, 1, 2, 2, 3)]
        for _ in range(10):
            run(study)
        for each in work:
            each.result()
    assert sorted(dropped(study.storage, study.study_id)) == [0, 1, 2, 3]
    assert study.leases.snapshot(study.study_id).counts["complete"] == 20


def test_a_study_is_deleted_with_its_changes(opened: Callable[..., OpenStudy]) -> None:
    study = opened()
    run(study)
    drop(study.storage, study.study_id, [0], "why", "ada")
    study.storage.delete_study(study.study_id)
    rows = study.storage.session.execute(
        "SELECT (SELECT count(*) FROM hpo.dropped), (SELECT count(*) FROM hpo.changes)"
    )
    assert rows == [(0, 0)]


def test_a_trial_that_is_dropped_while_it_is_promoted_does_not_become_the_studys_model(
    opened: Callable[..., OpenStudy],
) -> None:
    study = opened("hidden_size = { low = 4, high = 64 }", 'sampler = "random"\ntrials = 2')
    for value in (0.9, 0.8):
        run(study, value)
    registry, leases = Registry(study.storage.connection), study.leases
    assert leases.acquire_promotion(study.study_id, "tester")
    given: dict[str, Any] = {"study_id": study.study_id, "study_name": "waves", "scores": {}, "config": {}}
    registry.promote("waves", trial_number=0, artifacts={"a": "0"}, **given)
    drop(study.storage, study.study_id, [0], "wrong", "ada")
    with pytest.raises(LeaseLost, match="or its trial was dropped meanwhile"):
        leases.finish_promotion(study.study_id, "tester", 1)
    assert leases.acquire_promotion(study.study_id, "tester")
    registry.promote("waves", trial_number=1, artifacts={"a": "1"}, **given)
    leases.finish_promotion(study.study_id, "tester", 2)
    leases.finish_promotion(study.study_id, "tester", 2)  # its answer was lost
    shown = leases.snapshot(study.study_id)
    assert (shown.status, shown.promoted_version, shown.dropped_winner) == ("finished", 2, None)
    leases.promote_again(study.study_id, 1)  # its own version counts
    assert leases.snapshot(study.study_id).promoted_version == 2
    drop(study.storage, study.study_id, [1], "wrong", "ada")
    assert leases.snapshot(study.study_id).dropped_winner == 1
    leases.promote_again(study.study_id, 1)
    assert leases.snapshot(study.study_id).promoted_version == 1
