"""How many workers a launch starts on this machine where nobody says so."""

from __future__ import annotations

import logging

from hpo.launcher.cores import usable_cores
from hpo.trial.cards import (
    DeviceError,
    Survey,
    ask_torch,
    bad_card,
    mig_instances,
    missing_card,
    no_card,
    required,
    unused_because,
    wanted_device,
    wanted_number,
)

log = logging.getLogger("hpo")


def count_workers(asked: int | None = None) -> int:
    """As many as asked for; else one a card that this process sees, or without one a worker a core that it may use.

    Torch is asked for cards, in a process of its own, where the machine shows one or HPO_DEVICE requires one. The log
    names each that is there but cannot be used. Raises DeviceError where HPO_DEVICE requires a card that cannot be.
    """
    wanted = wanted_device()
    if unused_because(wanted) is not None or (asked is not None and wanted == "auto"):
        return asked or usable_cores()
    try:
        cards = _count_cards(wanted_number(wanted))
    except DeviceError as error:
        if wanted != "auto":
            raise required(wanted, str(error)) from None
        log.warning("one worker a core, though this machine has a card: %s; HPO_DEVICE=cpu silences this", error)
        return usable_cores()
    return asked or cards


def _count_cards(number: int | None) -> int:
    """How many cards there are to train on. number: of the only one to look at. Raises DeviceError without one."""
    instances = mig_instances()
    if number is None:
        found = ask_torch()
    elif 0 < len(instances) <= number:
        raise DeviceError(missing_card(number, len(instances)))
    elif instances:
        found = ask_torch("0", environment={"CUDA_VISIBLE_DEVICES": instances[number]})
    else:
        found = ask_torch(str(number))
    return usable_cards(found, number, len(instances))


def usable_cards(found: Survey, number: int | None = None, instances: int = 0) -> int:
    """How many workers torch's answer has a card for. number: HPO_DEVICE's. instances: of MIG, of which torch sees one.

    Raises DeviceError where there is none, or no kernel runs on any.
    """
    count = max(len(found.cards), instances if found.cards else 0)
    if number is not None and count and number >= count:
        raise DeviceError(missing_card(number, count))
    if not found.cards:
        raise DeviceError(no_card(found))
    troubles = [bad_card(f"cuda:{index}", card, found) for index, card in enumerate(found.cards) if card.trouble]
    if len(troubles) == len(found.cards) or (number is not None and troubles):
        raise DeviceError(troubles[0])
    for trouble in troubles:
        log.warning("the worker of a card that cannot be used trains on the CPU: %s", trouble)
    if number is not None:
        return 1
    log.info("%d workers, one a card: %s", count, ", ".join(card.name for card in found.cards))
    return count
