"""What a sequence lacks throughout is the training part's mean of it, in training and in whatever is predicted.

The case `feature_missing` (a sensor of 60 degrees filled with 0), and `predict-feature-all-missing`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray

from hpo.models.bundle import bundle
from hpo.models.bundle.bundle import Bundle
from hpo.models.bundle.config import BundleConfig, BundleError, from_json, to_json
from hpo.models.classifier import Classifier
from hpo.models.config import ClassifierConfig
from hpo.models.data.readers import read
from hpo.models.data.sequences import Sequences, from_arrays, matched
from hpo.models.data.splits import RULES
from hpo.study.config import load
from hpo.study.plan import Plan, make_plan
from hpo.study.readout import readout

FEATURES = ("pulse", "warmth")
random = np.random.default_rng(0)


def values(n: int = 40, lacking: int = 10, steps: int = 6) -> NDArray[np.float64]:
    """(n, steps, 2): near 0 and near 60, without any of the second in the first sequences."""
    found = random.normal((0.0, 60.0), 1.0, (n, steps, 2))
    found[:lacking, :, 1] = np.nan
    return found


def write_npz(folder: Path, X: NDArray[np.float64], y: NDArray[np.int64]) -> Path:
    np.savez(folder / "waves.npz", X=X, y=y)
    return folder / "waves.npz"


def write_csv(folder: Path, X: NDArray[np.float64], y: NDArray[np.int64]) -> Path:
    rows = [f"{i},{t},{','.join(map(str, X[i, t]))},{y[i]}" for i in range(len(X)) for t in range(X.shape[1])]
    text = "\n".join(["id,step,pulse,warmth,label", *rows]).replace("nan", "")
    (folder / "waves.csv").write_text(text + "\n")
    return folder / "waves.csv"


def write_ts(folder: Path, X: NDArray[np.float64], y: NDArray[np.int64]) -> Path:
    lines = [
        ":".join(",".join(map(str, feature)) for feature in one.T) + f":{label}"
        for one, label in zip(X, y, strict=True)
    ]
    head = ["@problemName waves", "@univariate false", "@classLabel true 0 1", "@data"]
    (folder / "waves.ts").write_text("\n".join([*head, *lines]).replace("nan", "?") + "\n")
    return folder / "waves.ts"


def table(X: NDArray[np.float64], y: NDArray[np.int64]) -> pa.Table:
    n, steps, _ = X.shape
    columns: dict[str, NDArray[np.generic]] = {"id": np.repeat(np.arange(n), steps)}
    columns |= {"step": np.tile(np.arange(steps), n), "label": np.repeat(y, steps)}
    return pa.table(columns | {name: X[:, :, f].ravel() for f, name in enumerate(FEATURES)})


def write_parquet(folder: Path, X: NDArray[np.float64], y: NDArray[np.int64]) -> Path:
    pq.write_table(table(X, y), folder / "waves.parquet")
    return folder / "waves.parquet"


WRITERS = [write_npz, write_csv, write_ts, write_parquet]
Write = Callable[[Path, NDArray[np.float64], NDArray[np.int64]], Path]


@pytest.mark.parametrize("write", WRITERS)
def test_every_reader_says_what_is_missing_and_where(tmp_path: Path, write: Write) -> None:
    X = values(12, lacking=3)
    X[5, 2, 0] = np.nan
    data = read(write(tmp_path, X, np.arange(12) % 2), labeled=True)
    assert data.missing is not None
    assert data.missing[:6].tolist() == [[0, 6], [0, 6], [0, 6], [0, 0], [0, 0], [1, 0]]
    assert data.absent.tolist() == [[False, i < 3] for i in range(12)]
    assert (data.filled, data.gaps) == (19, (1 / 72, 18 / 72))


class TestMeans:
    def test_are_over_the_steps_of_the_sequences_that_have_the_feature(self) -> None:
        parts = [[[1.0, np.nan], [2.0, np.nan]], [[3.0, 10.0]], [[4.0, 20.0], [np.nan, 30.0]]]
        data = from_arrays([np.array(part) for part in parts])
        assert data.means().tolist() == pytest.approx([(1 + 2 + 3 + 4 + 4) / 5, 20.0])

    def test_fill_only_what_a_sequence_lacks_and_no_padding(self) -> None:
        parts = [np.array([[1.0, np.nan], [2.0, np.nan]]), np.array([[3.0, 10.0], [4.0, np.nan], [5.0, 30.0]])]
        filled = from_arrays(parts).filled_with([7.0, 8.0])
        assert filled.values.tolist() == [[[1, 8], [2, 8], [0, 0]], [[3, 10], [4, 20], [5, 30]]]
        assert filled.means().tolist() == [3.0, 20.0]  # what was filled is still known for it
        assert filled.filled_with([0.0, 9.0]).values[0].tolist() == [[1, 9], [2, 9], [0, 0]]

    def test_of_a_feature_that_no_sequence_has_is_0(self) -> None:
        assert from_arrays(np.full((3, 4, 1), np.nan), lengths=[4, 4, 4]).means().tolist() == [0.0]

    def test_survive_a_choice_and_another_order(self) -> None:
        data = from_arrays(values(), features=FEATURES)
        assert data.take([0, 39]).absent.tolist() == [[False, True], [False, False]]
        turned = matched(data, FEATURES[::-1], named=True)
        assert turned.absent[0].tolist() == [True, False]
        assert turned.gaps == (0.25, 0.0)
        assert turned.means().tolist() == data.means()[::-1].tolist()


class TestPlan:
    def plan(self, folder: Path, *settings: str, rules: int = RULES) -> tuple[Plan, Sequences, Sequences | None]:
        file = write_csv(folder, values(80, lacking=30), np.arange(80) % 2)
        return make_plan(load(file, list(settings)), rules)

    def test_the_training_parts_mean_stands_in_both_parts(self, tmp_path: Path) -> None:
        plan, train, test = self.plan(tmp_path)
        assert test is not None
        known = train.values[~train.absent[:, 1], :, 1]
        assert known.mean() == pytest.approx(60, abs=1)
        assert plan.fill == pytest.approx((train.values[:, :, 0].mean(), known.mean()))
        for part in (train, test):
            assert part.absent.any()
            assert (part.values[part.absent[:, 1], :, 1] == np.float32(plan.fill[1])).all()  # type: ignore[index]
        assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan

    def test_a_study_of_an_earlier_version_keeps_its_zeros(self, tmp_path: Path) -> None:
        plan, train, _ = self.plan(tmp_path, rules=2)
        assert plan.fill is None
        assert (train.values[train.absent[:, 1], :, 1] == 0).all()
        content = plan.to_json()
        del content["fill"], content["gaps"]
        assert Plan.from_json(content).fill is None

    def test_is_said_with_counts(self, tmp_path: Path) -> None:
        plan, train, test = self.plan(tmp_path)
        assert test is not None
        assert plan.fill is not None
        for line, part in zip(readout(plan, train, test), (train, test), strict=False):
            count = int(part.absent.sum())
            assert f"; {6 * count} missing values filled; a feature that a sequence lacks throughout is its" in line
            assert line.endswith(f"mean over the training part: 'warmth' in {count} ({plan.fill[1]:.6g})")


class TestModel:
    CLASSIFIER = ClassifierConfig(features=2, classes=2, steps=6, hidden_size=4, normalization="channel")
    CONFIG = BundleConfig(CLASSIFIER, ("a", "b"), FEATURES, "auroc", named=True, fill=(0.5, 60.0), gaps=(0.0, 0.1))

    def model(self, config: BundleConfig = CONFIG) -> Bundle:
        torch.manual_seed(1)
        member = Classifier(self.CLASSIFIER)
        member.mean[:], member.deviation[:] = 60.0, 1.0
        return bundle.assemble(config, [member.state_dict()])

    @pytest.mark.parametrize("form", ["array", "list", "sequences", "frame", "file"])
    def test_predicts_as_with_the_training_means_in_place(self, tmp_path: Path, form: str) -> None:
        X, y = values(12, lacking=4), np.arange(12) % 2
        data: object = {
            "array": X,
            "list": list(X),
            "sequences": from_arrays(X, features=FEATURES),
            "frame": table(X, y),
            "file": self.model().read(write_csv(tmp_path, X, y)),
        }[form]
        whole = np.where(np.isnan(X), np.float32(60.0), X)
        expected = self.model().predict(whole).probabilities
        np.testing.assert_allclose(self.model().predict(data).probabilities, expected, atol=1e-6)
        earlier = self.model(replace(self.CONFIG, fill=None)).predict(data).probabilities
        assert not np.allclose(earlier, expected, atol=1e-3)

    def test_warns_of_more_gaps_than_in_training(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.WARNING)
        self.model().predict(values(100, lacking=15))
        assert not caplog.records
        self.model().predict(values(100, lacking=30))
        assert "in training, and are filled: 'warmth' 30.0% (in training 10.0%)" in caplog.text
        caplog.clear()
        self.model(replace(self.CONFIG, gaps=None)).predict(values(100, lacking=100))
        assert not caplog.records

    def test_keeps_the_means_in_its_configuration(self) -> None:
        text = to_json(self.CONFIG)
        assert from_json(text.encode(), "config.json") == self.CONFIG
        assert "`fill`, the training part's means" in text

    def test_an_earlier_format_had_none(self) -> None:
        content = json.loads(to_json(self.CONFIG)) | {"format": 2}
        del content["fill"], content["gaps"]
        config = from_json(json.dumps(content).encode(), "config.json")
        assert (config.fill, config.gaps) == (None, None)
        assert "with the nearest at the ends, or with 0" in to_json(config)

    @pytest.mark.parametrize(
        "fill", [3, "12", [1.0], [1.0, "2"], [1.0, None], [True, 1.0], {"pulse": 1.0}, [1e39, 1.0]]
    )
    def test_other_means_are_refused(self, fill: object) -> None:
        content = json.loads(to_json(self.CONFIG)) | {"fill": fill}
        with pytest.raises(BundleError, match="fill"):
            from_json(json.dumps(content).encode(), "config.json")
        with pytest.raises(BundleError, match="list of finite numbers"):
            from_json(json.dumps(content | {"fill": [1.0, 1.0], "gaps": [0.0, float("nan")]}).encode(), "config.json")
