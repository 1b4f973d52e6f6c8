"""How many trials one worker runs at once, where it may choose."""

from __future__ import annotations

from typing import Any

import torch
from optuna.distributions import BaseDistribution

from hpo.models.training.memory import memory_bytes
from hpo.study.plan import Plan
from hpo.study.space import walk
from hpo.trial.build import configurations

MOST = 30  # torch hands out 32 streams a device and then begins again; two slots must never share one
WIDTH = 2048  # hidden units, over all slots, that `auto` puts on a card: more no longer run side by side
SHARE = 0.8  # of the free memory that `auto` plans with
HANDLES = 64 * 2**20  # bytes that libraries take for each stream's workspaces


def choose_slots(plan: Plan, device: str) -> int:
    """Slots for `--slots auto`: 1 on a CPU; on a GPU as many as the study's largest trial fits beside itself into the
    free memory, and no more than small ones need to fill the card.
    """
    if device == "cpu":
        return 1
    classifier, config = configurations(plan, largest(plan), 0)
    needed = HANDLES + memory_bytes(plan.sequences, plan.validated, plan.members, classifier, config.batch_size, "cuda")
    free, _ = torch.cuda.mem_get_info(device)
    return max(1, min(MOST, WIDTH // classifier.hidden_size, int(SHARE * free / needed)))


def largest(plan: Plan) -> dict[str, Any]:
    """The parameters of a study's space that take the most memory."""

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
