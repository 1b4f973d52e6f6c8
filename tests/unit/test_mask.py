"""What a network is told of gaps with missing = "mask": which values were observed, and how long before."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from math import log, nan
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from hpo.models.bundle import bundle
from hpo.models.bundle.bundle import Bundle
from hpo.models.bundle.config import BundleConfig, from_json, to_json
from hpo.models.classifier import Classifier
from hpo.models.config import ClassifierConfig, TrainingConfig
from hpo.models.data import canonical
from hpo.models.data.gaps import has_gaps, inputs, usual_interval
from hpo.models.data.order import in_order
from hpo.models.data.readers import read
from hpo.models.data.sequences import DataError, Sequences, from_arrays
from hpo.models.training.augmentation import noise_of
from hpo.study.config import load
from hpo.study.entries import Choices
from hpo.study.plan import Plan, StudyConflict, make_plan
from hpo.study.readout import readout
from hpo.study.widening import continued
from hpo.trial.build import configurations

START = datetime(2024, 1, 1)
MASK: dict[str, Any] = {"missing": "mask", "normalization": "channel"}


def gapped(data: Sequences) -> Sequences:
    """The same with a third of its values marked as filled, and steps at unequal distances."""
    random = np.random.default_rng(0)
    inside = np.arange(data.steps) < data.lengths[:, None]
    observed = (random.random(data.values.shape) < 2 / 3) & inside[:, :, None]
    far = random.uniform(0.5, 3, inside.shape)
    times = np.where(inside, np.cumsum(far, axis=1) - far[:, :1], 0.0)
    return replace(data, observed=observed, times=times)


# ------------------------------------------------------------------------------------------------------ written down


@dataclass(frozen=True)
class Series:
    """One sequence: seconds (T,), rising, and values (T, F), NaN where they are missing."""

    seconds: list[int]
    values: list[list[float]]


@st.composite
def tables(draw: st.DrawFn) -> list[Series]:
    """Sequences of some steps at any distances; the last step of each has a value."""
    F = draw(st.integers(1, 3))
    value = st.integers(-9, 9).map(float) | st.just(nan)
    found = []
    for _ in range(draw(st.integers(1, 4))):
        seconds = sorted(draw(st.sets(st.integers(0, 300), min_size=1, max_size=6)))
        values = [draw(st.lists(value, min_size=F, max_size=F)) for _ in seconds]
        values[-1][0] = 1.0
        found.append(Series(seconds, values))
    return found


CLOCKS: dict[str, Callable[[int], str]] = {
    "dates": lambda s: (START + timedelta(seconds=s)).isoformat(),
    "seconds": str,
    "milliseconds": lambda s: str(1000 * s),
}


def written(
    table: list[Series],
    clock: str = "dates",
    columns: list[int] | None = None,
    rows: int | None = None,
    change: Callable[[float, int], float] = lambda value, feature: value,
) -> Sequences:
    """The table as a csv file in long form: its features in the order of `columns`, its rows in one by that seed."""
    F = len(table[0].values[0])
    order = list(range(F)) if columns is None else columns
    lines = [
        ",".join([str(i), CLOCKS[clock](second), *(str(change(step[f], f)) for f in order)])
        for i, one in enumerate(table)
        for second, step in zip(one.seconds, one.values, strict=True)
    ]
    if rows is not None:
        lines = [lines[i] for i in np.random.default_rng(rows).permutation(len(lines))]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "table.csv"
        path.write_text("\n".join([",".join(["id", "step", *(f"f{f}" for f in order)]), *lines]).replace("nan", ""))
        found = read(path)
    return found.take(np.argsort([int(name) for name in found.ids]))


def network(data: Sequences, interval: float, **more: Any) -> ClassifierConfig:
    return ClassifierConfig(data.n_features, 2, data.steps, interval=interval, **MASK | more)


def told(data: Sequences, interval: float) -> NDArray[np.float32]:
    return inputs(data, network(data, interval))


# ----------------------------------------------------------------------------------------------- what a network is told


@given(tables(), st.sampled_from([0.5, 60.0]))
def test_the_time_since_the_last_observation_is_what_two_loops_find(table: list[Series], interval: float) -> None:
    found = told(written(table), interval)
    F = len(table[0].values[0])
    for i, one in enumerate(table):
        assert not found[i, len(one.seconds) :].any()
        for f in range(F):
            last = one.seconds[0]
            for t, (second, step) in enumerate(zip(one.seconds, one.values, strict=True)):
                assert found[i, t, F + f] == (not np.isnan(step[f]))
                assert found[i, t, 2 * F + f] == pytest.approx(log(1 + (second - last) / interval), rel=1e-6)
                last = last if np.isnan(step[f]) else second


@given(tables())
def test_the_unit_of_time_does_not_matter(table: list[Series]) -> None:
    """Dates are seconds; numbers are what the file counts in."""
    found = {clock: written(table, clock) for clock in CLOCKS}
    interval = usual_interval(found["seconds"])
    assert usual_interval(found["dates"]) == pytest.approx(interval)
    assert usual_interval(found["milliseconds"]) == (None if interval is None else 1000 * interval)
    expected = told(found["seconds"], interval or 1.0)
    np.testing.assert_allclose(told(found["dates"], interval or 1.0), expected, rtol=1e-6)
    np.testing.assert_allclose(told(found["milliseconds"], 1000 * (interval or 1.0)), expected, rtol=1e-6)


@given(tables(), st.permutations(range(3)), st.integers(0, 99))
def test_the_order_of_rows_and_columns_does_not_matter(table: list[Series], order: list[int], rows: int) -> None:
    F = len(table[0].values[0])
    order = [f for f in order if f < F]
    found = told(written(table, columns=order, rows=rows), 10.0)
    blocks = [block * F + f for block in range(3) for f in order]
    np.testing.assert_array_equal(found, told(written(table), 10.0)[:, :, blocks])


@given(tables(), st.lists(st.integers(-20, 20), min_size=3, max_size=3), st.integers(-3, 3))
def test_a_features_unit_and_offset_do_not_change_its_marks(
    table: list[Series], offsets: list[int], power: int
) -> None:
    other = written(table, change=lambda value, f: (value + offsets[f]) * 10.0**power)
    F = other.n_features
    np.testing.assert_array_equal(told(other, 10.0)[:, :, F:], told(written(table), 10.0)[:, :, F:])


@given(tables())
def test_where_nothing_is_missing_all_is_observed(table: list[Series]) -> None:
    data = written(table, change=lambda value, _: 0.0 if np.isnan(value) else value)
    assert data.observed is None
    inside = np.arange(data.steps) < data.lengths[:, None]
    np.testing.assert_array_equal(
        told(data, 0.0)[:, :, data.n_features :], np.repeat(inside[:, :, None], data.n_features, 2)
    )


@given(tables(), st.integers(1, 3))
def test_neither_padding_nor_others_of_a_batch_change_an_answer(table: list[Series], padding: int) -> None:
    data = written(table)
    config = network(data, 10.0, hidden_size=4, pooling="concat", difference=True)
    torch.manual_seed(0)
    model = bundle.assemble(
        BundleConfig(config, ("a", "b"), data.features, "auroc", named=True), [Classifier(config).state_dict()]
    )
    together = model.predict(data).probabilities
    for i in range(data.n):
        np.testing.assert_allclose(model.predict(data.take([i])).probabilities[0], together[i], atol=2e-6)
    empty = [nan] * data.n_features
    longer = [Series([*s.seconds, *(400 + k for k in range(padding))], [*s.values, *[empty] * padding]) for s in table]
    np.testing.assert_allclose(model.predict(written(longer)).probabilities, together, atol=2e-6)


def test_a_network_with_marks_of_observations_alone_needs_no_times() -> None:
    data = from_arrays(np.array([[[1.0], [nan], [3.0]]]))
    assert inputs(data, network(data, 0.0))[0].tolist() == [[1, 1], [2, 0], [3, 1]]
    with pytest.raises(DataError, match=r"do not say when the steps of a sequence were: .* a table in long form"):
        inputs(data, network(data, 1.0))


def test_noise_leaves_marks_alone() -> None:
    classifier = ClassifierConfig(2, 2, 4, missing="mask", interval=1.0, difference=True, patch_length=2)
    torch.manual_seed(0)
    values, lengths = torch.randn(2, 5, 2 * classifier.channels), torch.full((5,), 2)
    noise = noise_of(TrainingConfig("auroc", jitter=0.1), classifier, values, lengths, np.arange(5), None)
    assert noise is not None
    marked = [False] * 4 + [True] * 4  # values, their differences; both kinds of marks
    assert (noise.added == 0).tolist() == marked * 2
    assert (noise.factor == 0).tolist() == marked * 2  # type: ignore[union-attr]


# ----------------------------------------------------------------------------------------------------- reading, storing


class TestReading:
    def test_knows_the_usual_distance_of_steps(self, tmp_path: Path) -> None:
        day = 86_400
        weekdays = [Series([day * d for d in (0, 1, 2, 3, 4, 7, 8)], [[1.0]] * 7)]
        assert usual_interval(written(weekdays)) == day
        assert has_gaps(written(weekdays))  # a weekend
        (tmp_path / "wide.csv").write_text("label,2024-01-01,2024-01-02,2024-01-05\na,1,2,3\nb,4,5,6\n")
        assert usual_interval(read(tmp_path / "wide.csv")) == 2 * day

    def test_of_steps_at_equal_distances_keeps_the_distance_alone(self) -> None:
        data = written([Series([60, 120, 180], [[1.0]] * 3), Series([0, 60], [[1.0]] * 2)])
        assert (data.times, data.spacing, usual_interval(data), has_gaps(data)) == (None, 60.0, None, False)
        assert data.positions is not None
        assert data.positions.tolist() == [[0, 60, 120], [0, 60, 0]]

    def test_a_little_jitter_of_a_clock_is_no_gap(self) -> None:
        data = written([Series([0, 10, 21, 30, 44, 54], [[1.0]] * 6)])
        assert usual_interval(data) == 10.0
        assert not has_gaps(data)
        assert has_gaps(written([Series([0, 10, 21, 30, 46, 56], [[1.0]] * 6)]))

    def test_of_arrays_no_times_are_known(self) -> None:
        data = from_arrays(np.array([[1.0, nan, 3.0]]))
        assert (data.times, data.spacing, data.positions) == (None, None, None)
        assert data.observed is not None
        assert data.observed.tolist() == [[[True], [False], [True]]]

    def test_of_arrays_are_those_of_their_steps(self, tmp_path: Path) -> None:
        X = np.arange(12.0).reshape(2, 3, 2)
        X[0, 1, 0] = X[1, 2] = nan
        seconds = [[0, 10, 40], [5, 6, 7]]
        dates = np.array([[np.datetime64(START, "ms") + 1000 * s for s in row] for row in seconds])
        texts = [[str(date) for date in row] for row in dates]
        rows = [f"{i},{texts[i][t]},{X[i, t, 0]},{X[i, t, 1]}" for i in range(2) for t in range(3) if (i, t) != (1, 2)]
        (tmp_path / "a.csv").write_text("\n".join(["id,step,x0,x1", *rows]).replace("nan", "") + "\n")
        expected = read(tmp_path / "a.csv")
        np.savez(tmp_path / "a.npz", X=X, steps=dates)
        padded = np.where(np.isnan(X[:, :, 1]), np.datetime64("NaT"), dates)
        given = [dates, texts, padded, np.array(seconds), [np.array([0.0, 10.0, 40.0]), np.array([5.0, 6.0])]]
        for found in (read(tmp_path / "a.npz"), *(read({"X": X, "steps": steps}) for steps in given)):
            assert canonical.fingerprint(found) == canonical.fingerprint(expected)
            assert found.times is not None
            assert found.times.tolist() == [[0, 10, 40], [0, 1, 0]]
            assert found.values[0, 1, 0] == 1.0  # a quarter of the way from 0 to 4

    @pytest.mark.parametrize(
        ("steps", "message"),
        [
            ([[0, 1, 2]], "steps must be those of each of the 2 sequences, got 1"),
            (7, "steps must be those of each of the 2 sequences, got 1"),
            ([[0, 1, 1], [0, 1, 2]], r"sequence 0, step 2 is not after the one before it: steps must rise"),
            (np.zeros((2, 3)), "steps must rise; those beyond a sequence's end are missing"),
            ([[0, 1, 2], [0, 1]], r"sequence 1 has a value at step 2, but not where that is"),
            ([[0, 1, 2], [0, nan, 2]], r"sequence 1 has a value at step 1, but not where that is"),
            ([[0, 1, 2], [0, 1, None]], r"sequence 1 has a value at step 2, but not where that is"),
            ([[], []], r"sequence 0 has a value at step 0, but not where that is"),
            ([[0, 1, 2], [0, 1, 2, 3]], "sequence 1: steps must be a list of numbers or times, and at most 3"),
            ([[0, 1, 2], [[0], [1, 2]]], "sequence 1: steps must be a list of numbers or times"),
            ([[0, 1, 2], ["a", "b", "c"]], "sequence 1: step 'a'|sequence 1: 'a' is no step"),
            ([[True, False, True]] * 2, "'True' is no step"),
            ([[0, 1, 2], ["2024-01-01", "2024-01-02", "2024-01-03"]], "is not of the form of the first step"),
        ],
    )
    def test_steps_of_arrays_that_say_nothing_are_refused(self, steps: object, message: str) -> None:
        with pytest.raises(DataError, match=message):
            read({"X": np.ones((2, 3)), "steps": steps})

    def test_what_cannot_be_measured_is_not_known(self, tmp_path: Path) -> None:
        (tmp_path / "far.csv").write_text("id,step,x\na,-1e308,1\na,0,2\na,1e308,3\n")
        assert read(tmp_path / "far.csv").positions is None

    def test_a_part_without_gaps_has_no_mask(self) -> None:
        data = from_arrays([np.array([1.0, nan, 2.0]), np.array([1.0, 2.0])])
        assert data.observed is not None
        assert data.take([1]).observed is None


@given(tables())
def test_the_stored_form_keeps_what_was_observed_and_when(table: list[Series]) -> None:
    data = written(table)
    with tempfile.TemporaryDirectory() as folder:
        canonical.save(data, Path(folder) / "data")
        again = canonical.load(Path(folder) / "data")
        assert canonical.fingerprint(again) == canonical.fingerprint(data)
        for name in ("observed", "times"):
            one, other = getattr(data, name), getattr(again, name)
            assert (one is None) == (other is None)
            assert one is None or (one == other).all()


@given(tables(), st.integers(0, 99))
def test_sequences_that_only_their_gaps_tell_apart_have_an_order_of_their_own(table: list[Series], seed: int) -> None:
    same = [Series(one.seconds, [[0.0 if v == v else nan for v in step] for step in one.values]) for one in table]
    data = written(same)
    data = replace(data, values=np.zeros_like(data.values))
    first = in_order(data)
    shuffled = in_order(data.take(np.random.default_rng(seed).permutation(data.n)))
    for name in ("lengths", "observed", "times"):
        one, other = getattr(first, name), getattr(shuffled, name)
        assert one is other is None or (one == other).all()


# ----------------------------------------------------------------------------------------------------------- the study


def write(folder: Path, name: str = "waves.csv", gaps: bool = False, uneven: bool = False, n: int = 12) -> Path:
    """Sequences of five steps with two features; uneven: there are three minutes without a step."""
    X = np.random.default_rng(0).integers(-9, 9, (n, 5, 2)).astype(float)
    if gaps:
        X[1, 2, 0] = nan
        X[3, :, 1] = nan
    minutes = [0, 1, 5, 6, 7] if uneven else [0, 1, 2, 3, 4]
    lines = [
        f"{i},2024-01-01T00:0{minute}:00,{X[i, t, 0]},{X[i, t, 1]},{i % 2}"
        for i in range(n)
        for t, minute in enumerate(minutes)
    ]
    (folder / name).write_text("\n".join(["id,step,pulse,breath,label", *lines]).replace("nan", "") + "\n")
    return folder / name


class TestPlan:
    @pytest.mark.parametrize(("gaps", "uneven"), [(False, False), (True, False), (False, True), (True, True)])
    def test_the_space_holds_the_mask_where_there_are_gaps(self, tmp_path: Path, gaps: bool, uneven: bool) -> None:
        plan, train, test = make_plan(load(write(tmp_path, gaps=gaps, uneven=uneven)))
        assert ("steps are usually 60 apart (dates: in seconds)" in readout(plan, train, test)[-1]) == uneven
        entry = Choices(("interpolate", "mask")) if gaps or uneven else "interpolate"
        assert plan.config.space["missing"] == entry
        assert plan.interval == (60.0 if uneven else 0.0)
        assert (train.times is not None) == uneven
        assert (train.observed is not None) == gaps
        assert test is not None
        assert (test.times is not None) == uneven
        assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan

    def test_a_trial_is_told_the_times_in_the_training_parts_interval(self, tmp_path: Path) -> None:
        plan, _, _ = make_plan(load(write(tmp_path, uneven=True)))
        found = {missing: configurations(plan, {"missing": missing}, 0)[0] for missing in ("interpolate", "mask")}
        assert {missing: each.interval for missing, each in found.items()} == {"interpolate": 0.0, "mask": 60.0}

    def test_the_times_of_an_even_test_part_are_kept_where_the_training_parts_differ(self, tmp_path: Path) -> None:
        test = write(tmp_path, "even.csv")
        _, _, found = make_plan(load(write(tmp_path, uneven=True), [f"data.test={test}"]))
        assert found is not None
        assert found.times is not None
        assert found.times[0].tolist() == [0, 60, 120, 180, 240]
        canonical.save(found, tmp_path / "stored")
        assert canonical.load(tmp_path / "stored").positions is not None

    def test_a_test_part_without_times_leaves_them_out_and_it_is_said(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        np.savez(tmp_path / "test.npz", X=np.zeros((4, 5, 2)), y=np.arange(4) % 2)
        plan, train, _ = make_plan(load(write(tmp_path, uneven=True), [f"data.test={tmp_path / 'test.npz'}"]))
        assert (plan.interval, train.times) == (0.0, None)
        assert "the test part does not say when its steps were" in caplog.text

    @pytest.mark.parametrize(
        ("gaps", "uneven", "whole", "part"),  # hashes, as the version before the mask gave them
        [
            (False, False, "bc3f9afad4d0b353", "ce2f4cef4faf73cb"),
            (True, False, None, "49c22bdc7c5e3403"),
            (False, True, None, "ce2f4cef4faf73cb"),
            (True, True, None, "581aed9dbe800089"),
        ],
    )
    def test_data_without_gaps_and_studies_of_earlier_versions_keep_their_hashes(
        self, tmp_path: Path, gaps: bool, uneven: bool, whole: str | None, part: str
    ) -> None:
        file = write(tmp_path, gaps=gaps, uneven=uneven)
        if whole is not None:
            assert canonical.fingerprint(read(file, labeled=True)).startswith(whole)
        config = load(file, ["data.holdout=0.25"])
        assert make_plan(config, 4)[0].train.startswith(f"data-{part}")
        assert (make_plan(config)[0].train == make_plan(config, 4)[0].train) == (whole is not None)

    def test_a_study_of_an_earlier_version_has_no_mask(self, tmp_path: Path) -> None:
        file = write(tmp_path, gaps=True, uneven=True)
        earlier, train, _ = make_plan(load(file), 4)
        assert earlier.config.space["missing"] == "interpolate"
        assert (train.observed, train.positions, earlier.interval) == (None, None, 0.0)
        content = earlier.to_json()
        del content["interval"], content["config"]["space"]["missing"]  # as it was stored
        stored = Plan.from_json(content)
        assert continued(stored, make_plan(load(file), 4)[0]) == stored
        asked = make_plan(load(file, ['space.missing=["interpolate", "mask"]']), 4)[0]
        with pytest.raises(StudyConflict, match="missing: an earlier version made the study, whose data do not say"):
            continued(stored, asked)


class TestModel:
    def model(self, interval: float) -> Bundle:
        config = ClassifierConfig(2, 2, 5, hidden_size=3, interval=interval, missing="mask")
        torch.manual_seed(0)
        names = BundleConfig(config, ("0", "1"), ("pulse", "breath"), "auroc", named=True)
        return bundle.assemble(names, [Classifier(config).state_dict()])

    def test_that_is_told_times_refuses_data_without(self) -> None:
        with pytest.raises(DataError, match=r"do not say when .* give a table in long form"):
            self.model(60.0).predict(np.zeros((2, 5, 2)))
        assert self.model(0.0).predict(np.zeros((2, 5, 2))).probabilities.shape == (2, 2)

    def test_predicts_arrays_with_steps_as_a_table(self, tmp_path: Path) -> None:
        model = self.model(60.0)
        data = model.read(write(tmp_path, gaps=True, uneven=True))
        X = np.where(data.observed, data.values, nan) if data.observed is not None else data.values
        found = model.predict({"X": X, "steps": data.times}).probabilities
        np.testing.assert_array_equal(found, model.predict(data).probabilities)

    def test_takes_the_times_of_steps_at_equal_distances(self, tmp_path: Path) -> None:
        found = self.model(60.0).predict(self.model(60.0).read(write(tmp_path)))
        assert np.isfinite(found.probabilities).all()

    def test_predicts_otherwise_where_values_were_filled(self, tmp_path: Path) -> None:
        model = self.model(0.0)
        X = np.array([[[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]]])
        gap = X.copy()
        gap[0, 1] = nan
        assert np.abs(model.predict(gap).probabilities - model.predict(X).probabilities).max() > 1e-4

    def test_warns_of_times_in_another_unit(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.WARNING)
        data = self.model(60.0).read(write(tmp_path, uneven=True))
        self.model(60.0).predict(data)
        assert not caplog.records
        self.model(86_400.0).predict(data)
        assert "the steps are 60 apart, in training 86400" in caplog.text

    def test_one_that_was_saved_before_there_was_a_mask_is_told_nothing_of_gaps(self) -> None:
        content = json.loads(to_json(self.model(60.0).config))
        del content["classifier"]["missing"], content["classifier"]["interval"]
        found = from_json(json.dumps(content).encode(), "config.json").classifier
        assert (found.missing, found.interval, found.marks) == ("interpolate", 0.0, 0)
