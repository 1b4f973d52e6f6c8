"""What a launch says that it has read, and what it warns of."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hpo.models.data.sequences import Sequences, from_arrays
from hpo.study.config import config_for_data
from hpo.study.plan import make_plan
from hpo.study.readout import readout, suspicions

random = np.random.default_rng(0)


def part(n: int = 60, classes: tuple[str, ...] = ("no", "yes"), **given: object) -> Sequences:
    values = random.normal(0, 1, (n, 8, 2))
    labels = np.array(classes)[np.arange(n) % len(classes)]
    return from_arrays(values, labels, features=("pulse", "breath"), **given)  # type: ignore[arg-type]


def test_sizes_classes_gaps_parts_and_the_positive_class_are_said(tmp_path: Path) -> None:
    X = random.normal(0, 1, (60, 8, 2))
    X[0, 2, 0] = np.nan
    np.savez(tmp_path / "sick.npz", X=X, y=np.array(["no", "yes"])[np.arange(60) % 2], lengths=5 + np.arange(60) % 4)
    plan, train, test = make_plan(config_for_data(tmp_path / "sick.npz", ()))
    assert test is not None
    said = readout(plan, train, test)
    assert said[0].startswith(f"training part: {train.n} sequences of 5 to 8 steps, 2 features; classes no ")
    assert "missing values filled" in said[0]
    assert said[1].startswith(f"test part: {test.n} sequences of ")
    assert said[2] == (
        "features 'x0', 'x1'; validation on 5 folds; 'yes' is the positive class of f1, auroc and average_precision"
    )


def test_sound_data_raise_no_suspicion() -> None:
    assert suspicions(part(), part()) == []
    assert suspicions(part(), None) == []


@pytest.mark.parametrize("noise", [0.0, 1e-3])
def test_a_feature_that_is_the_label_under_another_name_is_named(noise: float) -> None:
    values = random.normal(0, 1, (60, 8, 2))
    labels = np.arange(60) % 3
    values[:, :, 1] = 10.0 * labels[:, None] + noise * random.normal(0, 1, (60, 8))
    found = suspicions(from_arrays(values, labels, features=("pulse", "code")), None)
    assert len(found) == (noise == 0.0)
    assert not found or "feature 'code' is one value in each sequence and tells the class of every one" in found[0]


def test_a_constant_that_says_nothing_is_none() -> None:
    values = random.normal(0, 1, (60, 8, 1))
    values[:, :, 0] = (np.arange(60) % 5)[:, None]  # age, say
    assert suspicions(from_arrays(values, np.arange(60) % 3), None) == []


def test_sequences_in_both_parts_are_counted() -> None:
    """Public report of a test file that was part of the training file."""
    train = part()
    (said,) = suspicions(train, train.take(range(10)))
    assert said.startswith("10 of the test part's sequences are in the training part too")


def test_groups_in_both_parts_are_named() -> None:
    """A split never separates a group; two files may (the case `groups-in-training-and-test-file`)."""
    train, test = part(groups=[f"p{i % 6}" for i in range(60)]), part(24, groups=[f"p{4 + i % 4}" for i in range(24)])
    (found,) = suspicions(train, test)
    assert found.startswith("2 of the test part's 4 groups are in the training part too ('p4', 'p5'): its score")
    assert suspicions(train, part(24, groups=[f"q{i % 4}" for i in range(24)])) == []
    assert suspicions(train, part(24)) == []
