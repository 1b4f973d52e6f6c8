"""How standing workers share the studies: among owners, by priority, by age; and how many trials one may have."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, field

import optuna
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from optuna.study import StudyDirection
from optuna.trial import TrialState

from hpo.storage.errors import StudyOver
from hpo.storage.leases import Lease, Leases
from hpo.storage.terms import Terms
from hpo.storage.trials import trial_storage
from tests.conftest import execute


@dataclass
class Pool:
    """Standing workers of one process each, that take a trial when they are told to."""

    leases: Leases
    held: dict[str, tuple[str, Lease]] = field(default_factory=dict)  # worker -> study, lease

    def study(
        self, name: str, owner: str | None = None, priority: int = 0, most: int | None = None, budget: int = 50
    ) -> int:
        made = optuna.create_study(study_name=name, storage=self.leases.storage, direction=StudyDirection.MAXIMIZE)
        terms = Terms(budget=budget, priority=priority, max_workers=most)
        self.leases.open_study(made._study_id, terms, {}, owner)
        return made._study_id

    def work(self, worker: str, aside: tuple[int, ...] = ()) -> str | None:
        """Let the worker look for a trial as standing workers do; the name of the study that it got one of."""
        if worker not in self.held:
            self.leases.register(worker)
        self.end(worker)
        for study_id, name in self.leases.turns(aside).items():
            if study_id in aside:
                continue
            try:
                lease = self.leases.acquire(study_id, worker, aside=aside)
            except StudyOver:
                continue
            if lease is not None:
                self.held[worker] = (name, lease)
                return name
        return None

    def end(self, worker: str) -> None:
        """The worker's trial ends."""
        if worker in self.held:
            _, lease = self.held.pop(worker)
            self.leases.storage.finish_trial(lease.trial_id, TrialState.COMPLETE, [0.5], {"seed": 0})

    def shares(self) -> Counter[str]:
        return Counter(name for name, _ in self.held.values())


@pytest.fixture
def pool(leases: Leases) -> Pool:
    return Pool(leases)


def test_four_workers_serve_three_studies_of_two_owners(pool: Pool) -> None:
    """Half of them each owner, and an owner's half the study of the higher priority."""
    pool.study("old", "ada")
    pool.study("urgent", "ada", priority=5)
    pool.study("grace", "grace", priority=-3)  # priorities are among an owner's own
    for number in range(4):
        assert pool.work(f"w{number}") is not None
    assert pool.shares() == {"urgent": 2, "grace": 2}
    for number in (0, 3, 1, 2, 2, 0):  # and so it stays, whichever trials end
        pool.work(f"w{number}")
        assert pool.shares() == {"urgent": 2, "grace": 2}


def test_what_one_owner_does_not_need_is_the_others(pool: Pool) -> None:
    pool.study("short", "ada", budget=1)
    pool.study("long", "grace")
    assert [pool.work(f"w{number}") for number in range(4)] == ["short", "long", "long", "long"]
    pool.study("more", "ada")
    assert pool.work("w1") == "more"
    assert pool.work("w0") == "more"
    assert pool.shares() == {"more": 2, "long": 2}


def test_one_worker_takes_turns_among_owners(pool: Pool) -> None:
    """Whoever is served at a tie is the one who waited longest, not the oldest study for ever."""
    pool.study("ada", "ada")
    pool.study("grace", "grace")
    pool.study("shell")
    assert [pool.work("w") for _ in range(6)] == ["ada", "grace", "shell"] * 2


def test_equal_priorities_go_by_age(pool: Pool) -> None:
    pool.study("first", "ada", budget=2)
    pool.study("second", "ada")
    assert [pool.work("w") for _ in range(4)] == ["first", "first", "second", "second"]


def test_a_study_has_no_more_trials_at_once_than_it_allows(pool: Pool) -> None:
    study_id = pool.study("capped", "ada", most=1)
    assert [pool.work(f"w{number}") for number in range(2)] == ["capped", None]
    assert pool.leases.acquire(study_id, "its own") is None  # nor do workers of its own get one
    assert not pool.leases.offers_trial(study_id)
    pool.study("other", "ada", priority=-1)
    assert pool.work("w1") == "other"
    pool.leases.share(study_id, priority=0, max_workers=2)
    assert pool.work("w1") == "capped"


def test_a_trial_that_was_given_back_is_adopted_within_the_limit(pool: Pool) -> None:
    study_id = pool.study("capped", most=1)
    pool.work("w0")
    _, lease = pool.held.pop("w0")
    pool.leases.release(lease)
    adopted = pool.leases.acquire(study_id, "other")
    assert adopted is not None
    assert (adopted.trial_id, adopted.adopted) == (lease.trial_id, True)
    assert pool.leases.acquire(study_id, "third") is None


def test_workers_of_a_study_do_not_count_as_its_owners_share(pool: Pool) -> None:
    """Whoever brings machines of his own loses nothing of the shared ones."""
    own = pool.study("ada", "ada")
    pool.study("grace", "grace")
    pool.leases.register("mine", own)
    for _ in range(3):
        assert pool.leases.acquire(own, "mine") is not None
    assert [pool.work(f"w{number}") for number in range(4)] == ["ada", "grace", "ada", "grace"]


def test_a_study_that_a_worker_has_set_aside_holds_up_no_other(pool: Pool) -> None:
    broken = pool.study("broken", "ada", priority=9)
    pool.study("whole", "ada")
    assert pool.work("w0", aside=(broken,)) == "whole"
    assert pool.work("w1") == "broken"


def test_what_waits_to_be_promoted_comes_first_unless_somebody_does_it(pool: Pool) -> None:
    """It is soon done, and would wait for as long as others have trials."""
    endless = pool.study("endless", "ada", priority=9)
    done = pool.study("done", "ada", budget=1)
    pool.leases.share(done, priority=10, max_workers=None)
    assert pool.work("w") == "done"
    assert list(pool.leases.turns()) == [endless, done]
    pool.end("w")
    assert list(pool.leases.turns()) == [done, endless]
    assert pool.leases.acquire_promotion(done, "w")
    assert list(pool.leases.turns()) == [endless, done]


def test_a_choice_that_others_have_overtaken_is_not_taken(pool: Pool) -> None:
    """Two workers look at once and see the same order: the second finds that it is the other owner's turn."""
    ada, grace = pool.study("ada", "ada"), pool.study("grace", "grace")
    pool.leases.register("w0")
    pool.leases.register("w1")
    order = list(pool.leases.turns())
    assert order == [ada, grace]
    assert pool.leases.acquire(ada, "w0", aside=()) is not None
    assert pool.leases.acquire(ada, "w1", aside=()) is None  # to be tried again, and no end of the study
    assert pool.leases.acquire(grace, "w1", aside=()) is not None


def test_workers_that_look_at_once_share_as_those_that_look_in_turn(pool: Pool, database_url: str) -> None:
    pool.study("a1", "ada", priority=1, most=3)
    pool.study("a2", "ada")
    pool.study("b", "bob")
    ready, found = threading.Barrier(8), []

    def look(worker: str) -> None:
        mine = Pool(Leases(trial_storage(database_url)))
        ready.wait(60)
        while mine.work(worker) is None:
            pass
        found.append(mine.held[worker][0])
        mine.leases.storage.close()

    threads = [threading.Thread(target=look, args=(f"w{number}",)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert Counter(found) == {"a1": 3, "a2": 1, "b": 4}


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    studies=st.lists(
        st.tuples(
            st.sampled_from(["ada", "bob", None]), st.integers(-1, 1), st.sampled_from([None, 1, 2]), st.integers(0, 4)
        ),
        min_size=1,
        max_size=5,
    ),
    steps=st.lists(st.integers(0, 3), max_size=12),
)
def test_the_statement_keeps_the_rule(
    pool: Pool,
    database_url: str,
    studies: list[tuple[str | None, int, int | None, int]],
    steps: list[int],
) -> None:
    """Whatever the studies are, each worker gets what the rule says, in plain Python."""
    execute(database_url, "DELETE FROM hpo.workers")
    for study in pool.leases.storage.get_all_studies():
        pool.leases.storage.delete_study(study._study_id)
    pool.held.clear()
    left = {}
    for number, (owner, priority, most, budget) in enumerate(studies):
        pool.study(f"s{number}", owner, priority, most, budget)
        left[f"s{number}"] = budget
    served: dict[str | None, int] = {}  # owner -> when last
    for moment, step in enumerate(steps):
        worker = f"w{step}"
        pool.end(worker)
        expected = ranked(studies, left, pool.shares(), served)
        assert pool.work(worker) == expected
        if expected is not None:
            left[expected] -= 1
            served[studies[int(expected[1:])][0]] = moment


def ranked(
    studies: list[tuple[str | None, int, int | None, int]],
    left: dict[str, int],
    shares: Counter[str],
    served: dict[str | None, int],
) -> str | None:
    """The study whose turn it is."""
    owners: Counter[str | None] = Counter()
    for name, count in shares.items():
        owners[studies[int(name[1:])][0]] += count
    rank: dict[str, tuple[int, int, int, int]] = {}
    for number, (owner, priority, most, _) in enumerate(studies):
        name = f"s{number}"
        if left[name] and (most is None or shares[name] < most):
            rank[name] = (owners[owner], served.get(owner, -1), -priority, number)
    return min(rank, key=lambda name: rank[name]) if rank else None
