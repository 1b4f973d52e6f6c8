"""The study file: TOML -> frozen dataclasses, with strict keys, and back.

`load` reads a file and `--set` overrides, `from_dict` and `to_dict` are the JSON form that the database
keeps, `complete` fills in what follows from the training data, `differences` compares a stored study with a
file.
"""

from __future__ import annotations

import re
import tomllib
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from hpo.errors import StudyFault
from hpo.models.config import METRICS, PRECISIONS, TrainingConfig
from hpo.models.costs import Costs
from hpo.models.data.columns import ROLES, clash
from hpo.models.fields import Value, default, rules
from hpo.study import space as spaces
from hpo.study.checks import (
    SQLITE,
    Check,
    CheckError,
    SecretError,
    costs,
    duration,
    folder,
    gap,
    lease,
    one_of,
    positive,
    share,
    some_of,
    study_name,
    text,
    tracking_uri,
    web_address,
    whole,
)
from hpo.study.entries import Entry, SpaceError, show, unknown, unparse

SAMPLERS = ("tpe", "gp", "cmaes", "random", "qmc", "grid")
PRUNERS = ("hyperband", "halving", "median", "none")
ENSEMBLES = ("repeats", "greedy", "none")
EVENTS = ("end", "failure", "promotion")  # that an address may be told of
DEEPEST = 50  # lists and tables within one another
FOLDS = 5  # default where a share would validate on few sequences
FINALISTS = 3  # by default at most
FINALS_SHARE = 4  # by default finals are at most every fourth training as there are trials
VALIDATION_SHARE = 0.2  # default else, share of the training part
VALIDATION_LEAST = 500  # sequences that a validation share must hold to be the default


class ConfigError(StudyFault):
    """The study file breaks a rule; the message states it, the value, the way out and the file."""


# --- the sections: at each field its default, its check, and its key in the file where that is not its name ---


def checked(check: Check, key: str | None = None) -> dict[str, Any]:
    """The metadata of a section's field; key: in the file, where it is not the field's name."""
    return {"check": check, "key": key}


@dataclass(frozen=True)
class StudySection:
    """[study]: what is optimised, how, and for how long."""

    name: str = field(metadata=checked(study_name))  # unique in the database
    # None: auroc for two classes, macro_f1 for more
    metric: str | None = field(default=None, metadata=checked(one_of(METRICS)))
    trials: int = field(default=60, metadata=checked(whole(1)))  # over all workers
    # seconds that the study may take; None: no end
    timeout_s: float | None = field(default=None, metadata=checked(duration, key="timeout"))
    # trials in a row that bring nothing new before the study ends; None (in the file 0): however many
    patience: int | None = field(default=None, metadata=checked(whole(0)))
    sampler: str = field(default="tpe", metadata=checked(one_of(SAMPLERS)))
    pruner: str = field(default="hyperband", metadata=checked(one_of(PRUNERS)))
    seed: int = field(default=0, metadata=checked(whole(0, 2**32 - 1)))
    # seconds after which the trial of a worker that does not renew its lease is adopted
    lease_s: float = field(default=60.0, metadata=checked(lease, key="lease"))
    attempts: int = field(default=3, metadata=checked(whole(1)))  # workers that may try one trial before it fails
    # standing workers take an owner's study with a higher one first
    priority: int = field(default=0, metadata=checked(whole(-100, 100)))
    # trials that may run at once, of all workers; None: no limit
    max_workers: int | None = field(default=None, metadata=checked(whole(1)))
    # trial n starts when all up to n - parallel have ended, and goes by these, so that the study is the same from any
    # number of workers; None: a trial starts when a worker is free, and goes by what has ended
    parallel: int | None = field(default=None, metadata=checked(whole(1)))
    # name of a study whose trials the sampler sees
    warm_start: str | None = field(default=None, metadata=checked(text))
    # configurations that are trained again on fresh seeds and splits before one is promoted; 0: none, the best trial is
    # promoted; None: by the number of trials (`default_finalists`)
    finalists: int | None = field(default=None, metadata=checked(whole(0, 100)))
    repeats: int = field(default=3, metadata=checked(whole(1, 100)))  # of each finalist


@dataclass(frozen=True)
class Folds:
    """Cross-validation in k folds."""

    folds: int  # at least 2


def _validation(value: Any) -> float | Folds:
    if isinstance(value, dict) and value.keys() == {"folds"} and type(value["folds"]) is int:
        return Folds(whole(2)(value["folds"]))
    try:
        return share(value)
    except CheckError as error:
        raise CheckError(f"{error}, or {{ folds = 5 }}") from None


@dataclass(frozen=True)
class DataSection:
    """[data]: the files, their columns and what is set aside."""

    train: str = field(metadata=checked(text))  # path of the training file
    test: str | None = field(default=None, metadata=checked(text))  # path of the test file
    # share of train set aside as the test part; 0.2 without a test file
    holdout: float | None = field(default=None, metadata=checked(share))
    # share of train, or folds; None: by the size of the data
    validation: float | Folds | None = field(default=None, metadata=checked(_validation))
    label: str = field(default="label", metadata=checked(text))  # column of the class
    id: str = field(default="id", metadata=checked(text))  # column that tells sequences apart
    step: str = field(default="step", metadata=checked(text))  # column that orders a sequence's rows
    group: str = field(default="group", metadata=checked(text))  # column of what a split must not separate
    # column that orders the sequences: the latest test, those before them validate; None: parts are drawn
    time: str | None = field(default=None, metadata=checked(text))
    # column that says how much each sequence counts, in training and in scores; None: all alike
    weight: str | None = field(default=None, metadata=checked(text))
    # left out between training and validation, and between these and the test: sequences (int) or seconds (float)
    gap: int | float | None = field(default=None, metadata=checked(gap))
    # of two classes the one that f1, average_precision and the threshold are of; None: the last by name
    positive: str | None = field(default=None, metadata=checked(text))

    def __post_init__(self) -> None:
        if self.test is None and self.holdout is None:
            object.__setattr__(self, "holdout", 0.2)

    @property
    def columns(self) -> dict[str, str]:
        """The column of each role that has one, by the arguments of `hpo.models.data.readers.read`."""
        given = {role: getattr(self, role) for role in ROLES}
        return {role: name for role, name in given.items() if name is not None}


@dataclass(frozen=True)
class TrainSection:
    """[train]: one trial's training, as far as it is not tuned."""

    epochs: int = field(
        default=default(TrainingConfig, "epochs"), metadata=checked(whole(int(rules(TrainingConfig)["epochs"].low)))
    )
    # epochs without a better metric before a trial ends; None (in the file 0): never
    patience: int | None = field(default=default(TrainingConfig, "patience"), metadata=checked(whole(0)))
    precision: str = field(default=default(TrainingConfig, "precision"), metadata=checked(one_of(PRECISIONS)))
    keep_best: int = field(default=5, metadata=checked(whole(1)))  # trials whose weights are kept


@dataclass(frozen=True)
class PromoteSection:
    """[promote]: what the model is made of."""

    # of the winner of finals: all of its repeats together, with those of other finalists that make these better, or the
    # first alone, which is smaller and faster
    ensemble: str = field(default="repeats", metadata=checked(one_of(ENSEMBLES)))
    # of wrong decisions between two classes: the threshold is where they are least; None: the trial's own threshold
    costs: Costs | None = field(default=None, metadata=checked(costs))


@dataclass(frozen=True)
class LimitsSection:
    """[limits]: what a prediction of the model may take. Trials beyond one of them are not promoted."""

    # milliseconds of one sequence, on one thread of the worker's CPU; None: however long
    latency_ms: float | None = field(default=None, metadata=checked(positive))
    size_mb: float | None = field(default=None, metadata=checked(positive))  # 10^6 bytes of weights; None: any


@dataclass(frozen=True)
class NotifySection:
    """[notify]: who is told of the study. Kept beside the study's terms, not in its plan: it may change, and what is
    made of a plan is given to others."""

    url: str | None = field(default=None, metadata=checked(web_address))  # where notices are sent; None: nowhere
    # end: over or stopped. failure: ended without a model, or its promotion failed. promotion: a new version
    on: tuple[str, ...] = field(default=EVENTS, metadata=checked(some_of(EVENTS)))


@dataclass(frozen=True)
class TrackSection:
    """[track]: where each trial that has ended is a run, too. Kept beside the study's plan, like [notify]."""

    mlflow: str | None = field(default=None, metadata=checked(tracking_uri))  # of a server or a file; None: nowhere
    tensorboard: str | None = field(default=None, metadata=checked(folder))  # path of the folder; None: nowhere


@dataclass(frozen=True)
class StudyConfig:
    """A whole study file."""

    study: StudySection
    data: DataSection
    train: TrainSection = TrainSection()
    space: Mapping[str, Entry] = field(default_factory=dict)  # as written; `complete` fills in the defaults
    enqueue: tuple[Mapping[str, Value], ...] = ()  # configurations to try first, parts of one or whole
    notify: NotifySection = NotifySection()
    promote: PromoteSection = PromoteSection()
    limits: LimitsSection = LimitsSection()
    track: TrackSection = TrackSection()


@dataclass(frozen=True)
class _Key:
    """One key of a section in the file."""

    field: str
    check: Check


def _keys(section: type) -> dict[str, _Key]:
    return {item.metadata["key"] or item.name: _Key(item.name, item.metadata["check"]) for item in fields(section)}


SECTIONS = {
    "study": StudySection,
    "data": DataSection,
    "train": TrainSection,
    "promote": PromoteSection,
    "limits": LimitsSection,
    "notify": NotifySection,
    "track": TrackSection,
}
KEYS = {name: _keys(section) for name, section in SECTIONS.items()}  # section -> key
STORED = ("study", "data", "train", "promote", "limits")  # the sections of a plan
TABLES = (*KEYS, "space", "enqueue")
_MAY_CHANGE = ("name", "trials", "timeout", "patience", "priority", "max_workers", "finalists", "repeats")
# What may change in an existing study; data files are compared by their content.
CHANGEABLE = {f"study.{key}" for key in _MAY_CHANGE} | {
    "data.train",
    "data.test",
    "promote.ensemble",
    "promote.costs",
    "limits.latency_ms",
    "limits.size_mb",
}


# --- reading ---


@dataclass(frozen=True)
class _Source:
    """Where values come from, for errors."""

    name: str  # the file
    overridden: frozenset[str] = frozenset()  # keys set on the command line

    def error(self, key: str, text: str) -> ConfigError:
        set_here = any(f"{name}.".startswith(f"{key}.") for name in self.overridden)
        return ConfigError(f"{text} ({'--set' if set_here else self.name})")


def load(path: str | Path, overrides: Sequence[str] = ()) -> StudyConfig:
    """A study file with overrides such as "space.hidden_size=64" or "study.timeout=30m".

    An override's value is TOML, or a bare string where it is not. Paths are relative to the study file. A
    data file (npz, csv, parquet, ts) in place of the study file is a study of its own. Raises ConfigError.
    """
    from hpo.models.data.readers import READERS, suffix_of  # with it comes numpy, which `hpo --help` does without

    path = Path(path)
    if suffix_of(path) in READERS:
        return config_for_data(path, overrides)
    return _load(_read(path), path, overrides)


def config_for_data(path: str | Path, overrides: Sequence[str] = ()) -> StudyConfig:
    """The study of a bare data file, as if from a study file beside it with only [data] train."""
    path = Path(path)
    return _load({"data": {"train": path.name}}, path, overrides)


def tables_of(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The tables of a study file, or of the study of a bare data file, with overrides; not yet checked.

    Raises ConfigError.
    """
    from hpo.models.data.readers import READERS, suffix_of

    tables = {"data": {"train": path.name}} if suffix_of(path) in READERS else _read(path)
    for override in overrides:
        _override(tables, override)
    return tables


def config_of(tables: dict[str, Any], path: Path) -> StudyConfig:
    """The study of a study file's tables, as if they stood in the file at `path`. Raises ConfigError."""
    return _load(tables, path, ())


def _load(tables: dict[str, Any], path: Path, overrides: Sequence[str]) -> StudyConfig:
    keys = frozenset(_override(tables, override) for override in overrides)
    _check_depth(tables, path)
    source = _Source(path.name, keys)
    config = _parse(tables, source)
    train = _resolved("train", config.data.train, path.parent, source)
    test = config.data.test and _resolved("test", config.data.test, path.parent, source)
    track = _beside(config.track, path.parent, source)
    return replace(config, data=replace(config.data, train=train, test=test), track=track)


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"no study file at {path}") from None
    except OSError as error:
        raise ConfigError(f"cannot read the study file {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ConfigError(f"{path} is not valid TOML: not UTF-8 (at line {line})") from None
    except ValueError as error:  # TOMLDecodeError, and plain ones such as for a number of 5,000 digits
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
    except RecursionError:
        raise _too_deep(path) from None


def _too_deep(path: Path) -> ConfigError:
    return ConfigError(f"{path} must not nest lists and tables more than {DEEPEST} levels deep; a study needs four")


def _check_depth(tables: dict[str, Any], path: Path) -> None:
    """Raise ConfigError for lists and tables that are nested deeper than what looks at them can follow."""
    level: list[Any] = [tables]
    for _ in range(DEEPEST):
        inner = [item for each in level for item in (each.values() if isinstance(each, dict) else each)]
        level = [item for item in inner if isinstance(item, dict | list)]
    if level:
        raise _too_deep(path)


def _override(tables: dict[str, Any], override: str) -> str:
    """Sets one a.b=c in the tables; returns its key."""
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not re.fullmatch(r"[\w-]+(\.[\w-]+)+|enqueue", key):
        raise ConfigError(f'--set must look like train.epochs=20, got "{override}"')
    *parents, last = key.split(".")
    for parent in parents:
        tables = tables.setdefault(parent, {})
        if not isinstance(tables, dict):
            raise ConfigError(f"--set {key} must name a key of a table, but {parent} is none")
    tables[last] = _override_value(text.strip())
    return key


def _override_value(text: str) -> Any:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    plain = parsed.keys() == {"value"} and isinstance(parsed["value"], str | int | float | list | dict)
    return parsed["value"] if plain else text


def _resolved(key: str, file: str, folder: Path, source: _Source) -> str:
    try:
        path = (folder / Path(file).expanduser()).resolve()
        found = path.is_file()
    except (OSError, RuntimeError) as error:  # a name that is too long, a loop of links, a user without a home
        reason = error.strerror if isinstance(error, OSError) else str(error).rstrip(".")
        raise source.error(f"data.{key}", f"data.{key} must name a file: {reason}, got {show(file[:200])}") from None
    if not found:
        raise source.error(f"data.{key}", f"data.{key} must name a file, but there is none at {path}")
    return str(path)


def _beside(track: TrackSection, folder: Path, source: _Source) -> TrackSection:
    """With the paths, which are relative to the study file, as absolute ones."""
    found: dict[str, str] = {}
    for key, value in vars(track).items():
        if value is None or value.startswith("http"):
            continue
        scheme = SQLITE if value.startswith(SQLITE) else ""
        try:
            found[key] = scheme + str((folder / Path(value.removeprefix(scheme)).expanduser()).resolve())
        except (OSError, RuntimeError, ValueError) as error:
            raise source.error(
                f"track.{key}", f"track.{key} must name a path: {error}, got {show(value[:200])}"
            ) from None
    return replace(track, **found)


def from_dict(tables: Mapping[str, Any], where: str = "stored study") -> StudyConfig:
    """The inverse of `to_dict`; as strict as `load`, but the data files need not be there."""
    return _parse(tables, _Source(where))


def _parse(tables: Mapping[str, Any], source: _Source) -> StudyConfig:
    for key in tables:
        if key not in TABLES:
            raise source.error(key, unknown("", key, TABLES))
    data = _data(_table(tables, "data", source), source)
    study = {"name": default_name(data.train), **_table(tables, "study", source)}
    section = _section(StudySection, "study", study, source)
    train = _section(TrainSection, "train", _table(tables, "train", source), source)
    space = _space(_table(tables, "space", source), source)
    limits = _section(LimitsSection, "limits", _table(tables, "limits", source), source)
    if section.parallel is not None and limits.latency_ms is not None:
        raise source.error(
            "study.parallel",
            "study.parallel must be left out beside limits.latency_ms, as a latency is measured and never twice the "
            f"same, got {section.parallel}; limit limits.size_mb instead, or leave one of the two out",
        )
    return StudyConfig(
        study=replace(section, patience=section.patience or None),
        data=data,
        train=replace(train, patience=train.patience or None),
        space=space,
        enqueue=_enqueue(tables.get("enqueue", []), space, source),
        notify=_notify(_table(tables, "notify", source), source),
        promote=_section(PromoteSection, "promote", _table(tables, "promote", source), source),
        limits=limits,
        track=_section(TrackSection, "track", _table(tables, "track", source), source),
    )


def _table(tables: Mapping[str, Any], name: str, source: _Source) -> dict[str, Any]:
    table = tables.get(name, {})
    if not isinstance(table, dict):
        raise source.error(name, f"{name} must be a table [{name}], got {show(table)}")
    return table


Stored: TypeAlias = StudySection | DataSection | TrainSection | PromoteSection | LimitsSection
S = TypeVar("S", StudySection, DataSection, TrainSection, PromoteSection, LimitsSection, NotifySection, TrackSection)


def _section(kind: type[S], name: str, table: Mapping[str, Any], source: _Source) -> S:
    given: dict[str, Any] = {}
    for key, value in table.items():
        full = f"{name}.{key}"
        if key not in KEYS[name]:
            raise source.error(full, _unknown(name, key))
        try:
            given[KEYS[name][key].field] = KEYS[name][key].check(value)
        except SecretError as error:
            raise source.error(full, f"{full} {error}") from None
        except CheckError as error:
            raise source.error(full, f"{full} {error}, got {show(value)}") from None
    return kind(**given)


def _unknown(section: str, key: str) -> str:
    """The error for an unknown key: it belongs to another section, or the nearest of this one is meant."""
    known: dict[str, Iterable[str]] = {**KEYS, "space": spaces.PARAMETERS}
    for other, keys in known.items():
        if key in set(keys):
            return f"unknown key {section}.{key}; did you mean {other}.{key}?"
    return unknown(section, key, known[section])


def _data(table: Mapping[str, Any], source: _Source) -> DataSection:
    if "train" not in table:
        raise source.error("data.train", 'data.train must name the training file, such as "train.npz"')
    data = _section(DataSection, "data", table, source)
    if data.test is not None and data.holdout is not None:
        raise source.error("data.holdout", "data.holdout must be left out where data.test names a file")
    columns = data.columns
    if rule := clash(columns):
        raise source.error("data.label", f"data.{rule}, got {show(list(columns.values()))}")
    if data.gap is not None and data.time is None:
        raise source.error("data.gap", f"data.gap needs data.time, what orders the sequences; got {data.gap} alone")
    return data


def _notify(table: Mapping[str, Any], source: _Source) -> NotifySection:
    if table and "url" not in table:
        raise source.error(
            "notify.url", "notify.url must name the address that is told, such as https://example.org/hpo"
        )
    return _section(NotifySection, "notify", table, source)


def _space(table: Mapping[str, Any], source: _Source) -> dict[str, Entry]:
    space: dict[str, Entry] = {}
    for name, value in table.items():
        key = f"space.{name}"
        if name not in spaces.PARAMETERS:
            raise source.error(key, _unknown("space", name))
        try:
            space[name] = spaces.parse(name, value)
        except SpaceError as error:
            raise source.error(key, str(error)) from None
    return space


def _enqueue(tables: Any, space: Mapping[str, Entry], source: _Source) -> tuple[dict[str, Value], ...]:
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise source.error("enqueue", f"enqueue must be tables [[enqueue]], got {show(tables)}")
    try:
        return tuple(spaces.check_params(space, table, f"enqueue[{i}]") for i, table in enumerate(tables))
    except SpaceError as error:
        raise source.error("enqueue", str(error)) from None


def default_name(train: str) -> str:
    """A study's name from its training file: "ItalyPowerDemand_TRAIN.ts" -> "italy-power-demand"."""
    file = Path(train.removesuffix(".gz")).stem
    stem = unicodedata.normalize("NFKD", file).encode("ascii", "ignore").decode()
    words = re.findall(r"[a-z0-9]+", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", stem).lower())
    return "-".join(words[:-1] if len(words) > 1 and words[-1] == "train" else words)[:100] or "study"


# --- what follows from the data ---


def default_finalists(study: StudySection) -> int:
    """How many finalists a study has whose file names no number: none where finals would be much of its trainings."""
    return min(FINALISTS, study.trials // (FINALS_SHARE * study.repeats))


def complete(
    config: StudyConfig,
    *,
    n: int,
    steps: int,
    features: int,
    classes: int,
    variable: bool,
    gaps: bool = False,
    units: int | None = None,
) -> StudyConfig:
    """The configuration with metric, validation and every entry of the space filled in from the data.

    `n` training sequences (without the test part) of at most `steps` and `features`, with or without `gaps`, in so many
    `units` that a split leaves whole (None: each sequence by itself); fewer than five units are as many folds. Raises
    ConfigError where the space, or a configuration to try first, contradicts the data or the completed space.
    """
    if config.promote.costs is not None and classes != 2:
        raise ConfigError(
            f"promote.costs are of wrong decisions between two classes, got {classes}; leave them out "
            f"(study {config.study.name})"
        )
    few = n * VALIDATION_SHARE < VALIDATION_LEAST
    validation = config.data.validation or (
        Folds(max(2, min(FOLDS, n if units is None else units))) if few else VALIDATION_SHARE
    )
    metric = config.study.metric or ("auroc" if classes <= 2 else "macro_f1")
    finalists = default_finalists(config.study) if config.study.finalists is None else config.study.finalists
    facts: dict[str, Any] = {"n": n, "steps": steps, "features": features, "classes": classes}
    try:
        space = spaces.complete(config.space, **facts, variable=variable, gaps=gaps)
        enqueue = tuple(spaces.check_params(space, params, f"enqueue[{i}]") for i, params in enumerate(config.enqueue))
    except SpaceError as error:
        raise ConfigError(f"{error} (study {config.study.name})") from None
    return replace(
        config,
        study=replace(config.study, metric=metric, finalists=finalists),
        data=replace(config.data, validation=validation),
        space=space,
        enqueue=enqueue,
    )


# --- writing and comparing ---


def to_dict(config: StudyConfig) -> dict[str, Any]:
    """The study file's tables with every default written out, for JSON; `from_dict` gives the same config, but for
    [notify] and [track]."""
    tables: dict[str, Any] = {name: _section_dict(name, getattr(config, name)) for name in STORED}
    tables["space"] = {name: unparse(entry) for name, entry in config.space.items()}
    tables["enqueue"] = [dict(params) for params in config.enqueue]
    return tables


def _section_dict(name: str, section: Stored) -> dict[str, Any]:
    values = {key: getattr(section, found.field) for key, found in KEYS[name].items()}
    if isinstance(section, TrainSection):
        values["patience"] = section.patience or 0
    if isinstance(section, DataSection) and isinstance(section.validation, Folds):
        values["validation"] = {"folds": section.validation.folds}
    if isinstance(section, PromoteSection) and section.costs is not None:
        values["costs"] = asdict(section.costs)
    return {key: value for key, value in values.items() if value is not None}


def differences(old: StudyConfig, new: StudyConfig) -> list[str]:
    """Where a new configuration contradicts a stored one, a line each; empty: the study can go on.

    Both must be as written, or both completed. What is CHANGEABLE may change, and so may [notify] and [track]. Data
    files are not compared: that is for their content.
    """
    stored, file = _flat(old), _flat(new)
    return [
        f"{key}: stored {_shown(stored, key)}, file {_shown(file, key)}"
        for key in {**stored, **file}
        if key not in CHANGEABLE and stored.get(key) != file.get(key)
    ]


def _flat(config: StudyConfig) -> dict[str, Any]:
    tables = to_dict(config)
    enqueue = tables.pop("enqueue")
    flat = {f"{name}.{key}": value for name, table in tables.items() for key, value in table.items()}
    return {**flat, "enqueue": enqueue}


def _shown(flat: Mapping[str, Any], key: str) -> str:
    return show(flat[key]) if key in flat else "not set"
