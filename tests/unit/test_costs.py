"""What wrong decisions cost, and the threshold under which that is least."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hpo.models.bundle import card
from hpo.models.bundle.config import BundleConfig, BundleError, from_json, to_json
from hpo.models.config import ClassifierConfig
from hpo.models.costs import Costs
from hpo.models.metrics import choose_threshold, confusion, measure

COST = st.floats(1e-6, 1e6)


def mean_cost(costs: Costs, p: np.ndarray, y: np.ndarray, weights: np.ndarray, threshold: float) -> float:
    said = p[:, 1].astype(np.float64) >= threshold
    each = np.where(said, np.where(y == 0, costs.false_positive, 0.0), np.where(y == 1, costs.false_negative, 0.0))
    return float(weights @ each / weights.sum())


@given(st.integers(2, 60), st.integers(0, 2**32 - 1), COST, COST, st.booleans())
@example(n=6, seed=0, positive=17986.0, negative=1e-6, rounded=False)  # what is least is nothing beside the most
def test_no_threshold_is_cheaper_than_the_chosen_one(
    n: int, seed: int, positive: float, negative: float, rounded: bool
) -> None:
    random = np.random.default_rng(seed)
    p1 = random.random(n).astype(np.float32)
    p1 = np.clip(np.round(p1, 1) if rounded else p1, 0.05, 0.95)  # rounded: equal ones
    p, y = np.stack([1 - p1, p1], axis=1), np.arange(n) % 2
    weights, costs = random.uniform(0.1, 3, n), Costs(positive, negative)
    chosen = choose_threshold(p, y, costs, weights)
    least = min(mean_cost(costs, p, y, weights, t) for t in np.concatenate([[0.0, 1.1], p[:, 1].astype(np.float64)]))
    assert mean_cost(costs, p, y, weights, chosen) == pytest.approx(least, rel=1e-9)


def test_of_equally_cheap_thresholds_the_nearest_to_that_of_true_probabilities_is_chosen() -> None:
    p1 = np.array([0.02, 0.05, 0.6, 0.9])
    p, y = np.stack([1 - p1, p1], axis=1), np.array([0, 0, 1, 1])
    assert choose_threshold(p, y, Costs(1, 5)) == Costs(1, 5).threshold == 1 / 6
    assert choose_threshold(p, y, Costs(5, 1)) == (0.05 + 0.6) / 2  # 5/6 would miss one


def test_with_rows_of_one_class_it_is_that_of_true_probabilities() -> None:
    assert choose_threshold(np.array([[0.4, 0.6], [0.7, 0.3]]), np.array([1, 1]), Costs(1, 3)) == 0.25


def test_a_mean_is_of_all_decisions() -> None:
    counts = [[90, 6], [1, 3]]
    assert Costs(1, 5).mean(counts) == (6 + 5) / 100
    assert Costs(1, 5).least_without_model(counts) == 4 * 5 / 100  # never
    assert Costs(1, 50).least_without_model(counts) == 96 / 100  # always


def model(costs: Costs | None, K: int = 2) -> BundleConfig:
    p = np.random.default_rng(0).dirichlet(np.ones(K), 60)
    scores = measure(p, np.arange(60) % K, 0.2)
    names = ("well", "ill", "dead")[:K]
    config = ClassifierConfig(features=1, classes=K, steps=9)
    return BundleConfig(config, names, ("x",), "f1", threshold=0.2, validation=scores, test=scores, costs=costs)


def test_a_model_keeps_them_and_its_card_says_what_decisions_cost() -> None:
    config = model(Costs(1, 5))
    assert from_json(to_json(config).encode(), "config.json") == config
    assert "costs" not in to_json(replace(config, costs=None))
    assert config.test is not None
    assert config.test.confusion == tuple(
        map(tuple, confusion(np.random.default_rng(0).dirichlet(np.ones(2), 60), np.arange(60) % 2, 0.2).tolist())
    )
    text = card.readme(config)
    assert "To take `well` for `ill` costs 1, to take `ill` for `well` 5." in text
    assert f"| test | {Costs(1, 5).mean(config.test.confusion):.4g} | 0.5 |" in text
    assert "## Decisions" not in card.readme(replace(config, costs=None))


@pytest.mark.parametrize("wrong", ['{"false_positive": 0, "false_negative": 1}', '{"false_positive": 1}', "[1, 5]"])
def test_a_model_with_others_is_refused(wrong: str) -> None:
    text = to_json(model(Costs(7, 9)))
    start = text.index("{", text.index('"costs"'))
    damaged = text[:start] + wrong + text[text.index("}", start) + 1 :]
    with pytest.raises(BundleError, match="costs"):
        from_json(damaged.encode(), "config.json")


def test_more_classes_have_none() -> None:
    with pytest.raises(BundleError, match="between two classes, got 3"):
        model(Costs(1, 5), 3)
