"""hpo/study/space.py: what an entry may be, the defaults, and drawing."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from typing import Any

import optuna
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution

from hpo.study import entries
from hpo.study import space as spaces
from hpo.study.entries import Choices, Entry, Range, SpaceError
from hpo.study.space import PARAMETERS
from tests.gpu.cases import space as checked_on_a_gpu

POWER: dict[str, Any] = {"n": 67, "steps": 24, "features": 1, "classes": 2, "variable": False}
VOWELS: dict[str, Any] = {"n": 270, "steps": 29, "features": 12, "classes": 9, "variable": True}
untimed = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])


# --- strategies: what a study file may write ---


def values(name: str) -> st.SearchStrategy[Any]:
    """An admissible value of a parameter."""
    parameter = PARAMETERS[name]
    if parameter.kind is bool:
        return st.booleans()
    if parameter.kind is str:
        return st.sampled_from(parameter.names)
    if parameter.kind is int:
        return st.integers(int(parameter.low), min(int(parameter.low) + 300, int(min(parameter.high, 1e9))))
    return st.floats(1e-9, 0.999) | st.sampled_from([1e-5, 0.1, 0.25])


@st.composite
def ranges(draw: st.DrawFn, name: str) -> dict[str, Any]:
    low, high = sorted((draw(values(name)), draw(values(name))))
    form = draw(st.sampled_from(["plain", "log", "step"]))
    if form == "log" and low > 0:
        return {"low": low, "high": high, "log": True}
    if form == "step" and PARAMETERS[name].kind is int:
        step = draw(st.integers(1, 20))
        return {"low": low, "high": high - (high - low) % step, "step": step}
    if form == "step":
        return {"low": 0.1, "high": draw(st.integers(1, 9)) / 10, "step": 0.1}
    return {"low": low, "high": high}


def written(name: str) -> st.SearchStrategy[Any]:
    """An entry of [space] as TOML gives it."""
    lists = st.lists(values(name), min_size=1, max_size=4, unique=True)
    plain = values(name) | lists
    return plain | ranges(name) if PARAMETERS[name].kind in (int, float) else plain


def tables() -> st.SearchStrategy[dict[str, Any]]:
    """A table [space] with some of the entries."""
    return st.fixed_dictionaries({}, optional={name: written(name) for name in PARAMETERS})


def parsed(table: dict[str, Any]) -> dict[str, Entry]:
    return {name: spaces.parse(name, value) for name, value in table.items()}


def default_space(facts: dict[str, Any]) -> dict[str, Entry]:
    return spaces.default_space(n=facts["n"], steps=facts["steps"], features=facts["features"])


def whole(table: dict[str, Any]) -> dict[str, Entry]:
    """A space with an entry for every parameter, defaults where the table has none."""
    return default_space(POWER) | parsed(table)


# --- entries ---


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("layers", 9, "space.layers must be a whole number of at least 1 and at most 8, got 9"),
        ("layers", True, "space.layers must be a whole number of at least 1 and at most 8, got true"),
        ("layers", 2.0, "space.layers must be a whole number of at least 1 and at most 8, got 2.0"),
        ("layers", [], "space.layers must list at least one value, got []"),
        ("layers", [1, 1], "space.layers must not list a value twice, got [1, 1]"),
        ("layers", {"low": 1}, "space.layers must have both low and high, got { low = 1 }"),
        ("layers", {"low": 3, "high": 1}, "space.layers.low must be at most high, got { low = 3, high = 1 }"),
        ("layers", {"low": 1, "hihg": 3}, "unknown key space.layers.hihg; did you mean space.layers.high?"),
        ("dropout", 1, "space.dropout must be a finite number of at least 0 and below 1, got 1"),
        ("dropout", math.nan, "space.dropout must be a finite number of at least 0 and below 1, got nan"),
        (
            "learning_rate",
            0,
            "must be a finite number of at least 1.17549e-38 and at most 3.40282e+38, got 0",
        ),
        (
            "learning_rate",
            10**400,
            "of at least 1.17549e-38 and at most 3.40282e+38, got 1000",
        ),
        (
            "weight_decay",
            math.inf,
            "must be a finite number of at least 0 and at most 3.40282e+38, got inf",
        ),
        ("bidirectional", 1, "space.bidirectional must be true or false, got 1"),
        ("pooling", "avg", 'must be one of "last", "mean", "max", "attention", "concat", "flatten", got "avg"'),
        ("pooling", {"low": 1, "high": 2}, '"flatten", or a list of these, got { low = 1, high = 2 }'),
        ("head_size", {"low": 0, "high": 8, "log": True}, "head_size.low must be above 0 where log = true"),
        ("head_size", {"low": 0, "high": 8, "log": 1}, "space.head_size.log must be true or false, got 1"),
        (
            "head_size",
            {"low": 0, "high": 8, "step": 0},
            "head_size.step must be a whole number of at least 1",
        ),
        (
            "dropout",
            {"low": 0, "high": 0.5, "step": -1},
            "dropout.step must be a finite number above 0, got -1",
        ),
        (
            "hidden_size",
            {"low": 8, "high": 100, "step": 8},
            "space.hidden_size.high must be low plus a whole number of steps, such as 96, got { low = 8",
        ),
        (
            "learning_rate",
            {"low": 0.1, "high": 0.3, "step": 0.1, "log": True},
            "space.learning_rate must have either a step or log = true, got { low = 0.1,",
        ),
    ],
)
def test_a_wrong_entry_is_an_error_with_rule_and_value(name: str, given: Any, message: str) -> None:
    with pytest.raises(SpaceError) as error:
        spaces.parse(name, given)
    assert message in str(error.value)


def test_a_whole_number_written_for_a_float_becomes_one() -> None:
    entry = spaces.parse("dropout", {"low": 0, "high": 0.5})
    assert repr(entry) == "Range(low=0.0, high=0.5, step=None, log=False)"
    assert repr(spaces.parse("gradient_clip", [0, 1])) == "Choices(values=(0.0, 1.0))"


@untimed
@given(tables())
def test_entries_survive_being_written(table: dict[str, Any]) -> None:
    space = parsed(table)
    again = parsed({name: entries.unparse(entry) for name, entry in space.items()})
    assert repr(again) == repr(space)  # repr tells True from 1 and 1 from 1.0


# --- drawing ---


@pytest.fixture(scope="module")
def study() -> optuna.Study:
    study = optuna.create_study()
    study.ask()
    return study


@untimed
@given(table=tables(), seed=st.integers(0, 2**32 - 1))
def test_a_drawn_configuration_lies_in_its_space_with_its_types(
    study: optuna.Study, table: dict[str, Any], seed: int
) -> None:
    space, sampler = whole(table), optuna.samplers.RandomSampler(seed=seed)
    trial = study.trials[0]
    params = spaces.walk(space, lambda name, item: sampler.sample_independent(study, trial, name, item))
    assert list(params) == list(PARAMETERS)
    assert [type(value) for value in params.values()] == [PARAMETERS[name].kind for name in params]
    for name, value in params.items():
        assert not spaces.is_active(name, params) or entries.contains(space[name], value)
    assert spaces.check_params(space, params) == params


def low_or_first(_: str, item: BaseDistribution) -> Any:
    return item.low if isinstance(item, IntDistribution | FloatDistribution) else item.to_external_repr(0)


@pytest.mark.parametrize(("layers", "head_size", "active"), [(1, 0, False), (2, 0, True), (1, 8, True), (3, 64, True)])
def test_dropout_is_drawn_only_where_it_has_an_effect(layers: int, head_size: int, active: bool) -> None:
    space = whole({"layers": layers, "head_size": head_size, "dropout": {"low": 0.25, "high": 0.5}})
    drawn: list[str] = []

    def draw(name: str, item: BaseDistribution) -> Any:
        drawn.append(name)
        return low_or_first(name, item)

    params = spaces.walk(space, draw)
    assert ("dropout" in drawn) is active
    assert params["dropout"] == (0.25 if active else 0.0)
    assert "gradient_clip" not in drawn
    assert params["gradient_clip"] == 1.0
    assert drawn == [name for name in PARAMETERS if name in drawn]  # whatever the order of the file


@pytest.mark.parametrize("stem", ["none", "patch", "conv"])
def test_what_belongs_to_a_stem_is_drawn_for_that_stem_alone(stem: str) -> None:
    own = {"patch_length": [2, 4], "stem_layers": [2, 3], "stem_width": [32, 48], "stem_stride": [4, 8]}
    space = whole({"stem": stem, **own})
    drawn: dict[str, Any] = {}

    def draw(name: str, item: BaseDistribution) -> Any:
        drawn[name] = low_or_first(name, item)
        return drawn[name]

    params = spaces.walk(space, draw)
    active = {"none": set[str](), "patch": {"patch_length"}, "conv": own.keys() - {"patch_length"}}[stem]
    assert drawn.keys() & own.keys() == active
    assert {name: params[name] for name in own} == {
        name: values[0] if name in active else spaces.NEUTRAL[name] for name, values in own.items()
    }
    assert spaces.check_params(space, params) == params


def test_a_constant_dropout_without_effect_is_neutral() -> None:
    params = spaces.walk(whole({"layers": 1, "head_size": 0, "dropout": 0.3}), low_or_first)
    assert params["dropout"] == 0.0


def test_distributions_leave_out_what_has_one_value() -> None:
    space = parsed(
        {
            "hidden_size": {"low": 8, "high": 24, "step": 8},
            "learning_rate": {"low": 1e-4, "high": 1e-1, "log": True},
            "bidirectional": [True, False],
            "layers": 2,
            "optimizer": ["adam"],
            "weight_decay": {"low": 0.125, "high": 0.125, "log": True},
        }
    )
    assert spaces.distributions(space) == {
        "hidden_size": IntDistribution(8, 24, step=8),
        "bidirectional": optuna.distributions.CategoricalDistribution((True, False)),
        "learning_rate": FloatDistribution(1e-4, 1e-1, log=True),
    }


# --- counting ---

SMALL: dict[str, Any] = {
    "normalization": "none",
    "difference": False,
    "stem": "patch",
    "patch_length": 1,
    "stem_layers": 1,
    "stem_width": 8,
    "stem_kernel": 3,
    "stem_stride": 1,
    "hidden_size": 8,
    "layers": 1,
    "bidirectional": False,
    "pooling": "last",
    "head_size": 0,
    "dropout": 0.1,
    "batch_size": 16,
    "optimizer": "adam",
    "learning_rate": 0.1,
    "weight_decay": 0.1,
    "schedule": "constant",
    "label_smoothing": 0.0,
    "mixup": 0.0,
    "jitter": 0.0,
    "skip": False,
}


@untimed
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "layers": st.sampled_from([1, 2, [1, 2], [2, 3], {"low": 1, "high": 3}, {"low": 2, "high": 4}]),
            "head_size": st.sampled_from([0, 16, [0, 16], [16, 32], {"low": 0, "high": 6, "step": 3}]),
            "dropout": st.sampled_from([0.2, [0.0, 0.5], {"low": 0.1, "high": 0.7, "step": 0.2}]),
            "hidden_size": st.sampled_from([{"low": 8, "high": 24, "step": 8}, {"low": 1, "high": 4, "log": True}]),
            "bidirectional": st.just([False, True]),
            "stem": st.sampled_from(["none", "conv", ["none", "patch"], ["patch", "conv"], ["none", "patch", "conv"]]),
            "patch_length": st.sampled_from([[1, 2], {"low": 2, "high": 4}]),
            "stem_layers": st.just([1, 2]),
            "stem_stride": st.just([2, 4]),
        },
    )
)
def test_cardinality_counts_what_walk_can_give(table: dict[str, Any]) -> None:
    space = whole(SMALL | table)
    every = {name: entries.values(entry) for name, entry in space.items()}
    configurations = set()
    for values in itertools.product(*(found for found in every.values() if found is not None)):
        choice = dict(zip(every, values, strict=True))
        configurations.add(tuple(spaces.walk(space, lambda name, _, choice=choice: choice[name]).items()))  # type: ignore[misc]
    assert spaces.cardinality(space) == len(configurations)


@untimed
@given(written("hidden_size"))
def test_values_of_a_whole_number_entry_are_those_that_it_contains(table: Any) -> None:
    entry = spaces.parse("hidden_size", table)
    assert sorted(entries.values(entry) or []) == [k for k in range(1, 400) if entries.contains(entry, k)]
    assert entries.size(entry) == len(entries.values(entry) or [])


def test_values_of_a_stepped_float_are_those_of_optuna() -> None:
    entry = spaces.parse("dropout", {"low": 0.1, "high": 0.7, "step": 0.2})
    assert entries.values(entry) == [0.1, 0.3, 0.5, 0.7]
    item = entries.distribution(entry)
    assert item is not None
    assert [k / 100 for k in range(100) if item._contains(k / 100)] == [0.1, 0.3, 0.5, 0.7]


def test_a_continuous_range_has_no_cardinality_unless_it_is_never_active() -> None:
    assert spaces.cardinality(default_space(POWER)) is None
    continuous = {"low": 0.0, "high": 0.5}
    assert spaces.cardinality(whole(SMALL | {"layers": [1, 2], "head_size": 0, "dropout": continuous})) is None
    never = whole(SMALL | {"layers": 1, "head_size": 0, "dropout": continuous})
    assert spaces.cardinality(never) == 1
    assert spaces.cardinality(whole(SMALL | {"learning_rate": {"low": 0.1, "high": 0.1}})) == 1


# --- defaults and the data ---


@pytest.mark.parametrize(
    ("steps", "patches"),
    [
        (1, 1),
        (10, 1),
        (24, [1, 2, 4]),
        (29, [1, 2, 4]),
        (140, [4, 8, 16]),
        (500, [8, 16, 32, 64]),
        (2000, [32, 64, 128, 256]),
    ],
)
def test_default_patches_follow_from_the_length(steps: int, patches: Any) -> None:
    space = default_space(POWER | {"steps": steps})
    assert entries.unparse(space["patch_length"]) == patches


@untimed
@given(
    n=st.integers(1, 200_000),
    steps=st.integers(1, 20_000),
    features=st.integers(1, 2_000),
    classes=st.integers(2, 50),
    variable=st.booleans(),
)
def test_defaults_fit_any_data(**facts: Any) -> None:
    space = spaces.complete({}, **facts)
    assert space == default_space(facts)
    assert list(space) == list(PARAMETERS)
    patches, batches = entries.values(space["patch_length"]), entries.values(space["batch_size"])
    assert patches is not None
    assert batches is not None
    assert max(batches) <= facts["n"]
    remaining = [math.ceil(facts["steps"] / k) for k in patches if isinstance(k, int)]
    assert remaining[0] <= spaces.PATCHES_MOST
    assert all(left >= spaces.PATCHES_LEAST for left in remaining[1:])
    assert "flatten" not in (entries.values(space["pooling"]) or [])
    assert {name: spaces.parse(name, entries.unparse(entry)) for name, entry in space.items()} == space


@pytest.mark.parametrize(
    ("steps", "strides"),
    [(1, 1), (12, 1), (24, [1, 2]), (64, [1, 2, 4]), (140, [2, 4, 8]), (500, [4, 8, 16]), (2000, [16, 32, 64])],
)
def test_default_strides_follow_from_the_length(steps: int, strides: Any) -> None:
    assert entries.unparse(default_space(POWER | {"steps": steps})["stem_stride"]) == strides


def test_one_step_leaves_nothing_to_pool_or_to_normalize_within() -> None:
    space = default_space(POWER | {"steps": 1})
    assert space["pooling"] == "last"
    assert space["normalization"] == "channel"


def test_complete_keeps_what_is_written_and_derives_patches_from_the_steps_kept() -> None:
    space = spaces.complete({"layers": Range(2, 3), "sequence_length": 12}, **POWER | {"steps": 500})
    assert space["layers"] == Range(2, 3)
    assert space["patch_length"] == Choices((1, 2))


@pytest.mark.parametrize(
    ("table", "facts", "message"),
    [
        ({"patch_length": [1, 32]}, POWER, "space.patch_length must be at most 24, the steps of the longest"),
        ({"patch_length": 9, "sequence_length": [4, 8]}, POWER, "space.patch_length must be at most 8,"),
        ({"sequence_length": {"low": 0, "high": 25}}, POWER, "space.sequence_length must be at most 24,"),
        (
            {"batch_size": [16, 128]},
            POWER,
            "space.batch_size must be at most 67, the number of training sequences, got [16, 128]",
        ),
        ({"pooling": ["last", "flatten"]}, VOWELS, 'space.pooling must not hold "flatten" where'),
        ({"threshold": "chosen"}, VOWELS, 'space.threshold must be "half" with more than two'),
    ],
)
def test_a_space_that_contradicts_the_data_is_an_error_with_the_way_out(
    table: dict[str, Any], facts: dict[str, Any], message: str
) -> None:
    with pytest.raises(SpaceError) as error:
        spaces.complete(parsed(table), **facts)
    assert message in str(error.value)


def test_what_contradicts_other_data_only_is_accepted() -> None:
    table = {"pooling": "flatten", "threshold": "chosen", "patch_length": 24, "batch_size": 67}
    assert parsed(table).items() <= spaces.complete(parsed(table), **POWER).items()
    spaces.complete(parsed({"patch_length": 20, "sequence_length": [0, 4]}), **POWER)


# --- configurations to try first ---


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"hiden_size": 8}, "unknown key enqueue.hiden_size; did you mean enqueue.hidden_size?"),
        ({"hidden_size": "8"}, "enqueue.hidden_size must be a whole number of"),
        (
            {"hidden_size": 12},
            "enqueue.hidden_size must lie in space.hidden_size = { low = 16, high = 128, log = true }, "
            "got 12; widen space.hidden_size or leave it out",
        ),
        ({"optimizer": "sgd"}, 'must lie in space.optimizer = ["adam", "adamw"], got "sgd"'),
        ({"layers": 2}, "enqueue.layers must lie in space.layers = 1, got 2"),
        ({"dropout": 0.0}, "must lie in space.dropout = { low = 0.1, high = 0.5 }, got 0.0"),
        ({"dropout": 0.0, "layers": 1, "head_size": 128}, "enqueue.dropout must lie in"),
        ({"dropout": 0.9, "layers": 1, "head_size": 0}, "enqueue.dropout must lie in"),
    ],
)
def test_a_configuration_outside_the_space_is_an_error(params: dict[str, Any], message: str) -> None:
    table = {"layers": 1, "optimizer": ["adam", "adamw"], "dropout": {"low": 0.1, "high": 0.5}}
    with pytest.raises(SpaceError) as error:
        spaces.check_params(whole(table), params)
    assert message in str(error.value)


def test_part_of_a_configuration_is_enough_and_gets_its_types() -> None:
    space = whole({"layers": 1, "gradient_clip": [0.0, 1.0]})
    checked = spaces.check_params(space, {"layers": 1, "gradient_clip": 1, "bidirectional": True})
    assert repr(checked) == "{'layers': 1, 'gradient_clip': 1.0, 'bidirectional': True}"
    idle = {"layers": 1, "head_size": 0, "dropout": 0}
    assert spaces.check_params(whole({"dropout": {"low": 0.1, "high": 0.5}}), idle) == idle


def test_importing_the_configuration_does_not_load_torch() -> None:
    code = "import sys, hpo.study.config, hpo.study.space; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


def test_every_parameter_is_among_those_that_the_checks_of_a_gpu_vary() -> None:
    """They follow from the fields of the configurations (tests/gpu/cases.py), as the parameters do."""
    assert set(PARAMETERS) <= set(checked_on_a_gpu())
