"""Under `[study] parallel = K` a study follows from its file, its data and K: not from who is faster, dies or adopts.

Logical workers take, draw, report and end trials in an order that the test chooses, on a real database; an epoch's
value is a function of the configuration. What comes out is compared with the same study from one worker.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from optuna.trial import TrialState

from hpo.models.fields import Value
from hpo.storage.artifacts import ArtifactStore, artifact_store
from hpo.storage.changes import drop
from hpo.storage.errors import StudyOver
from hpo.storage.heartbeat import Progress
from hpo.storage.leases import Lease
from hpo.storage.trials import TrialStorage, trial_storage
from hpo.study.config import PRUNERS, SAMPLERS, ConfigError, load
from hpo.study.lifecycle import OpenStudy, create_or_open, open_study
from hpo.study.plan import StudyConflict
from hpo.study.view import VIEW
from tests.conftest import STEPPED, execute, fresh_database

STUDY = """
[study]
name = "{name}"
trials = {trials}
sampler = "{sampler}"
pruner = "{pruner}"
seed = {seed}
finalists = 0
{more}
[data]
train = "waves.npz"
validation = 0.3
[train]
epochs = 9
[space]
{space}{tables}
"""
SMALL = """
hidden_size = [2, 4]
learning_rate = [0.01, 0.02]
weight_decay = 0.0
dropout = 0.1
layers = 1
"""  # four configurations, in place of the entries of the same name
EPOCHS = 9
TRIALS = 18  # the samplers that learn begin to after ten, which they must see
ENQUEUED = "[[enqueue]]\nhidden_size = 4\nlayers = 1\n[[enqueue]]\nlearning_rate = 0.03"

History = list[tuple[Any, ...]]  # a trial each: number, state, parameters, values by epoch, value
names = map("waves-{}".format, count())


def curve(params: Mapping[str, Value], epoch: int) -> float:
    """The validation value of these parameters after an epoch: worse ones are known early, but not surely."""
    text = json.dumps(params, sort_keys=True)
    quality = random.Random(hashlib.sha256(text.encode()).digest()).random()
    return 0.5 + 0.04 * epoch * quality + 0.05 * random.Random(f"{text} {epoch}").random()


@dataclass
class Worker:
    """A logical worker: what one process knows."""

    name: str
    study: OpenStudy
    lease: Lease | None = None
    params: dict[str, Value] | None = None
    epoch: int = 0
    over: bool = False

    def step(self, fails: float) -> None:
        """Take a trial, draw its parameters, train an epoch of it or end it; fails: the share of trials that fail."""
        if self.lease is None:
            self._take()
        elif self.params is None:
            self.params = self.study.sampler.parameters(self.lease.trial_id)
        elif random.Random(f"fails {self.params}").random() < fails and self.epoch == 2:
            self._end(TrialState.FAIL)
        elif self.epoch == EPOCHS:
            self._end(TrialState.COMPLETE)
        else:
            self._train()

    def _take(self) -> None:
        try:
            if self.study.sampler.exhausted():
                self.study.leases.exhaust(self.study.study_id)
            self.lease = self.study.leases.acquire(self.study.study_id, self.name, "cpu", judge=self.study.judge)
        except StudyOver:
            self.over = True

    def _train(self) -> None:
        assert self.lease is not None
        assert self.params is not None
        self.epoch += 1
        self.study.storage.set_trial_intermediate_value(self.lease.trial_id, self.epoch, curve(self.params, self.epoch))
        asks = self.epoch < EPOCHS and self.study.may_prune(self.lease.number, self.epoch)
        if asks and self.study.should_prune(self.lease.trial_id):
            self._end(TrialState.PRUNED)

    def _end(self, state: TrialState) -> None:
        assert self.lease is not None
        assert self.params is not None
        values = [max(curve(self.params, epoch) for epoch in range(1, self.epoch + 1))]
        attributes = {"seed": 0, "params": self.params}
        self.study.storage.finish_trial(
            self.lease.trial_id, state, None if state is TrialState.FAIL else values, attributes
        )
        self.lease, self.params, self.epoch = None, None, 0

    def die(self) -> None:
        """Another process goes on in its place, knowing nothing; what it held is free."""
        if self.lease is not None:
            self.study.leases.release(self.lease)
        self.lease, self.params, self.epoch, self.over = None, None, 0, False
        self.study = open_study(self.study.name, self.study.storage)


@dataclass
class Bench:
    """Where studies are made and run."""

    folder: Path
    storages: list[TrialStorage]
    store: ArtifactStore
    made: list[OpenStudy] = field(default_factory=list)

    def open(self, text: str) -> OpenStudy:
        file = self.folder / "waves.toml"
        file.write_text(text)
        return create_or_open(load(file), self.storages[0], self.store)

    def run(
        self, text: str, workers: int, chance: random.Random | None = None, deaths: float = 0.0, fails: float = 0.0
    ) -> History:
        """The history of a study from so many workers, whose turns are drawn; without chance they take turns."""
        study = self.open(text)
        group = [
            Worker(f"worker-{index}", open_study(study.name, storage))
            for index, storage in zip(range(workers), self.storages, strict=False)
        ]
        turns = count()
        while not all(worker.over for worker in group):
            worker = group[next(turns) % workers if chance is None else chance.randrange(workers)]
            if chance is not None and chance.random() < deaths:
                worker.die()
            worker.step(fails)
        return self.history(study)

    def history(self, study: OpenStudy) -> History:
        found = self.storages[0].get_all_trials(study.study_id)
        return [(t.number, t.state.name, t.params, t.intermediate_values, t.values) for t in found]


@pytest.fixture(scope="module")
def bench(server: str, template: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("parallel")
    numbers = np.random.default_rng(0)
    np.savez(folder / "waves.npz", X=numbers.normal(size=(60, 8, 1)), y=np.arange(60) % 2)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with fresh_database(server, template) as url:
        storages = [trial_storage(url) for _ in range(3)]
        yield Bench(folder, storages, artifact_store(str(folder / "artifacts")))
        for storage in storages:
            storage.close()


def study(
    sampler: str = "random",
    pruner: str = "hyperband",
    trials: int = 14,
    more: str = "parallel = 3",
    tables: str = "",
    seed: int = 7,
    small: bool = False,
) -> str:
    text = STUDY.format(
        space=STEPPED,
        name=next(names),
        trials=trials,
        sampler=sampler,
        pruner=pruner,
        more=more,
        tables=tables,
        seed=seed,
    )
    if small:
        given = [line.partition(" =")[0] for line in SMALL.split("\n") if line]
        kept = [line for line in text.splitlines() if line.partition(" =")[0] not in given]
        kept.insert(kept.index("[space]") + 1, SMALL)
        text = "\n".join(kept)
    return text


@pytest.mark.parametrize(
    ("sampler", "pruner"),
    [*((sampler, "none") for sampler in SAMPLERS), *(("tpe", pruner) for pruner in PRUNERS[:3])],
)
def test_a_study_is_the_same_from_one_worker_and_from_three_that_die(bench: Bench, sampler: str, pruner: str) -> None:
    alone = bench.run(study(sampler, pruner, TRIALS), 1)
    assert len(alone) == TRIALS
    chance = random.Random(f"{sampler} {pruner}")
    assert bench.run(study(sampler, pruner, TRIALS), 3, chance, deaths=0.05) == alone
    assert {state for _, state, *_ in alone} == ({"COMPLETE"} if pruner == "none" else {"COMPLETE", "PRUNED"})


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    sampler=st.sampled_from([name for name in SAMPLERS if name != "gp"]),
    pruner=st.sampled_from(PRUNERS),
    parallel=st.integers(1, 6),
    tables=st.sampled_from(["", ENQUEUED]),
    patience=st.sampled_from([0, 0, 4]),
    fails=st.sampled_from([0.0, 0.2]),
    deaths=st.sampled_from([0.0, 0.1]),
    small=st.booleans(),
    chance=st.randoms(use_true_random=False),
)
def test_any_study_is_the_same_in_whatever_order_three_workers_come(
    bench: Bench,
    sampler: str,
    pruner: str,
    parallel: int,
    tables: str,
    patience: int,
    fails: float,
    deaths: float,
    small: bool,
    chance: random.Random,
) -> None:
    made: dict[str, Any] = {"more": f"parallel = {parallel}\npatience = {patience}", "small": small}
    if not (small or sampler == "grid"):  # neither holds what is queued here
        made["tables"] = tables
    alone = bench.run(study(sampler, pruner, 12, **made), 1, fails=fails)
    order = random.Random(chance.getrandbits(64))
    assert bench.run(study(sampler, pruner, 12, **made), 3, order, deaths, fails) == alone


@pytest.mark.parametrize("sampler", ["tpe", "random", "grid"])
def test_a_space_of_few_configurations_ends_a_study_at_the_same_trial(bench: Bench, sampler: str) -> None:
    for workers in (1, 3):
        chance = random.Random(workers)
        found = bench.run(study(sampler, "none", 12, small=True), workers, chance)
        assert sorted(json.dumps(params) for _, _, params, *_ in found) == sorted(
            json.dumps({"hidden_size": size, "learning_rate": rate}) for size in (2, 4) for rate in (0.01, 0.02)
        )


def test_a_longer_run_has_the_shorter_one_as_its_beginning(bench: Bench) -> None:
    longer = bench.run(study("tpe", trials=14), 1)
    text = study("tpe", trials=6)
    assert bench.run(text, 3, random.Random(1)) == longer[:6]
    assert bench.run(text.replace("trials = 6", "trials = 14"), 3, random.Random(2)) == longer


def test_patience_ends_a_study_at_the_same_trial_and_a_larger_one_goes_on(bench: Bench) -> None:
    alone = bench.run(study(trials=40, more="parallel = 3\npatience = 5"), 1)
    assert len(alone) < 40
    text = study(trials=40, more="parallel = 3\npatience = 5")
    assert bench.run(text, 3, random.Random(3)) == alone
    longer = bench.run(study(trials=40, more="parallel = 3\npatience = 11"), 1)
    assert len(longer) > len(alone)
    assert bench.run(text.replace("patience = 5", "patience = 11"), 3, random.Random(4)) == longer


def test_a_warm_started_study_sees_what_was_copied_from_its_first_trial_on(bench: Bench) -> None:
    first = study("random", trials=12)
    bench.run(first, 1)
    name = first.split('name = "')[1].split('"')[0]
    warm: dict[str, Any] = {"more": f'parallel = 4\nwarm_start = "{name}"', "trials": 6}
    alone = bench.run(study("tpe", **warm), 1)
    assert len(alone) > 6
    assert bench.run(study("tpe", **warm), 3, random.Random(5), deaths=0.1) == alone
    text = study("tpe", **warm)
    opened = bench.open(text)
    lease = opened.leases.acquire(opened.study_id, "tester", "cpu")
    assert lease is not None
    trial = opened.storage.get_trial(lease.trial_id)
    with opened.counted.seen_by(opened.study_id, trial):
        assert {t.state for t in opened.optuna_study.get_trials()} == {TrialState.COMPLETE}
    opened.leases.release(lease)


def drawn(opened: OpenStudy, worker: str = "tester") -> Lease:
    """A trial with its parameters."""
    lease = opened.leases.acquire(opened.study_id, worker, "cpu")
    assert lease is not None
    opened.sampler.parameters(lease.trial_id)
    return lease


def end(opened: OpenStudy, lease: Lease, value: float = 0.5) -> None:
    opened.storage.finish_trial(lease.trial_id, TrialState.COMPLETE, [value], {"seed": 0})


def test_a_trial_starts_once_those_before_it_have_come_far_enough(bench: Bench) -> None:
    opened = bench.open(study(more="parallel = 2"))
    leases = opened.leases
    first = leases.acquire(opened.study_id, "ann", "cpu")
    assert first is not None
    assert leases.acquire(opened.study_id, "bob", "cpu") is None  # the first one's parameters are not drawn
    assert leases.awaits_order(opened.study_id)
    assert not leases.offers_trial(opened.study_id)
    opened.sampler.parameters(first.trial_id)
    second = leases.acquire(opened.study_id, "bob", "cpu")
    assert second is not None
    opened.sampler.parameters(second.trial_id)
    assert not leases.awaits_order(opened.study_id)
    assert leases.acquire(opened.study_id, "cy", "cpu") is None
    end(opened, second)
    assert leases.acquire(opened.study_id, "cy", "cpu") is None  # the first one has not ended
    end(opened, first)
    assert leases.offers_trial(opened.study_id)
    third = leases.acquire(opened.study_id, "cy", "cpu")
    assert third is not None
    assert third.number == 2
    assert not leases.awaits_order(opened.study_id)


def test_what_is_dropped_later_counts_for_a_trial_that_was_drawn_before(bench: Bench) -> None:
    opened = bench.open(study(more="parallel = 2", pruner="median"))
    for number in range(4):
        end(opened, drawn(opened), number / 10)
    lease = drawn(opened)
    drop(opened.storage, opened.study_id, [1], "it was wrong", "somebody")
    opened.leases.release(lease)
    adopter = open_study(opened.name, bench.storages[1])
    adopted = adopter.leases.acquire(adopter.study_id, "other", "cpu")
    assert adopted is not None
    assert adopted.number == lease.number == 4
    for each, numbers in ((adopted, [0, 1, 2, 3]), (drawn(adopter), [0, 2, 3, 4])):
        with adopter.counted.seen_by(adopter.study_id, adopter.storage.get_trial(each.trial_id)):
            seen = adopter.optuna_study.get_trials()
        assert [trial.number for trial in seen] == numbers
    assert adopter.storage.get_trial(adopted.trial_id).system_attrs[VIEW] == []


def test_an_adopted_trial_is_pruned_at_the_rung_at_which_its_holder_died(bench: Bench) -> None:
    """Optuna's attribute of the rung stays with the trial, so that the adopter was let through it."""
    opened = bench.open(study(more="parallel = 1", pruner="halving"))
    for _ in range(4):
        lease = drawn(opened)
        opened.storage.set_trial_intermediate_value(lease.trial_id, 1, 0.9)
        assert not opened.should_prune(lease.trial_id)
        end(opened, lease, 0.9)
    lease = drawn(opened)
    opened.storage.set_trial_intermediate_value(lease.trial_id, 1, 0.1)
    assert opened.should_prune(lease.trial_id)
    opened.storage.session.flush()
    opened.leases.release(lease)
    adopter = open_study(opened.name, bench.storages[1])
    adopted = drawn(adopter, "other")
    assert adopted.adopted
    assert "completed_rung_0" in adopter.storage.get_trial(adopted.trial_id).system_attrs
    adopter.storage.set_trial_intermediate_value(adopted.trial_id, 1, 0.1)
    assert adopter.should_prune(adopted.trial_id)


def test_time_cuts_trials_off_and_more_of_it_lets_them_go_on(bench: Bench) -> None:
    opened = bench.open(text := study(more="parallel = 2\ntimeout = 60"))
    leases, url = opened.leases, opened.storage.url
    first, second = drawn(opened), drawn(opened)
    end(opened, first)
    execute(url, f"UPDATE hpo.terms SET elapsed_s = timeout_s WHERE study_id = {opened.study_id}")
    assert leases.renew("tester", {second: Progress(1)}).out_of_time == {opened.study_id}
    assert leases.acquire(opened.study_id, "other", "cpu") is None  # the second one's holder has not given it back
    assert not leases.acquire_promotion(opened.study_id, "other")
    leases.checkpoint(second, "a/checkpoint", 3)
    leases.release(second)
    with pytest.raises(StudyOver, match="timeout"):
        leases.acquire(opened.study_id, "other", "cpu")
    assert leases.kept_checkpoints(opened.study_id) == ["a/checkpoint"]
    assert leases.acquire_promotion(opened.study_id, "other")
    leases.finish_promotion(opened.study_id, "other", None)
    again = bench.open(text.replace("timeout = 60", "timeout = 900"))
    adopted = again.leases.acquire(again.study_id, "other", "cpu")
    assert adopted is not None
    assert (adopted.number, adopted.adopted, adopted.checkpoint_epoch) == (1, True, 3)


def test_waiting_workers_say_how_long(bench: Bench) -> None:
    opened = bench.open(study(more="parallel = 1"))
    end(opened, first := drawn(opened))
    opened.storage.connection.execute(
        "INSERT INTO trial_user_attributes (trial_id, key, value_json) VALUES (%(trial)s, 'waited_s', '1.5')",
        given={"trial": first.trial_id},
    )
    found = opened.leases.snapshot(opened.study_id).in_order
    assert found is not None
    assert (found.parallel, found.waited_s) == (1, 1.5)
    assert found.trained_s > 0
    assert found.said.startswith("workers waited 1.5 s in all for earlier trials, ")
    other = bench.open(study(more=""))
    assert other.leases.snapshot(other.study_id).in_order is None


def test_bad_values_are_refused_with_the_way_out(bench: Bench) -> None:
    with pytest.raises(ConfigError, match=r"study\.parallel must be at least 1, got 0"):
        bench.open(study(more="parallel = 0"))
    with pytest.raises(ConfigError, match=r"study\.parallel must be a whole number, got \"all\""):
        bench.open(study(more='parallel = "all"'))
    with pytest.raises(ConfigError, match=r"study\.parallel must be left out beside limits\.latency_ms.*got 3; limit"):
        bench.open(study(tables="[limits]\nlatency_ms = 5.0"))
    text = study(more="parallel = 2")
    bench.open(text)
    with pytest.raises(StudyConflict, match=r"study\.parallel: stored 2, file 3"):
        bench.open(text.replace("parallel = 2", "parallel = 3"))
    with pytest.raises(StudyConflict, match=r"study\.parallel: stored 2, file not set"):
        bench.open(text.replace("parallel = 2", ""))
