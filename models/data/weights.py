"""How much each sequence counts, in training and in scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpo.models.data.sequences import MISSING, DataError, is_missing, is_number

Weights = NDArray[np.float64]
_RULE = "a weight is a finite number of 0 or more"


def weights(values: Sequence[object] | NDArray[Any], at: Callable[[int], str]) -> Weights:
    """(R,) of numbers, or of texts that are some. `at` says where the i-th stands. Raises DataError."""
    found = np.array([_weight(value, i, at) for i, value in enumerate(values)], dtype=np.float64)
    for i in np.flatnonzero(~np.isfinite(found) | (found < 0)).tolist():
        raise DataError(f"{at(i)}: {_RULE}, got {found[i]:g}")
    return found + 0.0  # of -0.0: 0.0


def relative(weights: Weights | None) -> Weights | None:
    """The weights (N,) of a part, 1 in the mean; None where all are equal, so that none counts more than another."""
    if weights is None or (weights == weights[0]).all():
        return None
    largest = weights / weights.max()  # whose sum is a number
    return np.asarray(largest / largest.mean())


def _weight(value: object, i: int, at: Callable[[int], str]) -> float:
    text = value.decode(errors="replace") if isinstance(value, bytes) else value
    if is_missing(text) or (isinstance(text, str) and text.strip() in MISSING):
        raise DataError(f"{at(i)} has no weight: give every sequence one")
    if isinstance(text, str) and not is_number(text):
        raise DataError(f"{at(i)}: {text!r} is no weight: {_RULE}")
    if not isinstance(text, str | Real | np.generic):
        raise DataError(f"{at(i)}: {text!r} is no weight: {_RULE}")
    return float(text)
