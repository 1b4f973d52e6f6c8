"""Greedy selection: which finalists predict together, and that they are never worse than the winner alone."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpo.models.config import METRICS
from hpo.models.costs import Costs
from hpo.models.metrics import measure, score
from hpo.promote.ensemble import ROUNDS, select
from hpo.promote.trained import Trained, mixed
from hpo.study.ranking import rank
from tests.unit.test_finals import plan, sequences

N = 12
LABELS = np.arange(N) % 2


def trained(chances: list[float], *, chosen: bool = False) -> Trained:
    probabilities = np.array([[1 - p, p] for p in chances])
    scores = measure(probabilities, LABELS)
    return Trained([{}], scores, np.arange(N), probabilities, 0.5, chosen, 0)


def wrong_in(*rows: int, sure: float = 0.9) -> Trained:
    """Right in all but some sequences."""
    return trained([sure if LABELS[row] != (row in rows) else 1 - sure for row in range(N)])


def test_those_that_are_wrong_elsewhere_are_right_together() -> None:
    parts = {4: wrong_in(0), 7: wrong_in(1), 9: wrong_in(2)}
    weights = select(plan(sequences=N), parts, 4, sequences(N))
    assert next(iter(weights)) == 4
    assert weights.keys() == parts.keys()
    assert sum(weights.values()) == pytest.approx(1)
    found = mixed(plan(), parts, weights, sequences(N))
    assert found.scores.metrics["accuracy"] == 1.0
    assert len(found.members) == 3


def test_the_first_stays_alone_where_no_other_makes_it_better() -> None:
    assert select(plan(sequences=N), {4: wrong_in(), 7: wrong_in(0, 1, 2)}, 4, sequences(N)) == {4: 1.0}
    assert select(plan(sequences=N), {4: wrong_in()}, 4, sequences(N)) == {4: 1.0}


def test_a_better_one_counts_more() -> None:
    parts = {4: wrong_in(0, 1, 2, 3, sure=0.6), 7: wrong_in(4)}
    weights = select(plan("log_loss"), parts, 4, sequences(N))
    assert weights[7] > weights[4] > 0
    assert all(weight * ROUNDS >= 1 for weight in weights.values())


def test_only_what_may_be_one_model_is_chosen() -> None:
    parts = {4: wrong_in(0), 7: wrong_in(1), 9: wrong_in(2)}

    def two(chosen: Collection[int]) -> bool:
        return len(chosen) < 3

    assert len(select(plan(sequences=N), parts, 4, sequences(N), two)) == 2
    assert select(plan(sequences=N), parts, 4, sequences(N), lambda chosen: len(chosen) < 2) == {4: 1.0}


def test_a_threshold_is_chosen_for_all_together() -> None:
    """By the first one's way: here by the metric, or by what wrong decisions cost."""
    parts = {4: trained([0.05 + 0.01 * row + 0.2 * LABELS[row] for row in range(N)], chosen=True), 7: wrong_in(0)}
    found = mixed(plan(), parts, {4: 1.0}, sequences(N))
    assert found.scores.metrics["accuracy"] == 1.0
    assert found.threshold < 0.3
    asked = plan()
    promote = asked.config.promote.__class__(costs=Costs(50, 1))
    object.__setattr__(asked.config, "promote", promote)
    assert mixed(asked, parts, {4: 0.5, 7: 0.5}, sequences(N)).threshold > found.threshold


CHANCES = st.lists(st.floats(0.01, 0.99), min_size=N, max_size=N)


@given(st.lists(CHANCES, min_size=1, max_size=4), st.sampled_from(METRICS))
def test_together_they_are_never_worse_than_the_first(all_of_them: list[list[float]], metric: str) -> None:
    parts = {number: trained(chances) for number, chances in enumerate(all_of_them)}
    asked = plan(metric, sequences=N)
    weights = select(asked, parts, 0, sequences(N))
    assert next(iter(weights)) == 0
    assert sum(weights.values()) == pytest.approx(1)
    both = [parts[0].probabilities, mixed(asked, parts, weights, sequences(N)).probabilities]
    scores = {i: (score(metric, p, LABELS), score("log_loss", p, LABELS)) for i, p in enumerate(both)}
    if scores[0] != pytest.approx(scores[1]):
        assert rank(scores, metric, asked.resolution)[0] == 1
