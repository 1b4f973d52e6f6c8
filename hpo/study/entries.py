"""One entry of a search space: a `Range`, `Choices`, or a constant; what it holds, and how it is written."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any, TypeAlias

from hpo.errors import StudyFault
from hpo.models.fields import Value

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

SHOWN_MOST, SHOWN_KEY = 2_000, 100  # characters of a value, and of a key, in a message


class SpaceError(StudyFault):
    """An entry or a value lies outside what a hyperparameter admits, or contradicts the data."""


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included; whole numbers where both are int."""

    low: float  # smallest value
    high: float  # largest value, low + a whole number of steps
    step: float | None = None  # distance between values; None: 1 for whole numbers, else continuous
    log: bool = False  # draw uniformly in the logarithm; low > 0 and no step


@dataclass(frozen=True)
class Choices:
    """A list of values without an order, all of the parameter's own type."""

    values: tuple[Value, ...]  # at least one, no two alike


Entry: TypeAlias = Range | Choices | Value


# --- what an entry holds ---


def only(entry: Entry) -> Value:
    """The value of an entry that has one alone."""
    if isinstance(entry, Range):
        return entry.low
    return entry.values[0] if isinstance(entry, Choices) else entry


def values(entry: Entry) -> list[Value] | None:
    """All values of an entry in order, None for a continuous range."""
    if isinstance(entry, Choices):
        return list(entry.values)
    if (count := size(entry)) is None:
        return None
    if not isinstance(entry, Range) or count == 1:
        return [only(entry)]
    low, step, kind = Decimal(str(entry.low)), Decimal(str(entry.step or 1)), type(entry.low)
    return [kind(low + i * step) for i in range(count)]


def size(entry: Entry) -> int | None:
    """The number of values of an entry, None for a continuous range."""
    if not isinstance(entry, Range):
        return len(entry.values) if isinstance(entry, Choices) else 1
    if entry.low == entry.high:
        return 1
    step = entry.step or (1 if isinstance(entry.low, int) else None)
    return None if step is None else int(exact(entry.high, entry.low) / Decimal(str(step))) + 1


def contains(entry: Entry, value: Value) -> bool:
    """Whether an entry holds a value of its parameter's type."""
    if not isinstance(entry, Range):
        return value in entry.values if isinstance(entry, Choices) else value == entry
    if isinstance(value, str) or not entry.low <= value <= entry.high:
        return False
    distance, step = value - entry.low, entry.step
    if not step or isinstance(distance, int):
        return not step or distance % step == 0
    return abs(distance / step - round(distance / step)) < 1e-8


def largest(entry: Any) -> Any:
    """The largest value of a numeric entry: a whole number, however large, stays one."""
    if isinstance(entry, Range):
        return entry.high
    return max(entry.values) if isinstance(entry, Choices) else entry


def exact(high: float, low: float) -> Decimal:
    """high - low in the decimals that were written, not in binary."""
    return Decimal(str(high)) - Decimal(str(low))


def distribution(entry: Entry) -> BaseDistribution | None:
    """The Optuna distribution of an entry; None where there is nothing to draw, an entry of one value."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if not isinstance(entry, Range | Choices) or size(entry) == 1:
        return None
    if isinstance(entry, Choices):
        return CategoricalDistribution(entry.values)
    if isinstance(entry.low, int) and isinstance(entry.high, int):
        return IntDistribution(entry.low, entry.high, log=entry.log, step=int(entry.step or 1))
    return FloatDistribution(entry.low, entry.high, log=entry.log, step=entry.step)


# --- how it is written ---


def unparse(entry: Entry) -> Any:
    """The entry as TOML or JSON holds it; `parse` is its inverse."""
    if isinstance(entry, Choices):
        return list(entry.values)
    if not isinstance(entry, Range):
        return entry
    step = {} if entry.step is None else {"step": entry.step}
    return {"low": entry.low, "high": entry.high, **step, **({"log": True} if entry.log else {})}


def show(value: object) -> str:
    """A value as TOML writes it, on one line; its beginning where it is longer than SHOWN_MOST characters."""
    text = written(value)
    return text if len(text) <= SHOWN_MOST else f"{text[:SHOWN_MOST]}… ({len(text)} characters)"


def written(value: object) -> str:
    """A value as TOML writes it, whole."""
    if isinstance(value, Range | Choices):
        return written(unparse(value))
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_key(key)} = {written(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(written, value)) + "]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value).lower() if isinstance(value, bool) else str(value)


def _key(key: str) -> str:
    bare = key.isascii() and key.replace("_", "").replace("-", "").isalnum()
    return key if bare else show(key)


def unknown(table: str, key: str, known: Iterable[str]) -> str:
    """The error for a key of a table that is not known, naming the nearest that is."""
    prefix = f"{table}." if table else ""
    known, key = list(known), key[:SHOWN_KEY]
    close = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {prefix}{close[0]}?" if close else "known are " + ", ".join(known)
    return f"unknown key {prefix}{_key(key)}; {hint}"
