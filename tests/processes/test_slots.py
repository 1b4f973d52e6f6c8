"""Several trials at once in one worker process: the same bits as one at a time, and memory that runs out."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from optuna.trial import FrozenTrial, TrialState

from hpo.models.training.training import TrainingInterrupted
from hpo.study.config import TrainSection
from hpo.study.entries import largest as most
from hpo.study.plan import Plan
from hpo.study.space import default_space
from hpo.trial.device_lock import SharedExclusiveLock
from hpo.worker import slots
from hpo.worker.slots import Places, largest
from tests.conftest import Cli, wait_for

SPACE = """
hidden_size = { low = 4, high = 12 }
layers = 2
dropout = { low = 0.1, high = 0.5 }
batch_size = 16
head_size = 4
learning_rate = { low = 1e-3, high = 1e-1, log = true }
stem = "patch"
difference = false
"""
DETACHED = ("--detach", "--set", "data.validation=0.25")  # one model a trial

LONG = """
stem = "none"
difference = false
sequence_length = 0
hidden_size = 128
layers = 1
bidirectional = false
batch_size = 64
pooling = "last"
head_size = 0
normalization = "none"
learning_rate = { low = 1e-3, high = 1e-1, log = true }
"""


@pytest.fixture
def random_study(study_file: Callable[..., Path]) -> Callable[..., Path]:
    """random_study(9) writes a study whose trials depend on nothing but their numbers."""

    def write(trials: int, space: str = SPACE, epochs: int = 8) -> Path:
        return study_file(trials, epochs, space, study='sampler = "random"\npruner = "none"')

    return write


def test_results_depend_neither_on_the_number_of_slots_nor_on_the_neighbours(
    cli: Cli, random_study: Callable[..., Path], trials: Callable[..., list[FrozenTrial]]
) -> None:
    found: dict[int, list[FrozenTrial]] = {}
    for count in (1, 3):
        name = f"with-{count}"
        assert cli("launch", random_study(9), *DETACHED, "--set", f"study.name={name}").returncode == 0
        done = cli("worker", "--study", name, "--slots", count)
        assert done.returncode == 0, done.stderr
        assert f"slots: {count}" in done.stderr
        found[count] = trials(name)
    one, three = found[1], found[3]
    assert [trial.number for trial in three] == list(range(9))
    for alone, beside in zip(one, three, strict=True):
        assert beside.params == alone.params
        assert beside.user_attrs["curve"] == alone.user_attrs["curve"]
        assert beside.value == alone.value
    assert overlaps(three)
    assert not overlaps(one)


def overlaps(found: list[FrozenTrial]) -> bool:
    """Whether some trial began before another that began earlier had ended."""
    spans = sorted((trial.datetime_start, trial.datetime_complete) for trial in found)
    return any(later[0] < earlier[1] for earlier, later in itertools.pairwise(spans))  # type: ignore[operator]


def most_at_once(found: list[FrozenTrial]) -> int:
    """How many trials were running at the same time."""
    begins = [(trial.datetime_start, 1) for trial in found]
    ends = [(trial.datetime_complete, -1) for trial in found]
    return max(itertools.accumulate(step for _, step in sorted(begins + ends)))


# A standing worker's own entry, where each study's number of trials at once is in its name.
CHOOSING = """
import hpo.worker.slots, hpo.worker.worker
hpo.worker.slots.choose_slots = lambda plan, device: int(plan.config.study.name[-1])
hpo.worker.worker.work(None, slots=None)
"""


def test_a_worker_started_before_any_study_runs_as_many_trials_at_once_as_each_study_allows(
    cli: Cli,
    environment: dict[str, str],
    random_study: Callable[..., Path],
    trials: Callable[..., list[FrozenTrial]],
    tmp_path: Path,
) -> None:
    """Studies one after another: slots begin with the second, wait during the third, and two go on with the fourth."""
    log = tmp_path / "worker.log"
    with log.open("wb") as output:
        worker = subprocess.Popen([sys.executable, "-P", "-c", CHOOSING], env=environment, stderr=output)
    try:
        wait_for(lambda: "slots: auto, ready" in log.read_text())
        names = ["first-1", "second-3", "third-1", "fourth-2"]
        for name in names:
            assert cli("launch", random_study(6, epochs=24), *DETACHED, "--set", f"study.name={name}").returncode == 0
        wait_for(lambda: worker.poll() is not None or log.read_text().count("is version 1") == 4, 120)
        worker.terminate()
        assert worker.wait(30) == 0, log.read_text()
    finally:
        worker.kill()
        worker.wait()
    for name in names:
        assert log.read_text().count(f"study {name}: trials at once: {name[-1]}") == 1
    assert cli("launch", random_study(6, epochs=24), *DETACHED, "--set", "study.name=alone").returncode == 0
    assert cli("worker", "--study", "alone", "--slots", 1).returncode == 0
    first, second, third, fourth = (trials(name) for name in names)
    for found in (first, second, third, fourth):
        assert [(one.params, one.user_attrs["curve"]) for one in found] == [
            (one.params, one.user_attrs["curve"]) for one in trials("alone")
        ]
    assert [most_at_once(found) for found in (first, third, first + third)] == [1, 1, 1]
    assert 1 < most_at_once(second) <= 3
    assert most_at_once(fourth) == 2
    last_of_first = max(trial.datetime_complete for trial in first if trial.datetime_complete)
    last_of_second = max(trial.datetime_complete for trial in second if trial.datetime_complete)
    assert all(trial.datetime_start and trial.datetime_start >= last_of_first for trial in second)
    assert all(trial.datetime_start and trial.datetime_start >= last_of_second for trial in third)


class TestPlaces:
    @pytest.fixture
    def places(self, monkeypatch: pytest.MonkeyPatch) -> Places:
        """Of studies 1 to 3, which allow as many trials at once."""
        made = Places(None)
        for number in (1, 2, 3):
            monkeypatch.setattr(slots, "choose_slots", lambda plan, device, number=number: number)
            plan: Any = None
            made.meet(number, f"study-{number}", plan, "cpu")
        return made

    def test_no_more_trials_run_than_the_least_number_of_their_studies(self, places: Places) -> None:
        with places.place(3) as one, places.place(3) as two, places.place(1) as refused:
            assert (one, two, refused) == (True, True, False)
            with places.place(2) as refused, places.place(3) as three:
                assert (refused, three) == (False, True)
        with places.place(1) as one, places.place(3) as refused:
            assert (one, refused) == (True, False)
        with places.place(2) as one, places.place(3) as two, places.place(3) as refused:
            assert (one, two, refused) == (True, True, False)

    def test_another_slot_is_wanted_where_all_are_busy_and_one_more_trial_may_begin(self, places: Places) -> None:
        with places.place(2):
            assert places.wants(2, 1)
            assert not places.wants(2, 2)
            with places.place(2):
                assert not places.wants(2, 2)

    def test_a_number_that_was_given_is_every_studys(self) -> None:
        plan: Any = None
        made = Places(2)
        for study_id in (1, 2):
            made.meet(study_id, "any", plan, "cuda:0")
        with made.place(1) as one, made.place(2) as two, made.place(1) as three:
            assert (one, two, three) == (True, True, False)


class TestUsableMemory:
    @pytest.mark.parametrize(("workers", "cards", "share"), [(None, 1, 1), ("8", 1, 8), ("8", 4, 2), ("5", 4, 2)])
    def test_is_what_is_free_or_kept_by_this_process_shared_by_the_workers_of_the_card(
        self, workers: str | None, cards: int, share: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("HPO_WORKERS", raising=False)
        if workers is not None:
            monkeypatch.setenv("HPO_WORKERS", workers)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (6 * 2**30, 80 * 2**30))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2 * 2**30)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
        assert slots.usable_memory("cuda:0") == 8 * 2**30 // share

    def test_decides_how_many_trials_run_at_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        space = default_space(n=1000, steps=500, features=3)
        plan = SimpleNamespace(
            config=SimpleNamespace(space=space, train=TrainSection(epochs=4)),
            **{"features": ("a", "b", "c"), "classes": ("x", "y"), "steps": 500, "metric": "auroc"},
            **{"sequences": 1000, "members": 5, "validated": 200, "epsilon": 0.0, "interval": 0.0},
        )
        plan.classifier = MethodType(Plan.classifier, plan)
        found = []
        for gib in (0, 20, 2**20):
            monkeypatch.setattr(slots, "usable_memory", lambda device, gib=gib: gib * 2**30)
            found.append(slots.choose_slots(plan, "cuda:0"))  # type: ignore[arg-type]
        assert found == sorted(found)
        assert (found[0], found[-1]) == (1, slots.MOST)
        assert 1 < found[1] < found[2]
        assert slots.choose_slots(plan, "cpu") == 1  # type: ignore[arg-type]


# The worker's own entry, in a process whose memory is limited to what it has once all is loaded, and so much more.
LIMITED = """
import resource, sys
import hpo.worker.worker
size = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize")) * 1024
limit = size + int(sys.argv[2]) * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
promote = hpo.worker.worker.promote_when_over
def unlimited(*given):  # it loads more libraries, and is none of what is tested
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return promote(*given)
hpo.worker.worker.promote_when_over = unlimited
hpo.worker.worker.work(sys.argv[1], slots=int(sys.argv[3]))
"""


def run_limited(environment: dict[str, str], name: str, mib: int, slots: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-c", LIMITED, name, str(mib), str(slots)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.skipif(sys.platform != "linux", reason="limits a process's memory as Linux does")
class TestMemoryThatRunsOut:
    def test_a_trial_that_never_fits_fails_with_its_sizes_and_leaves_its_neighbours_alone(
        self,
        cli: Cli,
        environment: dict[str, str],
        random_study: Callable[..., Path],
        trials: Callable[..., list[FrozenTrial]],
    ) -> None:
        space = SPACE.replace("{ low = 4, high = 12 }", "[8, 4096]")
        assert cli("launch", random_study(6, space, epochs=2), *DETACHED).returncode == 0
        # less than one matrix takes, so that nothing is left in pieces, of which no thread can be made
        done = run_limited(environment | {"MALLOC_ARENA_MAX": "1"}, "waves", 250, 2)
        assert done.returncode == 0, done.stderr
        found = trials()
        states = {trial.number: trial.state for trial in found}
        large = [trial for trial in found if trial.params["hidden_size"] == 4096]
        assert large
        assert len(states) == 6
        for trial in found:
            failed = trial.params["hidden_size"] == 4096
            assert trial.state == (TrialState.FAIL if failed else TrialState.COMPLETE)
        assert "OutOfMemory: out of memory on cpu: hidden_size 4096" in large[0].user_attrs["failure"]
        assert "waits until it has the device for itself" in done.stderr
        models = json.loads(cli("models", "--json").stdout)
        assert [model["name"] for model in models] == ["waves"]

    def test_a_trial_that_does_not_fit_beside_others_is_run_alone(
        self,
        cli: Cli,
        environment: dict[str, str],
        random_study: Callable[..., Path],
        trials: Callable[..., list[FrozenTrial]],
    ) -> None:
        """Long sequences on torch's LSTM: what the backward pass keeps is some 900 MiB, too much for four in 2400, and
        so little for one that it does not matter in how many pieces the others left the memory."""
        file = random_study(4, LONG, epochs=2)
        random = np.random.default_rng(0)
        np.savez(file.parent / "waves.npz", X=random.normal(0, 1, (80, 1500, 1)), y=np.arange(80) % 2)
        assert cli("launch", file, *DETACHED).returncode == 0
        done = run_limited(environment | {"HPO_NATIVE": "0"}, "waves", 2400, 4)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "waits until it has the device for itself" in done.stderr
        found = trials()
        assert [trial.user_attrs.get("failure") for trial in found] == [None] * 4
        assert [trial.state for trial in found] == [TrialState.COMPLETE] * 4
        assert [trial.user_attrs["attempt"] for trial in found] == [1] * 4


# The worker's own entry, in a process that can have no more threads of the kinds named.
NO_THREADS = """
import sys, threading
from hpo.worker import worker
start = threading.Thread.start
def refuse(thread):
    if thread.name.startswith(tuple(sys.argv[2:])):
        raise RuntimeError("can't start new thread")
    start(thread)
threading.Thread.start = refuse
worker.work(sys.argv[1])
"""


class TestThreadsThatCannotBeStarted:
    """As in a process whose memory or number of processes is limited (ulimit -v, ulimit -u)."""

    def run(self, environment: dict[str, str], *names: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-P", "-c", NO_THREADS, "waves", *names]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)

    def test_what_they_would_do_beside_the_training_is_done_in_its_own(
        self,
        cli: Cli,
        environment: dict[str, str],
        random_study: Callable[..., Path],
        trials: Callable[..., list[FrozenTrial]],
    ) -> None:
        assert cli("launch", random_study(2, epochs=3), *DETACHED).returncode == 0
        done = self.run(environment, "hpo-storage", "ThreadPoolExecutor")
        assert done.returncode == 0, done.stderr
        found = trials()
        assert [trial.state for trial in found] == [TrialState.COMPLETE] * 2
        assert [len(trial.intermediate_values) for trial in found] == [3] * 2
        assert [model["name"] for model in json.loads(cli("models", "--json").stdout)] == ["waves"]

    def test_a_worker_without_a_heartbeat_ends_and_its_trial_goes_on_in_another(
        self,
        cli: Cli,
        environment: dict[str, str],
        random_study: Callable[..., Path],
        trials: Callable[..., list[FrozenTrial]],
    ) -> None:
        assert cli("launch", random_study(2, epochs=2), *DETACHED).returncode == 0
        done = self.run(environment, "hpo-heartbeat")
        assert done.returncode == 1
        assert "the thread hpo-heartbeat could not be started" in done.stderr
        assert cli("worker", "--study", "waves").returncode == 0
        assert [trial.state for trial in trials()] == [TrialState.COMPLETE] * 2


class TestSharedExclusiveLock:
    def test_who_wants_to_be_alone_waits_for_those_inside_and_keeps_others_out(self) -> None:
        lock, order = SharedExclusiveLock(), []
        inside, leave, alone = threading.Event(), threading.Event(), threading.Event()

        def neighbour() -> None:
            with lock.shared(never):
                inside.set()
                leave.wait(30)
                order.append("neighbour left")

        def late() -> None:
            alone.wait(30)
            with lock.shared(never):
                order.append("late came in")

        threads = [threading.Thread(target=target) for target in (neighbour, late)]
        for thread in threads:
            thread.start()
        inside.wait(30)
        with lock.shared(never):
            leave.set()
            with lock.exclusive(never):
                alone.set()
                threads[1].join(0.3)
                order.append("alone")
        for thread in threads:
            thread.join(30)
        assert order == ["neighbour left", "alone", "late came in"]

    def test_two_that_want_to_be_alone_take_turns(self) -> None:
        lock, both, now, most = SharedExclusiveLock(), threading.Barrier(2), [0], [0]

        def trial() -> None:
            with lock.shared(never):
                both.wait(30)
                with lock.exclusive(never):
                    now[0] += 1
                    most[0] = max(most[0], now[0])
                    threading.Event().wait(0.05)
                    now[0] -= 1

        threads = [threading.Thread(target=trial) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert most == [1]
        with lock.shared(never), lock.exclusive(never):
            pass  # nothing is left behind

    def test_waiting_ends_when_it_is_no_longer_wanted_and_leaves_the_lock_open(self) -> None:
        lock, leave = SharedExclusiveLock(), threading.Event()
        inside = threading.Event()

        def neighbour() -> None:
            with lock.shared(never):
                inside.set()
                leave.wait(30)

        thread = threading.Thread(target=neighbour)
        thread.start()
        inside.wait(30)
        with pytest.raises(TrainingInterrupted), lock.shared(never), lock.exclusive(lambda: True):
            raise AssertionError("it cannot have been alone")
        with lock.shared(lambda: True):
            leave.set()
        thread.join(30)


def never() -> bool:
    return False


def test_the_largest_trial_of_a_space_takes_the_most_memory() -> None:
    space = default_space(n=1000, steps=500, features=3, gaps=True)
    plan: Any = type("OfASpace", (), {"config": type("Config", (), {"space": space})})
    found = largest(plan)
    for name in ("hidden_size", "layers", "stem_layers", "stem_width"):
        assert found[name] == most(space[name])
    assert (found["bidirectional"], found["stem"]) == (True, "conv")
    assert found["stem_stride"] == min(space["stem_stride"].values)  # type: ignore[union-attr]
    plan.config.space = space | {"stem": "patch"}
    assert largest(plan)["patch_length"] == min(space["patch_length"].values)  # type: ignore[union-attr]
    assert (found["normalization"], found["missing"]) == ("channel", "mask")
