"""What a worker must know of a study: made from the study file and its data, kept as JSON in the database."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from hpo.errors import StudyFault
from hpo.models.config import EARLIER_EPSILON
from hpo.models.data.canonical import fingerprint
from hpo.models.data.order import in_order
from hpo.models.data.readers import read
from hpo.models.data.sequences import DataError, Sequences
from hpo.models.data.splits import RULES, Split, check_trainable, holdout, lacking, split_folds, split_share, units
from hpo.models.fields import Value
from hpo.models.metrics import BY_RANK
from hpo.models.seeds import derive
from hpo.storage.keys import data_key
from hpo.study.config import FOLDS, Folds, StudyConfig, complete, from_dict, to_dict
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
    fixed: Mapping[str, Value] = field(default_factory=dict)  # values of entries that had one each and now have more
    revision: int = 0  # how often the space was widened

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
    def validated(self) -> int:
        """Sequences that a model is validated on, about."""
        validation = self.config.data.validation
        share = validation if isinstance(validation, float) else 1 / self.members
        return math.ceil(share * self.sequences)

    @property
    def resolution(self) -> float:
        """Half of one validation sequence's share: metrics closer than this are equal. Log-loss is never rounded."""
        if self.metric == "log_loss":
            return 0.0
        validation = self.config.data.validation
        share = validation if isinstance(validation, float) else 1.0
        return 0.5 / (share * self.sequences)

    def trial_seed(self, number: int) -> int:
        """The seed of the trial of that number."""
        return derive(self.config.study.seed, "trial", number)

    def note(self) -> str:
        """What is tuned, and on what: Markdown for the dashboard."""
        text = json.dumps(to_dict(self.config), indent=1)
        return (
            f"**{self.metric}** over {self.sequences} sequences of at most {self.steps} steps, "
            f"{len(self.features)} features, {len(self.classes)} classes\n\n```json\n{text}\n```"
        )

    def to_json(self) -> dict[str, Any]:
        return vars(self) | {"config": to_dict(self.config), "written": to_dict(self.written)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Plan:
        """Raises ConfigError, TypeError and KeyError for what another version wrote."""
        lists: dict[str, Any] = {name: tuple(content[name]) for name in ("classes", "features")}
        lists |= {name: tuple(content[name]) for name in ("fill", "gaps") if content.get(name) is not None}
        configs = {name: from_dict(content[name]) for name in ("config", "written")}
        configs["config"] = replace(configs["config"], space={**EARLIER, **configs["config"].space})
        return cls(**{**content, **lists, **configs})


def make_plan(config: StudyConfig, rules: int = RULES) -> tuple[Plan, Sequences, Sequences | None]:
    """The plan of a study file, with the training part and the test part of its data; by the `rules` that a study began
    with (see RULES).

    Raises DataError for data that cannot be read, trained on or split, and ConfigError where the file contradicts them.
    """
    train, test = _parts(config, rules)
    fill = train.means().tolist() if rules > 2 else None
    if fill is not None:
        train, test = train.filled_with(fill), test and test.filled_with(fill)
    completed = complete_from(config, train)
    splits = _checked_splits(config, completed, train, rules)
    _check_scorable(config, completed, train, splits)
    _check_flatten(completed, train, test)
    _say_what_is_lacking(train, splits, test)
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
    )
    return plan, train, test


def names_groups(rules: int) -> bool:
    """Whether the stored data of a study say what their groups are called (see RULES)."""
    return rules > 3


def _parts(config: StudyConfig, rules: int) -> tuple[Sequences, Sequences | None]:
    """The training part and the test part of the data that the file names."""
    data = config.data
    names: dict[str, Any] = {"label": data.label, "id": data.id, "step": data.step, "group": data.group}
    train = read(Path(data.train), labeled=True, **names)
    check_trainable(train)
    if data.positive is not None:
        try:
            train = train.with_positive(data.positive)
        except DataError as error:
            raise DataError(f"data.positive does not fit {data.train}: {error}") from None
    if rules > 2:
        train = in_order(train)
    if data.test is not None:
        known: dict[str, Any] = {"classes": train.classes, "features": train.features, "named": train.named}
        test = read(Path(data.test), labeled=True, **known, **names)
        return train, in_order(test) if rules > 2 else test
    if data.holdout is not None:
        try:
            rest, test = holdout(train, data.holdout, derive(config.study.seed, "holdout") % 2**32, rules)
            check_trainable(rest, "what is left to train on")
            return rest, test
        except DataError as error:
            why = _few(train, error)
            raise DataError(
                f"{data.train}: no test part can be set aside (data.holdout = {data.holdout}): {why}, or name "
                "a test file in data.test"
            ) from None
    return train, None


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


def _check_scorable(written: StudyConfig, completed: StudyConfig, train: Sequences, splits: list[Split]) -> None:
    """Raise DataError where the validation part, of all folds, has one class and what is chosen by it needs two."""
    assert train.labels is not None
    validated = train.labels[np.concatenate([rows for _, rows in splits])]
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
            f"data.validation = {{ folds = {min(FOLDS, units(train))} }}"
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


def complete_from(config: StudyConfig, train: Sequences) -> StudyConfig:
    """The configuration with all that follows from the training part filled in."""
    return complete(
        config,
        n=train.n,
        steps=train.steps,
        features=train.n_features,
        classes=len(train.classes),
        variable=bool(train.lengths.min() < train.lengths.max()),
        units=units(train),
    )


def validation_parts(config: StudyConfig, sequences: Sequences, rules: int) -> list[Split]:
    """The study's (training rows, validation rows): a function of its seed, the same for every trial.

    Raises DataError where the data cannot be split so.
    """
    seed = derive(config.study.seed, "validation") % 2**32
    validation = config.data.validation
    if isinstance(validation, Folds):
        return split_folds(sequences, validation.folds, seed, rules)
    assert validation is not None
    return split_share(sequences, validation, seed, rules)
