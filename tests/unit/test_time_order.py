"""Splits in the order of time: later parts, whole groups, ties together, a gap, whatever the order of rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.neighbors import KNeighborsClassifier

import hpo
from hpo.models.data.canonical import fingerprint, load, save
from hpo.models.data.readers import read
from hpo.models.data.sequences import DataError, Sequences
from hpo.models.data.splits import split_share
from hpo.models.data.time_order import Cut, Gap, latest, length, rolling
from hpo.study.config import ConfigError, Folds, config_for_data, from_dict, to_dict
from hpo.study.plan import Plan, make_plan, validation_parts
from hpo.study.readout import readout

DAY = np.datetime64("2024-01-01T00:00:00", "us")


def sequences(times: Any, labels: Any = None, groups: Any = None) -> Sequences:
    """Sequences of one step whose value is their number, of two classes by turns."""
    n = len(times)
    y = np.arange(n) % 2 if labels is None else labels
    more = {} if groups is None else {"groups": groups}
    return read({"X": np.arange(n, dtype=float)[:, None], "y": y, "time": times, **more}, time="time")


@st.composite
def data(draw: st.DrawFn) -> Sequences:
    """With ties, with or without groups, by numbers or by days."""
    n = draw(st.integers(4, 60))
    times: NDArray[Any] = np.array(draw(st.lists(st.integers(0, 40), min_size=n, max_size=n)))
    if draw(st.booleans()):
        times = DAY + times * np.timedelta64(1, "D")
    labels = draw(st.lists(st.integers(0, 2), min_size=n, max_size=n))
    groups = draw(st.none() | st.lists(st.integers(0, 11), min_size=n, max_size=n))
    return sequences(times, labels, groups)


gaps = st.none() | st.integers(0, 8) | st.integers(1, 8).map(lambda days: 86400.0 * days)


def fitting(found: Sequences, gap: Gap) -> Gap:
    """The gap, in numbers of sequences where the times are no dates."""
    assert found.moments is not None
    return gap if found.moments.dtype.kind == "M" or not isinstance(gap, float) else int(gap // 86400)


def tried(split: Callable[[], list[Cut]]) -> list[Cut]:
    """What the split gives; data that leave nothing to train on are another test's."""
    try:
        return split()
    except DataError:
        assume(False)
        raise


def check(found: Sequences, cut: Cut, gap: Gap) -> None:
    """What holds for every cut."""
    assert found.moments is not None
    train, later = found.moments[cut.train], found.moments[cut.later]
    assert len(train) > 0
    assert len(later) > 0
    assert (np.diff(cut.train) > 0).all()
    assert (np.diff(cut.later) > 0).all()
    assert train.max() < later.min()
    if isinstance(gap, float):
        assert later.min() - train.max() >= length(gap)
    elif gap:
        between = (found.moments > train.max()) & (found.moments < later.min())
        assert between.sum() >= gap
    if found.groups is not None:
        assert not set(found.groups[cut.train]) & set(found.groups[cut.later])


def contents(found: Sequences, rows: NDArray[np.int64]) -> list[float]:
    return sorted(found.values[rows, 0, 0].tolist())


@settings(max_examples=200, deadline=None)
@given(data(), st.floats(0.05, 0.8), gaps)
def test_what_validates_is_later_than_what_trains_and_shares_no_group(found: Sequences, share: float, gap: Gap) -> None:
    gap = fitting(found, gap)
    (cut,) = tried(lambda: [latest(found, share, gap)])
    check(found, cut, gap)
    assert found.moments is not None
    start = found.moments[cut.later].min()
    assert cut.later.tolist() == np.flatnonzero(found.moments >= start).tolist()  # all of them, with their ties
    assert len(cut.train) + len(cut.later) + cut.in_gap + cut.in_groups == found.n
    sizes = [(found.moments >= time).sum() for time in np.unique(found.moments)[1:]]
    assert abs(len(cut.later) - share * found.n) == pytest.approx(min(abs(size - share * found.n) for size in sizes))


@settings(max_examples=200, deadline=None)
@given(data(), st.integers(2, 6), gaps)
def test_folds_are_consecutive_and_train_on_all_before_them(found: Sequences, folds: int, gap: Gap) -> None:
    gap = fitting(found, gap)
    cuts = tried(lambda: rolling(found, folds, gap))
    assert len(cuts) == folds
    assert found.moments is not None
    for i, cut in enumerate(cuts):
        check(found, cut, gap)
        start = found.moments[cut.later].min()
        earlier = int((found.moments < start).sum())
        assert len(cut.train) + cut.in_gap + cut.in_groups == earlier
        assert i == 0 or start > found.moments[cuts[i - 1].later].max()
    validated = np.concatenate([cut.later for cut in cuts])
    assert len(set(validated.tolist())) == len(validated)
    assert sorted(validated) == np.flatnonzero(found.moments >= found.moments[cuts[0].later].min()).tolist()


@settings(max_examples=100, deadline=None)
@given(data(), st.integers(2, 4), gaps, st.randoms(use_true_random=False))
def test_the_order_of_rows_has_no_say(found: Sequences, folds: int, gap: Gap, random: Any) -> None:
    gap = fitting(found, gap)
    cuts = tried(lambda: [*rolling(found, folds, gap), latest(found, 0.3, gap)])
    rows = list(range(found.n))
    random.shuffle(rows)
    other = found.take(rows)
    again = [*rolling(other, folds, gap), latest(other, 0.3, gap)]
    for a, b in zip(cuts, again, strict=True):
        assert contents(found, a.train) == contents(other, b.train)
        assert contents(found, a.later) == contents(other, b.later)


def test_equal_blocks_where_no_times_are_equal() -> None:
    cuts = rolling(sequences(np.arange(60)), 5)
    assert [len(cut.train) for cut in cuts] == [10, 20, 30, 40, 50]
    assert {len(cut.later) for cut in cuts} == {10}
    assert latest(sequences(np.arange(50)[::-1]), 0.2).later.tolist() == list(range(10))


def test_a_gap_takes_all_that_are_of_one_time() -> None:
    found = sequences([0, 0, 1, 1, 2, 2, 3, 3, 4, 4])
    assert latest(found, 0.2, 1).train.tolist() == [0, 1, 2, 3, 4, 5]
    assert latest(found, 0.2, 2).in_gap == 2
    assert latest(found, 0.2, 3).in_gap == 4
    days = sequences(DAY + np.arange(10) * np.timedelta64(1, "D"))
    assert latest(days, 0.2, 86400.0).in_gap == 0  # a day apart as they are
    assert latest(days, 0.2, 86401.0).in_gap == 1
    assert latest(days, 0.2, 3 * 86400.0).train.tolist() == [0, 1, 2, 3, 4, 5]


class TestWhatLeavesNothing:
    """Each error names what, why and the way out."""

    def test_equal_times(self) -> None:
        with pytest.raises(DataError, match="all 4 sequences are of one time, 7, which is never cut"):
            latest(sequences([7, 7, 7, 7]), 0.2)

    @pytest.mark.parametrize("folds", [1, 3, 9])
    def test_too_few_times(self, folds: int) -> None:
        with pytest.raises(DataError, match=f"must be 2 to 2, one less than there are different times, got {folds}"):
            rolling(sequences([1, 2, 3, 3]), folds)

    def test_one_class(self) -> None:
        expected = r"only class '0' is left to train on before block 1 of 2 \(from 4 on\): 4 sequences are earlier"
        with pytest.raises(DataError, match=expected):
            rolling(sequences(np.arange(12), [0] * 4 + [0, 1] * 4), 2)

    def test_a_wide_gap(self) -> None:
        expected = r"nothing is left to train on before the latest 0.2 of it .*8 lie in the gap: shorten data.gap"
        with pytest.raises(DataError, match=expected):
            latest(sequences(np.arange(10)), 0.2, 50)

    def test_groups_that_go_on(self) -> None:
        expected = "8 are of groups that have sequences in it: leave the group column out"
        with pytest.raises(DataError, match=expected):
            latest(sequences(np.arange(10), groups=[1, 2] * 5), 0.2)


# ------------------------------------------------------------------ from a file to a plan


def write(path: Path, n: int = 60, **more: Any) -> Path:
    """Sequences of six steps, a day apart, not in the order of their days."""
    rng = np.random.default_rng(0)
    days = DAY + rng.permutation(n) * np.timedelta64(1, "D")
    arrays = {"X": rng.normal(size=(n, 6, 1)), "y": np.arange(n) % 2, "time": days.astype(str), **more}
    np.savez(path, **arrays)
    return path


def planned(path: Path, *overrides: str) -> tuple[Plan, Sequences, Sequences]:
    plan, train, test = make_plan(config_for_data(path, ["data.time=time", *overrides]))
    assert test is not None
    assert train.moments is not None
    assert test.moments is not None
    return plan, train, test


def shown(*parts: Sequences) -> list[str]:
    return [str(f(part.moments))[:10] for part in parts for f in (np.min, np.max)]  # type: ignore[arg-type]


class TestPlan:
    BEFORE = (  # times could be named
        "3c220731262c3cf294f7fe602164c7e0425c4106289bdf21c29fe6ef20a69be1",
        "6032457cdf517a960fa111977c33820b6eaccd51596bcd2ffaeb61e1e3759552",
    )

    def test_test_part_and_folds_follow_one_another(self, tmp_path: Path) -> None:
        plan, train, test = planned(write(tmp_path / "days.npz"))
        assert shown(train, test) == ["2024-01-01", "2024-02-17", "2024-02-18", "2024-02-29"]
        assert plan.config.data.validation == Folds(5)
        assert plan.validation_sizes == (8, 8, 8, 8, 8)
        assert (plan.validated, plan.resolution, plan.members) == (8, 0.5 / 40, 5)
        for trained, validated in validation_parts(plan.config, train, plan.rules):
            assert train.moments is not None
            assert train.moments[trained].max() < train.moments[validated].min()
        assert Plan.from_json(plan.to_json()) == plan
        assert readout(plan, train, test)[2].startswith("features 'x0'; validation on 5 rolling folds by 'time'; ")
        assert "from 2024-02-18 to 2024-02-29" in readout(plan, train, test)[1]

    def test_a_gap_lies_before_validation_and_before_the_test_part(self, tmp_path: Path) -> None:
        write(tmp_path / "days.npz")
        for gap, last in (("7d", "2024-02-11"), ("4", "2024-02-13")):
            plan, train, test = planned(tmp_path / "days.npz", f"data.gap={gap}", "data.validation=0.2")
            assert shown(test) == ["2024-02-18", "2024-02-29"]
            assert shown(train)[1] == last
            ((trained, validated),) = validation_parts(plan.config, train, plan.rules)
            between = 7 if gap == "7d" else 5
            days = shown(train.take(validated))[0], shown(train.take(trained))[1]
            assert np.datetime64(days[0]) - np.datetime64(days[1]) == np.timedelta64(between, "D")
            assert len(trained) + len(validated) < train.n
            assert from_dict(to_dict(plan.config)) == plan.config
        assert " share of 0.2 by 'time', 4 sequences before it left out" in readout(plan, train, test)[2]

    def test_the_file_s_order_has_no_say_even_where_values_are_alike(self, tmp_path: Path) -> None:
        rng = np.random.default_rng(1)
        X, y = rng.integers(0, 2, (40, 2, 1)).astype(float), np.arange(40) % 2
        times, groups = rng.integers(0, 12, 40), np.array(list("abcdefgh"))[rng.integers(0, 8, 40)]
        found = []
        for rows in (np.arange(40), rng.permutation(40)):
            path = tmp_path / "twins.npz"
            np.savez(path, X=X[rows], y=y[rows], time=times[rows], groups=groups[rows])
            plan, train, test = planned(path, "data.validation=0.3")
            ((trained, validated),) = validation_parts(plan.config, train, plan.rules)
            kept = [
                (part.values.tolist(), part.moments.tolist(), [part.group_names[g] for g in part.groups])  # type: ignore[union-attr]
                for part in (train.take(trained), train.take(validated), test)
            ]
            found.append(kept)
        assert found[0] == found[1]

    def test_a_resumed_study_splits_the_stored_data_alike(self, tmp_path: Path) -> None:
        plan, train, _ = planned(write(tmp_path / "days.npz"), "data.gap=1d")
        save(train, tmp_path / "stored")
        again = load(tmp_path / "stored")
        np.testing.assert_equal(
            validation_parts(plan.config, again, plan.rules), validation_parts(plan.config, train, plan.rules)
        )

    def test_earlier_sequences_of_later_groups_are_left_out_and_counted(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        groups = np.arange(60)
        groups[[1, 2, 40]] = 55
        path = write(tmp_path / "days.npz", time=np.arange(60), groups=groups)
        _, train, test = planned(path, "data.validation=0.25")
        assert (train.n, test.n) == (45, 12)
        assert caplog.messages == [
            "3 sequences are left out of training: they are earlier than the test part, which has sequences of their "
            "groups"
        ]

    def test_two_times_train_and_validate(self, tmp_path: Path) -> None:
        write(tmp_path / "test.npz", 10, time=np.full(10, 2025))
        path = write(tmp_path / "years.npz", 60, time=np.repeat([2023, 2024], 30))
        plan, _, _ = planned(path, "data.test=test.npz")
        assert plan.config.data.validation == 0.2
        assert plan.validation_sizes == (30,)

    def test_a_test_file_that_is_not_later_is_said(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        write(tmp_path / "test.npz", 10)
        path = write(tmp_path / "days.npz")
        planned(path, "data.test=test.npz")
        assert caplog.messages[0].startswith(
            "the test part begins at 2024-01-01, the training data end at 2024-02-29: its score says little of"
        )
        caplog.clear()
        later = (DAY + np.arange(60, 70) * np.timedelta64(1, "D")).astype(str)
        write(tmp_path / "test.npz", 10, time=later)
        planned(path, "data.test=test.npz", "data.gap=1d")
        assert not caplog.messages
        planned(path, "data.test=test.npz", "data.gap=3d")
        assert caplog.messages == [
            "the test part begins at 2024-03-01, the training data end at 2024-02-29: that is less than data.gap"
        ]
        write(tmp_path / "test.npz", 10, time=np.arange(10))
        with pytest.raises(DataError, match=r"data.time: .*days.npz has times, .*test.npz numbers: write both alike"):
            planned(path, "data.test=test.npz")

    def test_classes_that_come_late_are_said(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        y = np.where(np.arange(60) % 3 > 0, np.arange(60) % 3, np.where(np.arange(60) > 12, 0, 1))
        planned(write(tmp_path / "days.npz", time=np.arange(60), y=y), "data.validation={ folds = 4 }")
        assert caplog.messages == ["no sequence of class '0' is among the 10 that train for validation block 1 of 4"]

    def test_what_cannot_be_split_is_refused_with_key_and_file(self, tmp_path: Path) -> None:
        path = write(tmp_path / "days.npz", time=np.arange(60))
        with pytest.raises(DataError, match=r"days.npz: data.gap of 604800 s is a duration, but the times .* numbers"):
            planned(path, "data.gap=7d")
        with pytest.raises(DataError, match=r"days.npz: no test part can be set aside .*shorten data.gap; choose"):
            planned(path, "data.gap=99")
        with pytest.raises(DataError, match=r"data.validation = \{ folds = 50 \} cannot be had .*must be 2 to 47"):
            planned(path, "data.validation={ folds = 50 }")

    @pytest.mark.parametrize(
        ("override", "expected"),
        [
            ("data.time=label", "data.label, id, step, group, time and weight must be different columns"),
            ("data.gap=-1", "data.gap must be a number of sequences, such as 20, or a duration"),
            ("data.gap=soon", "data.gap must be a number of sequences, such as 20, or a duration"),
            ("data.gap=true", "data.gap must be a number of sequences, such as 20, or a duration"),
        ],
    )
    def test_keys_have_rules(self, tmp_path: Path, override: str, expected: str) -> None:
        with pytest.raises(ConfigError, match=expected):
            planned(write(tmp_path / "days.npz"), override)
        with pytest.raises(ConfigError, match=r"data\.gap needs data.time, what orders the sequences; got 3 alone"):
            config_for_data(tmp_path / "days.npz", ["data.gap=3"])

    def test_times_that_nobody_has_named_are_refused(self, tmp_path: Path) -> None:
        path = write(tmp_path / "days.npz")
        with pytest.raises(DataError, match="unknown array 'time': leave it out, or name it to have it used"):
            make_plan(config_for_data(path))

    def test_without_time_parts_are_drawn_as_they_always_were(self, tmp_path: Path) -> None:
        content = dict(np.load(write(tmp_path / "days.npz")))
        del content["time"]
        np.savez(tmp_path / "days.npz", **content)
        plan, train, test = make_plan(config_for_data(tmp_path / "days.npz"))
        assert test is not None
        assert (plan.train, plan.test) == tuple(f"data-{sha256}.safetensors" for sha256 in self.BEFORE)
        assert validation_parts(plan.config, train, plan.rules)[0][1].tolist() == [1, 3, 5, 11, 12, 14, 15, 18, 28, 45]
        assert plan.to_json()["validation_sizes"] is None
        assert not plan.to_json()["config"]["data"].keys() & {"time", "gap"}
        assert train.moments is test.moments is None


# ------------------------------------------------------------------ from a file to times


class TestTimesOfAFile:
    LONG = "id,step,x,when,label\na,2,1,2024-05-02 10:00,p\na,1,0,,p\nb,1,3,2024-05-01 09:30,q\n"
    WIDE = "t0,t1,when,label\n0,1,2024-05-02T10:00,p\n3,,2024-05-01T09:30,q\n"
    ARRAYS = {"X": np.array([[0.0, 1], [3, np.nan]]), "y": ["p", "q"]}  # noqa: RUF012

    def test_every_form_gives_the_same_times_and_no_feature_of_them(self, tmp_path: Path) -> None:
        found = []
        for name, text in (("long.csv", self.LONG), ("wide.csv", self.WIDE)):
            (tmp_path / name).write_text(text)
            found.append(hpo.read(tmp_path / name, time="when"))
        found += [
            hpo.read({**self.ARRAYS, "time": times}, time="when")
            for times in (
                ["02.05.2024 10:00", "01.05.2024 09:30"],
                np.array(["2024-05-02T10:00", "2024-05-01T09:30"], "datetime64[m]"),
                np.array(["2024-05-02T10:00", "2024-05-01T09:30"], "datetime64[ns]"),
                np.array([b"2024-05-02T11:00+01:00", b"2024-05-01T10:30+01:00"]),
            )
        ]
        expected = np.array(["2024-05-02T10:00", "2024-05-01T09:30"], "datetime64[us]")
        for each in found:
            assert each.moments is not None
            assert each.moments.dtype == expected.dtype
            assert each.moments.tolist() == expected.tolist()
            assert each.n_features == 1
        assert len({fingerprint(each.take([1, 0])) for each in found[2:]}) == 1

    @pytest.mark.parametrize("times", [[3, 1], [3.0, 1.0], np.array([3, 1], "uint8"), ["3", "1.0"], ["3", "1"]])
    def test_whole_numbers_are_alike(self, times: Any) -> None:
        found = hpo.read({**self.ARRAYS, "time": times}, time="when")
        assert fingerprint(found) == fingerprint(hpo.read({**self.ARRAYS, "time": [3, 1]}, time="when"))

    @pytest.mark.parametrize("role", ["id", "step", "group"])
    def test_the_column_may_have_another_role(self, role: str, tmp_path: Path) -> None:
        path = tmp_path / "days.csv"
        path.write_text("id,step,group,x,label\n3,7,9,1,p\n3,8,9,1,p\n4,5,2,1,q\n")
        found = hpo.read(path, time=role)
        assert found.moments is not None
        assert found.moments.tolist() == {"id": [3, 4], "step": [8, 5], "group": [9, 2]}[role]

    def test_a_data_frame_s_column_and_index(self) -> None:
        class Column:
            def __init__(self, values: Any) -> None:
                self.values = np.array(values)

            def to_numpy(self) -> NDArray[Any]:
                return self.values

        class Frame(dict[str, Column]):
            columns = property(dict.keys)
            shape = property(lambda self: (2, len(self)))

            def __len__(self) -> int:
                return 2

        frame = Frame(
            t0=Column([1.0, 2]), t1=Column([1.0, 3]), label=Column(["p", "q"]), day=Column(np.array([5, 4], "M8[D]"))
        )
        found = hpo.read(frame, time="day")
        assert found.moments is not None
        assert found.moments.astype("M8[D]").astype(int).tolist() == [5, 4]
        assert found.steps == 2

    def test_new_data_need_none(self, tmp_path: Path) -> None:
        (tmp_path / "new.csv").write_text("t0,t1,when\n0,1,never\n3,2,\n")
        found = read(tmp_path / "new.csv", time="when", labeled=False)
        assert (found.moments, found.steps) == (None, 2)
        (tmp_path / "new.csv").write_text("t0,t1\n0,1\n")
        assert read(tmp_path / "new.csv", time="when", labeled=False).steps == 2
        assert read(tmp_path / "new.csv", time="when").moments is None

    @pytest.mark.parametrize(
        ("times", "expected"),
        [
            ([1, None], "sequence 1 has no time"),
            ([1.0, np.inf], "sequence 1: a time must be finite, got inf"),
            (["2024-01-01", "soon"], "sequence 1: 'soon' is no time: times are numbers, or as in 2024-01-31"),
            (["2024-01-01", "5"], "sequence 1: time '5' is not of the form of the first time, '2024-01-01'"),
            ([1, 2, 3], r"time must be of shape \(2,\), one a sequence"),
        ],
    )
    def test_what_is_no_time_is_named(self, times: Any, expected: str) -> None:
        with pytest.raises(DataError, match=expected):
            hpo.read({**self.ARRAYS, "time": times}, time="when")

    def test_a_file_without_times_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"the data has no array 'time' \(N,\), which is named; it has X, y"):
            hpo.read(self.ARRAYS, time="when")
        with pytest.raises(DataError, match=r"TRAIN\.ts is a .ts file, whose sequences have no time: leave time out"):
            hpo.read("examples/data/ItalyPowerDemand_TRAIN.ts", time="when")
        (tmp_path / "wide.csv").write_text(self.WIDE)
        with pytest.raises(DataError, match="has no time column 'day'; its columns are t0, t1, when, label; say which"):
            hpo.read(tmp_path / "wide.csv", time="day")


# ------------------------------------------------------------------ what it is for


def drifting(n: int = 1500) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
    """Sequences (n, 2, 1) whose classes are told apart by a line that turns in time, n of them in all directions once.

    The second step is the level of a sensor, which rises with time: whoever has seen the neighbours of a sequence in
    time knows the line at that time, but not the one to come.
    """
    rng = np.random.default_rng(0)
    time = np.arange(n)
    angle = 2 * np.pi * time / n * 4
    points = rng.normal(size=(n, 2))
    labels = (points[:, 0] * np.cos(angle) + points[:, 1] * np.sin(angle) > 0).astype(np.int64)
    level = 40 * time / n + rng.normal(0, 0.1, n)
    return np.concatenate([points, level[:, None]], axis=1), labels, time


def test_shuffled_validation_of_drifting_data_is_too_good_and_ordered_validation_is_not(tmp_path: Path) -> None:
    X, y, time = drifting()
    np.savez(tmp_path / "drift.npz", X=X[:, None, :], y=y, time=time)
    plan, train, test = planned(tmp_path / "drift.npz", "data.validation={ folds = 5 }")
    drawn = split_share(train, 0.2, 0)

    def accuracy(fitted: Sequences, scored: Sequences) -> float:
        model = KNeighborsClassifier(15).fit(fitted.values[:, 0], fitted.labels)
        return float(model.score(scored.values[:, 0], scored.labels))

    def validated(parts: Any) -> float:
        scores = [accuracy(train.take(rows), train.take(later)) for rows, later in parts]
        return float(np.average(scores, weights=[len(later) for _, later in parts]))

    final = accuracy(train, test)
    assert validated(drawn) - final > 0.3
    assert abs(validated(validation_parts(plan.config, train, plan.rules)) - final) < 0.1
