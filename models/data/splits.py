"""Which sequences train and which validate: stratified splits that keep groups whole, functions of a seed."""

from __future__ import annotations

from itertools import chain

import numpy as np

from hpo.models.data.sequences import DataError, Indices, Mask, Sequences

Split = tuple[Indices, Indices]  # training and validation indices, ascending
RULES = 5
"""Of what follows from data and configuration. A study goes on by those that it began with; below 5: the stored data do
not say which values were observed, nor when; below 4: nor what their groups are called, and no trial is of the
portfolio; below 3: what a sequence lacks throughout is 0 (`Plan.fill`), and the order of a file's rows and columns has
a say; below 2: a part may lack a class that it could hold, and 1e-5 is added to every deviation (`Plan.epsilon`)."""


def check_trainable(sequences: Sequences, source: str = "the training data") -> None:
    """Raise DataError unless there are labels, two classes or more, and a class of two sequences or more."""
    if sequences.labels is None:
        raise DataError(f"{source} has no labels: add them, or name their column")
    present, counts = np.unique(sequences.labels[counting(sequences)], return_counts=True)
    if len(present) < 2:
        only = sequences.classes[present[0]]
        raise DataError(f"{source} has one class only, {only!r}: a classifier needs two or more")
    if counts.max() < 2:
        rule = "labels must be classes that several sequences share"
        raise DataError(f"{source} has another label for each of its {sequences.n} sequences: {rule}")


def lacking(sequences: Sequences, part: Indices) -> list[str]:
    """The classes of which none of the sequences at `part` is that count."""
    assert sequences.labels is not None
    labels = sequences.labels[counting(sequences, part)]
    return [name for c, name in enumerate(sequences.classes) if not (labels == c).any()]


def counting(sequences: Sequences, part: Indices | None = None) -> Indices:
    """Those of the rows of `part` (None: of all) whose weight is not 0."""
    rows = np.arange(sequences.n) if part is None else part
    return rows if sequences.weights is None else rows[sequences.weights[rows] > 0]


def split_folds(sequences: Sequences, folds: int, seed: int, rules: int = RULES) -> list[Split]:
    """k (training, validation) pairs; the validation parts are disjoint and together all N.

    Stratified: without groups, folds differ by at most one sequence, in all and of each class. A class with
    fewer members than folds works: some folds validate without it. Every training part holds every class of
    two sequences or more (with groups: where one of ten draws allows it, and best one in which every fold holds every
    class, too). Raises DataError where there are fewer sequences or groups than folds.
    """
    units, what = _units(sequences)
    if not 2 <= folds <= units:
        raise DataError(f"folds must be 2 to {units}, the number of {what}, got {folds}")
    labels, rng = _strata(sequences), np.random.default_rng(seed)
    if sequences.groups is not None:
        fold = _grouped_folds(labels, sequences.groups, folds, rng, rules)
    else:
        fold = np.empty(sequences.n, dtype=np.int64)
        fold[_by_class(labels, rng)] = np.arange(sequences.n) % folds
    return [_split(fold == k) for k in range(folds)]


def split_share(sequences: Sequences, share: float, seed: int, rules: int = RULES) -> list[Split]:
    """One (training, validation) pair with about `share` of the N in validation, never none, never all.

    Stratified; one member of every class stays in training where the share leaves room for them, and one of every class
    of two or more goes into validation where the share has room. Groups stay whole: of 1 / share grouped folds one with
    every class in both parts is taken where one of ten draws has it, the nearest to the share, which large groups can
    miss.
    Raises DataError where there are fewer than two sequences or groups.
    """
    units, what = _units(sequences)
    if not 0 < share < 1 or units < 2:
        raise DataError(f"a share must lie in (0, 1), of two {what} or more; got {share} of {units}")
    labels, rng = _strata(sequences), np.random.default_rng(seed)
    wanted = min(max(round(share * sequences.n), 1), sequences.n - 1)
    if sequences.groups is None:
        part = _share(labels, wanted, rng)
        return [_split(part if rules < 2 else _with_every_class(part, labels, rng))]
    folds = min(max(round(1 / min(share, 1 - share)), 2), units)
    chosen: list[Mask] = []
    for _ in range(10 if rules > 1 else 1):
        fold = _grouped_folds(labels, sequences.groups, folds, rng, rules=1)
        parts = [(fold == k) if share <= 0.5 else (fold != k) for k in range(folds)]
        chosen.append(min(parts, key=lambda part: _faults(labels, part, wanted, rules)))
        lost, _, lacks, _ = _faults(labels, chosen[-1], wanted, rules)
        if not lost + lacks:
            break
    return [_split(min(chosen, key=lambda part: _faults(labels, part, wanted, rules)))]


def holdout(sequences: Sequences, share: float, seed: int, rules: int = RULES) -> tuple[Sequences, Sequences]:
    """(training, test) sequences, split as by `split_share`."""
    ((train, test),) = split_share(sequences, share, seed, rules)
    return sequences.take(train), sequences.take(test)


def units(sequences: Sequences) -> int:
    """What a split never cuts: how many groups there are, or sequences where there are none."""
    return _units(sequences)[0]


def _units(sequences: Sequences) -> tuple[int, str]:
    if sequences.groups is None:
        return sequences.n, "sequences"
    return len(np.unique(sequences.groups)), "groups"


def _strata(sequences: Sequences) -> Indices:
    return np.zeros(sequences.n, dtype=np.int64) if sequences.labels is None else sequences.labels


def _split(validation: Mask) -> Split:
    return np.flatnonzero(~validation), np.flatnonzero(validation)


def _by_class(labels: Indices, rng: np.random.Generator) -> Indices:
    """Indices class by class, each class shuffled."""
    order = rng.permutation(len(labels))
    return order[np.argsort(labels[order], kind="stable")]


def _share(labels: Indices, wanted: int, rng: np.random.Generator) -> Mask:
    """(N,) true for `wanted` sequences, evenly spaced in the order by class and so stratified."""
    order = _by_class(labels, rng)
    first = np.diff(labels[order], prepend=-1) != 0  # one of each class, for training
    free = order[~first] if wanted <= len(order) - first.sum() else order
    picks = ((np.arange(wanted) + rng.random()) * (len(free) / wanted)).astype(np.int64)
    part = np.zeros(len(labels), dtype=np.bool_)
    part[free[picks]] = True
    return part


def _with_every_class(part: Mask, labels: Indices, rng: np.random.Generator) -> Mask:
    """The part (N,) with a member of each class of two or more that it lacks, in place of one of its largest class."""
    for c in np.unique(labels):
        outside, held = np.flatnonzero((labels == c) & ~part), np.bincount(labels[part])
        if len(outside) == (labels == c).sum() > 1 and held.max() > 1:
            leaves = rng.choice(np.flatnonzero(part & (labels == held.argmax())))
            part[leaves], part[rng.choice(outside)] = False, True
    return part


def _faults(labels: Indices, part: Mask, wanted: int, rules: int) -> tuple[int, bool, int, int]:
    """Of a validation part, worst first: classes that training loses, whether its size is far off, classes that it
    lacks, how far off its size is."""
    lost, off = _lost_classes(labels, part), abs(int(part.sum()) - wanted)
    return (lost, off > wanted, _lost_classes(labels, ~part), off) if rules > 1 else (lost, False, 0, off)


def _grouped_folds(labels: Indices, groups: Indices, folds: int, rng: np.random.Generator, rules: int) -> Indices:
    """(N,) fold of each sequence: of ten draws the first whose training parts hold every class, or the first; sooner
    one whose validation parts do, too.

    scikit-learn's StratifiedGroupKFold rejects data in which all classes have fewer members than folds, and
    more often leaves a training part without a class.
    """
    draw = _deal_groups(labels, groups, folds, rng)
    draws = chain([draw], (_deal_groups(labels, groups, folds, rng) for _ in range(9)))
    fitting = (d for d in draws if not any(_lost_classes(labels, d == k) for k in range(folds)))
    if rules < 2:
        return next(fitting, draw)
    found = list(fitting)
    whole = (d for d in found if not any(_lost_classes(labels, d != k) for k in range(folds)))
    return next(whole, found[0] if found else draw)


def _deal_groups(labels: Indices, groups: Indices, folds: int, rng: np.random.Generator) -> Indices:
    """(N,) folds: the largest groups first, each to the fold that has least of its classes."""
    classes, group = np.unique(labels, return_inverse=True)[1], np.unique(groups, return_inverse=True)[1]
    held = np.zeros((group.max() + 1, classes.max() + 1))  # (groups, classes), as shares of each class
    np.add.at(held, (group, classes), 1)
    held /= held.sum(axis=0)
    order = rng.permutation(len(held))
    dealt = np.zeros((folds, held.shape[1]))
    fold = np.empty(len(held), dtype=np.int64)
    for g in order[np.argsort(-held.sum(axis=1)[order], kind="stable")]:
        fold[g] = np.argmin(dealt @ held[g] + 1e-9 * dealt.sum(axis=1))  # no overlap: to the emptiest
        dealt[fold[g]] += held[g]
    return fold[group]


def _lost_classes(labels: Indices, part: Mask) -> int:
    """How many classes have no member outside of `part`."""
    return len(np.unique(labels)) - len(np.unique(labels[~part]))
