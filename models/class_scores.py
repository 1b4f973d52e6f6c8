"""Which classes a model gets wrong, and which groups: read from the counts that each part's scores hold.

Each class is scored against the rest. Recall is the share of its sequences that are predicted as it, precision the
share of those predicted as it that are of it, F1 their harmonic mean 2 hits / (true + predicted). Confusion counts are
all that this needs, so models that were saved before it was written are scored, too.

Imports neither numpy nor torch: these classes go over the wire, and a client starts at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from hpo.models.metrics import Groups, Scores

Interval = tuple[float, float]  # of 95 %, by Clopper and Pearson


@dataclass(frozen=True)
class Mistake:
    """The class that a class is most often taken for."""

    name: str
    sequences: int  # that are taken for it


@dataclass(frozen=True)
class ClassScore:
    """One class against the rest. What has no value is None, and `undefined` says why."""

    name: str
    sequences: int  # of this class
    recall: float | None
    recall_interval: Interval | None
    precision: float | None
    precision_interval: Interval | None
    f1: float | None
    mistaken_for: Mistake | None  # None: each of its sequences is found
    undefined: dict[str, str] = field(default_factory=dict)  # recall, precision, f1 -> why it has no value


@dataclass(frozen=True)
class GroupScore:
    """One group's sequences."""

    name: str | None  # None: not known here, or not for who asks
    sequences: int
    right: int  # that get their class
    accuracy: float
    interval: Interval


@dataclass(frozen=True)
class PartScores:
    """One part of the data, by class and by group."""

    sequences: int
    accuracy: float
    by_class: tuple[ClassScore, ...]  # in the model's order
    groups: int | None = None  # how many there are; None: none, or they were not counted
    by_group: tuple[GroupScore, ...] = ()  # the worst GROUPS_KEPT of metrics.py, the surest failures first


@dataclass(frozen=True)
class ModelScores:
    """A model's parts by class and by group; None: there is no such part, or an earlier version did not count."""

    validation: PartScores | None
    test: PartScores | None


def model_scores(classes: Sequence[str], validation: Scores | None, test: Scores | None) -> ModelScores:
    """The parts of a model with the classes of these names, (K,)."""
    return ModelScores(part_scores(classes, validation), part_scores(classes, test))


def part_scores(classes: Sequence[str], scores: Scores | None) -> PartScores | None:
    """A part's scores by class, (K,) names, and by group; None for one without a sequence."""
    if scores is None or not (total := sum(map(sum, scores.confusion))):
        return None
    by_class = class_scores(classes, scores.confusion)
    accuracy = sum(row[c] for c, row in enumerate(scores.confusion)) / total
    groups = scores.groups
    return PartScores(
        total, accuracy, by_class, None if groups is None else groups.total, () if groups is None else _by_group(groups)
    )


def class_scores(classes: Sequence[str], confusion: Sequence[Sequence[int]]) -> tuple[ClassScore, ...]:
    """Each class against the rest, from counts (K, K), row = true class."""
    predicted = [sum(column) for column in zip(*confusion, strict=True)]
    return tuple(_class_score(c, classes, row, predicted[c]) for c, row in enumerate(confusion))


def _class_score(c: int, classes: Sequence[str], row: Sequence[int], predicted: int) -> ClassScore:
    """Class c, from the counts (K,) of what its sequences are predicted as, and how many are predicted as it."""
    hits, true = row[c], sum(row)
    undefined = {} if true else dict.fromkeys(("recall", "f1"), "no sequence is of this class")
    if not predicted:
        undefined["precision"] = "no sequence is predicted as this class"
    recall, recall_interval = _share(hits, true)
    precision, precision_interval = _share(hits, predicted)
    most, other = max(((count, -k) for k, count in enumerate(row) if k != c), default=(0, 0))
    return ClassScore(
        name=classes[c],
        sequences=true,
        recall=recall,
        recall_interval=recall_interval,
        precision=precision,
        precision_interval=precision_interval,
        f1=2 * hits / (true + predicted) if true else None,
        mistaken_for=Mistake(classes[-other], most) if most else None,
        undefined=undefined,
    )


def _by_group(groups: Groups) -> tuple[GroupScore, ...]:
    from hpo.models.metrics import proportion_interval

    names = groups.names or [None] * len(groups.counts)
    return tuple(
        GroupScore(name, sequences, right, right / sequences, proportion_interval(right, sequences))
        for name, (sequences, right) in zip(names, groups.counts, strict=True)
    )


def _share(hits: int, n: int) -> tuple[float, Interval] | tuple[None, None]:
    """hits / n with its interval; (None, None) of nothing."""
    from hpo.models.metrics import proportion_interval

    return (hits / n, proportion_interval(hits, n)) if n else (None, None)


# -------------------------------------------------------------------------------------------------------- the weakest


@dataclass(frozen=True)
class Weak:
    """Where a model fails more than over all, beyond chance: the intervals lie below the part's accuracy."""

    part: Literal["test", "validation"]
    sequences: int  # of the part
    accuracy: float
    classes: tuple[ClassScore, ...]  # by their recall, the surest failures first
    groups: tuple[GroupScore, ...]  # by their accuracy, the surest failures first


def worst_first(found: Iterable[ClassScore]) -> list[ClassScore]:
    """By the upper end of the recall's interval, as `metrics.count_groups` orders groups; without a sequence last.

    So the surest failures come first: 30 found of 100 before none of one, which may be chance.
    """
    return sorted(found, key=lambda each: (each.recall_interval or (0, 2))[::-1])


def weakest(found: ModelScores) -> Weak | None:
    """The classes and groups of the test part in which the model fails, or of the validation part where there is no
    other; None where there are no such."""
    name: Literal["test", "validation"] = "validation" if found.test is None else "test"
    part = found.validation if found.test is None else found.test
    if part is None:
        return None
    weak = [each for each in part.by_class if each.recall_interval and each.recall_interval[1] < part.accuracy]
    groups = tuple(each for each in part.by_group if each.interval[1] < part.accuracy)
    return Weak(name, part.sequences, part.accuracy, tuple(worst_first(weak)), groups) if weak or groups else None
