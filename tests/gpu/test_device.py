"""The CPU and a GPU give the same answers, and what a GPU runs out of, or dies of, is told apart."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from hpo.models.device import DeviceLost, OutOfMemory, is_out_of_memory
from hpo.models.machine import one_thread
from hpo.models.training.memory import release_memory
from tests.gpu.cases import CONFIGURATIONS, Given, advanced, bits, captured, training
from tests.gpu.conftest import GPU

needs_gpu = pytest.mark.skipif(not GPU, reason="no GPU here: the checks of tests/gpu ran on an emulated one alone")
HUGE: Given = {"hidden_size": 1024, "layers": 4, "batch_size": 2048}
MIB = 2**20


@pytest.mark.parametrize("name", [name for name in CONFIGURATIONS if name.startswith("drawn")])
def test_a_trial_goes_on_on_the_other_kind_of_device(name: str, device: str) -> None:
    """Adopted from a GPU by a CPU and the other way round, as in any mixed fleet. Without dropout, whose random numbers
    differ; what is left is rounding.
    """
    given = {**CONFIGURATIONS[name], "dropout": 0.0, "learning_rate": 0.01}
    tolerance = 5e-2 if given["precision"] == "bfloat16" else 2e-3
    with training(given, device) as one:
        states = [advanced(one, 3).state()]
        expected = [advanced(one, 2).history[-1].log_loss]
    own = training(given, "cpu", graphs=False)
    states.append(advanced(own, 3).state())
    expected.append(advanced(own, 2).history[-1].log_loss)
    found = []
    for state, where in zip(states, ("cpu", device), strict=True):
        with training(given, where) as adopted:
            adopted.restore(state)
            found.append(advanced(adopted, 2).history[-1].log_loss)
    assert found == pytest.approx(expected, abs=tolerance)
    assert expected[0] == pytest.approx(expected[1], abs=tolerance)


def train_too_large(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training that has no room; an emulated device has none for any."""

    def step(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    if device == "cpu":
        with training({}, device) as subject:
            monkeypatch.setattr(subject.members[0].learner, "step", step)
            subject.advance()
    else:
        with training(HUGE, device, n=4096, steps=200) as subject:
            subject.advance()


def test_memory_that_runs_out_is_told_with_the_sizes_and_costs_a_neighbour_nothing(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = CONFIGURATIONS["drawn-1"]
    with training(given, device, graphs=False) as simple:
        wanted = bits(advanced(simple, 6))
    with training(given, device) as neighbour:
        advanced(neighbour, 4)
        if device != "cpu":
            free, whole = torch.cuda.mem_get_info(device)
            torch.cuda.set_per_process_memory_fraction((whole - free + 600 * MIB) / whole, device)
        try:
            with pytest.raises(OutOfMemory, match=r"out of memory on .*: hidden_size \d+, layers \d"):
                train_too_large(device, monkeypatch)
        finally:
            if device != "cpu":
                torch.cuda.set_per_process_memory_fraction(1.0, device)
        release_memory(device)
        assert bits(advanced(neighbour, 2)) == wanted


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        torch.AcceleratorError("CUDA error: out of memory"),
        MemoryError(),
    ],
)
def test_what_libraries_say_of_a_full_card_is_out_of_memory(error: Exception) -> None:
    """As PyTorch reports them (CUDAException, cuBLAS and cuDNN handle pools)."""
    assert is_out_of_memory(error)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.xdist_group("gpu")
def test_a_full_card_is_out_of_memory_whatever_library_says_so() -> None:
    """Another process has taken all but some MiB: a new thread's handles no longer fit, or the training does not."""
    with training({}, "cuda:0") as subject:
        advanced(subject, 1)  # its context, and this thread's handles
    hog = subprocess.Popen(
        [sys.executable, "-c", HOG], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path.cwd()
    )
    assert hog.stdin is not None
    assert hog.stdout is not None
    found: list[Any] = []

    def slot() -> None:
        one_thread()
        for _ in range(2):
            try:
                with training({"hidden_size": 64}, "cuda:0", n=2000, steps=200) as subject:
                    found.append(advanced(subject, 2).history[-1].number)
            except OutOfMemory as error:
                found.append(type(error))
            except Exception as error:
                found.append(error)
            release_memory("cuda:0")
            if hog.poll() is None:
                hog.communicate("end\n")

    try:
        assert hog.stdout.readline().strip() == "full"
        thread = threading.Thread(target=slot)
        thread.start()
        thread.join()
    finally:
        hog.kill()
        hog.wait()
    assert found == [OutOfMemory, 2]


HOG = """
import torch
held, size = [], 2**30
while size >= 2**20:
    try:
        held.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
    except torch.OutOfMemoryError:
        size //= 2
print("full", flush=True)
input()
"""


def test_a_device_that_is_lost_is_told_from_an_error_of_the_training(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device != "cpu":
        pytest.skip("in a process of its own, below")
    broken = torch.AcceleratorError("CUDA error: device-side assert triggered")

    def fail(*_: object) -> None:
        raise broken

    with training({}, device) as subject:
        monkeypatch.setattr(subject.members[0].learner, "step", fail)
        with pytest.raises(torch.AcceleratorError):
            subject.advance()  # the device still answers: the training's own
        monkeypatch.setattr("hpo.models.device.probe", fail)
        with pytest.raises(DeviceLost, match="does not answer this process any more: CUDA error: device-side assert"):
            subject.advance()


STICKY = """
import sys, torch
sys.path.insert(0, ".")
from hpo.models.device import DeviceLost
from hpo.models.machine import prepare_process
from hpo.models.training.memory import release_memory
from tests.gpu.cases import advanced, training
prepare_process()
subject = advanced(training({"layers": 2, "dropout": 0.3}, "cuda:0"), 4)
learner = subject.members[0].learner
subject.members[0].fixed.rows.fill_(10**6)  # rows that there are none of: a device-side assert
try:
    advanced(subject, 3)
except DeviceLost as error:
    print("lost:", error)
try:
    subject.close()
except DeviceLost:
    print("closed")
try:
    release_memory("cuda:0")
    print("released")
except RuntimeError as error:
    print("release:", type(error).__name__)
"""


@needs_gpu
@pytest.mark.gpu
@pytest.mark.xdist_group("gpu")
def test_after_an_illegal_access_every_call_says_that_the_device_is_lost() -> None:
    script = STICKY.replace("advanced(subject, 3)", LOOSE)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=Path.cwd(), timeout=120)
    assert done.returncode == 0, done.stderr
    assert "lost: cuda:0 does not answer this process any more: CUDA error: device-side assert" in done.stdout
    assert "closed" in done.stdout


# The epoch's rows are laid out anew by `prepare`, so the wrong ones come after it.
LOOSE = """subject.members[0].fixed.prepare = lambda *_: None
    advanced(subject, 3)"""


@needs_gpu
@pytest.mark.gpu
@pytest.mark.xdist_group("gpu")
@pytest.mark.parametrize(
    ("steps", "given"),
    [
        (100, {"hidden_size": 64, "batch_size": 64}),
        (300, {"hidden_size": 128, "batch_size": 64, "layers": 2, "bidirectional": True}),
        (100, {"hidden_size": 256, "batch_size": 64, "layers": 2, "dropout": 0.2}),
        (50, {"hidden_size": 16, "batch_size": 16, "pooling": "attention"}),
    ],
)
def test_the_estimate_of_memory_is_not_too_low(steps: int, given: Given) -> None:
    """Of what a training takes beside the context and what libraries keep a stream: what its tensors take at most, and
    what its graphs keep. What the allocator holds in reserve beyond that it gives up when memory runs short.
    """
    release_memory("cuda:0")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with training(given, "cuda:0", n=1000, steps=steps, folds=2, graphs=False) as subject:
        advanced(subject, 2)
        tensors = torch.cuda.max_memory_allocated() - before
    release_memory("cuda:0")
    before = torch.cuda.memory_reserved()
    with training(given, "cuda:0", n=1000, steps=steps, folds=2) as subject:
        advanced(subject, 2)
        assert captured(subject) > 0
        torch.cuda.empty_cache()
        graphs = torch.cuda.memory_reserved() - before
        assert tensors + graphs <= subject.bytes
