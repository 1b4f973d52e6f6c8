"""Splits: stratified, whole groups, a function of the seed, every class in every training part."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hpo.models.data.sequences import DataError, Sequences, from_arrays
from hpo.models.data.splits import Split, holdout, lacking, split_folds, split_share


def labeled(labels: Sequence[int] | None, groups: Sequence[int] | None = None, n: int = 0) -> Sequences:
    """Sequences of one step whose value is their index."""
    n = len(labels) if labels is not None else n
    return from_arrays(np.arange(n, dtype=float)[:, None], labels, groups=groups)


@st.composite
def data(draw: st.DrawFn, grouped: bool | None = None) -> Sequences:
    classes = draw(st.integers(1, 5))
    labels = draw(st.lists(st.integers(0, classes - 1), min_size=2, max_size=60))
    groups = draw(st.lists(st.integers(0, 11), min_size=len(labels), max_size=len(labels)))
    grouped = draw(st.booleans()) if grouped is None else grouped
    assume(not grouped or len(set(groups)) > 1)
    return labeled(labels, groups if grouped else None)


def units(sequences: Sequences) -> int:
    return sequences.n if sequences.groups is None else len(set(sequences.groups.tolist()))


def check_parts(sequences: Sequences, splits: list[Split]) -> None:
    """What holds for every split."""
    for train, validation in splits:
        assert train.dtype == validation.dtype == np.int64
        assert len(train) > 0
        assert len(validation) > 0
        assert (np.diff(train) > 0).all()
        assert (np.diff(validation) > 0).all()
        assert sorted([*train, *validation]) == list(range(sequences.n))
        if sequences.groups is not None:
            assert not set(sequences.groups[train]) & set(sequences.groups[validation])


seeds = st.integers(0, 2**32 - 1)
shares = st.floats(0.01, 0.99)


@settings(max_examples=150, deadline=None)
@given(data(), st.integers(2, 6), seeds)
def test_folds_are_disjoint_cover_all_and_share_no_group(sequences: Sequences, folds: int, seed: int) -> None:
    assume(folds <= units(sequences))
    splits = split_folds(sequences, folds, seed)
    check_parts(sequences, splits)
    assert len(splits) == folds
    assert sorted(np.concatenate([validation for _, validation in splits])) == list(range(sequences.n))


@settings(max_examples=150, deadline=None)
@given(data(), shares, seeds)
def test_a_share_is_disjoint_covers_all_and_shares_no_group(sequences: Sequences, share: float, seed: int) -> None:
    splits = split_share(sequences, share, seed)
    check_parts(sequences, splits)
    assert len(splits) == 1


@settings(max_examples=60, deadline=None)
@given(data(), shares, seeds)
def test_a_split_is_a_function_of_labels_groups_and_seed(sequences: Sequences, share: float, seed: int) -> None:
    again = from_arrays(np.zeros((sequences.n, 3)), sequences.labels, groups=sequences.groups)
    for a, b in (
        (split_folds(sequences, 2, seed), split_folds(again, 2, seed)),
        (split_share(sequences, share, seed), split_share(again, share, seed)),
    ):
        np.testing.assert_equal(a, b)


@settings(max_examples=100, deadline=None)
@given(data(grouped=False), st.integers(2, 6), seeds)
def test_folds_are_stratified_to_one_sequence(sequences: Sequences, folds: int, seed: int) -> None:
    assume(folds <= sequences.n)
    splits = split_folds(sequences, folds, seed)
    assert sequences.labels is not None
    sizes = [len(validation) for _, validation in splits]
    assert max(sizes) - min(sizes) <= 1
    for k, count in enumerate(np.bincount(sequences.labels)):
        held = [int((sequences.labels[validation] == k).sum()) for _, validation in splits]
        assert max(held) - min(held) <= 1
        assert count < 2 or all(k in sequences.labels[train] for train, _ in splits)


@settings(max_examples=100, deadline=None)
@given(data(grouped=False), shares, seeds)
def test_a_share_has_its_size_and_leaves_every_class_in_training(sequences: Sequences, share: float, seed: int) -> None:
    ((train, validation),) = split_share(sequences, share, seed)
    assert sequences.labels is not None
    assert len(validation) == min(max(round(share * sequences.n), 1), sequences.n - 1)
    if len(validation) <= sequences.n - len(sequences.classes):
        assert set(sequences.labels[train]) == set(sequences.labels)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(20, 60), min_size=2, max_size=4), st.sampled_from([0.1, 0.2, 0.3, 0.5]), seeds)
def test_a_share_is_stratified(counts: list[int], share: float, seed: int) -> None:
    sequences = labeled(np.repeat(range(len(counts)), counts).tolist())
    ((_, validation),) = split_share(sequences, share, seed)
    assert sequences.labels is not None
    held = np.bincount(sequences.labels[validation], minlength=len(counts))
    assert (abs(held - share * np.array(counts)) <= 2).all()


@settings(max_examples=100, deadline=None)
@given(data(grouped=False), shares, seeds)
def test_a_share_holds_every_class_of_two_where_it_has_room(sequences: Sequences, share: float, seed: int) -> None:
    """torchmetrics#300, evalml#970: a test part without the rare class makes a perfect score of always saying no."""
    ((train, validation),) = split_share(sequences, share, seed)
    assert sequences.labels is not None
    counts = np.bincount(sequences.labels)
    if len(sequences.classes) <= len(validation) <= sequences.n - len(sequences.classes):
        assert set(np.flatnonzero(counts > 1)) <= set(sequences.labels[validation])
        assert set(sequences.labels) == set(sequences.labels[train])


def test_a_grouped_share_holds_every_class_that_two_groups_have() -> None:
    sequences = labeled([0] * 36 + [1, 0, 0, 1], np.repeat(range(10), 4).tolist())
    spread = labeled(([0] * 8 + [1]) * 10, np.repeat(range(30), 3).tolist())
    for seed in range(20):
        ((train, validation),) = split_share(spread, 0.2, seed)
        assert spread.labels is not None
        assert sequences.labels is not None
        assert 1 in spread.labels[train]
        assert 1 in spread.labels[validation]
        ((train, _),) = split_share(sequences, 0.2, seed)  # class 1 in one group alone
        assert 1 in sequences.labels[train]


def test_grouped_folds_hold_every_class_where_a_draw_allows_it() -> None:
    sequences = labeled([0, 0, 1, 0, 0, 0] * 10, np.repeat(range(20), 3).tolist())
    assert sequences.labels is not None
    for seed in range(20):
        assert all(1 in sequences.labels[validation] for _, validation in split_folds(sequences, 5, seed))


@settings(max_examples=100, deadline=None)
@given(data(), shares, seeds)
def test_a_part_that_lacks_no_class_is_that_of_earlier_versions(sequences: Sequences, share: float, seed: int) -> None:
    old, new = split_share(sequences, share, seed, rules=1), split_share(sequences, share, seed)
    if not lacking(sequences, old[0][0]) and not lacking(sequences, old[0][1]):
        np.testing.assert_equal(new, old)


def test_grouped_folds_are_stratified() -> None:
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(100), 5)
    sequences = labeled(rng.choice(3, 500, p=[0.6, 0.3, 0.1]).tolist(), groups.tolist())
    assert sequences.labels is not None
    splits = split_folds(sequences, 5, 0)
    held = np.array([np.bincount(sequences.labels[validation]) for _, validation in splits])
    assert (abs(held - held.mean(axis=0)) <= 0.15 * held.mean(axis=0)).all()


def test_groups_of_one_class_each_leave_every_class_in_every_training_part() -> None:
    """Two groups a class, five folds: scikit-learn refuses such data or leaves a class out."""
    sequences = labeled(np.repeat(range(8), 4).tolist(), np.repeat(range(16), 2).tolist())
    assert sequences.labels is not None
    for seed in range(20):
        for train, _ in split_folds(sequences, 5, seed):
            assert set(sequences.labels[train]) == set(range(8))


def test_grouped_folds_are_drawn_again_where_a_class_would_be_lost() -> None:
    """Groups with classes 00, 11 and 01: only 00 and 11 together leave both classes to train on."""
    sequences = labeled([0, 0, 1, 1, 0, 1], [0, 0, 1, 1, 2, 2])
    for seed in range(20):
        assert {tuple(validation) for _, validation in split_folds(sequences, 2, seed)} == {(0, 1, 2, 3), (4, 5)}


def test_a_grouped_share_rather_misses_its_size_than_a_class() -> None:
    """Six sequences, of which class 0 has one: it trains, though its group would have the right size."""
    sequences = labeled([0, 1, 2, 1, 2, 1], [0, 0, 1, 1, 2, 3])
    for seed in range(20):
        ((train, _),) = split_share(sequences, 0.25, seed)
        assert 0 in train


def test_a_grouped_share_is_the_nearest_that_whole_groups_allow() -> None:
    sequences = labeled([0, 1] * 50, np.repeat(range(20), 5).tolist())
    for share in (0.1, 0.2, 0.25, 0.5, 0.75, 0.9):
        ((_, validation),) = split_share(sequences, share, 3)
        assert len(validation) == share * 100


def test_one_large_group_stays_whole() -> None:
    sequences = labeled([0, 1] * 10, [0] * 17 + [1, 2, 3])
    ((train, validation),) = split_share(sequences, 0.2, 0)
    assert (len(train), len(validation)) in {(18, 2), (19, 1)}


def test_another_seed_gives_another_split() -> None:
    for sequences in (labeled([0, 1] * 30), labeled([0, 1] * 30, list(range(30)) * 2)):
        folds = {tuple(split_folds(sequences, 5, seed)[0][1]) for seed in range(10)}
        shares = {tuple(split_share(sequences, 0.2, seed)[0][1]) for seed in range(10)}
        assert min(len(folds), len(shares)) >= 9


@pytest.mark.parametrize(("rules", "share"), [(1, [2, 3, 5]), (2, [2, 5, 7])])
def test_a_seed_gives_the_split_that_it_always_gave(rules: int, share: list[int]) -> None:
    """A study that goes on after an update must validate on the same sequences."""
    plain, grouped = labeled([0, 0, 0, 1, 1, 1, 2, 2]), labeled([0, 1] * 5, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4])
    found = [
        [validation.tolist() for _, validation in splits]
        for splits in (
            split_folds(plain, 3, 7, rules),
            split_share(plain, 0.4, 7, rules),
            split_folds(grouped, 3, 7, rules),
            split_share(grouped, 0.4, 7, rules),
        )
    ]
    assert found == [[[0, 4, 6], [2, 5, 7], [1, 3]], [share], [[2, 3, 4, 5], [0, 1, 6, 7], [8, 9]], [[0, 1, 2, 3]]]


def test_data_without_labels_can_be_split() -> None:
    sequences = labeled(None, n=10)
    check_parts(sequences, split_folds(sequences, 3, 0))
    check_parts(sequences, split_share(sequences, 0.3, 0))


@pytest.mark.parametrize("folds", [-1, 0, 1, 5])
def test_the_number_of_folds_must_fit(folds: int) -> None:
    with pytest.raises(DataError, match=f"folds must be 2 to 4, the number of sequences, got {folds}"):
        split_folds(labeled([0, 1, 0, 1]), folds, 0)
    with pytest.raises(DataError, match=f"folds must be 2 to 4, the number of groups, got {folds}"):
        split_folds(labeled([0, 1] * 4, [0, 1, 2, 3] * 2), folds, 0)


@pytest.mark.parametrize("share", [-0.1, 0.0, 1.0, 2.0, float("nan")])
def test_a_share_must_lie_between_nothing_and_all(share: float) -> None:
    with pytest.raises(DataError, match=r"a share must lie in \(0, 1\)"):
        split_share(labeled([0, 1, 0, 1]), share, 0)


def test_one_group_cannot_be_split() -> None:
    with pytest.raises(DataError, match=r"of two groups or more; got 0\.2 of 1"):
        split_share(labeled([0, 1, 0, 1], [5, 5, 5, 5]), 0.2, 0)


def test_a_holdout_gives_both_parts() -> None:
    sequences = labeled([0, 1] * 20)
    train, test = holdout(sequences, 0.25, 1)
    ((train_at, test_at),) = split_share(sequences, 0.25, 1)
    assert train.values.ravel().tolist() == train_at.tolist()
    assert test.values.ravel().tolist() == test_at.tolist()
    assert test.ids == tuple(map(str, test_at))
