"""Which time counts: for a lease, for the attempts of a trial, and for a study's timeout. The clock is set by hand."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from optuna.study import StudyDirection
from optuna.trial import TrialState

from hpo.storage import deadlines
from hpo.storage.deadlines import Pause, last_freeze
from hpo.storage.errors import StudyOver
from hpo.storage.heartbeat import Progress
from hpo.storage.leases import Lease, Leases
from hpo.storage.liveness import SILENT_S, Machine, fate, process_start, this_machine
from hpo.storage.terms import Terms
from hpo.storage.trials import TrialStorage, trial_storage
from tests.postgres.simulation import Clock

LEASE_S = 10.0


@pytest.fixture
def clock(storage: TrialStorage, monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(storage.connection, monkeypatch)


def opened(leases: Leases, **terms: float | None) -> int:
    study_id = leases.storage.create_new_study([StudyDirection.MAXIMIZE])
    leases.open_study(study_id, Terms(**{"budget": 1, "lease_s": LEASE_S, **terms}), {})  # type: ignore[arg-type]
    return study_id


def take(leases: Leases, study_id: int, worker: str) -> Lease:
    lease = leases.acquire(study_id, worker)
    assert lease is not None
    return lease


def lost(leases: Leases) -> int:
    return int(leases.storage.connection.execute("SELECT sum(lost) FROM hpo.leases")[0][0])


# -------------------------------------------------------------------------------------------------------- the lease's


def test_after_a_start_of_the_server_a_holder_has_its_lease_to_come_back(
    leases: Leases, elsewhere: Leases, clock: Clock
) -> None:
    """Reported: a restart of the database costs trials whose workers live."""
    study_id = opened(leases)
    held = take(leases, study_id, "ann")
    clock.advance(LEASE_S + 5)  # the server is away
    clock.restart_server()
    clock.advance(LEASE_S - 1)
    assert elsewhere.acquire(study_id, "bob") is None
    assert leases.renew("ann", {held: Progress(1)}).lost == frozenset()
    clock.advance(LEASE_S + 1)
    assert take(elsewhere, study_id, "bob").attempt == 2


def test_a_taker_that_was_cut_off_leaves_the_others_as_much_time(
    leases: Leases, elsewhere: Leases, clock: Clock
) -> None:
    """A pooler or a switch between all workers and the server was away; who comes back first takes nothing yet."""
    study_id = opened(leases)
    take(leases, study_id, "ann")
    clock.advance(LEASE_S + 5)
    elsewhere.storage.connection.outage = Pause(6.0, time.monotonic())
    assert elsewhere.acquire(study_id, "bob") is None
    clock.advance(2)
    assert take(elsewhere, study_id, "bob").attempt == 2


FROZEN = """
import sys
from hpo.storage import deadlines
from hpo.storage.connection import Connection
deadlines.FROZEN_S = 1.0
Connection(sys.argv[1]).execute("SELECT 1")
assert deadlines.last_freeze().seconds == 0
print("ready", flush=True)
sys.stdin.readline()
print(deadlines.last_freeze().seconds, deadlines.last_freeze().ended_ago_s)
"""


def test_a_process_that_was_stopped_knows_it(database_url: str) -> None:
    """A laptop that slept, a container that was paused: all workers of the machine wake up with leases run out."""
    command = [sys.executable, "-c", FROZEN, database_url]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(1.5)
        process.send_signal(signal.SIGCONT)
        frozen_s, ago_s = map(float, process.communicate("go on\n")[0].split())
    assert frozen_s > 1
    assert ago_s < 60


def test_a_taker_that_did_not_run_leaves_the_others_as_much_time(
    leases: Leases, elsewhere: Leases, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    study_id = opened(leases)
    take(leases, study_id, "ann")
    clock.advance(LEASE_S + 5)
    monkeypatch.setattr(deadlines._Looks, "frozen", Pause(6.0, time.monotonic()))
    assert last_freeze().seconds == 6.0
    assert elsewhere.acquire(study_id, "bob") is None


def test_a_connection_notes_how_long_the_database_was_away(storage: TrialStorage) -> None:
    storage.connection.execute("SELECT 1")
    assert storage.connection.outage.seconds == 0
    other = trial_storage(storage.url)
    pid = storage.connection.execute("SELECT pg_backend_pid()")[0][0]
    other.connection.execute("SELECT pg_terminate_backend(%(pid)s)", given={"pid": pid})
    other.close()
    storage.connection.execute("SELECT 1")
    assert 0 < storage.connection.outage.seconds < 60
    assert storage.connection.outage.ended_ago_s < 60


# ------------------------------------------------------------------------------------------------------- the attempts


def test_a_worker_that_falls_silent_counts_and_one_that_got_further_does_not(leases: Leases, clock: Clock) -> None:
    study_id = opened(leases, max_attempts=3)
    for attempt, (epoch, counted) in enumerate([(None, 1), (4, 0), (None, 1), (9, 0), (None, 1)], 1):
        worker = trial_storage(leases.storage.url)
        held = take(Leases(worker), study_id, f"w{attempt}")
        if epoch is not None:
            Leases(worker).checkpoint(held, f"key-{epoch}", epoch)
        clock.advance(LEASE_S + 1)
        look = trial_storage(leases.storage.url)
        again = take(Leases(look), study_id, "look")
        assert (again.attempt, lost(leases)) == (2 * attempt, counted)
        Leases(look).release(again)
        look.close()
        worker.close()


def test_what_falls_silent_with_the_server_does_not_count(leases: Leases, elsewhere: Leases, clock: Clock) -> None:
    """A power loss takes both."""
    study_id = opened(leases, max_attempts=1)
    take(leases, study_id, "ann")
    clock.advance(1)
    clock.restart_server()
    clock.advance(LEASE_S + 1)
    assert take(elsewhere, study_id, "bob").attempt == 2
    assert lost(leases) == 0


def test_a_holder_that_comes_back_is_forgiven(leases: Leases, elsewhere: Leases, clock: Clock) -> None:
    study_id = opened(leases, max_attempts=2)
    held = take(leases, study_id, "ann")
    leases.renew("ann", {held: Progress(3)})
    clock.advance(LEASE_S + 1)
    take(elsewhere, study_id, "bob")
    assert lost(leases) == 1
    assert leases.renew("ann", {held: Progress(3)}).lost == {held}
    assert lost(leases) == 1  # it hung
    assert leases.renew("ann", {held: Progress(7)}).lost == {held}
    assert lost(leases) == 0  # it lived, and trained all the time


def test_a_trial_is_given_up_only_after_its_holder_had_time_to_come_back(
    leases: Leases, elsewhere: Leases, clock: Clock
) -> None:
    study_id = opened(leases, max_attempts=1)
    held = take(leases, study_id, "ann")
    clock.advance(LEASE_S + 1)
    assert elsewhere.acquire(study_id, "bob") is None
    leases.renew("ann", {held: Progress(1)})
    clock.advance(LEASE_S + 1)
    assert elsewhere.acquire(study_id, "bob") is None
    clock.advance(LEASE_S)
    with pytest.raises(StudyOver):
        elsewhere.acquire(study_id, "bob")
    assert leases.storage.get_all_trials(study_id)[0].state == TrialState.FAIL


def test_a_process_of_this_machine_that_died_frees_its_trial_at_once(leases: Leases, clock: Clock) -> None:
    host = socket.gethostname()
    study_id = opened(leases, budget=2, max_attempts=2)
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    leases.register("gone", study_id, host, process.pid)
    leases.register("here", study_id, host, os.getpid())
    taken, kept = take(leases, study_id, "gone"), take(leases, study_id, "here")
    assert leases.free_dead(host, "me") == []
    process.kill()
    process.wait()
    assert leases.free_dead(host, "me") == ["gone"]
    assert leases.free_dead(host, "me") == []
    leases.storage.session.forget(taken.trial_id)
    adopted = take(leases, study_id, "me")
    assert (adopted.trial_id, adopted.attempt, lost(leases)) == (taken.trial_id, 2, 1)
    assert leases.renew("here", {kept: Progress(1)}).lost == frozenset()


def test_who_begins_under_the_name_of_another_frees_what_that_one_held(leases: Leases, elsewhere: Leases) -> None:
    """In a container every worker is process 1 of one host name."""
    study_id = opened(leases)
    leases.register("box-1", study_id, "box", os.getpid())
    take(leases, study_id, "box-1")
    elsewhere.register("box-1", study_id, "box", os.getpid())
    assert take(elsewhere, study_id, "box-1").attempt == 2


def test_a_dead_promoter_leaves_the_promotion(leases: Leases, clock: Clock) -> None:
    host = socket.gethostname()
    study_id = opened(leases, budget=0)
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    leases.register("gone", study_id, host, os.getpid())
    leases.storage.connection.execute("UPDATE hpo.workers SET pid = %(pid)s", given={"pid": process.pid})
    assert leases.acquire_promotion(study_id, "gone")
    assert not leases.acquire_promotion(study_id, "me")
    leases.free_dead(host, "me")
    assert leases.acquire_promotion(study_id, "me")


# ----------------------------------------------------------------------------------------------------------- liveness


def test_a_process_is_known_by_its_number_and_its_start() -> None:
    here, start = this_machine(), process_start(os.getpid())
    assert here is not None
    assert start is not None
    assert Machine.parse(str(here)) == here
    assert fate("w", str(here), os.getpid(), start, 1e6) == "unknown"
    assert fate("w", str(here), os.getpid(), start - 1, 0) == "died"  # its number was given again
    assert fate("w", str(here), 2**22 + 1, start, 0) == "died"
    assert fate("w", str(here), os.getpid(), None, 0) == "unknown"


def test_a_process_that_could_not_say_goodbye_to_the_database_was_not_lost_by_a_crash(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Reported: a network that was down for minutes, three times, and the trial is given up."""
    monkeypatch.setenv("HPO_HOME", str(tmp_path))
    here, end = str(this_machine()), "from hpo.storage.liveness import note_end; note_end('w')"
    process = subprocess.Popen([sys.executable, "-c", f"import time; time.sleep(0.2)\n{end}"])
    start = process_start(process.pid)
    process.wait()
    assert fate("w", here, process.pid, start, 0) == "ended"
    assert fate("w", here, process.pid, start, 0) == "died"  # the note is read once


def test_a_process_from_before_the_machines_start_is_gone_and_one_elsewhere_is_not_known() -> None:
    here, start = this_machine(), 1
    assert here is not None
    named = Machine("the machine", here.boot_id, here.pid_namespace)
    before = Machine(here.machine_id, "an earlier boot", here.pid_namespace)
    container = Machine(here.machine_id, here.boot_id, "1")
    elsewhere = Machine("another machine", "another boot", here.pid_namespace)
    expected = "ended" if here.machine_id else "unknown"
    assert fate("w", str(before), os.getpid(), start, SILENT_S + 1) == expected
    assert fate("w", str(before), os.getpid(), start, SILENT_S - 1) == "unknown"  # it was heard of just now: a namesake
    for machine in (named, container, elsewhere):
        assert fate("w", str(machine), os.getpid(), start, 1e6) == "unknown"


# --------------------------------------------------------------------------------------------------- the study's time


def test_a_studys_clock_goes_while_a_worker_lives(leases: Leases, clock: Clock) -> None:
    study_id = opened(leases, budget=9, timeout_s=100)
    clock.advance(36_000)  # nobody has begun yet
    held = take(leases, study_id, "ann")
    for _ in range(6):
        clock.advance(5)
        leases.renew("ann", {held: Progress(1)})
    leases.storage.finish_trial(held.trial_id, TrialState.COMPLETE, [0.5])
    assert leases.snapshot(study_id).seconds_left == 70
    clock.advance(36_000)  # a night
    assert leases.snapshot(study_id).seconds_left == 60  # when the last worker left, within ten seconds, is not known
    assert take(leases, study_id, "bob").number == 1
    clock.advance(5)
    assert leases.snapshot(study_id).seconds_left == 55


def test_a_deadline_ends_what_is_in_flight_and_gives_out_what_was_left(
    leases: Leases, elsewhere: Leases, clock: Clock
) -> None:
    study_id = opened(leases, budget=9, timeout_s=15)
    held = take(leases, study_id, "ann")
    clock.advance(8)
    assert leases.renew("ann", {held: Progress(1)}).out_of_time == frozenset()
    clock.advance(8)
    assert leases.renew("ann", {held: Progress(2)}).out_of_time == {study_id}
    assert elsewhere.acquire(study_id, "bob") is None
    assert not elsewhere.acquire_promotion(study_id, "bob")
    clock.advance(LEASE_S + 1)  # ann dies
    adopted = take(elsewhere, study_id, "bob")
    assert (adopted.number, adopted.heartbeat.out_of_time) == (0, True)
    elsewhere.storage.finish_trial(adopted.trial_id, TrialState.COMPLETE, [0.5])
    with pytest.raises(StudyOver, match="timeout"):
        elsewhere.acquire(study_id, "bob")
    assert elsewhere.acquire_promotion(study_id, "bob")


def test_a_budget_may_grow_and_shrink(leases: Leases, clock: Clock) -> None:
    """Reported: `--trials 6` on a study of 30 runs 30 without a word, a lowered timeout likewise."""
    study_id = opened(leases, budget=30, timeout_s=100)
    for _ in range(2):
        leases.storage.finish_trial(take(leases, study_id, "ann").trial_id, TrialState.COMPLETE, [0.5])
    assert leases.reopen(study_id, trials=6).budget == 6
    assert leases.reopen(study_id, trials=1).budget == 2  # as many have begun
    with pytest.raises(StudyOver, match="budget"):
        leases.acquire(study_id, "ann")
    assert leases.reopen(study_id, trials=3, timeout_s=0.5).timeout_s == 0.5
    clock.advance(1)
    with pytest.raises(StudyOver, match="timeout"):
        leases.acquire(study_id, "ann")
    assert leases.reopen(study_id, timeout_s=None).timeout_s is None
    assert take(leases, study_id, "ann").number == 2
