"""What a study tries first, where its file names nothing."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpo.models.data.splits import RULES
from hpo.study import space as spaces
from hpo.study.config import complete, from_dict
from hpo.study.entries import contains
from hpo.study.plan import Plan
from hpo.study.portfolio import PORTFOLIO, first_configurations, portfolio_of

FACTS: dict[str, Any] = {"n": 400, "steps": 100, "features": 3, "classes": 3, "variable": False}


def first(
    space: dict[str, Any] | None = None, trials: int = 60, rules: int = RULES, enqueue: Any = (), **study: Any
) -> tuple[Any, ...]:
    """What a study of this file begins with."""
    tables: dict[str, Any] = {"study": {"name": "a", "trials": trials, **study}, "data": {"train": "a.npz"}}
    written = from_dict(tables | {"space": space or {}, "enqueue": list(enqueue)})
    names = {"classes": ("a", "b", "c"), "features": ("x", "y", "z"), "steps": 100, "sequences": 400}
    plan = Plan(complete(written, **FACTS), written, "data-a", None, rules=rules, **names)  # type: ignore[arg-type]
    return portfolio_of(plan)


def test_a_default_study_begins_with_the_portfolio() -> None:
    found = first()
    assert len(found) == len(PORTFOLIO)
    assert found[0]["stem"] == "conv"
    assert all(spaces.check_params(complete_space(), params) == params for params in found)


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        (["interpolate", "mask"], ["interpolate", "mask"]),
        ("mask", ["mask", "mask"]),
        ("interpolate", ["interpolate", "interpolate"]),
    ],
)
def test_every_second_one_is_told_of_gaps_where_the_space_says_so(entry: Any, told: list[str]) -> None:
    found = [params["missing"] for params in first({"missing": entry})]
    assert found == told * (len(PORTFOLIO) // 2)


def complete_space() -> dict[str, Any]:
    return spaces.complete({}, **FACTS)


@pytest.mark.parametrize(("trials", "count"), [(1, 1), (3, 1), (4, 1), (9, 2), (1000, len(PORTFOLIO))])
def test_the_first_trial_is_one_of_it_and_at_most_every_fourth(trials: int, count: int) -> None:
    assert len(first(trials=trials)) == count


@pytest.mark.parametrize("study", [{"sampler": "random"}, {"sampler": "qmc"}, {"warm_start": "other"}])
def test_a_study_with_draws_of_its_own_begins_with_these(study: dict[str, Any]) -> None:
    assert first(**study) == ()


def test_what_a_file_enqueues_takes_its_place() -> None:
    assert first(enqueue=[{"layers": 1}]) == ()


def test_a_study_of_an_earlier_version_goes_on_without_it() -> None:
    assert first(rules=3) == ()


def test_numbers_move_into_the_space_and_other_choices_leave_it_out() -> None:
    found = first({"hidden_size": {"low": 8, "high": 48, "step": 8}, "learning_rate": 0.1})
    assert {params["hidden_size"] for params in found} == {48}
    assert {params["learning_rate"] for params in found} == {0.1}
    assert {params["pooling"] for params in first({"pooling": "last"})} == {"last"}
    assert first({"pooling": ["last", "mean"]}) == ()
    assert {params["stem"] for params in first({"stem": "patch"})} == {"patch"}
    assert "stem_width" not in first({"stem": "patch"})[0]


@given(
    n=st.integers(1, 200_000),
    steps=st.integers(1, 20_000),
    features=st.integers(1, 2_000),
    classes=st.integers(2, 50),
    variable=st.booleans(),
)
def test_it_fits_the_default_space_of_any_data(steps: int, **facts: Any) -> None:
    space = spaces.complete({}, steps=steps, **facts)
    for params in first_configurations(space, steps, 1000):
        assert all(contains(space[name], value) for name, value in params.items())
