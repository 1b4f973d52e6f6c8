"""Which finalist wins, and what the finals say of it."""

from __future__ import annotations

import math
from statistics import mean, stdev

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import t

from hpo.models.data.sequences import Sequences, from_arrays
from hpo.models.metrics import measure
from hpo.promote.finals import estimate, winner
from hpo.promote.trained import Trained, pooled
from hpo.study.config import from_dict
from hpo.study.finals import Finalist
from hpo.study.plan import Final, Plan, validation_parts
from hpo.study.record import TrialRecord


def plan(metric: str = "accuracy", sequences: int = 100, **data: object) -> Plan:
    config = from_dict(
        {
            "study": {"name": "waves", "metric": metric},
            "data": {"train": "waves.npz", "validation": {"folds": 5}} | data,
        }
    )
    return Plan(config, config, "data-0", None, ("a", "b"), ("x0",), 10, sequences, rules=5)


def finalist(number: int, *values: float, parameters: int = 100, log_loss: float = 0.3) -> Finalist:
    """Of these fresh values, in the order of its repeats."""
    repeats = {
        repeat: TrialRecord(repeat, repeat, value, True, 0, parameters=parameters, log_loss=log_loss)
        for repeat, value in enumerate(values, 1)
    }
    return Finalist(TrialRecord(number, number, 0.99, True, 0), repeats)


def numbers(*finalists: Finalist, metric: str = "accuracy") -> int:
    found = winner(finalists, plan(metric))
    assert found is not None
    return found.record.number


def test_the_best_mean_of_fresh_values_wins_whatever_the_study_said() -> None:
    assert numbers(finalist(7, 0.80, 0.81, 0.79), finalist(3, 0.90, 0.91, 0.92)) == 3


def test_a_metric_to_minimise_is_minimised() -> None:
    assert numbers(finalist(7, 0.2, 0.3), finalist(3, 0.9, 1.0), metric="log_loss") == 7


def test_of_those_that_the_fresh_values_do_not_tell_apart_the_one_with_the_fewest_weights_wins() -> None:
    large, small = finalist(1, 0.90, 0.96, 0.90, parameters=9_000), finalist(2, 0.92, 0.90, 0.92, parameters=90)
    assert numbers(large, small) == 2
    assert numbers(small, large) == 2


def test_values_are_compared_in_pairs_so_that_a_hard_split_makes_no_difference() -> None:
    """One is better by 0.02 on each of three splits, which differ by far more among themselves."""
    better, worse = finalist(1, 0.72, 0.92, 0.82, parameters=9_000), finalist(2, 0.70, 0.90, 0.80, parameters=90)
    assert numbers(better, worse) == 1


def test_a_difference_of_less_than_half_a_sequence_is_none() -> None:
    assert numbers(finalist(1, 0.9004, 0.9004, parameters=9_000), finalist(2, 0.90, 0.90, parameters=90)) == 2


def test_equal_ones_of_one_size_go_by_log_loss() -> None:
    assert numbers(finalist(1, 0.9, 0.9, log_loss=0.4), finalist(2, 0.9, 0.9, log_loss=0.2)) == 2


def test_one_that_lacks_a_repeat_takes_no_part() -> None:
    assert numbers(finalist(1, 0.99), finalist(2, 0.8, 0.8)) == 2
    assert numbers(finalist(1, 0.99), finalist(2, 0.8)) == 1


def test_finals_without_a_whole_training_have_no_winner() -> None:
    assert winner([], plan()) is None
    assert winner([finalist(1), finalist(2)], plan()) is None


@given(
    values=st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3), min_size=1, max_size=5),
    sizes=st.lists(st.integers(1, 1000), min_size=5, max_size=5),
)
def test_nobody_wins_who_is_told_from_a_better_one(values: list[list[float]], sizes: list[int]) -> None:
    all_of_them = [finalist(i, *row, parameters=sizes[i]) for i, row in enumerate(values)]
    chosen = numbers(*all_of_them)
    best = max(range(len(values)), key=lambda i: (mean(values[i]), -i))
    gaps = [a - b for a, b in zip(values[best], values[chosen], strict=True)]
    assert mean(gaps) <= max(stdev(gaps) / math.sqrt(3), plan().resolution) + 1e-12
    told = [
        abs(mean(gaps)) > max(stdev(gaps) / math.sqrt(3), plan().resolution)
        for row in values
        if (gaps := [a - b for a, b in zip(values[best], row, strict=True)])
    ]
    equal = [sizes[i] for i, far in enumerate(told) if not far]
    assert sizes[chosen] == min(equal)


# ----------------------------------------------------------------------------------------------- how good the winner is


def scored(right: int, n: int = 100) -> object:
    """Accuracy right / n."""
    labels = np.arange(n) % 2
    said = np.where(np.arange(n) < right, labels, 1 - labels)
    return measure(np.eye(2)[said] * 0.8 + 0.1, labels.astype(np.int64))


def test_the_estimate_is_the_mean_with_an_interval_of_sequences_and_of_repeats() -> None:
    scores, own = {1: scored(90), 2: scored(94), 3: scored(92)}, finalist(1, 0.90, 0.94, 0.92)
    found = estimate(own, [own, finalist(2, 0.80, 0.90)], "accuracy", scores, scores[1])  # type: ignore[arg-type]
    assert found.value == pytest.approx(0.92)
    assert found.values == (0.90, 0.94, 0.92)
    assert found.selected == 0.99
    rows = [each.intervals["accuracy"] for each in scores.values()]  # type: ignore[attr-defined]
    below = mean([0.90, 0.94, 0.92]) - mean(low for low, _ in rows)
    deviation = math.sqrt((2 * 0.02**2 + 2 * 0.05**2) / 3)  # within both, of three degrees of freedom
    repeats = t.ppf(0.975, 3) * deviation / math.sqrt(3)
    assert found.interval[0] == pytest.approx(0.92 - math.hypot(below, repeats))
    assert found.interval[1] <= 1.0


def test_the_interval_holds_that_of_the_model_which_is_better_than_its_repeats() -> None:
    scores, own, model = {1: scored(90), 2: scored(90)}, finalist(1, 0.90, 0.90), scored(98)
    found = estimate(own, [own], "accuracy", scores, model)  # type: ignore[arg-type]
    assert found.value == pytest.approx(0.90)
    assert found.interval[1] == model.intervals["accuracy"][1]  # type: ignore[attr-defined]
    assert found.interval[0] == pytest.approx(scores[1].intervals["accuracy"][0])  # type: ignore[attr-defined]


def test_one_repeat_has_the_interval_of_its_sequences() -> None:
    scores = {1: scored(90)}
    found = estimate(finalist(1, 0.90), [finalist(1, 0.90)], "accuracy", scores, scores[1])  # type: ignore[arg-type]
    assert found.interval == pytest.approx(scores[1].intervals["accuracy"])  # type: ignore[attr-defined]


def test_all_right_is_not_said_to_be_certain() -> None:
    scores, own = {repeat: scored(40, 40) for repeat in (1, 2, 3)}, finalist(1, 1.0, 1.0, 1.0)
    found = estimate(own, [own], "accuracy", scores, scores[1])  # type: ignore[arg-type]
    assert found.value == 1.0
    assert found.interval[0] < 0.95
    assert found.interval[1] == 1.0


# ---------------------------------------------------------------------------------------------- repeats as one model


def sequences(n: int = 12) -> Sequences:
    X = np.random.default_rng(0).normal(size=(n, 5, 1))
    return from_arrays(X, np.array(["a", "b"])[np.arange(n) % 2])


def trained(rows: list[int], chances: list[float], *, chosen: bool = False) -> Trained:
    probabilities = np.array([[1 - p, p] for p in chances])
    labels = np.array(rows) % 2
    scores = measure(probabilities, labels)
    return Trained([{}], scores, np.array(rows), probabilities, 0.5, chosen, 0)


def test_each_sequence_is_scored_by_the_mean_of_those_that_validated_on_it() -> None:
    first, second = trained([0, 1, 2], [0.2, 0.4, 0.6]), trained([1, 2, 3], [0.8, 0.2, 0.9])
    found = pooled(plan(), {1: first, 2: second}, sequences())
    assert found.rows.tolist() == [0, 1, 2, 3]
    assert found.probabilities[:, 1] == pytest.approx([0.2, 0.6, 0.4, 0.9])
    assert found.scores.metrics["accuracy"] == 1.0
    assert found.scores.sequences == 4
    assert len(found.members) == 2


def test_a_chosen_threshold_is_chosen_by_the_means() -> None:
    first = trained([0, 1, 2, 3], [0.1, 0.3, 0.2, 0.35], chosen=True)
    found = pooled(plan(), {1: first}, sequences())
    assert 0.2 < found.threshold < 0.3
    assert found.scores.metrics["accuracy"] == 1.0
    assert pooled(plan(), {1: trained([0, 1, 2, 3], [0.1, 0.3, 0.2, 0.35])}, sequences()).threshold == 0.5


# ---------------------------------------------------------------------------------------------------- seeds and splits


def test_a_repeat_has_the_same_seed_and_split_for_all_finalists_and_others_than_the_study() -> None:
    finals = (Final(3, 1, {}), Final(5, 1, {}), Final(3, 2, {}), Final(5, 2, {}))
    own = plan()
    companion = Plan(own.config, own.written, own.train, None, own.classes, own.features, 10, 100, finals=finals)
    seeds = [companion.trial_seed(number) for number in range(4)]
    assert seeds[0] == seeds[1] != seeds[2] == seeds[3]
    assert not set(seeds) & {own.trial_seed(number) for number in range(100)}
    assert [companion.split(number) for number in range(4)] == [1, 1, 2, 2]
    assert own.split(3) == 0


def test_fresh_splits_differ_and_cover_as_the_studys_own_does() -> None:
    data, own = sequences(40), plan(sequences=40)
    parts = [validation_parts(own.config, data, own.rules, split) for split in range(4)]
    assert len({tuple(map(tuple, (rows for _, rows in part))) for part in parts}) == 4
    for part in parts:
        assert sorted(np.concatenate([rows for _, rows in part]).tolist()) == list(range(40))
    assert [rows.tolist() for _, rows in validation_parts(own.config, data, own.rules)] == [
        rows.tolist() for _, rows in parts[0]
    ]


def test_a_plan_with_finals_is_kept_as_json() -> None:
    own = plan()
    finals = (Final(3, 1, {"hidden_size": 8, "learning_rate": 0.01, "stem": "conv", "skip": True}),)
    companion = Plan(own.config, own.written, own.train, None, own.classes, own.features, 10, 100, finals=finals)
    assert Plan.from_json(companion.to_json()).finals == finals
    assert Plan.from_json({key: value for key, value in own.to_json().items() if key != "finals"}).finals == ()
