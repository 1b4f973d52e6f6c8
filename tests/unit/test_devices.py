"""HPO_DEVICE, cards and MIG instances: which card a worker takes, how many workers a launch starts, what is said where
a card is there but cannot be used. Torch's part is played by a stub; nothing here needs a card."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hpo import doctor
from hpo.launcher import count, local
from hpo.launcher.count import count_workers, usable_cards
from hpo.launcher.ray import settings
from hpo.launcher.ray_actor import environment as node_environment
from hpo.trial import cards, device
from hpo.trial.cards import (
    Apart,
    Card,
    DeviceError,
    Ended,
    Survey,
    ask_torch,
    bad_card,
    cards_hidden,
    keep_own_instance,
    mig_instances,
    no_card,
    parsed,
    sharing,
    traces,
    unused_because,
    wanted_device,
    with_way_out,
)

ROOT = Path(__file__).resolve().parents[2]
L4 = Card("NVIDIA L4", "8.9", 24 * 2**30)
SEEN = Survey("2.13.0+cu130", "CUDA 13.0", ("sm_75", "sm_90"), (L4, L4))
NONE = replace(SEEN, cards=())
TOO_OLD = (
    "CUDA initialization: The NVIDIA driver on your system is too old (found version 12020). Please update your GPU "
    "driver by downloading and installing a new version from the URL: http://www.nvidia.com/Download/index.aspx "
    "(Triggered internally at /pytorch/c10/cuda/CUDAFunctions.cpp:119.)"
)
NO_KERNEL = "CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors might be …"
BUSY = "CUDA error: CUDA-capable device(s) is/are busy or unavailable\nSearch for `cudaErrorDevicesUnavailable' in …"
FULL = "CUDA out of memory. Tried to allocate 2.00 MiB. GPU 0 has a total capacity of 23.57 GiB of which 0 is free."


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HPO_DEVICE", "HPO_WORKER_INDEX", "HPO_WORKERS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    device._chosen.cache_clear()


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that shows a card."""
    monkeypatch.setattr(cards, "traces", lambda *_: ["/dev/nvidia0"])


# HPO_DEVICE


@pytest.mark.parametrize("value", ["auto", "cpu", "cuda", "cuda:0", "cuda:12"])
def test_a_device_may_be_asked_for(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPO_DEVICE", value)
    assert wanted_device() == value


def test_without_a_wish_or_with_an_empty_one_it_is_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    assert wanted_device() == "auto"
    monkeypatch.setenv("HPO_DEVICE", "")
    assert wanted_device() == "auto"


@pytest.mark.parametrize("value", ["gpu", "CUDA", "cuda:", "cuda:-1", "cuda:x", "0", " cpu", "mps"])
def test_another_device_is_an_error_with_the_rule_and_the_value(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPO_DEVICE", value)
    for asked in (device.choose_device, count_workers):
        with pytest.raises(DeviceError, match=r"HPO_DEVICE must be auto .*, cpu, cuda .* or cuda:N .*, got ") as error:
            asked()
        assert str(error.value).endswith(repr(value))


# Traces


@pytest.mark.parametrize("trace", ["proc/driver/nvidia/gpus/0000:01:00.0", "dev/nvidia0", "dev/dxg", "dev/kfd"])
def test_a_driver_shows_by_its_files(trace: str, tmp_path: Path) -> None:
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidiactl").touch()  # of a driver without a card
    assert traces(tmp_path) == []
    (tmp_path / trace).mkdir(parents=True)
    assert traces(tmp_path) == [f"/{trace}"]


@pytest.mark.parametrize(
    ("given", "hidden"),
    [(None, False), ("", True), ("-1", True), ("NoDevFiles", True), ("0", False), ("1,0", False), ("GPU-8a", False)],
)
def test_an_empty_list_of_visible_cards_hides_all(
    given: str | None, hidden: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if given is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    assert cards_hidden() is hidden


def test_a_card_is_expected_where_one_is_required_or_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert unused_because("auto", tmp_path) == "this machine shows no card"
    assert unused_because("cuda", tmp_path) is None
    (tmp_path / "dev/nvidia0").mkdir(parents=True)
    assert unused_because("auto", tmp_path) is None
    assert unused_because("cpu", tmp_path) == "HPO_DEVICE=cpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert unused_because("auto", tmp_path) == "CUDA_VISIBLE_DEVICES="
    assert unused_because("cuda:0", tmp_path) is None


# What is wrong, and the way out


@pytest.mark.parametrize(
    ("said", "short", "way_out"),
    [
        (TOO_OLD, "The NVIDIA driver on your system is too old (found version 12020); ", "update the driver"),
        (NO_KERNEL, "no kernel image is available for execution on the device; ", "install a torch build that has"),
        (BUSY, "CUDA-capable device(s) is/are busy or unavailable; ", "another process has the card for itself"),
        (FULL, "CUDA out of memory", "the card is full"),
        ("CUDA error: unspecified launch failure\nmore", "unspecified launch failure; ", "see `hpo doctor`"),
    ],
    ids=["driver", "architecture", "exclusive", "full", "other"],
)
def test_what_torch_says_is_shortened_and_gets_a_way_out(said: str, short: str, way_out: str) -> None:
    text = with_way_out(said)
    assert text.startswith(short)
    assert way_out in text
    assert "Triggered" not in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("seen", "hidden", "text"),
    [
        (replace(NONE, torch="2.13.0+cpu", toolkit=None), False, "is a CPU build; `HPO_TORCH=cuda sh tools/setup.sh`"),
        (replace(NONE, trouble=TOO_OLD), False, "cannot use it: The NVIDIA driver on your system is too old"),
        (NONE, False, "docker run --gpus all"),
        (NONE, True, "CUDA_VISIBLE_DEVICES='' hides every card; unset it"),
        (Survey(trouble="ImportError: libcudart.so.13"), False, "could not be asked for cards: ImportError: libcud"),
    ],
)
def test_why_torch_sees_no_card_is_told_with_the_way_out(
    seen: Survey, hidden: bool, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if hidden:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert text in no_card(seen)


def test_a_card_that_runs_no_kernel_is_named_with_its_capability_and_what_torch_was_built_for() -> None:
    old = Card("NVIDIA GeForce GTX 1080", "6.1", 8 * 2**30, trouble=NO_KERNEL)
    assert bad_card("cuda:1", old, SEEN).startswith(
        "cuda:1 (NVIDIA GeForce GTX 1080, compute capability 6.1) runs no kernel of torch 2.13.0+cu130 (CUDA 13.0), "
        "built for sm_75 sm_90: no kernel image is available"
    )


# A worker's own card


class Driver:
    """torch.cuda with so many cards; `troubles` are what a kernel on a card raises."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, number: int, troubles: Mapping[int, str] | None = None) -> None:
        self.probed: list[str] = []
        self.current: list[Any] = []
        self.troubles = troubles or {}
        about = type("Properties", (), {"name": "NVIDIA L4", "major": 8, "minor": 9, "total_memory": 24 * 2**30})
        for name, value in (
            ("is_available", lambda: number > 0),
            ("device_count", lambda: number),
            ("get_device_properties", lambda _: about),
            ("get_device_name", lambda _: "NVIDIA L4"),
            ("get_arch_list", lambda: ["sm_75", "sm_90"]),
            ("set_device", self.current.append),
        ):
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr("hpo.trial.survey.probe", self._probe)

    def _probe(self, place: torch.device) -> None:
        self.probed.append(str(place))
        if place.index in self.troubles:
            raise RuntimeError(self.troubles[place.index])


@pytest.mark.parametrize(("index", "chosen"), [(None, 0), ("0", 0), ("1", 1), ("2", 0), ("7", 1)])
def test_workers_are_dealt_out_over_the_cards_and_each_opens_its_own_alone(
    index: str | None, chosen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Driver(monkeypatch, 2)
    if index is not None:
        monkeypatch.setenv("HPO_WORKER_INDEX", index)
    assert device.choose_device() == f"cuda:{chosen}"
    assert driver.probed == [f"cuda:{chosen}"]
    assert driver.current == [chosen]
    assert device.device_name(device.choose_device()) == f"cuda:{chosen} (NVIDIA L4)"


def test_one_card_can_be_asked_for_whatever_the_workers_index(monkeypatch: pytest.MonkeyPatch) -> None:
    Driver(monkeypatch, 3)
    monkeypatch.setenv("HPO_WORKER_INDEX", "1")
    monkeypatch.setenv("HPO_DEVICE", "cuda:2")
    assert device.choose_device() == "cuda:2"


def test_the_cpu_can_be_asked_for_where_there_are_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(monkeypatch, 2)
    monkeypatch.setenv("HPO_DEVICE", "cpu")
    assert device.choose_device() == "cpu"
    assert not driver.probed


@pytest.mark.usefixtures("shown")
@pytest.mark.parametrize("trouble", [NO_KERNEL, BUSY, FULL], ids=["architecture", "exclusive", "full"])
def test_a_card_that_cannot_be_used_is_named_once_and_the_worker_trains_on_the_cpu(
    trouble: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Driver(monkeypatch, 2, {1: trouble})
    monkeypatch.setenv("HPO_WORKER_INDEX", "1")
    assert [device.choose_device() for _ in range(3)] == ["cpu"] * 3  # a promotion asks again
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("hpo", logging.WARNING)
    said = record.getMessage()
    assert "training on the CPU, though this machine has a card: cuda:1 (NVIDIA L4, compute capability 8.9)" in said
    assert with_way_out(trouble) in said
    assert said.endswith("HPO_DEVICE=cpu silences this")


def test_a_card_that_only_torch_sees_is_named_too(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cards, "traces", lambda *_: [])
    Driver(monkeypatch, 1, {0: FULL})
    assert device.choose_device() == "cpu"
    assert "cuda:0 (NVIDIA L4" in caplog.text


@pytest.mark.parametrize("wanted", ["cuda", "cuda:0"])
def test_where_a_card_is_required_one_that_cannot_be_used_is_an_error(
    wanted: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Driver(monkeypatch, 1, {0: NO_KERNEL})
    monkeypatch.setenv("HPO_DEVICE", wanted)
    with pytest.raises(DeviceError, match=rf"HPO_DEVICE={wanted} requires a card: cuda:0 .* no kernel image .* build"):
        device.choose_device()
    assert not caplog.records


@pytest.mark.parametrize(("number", "text"), [(2, "the last one is cuda:1"), (0, "CPU build|sees none|hides")])
def test_a_required_card_that_is_not_there_is_an_error(number: int, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Driver(monkeypatch, number)
    monkeypatch.setenv("HPO_DEVICE", "cuda:5")
    with pytest.raises(DeviceError, match=f"HPO_DEVICE=cuda:5 requires a card: .*({text}).*HPO_DEVICE=cpu"):
        device.choose_device()


@pytest.mark.usefixtures("shown")
def test_a_driver_that_is_too_old_is_no_noise_but_the_reason(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    import warnings

    Driver(monkeypatch, 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: warnings.warn(TOO_OLD, stacklevel=2) is not None)
    assert device.choose_device() == "cpu"
    assert "The NVIDIA driver on your system is too old (found version 12020); update the driver" in caplog.text
    assert not recwarn.list


@pytest.mark.usefixtures("shown")
@pytest.mark.skipif(torch.version.cuda is not None, reason="of a CPU build")
def test_a_cpu_build_of_torch_beside_a_card_is_told_with_the_way_to_another(caplog: pytest.LogCaptureFixture) -> None:
    assert device.choose_device() == "cpu"
    assert "is a CPU build; `HPO_TORCH=cuda sh tools/setup.sh`" in caplog.text


@pytest.mark.parametrize("visible", ["", None], ids=["hidden", "none"])
def test_where_no_card_is_expected_nothing_is_said(
    visible: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Driver(monkeypatch, 0)
    monkeypatch.setattr(cards, "traces", lambda *_: [] if visible is None else ["/dev/nvidia0"])
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert device.choose_device() == "cpu"
    assert not caplog.records


def test_a_thread_makes_the_card_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(monkeypatch, 2)
    device.use_device("cpu")
    assert not driver.current
    device.use_device("cuda:1")
    assert driver.current == ["cuda:1"]


# MIG instances

MIGS = ["MIG-a1", "MIG-b2", "MIG-c3"]


@pytest.mark.parametrize(
    ("given", "found"),
    [("", []), ("0,1", []), ("GPU-8a,GPU-9b", []), ("MIG-a1", ["MIG-a1"]), ("MIG-a1, MIG-b2", ["MIG-a1", "MIG-b2"])],
)
def test_mig_instances_are_those_that_are_listed(given: str, found: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    assert mig_instances() == found


@pytest.mark.parametrize(("index", "own", "sharers"), [(0, "MIG-a1", 3), (1, "MIG-b2", 2), (5, "MIG-c3", 2)])
def test_a_worker_keeps_the_instance_that_falls_to_it_before_cuda_is_used(
    index: int, own: str, sharers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(MIGS))
    monkeypatch.setenv("HPO_WORKERS", "7")
    monkeypatch.setenv("HPO_WORKER_INDEX", str(index))
    Driver(monkeypatch, 1)
    at_first: list[str] = []

    def available() -> bool:
        at_first.append(os.environ["CUDA_VISIBLE_DEVICES"])
        return True

    monkeypatch.setattr(torch.cuda, "is_available", available)
    assert device.choose_device() == "cuda:0"
    assert at_first == [own]
    assert device.workers_on("cuda:0") == sharers


def test_an_instance_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(MIGS))
    monkeypatch.setenv("HPO_DEVICE", "cuda:2")
    Driver(monkeypatch, 1)
    assert device.choose_device() == "cuda:0"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "MIG-c3"
    device._chosen.cache_clear()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(MIGS))
    monkeypatch.setenv("HPO_DEVICE", "cuda:3")
    with pytest.raises(DeviceError, match="the last one is cuda:2"):
        device.choose_device()


@pytest.mark.parametrize("given", ["0,1", "GPU-8a,GPU-9b", "MIG-a1"])
def test_other_lists_are_left_to_cuda(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    assert not keep_own_instance(1)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == given


# How many workers


@pytest.mark.parametrize("workers", range(1, 10))
def test_more_workers_than_cards_share_them_evenly(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPO_WORKERS", str(workers))
    on_card = [sharing(own, 4) for own in range(4)]
    taken = on_card[: min(workers, 4)]
    assert sum(taken) == workers
    assert max(taken) - min(taken) <= 1


def test_workers_that_were_sent_to_one_card_all_share_it(monkeypatch: pytest.MonkeyPatch) -> None:
    Driver(monkeypatch, 4)
    monkeypatch.setenv("HPO_WORKERS", "6")
    assert device.workers_on("cuda:1") == 2
    assert device.workers_on("cuda:2") == 1
    monkeypatch.setenv("HPO_DEVICE", "cuda:2")
    assert device.workers_on("cuda:2") == 6


def test_the_answer_gives_a_worker_a_card(caplog: pytest.LogCaptureFixture) -> None:
    assert usable_cards(SEEN) == 2
    assert usable_cards(SEEN, number=1) == 1
    assert usable_cards(replace(SEEN, cards=(L4,)), instances=3) == 3  # CUDA sees one of them at a time
    assert usable_cards(replace(SEEN, cards=(L4,)), number=2, instances=3) == 1
    assert not caplog.records


def test_one_card_of_several_that_cannot_be_used_is_named(caplog: pytest.LogCaptureFixture) -> None:
    assert usable_cards(replace(SEEN, cards=(L4, replace(L4, trouble=BUSY)))) == 2
    assert "cuda:1 (NVIDIA L4, compute capability 8.9) runs no kernel" in caplog.text


@pytest.mark.parametrize(
    ("seen", "number", "text"),
    [
        (NONE, None, "sees none"),
        (replace(SEEN, cards=(replace(L4, trouble=NO_KERNEL),)), None, "no kernel image"),
        (replace(SEEN, cards=(L4, replace(L4, trouble=FULL))), 1, "the card is full"),
        (SEEN, 2, "the last one is cuda:1"),
        (Survey(trouble="it did not answer in time"), None, "it did not answer in time"),
    ],
)
def test_no_card_to_train_on_is_an_error_that_says_why(seen: Survey, number: int | None, text: str) -> None:
    with pytest.raises(DeviceError, match=text):
        usable_cards(seen, number)


def _forbidden(*_: object, **__: object) -> Survey:
    raise AssertionError("torch was asked")


@pytest.mark.parametrize(
    ("wanted", "asked", "traced", "workers"),
    [("auto", None, [], 3), ("cpu", None, ["/dev/nvidia0"], 3), ("auto", 5, ["/dev/nvidia0"], 5), ("cpu", 5, [], 5)],
)
def test_torch_is_asked_only_where_a_card_matters(
    wanted: str, asked: int | None, traced: list[str], workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HPO_DEVICE", wanted)
    monkeypatch.setattr(cards, "traces", lambda *_: traced)
    monkeypatch.setattr(count, "ask_torch", _forbidden)
    monkeypatch.setattr(count, "usable_cores", lambda: 3)
    assert count_workers(asked) == workers


@pytest.mark.usefixtures("shown")
def test_without_a_usable_card_there_is_a_worker_a_core_and_the_launch_says_why_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(count, "ask_torch", lambda *_: replace(NONE, trouble=TOO_OLD))
    monkeypatch.setattr(count, "usable_cores", lambda: 3)
    assert count_workers() == 3
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "one worker a core, though this machine has a card: torch 2.13.0+cu130" in record.getMessage()
    monkeypatch.setenv("HPO_DEVICE", "cuda")
    for asked in (None, 2):
        with pytest.raises(DeviceError, match=r"HPO_DEVICE=cuda requires a card: .* is too old"):
            count_workers(asked)


@pytest.mark.usefixtures("shown")
def test_workers_are_counted_by_cards_or_instances(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []

    def answer(*arguments: str, environment: dict[str, str] | None = None) -> Survey:
        seen.append((arguments, environment))
        return SEEN if environment is None and not mig_instances() else replace(SEEN, cards=(L4,))

    monkeypatch.setattr(count, "ask_torch", answer)
    assert count_workers() == 2
    monkeypatch.setenv("HPO_DEVICE", "cuda")
    assert (count_workers(), count_workers(8)) == (2, 8)
    monkeypatch.setenv("HPO_DEVICE", "cuda:1")
    assert (count_workers(), count_workers(8)) == (1, 8)
    assert seen.pop() == (("1",), None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(MIGS))
    assert count_workers() == 1
    assert seen.pop() == (("0",), {"CUDA_VISIBLE_DEVICES": "MIG-b2"})
    monkeypatch.setenv("HPO_DEVICE", "cuda")
    assert count_workers() == 3
    monkeypatch.setenv("HPO_DEVICE", "cuda:3")
    with pytest.raises(DeviceError, match="the last one is cuda:2"):
        count_workers()


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_every_worker_is_told_how_many_there_are(start: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Mapping[str, str]] = []

    class Server:
        status = None

        def fork(self, index: int, log: Path, environment: Mapping[str, str], arguments: object) -> object:
            told.append(environment)
            return object()

    monkeypatch.setattr(subprocess, "Popen", lambda *_, env, **__: told.append(env))
    server: Any = Server() if start == "fork" else None
    local.LocalWorkers("waves", 3, 1, server, tmp_path)
    assert [(each["HPO_WORKER_INDEX"], each["HPO_WORKERS"]) for each in told] == [("0", "3"), ("1", "3"), ("2", "3")]


def test_workers_on_other_nodes_are_told_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPO_HOME", str(tmp_path))
    monkeypatch.setenv("HPO_ARTIFACTS", str(tmp_path))
    assert "HPO_DEVICE" not in settings()
    monkeypatch.setenv("HPO_DEVICE", "cuda")
    assert settings()["HPO_DEVICE"] == "cuda"
    monkeypatch.setenv("HPO_DEVICE", "cpu")  # a node's own goes before it
    assert node_environment({"HPO_DEVICE": "cuda"})["HPO_DEVICE"] == "cpu"


# Torch's answer, from a real process

STUB = """
import os, sys, warnings

__version__ = "2.13.0+cu130"
OutOfMemoryError = MemoryError
CARDS = int(os.environ.get("STUB_CARDS", "2"))

class version:
    cuda = os.environ.get("STUB_CUDA") or None
    hip = None

class device:
    def __init__(self, kind, index=0):
        self.kind, self.index = kind, index

class zeros:
    def __init__(self, count, device):
        if str(device.index) == os.environ.get("STUB_CRASH"):
            os.abort()
        if str(device.index) == os.environ.get("STUB_FAIL"):
            raise RuntimeError("CUDA error: no kernel image is available for execution on the device")
        if device.index != cuda.current:
            raise AssertionError("a context on another card")
        self.value = 0.0
    def add_(self, more):
        self.value += more
        return self
    def item(self):
        return self.value

class _Block:
    def __init__(self, *_):
        pass
    def __enter__(self):
        return self
    def __exit__(self, *_):
        pass

class cuda:
    current = 0
    device = graph = _Block
    class CUDAGraph:
        def replay(self):
            pass
    def is_available():
        print("a library's greeting")
        if os.environ.get("STUB_HANG"):
            import time
            time.sleep(600)
        if not CARDS:
            warnings.warn(os.environ.get("STUB_SAYS", "nothing"))
        return CARDS > 0
    def device_count():
        return CARDS
    def set_device(number):
        cuda.current = number
    def get_arch_list():
        return ["sm_75", "sm_90"]
    def get_device_properties(number):
        return type("Properties", (), {"name": f"Stub {number}", "major": 9, "minor": 0, "total_memory": 2**34})
"""


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package `torch` with two cards before the real one on the path of processes."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text(STUB)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    monkeypatch.setenv("STUB_CUDA", "13.0")
    return tmp_path


def test_a_process_of_its_own_asks_torch_and_runs_a_kernel_on_each_card(
    stub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = ask_torch()
    assert found.build == "torch 2.13.0+cu130 (CUDA 13.0)"
    assert found.architectures == ("sm_75", "sm_90")
    assert [(card.name, card.capability, card.trouble) for card in found.cards] == [
        ("Stub 0", "9.0", None),
        ("Stub 1", "9.0", None),
    ]
    monkeypatch.setenv("STUB_FAIL", "1")
    assert [card.trouble is None for card in ask_torch().cards] == [True, False]
    assert [card.trouble for card in ask_torch("--list").cards] == [None, None]
    monkeypatch.setenv("HPO_DEVICE", "cuda")
    assert count_workers() == 2
    monkeypatch.setenv("HPO_DEVICE", "cuda:1")
    with pytest.raises(DeviceError, match=r"cuda:1 \(Stub 1, .*no kernel image"):
        count_workers()


def test_one_card_alone_can_be_tried(stub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUB_CRASH", "0")
    first, second = ask_torch("1").cards
    assert (first.trouble, second.trouble) == (None, None)
    assert second.graph_trouble is None
    assert ask_torch("0").trouble == "it was ended by SIGABRT"


def test_a_warning_of_torchs_is_the_reason_and_not_noise(stub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUB_CARDS", "0")
    monkeypatch.setenv("STUB_SAYS", TOO_OLD)
    assert ask_torch().trouble == TOO_OLD
    with Apart([sys.executable, "-P", "-m", "hpo.trial.survey"], 60) as program:
        ended = program.result()
    assert (ended.status, ended.errors) == (0, "")


def test_a_driver_that_hangs_is_not_waited_for(stub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUB_HANG", "1")
    assert ask_torch(timeout_s=2.0) == Survey(trouble="it did not answer in time")


def test_a_torch_that_cannot_be_imported_is_a_reason(stub: Path) -> None:
    (stub / "torch/__init__.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object file')")
    assert ask_torch().trouble == "ImportError: libcudart.so.13: cannot open shared object file"


@pytest.mark.parametrize(
    ("ended", "trouble"),
    [
        (Ended(None, "", ""), "it did not answer in time"),
        (Ended(-11, "", ""), "it was ended by SIGSEGV"),
        (Ended(1, "", "Traceback …\nRuntimeError: no\n"), "RuntimeError: no"),
        (Ended(3, "", ""), "it ended with status 3"),
        (Ended(0, "", ""), "its answer is no survey: nothing"),
        (Ended(0, "hello\n", ""), "its answer is no survey: hello"),
        (Ended(0, '{"cards": [{"size": 1}]}', ""), 'its answer is no survey: {"cards": [{"size": 1}]}'),
        (Ended(0, "7", ""), "its answer is no survey: 7"),
    ],
)
def test_an_answer_that_is_none_is_a_reason(ended: Ended, trouble: str) -> None:
    assert parsed(ended) == Survey(trouble=trouble)


def test_the_survey_of_this_machine_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    done = subprocess.run([sys.executable, "-P", "-m", "hpo.trial.survey", "--list"], capture_output=True, text=True)
    assert json.loads(done.stdout)["torch"] == torch.__version__
    assert ask_torch("--list").torch == torch.__version__


# What `hpo doctor` makes of it


def test_too_little_room_is_a_finding_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    about = type("Usage", (), {"free": 2**30})
    monkeypatch.setattr("shutil.disk_usage", lambda _: about)
    assert doctor.disk_finding("disk of HPO_HOME", tmp_path / "not yet").state == "ok"
    about.free -= 1  # type: ignore[attr-defined]
    finding = doctor.disk_finding("disk of HPO_HOME", tmp_path)
    assert (finding.state, "under 1 GiB" in finding.detail, str(tmp_path) in finding.detail) == ("NO", True, True)
    assert doctor.memory_finding(2**30, 2**34).state == "ok"
    assert doctor.memory_finding(2**30 - 1, 2**34).state == "NO"
    assert doctor.memory_finding(float("inf"), float("inf")).state == "--"


def test_graphs_that_cannot_be_captured_are_told_with_what_it_costs() -> None:
    assert doctor.graphs_finding(L4).state == "ok"
    broken = doctor.graphs_finding(replace(L4, graph_trouble="CUDA error: operation not permitted"))
    assert (broken.state, "one operation at a time" in broken.detail) == ("NO", True)


@pytest.mark.parametrize(
    ("toolkit", "most", "unused", "state"),
    [
        ("CUDA 13.0", "12.8", None, "NO"),
        ("CUDA 13.2", "13.0", None, "ok"),  # of one major version any minor one will do
        ("CUDA 12.6", "13.0", None, "ok"),
        ("CUDA 13.0", "12.8", "HPO_DEVICE=cpu", "ok"),
        (None, "12.8", None, "ok"),
    ],
)
def test_a_driver_must_know_the_cuda_that_torch_was_built_for(
    toolkit: str | None, most: str, unused: str | None, state: str
) -> None:
    found = doctor.driver_finding("570.1", most, replace(SEEN, toolkit=toolkit), unused)
    assert found.state == state
    assert found.detail.startswith(f"570.1, up to CUDA {most}")
