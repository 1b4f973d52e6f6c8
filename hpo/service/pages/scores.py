"""A version's scores, as a page shows them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby

from hpo.models.class_scores import ClassScore, GroupScore, ModelScores, PartScores, worst_first
from hpo.models.config import METRICS
from hpo.service.schemas import Model

SHOWN = 10  # classes, and groups, of a part: the worst


@dataclass(frozen=True)
class Score:
    """One metric on one part; those of the test part have a 95 % interval."""

    metric: str
    validation: float | None
    test: float | None
    interval: tuple[float, float] | None
    undefined: bool  # the test part has no such value

    @property
    def range(self) -> tuple[float, float] | None:
        """The interval in percent of 0 to 1, begin and width; None for a metric without such bounds."""
        if self.interval is None or self.metric == "log_loss":
            return None
        low, high = self.interval
        return 100 * low, max(1.0, 100 * (high - low))


@dataclass(frozen=True)
class Version:
    """A model's version with its scores."""

    model: Model
    main: Score  # by the metric that it was tuned for
    scores: tuple[Score, ...]

    @property
    def sequences(self) -> dict[str, int | None]:
        """How many sequences each part has; None where an earlier version of hpo has not said, or there is no part."""
        said = self.model.scores.get("sequences") or {}
        return {part: said.get(part) for part in ("validation", "test")}


@dataclass(frozen=True)
class Named:
    """All versions of a name, the newest first."""

    name: str
    models: tuple[Model, ...]

    @property
    def versions(self) -> list[Version]:
        """With their scores."""
        return [scored(model) for model in self.models]

    @property
    def shown(self) -> Version:
        """What the name alone means."""
        return scored(next((model for model in self.models if "latest" in model.aliases), self.models[0]))


def by_name(models: Iterable[Model]) -> list[Named]:
    """The versions that `GET /v1/models` gives, by name; what was made last comes first."""
    found = [
        Named(name, tuple(sorted(group, key=lambda model: -model.version)))
        for name, group in groupby(models, key=lambda model: model.name)
    ]
    return sorted(found, key=lambda named: named.models[0].created, reverse=True)


def scored(model: Model) -> Version:
    """A version with its scores, the metric that it was tuned for first."""
    scores = model.scores
    main = scores["metric"]
    rest = [name for name in METRICS if name != main and name in (scores.get("validation") or {})]
    found = tuple(_score(model, name) for name in (main, *rest))
    return Version(model, found[0], found)


@dataclass(frozen=True)
class Part:
    """One part of the data as a page shows it: the worst classes and groups."""

    name: str  # Test | Validation
    scores: PartScores

    @property
    def classes(self) -> list[ClassScore]:
        """Those shown, the surest failures first."""
        return worst_first(self.scores.by_class)[:SHOWN]

    @property
    def groups(self) -> tuple[GroupScore, ...]:
        """Those shown, the surest failures first."""
        return self.scores.by_group[:SHOWN]

    @property
    def more_classes(self) -> int:
        """How many are not shown."""
        return len(self.scores.by_class) - len(self.classes)

    @property
    def more_groups(self) -> int:
        """How many are not shown."""
        return (self.scores.groups or 0) - len(self.groups)


def parts_of(found: ModelScores | None) -> list[Part]:
    """What is known of the test part and the validation part, in this order."""
    if found is None:
        return []
    parts = {"Test": found.test, "Validation": found.validation}
    return [Part(name, scores) for name, scores in parts.items() if scores is not None]


def _score(model: Model, metric: str) -> Score:
    scores = model.scores
    interval = (scores.get("intervals") or {}).get(metric)
    return Score(
        metric=metric,
        validation=(scores.get("validation") or {}).get(metric),
        test=(scores.get("test") or {}).get(metric),
        interval=None if interval is None else (interval[0], interval[1]),
        undefined=metric in (scores.get("undefined") or {}),
    )
