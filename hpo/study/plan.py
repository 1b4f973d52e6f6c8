"""What a worker must know of a study: made from the study file and its data, kept as JSON in the database."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from hpo.errors import StudyFault
from hpo.models.config import EARLIER_EPSILON, ClassifierConfig
from hpo.models.data.canonical import fingerprint
from hpo.models.data.gaps import has_gaps, usual_interval, without_gaps
from hpo.models.data.order import in_order
from hpo.models.data.readers import read
from hpo.models.data.sequences import DataError, Sequences
from hpo.models.data.splits import (
    RULES,
    Split,
    check_trainable,
    counting,
    holdout,
    lacking,
    split_folds,
    split_share,
    units,
)
from hpo.models.data.time_order import Cut, check_gap, distinct, latest, length, rolling, shown
from hpo.models.fields import Value
from hpo.models.metrics import BY_RANK
from hpo.models.seeds import derive
from hpo.storage.keys import data_key
from hpo.study.config import FOLDS, VALIDATION_SHARE, Folds, StudyConfig, complete, from_dict, to_dict
from hpo.study.entries import contains, largest, show
from hpo.study.space import EARLIER

log = logging.getLogger("hpo")


class StudyError(StudyFault):
    """The study does not exist, or the study file contradicts it."""


class MissingStudy(StudyError):
    """There is no study of that name, or none that `hpo launch` made."""


class MissingTrial(StudyError):
    """The study has no trial of that number."""


class StudyConflict(StudyError):
    """A study of that name is there already, and is another one."""


@dataclass(frozen=True)
class Final:
    """One training of a study's finals (see hpo/study/finals.py). JSON-able."""

    trial: int  # number of the study's trial whose configuration it trains
    repeat: int  # from 1; the same one has the same seed and the same splits for all finalists
    params: Mapping[str, Value]  # of that trial


@dataclass(frozen=True)
class Plan:
    """All that a worker must know of a study. Written when the study is created, and where its space is widened."""

    config: StudyConfig  # with metric, validation and every entry of the search space filled in from the data
    written: StudyConfig  # as in the file: what a later file is compared with
    train: str  # artifact key of the training part
    test: str | None  # artifact key of the test part
    classes: tuple[str, ...]  # (K,)
    features: tuple[str, ...]  # (F,)
    steps: int  # T of the training part
    sequences: int  # N of the training part
    named: bool | None = None  # the features' names are the training file's own; None: an earlier version's plan
    rules: int = 1  # see RULES; plans of earlier versions do not say
    fill: tuple[float, ...] | None = None  # (F,) what a sequence is given that lacks the feature; None: 0
    gaps: tuple[float, ...] | None = None  # (F,) share of missing values in the training part; None: not recorded
    # the training part's usual distance of two steps, in seconds if they are dated; 0: all are alike, or not known
    interval: float = 0.0
    # sequences of each validation part, where these are in the order of time; None: they follow from share or folds
    validation_sizes: tuple[int, ...] | None = None
    fixed: Mapping[str, Value] = field(default_factory=dict)  # values of entries that had one each and now have more
    # how often the space was widened, the limits changed, or the finals got further trainings
    revision: int = 0
    finals: tuple[Final, ...] = ()  # of the finals of a study: what trial 0, 1, … trains; empty: it is a study itself

    @property
    def epsilon(self) -> float:
        """What is added to a deviation before it divides."""
        return EARLIER_EPSILON if self.rules < 2 else 0.0

    @property
    def metric(self) -> str:
        assert self.config.study.metric is not None
        return self.config.study.metric

    @property
    def members(self) -> int:
        """Models that a trial trains: one a fold."""
        validation = self.config.data.validation
        return validation.folds if isinstance(validation, Folds) else 1

    @property
    def networks(self) -> int:
        """Networks of a trial that predict together once it is promoted: of rolling folds the last alone."""
        return 1 if self.config.data.time is not None else self.members

    def classifier(self, params: Mapping[str, Any]) -> ClassifierConfig:
        """The network of a trial's parameters."""
        return ClassifierConfig(
            features=len(self.features),
            interval=self.interval if params.get("missing") == "mask" else 0.0,
            classes=len(self.classes),
            steps=self.steps,
            epsilon=self.epsilon,
            **fields_of(ClassifierConfig, params),
        )

    @property
    def validated(self) -> int:
        """Sequences that a model is validated on, about."""
        if self.validation_sizes is not None:
            return max(self.validation_sizes)
        validation = self.config.data.validation
        share = validation if isinstance(validation, float) else 1 / self.members
        return math.ceil(share * self.sequences)

    @property
    def resolution(self) -> float:
        """Half of the share of one validation sequence, of mean weight: metrics closer than this are equal. Log-loss is
        never rounded."""
        if self.metric == "log_loss":
            return 0.0
        if self.validation_sizes is not None:
            return 0.5 / sum(self.validation_sizes)
        validation = self.config.data.validation
        share = validation if isinstance(validation, float) else 1.0
        return 0.5 / (share * self.sequences)

    def trial_seed(self, number: int) -> int:
        """The seed of the trial of that number."""
        if self.finals:
            return derive(self.config.study.seed, "finals", self.finals[number].repeat)
        return derive(self.config.study.seed, "trial", number)

    def split(self, number: int) -> int:
        """Which split of the data the trial of that number trains on: 0 is the study's own, others are fresh ones."""
        return self.finals[number].repeat if self.finals else 0

    def note(self) -> str:
        """What is tuned, and on what: Markdown for the dashboard."""
        text = json.dumps(to_dict(self.config), indent=1)
        finals = "Finals: the best configurations again, on fresh seeds and fresh splits. " if self.finals else ""
        return (
            f"{finals}**{self.metric}** over {self.sequences} sequences of at most {self.steps} steps, "
            f"{len(self.features)} features, {len(self.classes)} classes\n\n```json\n{text}\n```"
        )

    def to_json(self) -> dict[str, Any]:
        stored = vars(self) | {"config": to_dict(self.config), "written": to_dict(self.written)}
        return stored | {"finals": [vars(final) for final in self.finals]}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Plan:
        """Raises ConfigError, TypeError and KeyError for what another version wrote."""
        lists: dict[str, Any] = {name: tuple(content[name]) for name in ("classes", "features")}
        optional = ("fill", "gaps", "validation_sizes")
        lists |= {name: tuple(content[name]) for name in optional if content.get(name) is not None}
        lists["finals"] = tuple(Final(**final) for final in content.get("finals", ()))
        configs = {name: from_dict(content[name]) for name in ("config", "written")}
        configs["config"] = replace(configs["config"], space={**EARLIER, **configs["config"].space})
        return cls(**{**content, **lists, **configs})


def fields_of(kind: type, params: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the parameters that are fields of the configuration class."""
    names = {item.name for item in fields(kind)}
    return {name: value for name, value in params.items() if name in names}


def make_plan(config: StudyConfig, rules: int = RULES) -> tuple[Plan, Sequences, Sequences | None]:
    """The plan of a study file, with the training part and the test part of its data; by the `rules` that a study began
    with (see RULES).

    Raises DataError for data that cannot be read, trained on or split, and ConfigError where the file contradicts them.
    """
    train, test, interval = _timed(*_parts(config, rules))
    fill = train.means().tolist() if rules > 2 else None
    if fill is not None:
        train, test = train.filled_with(fill), test and test.filled_with(fill)
    completed = complete_from(config, train, gaps=has_gaps(train))
    splits = _checked_splits(config, completed, train, rules)
    _check_weights(config, train, splits, test)
    _check_scorable(config, completed, train, splits)
    _check_flatten(completed, train, test)
    _say_what_is_lacking(train, splits, test)
    if config.data.time is not None:
        _say_what_is_left_out(completed, train)
    plan = Plan(
        config=completed,
        written=config,
        train=data_key(fingerprint(train, group_names=names_groups(rules))),
        test=None if test is None else data_key(fingerprint(test, group_names=names_groups(rules))),
        classes=train.classes,
        features=train.features,
        steps=train.steps,
        sequences=train.n,
        named=train.named,
        rules=rules,
        fill=None if fill is None else tuple(fill),
        gaps=train.gaps,
        interval=interval,
        validation_sizes=None if config.data.time is None else tuple(len(rows) for _, rows in splits),
    )
    return plan, train, test


def keeps_gaps(rules: int) -> bool:
    """Whether the stored data of a study say which values were observed, and when (see RULES)."""
    return rules > 4


def names_groups(rules: int) -> bool:
    """Whether the stored data of a study say what their groups are called (see RULES)."""
    return rules > 3


def _timed(train: Sequences, test: Sequences | None) -> tuple[Sequences, Sequences | None, float]:
    """Both parts, and the training part's usual distance of two steps; without times and with 0 where all its distances
    are alike, or one of the parts has no times."""
    interval = usual_interval(train)
    if interval is not None and test is not None and test.positions is None:
        log.warning("the test part does not say when its steps were: no model is told the times between them")
        interval = None
    if interval is None:
        train = replace(train, times=None, spacing=None)
        return train, test and replace(test, times=None, spacing=None), 0.0
    return train, test and replace(test, times=test.positions, spacing=None), interval


def _parts(config: StudyConfig, rules: int) -> tuple[Sequences, Sequences | None]:
    """The training part and the test part of the data that the file names."""
    data = config.data
    names: dict[str, Any] = data.columns
    train = _read(data.train, rules, **names)
    check_trainable(train)
    if data.positive is not None:
        try:
            train = train.with_positive(data.positive)
        except DataError as error:
            raise DataError(f"data.positive does not fit {data.train}: {error}") from None
    if rules > 2:
        train = in_order(train)
    if data.time is not None:
        _check_gap(config, train)
    if data.test is not None:
        known: dict[str, Any] = {"classes": train.classes, "features": train.features, "named": train.named}
        test = _read(data.test, rules, **known, **names)
        if data.time is not None:
            _compare_times(config, train, test)
        return train, in_order(test) if rules > 2 else test
    if data.holdout is not None:
        try:
            rest, test = _set_aside(config, train, data.holdout, rules)
            check_trainable(rest, "what is left to train on")
            return rest, test
        except DataError as error:
            why = _few(train, error)
            raise DataError(
                f"{data.train}: no test part can be set aside (data.holdout = {data.holdout}): {why}, or name "
                "a test file in data.test"
            ) from None
    return train, None


def _read(path: str, rules: int, **columns: Any) -> Sequences:
    """The labelled sequences of a file, with what the study keeps of their gaps."""
    found = read(Path(path), labeled=True, **columns)
    return found if keeps_gaps(rules) else without_gaps(found)


def _set_aside(config: StudyConfig, train: Sequences, share: float, rules: int) -> tuple[Sequences, Sequences]:
    """(training, test) parts: drawn, or the latest share of the sequences as the test part."""
    if config.data.time is None:
        return holdout(train, share, derive(config.study.seed, "holdout") % 2**32, rules)
    cut = latest(train, share, config.data.gap)
    _say_cut(cut, "the test part")
    return train.take(cut.train), train.take(cut.later)


def _say_cut(cut: Cut, later: str) -> None:
    """Warn of sequences that no part has as their groups go on in a later one."""
    if cut.in_groups:
        log.warning(
            "%d sequences are left out of training: they are earlier than %s, which has sequences of their groups",
            cut.in_groups,
            later,
        )


def _say_what_is_left_out(completed: StudyConfig, train: Sequences) -> None:
    """Warn of what the validation parts' groups and classes leave to train on."""
    cuts = validation_cuts(completed, train)
    for i, cut in enumerate(cuts, 1):
        part = f"validation block {i} of {len(cuts)}" if len(cuts) > 1 else "the validation part"
        _say_cut(cut, part)
        if len(cuts) > 1 and (names := set(lacking(train, cut.train)) - set(lacking(train, np.arange(train.n)))):
            known = ", ".join(map(repr, sorted(names)))
            log.warning("no sequence of class %s is among the %d that train for %s", known, len(cut.train), part)


def _check_gap(config: StudyConfig, train: Sequences) -> None:
    try:
        check_gap(train, config.data.gap)
    except DataError as error:
        raise DataError(f"{config.data.train}: {error}") from None


def _compare_times(config: StudyConfig, train: Sequences, test: Sequences) -> None:
    """Warn of a test file that is not later than the training file, by the gap if that is a duration.

    Raises DataError where one has numbers and the other times.
    """
    assert train.moments is not None
    assert test.moments is not None
    data, kinds = config.data, [part.moments.dtype.kind for part in (train, test) if part.moments is not None]
    if kinds.count("M") == 1:
        first, second = ("times" if kind == "M" else "numbers" for kind in kinds)
        raise DataError(f"data.time: {data.train} has {first}, {data.test} {second}: write both alike")
    begin, end = test.moments.min(), train.moments.max()
    said = f"the test part begins at {shown(begin)}, the training data end at {shown(end)}"
    if begin <= end:
        log.warning("%s: its score says little of how the model does on later data", said)
    elif isinstance(data.gap, float) and begin - end < length(data.gap):
        log.warning("%s: that is less than data.gap", said)


def _few(train: Sequences, error: DataError) -> str:
    """Why data cannot be split, with a part of the way out."""
    if units(train) > 1:
        return f"{error}; choose another"
    if train.groups is None:
        return f"{train.n} sequence is left to train on and to validate on; set less aside or add some"
    return f"all {train.n} sequences are of one group, which is never cut; leave its column out"


def _checked_splits(written: StudyConfig, completed: StudyConfig, train: Sequences, rules: int) -> list[Split]:
    """The splits for validation. Raises DataError, which names file and key, where they cannot be had."""
    try:
        return validation_parts(completed, train, rules)
    except DataError as error:
        rest = "" if written.data.holdout is None else f" beside a test part of data.holdout = {written.data.holdout}"
        out = "" if written.data.holdout is None else "; or name a test file in data.test, so that none is set aside"
        raise DataError(
            f"{_named_validation(written, completed)} cannot be had{rest}: {_few(train, error)}{out}"
        ) from None


def _named_validation(written: StudyConfig, completed: StudyConfig) -> str:
    """The file, and what validates in it."""
    value = completed.data.validation
    shown = f"{{ folds = {value.folds} }}" if isinstance(value, Folds) else f"{value}"
    by = "" if written.data.validation is not None else ", the default,"
    return f"{written.data.train}: data.validation = {shown}{by}"


def _check_weights(written: StudyConfig, train: Sequences, splits: list[Split], test: Sequences | None) -> None:
    """Raise DataError where no sequence of a part has a weight above 0."""
    data = written.data
    parts = [("a training part", train, rows) for rows, _ in splits]
    parts.append(("the validation part", train, np.concatenate([rows for _, rows in splits])))
    if test is not None:
        parts.append(("the test part", test, np.arange(test.n)))
    for what, sequences, rows in parts:
        if not len(counting(sequences, rows)):
            way_out = "set more aside, split by another study.seed, or give some of them a weight above 0"
            raise DataError(f"{data.train}: data.weight is 0 for all {len(rows)} sequences of {what}: {way_out}")


def _check_scorable(written: StudyConfig, completed: StudyConfig, train: Sequences, splits: list[Split]) -> None:
    """Raise DataError where the validation part, of all folds, has one class and what is chosen by it needs two."""
    assert train.labels is not None
    validated = train.labels[counting(train, np.concatenate([rows for _, rows in splits]))]
    if (validated != validated[0]).any():
        return
    metric = completed.study.metric
    needing = [f"study.metric = {show(metric)}"] * (metric in BY_RANK or (metric == "f1" and not validated[0]))
    needing += ['space.threshold = "chosen"'] * contains(completed.space["threshold"], "chosen")
    if needing:
        count = f"{len(validated)} sequences, all" if len(validated) > 1 else "1 sequence,"
        raise DataError(
            f"{_named_validation(written, completed)} validates on {count} of class "
            f"{train.classes[validated[0]]!r}, but {needing[0]} needs others too: set more aside, as in "
            f"data.validation = {{ folds = {min(FOLDS, _most_folds(completed, train))} }}"
        )


def _check_flatten(completed: StudyConfig, train: Sequences, test: Sequences | None) -> None:
    """Raise DataError where pooling may be `flatten` and a test sequence has not as many steps as it has weights."""
    pooling, crop = completed.space["pooling"], completed.space["sequence_length"]
    if test is None or not contains(pooling, "flatten"):
        return
    whole = contains(crop, 0)
    needed = train.steps if whole else largest(crop)
    for row in np.flatnonzero(test.lengths != needed if whole else test.lengths < needed)[:1].tolist():
        raise DataError(
            f"{completed.data.test or completed.data.train}: sequence {test.ids[row]!r} of the test part has "
            f"{test.lengths[row]} steps, but space.pooling = {show(pooling)} needs {needed}"
            + (', as in training: leave "flatten" out' if whole else ' or more: leave "flatten" out')
        )


def _say_what_is_lacking(train: Sequences, splits: list[Split], test: Sequences | None) -> None:
    """Warn of classes that one of the parts has no sequence of."""
    rows = {
        "training": (train, np.arange(train.n), "no model can learn it"),
        "validation": (train, np.concatenate([each for _, each in splits]), "it has no say in what is chosen"),
    }
    if test is not None and test.labels is not None:
        rows["test"] = test, np.arange(test.n), "metrics that need one have no value there"
    for what, (sequences, part, rest) in rows.items():
        if names := lacking(sequences, part):
            shown = ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if names[5:] else "")
            log.warning("no sequence of class %s is among the %d of the %s part: %s", shown, len(part), what, rest)


def complete_from(config: StudyConfig, train: Sequences, *, gaps: bool) -> StudyConfig:
    """The configuration with all that follows from the training part filled in. gaps: whether it has some."""
    if config.data.time is not None and config.data.validation is None and _most_folds(config, train) < 2:
        config = replace(config, data=replace(config.data, validation=VALIDATION_SHARE))
    return complete(
        config,
        n=train.n,
        steps=train.steps,
        features=train.n_features,
        classes=len(train.classes),
        variable=bool(train.lengths.min() < train.lengths.max()),
        gaps=gaps,
        units=_most_folds(config, train),
    )


def _most_folds(config: StudyConfig, train: Sequences) -> int:
    """Into how many folds the training part can be split at most."""
    return units(train) if config.data.time is None else distinct(train) - 1


def validation_parts(config: StudyConfig, sequences: Sequences, rules: int, split: int = 0) -> list[Split]:
    """The study's (training rows, validation rows): a function of its seed, or of the order of time, and the same for
    every trial. In the order of time they are not all of the rows. split: 0 for these, another number for fresh ones,
    drawn by the same rule; the order of time leaves one choice only.

    Raises DataError where the data cannot be split so.
    """
    if config.data.time is not None:
        return [(cut.train, cut.later) for cut in validation_cuts(config, sequences)]
    fresh = (split,) if split else ()
    seed = derive(config.study.seed, "validation", *fresh) % 2**32
    validation = config.data.validation
    if isinstance(validation, Folds):
        return split_folds(sequences, validation.folds, seed, rules)
    assert validation is not None
    return split_share(sequences, validation, seed, rules)


def validation_cuts(config: StudyConfig, sequences: Sequences) -> list[Cut]:
    """The parts of a study in the order of time: rolling folds, or the latest share. Raises DataError."""
    validation, gap = config.data.validation, config.data.gap
    if isinstance(validation, Folds):
        return rolling(sequences, validation.folds, gap)
    assert validation is not None
    return [latest(sequences, validation, gap)]
