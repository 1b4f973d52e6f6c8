"""The order of sequences and features that a training goes by, whatever order a file has them in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpo.models.data.buffers import at_once
from hpo.models.data.sequences import Indices, Sequences, codes_of

FEW = 8  # columns


def in_order(sequences: Sequences) -> Sequences:
    """The same sequences, ordered by what they hold: the shorter first, then by values, step by step, by labels and, if
    any, by moments and weights, by what was observed and by the times of the steps.

    Values are compared feature by feature in the order of `ranks`. The order is the same in another unit, and with an
    offset; for that a feature that a sequence lacks throughout counts as its mean. Groups are numbered in this order.
    """
    order = _by_content(sequences.filled_with(sequences.means()))
    if (np.diff(order) > 0).all():
        return sequences
    found = sequences.take(order)
    if found.groups is None:
        return found
    codes, names = codes_of(found.group_names[code] for code in found.groups.tolist())
    return replace(found, groups=codes, group_names=names)


def ranks(features: Sequence[str]) -> tuple[int, ...]:
    """(F,) the place of each feature in the order of names, short ones first: x2 comes before x10."""
    ordered = sorted(range(len(features)), key=lambda f: (len(features[f]), features[f]))
    return tuple(np.argsort(ordered).tolist())


def _by_content(sequences: Sequences) -> Indices:
    """(N,) rows in that order; those that are alike in all of it stay as they are.

    A few columns, which tell the rows of most data apart, are looked at one by one; what is alike in them, as a whole,
    or many columns at a time where that is large.
    """
    place, alike = np.zeros(sequences.n, dtype=np.int64), np.arange(sequences.n)
    features = np.argsort(ranks(sequences.features)).tolist()

    def undecided() -> Indices:
        return alike

    for told in _keys(sequences, features, undecided):
        place[alike] = _refined(place[alike], told)
        _, which, counts = np.unique(place[alike], return_inverse=True, return_counts=True)
        alike = alike[counts[which] > 1]
        if not len(alike):
            break
    return np.argsort(place, kind="stable")


def _keys(sequences: Sequences, features: list[int], rows: Callable[[], Indices]) -> Iterator[NDArray[Any]]:
    """(R,) each: what tells rows apart, one after another, of those that `rows` gives when it is asked for."""
    values = sequences.values
    yield sequences.lengths[rows()]
    first = [(step, feature) for step in range(sequences.steps) for feature in features][:FEW]
    for step, feature in first:
        yield values[rows(), step, feature]
    for some in _steps(values, rows):
        yield _whole(values[rows(), some][:, :, features])
    if sequences.labels is not None:
        yield sequences.labels[rows()]
    for key in _beside(sequences):
        yield key[rows()]
    if sequences.observed is not None:
        for some in _steps(sequences.observed, rows):
            yield _distinct(sequences.observed[rows(), some][:, :, features])
    if sequences.times is not None:
        for some in _steps(sequences.times, rows):
            yield _distinct(sequences.times[rows(), some])


def _steps(array: NDArray[Any], rows: Callable[[], Indices]) -> Iterator[slice]:
    """Of an array (N, T, …) all steps at once, or as many at a time as are not large for those rows."""
    start, steps, step = 0, array.shape[1], array[0, 0].nbytes
    while start < steps:
        some = at_once(steps, len(rows()) * step)
        yield slice(start, start + some)
        start += some


def _distinct(keys: NDArray[Any]) -> Indices:
    """(R,) the places of rows (R, …) in their order, equal for those that are alike."""
    return np.unique(keys, axis=0, return_inverse=True)[1].ravel()


def _beside(sequences: Sequences) -> list[NDArray[Any]]:
    """(N,) each: what tells sequences of equal values and labels apart where they have times or weights: those, and the
    names of groups."""
    keys = [key for key in (sequences.moments, sequences.weights) if key is not None]
    if keys and sequences.groups is not None:
        keys.append(np.array(sequences.group_names)[sequences.groups] if sequences.group_names else sequences.groups)
    return keys


def _whole(values: NDArray[np.float32]) -> Indices:
    """(R,) the places of rows (R, T, F) in the order of their values, equal for those that are alike."""
    bits = (np.ascontiguousarray(values) + 0.0).view(np.uint32).reshape(len(values), -1)  # of -0.0 those of 0.0
    bits ^= np.where(bits >> 31 == 1, np.uint32(0xFFFFFFFF), np.uint32(0x80000000))  # as whole numbers in that order
    rows = bits.astype(">u4").view(f"V{4 * bits.shape[1]}").ravel()  # byte by byte
    return np.unique(rows, return_inverse=True)[1]


def _refined(place: Indices, keys: NDArray[Any]) -> Indices:
    """Places of rows in an order, equal for those that are alike, once these are told apart by the keys, too.

    A place is the number of rows before, so that those of a part of the rows are right among all.
    """
    order = np.lexsort((keys, place))
    old, key, at = place[order], keys[order], np.arange(len(order))
    first_of_old = np.maximum.accumulate(np.where(np.diff(old, prepend=-1) != 0, at, 0))
    changes = (np.diff(old, prepend=-1) != 0) | (key != np.roll(key, 1))
    first_alike = np.maximum.accumulate(np.where(changes, at, 0))
    refined = np.empty_like(place)
    refined[order] = old + first_alike - first_of_old
    return refined
