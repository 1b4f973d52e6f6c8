"""A study that ends when its trials bring nothing more: which trials count, exactly when, and what lets it go on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from optuna.trial import TrialState, create_trial

from hpo.storage.changes import drop, restore
from hpo.storage.errors import StudyOver
from hpo.storage.leases import Lease, Leases
from hpo.storage.terms import Judgement, Patience, Standstill
from hpo.storage.trials import trial_storage
from hpo.study.config import from_dict, to_dict
from hpo.study.lifecycle import OpenStudy, open_study
from tests.conftest import execute
from tests.postgres.test_dropped import opened  # noqa: F401 - a fixture

WIDE = "hidden_size = { low = 4, high = 64 }"
Opened = Callable[..., OpenStudy]


def begin(study: OpenStudy, worker: str = "tester") -> Lease | None:
    """Take a trial as a worker does. Raises StudyOver."""
    return study.leases.acquire(study.study_id, worker, "cpu", judge=study.judge)


def end(study: OpenStudy, lease: Lease | None, value: float | None, state: str = "COMPLETE") -> int:
    """End a trial as a worker does; its number."""
    assert lease is not None
    attributes = {"failure": "why"} if value is None else {"seed": 0, "params": {}, "log_loss": 1.0}
    values = None if value is None else [value]
    study.storage.finish_trial(lease.trial_id, TrialState[state], values, attributes)
    return lease.number


def run(study: OpenStudy, *values: float) -> None:
    for value in values:
        end(study, begin(study), value)


def over(study: OpenStudy) -> Standstill | None:
    """What the study ended by, where it starts nothing more; None where it takes another trial, which then fails."""
    state = study.leases.snapshot(study.study_id)
    try:
        lease = begin(study)
    except StudyOver as ended:
        return study.leases.snapshot(study.study_id).standstill if ended.reason == "patience" else None
    end(study, lease, None, "FAIL")
    assert study.leases.snapshot(study.study_id).started == state.started + 1
    return None


def patient(made: Opened, trials: int = 3, study: str = "trials = 30", rest: str = "") -> OpenStudy:
    """A study over a space that is never exhausted; random, so that no portfolio comes first."""
    return made(WIDE, f'sampler = "random"\nmetric = "accuracy"\npatience = {trials}\n{study}\n{rest}')


def test_it_ends_after_so_many_trials_in_a_row_that_bring_nothing(opened: Opened) -> None:  # noqa: F811
    study = patient(opened)
    run(study, 0.5, 0.5, 0.4, 0.6, 0.6 + 0.9 * study.plan.resolution, 0.5)
    assert study.leases.snapshot(study.study_id).status == "open"
    run(study, 0.1)
    assert over(study) == Standstill(since=3, trials=3)
    state = study.leases.snapshot(study.study_id)
    assert (state.status, state.patience, state.started) == ("exhausted", 3, 7)
    assert state.standstill is not None
    assert state.standstill.said == "3 trials in a row brought nothing better than trial 3"


def test_small_gains_add_up_to_one_that_can_be_told_apart(opened: Opened) -> None:  # noqa: F811
    study = patient(opened, 2)
    run(study, *[0.5 + gains * 0.6 * study.plan.resolution for gains in range(4)])  # each equals the one before
    assert over(study) is None
    run(study, 0.5)
    assert over(study) == Standstill(2, 2)
    study = opened(WIDE, 'sampler = "random"\nmetric = "log_loss"\npatience = 2\ntrials = 9', name="loss")
    run(study, 0.5, 0.5 - 1e-9, 0.4, 0.4, 0.4)  # log-loss is never rounded, and less of it is better
    assert over(study) == Standstill(2, 2)


def test_pruned_trials_count_and_failed_and_copied_and_other_programs_do_not(opened: Opened) -> None:  # noqa: F811
    study = patient(opened)
    run(study, 0.5)
    for number in range(3):
        end(study, begin(study), None, "FAIL")
        foreign = create_trial(value=0.9, user_attrs={"copied_from": f"other/{number}"})
        study.storage.create_new_trial(study.study_id, foreign)
    end(study, begin(study), 0.9, "PRUNED")  # what a pruned trial had reached is no best value
    end(study, begin(study), 0.2, "PRUNED")
    assert over(study) is None
    run(study, 0.4)
    assert over(study) == Standstill(0, 3)


def test_without_a_complete_trial_nothing_ends(opened: Opened) -> None:  # noqa: F811
    study = patient(opened, 1)
    for _ in range(4):
        end(study, begin(study), 0.5, "PRUNED")
    assert over(study) is None


def test_trials_count_in_the_order_of_their_ends(opened: Opened) -> None:  # noqa: F811
    study = patient(opened, 2)
    long = begin(study)
    run(study, 0.5, 0.4)
    assert end(study, long, 0.9) == 0  # the best so far ends last: those after it have not built on it
    assert over(study) is None
    run(study, 0.4, 0.4)
    assert over(study) == Standstill(0, 2)


def test_a_trial_that_began_before_is_waited_for_and_one_that_began_after_is_not_lost(opened: Opened) -> None:  # noqa: F811
    study = patient(opened, 2)
    run(study, 0.5)
    long = begin(study, "slow")
    run(study, 0.4, 0.4, 0.4)  # it may be pruned ones that end so soon
    young = begin(study, "young")
    end(study, long, 0.4)
    assert begin(study) is None  # over, but for the one that is at work
    assert study.leases.snapshot(study.study_id).standstill == Standstill(0, 4)
    end(study, young, 0.8)
    assert over(study) == Standstill(0, 4)  # what ended it stays
    assert study.best_first()[0].number == 5  # and the last one counts
    assert study.leases.acquire_promotion(study.study_id, "tester")


def test_what_is_enqueued_and_the_portfolio_come_first(opened: Opened) -> None:  # noqa: F811
    study = patient(opened, 1)
    run(study, 0.5, 0.4)
    study.optuna_study.enqueue_trial({"hidden_size": 5})
    run(study, 0.4)
    assert study.storage.get_all_trials(study.study_id)[2].params == {}  # it was the one that was waiting
    assert over(study) == Standstill(0, 2)
    space = 'hidden_size = [16, 64]\nstem = ["conv", "none"]\nstem_kernel = [5, 7]\nmixup = [0.0, 0.2]\n'
    loose = 'normalization = "channel"\nlayers = 1\nhead_size = 0\ndropout = 0.0'
    study = opened(space, "patience = 1\ntrials = 16", name="first", rest=loose + "\n")
    run(study, 0.5, 0.4, 0.4)  # of four that are not drawn
    assert over(study) is None
    run(study, 0.4)
    assert over(study) == Standstill(0, 3)


def test_dropped_trials_are_as_if_they_had_not_been(opened: Opened) -> None:  # noqa: F811
    study = patient(opened, 2)
    run(study, 0.5, 0.9, 0.6, 0.6)
    drop(study.storage, study.study_id, [1], "wrong file", "ada")
    assert over(study) is None  # trial 2 is the last that brought something
    restore(study.storage, study.study_id, [1], "ada")
    assert over(study) == Standstill(1, 2)
    drop(study.storage, study.study_id, [1], "wrong file", "ada")
    assert over(study) == Standstill(1, 2)  # over is over


@pytest.mark.parametrize("change", ["a trial ends", "a trial is dropped", "the patience"])
def test_nothing_is_started_by_a_judgement_that_is_overtaken(opened: Opened, change: str) -> None:  # noqa: F811
    study = patient(opened, 2)
    run(study, 0.5, 0.6, 0.4) if change != "a trial is dropped" else run(study, 0.9, 0.5, 0.95, 0.5)
    other = begin(study, "other") if change == "a trial ends" else None
    asked: list[Judgement] = []

    def judge(patience: Patience) -> Judgement:
        found = study.judge(patience)
        if not asked:  # after it has looked, and before a trial is taken
            assert found.standstill is None
            if change == "a trial ends":
                end(study, other, 0.4)
            elif change == "a trial is dropped":
                drop(study.storage, study.study_id, [2], "why", "ada")
            else:
                study.leases.reopen(study.study_id, patience=1)
        asked.append(found)
        return found

    started = study.leases.snapshot(study.study_id).started
    with pytest.raises(StudyOver) as raised:
        study.leases.acquire(study.study_id, "tester", "cpu", judge=judge)
    assert raised.value.reason == "patience"
    assert (len(asked), study.leases.snapshot(study.study_id).started) == (2, started)


# Looks at what the statement that starts a trial sees: of the trials that ended after trial 0, the best, four of whose
# numbers none is at work, must not be there.
EXACT = """
CREATE FUNCTION exact() RETURNS trigger LANGUAGE plpgsql STABLE AS $$
DECLARE last int := (SELECT t.number FROM trials t JOIN trials best ON best.number = 0
    WHERE t.state = 'COMPLETE' AND t.datetime_complete > best.datetime_complete ORDER BY t.number OFFSET 3 LIMIT 1);
BEGIN
    IF last IS NOT NULL AND NOT EXISTS (SELECT FROM trials t WHERE t.state = 'RUNNING' AND t.number <= last) THEN
        RAISE EXCEPTION 'it has ended, and a trial is started';
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER exact BEFORE INSERT ON trials FOR EACH ROW EXECUTE FUNCTION exact();
"""


@pytest.mark.parametrize("workers", [2, 6])
def test_workers_that_race_start_nothing_after_it_has_ended(opened: Opened, workers: int) -> None:  # noqa: F811
    study = patient(opened, 4, "trials = 4000")
    execute(study.storage.url, EXACT)
    failures: list[BaseException] = []

    def work(index: int) -> None:
        storage = trial_storage(study.storage.url)
        try:
            mine, leases = open_study("waves", storage), Leases(storage)
            while True:
                lease = leases.acquire(mine.study_id, f"worker-{index}", "cpu", judge=mine.judge)
                if lease is not None:
                    end(mine, lease, 0.5 if lease.number else 0.9)
        except StudyOver:
            pass
        except BaseException as error:
            failures.append(error)
        finally:
            storage.close()

    threads = [threading.Thread(target=work, args=(index,)) for index in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    state = study.leases.snapshot(study.study_id)
    assert state.standstill is not None
    assert (state.standstill.since, state.standstill.trials >= 4, state.status) == (0, True, "exhausted")
    assert state.counts["complete"] == state.started  # none is lost
    assert study.leases.acquire_promotion(study.study_id, "tester")


def test_what_lets_it_go_on_and_what_does_not(opened: Opened, caplog: pytest.LogCaptureFixture) -> None:  # noqa: F811
    study = patient(opened, 2)
    run(study, 0.5, 0.4, 0.4)
    assert over(study) == Standstill(0, 2)
    assert study.leases.acquire_promotion(study.study_id, "tester")
    study.leases.finish_promotion(study.study_id, "tester", 1)
    for same in ("trials = 30", "trials = 60"):  # the file as it is; more trials than would bring anything
        again = patient(opened, 2, same)
        assert over(again) == Standstill(0, 2)
        state = again.leases.snapshot(again.study_id)
        assert (state.status, state.promoted_version, state.budget) == ("finished", 1, int(same.split()[-1]))
        said = "over by its patience, as 2 trials in a row brought nothing better than trial 0; a larger study.patience"
        assert said in caplog.text
    more = patient(opened, 3)
    state = more.leases.snapshot(more.study_id)
    assert (state.status, state.patience, state.standstill, state.promoted_version) == ("open", 3, None, None)
    run(more, 0.4)
    assert over(more) == Standstill(0, 3)
    off = patient(opened, 0)
    assert off.leases.snapshot(off.study_id).patience is None
    run(off, *[0.4] * 5)
    assert over(off) is None
    assert over(patient(opened, 5)) == Standstill(0, 8)  # asked for again, it looks back


def test_a_wider_space_gets_the_whole_patience(opened: Opened) -> None:  # noqa: F811
    study = patient(opened, 2)
    run(study, 0.5, 0.4, 0.4)
    assert over(study) == Standstill(0, 2)
    given = 'sampler = "random"\nmetric = "accuracy"\npatience = 2\ntrials = 30'
    wider = opened("hidden_size = { low = 4, high = 80 }", given)
    assert wider.leases.snapshot(wider.study_id).status == "open"
    run(wider, 0.4)
    assert over(wider) is None
    run(wider, 0.4)
    assert over(wider) is not None


def test_a_study_that_was_stopped_at_its_end_ends_again(opened: Opened) -> None:  # noqa: F811
    study = patient(opened, 1)
    run(study, 0.5)
    young = begin(study)
    other = begin(study, "other")
    end(study, young, 0.4)
    assert begin(study) is None
    study.leases.stop(study.study_id)
    end(study, other, 0.4)
    assert over(patient(opened, 1)) == Standstill(0, 2)


def test_the_budget_and_the_time_end_it_by_their_own_names(opened: Opened) -> None:  # noqa: F811
    study = patient(opened, 1, "trials = 2")
    run(study, 0.5, 0.4)
    with pytest.raises(StudyOver, match="budget"):
        begin(study)
    assert study.leases.snapshot(study.study_id).standstill is None


def test_a_study_without_patience_asks_nobody(opened: Opened) -> None:  # noqa: F811
    study = opened(WIDE, 'sampler = "random"\ntrials = 30')
    lease = study.leases.acquire(study.study_id, "tester", judge=lambda _: pytest.fail("nobody asked"))
    assert lease is not None


def test_trials_of_a_patient_study_are_taken_with_a_judge(opened: Opened) -> None:  # noqa: F811
    study = patient(opened)
    with pytest.raises(ValueError, match="its trials are taken with a judge"):
        study.leases.acquire(study.study_id, "tester")


def test_zero_is_no_patience_and_earlier_plans_have_none(opened: Opened) -> None:  # noqa: F811
    config = opened().plan.config
    assert config.study.patience is None
    assert "patience" not in to_dict(config)["study"]
    stored: dict[str, Any] = to_dict(replace(config, study=replace(config.study, patience=7)))
    assert from_dict(stored).study.patience == 7
    assert from_dict({**stored, "study": {**stored["study"], "patience": 0}}).study.patience is None
