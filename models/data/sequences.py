"""Sequences in memory, and the one way to them from what a reader or a caller hands over.

Shapes: N sequences, T steps (of the longest), F features. Whatever the source, the same rules hold:

- Steps at the end of a sequence in which every feature is missing are padding (unless `lengths` are given).
- Missing values before that are filled: linearly between the known steps of that sequence and feature (by the
  distance of the steps where the source numbers or dates them), with the nearest known value at the edges;
  `Sequences.filled` counts them, and `observed` says which stood there. Masked values are missing.
- What a sequence lacks throughout (`Sequences.absent`) is 0 here. A study puts the training part's mean of the feature
  there, and so does a model whatever it predicts (`filled_with`).
- Where the source numbers or dates its steps at unequal distances, `Sequences.times` keeps where they are.
- Infinite values (also those beyond float32), sequences without a step and unequal numbers of features are
  errors that name the file and the row. A constant feature is kept.
- Values are kept in float32. A feature that loses by it, as its values lie close together and far from 0, is named in a
  warning; training data in which every feature that varies is lost are an error.
- Labels and groups are kept by name: 1, 1.0 and "1.0" are "1"; ids too, but as text they stay as they are written.
  Other text is kept, without spaces around it and without what cannot be seen: é is one character however it was
  composed (NFC), and zero-width spaces are left out. nan, NA and the like are missing (`NO_NAME`).
- All labels missing: the data is unlabeled. Some missing, or one with a NUL: an error that names the row.
"""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpo.errors import StudyFault, legible
from hpo.models.data.buffers import contiguous, copied, empty, pieces_of, taken

log = logging.getLogger("hpo")

Values = NDArray[np.float32]
Indices = NDArray[np.int64]
Mask = NDArray[np.bool_]


MISSING = dict.fromkeys(("", "?", "NA", "N/A", "null", "NULL", "None"), "nan")  # texts that stand for no number
# texts that stand for no label, id or group; "None" may be a class
NO_NAME = {"", "?", "nan", "NaN", "NAN", "NaT", "<NA>", "NA", "N/A", "null", "NULL"}
_UNSEEN = dict.fromkeys(map(ord, "\u200b\u2060\ufeff"))  # zero-width spaces; joiners within a word have a meaning
UNKEPT = re.compile(r"[\0\ud800-\udfff]")  # what the database cannot keep
UNKEPT_RULE = "must hold neither a NUL nor half a character"


FEATURES = 2**16  # of a sequence: what has more is transposed, and takes minutes to look at
SOME = 50_000  # steps that are looked at first
EVEN = 1e-3  # distances that differ by less than this part of the largest are equal
WORN, LOST = 0.02, 0.3  # rounding relative to the deviation: worth a warning; nothing is left


class DataError(StudyFault):
    """The data breaks a rule: the message names the file, the row and the way out, in one line."""

    def __init__(self, message: str) -> None:
        super().__init__(legible(message))


def warn(message: str) -> None:
    """Log what was read otherwise than its writer may have meant it, in one line."""
    log.warning("%s", legible(message))


@dataclass(frozen=True, eq=False)
class Sequences:
    """Labeled or unlabeled sequences, in memory or mapped from a canonical file."""

    values: Values  # (N, T, F); zero at and after each sequence's length
    lengths: Indices  # (N,) valid steps, 1..T
    labels: Indices | None  # (N,) index into classes; None: unlabeled
    classes: tuple[str, ...]  # class names; sorted, as numbers if all are
    groups: Indices | None  # (N,) a split never separates equal codes
    ids: tuple[str, ...]  # (N,) names of the sequences; "0", "1", … where the file has none
    features: tuple[str, ...]  # (F,) names of the features; "x0", "x1", … where the file has none
    filled: int  # missing values filled in the file that these come from
    named: bool  # the names of the features are the source's own; False: they only number them
    group_names: tuple[str, ...] = ()  # what the groups' codes stand for
    missing: NDArray[np.int32] | None = None  # (N, F) values that were missing in the source; None: not known
    moments: NDArray[Any] | None = None  # (N,) int64, float64 or datetime64: what orders them in time; None: nothing
    weights: NDArray[np.float64] | None = None  # (N,) how much each counts, at least 0; None: all alike
    observed: Mask | None = None  # (N, T, F) values of valid steps that stood in the source; None: all, or not known
    # (N, T) where the steps are from the first one on, in seconds if they are dated, else in the source's unit; 0
    # beyond each length; None: at equal distances, or not known
    times: NDArray[np.float64] | None = None
    spacing: float | None = None  # the one distance between steps where `times` is None; None: not known

    @property
    def n(self) -> int:
        return len(self.values)

    @property
    def steps(self) -> int:
        return int(self.values.shape[1])

    @property
    def n_features(self) -> int:
        return int(self.values.shape[2])

    def with_positive(self, name: str) -> Sequences:
        """The same with `name` as the second of two classes, which metrics of one class are of. Raises DataError."""
        if self.labels is None or len(self.classes) != 2:
            raise DataError(f"a positive class is one of two, there are {len(self.classes)}: {list(self.classes)}")
        if name not in self.classes:
            raise DataError(f"the positive class must be one of {list(self.classes)}, got {name!r}")
        if name == self.classes[1]:
            return self
        return replace(self, classes=self.classes[::-1], labels=1 - self.labels)

    def take(self, indices: Iterable[int] | NDArray[Any]) -> Sequences:
        """The sequences at `indices`, in that order (or of a mask (N,)); T, classes and features stay."""
        at = np.arange(self.n)[indices if isinstance(indices, np.ndarray) else list(indices)]
        return replace(
            self,
            values=taken(self.values, at),
            lengths=self.lengths[at],
            labels=None if self.labels is None else self.labels[at],
            groups=None if self.groups is None else self.groups[at],
            ids=tuple(self.ids[i] for i in at),
            missing=None if self.missing is None else self.missing[at],
            moments=None if self.moments is None else self.moments[at],
            weights=None if self.weights is None else self.weights[at],
            observed=None if self.observed is None else _gapped(taken(self.observed, at), self.lengths[at]),
            times=None if self.times is None else taken(self.times, at),
        )

    def part(self, rows: slice) -> Sequences:
        """The sequences of a slice, which shares their arrays."""
        given = {name: getattr(self, name) for name in BY_SEQUENCE}
        return replace(self, **{name: value[rows] for name, value in given.items() if value is not None})

    @property
    def absent(self) -> Mask:
        """(N, F) features without any value in the sequence, as far as that is known."""
        if self.missing is None:
            return np.zeros((self.n, self.n_features), dtype=np.bool_)
        return np.asarray(self.missing == self.lengths[:, None])

    @property
    def gaps(self) -> tuple[float, ...] | None:
        """(F,) shares of values that were missing in the source; None: not known."""
        return None if self.missing is None else tuple((self.missing.sum(axis=0) / self.lengths.sum()).tolist())

    def means(self) -> NDArray[np.float32]:
        """(F,) means over all steps of the sequences that have the feature; 0 where none has."""
        present = ~self.absent
        steps = (self.lengths[:, None] * present).sum(axis=0)
        sums = empty((self.n, self.n_features), np.float64)
        for part in pieces_of(self.values):
            sums[part] = self.values[part].sum(axis=1, dtype=np.float64) * present[part]
        return np.asarray(sums.sum(axis=0) / np.maximum(steps, 1), dtype=np.float32)

    def filled_with(self, means: Iterable[float]) -> Sequences:
        """The same with these (F,) where a sequence lacks the feature throughout."""
        absent = self.absent
        if not absent.any():
            return self
        values, filling = copied(self.values), np.array(list(means), dtype=np.float32)
        for part in pieces_of(values):
            inside = valid_steps(self.lengths[part], self.steps)
            np.copyto(values[part], filling, where=absent[part, None, :] & inside[:, :, None])
        return replace(self, values=values)

    @property
    def known(self) -> Mask:
        """(N, T, F) `observed`, also where it leaves out no value."""
        if self.observed is not None:
            return self.observed
        return np.broadcast_to(valid_steps(self.lengths, self.steps)[:, :, None], self.values.shape)

    @property
    def positions(self) -> NDArray[np.float64] | None:
        """(N, T) `times`, also of steps at equal distances; None: not known."""
        if self.times is not None or self.spacing is None:
            return self.times
        found, steps = empty((self.n, self.steps), np.float64), self.spacing * np.arange(self.steps)
        for part in pieces_of(found):
            found[part] = np.where(valid_steps(self.lengths[part], self.steps), steps, 0.0)
        return found


BY_SEQUENCE = ("values", "lengths", "labels", "groups", "ids", "missing", "moments", "weights", "observed", "times")


def valid_steps(lengths: Indices, steps: int) -> Mask:
    """(N, steps): those within each sequence."""
    return np.asarray(np.arange(steps) < lengths[:, None])


def _gapped(observed: Mask, lengths: Indices) -> Mask | None:
    """The mask (N, T, F); None where it leaves out no value of a valid step."""
    return None if observed.sum() == lengths.sum() * observed.shape[2] else observed


def joined(parts: Sequence[Sequences]) -> Sequences:
    """The sequences of several with the same features, one after another, without labels, groups, moments and weights;
    with the times of steps where all have them."""
    lengths = np.concatenate([part.lengths for part in parts])
    ids = tuple(name for part in parts for name in part.ids)
    filled = sum(part.filled for part in parts)
    return replace(
        parts[0],
        values=_stacked([part.values for part in parts]),
        lengths=lengths,
        labels=None,
        groups=None,
        ids=ids,
        filled=filled,
        missing=None,
        moments=None,
        weights=None,
        observed=None if all(part.observed is None for part in parts) else _stacked([part.known for part in parts]),
        times=None if any(part.positions is None for part in parts) else _stacked([part.positions for part in parts]),
        spacing=None,
    )


def _stacked(parts: Sequence[Any]) -> NDArray[Any]:
    """Arrays (N_i, T_i, …) one after another, with zeros behind the shorter ones."""
    steps = max(part.shape[1] for part in parts)
    found = np.zeros((sum(map(len, parts)), steps, *parts[0].shape[2:]), parts[0].dtype)
    end = 0
    for part in parts:
        begin, end = end, end + len(part)
        found[begin:end, : part.shape[1]] = part
    return found


def default_names(n_features: int) -> tuple[str, ...]:
    """The names of features of a source that names none: "x0", "x1", …"""
    return tuple(f"x{i}" for i in range(n_features))


def matched(sequences: Sequences, features: tuple[str, ...], named: bool) -> Sequences:
    """The sequences with these features (F,) in this order, which are names or (`named` is False) only numbers.

    By name, in any order and among others, where the sequences name them all; by place where one side has no names.
    Raises DataError where neither fits.
    """
    found = sequences.features
    if found == features:
        return sequences
    missing = [name for name in features if name not in found]
    if sequences.named and not missing:
        at = [found.index(name) for name in features]
        gaps = None if sequences.missing is None else sequences.missing[:, at]
        whole = sequences.observed
        observed = None if whole is None else _gapped(copied(whole, places=at), sequences.lengths)
        values = copied(sequences.values, places=at)
        return replace(sequences, values=values, features=features, missing=gaps, observed=observed)
    if sequences.named and named:
        raise DataError(f"the data lacks the features {missing} of the model; it has {list(found)}")
    if len(found) != len(features):
        raise DataError(f"the model needs {len(features)} features {list(features)}, the data has {len(found)}")
    return replace(sequences, features=features, named=named)


def from_arrays(
    X: Any,
    y: Any = None,
    lengths: Any = None,
    groups: Any = None,
    *,
    ids: Any = None,
    classes: tuple[str, ...] | None = None,
    features: tuple[str, ...] | None = None,
    source: str = "the data",
) -> Sequences:
    """Sequences from arrays.

    X is (N, T, F) or, univariate, (N, T); or a list of N arrays (T_i, F) or (T_i,). Arrays may be numpy's (also
    masked ones) or torch's, of any type of number and on any device. y (N,) holds labels of any type, `lengths` (N,)
    the valid steps, `groups` (N,) what a split must keep together. `classes` and `features` as for `read`; `source`
    names the data in errors. Raises DataError.
    """
    return to_sequences(raw_arrays(source, X, y, lengths, groups, ids), classes, None, features)


@dataclass(frozen=True)
class Raw:
    """What a reader gives, as it stands in the file."""

    source: str  # the file, for error messages
    values: NDArray[Any]  # (N, T, F); NaN: missing or padding
    labels: Sequence[object] | None  # (N,)
    groups: Sequence[object] | None  # (N,)
    unit: str  # "row", "line" or "sequence": what `marks` count
    marks: Sequence[object]  # (N,) where each sequence stands, for error messages
    ids: tuple[str, ...] | None = None  # None: not named in the file
    features: tuple[str, ...] | None = None  # None: not named in the file
    lengths: Indices | None = None  # None: up to the last step that has a value
    times: NDArray[np.float64] | None = None  # (N, T) where the steps are, rising; None: not known
    seconds: float = 1.0  # of a unit of `times`; 1 where these are numbers
    moments: NDArray[Any] | None = None  # (N,) as `steps.moments` gives them; None: not asked for
    weights: NDArray[np.float64] | None = None  # (N,) finite, at least 0; None: not asked for

    def at(self, i: int) -> str:
        """Where sequence i stands, for error messages."""
        return f"{self.source}, {self.unit} {self.marks[i]}"


def to_sequences(
    raw: Raw,
    classes: tuple[str, ...] | None,
    labeled: bool | None,
    features: tuple[str, ...] | None,
    named: bool = True,
) -> Sequences:
    """Check, fill and encode what a reader gives; the arguments are those of `read`. Raises DataError."""
    if 0 in raw.values.shape:
        raise DataError(f"{raw.source} is empty: it holds no values")
    if raw.values.shape[2] > FEATURES:
        raise DataError(f"{raw.source} has {raw.values.shape[2]:,} features, more than {FEATURES:,}: is it transposed?")
    with np.errstate(over="ignore", invalid="ignore"):  # becomes inf or NaN, which are looked at below
        values: Values = copied(raw.values, np.float32)
    names = features or raw.features or default_names(values.shape[2])
    if len(names) != values.shape[2]:
        raise DataError(f"{raw.source} has {values.shape[2]} features, expected {len(names)}: {', '.join(names[:20])}")
    for feature in filter(UNKEPT.search, names):
        raise DataError(f"{raw.source}: the name of a feature {UNKEPT_RULE}, got {feature!r}")
    # nothing is missing or infinite
    whole = all(np.isfinite(values[part].sum(dtype=np.float64)) for part in pieces_of(values))
    valid = np.full(len(values), values.shape[1]) if whole else _valid_steps(values)
    lengths = valid if raw.lengths is None else raw.lengths
    _check_lengths(raw, lengths, values.shape[1])
    values = contiguous(values[:, : lengths.max()])
    padded = bool((lengths < values.shape[1]).any())
    if not whole:
        _check_finite(raw, values, lengths, names)
    if not (whole and not padded and _surely_precise(values)):
        _check_precision(raw, values, lengths, names, training=bool(labeled) and classes is None)
    times, spacing = _times(raw, lengths, values.shape[1])
    counts, observed = np.zeros((len(values), len(names)), dtype=np.int32), None
    if not whole:
        counts, observed = _fill(values, lengths, raw.times)
    if padded:
        for part in pieces_of(values):
            values[part][~valid_steps(lengths[part], values.shape[1])] = 0
    labels, classes = _encode(raw, classes, labeled)
    groups, group_names = _groups(raw)
    return Sequences(
        values=values,
        lengths=lengths,
        labels=labels,
        classes=classes,
        groups=groups,
        ids=raw.ids or tuple(map(str, range(len(values)))),
        features=names,
        filled=int(counts.sum()),
        named=named if features else raw.features is not None,
        group_names=group_names,
        missing=counts,
        moments=raw.moments,
        weights=_weights(raw),
        observed=observed,
        times=times,
        spacing=spacing,
    )


def _times(raw: Raw, lengths: Indices, steps: int) -> tuple[NDArray[np.float64] | None, float | None]:
    """`Sequences.times` and `Sequences.spacing`. Raises DataError."""
    if raw.times is None:
        return None, None
    times, finite = empty((len(lengths), steps), np.float64), True
    for part in pieces_of(times):
        given, inside = raw.times[part, :steps], valid_steps(lengths[part], steps)
        for i, t in np.argwhere(np.isnan(given) & inside)[:1].tolist():
            at = raw.at(part.start + i)
            raise DataError(f"{at} has a value at step {t}, but not where that is: give one of `steps` for each")
        with np.errstate(over="ignore", invalid="ignore"):
            times[part] = np.where(inside, (given - given[:, :1]) * raw.seconds, 0.0)
        finite = finite and bool(np.isfinite(times[part]).all())
    if not finite:
        return None, None
    far = distances(times, lengths)
    if are_even(far):
        return None, median(far) if len(far) else 0.0
    return times, None


def distances(times: NDArray[np.float64], lengths: Indices) -> NDArray[np.float64]:
    """Of each valid step from the one before it, all in a row. times (N, T), lengths (N,)."""
    found, end = empty((int((lengths - 1).sum()),), np.float64), 0
    for part in pieces_of(times):
        far = np.diff(times[part], axis=1)[valid_steps(lengths[part], times.shape[1])[:, 1:]]
        begin, end = end, end + len(far)
        found[begin:end] = far
    return found


def median(numbers: NDArray[np.float64]) -> float:
    """Of some numbers, whose order is lost."""
    return float(np.median(numbers, overwrite_input=True))


def are_even(far: NDArray[np.float64]) -> bool:
    """Whether distances are equal, or there are none."""
    high = far.max(initial=0.0)
    return bool(high - far.min(initial=np.inf) <= EVEN * high)


def _weights(raw: Raw) -> NDArray[np.float64] | None:
    """Those that differ: equal ones are none."""
    if raw.weights is None or (raw.weights == raw.weights[0]).all():
        if raw.weights is not None and not raw.weights[0]:
            raise DataError(f"{raw.source}: the weight of every sequence is 0: give those that count more")
        return None
    return raw.weights


def _check_lengths(raw: Raw, lengths: Indices, steps: int) -> None:
    for i in np.flatnonzero((lengths < 1) | (lengths > steps)).tolist():
        rule = f"a sequence needs 1 to {steps} steps"
        raise DataError(f"{raw.at(i)} has length {lengths[i]}: {rule}; remove or correct it")


def _check_finite(raw: Raw, values: Values, lengths: Indices, names: tuple[str, ...]) -> None:
    for part in pieces_of(values):
        inside = valid_steps(lengths[part], values.shape[1])
        for i, t, f in np.argwhere(np.isinf(values[part]) & inside[:, :, None])[:1].tolist():
            rule = "values must be finite in float32; correct it, or leave it empty to have it filled"
            raise DataError(f"{raw.at(part.start + i)}, step {t}, feature {names[f]!r} is infinite: {rule}")


def _surely_precise(values: Values) -> bool:
    """Whether rounding to float32 cannot matter to any feature of values (N, T, F) without gaps and padding: a look at
    some of them, after which most data need no closer one.
    """
    flat = values.reshape(-1, values.shape[2])
    some = flat[:: max(1, len(flat) // SOME)].astype(np.float64)
    deviation = some.std(axis=0) * np.sqrt(len(some) / len(flat))  # at least, whatever the others are
    largest = np.maximum(np.abs(flat.min(axis=0)), np.abs(flat.max(axis=0)))
    return bool((2.0**-24 * largest <= WORN / 2 * deviation).all())


def _check_precision(raw: Raw, values: Values, lengths: Indices, names: tuple[str, ...], *, training: bool) -> None:
    """Warn of each feature whose float32 values (N, T, F) say less than the raw ones.

    Raises DataError for training data of which nothing else is left.
    """
    found = _precisions(raw, values, lengths)
    kept = [rounding <= WORN * deviation for deviation, rounding, _, _ in found if deviation > 0]
    lost = [rounding > LOST * deviation for deviation, rounding, _, _ in found if deviation > 0]
    texts = [
        f"feature {name!r} runs from {low:.13g} to {high:.13g}, where float32 tells steps of "
        f"{np.spacing(np.float32(max(abs(low), abs(high)))):.2g} apart, and its deviation is {deviation:.2g}"
        for name, (deviation, rounding, low, high) in zip(names, found, strict=True)
        if rounding > WORN * deviation
    ]
    way_out = "subtract an offset from it, or change its unit, in training data and in those to predict alike"
    if training and lost and all(lost):
        raise DataError(f"{raw.source}: {'; '.join(texts)}: nothing of it is left to learn; {way_out}")
    if not all(kept):
        warn(f"{raw.source}: {'; '.join(texts)}; {way_out}")


def _precisions(raw: Raw, values: Values, lengths: Indices) -> list[tuple[float, float, float, float]]:
    """Of each feature of values (N, T, F): deviation, what rounding adds to it, smallest and largest raw value."""
    F = values.shape[2]
    low, high = np.full(F, np.inf), np.full(F, -np.inf)
    for f, exact, _ in _known(raw, values, lengths):
        low[f], high[f] = min(low[f], exact.min()), max(high[f], exact.max())
    low, high = np.where(low <= high, low, 0.0), np.where(low <= high, high, 0.0)
    unit = np.where(low < high, high - low, 1.0)  # so that no square is too large or too small
    count, mean, squares, lost = np.zeros((4, F))
    for f, exact, kept in _known(raw, values, lengths):  # Chan, Golub and LeVeque (1979): pieces put together
        scaled, before = (exact - low[f]) / unit[f], count[f]
        count[f] += len(scaled)
        difference = scaled.mean() - mean[f]
        squares[f] += ((scaled - scaled.mean()) ** 2).sum() + difference**2 * before * len(scaled) / count[f]
        mean[f] += difference * len(scaled) / count[f]
        lost[f] += (((exact - kept) / unit[f]) ** 2).sum()
    deviation, rounding = (np.sqrt(each / np.maximum(count, 1)) * unit for each in (squares, lost))
    rounding[low == high] = 0.0
    return list(zip(deviation.tolist(), rounding.tolist(), low.tolist(), high.tolist(), strict=True))


def _known(raw: Raw, values: Values, lengths: Indices) -> Iterator[tuple[int, NDArray[np.float64], Values]]:
    """A feature, and those of its raw values and of its values (N, T, F) that are not missing, some sequences at a
    time."""
    for part in pieces_of(values):
        inside = valid_steps(lengths[part], values.shape[1])
        for f in range(values.shape[2]):
            rounded = values[part, :, f]
            known = inside & ~np.isnan(rounded)
            if known.any():
                exact = raw.values[part, : values.shape[1], f][known]
                yield f, np.asarray(exact, dtype=np.float64), rounded[known]


def _valid_steps(values: Values) -> Indices:
    """(N,) steps up to the last one with a value."""
    found = np.empty(len(values), dtype=np.int64)
    for part in pieces_of(values):
        known: Mask = ~np.asarray(np.isnan(values[part]).all(axis=2))
        last = values.shape[1] - np.argmax(known[:, ::-1], axis=1)
        found[part] = np.where(known.any(axis=1), last, 0)
    return found


def _fill(values: Values, lengths: Indices, times: NDArray[np.float64] | None) -> tuple[NDArray[np.int32], Mask | None]:
    """Fill the missing ones of (N, T, F) values, in place; with 0 where the sequence has none. How many they were
    (N, F), and which values were there, as `Sequences.observed`."""
    counts = np.zeros((len(values), values.shape[2]), dtype=np.int32)
    observed = empty(values.shape, np.bool_)
    for part in pieces_of(values):
        inside = valid_steps(lengths[part], values.shape[1])
        missing = np.isnan(values[part]) & inside[:, :, None]
        counts[part] = missing.sum(axis=1, dtype=np.int32)
        observed[part] = inside[:, :, None] & ~missing
        _fill_some(values[part], inside, missing, None if times is None else times[part])
    return counts, _gapped(observed, lengths)


def _fill_some(values: Values, inside: Mask, missing: Mask, times: NDArray[np.float64] | None) -> None:
    """Fill the missing ones of (N, T, F) values, in place; with 0 where the sequence has none."""
    steps = np.arange(values.shape[1], dtype=np.float64)
    for i, f in np.argwhere(missing.any(axis=1)).tolist():
        if times is not None:
            steps = times[i, : values.shape[1]]
        series, gap = values[i, :, f], missing[i, :, f]
        known = inside[i] & ~gap
        series[gap] = np.interp(steps[gap], steps[known], series[known]) if known.any() else 0


def _encode(raw: Raw, classes: tuple[str, ...] | None, labeled: bool | None) -> tuple[Indices | None, tuple[str, ...]]:
    """Labels as indices into the classes, which are the labels' names where none are given."""
    names = names_of(raw.labels or (), raw.at)
    known = {name for name in names if name is not None}
    if labeled is False or not known:
        if labeled:
            raise DataError(f"{raw.source} has no labels")
        return None, classes or ()
    if None in names:
        raise DataError(f"{_lacks(raw, names, raw.labels, 'label')}: label every sequence or none")
    for bad in filter(UNKEPT.search, known):
        raise DataError(f"{raw.at(names.index(bad))}: the name of a class {UNKEPT_RULE}, got {bad!r}")
    classes = classes or _sorted_classes(known)
    codes: dict[str | None, int] = {name: i for i, name in enumerate(classes)}
    for i, name in enumerate(names):
        if name not in codes:
            trained = ", ".join(classes)
            raise DataError(f"{raw.at(i)}: label {name!r} is not a class of the training data ({trained})")
    return np.array([codes[name] for name in names], dtype=np.int64), classes


def _lacks(raw: Raw, names: Sequence[str | None], written: Sequence[object] | None, what: str) -> str:
    """Which sequence has no label or group, and what stands for it there."""
    i = names.index(None)
    found = None if written is None else written[i]
    return f"{raw.at(i)} has no {what}" + (f" ({found!r} is a missing one)" if found and found == found else "")


def _sorted_classes(names: set[str]) -> tuple[str, ...]:
    if all(is_number(name) and isfinite(float(name)) for name in names):
        return tuple(sorted(names, key=lambda name: (float(name), name)))
    return tuple(sorted(names))


def is_number(text: str) -> bool:
    """Whether the text is a number; "nan" and "inf" count, 1_5 does not, which float() takes for 15."""
    try:
        float(text)
    except ValueError:
        return False
    return "_" not in text


def _groups(raw: Raw) -> tuple[Indices | None, tuple[str, ...]]:
    """Codes and their names."""
    if raw.groups is None:
        return None, ()
    names = names_of(raw.groups, raw.at)
    if None in names:
        raise DataError(f"{_lacks(raw, names, raw.groups, 'group')}: give every sequence one or none")
    return codes_of(names)


def names_of(
    values: Iterable[object], at: Callable[[int], str] = str, name: Callable[[object], str | None] | None = None
) -> list[str | None]:
    """Names of labels, ids or groups, by `name_of` or `name`; None where one is missing.

    `at` says where the i-th stands. Raises DataError for bytes that are no text in UTF-8, and for lists.
    """
    values = list(values)
    of = name or name_of
    try:
        names = {value: of(value) for value in set(values)}
    except UnicodeDecodeError as error:
        i = values.index(error.object)
        way_out = "save labels, ids and groups as text, in numpy as a str array"
        raise DataError(f"{at(i)}: {error.object!r} is not text in UTF-8; {way_out}") from None
    except TypeError:
        i = next(i for i, value in enumerate(values) if not isinstance(value, Hashable))
        raise DataError(f"{at(i)}: {values[i]!r} is neither text nor a number") from None
    return [names[value] for value in values]


def ids_of(values: Iterable[object], at: Callable[[int], str]) -> tuple[str, ...]:
    """Names of the sequences or, in long form, of those that rows belong to. Raises DataError where one is missing."""
    names = names_of(values, at, id_of)
    if None in names:
        raise DataError(f"{at(names.index(None))} has no id")
    return tuple(names)  # type: ignore[arg-type]


def name_of(value: object) -> str | None:
    """The name of a label or group; whole numbers are named alike however they are written."""
    text = id_of(value)
    return text and re.sub(r"^(-?\d+)\.0*$", r"\1", text)


def id_of(value: object) -> str | None:
    """The name of a sequence: text stays as it is written, so that 1.0 and 1.00 are two."""
    if is_missing(value):
        return None
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e16:
        return f"{value:.0f}"
    text = visible(value.decode() if isinstance(value, bytes) else str(value))
    return None if text in NO_NAME else text


def visible(text: str) -> str:
    """The text as it is seen: composed (NFC), without spaces around it and without zero-width spaces."""
    if not text.isascii():
        text = unicodedata.normalize("NFC", text).translate(_UNSEEN).strip("\u200c\u200d \t\r\n")
    return text.strip()


def is_missing(value: object) -> bool:
    """Whether this is None, NaN, NaT or pandas' NA, which answers no comparison."""
    try:
        return value is None or bool(value != value)
    except TypeError:
        return True
    except ValueError:  # an array
        return False


def codes_of(names: Iterable[str | None]) -> tuple[Indices, tuple[str, ...]]:
    """Codes in the order of first appearance, and the names that they stand for."""
    seen: dict[str, int] = {}
    codes = np.array([seen.setdefault(str(name), len(seen)) for name in names], dtype=np.int64)
    return codes, tuple(seen)


def pad(flat: NDArray[np.float64], lengths: Indices) -> NDArray[np.float64]:
    """(N, T, F) of steps (sum of lengths, F), one sequence after another; NaN behind the shorter ones."""
    steps = lengths.max(initial=0)
    values, end = empty((len(lengths), steps, flat.shape[1]), np.float64), 0
    for part in pieces_of(values):
        begin, end = end, end + int(lengths[part].sum())
        values[part] = np.nan
        values[part][valid_steps(lengths[part], steps)] = flat[begin:end]
    return values


def concatenated(parts: Sequence[NDArray[Any]]) -> NDArray[np.float64]:
    """(N, T, F) of N arrays (T_i, F)."""
    lengths = np.array([len(part) for part in parts], dtype=np.int64)
    return pad(np.concatenate(parts) if parts else np.empty((0, 0)), lengths)


def raw_arrays(source: str, X: Any, y: Any, lengths: Any, groups: Any, ids: Any = None) -> Raw:
    values = _numeric(source, X)
    n = len(values)
    columns = {"y": y, "lengths": lengths, "groups": groups, "ids": ids}
    at = {name: _column(source, name, column, n) for name, column in columns.items()}
    for i, length in enumerate(at["lengths"] or ()):
        if not isinstance(length, int | float) or not abs(length) < 2**53 or not float(length).is_integer():
            raise DataError(f"{source}, sequence {i}: lengths must be whole numbers, got {str(length)[:40]}")
    valid = None if at["lengths"] is None else np.array(at["lengths"], dtype=np.int64)
    raw = Raw(source, values, at["y"], at["groups"], "sequence", range(n), None, None, valid)
    return raw if at["ids"] is None else replace(raw, ids=ids_of(at["ids"], raw.at))


def column(source: str, name: str, values: Any, n: int) -> NDArray[Any]:
    """(N,) what was given as one value a sequence; masked where it was. Raises DataError for another shape."""
    listed = isinstance(values, list | tuple)
    array = np.array(values, dtype=object) if listed else _array(f"{source}: {name}", values)
    if array.shape != (n,):
        raise DataError(f"{source}: {name} must be of shape ({n},), one a sequence, got {array.shape}")
    return array


def _column(source: str, name: str, values: Any, n: int) -> list[Any] | None:
    """N Python values; None where one is masked."""
    if values is None:
        return None
    found = column(source, name, values, n).tolist()
    return [value.item() if callable(getattr(value, "item", None)) else value for value in found]


def _array(at: str, values: Any) -> NDArray[Any]:
    """A numpy array of whatever is like one, a masked one as it is. Raises DataError."""
    try:
        if callable(getattr(values, "detach", None)):  # a tensor of torch, which may require a gradient
            values = values.detach().cpu()
            if str(values.dtype) == "torch.bfloat16":  # numpy has none
                values = values.float()
        return np.asanyarray(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{at} is not an array of numbers: {error}") from None


def _values(at: str, values: Any) -> NDArray[Any]:
    """An array in which NaN stands for what was masked."""
    array = _array(at, values)
    if isinstance(array, np.ma.MaskedArray) and array.dtype.kind in "fiub":
        return np.asarray(np.ma.filled(np.ma.asarray(array, np.float64), np.nan))
    return np.asarray(array)


def _numeric(source: str, X: Any) -> NDArray[Any]:
    """(N, T, F) of what `from_arrays` takes for X."""
    if not isinstance(X, list | tuple):
        X = _values(f"{source}: X", X)
        if X.ndim not in (2, 3) or X.dtype.kind not in "fiub":
            raise DataError(f"{source}: X must be numbers (N, T, F) or (N, T), got {X.dtype} {X.shape}")
        return np.atleast_3d(X)
    parts = [_values(f"{source}, sequence {i}", part) for i, part in enumerate(X)]
    for i, part in enumerate(parts):
        if part.ndim not in (1, 2) or part.dtype.kind not in "fiub":
            rule = "a sequence must be numbers (T, F) or (T,)"
            raise DataError(f"{source}, sequence {i}: {rule}, got {part.dtype} {part.shape}")
    parts = [part if part.ndim == 2 else part[:, None] for part in parts]
    for i, part in enumerate(parts):
        if part.shape[1] != parts[0].shape[1]:
            rule = f"{part.shape[1]} features, the first sequence has {parts[0].shape[1]}"
            raise DataError(f"{source}, sequence {i} has {rule}")
    return concatenated(parts)
