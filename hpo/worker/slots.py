"""How many trials one worker runs at once: as given, or as many of each study's as its device has room for."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from optuna.distributions import BaseDistribution

from hpo.models.device import device_errors
from hpo.models.training.memory import memory_bytes
from hpo.study.plan import Plan
from hpo.study.space import walk
from hpo.trial.build import configurations
from hpo.trial.device import workers_on

log = logging.getLogger("hpo")

MOST = 4  # on a card, all workers' together: more only wait for the interpreter (benchmarks/LOG.md, first day on a GPU)
SHARE = 0.8  # of the free memory that `auto` plans with
HANDLES = 64 * 2**20  # bytes that libraries take for each stream's workspaces


def choose_slots(plan: Plan, device: str) -> int:
    """Slots for `--slots auto`: 1 on a CPU; on a GPU as many as the study's largest trial fits beside itself into the
    memory that falls to this worker, up to MOST.
    """
    if device == "cpu":
        return 1
    classifier, config = configurations(plan, largest(plan), 0)
    needed = HANDLES + memory_bytes(plan.sequences, plan.validated, plan.members, classifier, config.batch_size, "cuda")
    return max(1, min(MOST // workers_on(device), int(SHARE * usable_memory(device) / needed)))


def usable_memory(device: str) -> int:
    """Bytes of a card's memory that fall to this process, whose allocator keeps what trials before have used.

    The workers of a launch that share a card share it evenly.
    """
    free, _ = torch.cuda.mem_get_info(device)
    return (free + torch.cuda.memory_reserved(device)) // workers_on(device)


class Places:
    """How many trials may run at once in one worker, and which studies' do.

    Each study has a number. Trials of different studies run beside one another, but never more at once than the least
    number of them allows, as it says how much of the device each one may take.
    """

    def __init__(self, fixed: int | None) -> None:
        """fixed: the number of every study; None: each one's own, by `choose_slots`."""
        self.fixed = fixed
        self._lock = threading.Lock()
        self._numbers: dict[int, int] = {}
        self._busy: Counter[int] = Counter()  # studies' trials

    def meet(self, study_id: int, name: str, plan: Plan, device: str) -> None:
        """Choose the study's number, once."""
        with self._lock:
            if study_id in self._numbers:
                return
            with device_errors(torch.device(device), lambda: "asking for its free memory"):
                self._numbers[study_id] = self.fixed or choose_slots(plan, device)
            if self.fixed is None:
                log.info("study %s: trials at once: %d", name, self._numbers[study_id])

    @contextmanager
    def place(self, study_id: int) -> Iterator[bool]:
        """A place for a trial of the study while the block runs; False where too many run."""
        with self._lock:
            free = self._free(study_id)
            self._busy[study_id] += free
        try:
            yield free
        finally:
            with self._lock:
                self._busy[study_id] -= free

    def wants(self, study_id: int, slots: int) -> bool:
        """Whether `slots` slots are too few: all of them run trials, and one more of the study could begin."""
        with self._lock:
            return self._busy.total() >= slots and self._free(study_id)

    def _free(self, study_id: int) -> bool:
        busy = +self._busy  # those above zero
        return busy.total() < min(self._numbers[each] for each in {study_id, *busy})


def largest(plan: Plan) -> dict[str, Any]:
    """The parameters of a study's space that take the most memory."""

    def most(name: str, distribution: BaseDistribution) -> Any:
        choices = getattr(distribution, "choices", None) or (distribution.low, distribution.high)  # type: ignore[attr-defined]
        if name in ("patch_length", "stem_stride"):
            return min(choices)
        if name == "sequence_length":
            return 0 if 0 in choices else max(choices)
        if name in ("missing", "stem", "normalization"):
            return max(choices, key=lambda choice: choice in ("mask", "conv", "channel"))
        return choices[0] if isinstance(choices[0], str) else max(choices)

    return walk(plan.config.space, most)
