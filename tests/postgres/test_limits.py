"""[limits]: which trials may be promoted, what the sampler is told, and what happens when the limits change."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState, create_trial

from hpo.dashboard.study_json import StudyJson
from hpo.promote.summary import NoModel, summary_of
from hpo.storage.errors import StudyOver
from hpo.storage.leases import Leases
from hpo.storage.terms import Standstill
from hpo.storage.trials import trial_storage
from hpo.study.config import ConfigError
from hpo.study.finals import prepare_finals
from hpo.study.lifecycle import OpenStudy, all_trial_rows, open_study
from hpo.study.limits import size_of
from hpo.study.plan import StudyError
from hpo.study.record import TrialRecord
from tests.conftest import execute
from tests.postgres.test_dropped import opened  # noqa: F401 - a fixture

WIDE = "hidden_size = { low = 4, high = 64 }"
RANDOM = 'sampler = "random"\nmetric = "accuracy"\ntrials = 30\n'
Opened = Callable[..., OpenStudy]


def limited(limits: str = "", study: str = RANDOM, space: str = WIDE) -> tuple[str, str]:
    """Arguments of `opened`: a study with this table [limits]."""
    return f"{space}\n[limits]\n{limits}", study


def run(
    study: OpenStudy,
    value: float,
    size: float | None = None,
    latency: float | None = None,
    state: TrialState = TrialState.COMPLETE,
) -> int:
    """A trial as a worker takes, draws and ends it, with these figures; its number."""
    lease = study.leases.acquire(study.study_id, "tester", "cpu", judge=study.judge)
    assert lease is not None
    params = study.sampler.parameters(lease.trial_id)
    complete = state == TrialState.COMPLETE
    record = TrialRecord(lease.trial_id, lease.number, value, complete, 0, params, log_loss=1.0, latency_ms=latency)
    record = TrialRecord(**{**vars(record), "size_mb": size})
    given, constraints = record.attributes(), study.limits.constraints(record.attributes())
    study.storage.finish_trial(lease.trial_id, state, [value], given, constraints)
    return lease.number


def best(study: OpenStudy) -> list[int]:
    """Numbers of the trials that may be promoted, as every display agrees on the first of them."""
    found = [record.number for record in study.best_first()]
    state = study.leases.snapshot(study.study_id)
    shown = json.loads(StudyJson(study.storage).study(study.study_id, 0) or b"{}")["best_trials"]
    assert [state.best_number] if state.best else found[:1] == []
    assert [each["number"] for each in shown] == found[:1]
    return found


def test_a_trial_beyond_a_limit_is_neither_the_best_nor_a_finalist(opened: Opened) -> None:  # noqa: F811
    study = opened(*limited("size_mb = 0.5\nlatency_ms = 4", RANDOM + "finalists = 2\nrepeats = 1"))
    run(study, 0.9, 0.6, 1.0)
    run(study, 0.8, 0.5, 4.1)
    run(study, 0.7, 0.5, 4.0)
    run(study, 0.95, 0.5)  # its networks gave no probability
    run(study, 0.99, 0.1, 1.0, TrialState.PRUNED)
    run(study, 0.6, 0.1, 1.0)
    assert best(study) == [2, 5]
    assert [record.number for record in study.complete()] == [3, 0, 1, 2, 5]
    beyond = study.leases.snapshot(study.study_id).beyond
    assert beyond is not None
    assert (beyond.trials, beyond.limits) == (3, {"size_mb": 0.5, "latency_ms": 4.0})
    assert [row["feasible"] for row in all_trial_rows(study.storage, "waves")] == [False, False, True, None, True, True]
    study.leases.reopen(study.study_id, trials=1)
    finals = prepare_finals(study)
    assert finals is not None
    assert [final.trial for final in finals.plan.finals] == [2, 5]
    assert finals.limits.given == {}


def test_a_study_without_limits_has_none_beyond_them(opened: Opened) -> None:  # noqa: F811
    study = opened(WIDE, RANDOM)
    run(study, 0.9, 1e6, 1e6)
    run(study, 0.8)
    assert best(study) == [0, 1]
    assert study.leases.snapshot(study.study_id).beyond is None
    assert [row["feasible"] for row in all_trial_rows(study.storage, "waves")] == [None, None]
    assert study.none_within() is None
    assert study.optuna_study.get_trials()[0].constraints == {}


def test_a_study_of_an_earlier_version_goes_on_and_takes_a_limit(opened: Opened) -> None:  # noqa: F811
    study = opened(WIDE, RANDOM)
    run(study, 0.9)
    url = study.storage.url
    execute(url, "UPDATE hpo.terms SET config = config #- '{config,limits}' #- '{written,limits}'")
    assert best(opened(WIDE, RANDOM)) == [0]
    (row,) = study.storage.connection.execute("SELECT config ->> 'revision' FROM hpo.terms")
    assert row == ("0",)  # nothing has changed
    study = opened(*limited("size_mb = 0.5"))
    assert best(study) == []
    reason = study.none_within()
    assert reason is not None
    assert "as an earlier version did not measure what theirs take" in reason
    assert study.sampler.parameters(study.leases.acquire(study.study_id, "w", "cpu").trial_id)  # type: ignore[union-attr]


def test_limits_may_change_and_count_for_all_trials(opened: Opened) -> None:  # noqa: F811
    study = opened(*limited("size_mb = 0.5"))
    for value, size in ((0.9, 0.6), (0.8, 0.4), (0.7, 0.2)):
        run(study, value, size, 1.0)
    assert best(study) == [1, 2]
    assert best(opened(*limited("size_mb = 0.6"))) == [0, 1, 2]
    assert best(opened(*limited("size_mb = 0.3\nlatency_ms = 1"))) == [2]
    narrow = open_study("waves", study.storage)
    assert narrow.plan.revision == 2  # which workers that have it open look at
    assert {name: each.constraints for name, each in enumerate(narrow.optuna_study.get_trials())} == {
        0: {"latency_ms": 0.0, "size_mb": pytest.approx(1.0)},
        1: {"latency_ms": 0.0, "size_mb": pytest.approx(1 / 3)},
        2: {"latency_ms": 0.0, "size_mb": pytest.approx(-1 / 3)},
    }
    free = opened(WIDE, RANDOM)
    assert best(free) == [0, 1, 2]
    assert free.optuna_study.get_trials()[0].constraints == {}


def test_what_is_no_limit_changes_nothing(opened: Opened) -> None:  # noqa: F811
    study = opened(*limited("size_mb = 0.5"))
    with pytest.raises(ConfigError, match=r"limits.size_mb must be a finite number above 0, got -1"):
        opened(*limited("size_mb = -1"))
    with pytest.raises(StudyError, match="seed: stored"):
        opened(*limited("size_mb = 0.1", RANDOM + "seed = 7"))
    assert study.limits.given == {"size_mb": 0.5}


def test_a_finished_study_is_promoted_again_where_its_limits_changed(opened: Opened) -> None:  # noqa: F811
    one = RANDOM.replace("30", "1")
    study = opened(*limited("size_mb = 0.5", one))
    run(study, 0.9, 0.6, 1.0)
    assert study.leases.acquire_promotion(study.study_id, "tester")
    study.leases.finish_promotion(study.study_id, "tester", None)
    with pytest.raises(
        NoModel, match=r"ended without a model: no completed trial is within \[limits\] size_mb at most"
    ):
        summary_of(study)
    assert opened(*limited("size_mb = 0.5", one)).leases.snapshot(study.study_id).status == "finished"
    state = opened(*limited("size_mb = 0.7", one)).leases.snapshot(study.study_id)
    assert (state.status, state.best_number) == ("exhausted", 0)
    assert study.leases.acquire_promotion(study.study_id, "tester")


def test_a_trial_beyond_the_limits_brings_nothing_for_the_patience(opened: Opened) -> None:  # noqa: F811
    study = opened(*limited("size_mb = 0.5", RANDOM + "patience = 2"))
    for value, size in ((0.5, 0.4), (0.9, 0.6), (0.8, 0.6)):
        run(study, value, size, 1.0)
    with pytest.raises(StudyOver, match="patience"):
        study.leases.acquire(study.study_id, "tester", judge=study.judge)
    assert study.leases.snapshot(study.study_id).standstill == Standstill(0, 2)


def test_constraints_are_stored_with_the_end_of_a_trial_whoever_ends_it(opened: Opened) -> None:  # noqa: F811
    """Stock Optuna reads them: its `best_trial` is a feasible one."""
    study = opened(*limited("size_mb = 0.5"))

    def worker(number: int) -> None:
        with closing(trial_storage(study.storage.url)) as storage:
            own = open_study("waves", storage)
            for step in range(3):
                run(own, 0.5 + 0.1 * number, 0.2 * (number + 1), 1.0 + step)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(worker, range(4)))
    adopted = study.leases.acquire(study.study_id, "first", "cpu")
    assert adopted is not None
    params = study.sampler.parameters(adopted.trial_id)
    study.leases.release(adopted)
    with closing(trial_storage(study.storage.url)) as storage:
        again = Leases(storage).acquire(study.study_id, "second", "cpu")
        assert again is not None
        assert (again.number, again.attempt) == (adopted.number, 2)
        record = TrialRecord(again.trial_id, again.number, 0.1, True, 0, params, size_mb=1.0)
        given = record.attributes()
        storage.finish_trial(again.trial_id, TrialState.COMPLETE, [0.1], given, study.limits.constraints(given))
    rows = study.storage.connection.execute("SELECT trial_id, key, value_json FROM trial_system_attributes")
    assert len(rows) == len({trial for trial, _, _ in rows}) == 13
    assert {key for _, key, _ in rows} == {"constraints:size_mb"}
    stock = optuna.load_study(study_name="waves", storage=study.storage.url)
    figures: list[Mapping[str, Any]] = [trial.user_attrs for trial in stock.trials]
    assert [trial.constraints["size_mb"] for trial in stock.trials] == [each["size_mb"] / 0.5 - 1 for each in figures]
    assert stock.best_trial.user_attrs["size_mb"] == 0.4


@pytest.mark.parametrize("sampler", ["tpe", "gp"])
def test_the_sampler_learns_from_the_limits_that_the_study_has_now(opened: Opened, sampler: str) -> None:  # noqa: F811
    """All trials have the same constraints, copied ones and those of an earlier version too, or GP refuses them."""
    terms = f'sampler = "{sampler}"\nmetric = "accuracy"\ntrials = 99\n'
    study = opened(WIDE, terms)
    for trial in range(14):
        run(study, 0.5 + 0.01 * trial, None if trial % 2 else 0.1 * trial, 1.0)
    study.storage.create_new_trial(study.study_id, create_trial(value=0.5, user_attrs={"copied_from": "other/1"}))
    free = open_study("waves", study.storage)
    lease = study.leases.acquire(study.study_id, "tester", "cpu")
    assert lease is not None
    assert free.sampler.parameters(lease.trial_id)
    limit = opened(*limited("latency_ms = 1e-6", terms))
    ended = [trial for trial in limit.optuna_study.get_trials() if trial.state.is_finished()]
    assert {tuple(trial.constraints) for trial in ended} == {("latency_ms",)}
    run(limit, 0.5, 0.1, 1.0)


def test_what_is_too_large_is_drawn_again_and_only_what_was_queued_is_not(opened: Opened) -> None:  # noqa: F811
    study = opened(*limited("size_mb = 0.05", "trials = 40", "hidden_size = { low = 2, high = 64 }"), rest="")
    study.optuna_study.enqueue_trial({"hidden_size": 64})
    within = []
    for _ in range(20):
        lease = study.leases.acquire(study.study_id, "worker", "cpu")
        assert lease is not None
        params = study.sampler.parameters(lease.trial_id)
        within.append(size_of(study.plan, params) <= 0.05)
    assert within == [False, *[True] * 19]


def test_where_nothing_is_small_enough_a_finite_space_ends(opened: Opened) -> None:  # noqa: F811
    study = opened(*limited("size_mb = 1e-6", 'sampler = "grid"\ntrials = 9', "hidden_size = [4, 8]"))
    for _ in range(2):
        run(study, 0.5, 1.0, 1.0)
    assert study.sampler.exhausted()


def test_a_latency_that_the_sampler_does_not_learn_is_said(opened: Opened, caplog: pytest.LogCaptureFixture) -> None:  # noqa: F811
    said = 'waves: sampler "random" does not learn from limits.latency_ms: slower trials are drawn, and not promoted'
    with caplog.at_level("INFO", "hpo"):
        opened(*limited("latency_ms = 5\nsize_mb = 1"))
        assert caplog.messages.count(said) == 1
        opened(*limited("size_mb = 1"))
        opened(*limited("latency_ms = 5", 'sampler = "tpe"'), name="other")
    assert caplog.messages.count(said) == 1
