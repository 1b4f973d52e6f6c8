"""What a network is told of the gaps in its data: which values stood in the source, and how long before that.

Shapes: N sequences, T steps, F features.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from hpo.models.config import ClassifierConfig
from hpo.models.data.buffers import pieces_of
from hpo.models.data.sequences import DataError, Sequences, Values, are_even, distances, median

AT_ONCE = 2**20  # numbers whose times are looked at in one go
LONG = 1.5  # usual intervals between two steps from which on there is a gap
LONGEST = 2.0**100  # usual intervals, from which on a time says nothing more
TIMES_NEEDED = (
    "the model was trained with the times of steps at unequal distances; give a table in long form, with a column of "
    "steps, or one of one sequence a row whose columns are named by their times, or beside arrays `steps` (N, T)"
)


def without_gaps(sequences: Sequences) -> Sequences:
    """The same as if every value had stood in the source, which did not say when the steps were."""
    return replace(sequences, observed=None, times=None, spacing=None)


def usual_distance(sequences: Sequences) -> float | None:
    """The median distance of neighbouring steps, 0 where there are none; None: not known."""
    far = _distances(sequences)
    if far is None:
        return sequences.spacing
    return median(far) if len(far) else 0.0


def usual_interval(sequences: Sequences) -> float | None:
    """The median distance of neighbouring steps; None where it is not known, or where all are alike and the number of
    steps says as much."""
    far = _distances(sequences)
    return None if far is None or are_even(far) else median(far) or None


def _distances(sequences: Sequences) -> NDArray[np.float64] | None:
    """Those of neighbouring steps, all in a row; None where `times` are."""
    if sequences.times is None:
        return None
    return distances(sequences.times, sequences.lengths)


def has_gaps(sequences: Sequences) -> bool:
    """Whether a value is missing, or a step follows the one before it after more than LONG usual intervals."""
    if sequences.observed is not None:
        return True
    interval = usual_interval(sequences)
    if interval is None or sequences.times is None:
        return False
    times = sequences.times
    return any(bool((np.diff(times[part], axis=1) > LONG * interval).any()) for part in pieces_of(times))


def inputs(sequences: Sequences, classifier: ClassifierConfig) -> Values:
    """(N, T, F * (1 + marks)) float32, what a network of this configuration is given: the values and, with
    missing = "mask", for each of them 1 where it was observed and 0 where it was filled and, with an interval, log(1 +
    the time since the feature's last observation before this step, in intervals): since the first step where there is
    none, and 0 there. All is 0 beyond a sequence's length.

    Raises DataError where the configuration has an interval and the data do not say when their steps were.
    """
    if not classifier.marks:
        return sequences.values
    N, T, F = sequences.values.shape
    observed = sequences.known
    found = np.empty((N, T, classifier.given), dtype=np.float32)
    found[:, :, :F] = sequences.values
    found[:, :, F : 2 * F] = observed
    if classifier.marks == 2:
        times = sequences.positions
        if times is None:
            raise DataError(f"the data do not say when the steps of a sequence were: {TIMES_NEEDED}")
        some = max(1, AT_ONCE // (T * F))
        for at in (slice(start, start + some) for start in range(0, N, some)):
            found[at, :, 2 * F :] = _elapsed(times[at], observed[at], classifier.interval)
    return found


def _elapsed(times: NDArray[np.float64], observed: NDArray[np.bool_], interval: float) -> NDArray[np.float64]:
    """(N, T, F) logarithms of the times since the last observation. times (N, T), from 0 on; observed (N, T, F)."""
    last = np.maximum.accumulate(np.where(observed, times[:, :, None], 0.0), axis=1)
    since = times[:, :, None].repeat(observed.shape[2], axis=2)
    since[:, 1:] -= last[:, :-1]
    with np.errstate(over="ignore"):
        return np.asarray(np.log1p(np.clip(since / interval, 0.0, LONGEST)))
