"""The search space: what may be tuned, its defaults, and what is drawn from it.

The names, types and admissible values of `PARAMETERS` are those of the fields of `ClassifierConfig` and
`TrainingConfig`; its order is the order in which `walk` draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from hpo.models.config import ClassifierConfig, TrainingConfig
from hpo.models.fields import Rule, Value, default, rules
from hpo.study.entries import (
    Choices,
    Entry,
    Range,
    SpaceError,
    contains,
    distribution,
    exact,
    largest,
    only,
    show,
    size,
    unknown,
)

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

LARGEST = {  # of a search; a network may be larger
    "hidden_size": 4096,
    "layers": 8,
    "head_size": 65536,
    "stem_width": 4096,
    "stem_kernel": 65536,
    **dict.fromkeys(("sequence_length", "patch_length", "stem_stride", "batch_size"), 10**9),
}
STEPS_MOST = 10**9  # of a range
ORDER = (  # of drawing: what decides whether a parameter is active comes before it
    "missing",
    "normalization",
    "sequence_length",
    "difference",
    "stem",
    "patch_length",
    "stem_layers",
    "stem_width",
    "stem_kernel",
    "stem_stride",
    "hidden_size",
    "layers",
    "bidirectional",
    "pooling",
    "skip",
    "head_size",
    "dropout",
    "batch_size",
    "optimizer",
    "learning_rate",
    "weight_decay",
    "gradient_clip",
    "schedule",
    "class_weight",
    "label_smoothing",
    "mixup",
    "jitter",
    "threshold",
)
_RULES = rules(ClassifierConfig) | rules(TrainingConfig)
PARAMETERS: dict[str, Rule] = {name: replace(_RULES[name], high=LARGEST.get(name, _RULES[name].high)) for name in ORDER}
_PATCH, _CONV = ("patch_length",), ("stem_layers", "stem_width", "stem_kernel", "stem_stride")
NEUTRAL: dict[str, Value] = {  # what an inactive entry is set to
    "dropout": 0.0,
    **{name: default(ClassifierConfig, name) for name in (*_PATCH, *_CONV)},
}
DECIDED_BY = {  # by what decides whether it is active
    "dropout": ("layers", "head_size"),
    **dict.fromkeys((*_PATCH, *_CONV), ("stem",)),
}
EARLIER: dict[str, Entry] = {  # what a study of an earlier version, whose space lacks these, trains with
    name: default(ClassifierConfig, name) for name in ("missing", "difference", "stem", *_CONV, "skip")
} | {name: default(TrainingConfig, name) for name in ("label_smoothing", "mixup", "jitter")}

# --- defaults ---

DEFAULTS: dict[str, Entry] = {  # whatever the data; what follows from them is below
    "normalization": Choices(("channel", "sequence")),
    "sequence_length": 0,
    "difference": Choices((False, True)),
    "stem": Choices(("patch", "conv")),
    "stem_layers": Range(1, 3),
    "stem_width": 64,
    "stem_kernel": Choices((3, 5, 7, 9)),
    "hidden_size": Range(16, 128, log=True),
    "layers": 1,
    "bidirectional": Choices((False, True)),
    "pooling": Choices(("last", "mean", "max", "concat")),
    "skip": Choices((False, True)),
    "head_size": Choices((0, 128)),
    "dropout": Range(0.0, 0.5),
    "optimizer": "adamw",
    "learning_rate": Range(1e-3, 2e-2, log=True),  # with a lower rate a small set is not learnt in 50 epochs
    "weight_decay": Range(1e-6, 1e-2, log=True),
    "gradient_clip": 1.0,
    "schedule": "cosine",
    "class_weight": "none",
    "label_smoothing": Choices((0.0, 0.1)),
    "mixup": Choices((0.0, 0.2)),
    "jitter": 0.0,
    "threshold": "half",
}
BATCH_SIZES = (  # training sequences up to, batch sizes
    (200, (8, 16, 32)),
    (1_000, (16, 32, 64)),
    (10_000, (32, 64, 128)),
    (100_000, (64, 128, 256)),
    (math.inf, (128, 256, 512)),
)
PATCHES_LEAST = 6  # a default patch length leaves the LSTM at least this many steps …
PATCHES_MOST = 64  # … and at most this many
PATCH_CHOICES = 4  # default patch lengths at most
STRIDE_LEAVES_LEAST = 12  # a default stride leaves the LSTM at least this many steps …
STRIDE_LEAVES_MOST = 128  # … and at most this many
PATCH_WIDTH = 2048  # features times patch length at most, beyond the shortest patch


def default_space(*, n: int, steps: int, features: int, gaps: bool = False) -> dict[str, Entry]:
    """A default for every parameter, in drawing order.

    `n` training sequences (N) of at most `steps` (T) and `features` (F). One step leaves nothing to pool and
    nothing to normalize within a sequence; without `gaps` there is nothing to tell a network of them.
    """
    derived: dict[str, Entry] = {
        "missing": Choices(PARAMETERS["missing"].names) if gaps else default(ClassifierConfig, "missing"),
        "patch_length": _one_or_more(_patch_lengths(steps, features)),
        "stem_stride": _one_or_more(_strides(steps)),
        "batch_size": _one_or_more(_batch_sizes(n)),
    }
    if steps == 1:
        derived |= {"pooling": "last", "normalization": "channel"}
    return {name: derived[name] if name in derived else DEFAULTS[name] for name in PARAMETERS}


def _patch_lengths(steps: int, features: int) -> list[int]:
    """Powers of two that leave a readable number of steps: T=24 -> 1, 2, 4; T=500 -> 8, 16, 32, 64."""
    shortest = _shortest(steps, PATCHES_MOST)
    longer = (shortest * 2**i for i in range(1, PATCH_CHOICES))
    fits = [k for k in longer if math.ceil(steps / k) >= PATCHES_LEAST and k * features <= PATCH_WIDTH]
    return [shortest, *fits]


def _shortest(steps: int, most: int) -> int:
    """The smallest power of two that leaves no more than `most` steps."""
    return 1 << max(0, math.ceil(math.log2(steps / most)))


def _strides(steps: int) -> list[int]:
    """Up to three powers of two that leave a readable number of steps: T=24 -> 1, 2; T=100 -> 1, 2, 4."""
    shortest = _shortest(steps, STRIDE_LEAVES_MOST)
    fits = [k for k in (shortest, 2 * shortest, 4 * shortest) if k == 1 or math.ceil(steps / k) >= STRIDE_LEAVES_LEAST]
    return fits or [shortest]


def _batch_sizes(n: int) -> list[int]:
    """Those of the table that are no larger than the training part, or the training part whole."""
    sizes = next(sizes for most, sizes in BATCH_SIZES if n <= most)
    return [size for size in sizes if size <= n] or [n]


def _one_or_more(values: list[int]) -> Entry:
    return Choices(tuple(values)) if len(values) > 1 else values[0]


def complete(
    space: Mapping[str, Entry],
    *,
    n: int,
    steps: int,
    features: int,
    classes: int,
    variable: bool,
    gaps: bool = False,
) -> dict[str, Entry]:
    """The space with its defaults filled in, in drawing order, and checked against the training data.

    `n` counts the training sequences before any are set aside for validation: a batch size above what a
    fold leaves means all of it. Lengths are `variable` or all alike; there are `gaps` or none. A default follows from
    the steps that `sequence_length` keeps. Raises SpaceError where an entry cannot work with these data.
    """
    kept = steps_kept(space.get("sequence_length", 0), steps)
    defaults = default_space(n=n, steps=kept, features=features, gaps=gaps)
    full = {name: space.get(name, defaults[name]) for name in PARAMETERS}
    _check_sizes(full, n, kept)
    if variable and contains(full["pooling"], "flatten"):
        raise SpaceError(
            'space.pooling must not hold "flatten" where sequences differ in length; use '
            f'"last", "mean", "max" or "attention", got {show(full["pooling"])}'
        )
    if classes > 2 and contains(full["threshold"], "chosen"):
        raise SpaceError(
            f'space.threshold must be "half" with more than two classes ({classes} here), got {show(full["threshold"])}'
        )
    return full


def _check_sizes(full: Mapping[str, Entry], n: int, kept: int) -> None:
    """Compare patch length, stride and batch size with the `kept` steps and the n sequences. Raises SpaceError."""
    if largest(full["patch_length"]) > kept:
        raise SpaceError(
            f"space.patch_length must be at most {kept}, the steps of the longest sequence that "
            f"are kept, got {show(full['patch_length'])}"
        )
    if largest(full["stem_stride"]) > kept:
        raise SpaceError(
            f"space.stem_stride must be at most {kept}, the steps of the longest sequence that "
            f"are kept, got {show(full['stem_stride'])}"
        )
    if largest(full["batch_size"]) > n:
        raise SpaceError(
            f"space.batch_size must be at most {n}, the number of training sequences, got {show(full['batch_size'])}"
        )


def steps_kept(entry: Entry, steps: int) -> int:
    """Steps of the longest sequence that the longest crop of `sequence_length` keeps. Raises SpaceError for one that is
    longer."""
    if largest(entry) > steps:
        raise SpaceError(
            f"space.sequence_length must be at most {steps}, the steps of the longest sequence "
            f"(0 keeps all), got {show(entry)}"
        )
    return steps if contains(entry, 0) else int(largest(entry))


# --- from the study file ---


def parse(name: str, written: object) -> Entry:
    """One entry of [space] as TOML or JSON gives it; raises SpaceError with the rule that it breaks."""
    key = f"space.{name}"
    if isinstance(written, dict):
        return _parse_range(name, written)
    if not isinstance(written, list):
        return check_value(name, written, key)
    if not written:
        raise SpaceError(f"{key} must list at least one value, got []")
    values = tuple(check_value(name, value, key) for value in written)
    if len(set(values)) < len(values):
        raise SpaceError(f"{key} must not list a value twice, got {show(written)}")
    return Choices(values)


def _parse_range(name: str, table: dict[str, object]) -> Range:
    key, kind = f"space.{name}", PARAMETERS[name].kind
    if kind in (str, bool):
        raise SpaceError(f"{key} must be {PARAMETERS[name].sentence()}, or a list of these, got {show(table)}")
    for part in table:
        if part not in ("low", "high", "step", "log"):
            raise SpaceError(unknown(key, part, ("low", "high", "step", "log")))
    if "low" not in table or "high" not in table:
        raise SpaceError(f"{key} must have both low and high, got {show(table)}")
    low, high = (check_value(name, table[end], f"{key}.{end}") for end in ("low", "high"))
    log, step = table.get("log", False), table.get("step")
    if not isinstance(log, bool):
        raise SpaceError(f"{key}.log must be true or false, got {show(log)}")
    assert not isinstance(low, str)  # the kind is int or float
    assert not isinstance(high, str)
    return _checked_range(Range(low, high, _parse_step(key, step, kind), log), key, table)


def _parse_step(key: str, step: object, kind: type) -> float | None:
    if step is None:
        return None
    value = _of_kind(step, kind)
    if value is None or value <= 0:
        noun = "a whole number of at least 1" if kind is int else "a finite number above 0"
        raise SpaceError(f"{key}.step must be {noun}, got {show(step)}")
    return None if kind is int and value == 1 else value


def _checked_range(entry: Range, key: str, written: dict[str, object]) -> Range:
    if entry.low > entry.high:
        raise SpaceError(f"{key}.low must be at most high, got {show(written)}")
    if entry.log and entry.step is not None:
        raise SpaceError(f"{key} must have either a step or log = true, got {show(written)}")
    if entry.log and entry.low <= 0:
        raise SpaceError(f"{key}.low must be above 0 where log = true, got {show(written)}")
    if entry.step is not None and (entry.high - entry.low) / entry.step > STEPS_MOST:
        raise SpaceError(f"{key}.step must leave at most {STEPS_MOST} values, got {show(written)}")
    if entry.step is not None and (rest := exact(entry.high, entry.low) % Decimal(str(entry.step))):
        high = float(Decimal(str(entry.high)) - rest)
        raise SpaceError(f"{key}.high must be low plus a whole number of steps, such as {high:g}, got {show(written)}")
    return entry


def check_value(name: str, value: object, key: str) -> Value:
    """The value in its parameter's type (a whole number written for a float becomes one).

    Raises SpaceError, with `key` for the name, where it is of another type or out of range.
    """
    parameter = PARAMETERS[name]
    typed: Value | None = _of_kind(value, parameter.kind)
    if typed is None or not parameter.admits(typed):
        raise SpaceError(f"{key} must be {parameter.sentence()}, got {show(value)}")
    return typed


def _of_kind(value: Any, kind: type) -> Any:
    """The value as this type, None where it is of another: a bool is no number, 1.0 no int, inf no float."""
    if kind is float and type(value) in (int, float) and abs(value) < 1e308:
        return float(value)
    return value if kind is not float and type(value) is kind else None


def check_params(space: Mapping[str, Entry], params: Mapping[str, Any], where: str = "enqueue") -> dict[str, Value]:
    """A known-good configuration in its parameters' types; names may be missing from it.

    Raises SpaceError for an unknown name and for a value that its entry in `space` does not hold; a name that
    the space has no entry for is checked for type and admissible values alone. An inactive parameter may
    have its neutral value, whatever its entry.
    """
    checked: dict[str, Value] = {}
    for name, value in params.items():
        if name not in PARAMETERS:
            raise SpaceError(unknown(where, name, PARAMETERS))
        checked[name] = check_value(name, value, f"{where}.{name}")
    for name, value in checked.items():
        if name in space and not contains(space[name], value) and not _idle(name, value, checked):
            raise SpaceError(
                f"{where}.{name} must lie in space.{name} = {show(space[name])}, got {show(value)}; "
                f"widen space.{name} or leave it out"
            )
    return checked


def _idle(name: str, value: Value, params: Mapping[str, Any]) -> bool:
    known = name in NEUTRAL and params.keys() >= set(DECIDED_BY[name])
    return known and value == NEUTRAL[name] and not is_active(name, params)


# --- drawing ---


def distributions(space: Mapping[str, Entry]) -> dict[str, BaseDistribution]:
    """The distributions of all entries of more than one value, in drawing order."""
    pairs = ((name, distribution(space[name])) for name in PARAMETERS if name in space)
    return {name: found for name, found in pairs if found is not None}


def is_active(name: str, params: Mapping[str, Any]) -> bool:
    """Whether a parameter has any effect: dropout needs two LSTM layers or a hidden layer in the head, what belongs to
    a stem needs that stem.

    `params` must hold what decides (see DECIDED_BY).
    """
    if name == "dropout":
        return bool(params["layers"] >= 2 or params["head_size"] > 0)
    if name in _PATCH:
        return bool(params["stem"] == "patch")
    return name not in _CONV or bool(params["stem"] == "conv")


def walk(space: Mapping[str, Entry], draw: Callable[[str, BaseDistribution], Any]) -> dict[str, Any]:
    """One value for every parameter of a completed space.

    `draw` is called for the active entries of more than one value, in the order of `PARAMETERS`; an inactive
    one gets its neutral value.
    """
    params: dict[str, Any] = {}
    for name in PARAMETERS:
        if not is_active(name, params):
            params[name] = NEUTRAL[name]
        else:
            found = distribution(space[name])
            params[name] = only(space[name]) if found is None else draw(name, found)
    return params


def cardinality(space: Mapping[str, Entry]) -> int | None:
    """How many distinct configurations `walk` can give over a completed space; None: no end of them.

    Dropout is inactive for exactly one pair, one layer and no hidden head, and counts once there; what belongs to a
    stem counts for that stem alone.
    """
    sizes = {name: size(entry) for name, entry in space.items()}
    inactive = int(contains(space["layers"], 1) and contains(space["head_size"], 0))
    active = (sizes.pop("layers") or 0) * (sizes.pop("head_size") or 0) - inactive
    dropout = sizes.pop("dropout")
    dropout = dropout if active else 1
    own = {name: sizes.pop(name) for name in (*_PATCH, *_CONV)}
    of_stem = {"none": (), "patch": _PATCH, "conv": _CONV}
    stems = sum(
        math.prod(own[each] or 0 for each in of_stem[name]) for name in of_stem if contains(space["stem"], name)
    )
    del sizes["stem"]
    if dropout is None or None in sizes.values():
        return None
    return (active * dropout + inactive) * stems * math.prod(count for count in sizes.values() if count)
