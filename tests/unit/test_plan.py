"""What a plan says of itself, without a database."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hpo.models.config import EARLIER_EPSILON
from hpo.models.data.sequences import DataError
from hpo.models.data.splits import RULES
from hpo.models.metrics import score
from hpo.study.config import ConfigError, Folds, load
from hpo.study.plan import Plan, make_plan
from hpo.trial.build import configurations


def write(path: Path, n: int = 40, **more: object) -> Path:
    X = np.random.default_rng(0).normal(size=(n, 6, 1))
    np.savez(path, X=X, **({"y": np.arange(n) % 2} | more))  # type: ignore[arg-type]
    return path


def test_a_study_of_an_earlier_version_goes_on_by_the_rules_it_began_with(tmp_path: Path) -> None:
    plan, _, _ = make_plan(load(write(tmp_path / "waves.npz")))
    content = plan.to_json()
    assert content["rules"] == RULES
    assert configurations(plan, {}, 0)[0].epsilon == 0
    del content["rules"]
    assert configurations(Plan.from_json(content), {}, 0)[0].epsilon == EARLIER_EPSILON


class TestDefaultsFollowFromTheData:
    """A data file alone is a study (SparseSC#48, evalml#1783, scikit-learn#34828)."""

    @pytest.mark.parametrize(("patients", "folds"), [(3, 2), (5, 4), (6, 5), (30, 5)])
    def test_as_many_folds_as_groups_are_left_and_five_at_most(self, tmp_path: Path, patients: int, folds: int) -> None:
        plan, _, _ = make_plan(load(write(tmp_path / "waves.npz", 60, groups=np.arange(60) // 2 % patients)))
        assert plan.config.data.validation == Folds(folds)
        assert plan.written.data.validation is None

    def test_four_sequences(self, tmp_path: Path) -> None:
        plan, train, test = make_plan(load(write(tmp_path / "waves.npz", 4)))
        assert (plan.config.data.validation, train.n, test and test.n) == (Folds(3), 3, 1)

    def test_folds_that_were_asked_for_are_refused_with_key_and_file(self, tmp_path: Path) -> None:
        path = write(tmp_path / "waves.npz", groups=np.arange(40) // 2 % 5)
        expected = (
            r"waves\.npz: data\.validation = \{ folds = 5 \} cannot be had beside a test part of data\.holdout = 0\.2"
        )
        with pytest.raises(DataError, match=expected + ": folds must be 2 to 4, the number of groups, got 5; choose"):
            make_plan(load(path, ["data.validation={ folds = 5 }"]))

    def test_two_groups_are_too_few_for_a_test_part_and_folds(self, tmp_path: Path) -> None:
        path = write(tmp_path / "waves.npz", groups=np.arange(40) // 2 % 2)
        expected = r"waves\.npz: data\.validation = \{ folds = 2 \}, the default, cannot be had .* of one group"
        with pytest.raises(DataError, match=expected + ".* name a test file in data.test"):
            make_plan(load(path))

    def test_one_group_is_said(self, tmp_path: Path) -> None:
        path = write(tmp_path / "waves.npz", groups=np.zeros(40, int))
        expected = (
            r"waves\.npz: no test part can be set aside \(data\.holdout = 0\.2\): all 40 sequences are of one group"
        )
        with pytest.raises(DataError, match=expected):
            make_plan(load(path))


class TestRareClasses:
    """torchmetrics#300, evalml#970, pytorch-time-series-classification#6."""

    RARE = np.where(np.isin(np.arange(300), (3, 130, 250)), "yes", "no")

    def test_a_test_part_holds_one_where_there_are_two(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        for seed in range(10):
            _, train, test = make_plan(load(write(tmp_path / "rare.npz", 300, y=self.RARE), [f"study.seed={seed}"]))
            assert test is not None
            assert test.labels is not None
            assert train.labels is not None
            assert test.n == 60
            assert 1 in test.labels
            assert 1 in train.labels
        assert not caplog.records

    def test_a_test_part_that_lacks_a_class_is_said(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        write(tmp_path / "one.npz", 8, y=np.array(["no"] * 8))
        make_plan(load(write(tmp_path / "rare.npz", 300, y=self.RARE), [f"data.test={tmp_path / 'one.npz'}"]))
        assert "no sequence of class 'yes' is among the 8 of the test part: metrics that need one" in caplog.text

    def test_a_study_of_an_earlier_version_keeps_its_parts(self, tmp_path: Path) -> None:
        config = load(write(tmp_path / "rare.npz", 300, y=self.RARE), ["study.seed=1"])
        plan, _, test = make_plan(config, rules=1)
        assert test is not None
        assert test.labels is not None
        assert (plan.rules, 1 in test.labels) == (1, False)
        assert make_plan(config)[0].train != plan.train


class TestThePositiveClass:
    """F1 of the wrong class, as an anomaly's name comes before "normal" (evalml#2926)."""

    def data(self, folder: Path) -> Path:
        labels = np.array(["anomaly", "normal"])[(np.arange(60) % 10 > 0).astype(int)]
        return write(folder / "waves.npz", 60, y=labels)

    def test_by_default_it_is_the_last_by_name(self, tmp_path: Path) -> None:
        plan, train, _ = make_plan(load(self.data(tmp_path)))
        assert plan.classes == ("anomaly", "normal")
        assert train.labels is not None
        assert train.labels.mean() > 0.5

    def test_the_chosen_one_is_the_second_in_every_part(self, tmp_path: Path) -> None:
        plan, train, test = make_plan(load(self.data(tmp_path), ["data.positive=anomaly"]))
        assert plan.classes == ("normal", "anomaly")
        assert test is not None
        for part in (train, test):
            assert part.labels is not None
            assert part.classes == ("normal", "anomaly")
            assert 0 < part.labels.mean() < 0.5
        labels, scores = train.labels, np.zeros((train.n, 2))
        assert labels is not None
        scores[:, 0] = 1  # a model that never finds one
        assert score("f1", scores, labels) == 0.0

    def test_a_test_file_follows(self, tmp_path: Path) -> None:
        train = self.data(tmp_path)
        write(tmp_path / "test.npz", 4, y=np.array(["anomaly", "normal"] * 2))
        _, _, test = make_plan(load(train, ["data.positive=anomaly", "data.test=test.npz"]))
        assert test is not None
        assert test.labels is not None
        assert [test.labels[test.ids.index(name)] for name in "0123"] == [1, 0, 1, 0]

    def test_a_name_that_is_no_class_and_more_than_two_classes_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"data\.positive does not fit .*waves\.npz: .*one of .*got 'sick'"):
            make_plan(load(self.data(tmp_path), ["data.positive=sick"]))
        three = write(tmp_path / "three.npz", 60, y=np.arange(60) % 3)
        with pytest.raises(DataError, match=r"a positive class is one of two, there are 3"):
            make_plan(load(three, ['data.positive="1"']))


class TestWhatWouldFailLaterIsRefusedAtOnce:
    """Studies that were accepted and whose trials or promotion then failed (benchmarks/fuzz_trials.py)."""

    RARE = np.where(np.arange(60) == 7, "yes", "no")

    @pytest.mark.parametrize(
        ("override", "expected"),
        [
            ("study.metric=auroc", 'study.metric = "auroc"'),
            ("study.metric=average_precision", 'study.metric = "average_precision"'),
            ("study.metric=f1", 'study.metric = "f1"'),
            ("space.threshold=chosen", 'study.metric = "auroc"'),
            ("space.threshold=['half', 'chosen'];study.metric=accuracy", 'space.threshold = "chosen"'),
        ],
    )
    @pytest.mark.parametrize("share", ["0.2", "1e-9"])
    def test_a_metric_that_its_validation_part_cannot_have(
        self, tmp_path: Path, override: str, expected: str, share: str
    ) -> None:
        path = write(tmp_path / "rare.npz", 60, y=self.RARE)
        write(tmp_path / "test.npz", 8, y=np.array(["no", "yes"] * 4))
        overrides = [f"data.validation={share}", "data.test=test.npz", *override.split(";")]
        count = "12 sequences, all" if share == "0.2" else "1 sequence,"
        with pytest.raises(DataError) as error:
            make_plan(load(path, overrides))
        assert str(error.value) == (
            f"{path}: data.validation = {float(share)} validates on {count} of class 'no', but {expected} needs others "
            "too: set more aside, as in data.validation = { folds = 5 }"
        )
        make_plan(load(path, [*overrides, "data.validation={ folds = 5 }"]))

    def test_what_has_a_value_on_one_class_is_taken(self, tmp_path: Path) -> None:
        path = write(tmp_path / "rare.npz", 60, y=self.RARE)
        write(tmp_path / "test.npz", 8, y=np.array(["no", "yes"] * 4))
        for metric in ("accuracy", "balanced_accuracy", "log_loss"):
            make_plan(load(path, ["data.validation=0.2", "data.test=test.npz", f"study.metric={metric}"]))

    def test_a_test_part_that_takes_a_class_whole(self, tmp_path: Path) -> None:
        path = write(tmp_path / "grouped.npz", 12, y=np.arange(12) // 6, groups=np.arange(12) // 6)
        expected = r"grouped\.npz: no test part can be set aside .* what is left to train on has one class only, '[01]'"
        with pytest.raises(DataError, match=expected):
            make_plan(load(path))

    def test_flatten_where_a_test_sequence_has_other_steps(self, tmp_path: Path) -> None:
        path = write(tmp_path / "waves.npz")
        np.savez(tmp_path / "test.npz", X=np.zeros((4, 6, 1)), y=np.arange(4) % 2, lengths=[6, 6, 5, 6])
        flatten = ["data.test=test.npz", "space.pooling=['last', 'flatten']"]
        expected = (
            r"test\.npz: sequence '2' of the test part has 5 steps, but space\.pooling = .* needs 6, as in training"
        )
        with pytest.raises(DataError, match=expected):
            make_plan(load(path, flatten))
        with pytest.raises(DataError, match="needs 6 or more"):
            make_plan(load(path, [*flatten, "space.sequence_length=6"]))
        make_plan(load(path, [*flatten, "space.sequence_length=5"]))

    @pytest.mark.parametrize(
        ("entry", "expected"),
        [
            ("learning_rate=1e-320", r"learning_rate must be .* of at least 1.17549e-38 and at most 3.40282e\+38, got"),
            ("learning_rate=[0.1, 3.5e38]", r"learning_rate must be .* at most 3.40282e\+38, got 3.5e\+38"),
            ("weight_decay={ low = 0.1, high = 1e300 }", r"weight_decay.high must be .* at most 3.40282e\+38, got"),
            ("gradient_clip=1e39", r"gradient_clip must be .* at most 3.40282e\+38, got 1e\+39"),
        ],
    )
    def test_numbers_that_float32_cannot_hold(self, tmp_path: Path, entry: str, expected: str) -> None:
        with pytest.raises(ConfigError, match=rf"space\.{expected}"):
            make_plan(load(write(tmp_path / "waves.npz"), [f"space.{entry}"]))


def test_what_groups_are_called_is_part_of_the_stored_data_but_of_earlier_studies(tmp_path: Path) -> None:
    """Whose data keep their hash after an update."""
    one, other = (write(tmp_path / f"{name}.npz", groups=[f"{name} {i % 10}" for i in range(40)]) for name in "ab")
    for rules in (RULES, 3):
        plans = [make_plan(load(path), rules)[0] for path in (one, other)]
        assert (plans[0].train == plans[1].train) == (rules < 4)
    plain = write(tmp_path / "plain.npz")
    assert make_plan(load(plain))[0].train == make_plan(load(plain), 3)[0].train
