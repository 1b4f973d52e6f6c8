"""What a field of a configuration admits, stated at the field.

    layers: int = field(default=1, metadata=allowed(int, low=1))

The configuration checks itself with `check`; the search space reads the same rules with `rules`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

from hpo.errors import HpoError

Value: TypeAlias = str | int | float | bool
RULE = "rule"  # the key of a field's metadata


@dataclass(frozen=True)
class Rule:
    """What a field admits."""

    kind: type  # int, float, str or bool
    low: float = -math.inf  # smallest number
    high: float = math.inf  # largest number
    above: bool = False  # low itself is excluded
    below: bool = False  # high itself is excluded
    names: tuple[str, ...] = ()  # the admissible strings

    def admits(self, value: Value) -> bool:
        """Whether a value of the right type is admissible."""
        if isinstance(value, str):
            return value in self.names
        above = self.low < value or (value == self.low and not self.above)
        return above and (value < self.high or (value == self.high and not self.below))

    def sentence(self) -> str:
        """What a value must be, whole: "a whole number of at least 1 and at most 8"."""
        if self.kind is bool:
            return "true or false"
        if self.kind is str:
            return "one of " + ", ".join(f'"{name}"' for name in self.names)
        noun = "a whole number" if self.kind is int else "a finite number"
        low = f" {'above' if self.above else 'of at least'} {self.low:g}" if self.low > -math.inf else ""
        high = f" {'below' if self.below else 'at most'} {self.high:g}" if self.high < math.inf else ""
        return noun + low + (" and" if low and high else "") + high

    def broken_by(self, value: Value) -> str:
        """The part of the rule that a value which is not admitted breaks: "at least 1"."""
        if self.names:
            return "one of " + ", ".join(self.names)
        if self.below:
            return f"in {'(' if self.above else '['}{self.low:g}, {self.high:g})"
        if not isinstance(value, str) and value > self.low:
            return f"at most {self.high:g}"
        return f"{'above' if self.above else 'at least'} {self.low:g}"


def allowed(
    kind: type,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    above: bool = False,
    below: bool = False,
    names: tuple[str, ...] = (),
) -> dict[str, Rule]:
    """The metadata of a field with that rule."""
    return {RULE: Rule(kind, low, high, above, below, names)}


def rules(config: type) -> dict[str, Rule]:
    """The rules of a configuration class by field, of those fields that have one."""
    return {item.name: item.metadata[RULE] for item in fields(config) if RULE in item.metadata}


def default(config: type, name: str) -> Any:
    """The default of one field of a configuration class."""
    return next(item.default for item in fields(config) if item.name == name)


def check(config: Any, error: type[HpoError]) -> None:
    """Raise `error`, with rule and value, for the first field that holds what its rule does not admit."""
    for name, rule in rules(type(config)).items():
        value = getattr(config, name)
        if not rule.admits(value):
            raise error(f"{name} must be {rule.broken_by(value)}, got {value!r}")
