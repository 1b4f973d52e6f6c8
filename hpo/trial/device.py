"""The device that a process trains on."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from functools import cache

import torch

from hpo.trial.cards import (
    DeviceError,
    bad_card,
    keep_own_instance,
    missing_card,
    no_card,
    required,
    sharing,
    unused_because,
    wanted_device,
    wanted_number,
)
from hpo.trial.survey import survey, trouble_with

log = logging.getLogger("hpo")


def choose_device() -> str:
    """The device that HPO_DEVICE asks for; by default the card that falls to this worker, else the CPU.

    That card is number HPO_WORKER_INDEX modulo the number of cards, and a kernel has run on it. Where it is there but
    cannot be used, the log says why, once. It becomes the calling thread's; other threads call `use_device`.
    Raises DeviceError where HPO_DEVICE has another value, or requires a card that cannot be used.
    """
    return _chosen(wanted_device(), int(os.environ.get("HPO_WORKER_INDEX", "0")))


def use_device(device: str) -> None:
    """Make it the calling thread's own, so that what names no card does not open a context on card 0."""
    if torch.device(device).type == "cuda":
        torch.cuda.set_device(device)


def device_name(device: str) -> str:
    """`cpu`, or the card's name behind its index, as in `cuda:0 (NVIDIA L4)`."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if torch.device(device).type == "cuda" else device


def workers_on(device: str) -> int:
    """How many workers of this launch, this one among them, train on this worker's card."""
    if wanted_number(wanted_device()) is not None:
        return int(os.environ.get("HPO_WORKERS", "1"))  # all of them were sent to that card
    return sharing(torch.device(device).index or 0, max(1, torch.cuda.device_count()))


@cache
def _chosen(wanted: str, index: int) -> str:
    """Once a process: torch says only once why it sees no card."""
    if wanted == "cpu":
        return "cpu"
    number = wanted_number(wanted)
    expected = unused_because(wanted) is None
    device, trouble = _own_card(index, number)
    if trouble is None:
        return device
    if wanted != "auto":
        raise required(wanted, trouble)
    if expected or device != "cpu":
        log.warning("training on the CPU, though this machine has a card: %s; HPO_DEVICE=cpu silences this", trouble)
    return "cpu"


def _own_card(index: int, number: int | None) -> tuple[str, str | None]:
    """The card that falls to this worker, `cpu` where torch sees none, and why it cannot be used."""
    try:
        alone = keep_own_instance(index, number)
    except DeviceError as error:
        return "cpu", str(error)
    seen = survey()
    if not seen.cards:
        return "cpu", no_card(seen)
    if alone:
        own = 0
    elif number is None:
        own = index % len(seen.cards)
    elif number < len(seen.cards):
        own = number
    else:
        return "cpu", missing_card(number, len(seen.cards))
    device, trouble = f"cuda:{own}", trouble_with(own)
    return device, None if trouble is None else bad_card(device, replace(seen.cards[own], trouble=trouble), seen)
