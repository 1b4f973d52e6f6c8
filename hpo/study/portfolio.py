"""The configurations that a study's first trials have, where its file names none in [[enqueue]].

Chosen by what fixed configurations gave on the development sets (benchmarks/LOG.md), the best in the mean first, so
that a search of some dozens of trials begins where good networks are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from hpo.models.fields import Value
from hpo.study.entries import Entry, Range, contains, only, size, values
from hpo.study.plan import Plan
from hpo.study.space import is_active, steps_kept

SINCE = 4  # of RULES
LEARNING = ("tpe", "gp")  # samplers that go on from what was tried; of others the user wants their own draws
SHARE = 4  # at most every fourth of a study's trials is one of these, and the first in any case

_CONVOLUTIONS: dict[str, Value] = {
    "normalization": "channel", "difference": False, "stem": "conv", "stem_layers": 3, "stem_width": 64,
    "stem_kernel": 5, "stem_stride": 2, "hidden_size": 64, "layers": 1, "bidirectional": True, "pooling": "max",
    "skip": True, "head_size": 0, "batch_size": 16, "learning_rate": 4e-3, "weight_decay": 1e-2,
    "label_smoothing": 0.1, "mixup": 0.0, "jitter": 0.0,
}  # fmt: skip
_DIFFERENCES = {**_CONVOLUTIONS, "difference": True}
PATCHES = 32  # steps that a patch length leaves the LSTM of the longest sequence, about
PORTFOLIO: tuple[Mapping[str, Value], ...] = (
    _CONVOLUTIONS,
    _DIFFERENCES,
    {**_DIFFERENCES, "stem_kernel": 7},
    {**_DIFFERENCES, "mixup": 0.2},
    {**_DIFFERENCES, "stem_layers": 2, "stem_kernel": 7},
    {**_DIFFERENCES, "stem": "patch"},
)


def portfolio_of(plan: Plan) -> tuple[dict[str, Value], ...]:
    """What the first trials of a study are, by their numbers; none where the file says how to begin, or the study began
    before there was a portfolio."""
    study, space = plan.config.study, plan.config.space
    own = plan.config.enqueue or study.warm_start is not None or study.sampler not in LEARNING
    if own or plan.rules < SINCE:
        return ()
    return first_configurations(space, steps_kept(space["sequence_length"], plan.steps), study.trials)


def first_configurations(space: Mapping[str, Entry], steps: int, trials: int) -> tuple[dict[str, Value], ...]:
    """Those of the portfolio that a completed space holds, at most every fourth of `trials`, but one in any case.

    What the space has as a constant takes that value, and a number that it does not hold becomes the nearest one that
    it does; a configuration with another choice that it does not hold is left out. The choices of `missing` take turns,
    as it depends on the data whether a gap says something. steps: of the longest sequence that are kept.
    """
    found: list[dict[str, Value]] = []
    missing = values(space["missing"])
    assert missing  # names, which no range is of
    for configuration in PORTFOLIO:
        own = dict(configuration) | {"patch_length": max(1, round(steps / PATCHES))}
        own["missing"] = missing[len(found) % len(missing)]
        moved = {name: _nearest(space[name], value) for name, value in own.items()}
        params = {name: value for name, value in moved.items() if value is not None}
        if len(params) < len(moved):
            continue
        active = {name: value for name, value in params.items() if is_active(name, params)}
        if active not in found:
            found.append(active)
    return tuple(found[: max(1, trials // SHARE)])


def _nearest(entry: Entry, value: Value) -> Value | None:
    """The value itself if the entry holds it, else the only one that it holds, or the number of it that is nearest, by
    ratio; or None."""
    if contains(entry, value):
        return value
    if size(entry) == 1:
        return only(entry)
    if isinstance(value, bool | str):
        return None
    every = values(entry)
    if every is None and isinstance(entry, Range):
        return min(max(value, entry.low), entry.high)
    numbers = [each for each in every or [] if not isinstance(each, bool | str)]
    return min(numbers, key=lambda each: (abs(math.log1p(each) - math.log1p(value)), each))
