"""Budget, leases, adoption, fencing, promotion: with real processes, real kills and the database's clock."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing, suppress
from datetime import datetime, timedelta
from multiprocessing.process import BaseProcess
from typing import TypeVar

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.study import StudyDirection
from optuna.trial import TrialState

from hpo.errors import WorkerFault
from hpo.storage.errors import LeaseLost, StudyOver, TrialLeased
from hpo.storage.heartbeat import Progress
from hpo.storage.leases import Lease, Leases
from hpo.storage.snapshot import RECENT, WorkerGroup
from hpo.storage.terms import Terms
from hpo.storage.trials import trial_storage
from tests.conftest import execute

T = TypeVar("T")

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["hpo.storage.leases"])
SHORT_S = 1.0  # a lease for tests in which it runs out
PARAMS = {"x": (0.25, FloatDistribution(0, 1))}


def open_study(leases: Leases, terms: Terms, direction: StudyDirection = StudyDirection.MAXIMIZE) -> int:
    study = optuna.create_study(storage=leases.storage, direction=direction)
    leases.open_study(study._study_id, terms, {"seed": 0})
    return study._study_id


def until(look: Callable[[], T | None], patience_s: float = 60.0) -> T:
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        found = look()
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError("it did not happen")


def take(leases: Leases, study_id: int, worker: str) -> Lease:
    """A lease on the next trial, waiting for one to run out if need be."""
    return until(lambda: leases.acquire(study_id, worker))


def finish(leases: Leases, lease: Lease, value: float = 0.5) -> None:
    leases.storage.finish_trial(lease.trial_id, TrialState.COMPLETE, [value], {"seed": 0})


def start(work: Callable[..., None], *args: object) -> BaseProcess:
    process = PROCESSES.Process(target=work, args=args, daemon=True)
    process.start()
    return process


# -------------------------------------------------------------------------------------------------------------- budget


def run_all(url: str, study_id: int, worker: str) -> None:
    """A whole worker, without training."""
    leases = Leases(trial_storage(url))
    while True:
        try:
            lease = leases.acquire(study_id, worker)
        except StudyOver as over:
            sys.exit(0 if over.reason == "budget" else 1)
        if lease is None:
            time.sleep(0.01)
            continue
        leases.storage.set_trial_params(lease.trial_id, PARAMS)
        leases.storage.set_trial_intermediate_value(lease.trial_id, 0, lease.number)
        attributes = {"seed": 0, "worker": lease.worker}
        leases.storage.finish_trial(lease.trial_id, TrialState.COMPLETE, [lease.number], attributes)


def test_sixteen_processes_start_exactly_the_budget(leases: Leases, database_url: str) -> None:
    study_id = open_study(leases, Terms(budget=100))
    workers = [start(run_all, database_url, study_id, f"w{i}") for i in range(16)]
    for worker in workers:
        worker.join(240)
    assert [worker.exitcode for worker in workers] == [0] * 16
    trials = leases.storage.get_all_trials(study_id)
    assert [trial.number for trial in trials] == list(range(100))
    assert all(trial.state == TrialState.COMPLETE and trial.values == [trial.number] for trial in trials)
    snapshot = leases.snapshot(study_id)
    assert (snapshot.started, snapshot.counts["complete"], snapshot.best_number) == (100, 100, 99)


def test_a_relaunch_goes_on_to_the_budget_and_more_trials_raise_it(leases: Leases) -> None:
    study_id = open_study(leases, Terms(budget=2))
    for _ in range(2):
        finish(leases, take(leases, study_id, "w"))
    again = leases.open_study(study_id, Terms(budget=99), {"seed": 1})
    assert (again.budget, again.started, again.config) == (2, 2, {"seed": 0})
    with pytest.raises(StudyOver, match="budget"):
        leases.acquire(study_id, "w")
    assert leases.reopen(study_id, trials=3).budget == 3
    assert take(leases, study_id, "w").number == 2
    assert leases.reopen(study_id, trials=2).budget == 3


def test_failed_trials_count_and_copied_ones_do_not(leases: Leases) -> None:
    study_id = open_study(leases, Terms(budget=2))
    leases.storage.create_new_trial(study_id, optuna.trial.create_trial(value=0.5))
    first = take(leases, study_id, "w")
    leases.storage.finish_trial(first.trial_id, TrialState.FAIL, None, {"failure": "it diverged"})
    assert (first.number, take(leases, study_id, "w").number) == (1, 2)
    assert leases.acquire(study_id, "w") is None
    row = leases.study(study_id)
    assert row is not None
    assert row.started == 2


def test_waiting_trials_are_taken_first_in_the_order_of_their_numbers(leases: Leases) -> None:
    study_id = open_study(leases, Terms(budget=3))
    study = optuna.load_study(study_name=None, storage=leases.storage)
    for x in (0.1, 0.2):
        study.enqueue_trial({"x": x})
    numbers = [take(leases, study_id, "w").number for _ in range(3)]
    assert numbers == [0, 1, 2]
    states = {trial.state for trial in leases.storage.get_all_trials(study_id)}
    assert states == {TrialState.RUNNING}
    assert all(trial.datetime_start for trial in leases.storage.get_all_trials(study_id))


def test_a_study_without_terms_is_an_error_that_says_so(leases: Leases) -> None:
    study = optuna.create_study(storage=leases.storage)
    with pytest.raises(KeyError, match="has no terms; open it with"):
        leases.acquire(study._study_id, "w")
    assert leases.study(study._study_id) is None
    with pytest.raises(ValueError, match="lease_s above 0"):
        leases.open_study(study._study_id, Terms(budget=1, lease_s=0), {})


# ----------------------------------------------------------------------------------------------- adoption and fencing


def report_for_ever(url: str, study_id: int, worker: str) -> None:
    """Takes a trial, checkpoints step 2, and reports steps without end; ends with status 7 when it is fenced off."""
    leases = Leases(trial_storage(url))
    lease = take(leases, study_id, worker)
    leases.storage.set_trial_params(lease.trial_id, PARAMS)
    for step in range(3):
        leases.storage.set_trial_intermediate_value(lease.trial_id, step, step)
    leases.checkpoint(lease, f"checkpoint-{lease.attempt}-2", 2)
    try:
        for step in range(3, 10**6):
            leases.storage.set_trial_intermediate_value(lease.trial_id, step, -1.0)
            leases.storage.set_trial_user_attr(lease.trial_id, "last", step)
            leases.storage.get_trial(lease.trial_id)
            time.sleep(0.01)
            leases.renew(worker, {lease: Progress(step)})
    except LeaseLost:
        sys.exit(7)


def late(leases: Leases, study_id: int) -> bool:
    """Whether the first trial has reports after its checkpoint."""
    trials = leases.storage.get_all_trials(study_id)
    return bool(trials) and (trials[0].last_step or 0) > 5


@pytest.mark.parametrize("worker_signal", [signal.SIGKILL, signal.SIGSTOP])
def test_the_trial_of_a_silent_worker_is_adopted_and_its_late_writes_do_not_land(
    leases: Leases, database_url: str, worker_signal: signal.Signals
) -> None:
    study_id = open_study(leases, Terms(budget=1, lease_s=SHORT_S))
    worker = start(report_for_ever, database_url, study_id, "first")
    until(lambda: late(leases, study_id))
    assert worker.pid is not None
    os.kill(worker.pid, worker_signal)
    lease = take(leases, study_id, "second")
    assert (lease.number, lease.attempt, lease.adopted) == (0, 2, True)
    assert (lease.checkpoint_key, lease.checkpoint_epoch) == ("checkpoint-1-2", 2)
    trial = leases.storage.get_trial(lease.trial_id)
    assert trial.intermediate_values == {0: 0.0, 1: 1.0, 2: 2.0}
    assert trial.params == {"x": 0.25}
    if worker_signal == signal.SIGSTOP:
        os.kill(worker.pid, signal.SIGCONT)
        worker.join(60)
        assert worker.exitcode == 7
    leases.storage.set_trial_intermediate_value(lease.trial_id, 3, 3.0)
    finish(leases, lease, 0.75)
    ended = leases.storage.get_trial(lease.trial_id)
    assert ended.intermediate_values == {0: 0.0, 1: 1.0, 2: 2.0, 3: 3.0}
    assert (ended.state, ended.value, ended.user_attrs) == (TrialState.COMPLETE, 0.75, trial.user_attrs | {"seed": 0})
    assert leases.snapshot(study_id).started == 1


def test_every_write_under_a_lost_lease_is_refused(leases: Leases, elsewhere: Leases) -> None:
    study_id = open_study(leases, Terms(budget=1, lease_s=SHORT_S))
    old = take(leases, study_id, "old")
    new = take(elsewhere, study_id, "new")
    assert (new.trial_id, new.attempt) == (old.trial_id, 2)
    storage, trial_id = leases.storage, old.trial_id
    writes: list[Callable[[], object]] = [
        lambda: storage.set_trial_params(trial_id, PARAMS),
        lambda: storage.set_trial_param(trial_id, "x", *PARAMS["x"]),
        lambda: storage.set_trial_intermediate_value(trial_id, 0, 1.0),
        lambda: storage.set_trial_user_attr(trial_id, "a", 1),
        lambda: storage.set_trial_attrs(trial_id, {"a": 1}, {"b": 2}),
        lambda: storage.set_trial_state_values(trial_id, TrialState.COMPLETE, [1.0]),
        lambda: storage.finish_trial(trial_id, TrialState.FAIL, None),
        lambda: leases.checkpoint(old, "key", 1),
        lambda: storage.get_trial(trial_id),
    ]
    for write in writes:
        with pytest.raises(LeaseLost, match="trial 0"):
            write()
    assert leases.renew("old", {old: Progress(1)}).lost == {old}
    leases.release(old)
    finish(elsewhere, new)
    trial = storage.get_trial(trial_id)
    assert (trial.state, trial.params, trial.user_attrs, trial.intermediate_values) == (
        TrialState.COMPLETE,
        {},
        {"seed": 0},
        {},
    )


@pytest.mark.parametrize("reports_first", [False, True])
def test_a_trial_cannot_be_ended_under_a_lost_lease(leases: Leases, elsewhere: Leases, reports_first: bool) -> None:
    study_id = open_study(leases, Terms(budget=1, lease_s=SHORT_S))
    old = take(leases, study_id, "old")
    take(elsewhere, study_id, "new")
    if reports_first:  # held back: not known to be refused yet
        leases.storage.set_trial_intermediate_value(old.trial_id, 0, 1.0)
    with pytest.raises(LeaseLost, match="worker old has lost its lease on trial 0"):
        finish(leases, old)
    assert elsewhere.storage.get_trial(old.trial_id).state == TrialState.RUNNING
    assert elsewhere.storage.get_trial(old.trial_id).intermediate_values == {}


def test_a_lease_that_ran_out_goes_on_until_somebody_adopts(leases: Leases, elsewhere: Leases) -> None:
    study_id = open_study(leases, Terms(budget=1, lease_s=0.2))
    lease = take(leases, study_id, "w")
    until(lambda: not leases.snapshot(study_id).in_flight[0].alive)
    leases.storage.set_trial_params(lease.trial_id, PARAMS)
    assert leases.renew("w", {lease: Progress(10)}).lost == frozenset()
    assert leases.snapshot(study_id).in_flight[0].alive
    take(elsewhere, study_id, "adopter")
    assert leases.renew("w", {lease: Progress(20)}).lost == {lease}
    with pytest.raises(LeaseLost):
        leases.storage.set_trial_params(lease.trial_id, PARAMS)


def test_a_lost_trial_does_not_take_the_writes_of_others_with_it(leases: Leases, elsewhere: Leases) -> None:
    study_id = open_study(leases, Terms(budget=1, lease_s=SHORT_S))
    lost = take(leases, study_id, "w")
    take(elsewhere, study_id, "adopter")
    own = leases.storage.create_new_trial(study_id)
    leases.storage.set_trial_intermediate_value(lost.trial_id, 0, 1.0)
    leases.storage.set_trial_intermediate_value(own, 0, 2.0)
    assert leases.storage.get_trial(own).intermediate_values == {0: 2.0}
    with pytest.raises(LeaseLost):
        leases.storage.set_trial_intermediate_value(lost.trial_id, 1, 1.0)


def test_a_lease_without_progress_runs_out_and_a_slow_one_with_progress_does_not(
    leases: Leases, elsewhere: Leases
) -> None:
    study_id = open_study(leases, Terms(budget=2, lease_s=SHORT_S, stall_s=0.3))
    hung, busy = (take(leases, study_id, "w") for _ in range(2))
    batches = iter(range(1, 10**6))

    def hangs() -> bool:
        assert not leases.renew("w", {hung: Progress(0), busy: Progress(next(batches), 0, 0.5)}).lost
        return [trial.alive for trial in leases.snapshot(study_id).in_flight] == [False, True]

    assert until(hangs)
    assert take(elsewhere, study_id, "w2").trial_id == hung.trial_id


def test_a_lease_is_renewed_while_everything_else_waits(leases: Leases, elsewhere: Leases) -> None:
    study_id = open_study(leases, Terms(budget=2, lease_s=SHORT_S))
    lease = take(leases, study_id, "w")
    lock = elsewhere.storage.connection
    lock.execute("SELECT pg_advisory_lock(7)")
    wait = "SELECT pg_advisory_lock(7)"
    stuck = threading.Thread(target=leases.storage.connection.execute, args=(wait,))
    stuck.start()
    expired = "SELECT clock_timestamp() > taken + interval '2 s' FROM (SELECT %s::timestamptz AS taken) t"
    taken = lock.execute("SELECT clock_timestamp()")[0][0]
    batches = 0
    while not lock.execute(expired, given=(taken,))[0][0]:
        batches += 1
        assert leases.renew("w", {lease: Progress(batches)}).lost == frozenset()
        time.sleep(0.05)
    assert stuck.is_alive()
    lock.execute("SELECT pg_advisory_unlock(7)")
    stuck.join(60)
    leases.storage.set_trial_params(lease.trial_id, PARAMS)


def test_a_trial_that_is_held_keeps_its_lease_and_is_given_back_at_the_end(leases: Leases, elsewhere: Leases) -> None:
    study_id = open_study(leases, Terms(budget=1, lease_s=0.4, max_attempts=1))
    with leases.take(study_id, "w") as lease:
        assert lease is not None
        lease.heartbeat.progress = lambda: Progress(12, 3, 0.5)
        assert lease.heartbeat.wait_for_rounds(10, 60)  # a quarter of a lease each
        assert elsewhere.acquire(study_id, "other") is None
        (trial,) = leases.snapshot(study_id).in_flight
        assert (trial.epoch, trial.metric, trial.alive) == (3, 0.5, True)
        leases.storage.set_trial_user_attr(lease.trial_id, "a", 1)
        with leases.take(study_id, "w") as nothing:
            assert nothing is None
    adopted = elsewhere.acquire(study_id, "other")
    assert adopted is not None
    assert (adopted.trial_id, adopted.attempt) == (lease.trial_id, 2)
    assert elsewhere.storage.get_trial(lease.trial_id).user_attrs == {"a": 1}
    flags = (lease.heartbeat.lost, lease.heartbeat.study_stopped, lease.heartbeat.out_of_time)
    assert flags == (False, False, False)


class TestAFaultOfTheWorker:
    """Its device does not answer it any more: it is as good as dead, and says so itself."""

    def ends(self, leases: Leases, study_id: int, worker: str, epoch: int | None = None) -> Lease:
        """A worker takes a trial, may make a checkpoint, and meets a fault."""
        with suppress(WorkerFault), leases.take(study_id, worker) as lease:
            assert lease is not None
            if epoch is not None:
                leases.checkpoint(lease, f"checkpoint-{epoch}", epoch)
            raise WorkerFault("cuda:0 is gone")
        assert lease is not None
        return lease

    def test_frees_its_trial_at_once_and_the_process_takes_nothing_more(
        self, leases: Leases, elsewhere: Leases
    ) -> None:
        study_id = open_study(leases, Terms(budget=2, lease_s=600))
        lost = self.ends(leases, study_id, "w")
        with pytest.raises(WorkerFault, match="cuda:0 is gone"):
            leases.acquire(study_id, "w")
        adopted = elsewhere.acquire(study_id, "other")
        assert adopted is not None
        assert (adopted.trial_id, adopted.attempt, adopted.lost) == (lost.trial_id, 2, 1)
        assert elsewhere.storage.get_trial(lost.trial_id).user_attrs == {"worker_fault": "cuda:0 is gone"}
        with pytest.raises(LeaseLost):
            leases.checkpoint(lost, "checkpoint-1", 1)

    def test_counts_each_time_and_the_trial_fails_with_what_was_said(self, leases: Leases, database_url: str) -> None:
        study_id = open_study(leases, Terms(budget=1, lease_s=600, max_attempts=3))
        for index in range(3):
            process = Leases(trial_storage(database_url))
            lease = self.ends(process, study_id, f"w{index}")
            process.storage.close()
            assert (lease.number, lease.lost) == (0, index)
        with pytest.raises(StudyOver):
            leases.acquire(study_id, "w")
        (trial,) = leases.storage.get_all_trials(study_id)
        assert trial.state == TrialState.FAIL
        assert trial.user_attrs["failure"] == (
            "given up after 3 attempts: each time its worker went silent or made no progress, the last time w2"
            "; a worker said: cuda:0 is gone"
        )

    def test_does_not_count_where_the_trial_got_further(self, leases: Leases, database_url: str) -> None:
        study_id = open_study(leases, Terms(budget=1, lease_s=600, max_attempts=1))
        for epoch in (1, 2):
            process = Leases(trial_storage(database_url))
            assert self.ends(process, study_id, f"w{epoch}", epoch).lost == 0
            process.storage.close()
        adopted = leases.acquire(study_id, "w")
        assert adopted is not None
        assert (adopted.attempt, adopted.lost, adopted.checkpoint_epoch) == (3, 0, 2)

    def test_after_another_checkpoint_its_worker_has_got_on(self, leases: Leases, database_url: str) -> None:
        study_id = open_study(leases, Terms(budget=1, lease_s=600))
        for worker, epoch, advanced in (("a", 1, 1), ("b", None, 0), ("c", 2, 1)):
            with closing(trial_storage(database_url)) as storage:
                self.ends(Leases(storage), study_id, worker, epoch)
            assert leases.trials_advanced_by(worker) == advanced
        assert leases.trials_advanced_by("a") == 0  # others hold its trial

    def test_changes_nothing_of_a_trial_that_has_ended(self, leases: Leases, elsewhere: Leases) -> None:
        study_id = open_study(leases, Terms(budget=1))
        with suppress(WorkerFault), leases.take(study_id, "w") as lease:
            assert lease is not None
            finish(leases, lease)
            raise WorkerFault("cuda:0 is gone")
        (trial,) = elsewhere.storage.get_all_trials(study_id)
        assert (trial.state, trial.user_attrs) == (TrialState.COMPLETE, {"seed": 0})
        assert leases.trials_advanced_by("w") == 1
        assert leases.trials_advanced_by("other") == 0

    def test_and_a_trial_that_failed_is_none_that_its_worker_has_ended(self, leases: Leases) -> None:
        study_id = open_study(leases, Terms(budget=1))
        leases.storage.finish_trial(take(leases, study_id, "w").trial_id, TrialState.FAIL, None)
        assert leases.trials_advanced_by("w") == 0


def test_a_study_says_whether_it_has_a_trial_to_take(leases: Leases, elsewhere: Leases) -> None:
    study_id = open_study(leases, Terms(budget=1, lease_s=SHORT_S))
    assert leases.offers_trial(study_id)
    lease = take(leases, study_id, "w")
    assert not elsewhere.offers_trial(study_id)
    until(lambda: elsewhere.offers_trial(study_id))  # its lease has run out
    assert not leases.offers_trial(study_id)  # not to the one who holds it
    leases.release(lease)
    assert leases.offers_trial(study_id)
    leases.stop(study_id)
    assert not leases.offers_trial(study_id)
    leases.reopen(study_id)
    finish(leases, take(leases, study_id, "w"))
    assert not leases.offers_trial(study_id)
    assert not leases.offers_trial(study_id + 1)


def test_a_heartbeat_learns_that_the_study_ends_and_that_its_lease_is_lost(leases: Leases, database_url: str) -> None:
    study_id = open_study(leases, Terms(budget=1, timeout_s=3600, lease_s=0.4))
    with leases.take(study_id, "w") as lease:
        assert lease is not None
        leases.stop(study_id)
        execute(database_url, "UPDATE hpo.terms SET elapsed_s = timeout_s")
        assert lease.heartbeat.wait_for_rounds(2, 60)
        assert (lease.heartbeat.study_stopped, lease.heartbeat.out_of_time, lease.heartbeat.lost) == (True, True, False)
        execute(database_url, "UPDATE hpo.leases SET attempt = attempt + 1, released = true")
        assert lease.heartbeat.wait_for_rounds(2, 60)
        assert lease.heartbeat.lost
        with pytest.raises(LeaseLost):
            leases.storage.set_trial_params(lease.trial_id, PARAMS)
    assert not leases.snapshot(study_id).in_flight[0].alive


def test_a_trial_that_ended_or_raised_is_let_go(leases: Leases) -> None:
    study_id = open_study(leases, Terms(budget=2, lease_s=60))
    with leases.take(study_id, "w") as lease:
        assert lease is not None
        finish(leases, lease)
    assert leases.storage.get_trial(lease.trial_id).state == TrialState.COMPLETE
    with pytest.raises(ZeroDivisionError), leases.take(study_id, "w") as lease:
        1 / 0  # noqa: B018
    assert take(leases, study_id, "w").attempt == 2


def test_a_released_trial_is_adopted_at_once_and_does_not_count_as_lost(leases: Leases) -> None:
    study_id = open_study(leases, Terms(budget=1, max_attempts=1))
    for attempt in range(1, 5):
        lease = take(leases, study_id, f"w{attempt}")
        assert (lease.number, lease.attempt, lease.adopted) == (0, attempt, attempt > 1)
        leases.storage.set_trial_intermediate_value(lease.trial_id, attempt, 1.0)
        leases.checkpoint(lease, f"key-{attempt}", attempt)
        leases.release(lease)
    assert leases.storage.get_trial(lease.trial_id).intermediate_values == dict.fromkeys(range(1, 5), 1.0)


def test_a_trial_lost_too_often_fails_with_the_reason(leases: Leases, database_url: str) -> None:
    study_id = open_study(leases, Terms(budget=1, lease_s=0.2, max_attempts=3))
    storages = [trial_storage(database_url) for _ in range(3)]
    attempts = [take(Leases(storage), study_id, f"w{i}").attempt for i, storage in enumerate(storages)]

    def over() -> bool:
        try:
            return bool(leases.acquire(study_id, "w"))
        except StudyOver:
            return True

    until(over)
    (trial,) = leases.storage.get_all_trials(study_id)
    assert attempts == [1, 2, 3]
    assert trial.state == TrialState.FAIL
    assert trial.datetime_complete is not None
    assert trial.user_attrs["failure"].startswith("given up after 3 attempts")
    assert trial.user_attrs["failure"].endswith("the last time w2")
    for storage in storages:
        storage.close()
    assert leases.snapshot(study_id).in_flight == ()


def test_a_running_trial_without_a_lease_is_foreign(leases: Leases, database_url: str) -> None:
    study_id = open_study(leases, Terms(budget=1))
    stock = optuna.storages.RDBStorage(database_url)
    foreign = stock.create_new_trial(study_id)
    lease = take(leases, study_id, "w")
    assert (lease.number, lease.attempt) == (1, 1)
    finish(leases, lease)
    with pytest.raises(StudyOver, match="budget"):
        leases.acquire(study_id, "w")
    assert leases.storage.get_trial(foreign).state == TrialState.RUNNING
    assert leases.acquire_promotion(study_id, "w")
    stock.remove_session()
    stock.engine.dispose()


def test_nobody_but_its_holder_ends_a_leased_trial(leases: Leases, elsewhere: Leases, database_url: str) -> None:
    """optuna-dashboard's tell on a RUNNING trial, and any plain script's."""
    study_id = open_study(leases, Terms(budget=1, lease_s=0.2))
    lease = take(leases, study_id, "w")
    stock = optuna.storages.RDBStorage(database_url)
    for held in (True, False):
        with pytest.raises(optuna.exceptions.StorageInternalError) as refused:
            stock.set_trial_state_values(lease.trial_id, TrialState.COMPLETE, [0.9999])
        assert "trial 0 is under a lease of the worker w" in str(refused.value.__cause__)
        with pytest.raises(TrialLeased, match="only that one ends it"):
            elsewhere.storage.set_trial_state_values(lease.trial_id, TrialState.FAIL)
        if held:
            until(lambda: not leases.snapshot(study_id).in_flight[0].alive)  # it waits for adoption, not for a stranger
    finish(leases, lease)
    assert stock.get_trial(lease.trial_id).value == 0.5
    stock.remove_session()
    stock.engine.dispose()


def test_a_trial_without_a_lease_is_anybodys(leases: Leases, database_url: str) -> None:
    study_id = open_study(leases, Terms(budget=1))
    stock = optuna.storages.RDBStorage(database_url)
    trial_id = stock.create_new_trial(study_id)
    assert stock.set_trial_state_values(trial_id, TrialState.COMPLETE, [0.5])
    stock.remove_session()
    stock.engine.dispose()


def test_adopting_again_in_the_same_process_drops_what_was_held_back(leases: Leases) -> None:
    study_id = open_study(leases, Terms(budget=1, lease_s=0.2))
    first = take(leases, study_id, "w")
    until(lambda: not leases.snapshot(study_id).in_flight[0].alive)
    leases.storage.set_trial_intermediate_value(first.trial_id, 0, 1.0)
    assert leases.acquire(study_id, "w") is None  # while this process holds it, what it writes has the older token
    leases.storage.session.forget(first.trial_id)
    second = take(leases, study_id, "w")
    assert second.attempt == 2
    assert leases.storage.get_trial(second.trial_id).intermediate_values == {}


# --------------------------------------------------------------------------------------------------------- checkpoints


def test_a_checkpoint_keeps_the_one_before_and_names_the_one_before_that(leases: Leases, elsewhere: Leases) -> None:
    study_id = open_study(leases, Terms(budget=1))
    lease = take(leases, study_id, "w")
    leases.storage.set_trial_intermediate_value(lease.trial_id, 0, 1.0)
    assert leases.checkpoint(lease, "one", 0) is None
    assert elsewhere.storage.get_trial(lease.trial_id).intermediate_values == {0: 1.0}
    assert leases.checkpoint(lease, "two", 1) is None
    assert leases.checkpoint(lease, "two", 1) is None
    leases.release(lease)
    adopted = take(elsewhere, study_id, "other")
    assert (adopted.checkpoint_key, adopted.checkpoint_epoch) == ("two", 1)
    assert elsewhere.checkpoint(adopted, "three", 2) == "one"
    assert elsewhere.checkpoint(adopted, "four", 3) == "two"


def test_dropping_a_checkpoint_goes_back_to_the_one_before_with_its_reports(leases: Leases, elsewhere: Leases) -> None:
    study_id = open_study(leases, Terms(budget=1))
    lease = take(leases, study_id, "w")
    for epoch in range(1, 7):
        leases.storage.set_trial_intermediate_value(lease.trial_id, epoch, epoch / 10)
        if epoch in (2, 4):
            leases.checkpoint(lease, f"after {epoch}", epoch)
    for _ in range(2):  # as after a lost connection
        assert leases.drop_checkpoint(lease, "after 4") == ("after 2", 2)
        assert elsewhere.storage.get_trial(lease.trial_id).intermediate_values == {1: 0.1, 2: 0.2}
    assert leases.drop_checkpoint(lease, "after 2") == (None, None)
    assert elsewhere.storage.get_trial(lease.trial_id).intermediate_values == {}
    leases.storage.connection.close()  # what was reported before is not sent again
    leases.storage.set_trial_intermediate_value(lease.trial_id, 1, 0.1)
    leases.storage.session.flush()
    assert elsewhere.storage.get_trial(lease.trial_id).intermediate_values == {1: 0.1}
    leases.release(lease)
    adopted = take(elsewhere, study_id, "other")
    assert (adopted.checkpoint_key, adopted.checkpoint_epoch) == (None, None)
    with pytest.raises(LeaseLost, match=r"trial 0 has left worker w \(attempt 1\)"):
        leases.drop_checkpoint(lease, "after 2")


def test_the_checkpoints_of_ended_trials_are_known_until_they_are_deleted(leases: Leases) -> None:
    study_id = open_study(leases, Terms(budget=2))
    ended, running = (take(leases, study_id, "w") for _ in range(2))
    for key in ("a", "b"):
        leases.checkpoint(ended, key, 0)
    leases.checkpoint(running, "c", 0)
    finish(leases, ended)
    assert sorted(leases.spent_checkpoints(study_id)) == ["a", "b"]
    leases.forget_checkpoints(study_id, ["a", "c"])
    assert leases.spent_checkpoints(study_id) == ["b"]
    leases.release(running)
    assert take(leases, study_id, "w").checkpoint_key == "c"


# ------------------------------------------------------------------------------------------------- the end of a study


def test_a_stopped_study_gives_out_nothing_and_tells_its_workers(leases: Leases) -> None:
    study_id = open_study(leases, Terms(budget=5))
    lease = take(leases, study_id, "w")
    leases.stop(study_id)
    assert leases.renew("w", {lease: Progress(1)}).stopped == {study_id}
    assert leases.acquire(study_id, "other") is None
    leases.release(lease)
    with pytest.raises(StudyOver, match="stopped"):
        leases.acquire(study_id, "other")
    assert not leases.acquire_promotion(study_id, "w")
    assert [state.status for state in leases.snapshots(leases.study_ids())] == ["stopped"]
    assert leases.turns() == {}
    assert leases.reopen(study_id).status == "open"
    assert take(leases, study_id, "other").trial_id == lease.trial_id


def test_after_its_time_nothing_starts_and_more_time_opens_the_study(leases: Leases) -> None:
    study_id = open_study(leases, Terms(budget=5, timeout_s=0.3))
    lease = take(leases, study_id, "w")
    assert until(lambda: leases.renew("w", {lease: Progress(1)}).out_of_time) == {study_id}
    assert leases.acquire(study_id, "w") is None
    finish(leases, lease)
    with pytest.raises(StudyOver, match="timeout"):
        leases.acquire(study_id, "w")
    assert leases.snapshot(study_id).seconds_left == 0.0
    assert leases.acquire_promotion(study_id, "w")
    leases.finish_promotion(study_id, "w", 1)
    assert leases.reopen(study_id, trials=5, timeout_s=0.3).status == "finished"
    row = leases.reopen(study_id, timeout_s=600)
    assert (row.status, row.out_of_time, row.promoted_version) == ("open", False, None)
    assert take(leases, study_id, "w").number == 1


def test_an_exhausted_study_ends_with_the_trials_in_flight(leases: Leases) -> None:
    study_id = open_study(leases, Terms(budget=5))
    lease = take(leases, study_id, "w")
    leases.exhaust(study_id)
    assert leases.acquire(study_id, "w") is None
    leases.release(lease)
    assert not leases.acquire_promotion(study_id, "w")
    finish(leases, take(leases, study_id, "w"))
    with pytest.raises(StudyOver, match="exhausted") as caught:
        leases.acquire(study_id, "w")
    assert caught.value.reason == "exhausted"


# ----------------------------------------------------------------------------------------------------------- promotion


def promote(url: str, study_id: int, worker: str, gate: str) -> None:
    """Ends with status 1 for the one that may promote. All wait for a lock, to come at the same time."""
    leases = Leases(trial_storage(url))
    leases.storage.connection.execute("SELECT pg_advisory_lock_shared(%s)", given=(int(gate),))
    sys.exit(int(leases.acquire_promotion(study_id, worker)))


def test_one_of_many_promotes(leases: Leases, elsewhere: Leases, database_url: str) -> None:
    study_id = open_study(leases, Terms(budget=1))
    assert not leases.acquire_promotion(study_id, "w")
    lease = take(leases, study_id, "w")
    assert not leases.acquire_promotion(study_id, "w")
    finish(leases, lease)
    elsewhere.storage.connection.execute("SELECT pg_advisory_lock(99)")
    processes = [start(promote, database_url, study_id, f"w{i}", "99") for i in range(6)]
    waiting = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted HAVING count(*) = 6"
    until(lambda: leases.storage.connection.execute(waiting))
    elsewhere.storage.connection.execute("SELECT pg_advisory_unlock(99)")
    for process in processes:
        process.join(60)
    assert Counter(process.exitcode for process in processes) == {0: 5, 1: 1}


def test_a_promotion_is_a_lease_that_runs_out_and_is_done_once(leases: Leases) -> None:
    study_id = open_study(leases, Terms(budget=1, lease_s=0.3))
    finish(leases, take(leases, study_id, "w"))
    assert leases.acquire_promotion(study_id, "slow")
    assert leases.acquire_promotion(study_id, "slow")
    assert until(lambda: leases.acquire_promotion(study_id, "quick"))
    with pytest.raises(LeaseLost, match="has left worker slow"):
        leases.finish_promotion(study_id, "slow", 1)
    leases.finish_promotion(study_id, "quick", 2)
    leases.finish_promotion(study_id, "quick", 2)  # as after a lost connection
    assert not leases.acquire_promotion(study_id, "quick")
    snapshot = leases.snapshot(study_id)
    assert (snapshot.status, snapshot.promoted_version) == ("finished", 2)
    row = leases.reopen(study_id, trials=2)
    assert (row.status, row.promoted_version) == ("open", None)
    finish(leases, take(leases, study_id, "w"))
    assert leases.acquire_promotion(study_id, "w")


def test_a_promotion_that_is_held_keeps_its_lease(leases: Leases, elsewhere: Leases) -> None:
    study_id = open_study(leases, Terms(budget=1, lease_s=0.4))
    with leases.promotion(study_id, "early") as held:
        assert not held
    finish(leases, take(leases, study_id, "w"))

    def expires() -> datetime:
        row = leases.study(study_id)
        assert row is not None
        assert row.promoter_expires_at is not None
        return row.promoter_expires_at

    with leases.promotion(study_id, "w") as held:
        assert held
        first = expires()
        until(lambda: expires() > first + timedelta(seconds=1))
        with elsewhere.promotion(study_id, "other") as second:
            assert not second
        leases.finish_promotion(study_id, "w", 1)
    assert leases.snapshot(study_id).promoted_version == 1


# ------------------------------------------------------------------------------------------------------------ displays


@pytest.mark.parametrize(("direction", "best"), [(StudyDirection.MAXIMIZE, 2), (StudyDirection.MINIMIZE, 1)])
def test_a_snapshot_shows_counts_the_best_and_who_works_on_what(
    leases: Leases, direction: StudyDirection, best: int
) -> None:
    study_id = open_study(leases, Terms(budget=9, timeout_s=600), direction)
    leases.register("w", study_id, "host", 1, "cpu", "worker.log")
    leases.register("standing", None, "host", 2)
    leases.register("w2", study_id, "host", 4, "cpu")
    leases.register("far", study_id, "far", 5, "cuda:1")
    leases.register("other", open_study(leases, Terms(budget=1)), "host", 6, "cpu")
    leases.register("gone", study_id, "host", 3)
    leases.retire("gone")
    held = [take(leases, study_id, "w") for _ in range(6)]
    for lease, value in zip(held, [0.5, float("-inf"), float("inf"), 0.25], strict=False):
        finish(leases, lease, value)
    leases.storage.finish_trial(held[4].trial_id, TrialState.PRUNED, [0.0])
    leases.renew("w", {held[5]: Progress(12, 3, float("nan"))})
    leases.storage.create_new_trial(study_id, optuna.trial.create_trial(state=TrialState.WAITING))
    snapshot = leases.snapshot(study_id)
    assert snapshot.counts == {"complete": 4, "pruned": 1, "failed": 0, "running": 1, "waiting": 1}
    assert (snapshot.best_number, snapshot.budget, snapshot.started) == (best, 9, 6)
    (trial,) = snapshot.in_flight
    assert (trial.number, trial.worker, trial.host, trial.device) == (5, "w", "host", "cpu")
    assert (trial.epoch, trial.metric, trial.attempt, trial.alive) == (3, None, 1, True)
    assert snapshot.worker_groups == (
        WorkerGroup("far", "cuda:1", 1),
        WorkerGroup("host", "cpu", 2),
        WorkerGroup("host", None, 1),
    )
    assert snapshot.workers == 4
    assert snapshot.seconds_left is not None
    assert 0 < snapshot.seconds_left <= 600
    assert snapshot.rate_per_hour is not None
    assert snapshot.first_started_at is not None
    assert snapshot.last_ended_at is not None
    assert snapshot.first_started_at < snapshot.last_ended_at
    empty = leases.snapshot(open_study(leases, Terms(budget=1)))
    assert (empty.best_value, empty.rate_per_hour, empty.seconds_left, empty.in_flight) == (None, None, None, ())


def test_the_rate_forgets_a_night_s_rest(leases: Leases, database_url: str) -> None:
    study_id = open_study(leases, Terms(budget=100))
    for _ in range(RECENT + 1):
        finish(leases, take(leases, study_id, "w"), 0.5)
    ended = "SELECT min(ended_at) FROM hpo.leases"
    execute(database_url, f"UPDATE hpo.leases SET ended_at = ended_at - interval '9 h' WHERE ended_at = ({ended})")
    execute(database_url, "UPDATE trials SET datetime_start = datetime_start - interval '9 h'")
    resting = leases.snapshot(study_id).rate_per_hour
    assert resting == pytest.approx(RECENT / 9, rel=0.01)
    finish(leases, take(leases, study_id, "w"), 0.5)
    rate = leases.snapshot(study_id).rate_per_hour
    assert rate is not None
    assert rate > 100 * RECENT


def test_deleting_a_study_removes_its_terms_and_leases(leases: Leases) -> None:
    study_id = open_study(leases, Terms(budget=1))
    lease = take(leases, study_id, "w")
    leases.storage.delete_study(study_id)
    assert leases.study(study_id) is None
    assert leases.renew("w", {lease: Progress(1)}).lost == {lease}
    with pytest.raises(KeyError):
        leases.snapshot(study_id)
