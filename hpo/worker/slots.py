"""Several trials at once in one worker process: how many, and who may use the device's memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from hpo.models.training.training import TrainingInterrupted

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

    from hpo.study.lifecycle import Plan

MOST = 30  # torch hands out 32 streams a device and then begins again; two slots must never share one
WIDTH = 2048  # hidden units, over all slots, that `auto` puts on a card: more no longer run side by side
SHARE = 0.8  # of the free memory that `auto` plans with
HANDLES = 64 * 2**20  # bytes that libraries take for each stream's workspaces
LOOK_S = 0.2  # between two looks at whether waiting is still wanted


class Room:
    """The device's memory: trials use it together, or one alone that did not fit beside the others."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._alone = 0  # that want to be alone, or are
        self._taken = False

    @contextmanager
    def shared(self, give_up: Callable[[], bool]) -> Iterator[None]:
        """Come in beside others, after those that wait to be alone. Raises TrainingInterrupted if `give_up()`."""
        with self._changed:
            self._wait(lambda: self._alone == 0, give_up)
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self, give_up: Callable[[], bool]) -> Iterator[None]:
        """From inside: wait until the others have gone; nobody comes in until the block ends."""
        with self._changed:
            self._inside -= 1
            self._alone += 1
            self._changed.notify_all()
            try:
                self._wait(lambda: self._inside == 0 and not self._taken, give_up)
            except TrainingInterrupted:
                self._alone -= 1
                raise
            finally:
                self._inside += 1
            self._taken = True
        try:
            yield
        finally:
            with self._changed:
                self._taken = False
                self._alone -= 1
                self._changed.notify_all()

    def _wait(self, ready: Callable[[], bool], give_up: Callable[[], bool]) -> None:
        while not ready():
            if give_up():
                raise TrainingInterrupted
            self._changed.wait(LOOK_S)


def choose_slots(plan: Plan, device: str) -> int:
    """Slots for `--slots auto`: 1 on a CPU; on a GPU as many as the study's largest trial fits beside itself into the
    free memory, and no more than small ones need to fill the card.
    """
    if device == "cpu":
        return 1
    import torch

    from hpo.models.training.memory import memory_bytes
    from hpo.trial.run import configurations

    classifier, config = configurations(plan, largest(plan), 0)
    needed = memory_bytes(plan.sequences, plan.members, classifier, config.batch_size, "cuda") + HANDLES
    free, _ = torch.cuda.mem_get_info(device)
    return max(1, min(MOST, WIDTH // classifier.hidden_size, int(SHARE * free / needed)))


def largest(plan: Plan) -> dict[str, Any]:
    """The parameters of a study's space that take the most memory."""
    from hpo.study.space import walk

    def most(name: str, distribution: BaseDistribution) -> Any:
        choices = getattr(distribution, "choices", None) or (distribution.low, distribution.high)  # type: ignore[attr-defined]
        if name == "patch_length":
            return min(choices)
        if name == "sequence_length":
            return 0 if 0 in choices else max(choices)
        if name == "normalization":
            return max(choices, key=lambda choice: choice == "channel")
        return choices[0] if isinstance(choices[0], str) else max(choices)

    return walk(plan.config.space, most)
