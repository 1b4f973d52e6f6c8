"""The rules of configuration fields: what they admit, how they say it, and that each default keeps its own."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

import pytest

from hpo.errors import HpoError
from hpo.models.config import ClassifierConfig, TrainingConfig
from hpo.models.fields import Rule, allowed, check, default, rules


@dataclass(frozen=True)
class Config:
    size: int = field(default=2, metadata=allowed(int, low=1, high=8))
    share: float = field(default=0.5, metadata=allowed(float, low=0, high=1, below=True))
    rate: float = field(default=0.5, metadata=allowed(float, low=0, above=True))
    kind: str = field(default="a", metadata=allowed(str, names=("a", "b")))
    flag: bool = field(default=False, metadata=allowed(bool))
    free: int = 0

    def __post_init__(self) -> None:
        check(self, HpoError)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"size": 0}, "size must be at least 1, got 0"),
        ({"size": 9}, "size must be at most 8, got 9"),
        ({"share": 1.0}, "share must be in [0, 1), got 1.0"),
        ({"share": float("nan")}, "share must be in [0, 1), got nan"),
        ({"rate": 0.0}, "rate must be above 0, got 0.0"),
        ({"rate": float("nan")}, "rate must be above 0, got nan"),
        ({"kind": "c"}, "kind must be one of a, b, got 'c'"),
        ({"size": "2"}, "size must be at least 1, got '2'"),
    ],
)
def test_a_value_outside_the_rule_is_an_error_with_both(given: dict[str, Any], message: str) -> None:
    with pytest.raises(HpoError) as error:
        Config(**given)
    assert str(error.value) == message


@pytest.mark.parametrize("given", [{"size": 8}, {"share": 0.0}, {"rate": 1e38}, {"kind": "b"}, {"flag": True}, {}])
def test_a_value_within_the_rule_is_none(given: dict[str, Any]) -> None:
    Config(**given)


def test_a_rule_is_a_sentence() -> None:
    assert {name: rule.sentence() for name, rule in rules(Config).items()} == {
        "size": "a whole number of at least 1 and at most 8",
        "share": "a finite number of at least 0 and below 1",
        "rate": "a finite number above 0",
        "kind": 'one of "a", "b"',
        "flag": "true or false",
    }
    assert Rule(int).sentence() == "a whole number"


@pytest.mark.parametrize("config", [Config, ClassifierConfig, TrainingConfig])
def test_every_default_is_admitted(config: type) -> None:
    for name, rule in rules(config).items():
        value = default(config, name)
        assert value is MISSING or (rule.admits(value) and type(value) is rule.kind)


def test_the_default_is_that_of_the_field() -> None:
    assert default(Config, "size") == 2
    assert [item.name for item in fields(Config) if item.name not in rules(Config)] == ["free"]


def test_configurations_need_neither_torch_nor_numpy() -> None:
    code = "import sys, hpo.models.config; print([name for name in ('torch', 'numpy') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
