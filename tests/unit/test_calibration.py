"""Temperature scaling and its measures: compared with plain references, and what holds of every input."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss

from hpo.models.calibration import (
    BINS,
    COOLEST,
    HALF_STEP,
    HOTTEST,
    Comparison,
    brier,
    calibrate,
    calibration_of,
    expected_calibration_error,
    fit_temperature,
    measure_reliability,
    reliability,
)
from hpo.models.metrics import MetricError, predict_labels, score

Floats = NDArray[np.float64]
Labels = NDArray[np.int64]


def drawn(n: int, K: int, temperature: float, scale: float = 3.0, seed: int = 0) -> tuple[Floats, Labels]:
    """Predictions (n, K) of a model whose probabilities become true ones by this temperature, and labels."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, K)) * scale
    true = softmax(logits, axis=1)
    labels = (true.cumsum(1) < rng.random((n, 1))).sum(1).clip(max=K - 1)
    return softmax(logits * temperature, axis=1), labels


@st.composite
def predictions(draw: st.DrawFn, K: int | None = None) -> tuple[Floats, Labels]:
    """As networks give them, float32 in whatever type, some of them certain or equal; with labels."""
    classes = draw(st.sampled_from([2, 3, 5])) if K is None else K
    n = draw(st.integers(1, 12))
    logits = draw(
        hnp.arrays(np.float32, (n, classes), elements=st.floats(-120, 120, width=32) | st.sampled_from([0, 1e-7]))
    )
    if classes == 2:
        with np.errstate(over="ignore"):
            second = 1 / (1 + np.exp(-logits[:, 0]))
        found = np.stack([1 - second, second], axis=1)
    else:
        found = softmax(logits, axis=1)
    labels = draw(hnp.arrays(np.int64, n, elements=st.integers(0, classes - 1)))
    return found.astype(np.float32).astype(np.float64), labels


temperatures = st.floats(COOLEST, HOTTEST)


class TestFit:
    @pytest.mark.parametrize("K", [2, 10])
    @pytest.mark.parametrize("temperature", [0.3, 1.0, 3.0])
    def test_many_rows_give_the_temperature_that_the_model_needs(self, K: int, temperature: float) -> None:
        assert fit_temperature(*drawn(20_000, K, temperature)) == pytest.approx(temperature, rel=0.05)

    @pytest.mark.parametrize("K", [2, 10])
    @pytest.mark.parametrize("temperature", [0.3, 3.0])
    def test_many_rows_give_the_lowest_log_loss(self, K: int, temperature: float) -> None:
        """Of scipy's minimiser over T, of the plain log-loss as Guo et al. have it."""
        probabilities, labels = drawn(5_000, K, temperature)
        weights = np.random.default_rng(1).integers(1, 4, 5_000).astype(float)

        def loss(T: float) -> float:
            rows = log_softmax(np.log(probabilities) / T, axis=1)[np.arange(len(labels)), labels]
            return float(-(weights @ rows) / weights.sum())

        expected = minimize_scalar(loss, bounds=(0.05, 20), method="bounded", options={"xatol": 1e-9}).x
        assert fit_temperature(probabilities, labels, weights) == pytest.approx(expected, rel=0.01)

    def test_few_rows_give_the_lowest_log_loss_with_its_prior(self) -> None:
        probabilities, labels = drawn(9, 3, 3.0)

        def loss(b: float) -> float:
            rows = log_softmax(b * np.log(probabilities), axis=1)[np.arange(9), labels]
            return float(-rows.sum() + b - np.log(b))

        expected = minimize_scalar(loss, bounds=(0.05, 20), method="bounded", options={"xatol": 1e-10}).x
        assert fit_temperature(probabilities, labels) == pytest.approx(1 / expected, rel=1e-6)

    @pytest.mark.parametrize("n", [1, 5, 70])
    def test_rows_that_are_all_right_make_no_certainty(self, n: int) -> None:
        """The log-loss alone is lowest at T = 0."""
        temperature = fit_temperature(np.tile([0.3, 0.7], (n, 1)), np.ones(n, np.int64))
        assert COOLEST < temperature < 1
        sure = calibrate(np.array([[0.3, 0.7]]), temperature)[0, 1]
        assert 0.7 < sure < 1 - 0.1 / n

    def test_rows_that_are_all_wrong_become_no_even_chance(self) -> None:
        temperature = fit_temperature(np.tile([0.1, 0.9], (5, 1)), np.zeros(5, np.int64))
        assert 1 < temperature < HOTTEST

    def test_it_lies_within_its_bounds(self) -> None:
        assert fit_temperature(np.tile([0.1, 0.9], (10_000, 1)), np.zeros(10_000, np.int64)) == HOTTEST
        assert fit_temperature(np.tile([0.45, 0.55], (10**6, 1)), np.ones(10**6, np.int64)) == COOLEST

    @pytest.mark.parametrize("K", [2, 3])
    def test_predictions_that_say_nothing_are_left_alone(self, K: int) -> None:
        assert fit_temperature(np.full((50, K), 1 / K), np.arange(50) % K) == pytest.approx(1)

    def test_certain_predictions_are_numbers(self) -> None:
        labels = np.arange(40) % 2
        assert fit_temperature(np.eye(2)[labels], labels) == pytest.approx(1, abs=0.01)
        labels[0] = 1
        assert fit_temperature(np.eye(2)[np.arange(40) % 2], labels) > 2

    def test_as_many_rows_as_weights_say(self) -> None:
        probabilities, labels = drawn(60, 3, 2.0)
        twice = fit_temperature(np.repeat(probabilities, 2, axis=0), np.repeat(labels, 2))
        weights = np.ones(60)
        weights[30:] = 3
        once = fit_temperature(probabilities, labels, weights)
        assert once == fit_temperature(probabilities, labels, weights * 1000)
        assert once != pytest.approx(fit_temperature(probabilities, labels), rel=1e-3)
        assert twice != pytest.approx(once, rel=1e-3)

    @settings(deadline=None)
    @given(predictions(), st.randoms(use_true_random=False))
    def test_rows_of_no_weight_and_their_order_change_nothing(self, found: Any, random: Any) -> None:
        probabilities, labels = found
        expected = fit_temperature(probabilities, labels)
        assert COOLEST <= expected <= HOTTEST
        more = np.concatenate([probabilities, probabilities[::-1]]), np.concatenate([labels, np.zeros_like(labels)])
        weights = np.repeat([2.0, 0.0], len(labels))
        assert fit_temperature(*more, weights) == expected
        order = list(range(len(labels)))
        random.shuffle(order)
        assert fit_temperature(probabilities[order], labels[order]) == pytest.approx(expected, rel=1e-6)


class TestCalibrate:
    @pytest.mark.parametrize("K", [2, 4])
    def test_is_the_softmax_of_the_logits_by_the_temperature(self, K: int) -> None:
        logits = np.random.default_rng(0).normal(size=(50, K)) * 4
        found = calibrate(softmax(logits, axis=1), 2.5)
        np.testing.assert_allclose(found, softmax(logits / 2.5, axis=1), rtol=1e-9)

    @given(predictions())
    def test_of_1_changes_nothing(self, found: Any) -> None:
        np.testing.assert_array_equal(calibrate(found[0], 1.0), found[0])

    @given(predictions(), temperatures)
    def test_gives_probabilities_and_keeps_what_is_most_probable(self, found: Any, temperature: float) -> None:
        before = found[0]
        after = calibrate(before, temperature)
        assert np.isfinite(after).all()
        np.testing.assert_allclose(after.sum(axis=1), 1, atol=1e-12)
        rows = np.arange(len(before))
        np.testing.assert_array_equal(after[rows, before.argmax(axis=1)], after.max(axis=1))

    @given(predictions(K=2), temperatures)
    def test_of_two_classes_keeps_the_order_of_rows(self, found: Any, temperature: float) -> None:
        before = found[0][found[0][:, 1].argsort(), 1]
        after = calibrate(np.stack([1 - before, before], axis=1), temperature)[:, 1]
        assert (np.diff(after) >= 0).all()

    def test_the_order_is_strict_for_all_but_the_closest_numbers(self) -> None:
        second = np.array([1e-30, 1e-12, 2e-12, 1e-3, 0.3, 0.9, 1 - 2 * 2.0**-24, 1 - 2.0**-24, 1])
        for temperature in (0.5, 3.0):
            assert (np.diff(calibrate(np.stack([1 - second, second], axis=1), temperature)[:, 1]) > 0).all()

    def test_certainty_is_what_float32_can_say(self) -> None:
        (certain,) = calibrate(np.array([[0.0, 1.0]]), 2.0)
        assert certain[0] == pytest.approx(HALF_STEP**0.5, rel=1e-3)

    def test_a_row_without_numbers_has_none_afterwards(self) -> None:
        found = calibrate(np.array([[np.nan, np.nan, np.nan], [0.2, 0.3, 0.5]]), 2.0)
        assert np.isnan(found).all(axis=1).tolist() == [True, False]

    @pytest.mark.parametrize("temperature", [0, -1, float("nan")])
    def test_a_temperature_must_be_above_0(self, temperature: float) -> None:
        with pytest.raises(MetricError, match=f"a temperature must be above 0, got {temperature}"):
            calibrate(np.array([[0.5, 0.5]]), temperature)


class TestMeasures:
    @pytest.mark.parametrize("K", [2, 5])
    @pytest.mark.parametrize("n", [1, 7, 3_000])
    def test_bins_are_those_of_scikit_learn(self, K: int, n: int) -> None:
        probabilities, labels = drawn(n, K, 2.0)
        table = reliability(probabilities, labels)
        right, confidence = probabilities.argmax(axis=1) == labels, probabilities.max(axis=1)
        accuracies, confidences = calibration_curve(right, confidence, n_bins=BINS, strategy="uniform")
        filled = table[table[:, 0] > 0]
        np.testing.assert_allclose(filled[:, 1], confidences)
        np.testing.assert_allclose(filled[:, 2], accuracies)
        assert table.shape == (BINS, 3)
        assert table[:, 0].sum() == pytest.approx(1)
        assert (table[table[:, 0] == 0] == 0).all()

    def test_the_error_by_hand(self) -> None:
        """Bins (0.5, 0.75] and (0.75, 1]: of two rows one is right at 0.6, of one none at 0.9."""
        probabilities = np.array([[0.4, 0.6], [0.6, 0.4], [0.1, 0.9]])
        found = expected_calibration_error(probabilities, np.array([1, 1, 0]), bins=4)
        assert found == pytest.approx(2 / 3 * abs(0.5 - 0.6) + 1 / 3 * abs(0 - 0.9))
        weighted = expected_calibration_error(probabilities, np.array([1, 1, 0]), np.array([1.0, 1.0, 2.0]), bins=4)
        assert weighted == pytest.approx(1 / 2 * abs(0.5 - 0.6) + 1 / 2 * abs(0 - 0.9))

    @pytest.mark.parametrize("K", [2, 5])
    @pytest.mark.parametrize("weighted", [False, True])
    def test_the_brier_score_is_that_of_scikit_learn(self, K: int, weighted: bool) -> None:
        probabilities, labels = drawn(200, K, 2.0)
        weights = np.random.default_rng(0).random(200) if weighted else None
        expected = brier_score_loss(
            labels, probabilities, sample_weight=weights, scale_by_half=False, labels=list(range(K))
        )
        assert brier(probabilities, labels, weights) == pytest.approx(expected)
        if K == 2:
            one = brier_score_loss(labels, probabilities[:, 1], sample_weight=weights)
            assert brier(probabilities, labels, weights) == pytest.approx(2 * one)

    @given(predictions(), st.randoms(use_true_random=False))
    def test_rows_of_no_weight_and_their_order_change_nothing(self, found: Any, random: Any) -> None:
        probabilities, labels = found
        expected = measure_reliability(probabilities, labels)
        assert 0 <= expected.ece <= 1
        assert 0 <= expected.brier <= 2
        assert expected.number == len(labels)
        more = np.concatenate([probabilities, probabilities[::-1]]), np.concatenate([labels, np.zeros_like(labels)])
        assert asdict(measure_reliability(*more, np.repeat([3.0, 0.0], len(labels)))) == asdict(expected)
        order = list(range(len(labels)))
        random.shuffle(order)
        shuffled = measure_reliability(probabilities[order], labels[order])
        assert shuffled.ece == pytest.approx(expected.ece, abs=1e-12)
        assert shuffled.brier == pytest.approx(expected.brier, abs=1e-12)

    def test_weights_count_like_rows(self) -> None:
        probabilities, labels = drawn(40, 3, 2.0)
        times = np.random.default_rng(0).integers(1, 5, 40)
        once = measure_reliability(probabilities, labels, times.astype(float))
        often = measure_reliability(np.repeat(probabilities, times, axis=0), np.repeat(labels, times))
        assert once.ece == pytest.approx(often.ece)
        assert once.brier == pytest.approx(often.brier)
        assert once.number == pytest.approx(times.sum() ** 2 / (times**2).sum())

    def test_what_is_no_prediction_is_refused(self) -> None:
        for measure in (brier, expected_calibration_error, fit_temperature, measure_reliability):
            with pytest.raises(MetricError, match="must be at least 0 and sum to 1"):
                measure(np.array([[3.0, -2.0]]), np.array([0]))


class TestCalibration:
    @settings(deadline=None)
    @given(predictions(), st.floats(0, 1) | st.sampled_from([0.0, 0.5, 1.0]))
    def test_no_predicted_class_changes(self, found: Any, threshold: float) -> None:
        probabilities, labels = found
        before = predict_labels(probabilities, threshold)
        calibration = calibration_of(probabilities, labels, None, threshold)
        given = calibrate(probabilities, calibration.temperature).astype(np.float32)
        np.testing.assert_array_equal(predict_labels(given, calibration.threshold), before)

    @settings(deadline=None)
    @given(predictions(K=2), st.integers(0, 11))
    def test_nor_where_the_threshold_is_a_rows_probability_or_next_to_it(self, found: Any, row: int) -> None:
        probabilities, labels = found
        at = probabilities[row % len(labels), 1]
        for threshold in (at, np.nextafter(at, 0), np.nextafter(at, 1)):
            before = predict_labels(probabilities, threshold)
            calibration = calibration_of(probabilities, labels, None, float(threshold))
            given = calibrate(probabilities, calibration.temperature).astype(np.float32)
            np.testing.assert_array_equal(predict_labels(given, calibration.threshold), before)

    def test_rows_that_float32_tells_apart_before_and_not_afterwards(self) -> None:
        """At T = 20 half and the number below it are one, so the temperature is closer to 1."""
        below = np.float64(np.nextafter(np.float32(0.5), np.float32(0)))
        wrong = np.tile([0.1, 0.9], (5_000, 1))
        probabilities = np.concatenate([[[0.5, 0.5], [1 - below, below]], wrong])
        labels = np.zeros(5_002, np.int64)
        assert fit_temperature(probabilities, labels) == HOTTEST
        found = calibration_of(probabilities, labels)
        assert 1 <= found.temperature < HOTTEST
        given = calibrate(probabilities, found.temperature).astype(np.float32)
        assert predict_labels(given, found.threshold)[:2].tolist() == [1, 0]

    @pytest.mark.parametrize("threshold", [0.2, 0.5, 0.9])
    def test_the_threshold_goes_the_way_of_the_probabilities(self, threshold: float) -> None:
        probabilities, labels = drawn(500, 2, 3.0)
        found = calibration_of(probabilities.astype(np.float32), labels, None, threshold)
        odds = (threshold / (1 - threshold)) ** (1 / found.temperature)
        assert found.threshold == pytest.approx(odds / (1 + odds))
        assert abs(found.threshold - 0.5) <= abs(threshold - 0.5)

    @pytest.mark.parametrize("threshold", [-0.1, 0.0, 1.5])
    def test_a_threshold_that_all_rows_reach_or_none_remains(self, threshold: float) -> None:
        assert calibration_of(*drawn(50, 2, 3.0), None, threshold).threshold == threshold

    @pytest.mark.parametrize("K", [2, 10])
    @pytest.mark.parametrize("temperature", [0.4, 2.5])
    def test_other_rows_of_the_same_kind_are_told_better(self, K: int, temperature: float) -> None:
        probabilities, labels = drawn(300, K, temperature)
        found = calibration_of(probabilities, labels)
        others, truth = drawn(3_000, K, temperature, seed=1)
        given = calibrate(others, found.temperature)
        assert score("log_loss", given, truth) < score("log_loss", others, truth)
        assert expected_calibration_error(given, truth) < 0.5 * expected_calibration_error(others, truth)
        assert brier(given, truth) < brier(others, truth)

    def test_says_what_it_has_brought_where_it_was_fitted(self) -> None:
        probabilities, labels = drawn(300, 3, 3.0)
        weights = np.random.default_rng(0).random(300)
        found = calibration_of(probabilities.astype(np.float32), labels, weights)
        given = calibrate(probabilities.astype(np.float32), found.temperature).astype(np.float32)
        expected = Comparison(
            measure_reliability(probabilities.astype(np.float32), labels, weights),
            measure_reliability(given, labels, weights),
        )
        assert found.comparison == expected
