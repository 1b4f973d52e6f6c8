"""How far a model's probabilities can be believed: temperature scaling, and what measures it.

A network that is right in 95 % of the cases may claim 99.9 %, or only 70 %. Temperature scaling (Guo, Pleiss, Sun and
Weinberger, ICML 2017) makes its probabilities p those of softmax(log p / T), with one number T for all rows: above 1
they become milder, below 1 sharper, and the most probable class stays the same.

Everywhere: probabilities (N, K) float, rows sum to 1; labels (N,) int; weights (N,) or None, as in
`hpo.models.metrics`, whose MetricError all functions raise for others. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpo.models.metrics import Floats, Labels, MetricError, counted, effective, predict_labels

BINS = 15  # of the expected calibration error, as Guo et al. have
COOLEST, HOTTEST = 1 / 20, 20.0  # temperatures, far beyond those of real networks (0.2 to 5)
PRIOR = 1.0  # what the prior for temperatures near 1 weighs, in rows
TINY = float(np.finfo(np.float32).tiny)  # stands for a probability of 0, whose logarithm is no number
HALF_STEP = 2.0**-25  # for a 1 - p of 0: half the distance of 1 to the next float32, which networks of two classes give
SHRUNK = (1.0, 0.5, 0.25, 0.125, 0.0)  # powers of a temperature that are tried until no predicted class changes

Bin = tuple[float, float, float]  # share of the rows, their mean confidence, their accuracy; zeros where there are none


@dataclass(frozen=True)
class Reliability:
    """How far the probability of the most probable class says how often it is right, on one part. JSON-able."""

    number: float  # of rows; of weighted ones as many equal ones as say as much (`metrics.effective`)
    ece: float  # see `expected_calibration_error`
    brier: float  # see `brier`
    bins: tuple[Bin, ...]  # see `reliability`


@dataclass(frozen=True)
class Comparison:
    """One part's reliability without and with the model's temperature. JSON-able."""

    before: Reliability
    after: Reliability

    @property
    def summary(self) -> dict[str, dict[str, float]]:
        """ECE and Brier score, both before and after; JSON-able."""
        both = {"before": self.before, "after": self.after}
        return {when: {"ece": each.ece, "brier": each.brier} for when, each in both.items()}


@dataclass(frozen=True)
class Calibration:
    """What a model gets of the predictions that it was chosen by."""

    temperature: float
    threshold: float  # of two classes: of the calibrated probability
    comparison: Comparison  # on these very predictions


def fit_temperature(probabilities: NDArray[Any], labels: Labels, weights: Floats | None = None) -> float:
    """The temperature T, between COOLEST and HOTTEST, by which softmax(log p / T) tells the labels best.

    Of b = 1 / T it minimises the weighted log-loss, summed over the rows, plus b - log b. The sum is convex in b, so
    its slope has one zero. Without the second term T would go to 0 where all rows are right, however few they are, and
    the model would claim certainty. The term is minus the logarithm of a Gamma(2, 1) density of b but for a constant,
    so b is the most probable one given that prior, whose own mode is 1; it has a row's weight, and what is fitted to
    hundreds of rows is Guo's T. Weighted rows count like as many equal ones as say as much (Kish).

    Smoothed targets, as Platt (1999) has for scores of support vector machines, are another guard: true classes get
    (n + 1) / (n + 2). They add an error at the rows' average margin, where models make none, and spoil good models with
    few rows: fitted to 20 predictions of a calibrated model that is right in 98.6 %, the log-loss on others goes from
    0.033 to 0.159, and to 0.034 with the prior (benchmarks/calibration.py).
    """
    from scipy.optimize import brentq  # a fifth of a second that a training does not need

    probabilities, labels, weights = counted(probabilities, labels, weights)
    weights = weights * (effective(weights) / weights.sum())
    logs = _logs(probabilities)
    found = weights @ logs[np.arange(len(labels)), labels]

    def slope(b: float) -> float:
        expected = weights @ (_softmax(b * logs) * logs).sum(axis=1)
        return float(expected - found + PRIOR * (1 - 1 / b))

    low, high = 1 / HOTTEST, 1 / COOLEST
    if slope(low) >= 0:
        return HOTTEST
    if slope(high) <= 0:
        return COOLEST
    return 1 / float(brentq(slope, low, high, xtol=1e-12))


def calibrate(probabilities: NDArray[Any], temperature: float) -> Floats:
    """softmax(log p / T) of each row, (N, K) float64; the same numbers for T = 1.

    Two classes: a function of the second one's probability alone, which rises with it. Networks give probabilities in
    float32: 0 counts as TINY, and a second class's 1 as 1 - HALF_STEP. A NaN makes its row NaN. Raises MetricError for
    a temperature that is not above 0.
    """
    if not temperature > 0:
        raise MetricError(f"a temperature must be above 0, got {temperature!r}")
    if temperature == 1:
        return probabilities.astype(np.float64)
    return _softmax(_logs(probabilities) / temperature)


def calibration_of(
    probabilities: NDArray[Any], labels: Labels, weights: Floats | None = None, threshold: float = 0.5
) -> Calibration:
    """Temperature and threshold for a model with these predictions of rows that it has not trained on.

    probabilities: float32 numbers, of whatever type. The new threshold is the old one's calibrated probability, so that
    with it no row here is called otherwise. Where float32 does not tell the two sides apart after the calibration, the
    threshold goes between what the rows have there, and if there is nothing between, the temperature closer to 1.
    """
    fitted = fit_temperature(probabilities, labels, weights)
    before, predicted = measure_reliability(probabilities, labels, weights), predict_labels(probabilities, threshold)
    for power in SHRUNK:
        temperature = fitted**power
        scaled = calibrate(probabilities, temperature).astype(np.float32)
        for candidate in _thresholds(threshold, temperature, scaled, predicted):
            if (predict_labels(scaled, candidate) == predicted).all():
                comparison = Comparison(before, measure_reliability(scaled, labels, weights))
                return Calibration(temperature, candidate, comparison)
    return Calibration(1.0, threshold, Comparison(before, before))


def measure_reliability(
    probabilities: NDArray[Any], labels: Labels, weights: Floats | None = None, bins: int = BINS
) -> Reliability:
    """Everything of a `Reliability`."""
    counting = counted(probabilities, labels, weights)[2]
    table = reliability(probabilities, labels, weights, bins)
    return Reliability(
        number=effective(counting),
        ece=_error(table),
        brier=brier(probabilities, labels, weights),
        bins=tuple((share, confidence, accuracy) for share, confidence, accuracy in table.tolist()),
    )


def reliability(probabilities: NDArray[Any], labels: Labels, weights: Floats | None = None, bins: int = BINS) -> Floats:
    """(bins, 3): of the rows whose highest probability lies in ((m - 1) / bins, m / bins] their share, the mean of that
    probability (the confidence) and how many of them are of that class (the accuracy); zeros of a bin without rows.

    The class is the most probable one, also where a threshold decides otherwise.
    """
    probabilities, labels, weights = counted(probabilities, labels, weights)
    confidence, right = probabilities.max(axis=1).astype(np.float64), probabilities.argmax(axis=1) == labels
    at = np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], confidence)
    sums = np.stack([np.bincount(at, weights * each, minlength=bins) for each in (1.0, confidence, right)], axis=1)
    total, share = sums[:, :1], sums[:, 0] / weights.sum()
    return np.column_stack([share, sums[:, 1:] / np.where(total > 0, total, 1.0)])


def expected_calibration_error(
    probabilities: NDArray[Any], labels: Labels, weights: Floats | None = None, bins: int = BINS
) -> float:
    """ECE: the distance of accuracy and confidence, averaged over the bins of `reliability` by their shares (Naeini,
    Cooper and Hauskrecht, AAAI 2015; Guo et al., equation 3). It is above 0 by chance, too: with few rows a bin."""
    return _error(reliability(probabilities, labels, weights, bins))


def brier(probabilities: NDArray[Any], labels: Labels, weights: Floats | None = None) -> float:
    """The squared distance of probabilities and truth, summed over the classes, averaged over the rows: 0 to 2 (Brier,
    Monthly Weather Review 78, 1950). Of two classes it is twice what is often called so, of one class alone."""
    probabilities, labels, weights = counted(probabilities, labels, weights)
    distances = probabilities.astype(np.float64) - np.eye(probabilities.shape[1])[labels]
    return float(weights @ (distances**2).sum(axis=1) / weights.sum())


def _error(table: Floats) -> float:
    share, confidence, accuracy = table.T
    return float(share @ np.abs(accuracy - confidence))


def _thresholds(threshold: float, temperature: float, scaled: NDArray[np.float32], predicted: Labels) -> list[float]:
    """What may decide after the calibration, the first choice first: scaled (N, K), predicted (N,) what it was before.

    Thresholds of 0 or less, which every row reaches, and above 1, which none does, remain.
    """
    if scaled.shape[1] != 2 or temperature == 1 or not 0 < threshold <= 1:
        return [threshold]
    second = scaled[:, 1].astype(np.float64)
    below, above = second[predicted == 0].max(initial=0.0), second[predicted == 1].min(initial=1.0)
    return [float(calibrate(np.array([[1 - threshold, threshold]]), temperature)[0, 1]), float(below + above) / 2]


def _logs(probabilities: NDArray[Any]) -> Floats:
    """Logarithms (N, K) in float64, none of them infinite."""
    if probabilities.shape[1] != 2:
        return np.log(np.maximum(probabilities.astype(np.float64), TINY))
    second = probabilities[:, 1].astype(np.float64)  # alone: means of float32 numbers do not quite sum to 1
    return np.log(np.maximum(np.stack([1 - second, second], axis=1), [HALF_STEP, TINY]))


def _softmax(logits: Floats) -> Floats:
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(shares / shares.sum(axis=1, keepdims=True))
