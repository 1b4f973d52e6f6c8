"""What a saved model is: `BundleConfig`, and its form in config.json."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields, replace
from math import isfinite
from typing import Any, TypeVar

from hpo.errors import StudyFault, legible
from hpo.models.calibration import COOLEST, HOTTEST, Comparison, Reliability
from hpo.models.config import EARLIER_EPSILON, FLOAT32_MOST, METRICS, STEM, ClassifierConfig, ClassifierError
from hpo.models.costs import Costs
from hpo.models.data.columns import ROLES
from hpo.models.data.sequences import UNKEPT, UNKEPT_RULE, default_names
from hpo.models.estimate import Estimate
from hpo.models.fields import default, rules
from hpo.models.metrics import GROUPS_KEPT, Groups, Scores

FORMAT = 5  # version of the folder's format; raised when an older reader would misread it
OF_SEVERAL = 6  # the format of models of several configurations, which readers of 5 do not know
# formats that are read too, with what their classifiers do not say; some of format 4 do not say what is LATER either.
# None before 5 has a temperature.
LATER: dict[str, Any] = {name: default(ClassifierConfig, name) for name in ("skip", "missing", "interval")}
_NO_STEM = LATER | {name: default(ClassifierConfig, name) for name in (*STEM, "difference")}
EARLIER: dict[int, dict[str, Any]] = {
    1: {"epsilon": EARLIER_EPSILON, **_NO_STEM},
    2: _NO_STEM,
    3: _NO_STEM,
    4: {},
}
UNCALIBRATED: dict[str, Any] = {"temperature": 1.0, "calibration": {}}
TYPES: dict[str, type] = {
    "classes": list, "features": list, "metric": str, "members": int, "threshold": float, "best_epoch": int,
    "columns": dict, "provenance": dict, "temperature": float, "calibration": dict,
}  # fmt: skip
LARGEST = 2**31 - 1  # of a whole number
DEEPEST = 50  # objects and lists within one another
MOST_BINS = 100  # of a reliability diagram
MOST_COMPONENTS = 1_000  # of a model
LEAST_WEIGHT = 1e-9  # of one
OPTIONAL = ("named", "fill", "gaps", "estimate", "costs", "footprint")  # fields that are left out where they are None
PARTS = ("validation", "test")  # of the data, that a model has scores of
T = TypeVar("T")


class BundleError(StudyFault):
    """The folder is no whole saved model, is of a newer format, or must not be replaced; said in one line."""

    def __init__(self, message: str) -> None:
        super().__init__(legible(message))


@dataclass(frozen=True)
class Footprint:
    """What one prediction of a model takes, all networks together. JSON-able."""

    latency_ms: float  # of one sequence, on one thread of a CPU
    size_mb: float  # 10^6 bytes of weights
    steps: int  # of that sequence
    machine: str  # the CPU


@dataclass(frozen=True)
class Component:
    """Networks of one configuration within a model, whose probabilities are averaged. JSON-able."""

    classifier: ClassifierConfig
    members: int  # networks
    weight: float  # of their average in the model's probabilities; those of all components sum to 1


@dataclass(frozen=True)
class BundleConfig:
    """What a saved model is, how good it is, and where it comes from. JSON-able."""

    classifier: ClassifierConfig  # of `members`
    classes: tuple[str, ...]  # (K,) names, in the order of the probabilities
    features: tuple[str, ...]  # (F,) names, in the order of the training data
    metric: str  # that the study tuned
    members: int = 1  # k networks whose probabilities are averaged
    temperature: float = 1.0  # of the averaged probabilities p: the model's are softmax(log p / temperature)
    threshold: float = 0.5  # two classes: the second one is predicted from this (calibrated) probability up
    best_epoch: int = 1  # whose weights these are, from 1
    # of the training files, by the arguments of hpo.models.data.readers.read (ROLES)
    columns: dict[str, str] = field(default_factory=dict)
    # the part that chose hyperparameters, epoch and threshold; scores of the probabilities before calibration, as the
    # trial has them
    validation: Scores | None = None
    test: Scores | None = None  # never seen by tuning; scores of the model as it predicts
    calibration: dict[str, Comparison] = field(default_factory=dict)  # by the names in PARTS
    provenance: dict[str, Any] = field(default_factory=dict)  # study, trial, seed, data, versions, commit, device, …
    # the features' names are the training file's own; None: not recorded, so that x0, x1, … only number them
    named: bool | None = None
    fill: tuple[float, ...] | None = None  # (F,) what a sequence is given that lacks the feature throughout; None: 0
    gaps: tuple[float, ...] | None = None  # (F,) share of missing values in the training part; None: not recorded
    estimate: Estimate | None = None  # of the metric, by trainings that nothing was chosen by; None: there were none
    costs: Costs | None = None  # of wrong decisions, by which the threshold was chosen; None: it was not
    footprint: Footprint | None = None  # None: not measured
    # networks of other configurations, behind `members` in the weights' file; what their weights leave is the members'
    others: tuple[Component, ...] = ()

    def __post_init__(self) -> None:
        if not COOLEST <= self.temperature <= HOTTEST:
            raise BundleError(f"temperature must be from {COOLEST} to {HOTTEST}, got {self.temperature!r}")
        if self.costs is not None and self.classifier.classes != 2:
            raise BundleError(f"costs are of wrong decisions between two classes, got {self.classifier.classes}")
        self._check_others()
        for what, names in (("classes", self.classes), ("features", self.features)):
            if len(names) != getattr(self.classifier, what):
                expected = getattr(self.classifier, what)
                raise BundleError(f"a classifier of {expected} {what} needs as many names, got {list(names)}")
            if len(set(names)) < len(names):
                raise BundleError(f"the names of the {what} must differ, got {list(names)}")
        for what, numbers in (("fill", self.fill), ("gaps", self.gaps)):
            if numbers is not None and len(numbers) != self.classifier.features:
                raise BundleError(f"a classifier of {self.classifier.features} features needs as many {what}")
        for what, scores in (("validation", self.validation), ("test", self.test)):
            if scores is not None and len(scores.confusion) != self.classifier.classes:
                expected, got = self.classifier.classes, len(scores.confusion)
                raise BundleError(f"{what}: a classifier of {expected} classes needs the counts of as many, got {got}")

    def _check_others(self) -> None:
        if len(self.others) >= MOST_COMPONENTS:
            raise BundleError(f"a model is of at most {MOST_COMPONENTS} configurations, got {1 + len(self.others)}")
        if any(each.members < 1 or each.weight < LEAST_WEIGHT for each in self.components):
            found = [(each.members, each.weight) for each in self.components]
            rule = f"each configuration needs networks and a weight of at least {LEAST_WEIGHT}, which sum to 1"
            raise BundleError(f"{rule}, got {str(found)[:80]}")
        data = {(each.classifier.features, each.classifier.classes, each.classifier.steps) for each in self.components}
        if len(data) > 1:
            raise BundleError(f"configurations of one model need features, classes and steps alike, got {sorted(data)}")
        intervals = {each.classifier.interval for each in self.components if each.classifier.marks == 2}
        if len(intervals) > 1:
            raise BundleError(f"configurations of one model need one interval of steps, got {sorted(intervals)}")

    @property
    def components(self) -> tuple[Component, ...]:
        """The model's networks by configuration, in the order of their weights' numbers."""
        rest = 1 - sum(each.weight for each in self.others)
        return (Component(self.classifier, self.members, rest), *self.others)

    @property
    def networks(self) -> int:
        """How many predict together."""
        return sum(each.members for each in self.components)

    @property
    def configurations(self) -> list[ClassifierConfig]:
        """(networks,) of each."""
        return [each.classifier for each in self.components for _ in range(each.members)]

    @property
    def weights(self) -> list[float] | None:
        """(networks,) of each in the mean of probabilities; None: all alike."""
        if not self.others:
            return None
        return [each.weight / each.members for each in self.components for _ in range(each.members)]

    @property
    def widest(self) -> ClassifierConfig:
        """The configuration that is given most: what others are given begins it."""
        return max((each.classifier for each in self.components), key=lambda each: each.given)

    @property
    def has_names(self) -> bool:
        """Whether data with other names do not fit; else features are matched by place."""
        return self.features != default_names(len(self.features)) if self.named is None else self.named


def preprocessing(model: BundleConfig, config: ClassifierConfig) -> list[str]:
    """What happens to a sequence (T, F) before the LSTM of a network of that configuration, step by step."""
    none = "0" if model.fill is None else "`fill`, the training part's means"
    steps = [f"missing values are filled: linearly between known steps, with the nearest at the ends, or with {none}"]
    if config.marks:
        steps.append(
            "behind the features of a step come as many marks: 1 where the feature was observed, 0 where it was filled"
        )
    if config.marks == 2:
        unit = "the distances of steps in training, in seconds where steps are dates, else in their unit"
        steps.append(
            f"and as many more: log(1 + d / {config.interval!r}), where d is the time since the feature's last "
            f"observation before the step, since the first step where there is none, and 0 there ({unit})"
        )
    if config.sequence_length:
        steps.append(f"only its last {config.sequence_length} steps are kept")
    if config.difference:
        steps.append(
            "the differences of all features from the step before, 0 at the first, follow them as further ones"
            + ", before the marks" * bool(config.marks)
        )
    more = f" + {config.epsilon}" if config.epsilon else ""
    if config.normalization == "channel":
        constant = "" if more else "; 0 where that is 0, as the feature did not vary in training"
        steps.append(f"each feature: minus `mean`, divided by `deviation`{more} (both with the weights){constant}")
    if config.normalization == "sequence":
        constant = "" if more else "; 0 where it does not vary"
        steps.append(f"each feature: minus its mean in the sequence, divided by its deviation there{more}{constant}")
    if config.folded > 1:
        steps.append(f"{config.folded} consecutive steps become one; the last, partial one is filled with zeros")
    return steps


def to_json(config: BundleConfig) -> str:
    """The content of config.json, without the names of groups: they are the data's, as of patients, and a model folder
    is passed on. Raises ValueError for a number that is not finite, which JSON has none for."""
    content = {
        "format": OF_SEVERAL if config.others else FORMAT,
        **asdict(config),
        "preprocessing": preprocessing(config, config.classifier),
    }
    if not config.others:
        del content["others"]
    for described, other in zip(content.get("others", ()), config.others, strict=True):
        described["preprocessing"] = preprocessing(config, other.classifier)
    for name in OPTIONAL:  # of an earlier version's model, or one without finals
        if content[name] is None:
            del content[name]
    for scores in filter(None, (content["validation"], content["test"])):
        groups = scores.pop("groups")
        if groups is not None:
            scores["groups"] = {"total": groups["total"], "counts": groups["counts"]}
    return json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def from_json(text: bytes, source: str) -> BundleConfig:
    """The inverse of `to_json`; `source` names the file in errors.

    Raises BundleError unless each field has its type, numbers are finite and names can be kept.
    """
    try:
        content = json.loads(text)
        version = content.pop("format")
        content.pop("preprocessing", None)  # for readers; the classifier's configuration decides
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise BundleError(f"{source} is not the configuration of a saved model") from None
    _check_depth(content, source)
    if version not in (OF_SEVERAL, FORMAT, *EARLIER):
        raise BundleError(
            f"{source} has format {version}, this version of hpo reads up to {OF_SEVERAL}: install a newer hpo"
        )
    if version in EARLIER:
        content = content | UNCALIBRATED
    _check_types(content, TYPES, source)
    _check_choices(content, source)
    content["classifier"] = _classifier(content.get("classifier"), EARLIER.get(version, {}), source)
    content["others"] = _others(content.get("others", []), source)
    for part in PARTS:
        if content.get(part) is not None:
            content[part] = _scores(content[part], f"{source}, {part}")
    if "calibration" in content:
        content["calibration"] = _calibration(content["calibration"], f"{source}, calibration")
    content = dict.fromkeys(OPTIONAL) | content  # earlier versions recorded none
    content["footprint"] = _footprint(content["footprint"], f"{source}, footprint")
    content["estimate"] = _estimate(content["estimate"], f"{source}, estimate")
    content["costs"] = _costs(content["costs"], f"{source}, costs")
    for name in ("fill", "gaps"):
        content[name] = _numbers(content[name], f"{source}: {name}")
    for names in ("classes", "features"):
        content[names] = tuple(content.get(names, ()))
    return _exactly(BundleConfig, content, source)


def _classifier(content: Any, earlier: dict[str, Any], source: str) -> ClassifierConfig:
    """earlier: what a format's classifiers do not say. Raises BundleError."""
    if isinstance(content, dict):
        content = LATER | content | earlier
        _check_types(content, {name: rule.kind for name, rule in rules(ClassifierConfig).items()}, source)
    try:
        return _exactly(ClassifierConfig, content, f"{source}, classifier")
    except ClassifierError as error:
        raise BundleError(f"{source}: {error}") from None


def _others(content: Any, source: str) -> tuple[Component, ...]:
    """Raises BundleError."""
    if not isinstance(content, list) or len(content) >= MOST_COMPONENTS:
        raise BundleError(f"{source}: others must be a list of at most {MOST_COMPONENTS - 1} configurations")
    return tuple(_component(each, f"{source}, others") for each in content)


def _component(content: Any, source: str) -> Component:
    if isinstance(content, dict):
        content.pop("preprocessing", None)
        _check_types(content, {"members": int, "weight": float}, source)
    found = _exactly(Component, content, source)
    return replace(found, classifier=_classifier(found.classifier, {}, source))


def _check_types(content: dict[str, Any], types: dict[str, type], source: str) -> None:
    """Raise BundleError for a value of another type; a whole number is a float, too."""
    for name, kind in types.items():
        value = content.get(name, kind())
        wrong = isinstance(value, bool) != (kind is bool) or not isinstance(
            value, (int, float) if kind is float else kind
        )
        if wrong or (kind is list and not all(isinstance(item, str) for item in value)):
            rule = "a list of texts" if kind is list else f"of type {kind.__name__}"
            raise BundleError(f"{source}: {name} must be {rule}, got {str(value)[:40]!r}")
        if isinstance(value, int | float) and not _is_moderate(value):
            raise BundleError(f"{source}: {name} must be finite and at most {LARGEST}, got {str(value)[:40]}")


def _is_moderate(number: int | float) -> bool:
    return abs(number) <= LARGEST if isinstance(number, int) else isfinite(number)


def _check_depth(content: Any, source: str, left: int = DEEPEST) -> None:
    """Raise BundleError for what nests so deeply that walking through it could fail."""
    if isinstance(content, dict | list):
        if not left:
            raise BundleError(f"{source} must not nest more than {DEEPEST} levels")
        for item in content.values() if isinstance(content, dict) else content:
            _check_depth(item, source, left - 1)


def _check_choices(content: dict[str, Any], source: str) -> None:
    """Raise BundleError for fields of the right type that hold what they never do."""
    for name in ("members", "best_epoch"):
        if content.get(name, 1) < 1:
            raise BundleError(f"{source}: {name} must be at least 1, got {content[name]}")
    if content.get("metric", METRICS[0]) not in METRICS:
        raise BundleError(f"{source}: metric must be one of {', '.join(METRICS)}, got {content['metric']!r}")
    if not isinstance(content.get("named"), bool | None):
        raise BundleError(f"{source}: named must be true, false or null, got {str(content['named'])[:40]!r}")
    for role, column in content.get("columns", {}).items():
        if role not in ROLES or not isinstance(column, str):
            raise BundleError(f"{source}: columns must name those of {', '.join(ROLES)}, got {role!r}: {column!r}")
    for name in (*content.get("classes", ()), *content.get("features", ())):
        if UNKEPT.search(name):
            raise BundleError(f"{source}: the name of a class or feature {UNKEPT_RULE}, got {name!r}")


def _numbers(content: Any, source: str) -> tuple[float, ...] | None:
    """Numbers of a list that float32 holds, or None. Raises BundleError."""
    if content is None:
        return None
    if not isinstance(content, list) or not all(
        type(item) in (int, float) and abs(item) <= FLOAT32_MOST for item in content
    ):
        raise BundleError(f"{source} must be a list of finite numbers, got {str(content)[:40]!r}")
    return tuple(map(float, content))


def _scores(content: Any, source: str) -> Scores:
    if isinstance(content, dict):
        content = {"undefined": {}, "methods": {}, "groups": None} | content  # earlier versions did not say
    scores = _exactly(Scores, content, source)
    kinds = {"metrics": _is_number, "intervals": _is_interval, "undefined": _is_text, "methods": _is_text}
    for name, is_right in kinds.items():
        table = getattr(scores, name)
        if not isinstance(table, dict) or not table.keys() <= set(METRICS) or not all(map(is_right, table.values())):
            raise BundleError(f"{source}: {name} must be those of {', '.join(METRICS)}, got {str(table)[:80]!r}")
    rows: Any = scores.confusion
    square = isinstance(rows, list) and all(isinstance(row, list) and len(row) == len(rows) for row in rows)
    if not square or not all(_is_count(count) for row in rows for count in row) or not _is_count(scores.sequences):
        raise BundleError(f"{source}: sequences and confusion must be counts, the latter of each pair of classes")
    return replace(
        scores,
        intervals={name: (low, high) for name, (low, high) in scores.intervals.items()},
        confusion=tuple(map(tuple, scores.confusion)),
        groups=_groups(scores.groups, source),
    )


def _calibration(content: dict[str, Any], source: str) -> dict[str, Comparison]:
    """Raises BundleError."""
    if not content.keys() <= set(PARTS):
        raise BundleError(f"{source} must be of {' and '.join(PARTS)}, got {str(list(content))[:80]}")
    return {
        part: Comparison(_reliability(found.before, source), _reliability(found.after, source))
        for part, found in ((part, _exactly(Comparison, each, source)) for part, each in content.items())
    }


def _reliability(content: Any, source: str) -> Reliability:
    found = _exactly(Reliability, content, source)
    rows: Any = found.bins
    table = isinstance(rows, list) and 0 < len(rows) <= MOST_BINS and all(map(_is_bin, rows))
    if not table or not all(_is_number(value) and value >= 0 for value in (found.number, found.ece, found.brier)):
        rule = f"number, ece and brier, and of at most {MOST_BINS} bins share, confidence and accuracy"
        raise BundleError(f"{source} must be {rule}, got {str(content)[:80]!r}")
    return replace(found, bins=tuple((share, confidence, accuracy) for share, confidence, accuracy in rows))


def _estimate(content: Any, source: str) -> Estimate | None:
    if content is None:
        return None
    found = _exactly(Estimate, content, source)
    listed: Any = found.values
    numbers = isinstance(listed, list) and listed and all(map(_is_number, (*listed, found.value, found.selected)))
    if not numbers or not _is_interval(found.interval) or not _is_text(found.method):
        raise BundleError(f"{source} must be numbers, of its interval two, and a method, got {str(content)[:80]!r}")
    low, high = found.interval
    return replace(found, interval=(low, high), values=tuple(listed))


def _costs(content: Any, source: str) -> Costs | None:
    if content is None:
        return None
    found = _exactly(Costs, content, source)
    if not all(_is_number(each) and each > 0 for each in (found.false_positive, found.false_negative)):
        raise BundleError(f"{source} must be numbers above 0, got {str(content)[:80]!r}")
    return found


def _footprint(content: Any, source: str) -> Footprint | None:
    if content is None:
        return None
    found = _exactly(Footprint, content, source)
    numbers = all(_is_number(each) and each > 0 for each in (found.latency_ms, found.size_mb))
    if not numbers or not _is_count(found.steps) or not _is_text(found.machine):
        rule = "latency_ms and size_mb above 0, a number of steps and a machine"
        raise BundleError(f"{source} must be {rule}, got {str(content)[:80]!r}")
    return found


def _groups(content: Any, source: str) -> Groups | None:
    """Groups without names, as `to_json` writes them. Raises BundleError."""
    if content is None:
        return None
    found: dict[str, Any] = content if isinstance(content, dict) and content.keys() == {"total", "counts"} else {}
    total, counts = found.get("total", 0), found.get("counts", [])
    pairs = isinstance(counts, list) and 0 < len(counts) <= GROUPS_KEPT and all(map(_is_hits, counts))
    if not pairs or not _is_count(total) or total < len(counts):
        rule = f"their total and, of at most {GROUPS_KEPT}, pairs of sequences and right ones"
        raise BundleError(f"{source}: groups must be {rule}, got {str(content)[:80]!r}")
    return Groups(total, tuple((sequences, right) for sequences, right in counts))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and _is_moderate(value)


def _is_interval(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_number, value))


def _is_hits(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_count, value)) and value[1] <= value[0] > 0


def _is_bin(value: object) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(_is_number(each) and 0 <= each <= 1 for each in value)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST


def _exactly(kind: type[T], content: Any, source: str) -> T:
    """`kind` from a JSON object that has its fields and no others."""
    found = content if isinstance(content, dict) else {}
    names = [item.name for item in fields(kind)]  # type: ignore[arg-type]
    faults = [f"missing {name}" for name in names if name not in found]
    faults += [f"unexpected {name}" for name in found if name not in names]
    if faults:
        raise BundleError(f"{source}: {', '.join(faults)}")
    return kind(**found)
