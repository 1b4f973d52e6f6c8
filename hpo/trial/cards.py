"""Which device HPO_DEVICE asks for, which cards there are, and why one cannot be used. Loads no torch.

Torch is asked in a process of its own (`hpo.trial.survey`): a driver that hangs or crashes takes nobody down.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from hpo.errors import HpoError
from hpo.models.machine import ONE_THREAD

ROOT = Path("/")  # of /proc and /dev
TRACES = ("proc/driver/nvidia/gpus/*", "dev/nvidia[0-9]*", "dev/dxg", "dev/kfd")  # NVIDIA's driver, WSL2's, AMD's
NO_CARDS = ("", "-1", "NoDevFiles")  # in CUDA_VISIBLE_DEVICES; the last one is Slurm's
ASK_S = 90.0  # that torch has to load and answer
KILLED_S = 5.0  # that a killed program has to end
WAYS_OUT = (  # what the driver or torch says, and what helps
    (
        ("driver on your system is too old", "driver version is insufficient"),
        "update the driver (CUDA 13 needs 580 or newer, CUDA 12 525), or install a torch build for an older CUDA "
        '(README.md, "GPUs")',
    ),
    (
        ("no kernel image", "not compatible with the current PyTorch", "cuda capability"),
        'install a torch build that has this card\'s architecture (README.md, "GPUs")',
    ),
    (
        ("busy or unavailable",),
        "another process has the card for itself (compute mode exclusive): end it, or `nvidia-smi -c 0`",
    ),
    (
        ("out of memory", "ALLOC_FAILED", "_STATUS_NOT_INITIALIZED"),
        "the card is full: end what else runs on it (`nvidia-smi` lists it)",
    ),
)
LOOK_FURTHER = "see `hpo doctor` and the driver's log (dmesg)"


class DeviceError(HpoError):
    """HPO_DEVICE is not one of its values, or asks for a card that cannot be used."""


@dataclass(frozen=True)
class Card:
    """One card, as torch sees it."""

    name: str
    capability: str  # compute capability, as in "8.9"
    memory_bytes: int
    trouble: str | None = None  # why no kernel runs on it; None where one did, or none was tried
    graph_trouble: str | None = None  # the same of a captured CUDA graph


@dataclass(frozen=True)
class Survey:
    """What torch says of itself and of the cards that it sees."""

    torch: str | None = None  # its version; None where it could not be asked
    toolkit: str | None = None  # what it was built for, as in "CUDA 13.0"; None: a CPU build
    architectures: tuple[str, ...] = ()  # as in "sm_90"
    cards: tuple[Card, ...] = ()
    trouble: str | None = None  # what it says where it sees no card, or why it could not be asked

    @property
    def build(self) -> str:
        return f"torch {self.torch} ({self.toolkit or 'CPU build'})"


def wanted_device() -> str:
    """HPO_DEVICE: auto, cpu, cuda or cuda:N. Raises DeviceError."""
    given = os.environ.get("HPO_DEVICE") or "auto"
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,4})?", given):
        raise DeviceError(
            "HPO_DEVICE must be auto (a card where there is one), cpu, cuda (a card is required) or cuda:N (that card "
            f"is), got {given!r}"
        )
    return given


def wanted_number(wanted: str) -> int | None:
    """The N of cuda:N."""
    return int(wanted[5:]) if wanted.startswith("cuda:") else None


def traces(root: Path = ROOT) -> list[str]:
    """Where this machine shows a GPU's driver or a card; empty: there is nothing to ask torch about."""
    found = [f"/{path.relative_to(root)}" for pattern in TRACES for path in sorted(root.glob(pattern))]
    if sys.platform == "win32" and (program := shutil.which("nvidia-smi")):
        found.append(program)
    return found


def cards_hidden() -> bool:
    """Whether CUDA_VISIBLE_DEVICES leaves no card to this process."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given is not None and given.split(",")[0].strip() in NO_CARDS


def unused_because(wanted: str, root: Path = ROOT) -> str | None:
    """Why nobody expects a card to be used; None where one is required, or there are traces of one."""
    if wanted == "cpu":
        return "HPO_DEVICE=cpu"
    if wanted == "auto" and cards_hidden():
        return f"CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']}"
    if wanted == "auto" and not traces(root):
        return "this machine shows no card"
    return None


# --------------------------------------------------------------------------------------------------- MIG instances


def mig_instances() -> list[str]:
    """The MIG instances that CUDA_VISIBLE_DEVICES lists."""
    entries = [entry.strip() for entry in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    return [entry for entry in entries if entry.startswith("MIG-")] if entries[0].startswith("MIG-") else []


def keep_own_instance(index: int, number: int | None = None) -> bool:
    """Of several MIG instances leave this process the one that falls to it, as CUDA uses only the first one.

    To be called before CUDA is used. index: the worker's. number: of the instance that HPO_DEVICE asks for. HPO_WORKERS
    becomes the number of workers that share the instance. Returns whether there were several.
    Raises DeviceError where there is no such instance.
    """
    instances = mig_instances()
    if len(instances) < 2:
        return False
    if number is not None and number >= len(instances):
        raise DeviceError(missing_card(number, len(instances)))
    own = index % len(instances) if number is None else number
    os.environ["CUDA_VISIBLE_DEVICES"] = instances[own]
    if number is None:
        os.environ["HPO_WORKERS"] = str(sharing(own, len(instances)))
    return True


def sharing(own: int, cards: int) -> int:
    """How many of a launch's workers (HPO_WORKERS), dealt out over so many cards, train on card `own`."""
    workers = int(os.environ.get("HPO_WORKERS", "1"))
    return max(1, len(range(own, workers, cards)))


# ------------------------------------------------------------------------------------------------ what is wrong


def required(wanted: str, trouble: str) -> DeviceError:
    """The error where HPO_DEVICE requires a card that cannot be used."""
    return DeviceError(f"HPO_DEVICE={wanted} requires a card: {trouble}; or train on the CPU: HPO_DEVICE=cpu")


def missing_card(number: int, count: int) -> str:
    """The text for a card that HPO_DEVICE asks for and that is not there."""
    last = f"the last one is cuda:{count - 1}" if count else "there is none"
    return f"this process does not see a card cuda:{number}, {last}; CUDA_VISIBLE_DEVICES says which ones it may see"


def no_card(survey: Survey, root: Path = ROOT) -> str:
    """Why torch sees no card, and the way out."""
    if survey.torch is None:
        return f"torch could not be asked for cards: {survey.trouble}; see `hpo doctor`"
    if cards_hidden():
        given = os.environ["CUDA_VISIBLE_DEVICES"]
        return f"CUDA_VISIBLE_DEVICES={given!r} hides every card; unset it, or name a card in it"
    if survey.toolkit is None:
        return (
            f"torch {survey.torch} is a CPU build; `HPO_TORCH=cuda sh tools/setup.sh` (Compose: HPO_TORCH=cuda) "
            "replaces it with a CUDA build"
        )
    if survey.trouble:
        return f"{survey.build} cannot use it: {with_way_out(survey.trouble)}"
    if traces(root):
        return (
            f"{survey.build} sees none: the driver's libraries (libcuda) are not here or do not answer; in a "
            "container, pass the card in (docker run --gpus all)"
        )
    return f"{survey.build} sees none, and the machine shows none; in a container, pass one in (docker run --gpus all)"


def bad_card(device: str, card: Card, survey: Survey) -> str:
    """Why no kernel runs on that card, and the way out."""
    built = f"{survey.build}, built for {' '.join(survey.architectures)}" if survey.architectures else survey.build
    about = f"{device} ({card.name}, compute capability {card.capability})"
    return f"{about} runs no kernel of {built}: {with_way_out(card.trouble or '')}"


def with_way_out(reason: str) -> str:
    """What torch or the driver said, in short, and what helps."""
    text = reason.strip().partition("\n")[0].partition(" (Triggered internally")[0].partition(" Please ")[0]
    text = text.removeprefix("CUDA initialization: ").removeprefix("CUDA error: ").rstrip(" .")
    way_out = next((way for signs, way in WAYS_OUT if any(sign in reason for sign in signs)), LOOK_FURTHER)
    return f"{text}; {way_out}"


# ------------------------------------------------------------------------------------------------ asking torch


class Ended(NamedTuple):
    """How a program ended."""

    status: int | None  # as subprocess.Popen.returncode says it; None: it ran out of time
    output: str
    errors: str

    @property
    def why(self) -> str:
        """The last line that it left, or what ended it."""
        said = self.errors.strip().splitlines()
        if self.status is None:
            return "it did not answer in time"
        if self.status < 0:
            return f"it was ended by {signal.Signals(-self.status).name}" + (f": {said[-1]}" if said else "")
        return said[-1] if said else f"it ended with status {self.status}"


class Apart:
    """A program that runs beside this process, to its end or its time limit. A context manager: leaving it ends it.

    A Ctrl-C of a terminal reaches it, too. Raises OSError where there is no such program.
    """

    def __init__(self, command: Sequence[str], timeout_s: float, environment: Mapping[str, str] | None = None) -> None:
        self._deadline = time.monotonic() + timeout_s
        self._popen = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            env=os.environ | ONE_THREAD | dict(environment or {}),
        )

    def __enter__(self) -> Apart:
        return self

    def __exit__(self, *_: object) -> None:
        """One that hangs in a driver cannot be killed: it is not waited for."""
        if self._popen.poll() is None:
            self._popen.kill()
            with suppress(subprocess.TimeoutExpired):
                self._popen.wait(KILLED_S)
        for pipe in (self._popen.stdout, self._popen.stderr):
            if pipe is not None:
                pipe.close()

    def result(self) -> Ended:
        """How it ended, after waiting for it."""
        try:
            output, errors = self._popen.communicate(timeout=max(0.0, self._deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return Ended(None, "", "")
        return Ended(self._popen.returncode, output, errors)


def asking_torch(*arguments: str, timeout_s: float = ASK_S, environment: Mapping[str, str] | None = None) -> Apart:
    """`hpo.trial.survey` as a process of its own; arguments are that module's, and `parsed` reads its result."""
    return Apart([sys.executable, "-P", "-m", "hpo.trial.survey", *arguments], timeout_s, environment)


def ask_torch(*arguments: str, timeout_s: float = ASK_S, environment: Mapping[str, str] | None = None) -> Survey:
    """What torch says of itself and the cards, from a process of its own."""
    with asking_torch(*arguments, timeout_s=timeout_s, environment=environment) as asked:
        return parsed(asked.result())


def parsed(ended: Ended) -> Survey:
    """The survey that the last line of the output is; one with `trouble` alone where it is none."""
    lines = ended.output.strip().splitlines()
    try:
        if ended.status != 0:
            return Survey(trouble=ended.why)
        content = json.loads(lines[-1])
        cards = tuple(Card(**card) for card in content.pop("cards"))
        return Survey(**content | {"cards": cards, "architectures": tuple(content["architectures"])})
    except (IndexError, KeyError, TypeError, ValueError, AttributeError):
        return Survey(trouble=f"its answer is no survey: {lines[-1] if lines else 'nothing'}")
