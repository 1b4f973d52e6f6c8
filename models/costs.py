"""What wrong decisions between two classes cost. Imports neither torch nor numpy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Costs:
    """Of wrong decisions between two classes, in any unit; right ones cost nothing. JSON-able."""

    false_positive: float  # the first class called the second one; above 0
    false_negative: float  # the second class called the first one; above 0

    @property
    def threshold(self) -> float:
        """The probability of the second class from which it is cheaper to call it, if probabilities are true (Elkan,
        The foundations of cost-sensitive learning, IJCAI 2001)."""
        return self.false_positive / (self.false_positive + self.false_negative)

    def mean(self, confusion: Sequence[Sequence[float]]) -> float:
        """What a decision costs on average; confusion: (2, 2), row = true class."""
        (right, alarms), (misses, found) = confusion
        wrong = self.false_positive * alarms + self.false_negative * misses
        return wrong / (right + alarms + misses + found)

    def least_without_model(self, confusion: Sequence[Sequence[float]]) -> float:
        """What a decision costs on average if it is always the same one, the cheaper of the two."""
        first, second = map(sum, confusion)
        return min(self.mean([[first, 0], [second, 0]]), self.mean([[0, first], [0, second]]))
