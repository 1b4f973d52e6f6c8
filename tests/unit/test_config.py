"""hpo/study/config.py: the study file, strict and exact both ways."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpo.models.config import METRICS, PRECISIONS
from hpo.models.costs import Costs
from hpo.study import config as configs
from hpo.study.config import ConfigError, DataSection, Folds, StudyConfig, StudySection, TrainSection
from hpo.study.entries import Choices, Range, show
from hpo.study.space import PARAMETERS
from tests.unit.test_space import POWER, VOWELS, tables, untimed, values

DESIGN = """
[study]
name = "italy-power"            # unique in the database
metric = "auroc"
trials = 60
timeout = "30m"
sampler = "tpe"
pruner = "hyperband"
seed = 0

[data]
train = "train.npz"
test = "test.npz"
validation = 0.2

[train]
epochs = 50
patience = 10
precision = "float32"

[space]
hidden_size = { low = 8, high = 128, step = 8 }
layers = { low = 1, high = 3 }
dropout = { low = 0.0, high = 0.5 }
learning_rate = { low = 1e-4, high = 3e-2, log = true }
batch_size = [16, 32, 64]
bidirectional = [false, true]
pooling = "max"

[[enqueue]]
hidden_size = 64
dropout = 0
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("train.npz", "test.npz"):
        (tmp_path / name).touch()
    return tmp_path


def load(folder: Path, text: str, *overrides: str) -> StudyConfig:
    (folder / "study.toml").write_text(text, encoding="utf-8")
    return configs.load(folder / "study.toml", overrides)


def error(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as raised:
        load(folder, text, *overrides)
    return str(raised.value)


def to_toml(config: StudyConfig) -> str:
    """The configuration as a study file that `load` reads."""
    written = configs.to_dict(config)
    headed = [(f"[{name}]", written[name]) for name in ("study", "data", "train", "limits", "space")]
    headed += [("[[enqueue]]", params) for params in written["enqueue"]]
    blocks = ["\n".join([head, *(f"{key} = {show(value)}" for key, value in table.items())]) for head, table in headed]
    return "\n\n".join(blocks) + "\n"


# --- what a file gives ---


def test_a_whole_file_is_read(folder: Path) -> None:
    config = load(folder, DESIGN)
    assert config.study == StudySection("italy-power", metric="auroc", timeout_s=1800.0)
    train, test = str(folder / "train.npz"), str(folder / "test.npz")
    assert config.data == DataSection(train, test, validation=0.2)
    assert config.data.holdout is None
    assert config.train == TrainSection()
    assert config.space["hidden_size"] == Range(8, 128, step=8)
    assert config.space["batch_size"] == Choices((16, 32, 64))
    assert config.space["pooling"] == "max"
    assert repr(config.enqueue) == "({'hidden_size': 64, 'dropout': 0.0},)"


def test_the_training_file_alone_is_a_study(folder: Path) -> None:
    (folder / "GunPoint_TRAIN.ts").touch()
    config = load(folder, '[data]\ntrain = "GunPoint_TRAIN.ts"')
    train = str(folder / "GunPoint_TRAIN.ts")
    assert config == StudyConfig(StudySection("gun-point"), DataSection(train, holdout=0.2))
    assert configs.load(folder / "GunPoint_TRAIN.ts") == config
    assert configs.config_for_data(folder / "GunPoint_TRAIN.ts", ["study.trials=3"]).study.trials == 3


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("italy_power.npz", "italy-power"),
        ("ItalyPowerDemand_TRAIN.ts", "italy-power-demand"),
        ("some/where/ecg-train.csv", "ecg"),
        ("ECG5000.npz", "ecg5000"),
        ("waves.csv.gz", "waves"),
        ("Émile's data (2).csv", "emile-s-data-2"),
        ("train.npz", "train"),
        ("データ.npz", "study"),
        ("x" * 300 + ".npz", "x" * 100),
    ],
)
def test_a_study_is_named_after_its_training_file(file: str, name: str) -> None:
    assert configs.default_name(file) == name
    assert configs.from_dict({"data": {"train": file}}).study.name == name


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        ('"90s"', 90),
        ('"30m"', 1800),
        ('"2h"', 7200),
        ('"1h30m"', 5400),
        ('"1.5h"', 5400),
        ("12", 12),
        ("0.5", 0.5),
    ],
)
def test_a_timeout_is_a_duration(folder: Path, written: str, seconds: float) -> None:
    timeout_s = load(folder, DESIGN, f"study.timeout={written}").study.timeout_s
    assert repr(timeout_s) == repr(float(seconds))


def test_a_patience_of_zero_never_stops_early(folder: Path) -> None:
    config = load(folder, DESIGN, "train.patience=0")
    assert config.train.patience is None
    assert configs.from_dict(configs.to_dict(config)) == config


def test_a_file_that_an_editor_marked_as_utf8_is_read(folder: Path) -> None:
    assert load(folder, "\ufeff" + DESIGN) == load(folder, DESIGN)


# --- overrides ---


def test_overrides_are_toml_or_a_bare_string(folder: Path) -> None:
    config = load(
        folder,
        DESIGN,
        "space.hidden_size=64",
        "space.dropout={ low = 0.0, high = 0.2 }",
        "space.layers.high=2",
        "space.normalization=channel",
        "study.timeout=2h",
        'study.metric = "f1"',
        "data.validation={folds=3}",
    )
    assert config.space["hidden_size"] == 64
    assert config.space["dropout"] == Range(0.0, 0.2)
    assert config.space["layers"] == Range(1, 2)
    assert config.space["normalization"] == "channel"
    assert config.study.timeout_s == 7200
    assert config.study.metric == "f1"
    assert config.data.validation == Folds(3)


def test_an_override_cannot_smuggle_in_other_keys(folder: Path) -> None:
    assert "study.metric must be one of" in error(folder, DESIGN, 'study.metric="f1"\nother = 1')


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epochs", '--set must look like train.epochs=20, got "train.epochs"'),
        ("epochs=3", '--set must look like train.epochs=20, got "epochs=3"'),
        ("train.epochs=0", "train.epochs must be at least 1, got 0 (--set)"),
        ("train.epochs=ten", 'train.epochs must be a whole number, got "ten" (--set)'),
        ("train.epoch=3", "unknown key train.epoch; did you mean train.epochs? (--set)"),
        ("train.epochs.more=3", "--set train.epochs.more must name a key of a table, but epochs is none"),
        ("study.name=2020-01-01 12:00", "study.name must be 1 to 100 letters, digits, dots"),
        ("space.dropout.low=0.9", "must be at most high, got { low = 0.9, high = 0.5 } (--set)"),
    ],
)
def test_a_wrong_override_is_an_error(folder: Path, override: str, message: str) -> None:
    assert message in error(folder, DESIGN, override)


def test_an_error_elsewhere_is_not_blamed_on_an_override(folder: Path) -> None:
    text = DESIGN.replace("epochs = 50", "epochs = 0")
    message = error(folder, text, "train.patience=1", "study.seed=3")
    assert message == "train.epochs must be at least 1, got 0 (study.toml)"


# --- errors ---


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("epochs = 50", "epochs = 0", "train.epochs must be at least 1, got 0 (study.toml)"),
        ("epochs = 50", "epochs = true", "train.epochs must be a whole number, got true (study.toml)"),
        ("epochs = 50", "epochs = 5.0", "train.epochs must be a whole number, got 5.0 (study.toml)"),
        ("epochs = 50", "epoch = 5", "unknown key train.epoch; did you mean train.epochs? (study.toml)"),
        ("epochs = 50", "zzz = 5", "unknown key train.zzz; known are epochs, patience, precision, keep_best"),
        ("epochs = 50", "trials = 5", "unknown key train.trials; did you mean study.trials? (study.toml)"),
        ("epochs = 50", "layers = 5", "unknown key train.layers; did you mean space.layers? (study.toml)"),
        ("[train]", "[trian]", "unknown key trian; did you mean train? (study.toml)"),
        ("layers =", "layer =", "unknown key space.layer; did you mean space.layers? (study.toml)"),
        ("layers = {", "layers = 9 #", "at least 1 and at most 8, got 9 (study.toml)"),
        ("patience = 10", "patience = -1", "train.patience must be at least 0, got -1 (study.toml)"),
        ('"float32"', '"float16"', 'one of "float32", "bfloat16", got "float16" (study.toml)'),
        ('"tpe"', '"TPE"', 'one of "tpe", "gp", "cmaes", "random", "qmc", "grid", got "TPE"'),
        ('"auroc"', '"auc"', '"auroc", "average_precision", "log_loss", got "auc" (study.toml)'),
        ('"italy-power"', '"a/b"', "study.name must be 1 to 100 letters, digits, dots"),
        ('"italy-power"', "3", "the first a letter or digit, got 3 (study.toml)"),
        ("seed = 0", "seed = 4294967296", "study.seed must be at most 4294967295, got 4294967296"),
        (
            '"30m"',
            '"half an hour"',
            'study.timeout must be above 0, such as "90s", "30m", "2h" or a number of seconds, '
            'got "half an hour" (study.toml)',
        ),
        ('"30m"', '"0s"', "study.timeout must be above 0"),
        ('"30m"', "inf", "study.timeout must be above 0"),
        (
            "validation = 0.2",
            "validation = 1",
            "data.validation must be a share between 0 and 1, both excluded, or { folds = 5 }, got 1 (study.toml)",
        ),
        ("validation = 0.2", "validation = { folds = 1 }", "data.validation must be at least 2, got { folds"),
        ("validation = 0.2", "validation = { fold = 5 }", "or { folds = 5 }, got { fold = 5 } (study"),
        ("validation = 0.2", "holdout = 0.2", "data.holdout must be left out where data.test"),
        ("validation = 0.2", "label = 'id'", "data.label, id, step, group, time and weight must be different"),
        ("validation = 0.2", "label = ''", "data.label must be a string in quotes that is not"),
        ("train = ", "# train = ", 'data.train must name the training file, such as "train.npz" (study.toml)'),
        ("[train]", "[promote]\ncosts = 5\n[train]", "promote.costs must be a table such as { false_positive = 1, f"),
        ("[train]", "[promote]\ncosts = { fp = 1 }\n[train]", "promote.costs must be a table such as { false_posit"),
        (
            "[train]",
            "[promote]\ncosts = { false_negative = 0 }\n[train]",
            "promote.costs must hold numbers from 1e-06 to 1e+06, got { false_negative = 0 } (study.toml)",
        ),
        ("hidden_size = 64", "hidden_size = 65", "enqueue[0].hidden_size must lie in space.hidden_size"),
        ("[[enqueue]]", "[enqueue]", "enqueue must be tables [[enqueue]], got { hidden_size"),
        ("[train]", "[limits]\nsize_mb = 0\n[train]", "limits.size_mb must be a finite number above 0, got 0 (study"),
        ("[train]", "[limits]\nsize_mb = true\n[train]", "limits.size_mb must be a finite number above 0, got true"),
        ("[train]", "[limits]\nsize_mb = '1 MB'\n[train]", 'must be a finite number above 0, got "1 MB"'),
        (
            "[train]",
            "[limits]\nlatency_ms = inf\n[train]",
            "latency_ms must be a finite number above 0, got inf",
        ),
        (
            "[train]",
            "[limits]\nlatency_ms = nan\n[train]",
            "latency_ms must be a finite number above 0, got nan",
        ),
        ("[train]", "[limits]\nlatency = 3\n[train]", "unknown key limits.latency; did you mean limits.latency_ms?"),
    ],
)
def test_a_wrong_file_is_an_error_with_rule_value_and_file(folder: Path, old: str, new: str, message: str) -> None:
    assert old in DESIGN
    assert message in error(folder, DESIGN.replace(old, new, 1))


def test_a_section_must_be_a_table(folder: Path) -> None:
    message = error(folder, 'train = 5\n[data]\ntrain = "train.npz"')
    assert message == "train must be a table [train], got 5 (study.toml)"


def test_a_missing_data_file_is_named(folder: Path) -> None:
    (folder / "test.npz").unlink()
    missing = folder / "test.npz"
    assert error(folder, DESIGN) == f"data.test must name a file, but there is none at {missing} (study.toml)"
    with pytest.raises(ConfigError, match=r"data.train must name a file, but there is none at .*/no\.npz"):
        configs.load(folder / "no.npz")


def test_a_file_that_is_not_toml_is_named_with_the_line(folder: Path) -> None:
    message = error(folder, "[study]\nname = 'a'\ntrials = = 3\n")
    assert message.startswith(f"{folder / 'study.toml'} is not valid TOML: ")
    assert "line 3" in message
    (folder / "study.toml").write_bytes(b"[study]\nname = '\xff'\n")
    with pytest.raises(ConfigError, match=r"study.toml is not valid TOML: not UTF-8 \(at line 2\)"):
        configs.load(folder / "study.toml")


def test_a_study_file_that_is_not_there_is_named(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"no study file at .*/nowhere\.toml"):
        configs.load(folder / "nowhere.toml")
    with pytest.raises(ConfigError, match="cannot read the study file"):
        configs.load(folder)


# --- round trips ---

text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1).filter(str.strip)
shares = st.floats(0.001, 0.999)
above_0 = st.floats(0, exclude_min=True, allow_infinity=False) | st.integers(1, 2**63 - 1)


@st.composite
def files(draw: st.DrawFn) -> dict[str, Any]:
    """The tables of an admissible study file whose training file is train.npz."""
    study: dict[str, st.SearchStrategy[Any]] = {
        "name": st.from_regex(r"[a-zA-Z0-9][a-zA-Z0-9._-]{0,20}", fullmatch=True),
        "metric": st.sampled_from(METRICS),
        "trials": st.integers(1, 10_000),
        "timeout": st.floats(0.001, 1e9) | st.integers(1, 10_000) | st.integers(1, 99).map("{}m".format),
        "sampler": st.sampled_from(configs.SAMPLERS),
        "pruner": st.sampled_from(configs.PRUNERS),
        "seed": st.integers(0, 2**32 - 1),
        "lease": st.floats(1, 1e6),
        "attempts": st.integers(1, 99),
        "warm_start": text,
    }
    folds = st.integers(2, 99).map(lambda k: {"folds": k})
    data = {"holdout": shares, "validation": shares | folds, "label": text.map("label {}".format)}
    train = {
        "epochs": st.integers(1, 10_000),
        "patience": st.integers(0, 100),
        "precision": st.sampled_from(PRECISIONS),
        "keep_best": st.integers(1, 99),
    }
    free = {name: values(name) for name in PARAMETERS}
    space = draw(tables())
    known_good = st.fixed_dictionaries({}, optional={name: free[name] for name in free if name not in space})
    return {
        "study": draw(st.fixed_dictionaries({}, optional=study)),
        "data": {"train": "train.npz"} | draw(st.fixed_dictionaries({}, optional=data)),
        "train": draw(st.fixed_dictionaries({}, optional=train)),
        "space": space,
        "enqueue": draw(st.lists(known_good, max_size=2)),
        "limits": draw(st.fixed_dictionaries({}, optional=dict.fromkeys(("latency_ms", "size_mb"), above_0))),
    }


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    (folder / "train.npz").touch()
    return folder


@untimed
@given(tables=files())
def test_a_configuration_survives_toml_and_json(shared: Path, tables: dict[str, Any]) -> None:
    config = configs.from_dict(tables)
    read = load(shared, to_toml(config))
    expected = replace(config, data=replace(config.data, train=str(shared / "train.npz")))
    assert repr(read) == repr(expected)  # repr tells True from 1 and 1 from 1.0
    assert repr(load(shared, to_toml(read))) == repr(read)
    assert repr(configs.from_dict(json.loads(json.dumps(configs.to_dict(config))))) == repr(config)
    assert configs.differences(config, read) == []


def test_any_string_survives_toml(folder: Path) -> None:
    config = load(folder, DESIGN)
    strange = 'a "study"\\ of\x7f\x01\ttabs\nand\r\nlines, ünd 🜁'
    config = replace(config, study=replace(config.study, warm_start=strange))
    assert load(folder, to_toml(config)) == config


# --- what follows from the data ---


def test_metric_validation_and_space_follow_from_the_data(folder: Path) -> None:
    bare = load(folder, '[data]\ntrain = "train.npz"')
    small = configs.complete(bare, **POWER)
    assert small.study.metric == "auroc"
    assert small.data.validation == Folds(5)
    assert list(small.space) == list(PARAMETERS)
    large = configs.complete(bare, **VOWELS | {"n": 2500})
    assert large.study.metric == "macro_f1"
    assert large.data.validation == 0.2
    assert configs.complete(bare, **POWER | {"n": 2499}).data.validation == Folds(5)
    for config in (small, large):
        assert configs.complete(config, **POWER | {"n": 2499}) == config
        assert configs.from_dict(configs.to_dict(config)) == config


def test_what_is_written_stays_when_completed(folder: Path) -> None:
    config = load(folder, DESIGN, "study.metric=f1", "study.finalists=2")
    completed = configs.complete(config, **POWER)
    assert completed.study == config.study
    assert completed.data == config.data
    assert config.space.items() <= completed.space.items()


@pytest.mark.parametrize(
    ("study", "finalists"),
    [
        ("trials = 11", 0),
        ("trials = 12", 1),
        ("trials = 24", 2),
        ("trials = 60", 3),
        ("trials = 999", 3),
        ("trials = 20\nrepeats = 5", 1),
        ("trials = 2\nfinalists = 2", 2),
        ("trials = 60\nfinalists = 0", 0),
    ],
)
def test_finals_are_a_small_part_of_a_study_unless_it_says_how_many(folder: Path, study: str, finalists: int) -> None:
    file = DESIGN.replace("trials = 60", study)
    assert configs.complete(load(folder, file), **POWER).study.finalists == finalists


def test_costs_are_read_kept_and_of_two_classes(folder: Path) -> None:
    config = load(folder, DESIGN, "promote.costs={ false_negative = 5 }")
    assert config.promote.costs == Costs(1.0, 5.0)
    assert configs.from_dict(json.loads(json.dumps(configs.to_dict(config)))) == config
    assert configs.complete(config, **POWER).promote.costs == Costs(1.0, 5.0)
    with pytest.raises(ConfigError, match=r"between two classes, got 3; leave them out \(study italy-power\)"):
        configs.complete(config, **POWER | {"classes": 3})


def test_what_contradicts_the_data_or_a_default_names_the_study(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"space.patch_length must be at most 24.*\(study italy-power\)"):
        configs.complete(load(folder, DESIGN, "space.patch_length=25"), **POWER)
    enqueued = load(folder, DESIGN, "enqueue=[{ layers = 1 }, { gradient_clip = 0.5 }]")
    with pytest.raises(ConfigError, match=r"enqueue\[1\].gradient_clip must lie in space.gradient_clip = 1.0"):
        configs.complete(enqueued, **POWER)


# --- differences ---


@pytest.mark.parametrize(
    ("override", "lines"),
    [
        ("space.hidden_size=64", ["space.hidden_size: stored { low = 8, high = 128, step = 8 }, file 64"]),
        ("space.head_size=0", ["space.head_size: stored not set, file 0"]),
        ("study.metric=f1", ['study.metric: stored "auroc", file "f1"']),
        ("train.patience=0", ["train.patience: stored 10, file 0"]),
        ("data.validation={folds=5}", ["data.validation: stored 0.2, file { folds = 5 }"]),
        ("enqueue=[]", ["enqueue: stored [{ hidden_size = 64, dropout = 0.0 }], file []"]),
        ("study.trials=99", []),
        ("study.timeout=9h", []),
        ("data.train=test.npz", []),
        ("limits.latency_ms=1e9", []),
        ("limits.size_mb=1", []),
        ("space.layers={low=1, high=3, step=1}", []),
        ("space.dropout={low=0, high=0.5, log=false}", []),
    ],
)
def test_differences_are_what_contradicts_a_stored_study(folder: Path, override: str, lines: list[str]) -> None:
    assert configs.differences(load(folder, DESIGN), load(folder, DESIGN, override)) == lines


def test_an_entry_taken_out_of_the_file_differs(folder: Path) -> None:
    file = load(folder, DESIGN.replace('pooling = "max"', ""))
    assert configs.differences(load(folder, DESIGN), file) == ['space.pooling: stored "max", file not set']
