"""The begin of finals, by whoever holds the study's promotion and may die at any moment of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hpo.errors import HpoError
from hpo.storage.artifacts import artifact_store
from hpo.storage.leases import Leases
from hpo.storage.trials import TrialStorage
from hpo.study.config import StudyConfig, load
from hpo.study.finals import finalists_of, prepare_finals
from hpo.study.lifecycle import OpenStudy, create_or_open, delete_study, search_time
from hpo.study.record import TrialRecord


@pytest.fixture
def config(study_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StudyConfig:
    monkeypatch.setenv("HPO_ARTIFACTS", str(tmp_path / "artifacts"))
    return load(study_file(trials=3, study="finalists = 2\nrepeats = 2"))


def with_trials(config: StudyConfig, storage: TrialStorage, *values: float) -> OpenStudy:
    """The study after trials of these values, as a worker records them."""
    from optuna.trial import TrialState

    study = create_or_open(config, storage, artifact_store())
    for value in values:
        lease = study.leases.acquire(study.study_id, "worker-1")
        assert lease is not None
        params = study.sampler.parameters(lease.trial_id)
        record = TrialRecord(lease.trial_id, lease.number, value, True, lease.number, params=params, log_loss=0.3)
        storage.finish_trial(lease.trial_id, TrialState.COMPLETE, [value], record.attributes())
        study.leases.release(lease)
    return study


class Killed(HpoError):
    """Here the process dies."""


def test_whoever_comes_next_goes_on_with_what_was_begun(
    config: StudyConfig, storage: TrialStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = with_trials(config, storage, 0.5, 0.9, 0.7)

    def dies(*_: Any, **__: Any) -> Any:
        raise Killed

    for owner, name in (
        (TrialStorage, "create_new_study"),
        (TrialStorage, "set_study_system_attr"),
        (Leases, "open_study"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, dies)
            with pytest.raises(Killed):
                prepare_finals(study)
    begun = prepare_finals(study)
    assert begun is not None
    assert [(final.trial, final.repeat) for final in begun.plan.finals] == [(1, 1), (2, 1), (1, 2), (2, 2)]
    assert [final.params for final in begun.plan.finals[:2]] == [each.params for each in study.best_first()[:2]]
    row = study.leases.finals(study.study_id)
    assert row is not None
    assert (row.study_id, row.name, row.over) == (begun.study_id, "waves/finals", False)
    terms = study.leases.study(begun.study_id)
    assert terms is not None
    assert (terms.budget, terms.started, terms.status) == (4, 0, "open")
    again = prepare_finals(study)
    assert again is not None
    assert again.plan == begun.plan


def test_their_trials_are_what_the_plan_says_in_its_order(config: StudyConfig, storage: TrialStorage) -> None:
    study = with_trials(config, storage, 0.5, 0.9, 0.7)
    finals = prepare_finals(study)
    assert finals is not None
    for final in finals.plan.finals:
        lease = finals.leases.acquire(finals.study_id, "worker-1")
        assert lease is not None
        assert finals.sampler.parameters(lease.trial_id) == final.params
        assert finals.sampler.parameters(lease.trial_id) == final.params  # of an adopted one
        assert not finals.sampler.exhausted()
        assert not finals.should_prune(lease.trial_id)
    assert finalists_of(study) == []


def test_without_a_complete_trial_or_a_wish_there_are_none(config: StudyConfig, storage: TrialStorage) -> None:
    assert prepare_finals(with_trials(config, storage)) is None
    none = replace(config, study=replace(config.study, name="none", finalists=0))
    assert prepare_finals(with_trials(none, storage, 0.5, 0.6)) is None


def test_a_file_that_names_no_number_leaves_it_as_the_study_began(config: StudyConfig, storage: TrialStorage) -> None:
    def finalists(trials: int, number: int | None = None) -> int:
        study = replace(config.study, trials=trials, repeats=3, finalists=number)
        opened = create_or_open(replace(config, study=study), storage, artifact_store())
        row = opened.leases.study(opened.study_id)
        assert row is not None
        return row.finalists

    assert finalists(24) == 2
    assert finalists(99) == 2
    assert finalists(99, 0) == 0
    assert finalists(99) == 0
    assert finalists(99, 5) == 5


def test_equal_configurations_are_one_finalist(config: StudyConfig, storage: TrialStorage) -> None:
    fixed = replace(config, space={**config.space, "hidden_size": 8}, study=replace(config.study, name="fixed"))
    study = with_trials(fixed, storage, 0.5, 0.9, 0.7)
    distinct = {str(each.params) for each in study.best_first()}
    finals = prepare_finals(study)
    assert finals is not None
    assert len({str(final.params) for final in finals.plan.finals}) == min(2, len(distinct))


def test_a_study_of_limited_time_keeps_a_share_for_them(config: StudyConfig, storage: TrialStorage) -> None:
    timed = replace(config, study=replace(config.study, timeout_s=400.0))
    study = with_trials(timed, storage, 0.5, 0.9, 0.7)
    row = study.leases.study(study.study_id)
    assert row is not None
    assert row.timeout_s == search_time(timed) == 300.0
    finals = prepare_finals(study)
    assert finals is not None
    own = study.leases.study(finals.study_id)
    assert own is not None
    assert own.timeout_s is not None
    assert 100.0 <= own.timeout_s <= 400.0


def test_they_stop_go_on_and_end_with_their_study(config: StudyConfig, storage: TrialStorage) -> None:
    study = with_trials(config, storage, 0.5, 0.9, 0.7)
    finals = prepare_finals(study)
    assert finals is not None

    def status() -> tuple[str, ...]:
        rows = [study.leases.study(each) for each in (study.study_id, finals.study_id)]
        return tuple("" if row is None else row.status for row in rows)

    study.leases.share(study.study_id, priority=3, max_workers=1)
    terms = study.leases.study(finals.study_id)
    assert terms is not None
    assert (terms.priority, terms.max_workers) == (3, 1)
    study.leases.stop(study.study_id)
    assert status() == ("stopped", "stopped")
    study.leases.reopen(study.study_id)
    assert status() == ("open", "open")
    with study.leases.promotion(study.study_id, "worker-1") as ours:
        assert ours
    study.leases.finish_promotion(study.study_id, "worker-1", None)
    assert status() == ("finished", "finished")
    delete_study(storage, artifact_store(), "waves")
    assert status() == ("", "")


def test_lists_show_them_with_their_study(config: StudyConfig, storage: TrialStorage) -> None:
    study = with_trials(config, storage, 0.5, 0.9, 0.7)
    assert study.leases.snapshot(study.study_id).finals is None
    finals = prepare_finals(study)
    assert finals is not None
    (shown,) = study.leases.snapshots(study.leases.study_ids())
    assert shown.finals is not None
    assert (shown.finals.name, shown.finals.ended, shown.finals.budget) == ("waves/finals", 0, 4)
    assert study.leases.snapshot(finals.study_id).finals is None
