"""A device that fails, in whole launches: real workers, in which a training step raises what CUDA would raise.

Sources of the errors. PyTorch's notes on CUDA semantics (asynchronous execution) and its error texts: after an illegal
address or an assert on the device the context of the process is lost, and each later call fails with the same error
("CUDA kernel errors might be asynchronously reported at some other API call"). Such errors are called sticky; one in
the arguments of a launch is not, the next call works. A full card shows as torch.OutOfMemoryError from PyTorch's
allocator, and as CUBLAS_STATUS_NOT_INITIALIZED or ALLOC_FAILED where a library finds no room for its handle (pytorch
issue 16831).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import FrozenTrial, TrialState

from tests.conftest import Cli, assert_exact

# Read at the start of every Python process of a test: workers run on a "card" that is the CPU by another name, where
# the steps of some trials, known by their seeds, fail a number of times.
FAULTS = """
import os, sys
from pathlib import Path

if "launch" in sys.orig_argv:
    import hpo.launcher.workers
    hpo.launcher.workers.PAUSE_S = 0.05

if {"worker", "hpo.launcher.forkserver_process"} & {*sys.orig_argv}:
    import torch
    import hpo.models.device, hpo.trial.device
    from hpo.models.training.learner import Learner
    from hpo.models.training.member import Member
    from hpo.models.bundle.bundle import Bundle

    hpo.trial.device.choose_device = lambda: "cpu:0"
    hpo.trial.device.device_name = lambda device: device
    name, message, at_step, times, seeds, marks = os.environ["FAULT"].split("|")
    dead = []

    def on_device(call):
        def run(*args, **options):
            if dead:
                raise torch.AcceleratorError(message)
            return call(*args, **options)
        return run

    for owner, calls in (
        (Learner, ("__init__", "weights", "state", "restore")), (Member, ("validate",)),
        (hpo.models.device, ("probe",)), (torch.cuda, ("empty_cache",)),
    ):
        for call in calls:
            setattr(owner, call, on_device(getattr(owner, call)))
    def fails(times_at_most, seed=""):
        happens = len(os.listdir(marks)) < times_at_most
        if happens:
            Path(marks, f"{os.getpid()}-{seed}-{len(os.listdir(marks))}").touch()
            if name.startswith("Lost"):
                dead.append(message)
        return happens

    real, real_predict = Learner.step, Bundle._probabilities

    def predict(self, *args):
        if name == "LostPredicting":
            fails(int(times))
        return on_device(real_predict)(self, *args)

    def step(self, *args, **options):
        self.steps = getattr(self, "steps", 0) + 1
        faulty = self.steps == int(at_step) and str(self.config.seed) in seeds.split(",")
        if faulty and fails(int(times), self.config.seed) and not dead:
            raise getattr(torch, name, RuntimeError)(message)
        return on_device(real)(self, *args, **options)

    Learner.step, Bundle._probabilities = step, predict
"""
LOST = ("Lost", "CUDA error: device-side assert triggered")
LOST_PREDICTING = ("LostPredicting", "CUDA error: an illegal memory access was encountered")
NO_MEMORY = ("OutOfMemoryError", "CUDA out of memory. Tried to allocate 2.00 GiB.")
NO_HANDLE = ("RuntimeError", "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`")
NOT_STICKY = ("AcceleratorError", "CUDA error: invalid configuration argument")
TRIALS = 6
SPACE = """
hidden_size = { low = 4, high = 12 }
layers = 1
dropout = { low = 0.1, high = 0.5 }
batch_size = 16
head_size = 4
stem = "patch"
difference = false
"""
Launch = Callable[..., Any]


@pytest.fixture
def launch(cli: Cli, environment: dict[str, str], study_file: Callable[..., Path], tmp_path: Path) -> Launch:
    """launch("name", slots, fault, times, seeds) runs a study in which trials of these seeds meet a fault."""
    (tmp_path / "faults").mkdir()
    (tmp_path / "faults" / "sitecustomize.py").write_text(FAULTS)
    paths = os.pathsep.join(filter(None, (str(tmp_path / "faults"), os.environ.get("PYTHONPATH"))))

    def run(
        name: str,
        slots: int,
        fault: tuple[str, str] = LOST,
        times: int = 0,
        seeds: Any = (),
        holdout: float = 0.0,
        commands: Any = (),
        **more: str,
    ) -> Any:
        marks = tmp_path / f"marks-{name}"
        marks.mkdir()
        file = study_file(TRIALS, 8, SPACE, study='sampler = "random"\npruner = "none"')
        settings = ["--set", f"study.name={name}", "--set", "data.validation=0.25"]
        settings += ["--set", f"data.holdout={holdout}"] if holdout else []
        # In the first epoch of a training: no process gets further than the one before, however slow it is.
        text = "|".join((*fault, "2", str(times), ",".join(map(str, seeds)), str(marks)))
        env = environment | {"PYTHONPATH": paths, "FAULT": text} | more
        if commands:
            assert cli("launch", file, *settings, "--detach").returncode == 0
            return [cli(*command, env=env) for command in commands]
        done = cli("launch", file, *settings, "--workers", 1, "--slots", slots, "--json", "--quiet", env=env)
        (log,) = (tmp_path / "home" / "logs").glob(f"{name}*/worker-0.log")
        done.log, done.faults = log.read_text(), len(list(marks.iterdir()))  # type: ignore[attr-defined]
        return done

    return run


@pytest.fixture
def undisturbed(launch: Launch, trials: Callable[..., list[FrozenTrial]]) -> list[FrozenTrial]:
    """The same study's trials, without a fault."""
    done = launch("undisturbed", 1)
    assert done.returncode == 0, done.stderr + done.log
    return trials("undisturbed")


def assert_equal(found: list[FrozenTrial], wanted: list[FrozenTrial], failed: tuple[int, ...] = ()) -> None:
    """Each trial has what it has without a fault, every epoch reported once; but those that failed."""
    assert_exact(found, len(wanted))
    for one, other in zip(found, wanted, strict=True):
        assert one.params == other.params
        assert one.state == (TrialState.FAIL if one.number in failed else TrialState.COMPLETE), one.user_attrs
        if one.number not in failed:
            assert (one.value, one.user_attrs["curve"]) == (other.value, other.user_attrs["curve"])
            assert one.intermediate_values == other.intermediate_values


def seed_of(trial: FrozenTrial) -> int:
    seed: int = trial.user_attrs["seed"]
    return seed


class TestALostDevice:
    @pytest.mark.parametrize(("slots", "start"), [(1, "spawn"), (3, "fork")])
    def test_ends_the_worker_and_no_trial(
        self,
        slots: int,
        start: str,
        launch: Launch,
        undisturbed: list[FrozenTrial],
        trials: Callable[..., list[FrozenTrial]],
    ) -> None:
        """Once, in the middle of the third trial's second epoch: the next process does the rest."""
        done = launch("waves", slots, LOST, 1, [seed_of(undisturbed[2])], HPO_START=start)
        assert done.returncode == 0, done.stderr + done.log
        assert done.faults == 1
        found = trials()
        assert_equal(found, undisturbed)
        assert found[2].user_attrs["attempt"] == 2
        assert done.log.count("ready after") == 2
        said = [line for line in done.log.splitlines() if line.startswith("hpo: ")]
        assert len(said) == 1
        assert said[0].startswith("hpo: cpu:0 does not answer this process any more: CUDA error: device-side assert")
        assert "Traceback" not in done.log
        assert said[0].removeprefix("hpo: ") == found[2].user_attrs["worker_fault"]
        assert json.loads(done.stdout.splitlines()[-1])["trials"] == {"complete": TRIALS, "pruned": 0, "failed": 0}

    @pytest.mark.parametrize("slots", [1, 3])
    def test_again_and_again_by_one_configuration_fails_that_trial_alone_and_says_why(
        self, slots: int, launch: Launch, undisturbed: list[FrozenTrial], trials: Callable[..., list[FrozenTrial]]
    ) -> None:
        done = launch("waves", slots, LOST, 99, [seed_of(undisturbed[1])])
        assert done.returncode == 0, done.stderr + done.log
        found = trials()
        assert_equal(found, undisturbed, failed=(1,))
        assert done.faults == 3
        reason = found[1].user_attrs["failure"]
        assert reason.startswith("given up after 3 attempts")
        assert "a worker said: cpu:0 does not answer this process any more: CUDA error: device-side assert" in reason

    def test_by_several_configurations_does_not_use_up_the_restarts(
        self, launch: Launch, undisturbed: list[FrozenTrial], trials: Callable[..., list[FrozenTrial]]
    ) -> None:
        """Two that kill their worker three times each are six ends, and a worker has five restarts in a row."""
        done = launch("waves", 1, LOST, 99, [seed_of(undisturbed[number]) for number in (1, 3)])
        assert done.returncode == 0, done.stderr + done.log
        assert_equal(trials(), undisturbed, failed=(1, 3))
        assert done.faults == 6

    def test_ends_a_standing_worker_with_one_line_and_frees_the_trial_at_once(
        self,
        launch: Launch,
        undisturbed: list[FrozenTrial],
        trials: Callable[..., list[FrozenTrial]],
    ) -> None:
        """Whatever runs it starts it again. The lease lasts a minute, and the next worker does not wait for that."""
        commands = [["worker", "--study", "waves", "--slots", 1]] * 2
        first, second = launch("waves", 1, LOST, 1, [seed_of(undisturbed[2])], commands=commands)
        assert first.returncode == 1
        (said,) = [line for line in first.stderr.splitlines() if "INFO" not in line]
        assert said.startswith("hpo: cpu:0 does not answer this process any more")
        assert second.returncode == 0, second.stderr
        assert "is gone; what it held is free" not in second.stderr
        assert_equal(trials(), undisturbed)

    def test_while_the_test_part_is_predicted_leaves_the_promotion_to_the_next_worker(
        self, launch: Launch, cli: Cli
    ) -> None:
        done = launch("waves", 1, LOST_PREDICTING, 1, holdout=0.2)
        assert done.returncode == 0, done.stderr + done.log
        assert done.faults == 1
        assert done.log.count("ready after") == 2
        assert "does not answer this process any more: CUDA error: an illegal memory access" in done.log
        assert json.loads(done.stdout.splitlines()[-1])["trials"] == {"complete": TRIALS, "pruned": 0, "failed": 0}
        (model,) = json.loads(cli("models", "--json").stdout)
        assert (model["name"], model["version"]) == ("waves", 1)


class TestAFullDevice:
    @pytest.mark.parametrize("fault", [NO_MEMORY, NO_HANDLE], ids=["allocator", "handle"])
    def test_once_has_the_trial_wait_and_go_on(
        self,
        fault: tuple[str, str],
        launch: Launch,
        undisturbed: list[FrozenTrial],
        trials: Callable[..., list[FrozenTrial]],
    ) -> None:
        done = launch("waves", 3, fault, 1, [seed_of(undisturbed[2])])
        assert done.returncode == 0, done.stderr + done.log
        assert done.faults == 1
        found = trials()
        assert_equal(found, undisturbed)
        assert [trial.user_attrs["attempt"] for trial in found] == [1] * TRIALS
        assert "trial 2 waits until it has the device for itself" in done.log

    def test_for_ever_fails_the_trial_with_its_sizes(
        self, launch: Launch, undisturbed: list[FrozenTrial], trials: Callable[..., list[FrozenTrial]]
    ) -> None:
        done = launch("waves", 3, NO_MEMORY, 99, [seed_of(undisturbed[2])])
        assert done.returncode == 0, done.stderr + done.log
        found = trials()
        assert_equal(found, undisturbed, failed=(2,))
        assert "out of memory on cpu:0: hidden_size" in found[2].user_attrs["failure"]
        assert done.log.count("ready after") == 1


def test_an_error_after_which_the_device_answers_fails_the_trial_alone(
    launch: Launch, undisturbed: list[FrozenTrial], trials: Callable[..., list[FrozenTrial]]
) -> None:
    done = launch("waves", 3, NOT_STICKY, 99, [seed_of(undisturbed[2])])
    assert done.returncode == 0, done.stderr + done.log
    found = trials()
    assert_equal(found, undisturbed, failed=(2,))
    assert "invalid configuration argument" in found[2].user_attrs["failure"]
    assert done.log.count("ready after") == 1
