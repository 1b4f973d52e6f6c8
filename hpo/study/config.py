"""The study file: TOML -> frozen dataclasses, with strict keys, and back.

`load` reads a file and `--set` overrides, `from_dict` and `to_dict` are the JSON form that the database
keeps, `complete` fills in what follows from the training data, `differences` compares a stored study with a
file.
"""

from __future__ import annotations

import re
import tomllib
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from hpo.study import space as spaces
from hpo.study.space import Entry, SpaceError, Value, show, unknown

SAMPLERS = ("tpe", "gp", "cmaes", "random", "qmc", "grid")
PRUNERS = ("hyperband", "halving", "median", "none")
PRECISIONS = ("float32", "bfloat16")
DATA_SUFFIXES = (".npz", ".csv", ".parquet", ".ts")
FOLDS = 5  # default where a share would validate on few sequences
VALIDATION_SHARE = 0.2  # default else, share of the training part
VALIDATION_LEAST = 200  # sequences that a validation share must hold to be the default


class ConfigError(ValueError):
    """The study file breaks a rule; the message states it, the value, the way out and the file."""


@dataclass(frozen=True)
class StudySection:
    """[study]: what is sought, how, and for how long."""

    name: str  # unique in the database; letters, digits, ".", "_", "-"
    metric: str | None = None  # one of hpo.models.metrics.METRICS; None: auroc for two classes, macro_f1 for more
    trials: int = 60  # trials over all workers, at least 1
    timeout_s: float | None = None  # seconds that the study may take, above 0; None: no end; file key `timeout`
    sampler: str = "tpe"  # one of SAMPLERS
    pruner: str = "hyperband"  # one of PRUNERS
    seed: int = 0  # 0 to 2**32 - 1
    lease_s: float = 60.0  # seconds after which a silent worker's trial is adopted, at least 1; file key `lease`
    attempts: int = 3  # workers that may try one trial before it fails, at least 1
    warm_start: str | None = None  # name of a study whose trials are learnt from


@dataclass(frozen=True)
class Folds:
    """Cross-validation in k folds."""

    folds: int  # at least 2


@dataclass(frozen=True)
class DataSection:
    """[data]: the files, their columns and what is set aside."""

    train: str  # path of the training file
    test: str | None = None  # path of the test file
    holdout: float | None = None  # share of train set aside as the test part, in (0, 1); 0.2 without a test file
    validation: float | Folds | None = None  # share of train in (0, 1), or folds; None: by the size of the data
    label: str = "label"  # column of the class
    id: str = "id"  # column that tells sequences apart
    step: str = "step"  # column that orders a sequence's rows
    group: str = "group"  # column of what a split must not separate

    def __post_init__(self) -> None:
        if self.test is None and self.holdout is None:
            object.__setattr__(self, "holdout", 0.2)


@dataclass(frozen=True)
class TrainSection:
    """[train]: one trial's training, as far as it is not tuned."""

    epochs: int = 50  # at least 1
    patience: int | None = 10  # epochs without a better metric before a trial ends; None (in the file 0): never
    precision: str = "float32"  # one of PRECISIONS
    keep_best: int = 5  # trials whose weights are kept, at least 1


@dataclass(frozen=True)
class StudyConfig:
    """A whole study file."""

    study: StudySection
    data: DataSection
    train: TrainSection = TrainSection()
    space: Mapping[str, Entry] = field(default_factory=dict)  # as written; `complete` fills in the defaults
    enqueue: tuple[Mapping[str, Value], ...] = ()  # configurations to try first, parts of one or whole


# --- what a value must be: each check returns the value in its type or raises ValueError("must be …") ---

Check = Callable[[Any], Any]


def _whole(low: int, high: int = 2**31 - 1) -> Check:
    def check(value: Any) -> int:
        if type(value) is not int:
            raise ValueError("must be a whole number")
        if not low <= value <= high:
            raise ValueError(f"must be at least {low}" if value < low else f"must be at most {high}")
        return value

    return check


def _one_of(names: Sequence[str]) -> Check:
    def check(value: Any) -> str:
        if not isinstance(value, str) or value not in names:
            raise ValueError("must be one of " + ", ".join(map(show, names)))
        return value

    return check


def _metric(value: Any) -> str:
    from hpo.models.metrics import METRICS  # with it comes numpy, which `hpo --help` does without

    return str(_one_of(METRICS)(value))


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise ValueError("must be a string in quotes that is not empty")
    return value


def _name(value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", value):
        raise ValueError(
            "must be 1 to 100 letters, digits, dots, dashes or underscores in quotes, the first a letter or digit"
        )
    return value


def _share(value: Any) -> float:
    if type(value) is not float or not 0 < value < 1:
        raise ValueError("must be a share between 0 and 1, both excluded")
    return value


def _validation(value: Any) -> float | Folds:
    if isinstance(value, dict) and value.keys() == {"folds"} and type(value["folds"]) is int:
        return Folds(_whole(2)(value["folds"]))
    if type(value) is float and 0 < value < 1:
        return value
    raise ValueError("must be a share between 0 and 1, both excluded, or { folds = 5 }")


def _lease(value: Any) -> float:
    """Seconds; a shorter one would run out between two renewals of a busy machine."""
    if (seconds := _duration(value)) < 1:
        raise ValueError("must be at least 1 second")
    return seconds


def _duration(value: Any) -> float:
    """Seconds from a number or from "90s", "30m", "2h", "1d", "1h30m"."""
    if isinstance(value, str) and re.fullmatch(r"([0-9]+(\.[0-9]+)?[dhms])+", value):
        units = {"d": 86400, "h": 3600, "m": 60, "s": 1}
        value = sum(float(count) * units[unit] for count, unit in re.findall(r"([0-9.]+)([dhms])", value))
    if type(value) not in (int, float) or not 0 < value < 1e10:
        raise ValueError('must be above 0, such as "90s", "30m", "2h" or a number of seconds')
    return float(value)


CHECKS: dict[str, dict[str, Check]] = {  # section -> key in the file -> check
    "study": {
        "name": _name,
        "metric": _metric,
        "trials": _whole(1),
        "timeout": _duration,
        "sampler": _one_of(SAMPLERS),
        "pruner": _one_of(PRUNERS),
        "seed": _whole(0, 2**32 - 1),
        "lease": _lease,
        "attempts": _whole(1),
        "warm_start": _text,
    },
    "data": {
        "train": _text,
        "test": _text,
        "holdout": _share,
        "validation": _validation,
        "label": _text,
        "id": _text,
        "step": _text,
        "group": _text,
    },
    "train": {
        "epochs": _whole(1),
        "patience": _whole(0),
        "precision": _one_of(PRECISIONS),
        "keep_best": _whole(1),
    },
}
FIELDS = {"timeout": "timeout_s", "lease": "lease_s"}  # key in the file -> field, where they differ
TABLES = (*CHECKS, "space", "enqueue")
# What may change in an existing study; data files are compared by their content.
CHANGEABLE = {"study.name", "study.trials", "study.timeout", "data.train", "data.test"}


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
    path = Path(path)
    if path.suffix.lower() in DATA_SUFFIXES:
        return config_for_data(path, overrides)
    return _load(_read(path), path, overrides)


def config_for_data(path: str | Path, overrides: Sequence[str] = ()) -> StudyConfig:
    """The study of a bare data file, as if from a study file beside it with only [data] train."""
    path = Path(path)
    return _load({"data": {"train": path.name}}, path, overrides)


def _load(tables: dict[str, Any], path: Path, overrides: Sequence[str]) -> StudyConfig:
    keys = frozenset(_override(tables, override) for override in overrides)
    source = _Source(path.name, keys)
    config = _parse(tables, source)
    train = _resolved("train", config.data.train, path.parent, source)
    test = config.data.test and _resolved("test", config.data.test, path.parent, source)
    return replace(config, data=replace(config.data, train=train, test=test))


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
    except ValueError:
        return text
    plain = parsed.keys() == {"value"} and isinstance(parsed["value"], str | int | float | list | dict)
    return parsed["value"] if plain else text


def _resolved(key: str, file: str, folder: Path, source: _Source) -> str:
    path = (folder / Path(file).expanduser()).resolve()
    if not path.is_file():
        raise source.error(f"data.{key}", f"data.{key} must name a file, but there is none at {path}")
    return str(path)


def from_dict(tables: Mapping[str, Any], where: str = "stored study") -> StudyConfig:
    """The inverse of `to_dict`; as strict as `load`, but the data files need not be there."""
    return _parse(tables, _Source(where))


def _parse(tables: Mapping[str, Any], source: _Source) -> StudyConfig:
    for key in tables:
        if key not in TABLES:
            raise source.error(key, unknown("", key, TABLES))
    data = _data(_table(tables, "data", source), source)
    study = {"name": default_name(data.train), **_table(tables, "study", source)}
    train = _section(TrainSection, "train", _table(tables, "train", source), source)
    space = _space(_table(tables, "space", source), source)
    return StudyConfig(
        study=_section(StudySection, "study", study, source),
        data=data,
        train=replace(train, patience=train.patience or None),
        space=space,
        enqueue=_enqueue(tables.get("enqueue", []), space, source),
    )


def _table(tables: Mapping[str, Any], name: str, source: _Source) -> dict[str, Any]:
    table = tables.get(name, {})
    if not isinstance(table, dict):
        raise source.error(name, f"{name} must be a table [{name}], got {show(table)}")
    return table


S = TypeVar("S", StudySection, DataSection, TrainSection)


def _section(kind: type[S], name: str, table: Mapping[str, Any], source: _Source) -> S:
    fields: dict[str, Any] = {}
    for key, value in table.items():
        full = f"{name}.{key}"
        if key not in CHECKS[name]:
            raise source.error(full, _unknown(name, key))
        try:
            fields[FIELDS.get(key, key)] = CHECKS[name][key](value)
        except ValueError as error:
            raise source.error(full, f"{full} {error}, got {show(value)}") from None
    return kind(**fields)


def _unknown(section: str, key: str) -> str:
    """The error for an unknown key: it belongs to another section, or the nearest of this one is meant."""
    known: dict[str, Iterable[str]] = {**CHECKS, "space": spaces.PARAMETERS}
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
    columns = [data.label, data.id, data.step, data.group]
    if len(set(columns)) < len(columns):
        raise source.error(
            "data.label",
            f"data.label, id, step and group must be four different columns, got {show(columns)}",
        )
    return data


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
    stem = unicodedata.normalize("NFKD", Path(train).stem).encode("ascii", "ignore").decode()
    words = re.findall(r"[a-z0-9]+", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", stem).lower())
    return "-".join(words[:-1] if len(words) > 1 and words[-1] == "train" else words)[:100] or "study"


# --- what follows from the data ---


def complete(config: StudyConfig, *, n: int, steps: int, features: int, classes: int, variable: bool) -> StudyConfig:
    """The configuration with metric, validation and every entry of the space filled in from the data.

    `n` training sequences (without the test part) of at most `steps` and `features`. Raises ConfigError where
    the space, or a configuration to try first, contradicts the data or the completed space.
    """
    few = n * VALIDATION_SHARE < VALIDATION_LEAST
    validation = config.data.validation or (Folds(FOLDS) if few else VALIDATION_SHARE)
    metric = config.study.metric or ("auroc" if classes <= 2 else "macro_f1")
    facts: dict[str, Any] = {"n": n, "steps": steps, "features": features, "classes": classes}
    try:
        space = spaces.complete(config.space, **facts, variable=variable)
        enqueue = tuple(spaces.check_params(space, params, f"enqueue[{i}]") for i, params in enumerate(config.enqueue))
    except SpaceError as error:
        raise ConfigError(f"{error} (study {config.study.name})") from None
    return replace(
        config,
        study=replace(config.study, metric=metric),
        data=replace(config.data, validation=validation),
        space=space,
        enqueue=enqueue,
    )


# --- writing and comparing ---


def to_dict(config: StudyConfig) -> dict[str, Any]:
    """The study file's tables with every default written out, for JSON; `from_dict` gives the same config."""
    tables: dict[str, Any] = {name: _section_dict(name, getattr(config, name)) for name in CHECKS}
    tables["space"] = {name: spaces.unparse(entry) for name, entry in config.space.items()}
    tables["enqueue"] = [dict(params) for params in config.enqueue]
    return tables


def _section_dict(name: str, section: StudySection | DataSection | TrainSection) -> dict[str, Any]:
    values = {key: getattr(section, FIELDS.get(key, key)) for key in CHECKS[name]}
    if isinstance(section, TrainSection):
        values["patience"] = section.patience or 0
    if isinstance(section, DataSection) and isinstance(section.validation, Folds):
        values["validation"] = {"folds": section.validation.folds}
    return {key: value for key, value in values.items() if value is not None}


def to_toml(config: StudyConfig) -> str:
    """The configuration as a study file that `load` reads."""
    tables = to_dict(config)
    headed = [(f"[{name}]", tables[name]) for name in (*CHECKS, "space")]
    headed += [("[[enqueue]]", params) for params in tables["enqueue"]]
    blocks = ["\n".join([head, *(f"{key} = {show(value)}" for key, value in table.items())]) for head, table in headed]
    return "\n\n".join(blocks) + "\n"


def differences(old: StudyConfig, new: StudyConfig) -> list[str]:
    """Where a new configuration contradicts a stored one, a line each; empty: the study can go on.

    Both must be as written, or both completed. The budget (trials, timeout) may change. Data files are not
    compared: that is for their content.
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
