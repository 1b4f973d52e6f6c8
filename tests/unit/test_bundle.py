"""The saved model: what is written is what is loaded, and predictions depend on the sequences alone."""

from __future__ import annotations

import csv
import functools
import json
import math
import os
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from hpo.models import metrics
from hpo.models.bundle import bundle, card, pictures
from hpo.models.bundle.bundle import Bundle
from hpo.models.bundle.checksums import SUMS, write_checksums
from hpo.models.bundle.config import EARLIER, UNCALIBRATED, BundleConfig, BundleError, preprocessing
from hpo.models.bundle.export import export
from hpo.models.bundle.predictions import Predictions
from hpo.models.calibration import Comparison, Reliability, calibrate, measure_reliability
from hpo.models.classifier import Classifier
from hpo.models.config import EARLIER_EPSILON, ClassifierConfig
from hpo.models.data.gaps import inputs
from hpo.models.data.readers import read
from hpo.models.data.sequences import DataError, from_arrays
from hpo.study.config import load
from hpo.study.plan import Plan, make_plan
from tests.unit.test_classifier import NORMALIZATIONS, POOLINGS
from tests.unit.test_mask import gapped

LENGTHS = (9, 3, 1, 5, 9, 2, 8)
CURVE = {"train_loss": [0.9, 0.5, 0.3], "value": [0.6, 0.9, 0.8], "log_loss": [0.8, 0.4, 0.5]}
TOLERANCE = 2e-6  # float32 sums of some ten terms, in another order where the batch has another shape


pytestmark = pytest.mark.usefixtures("one_thread")


def weights(config: ClassifierConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    model = Classifier(config)
    model.fit_normalization(torch.randn(20, 9, config.features) * 3 + 1, torch.full((20,), 9))
    state = model.state_dict()
    for name, tensor in state.items():
        if name.startswith("stem") and tensor.dim() == 1:  # as after some training: scale, shift, running statistics
            tensor.uniform_(0.5, 1.5)
    return state


@functools.cache
def scores(K: int) -> metrics.Scores:
    return metrics.measure(np.random.default_rng(0).dirichlet(np.ones(K), 60), np.arange(60) % K)


@functools.cache
def reliability(K: int, temperature: float = 1.0) -> Reliability:
    probabilities = np.random.default_rng(0).dirichlet(np.ones(K), 60)
    return measure_reliability(calibrate(probabilities, temperature), np.arange(60) % K)


def make(
    members: int = 2, temperature: float = 1.0, **given: Any
) -> tuple[list[dict[str, torch.Tensor]], BundleConfig]:
    """Members of a small network and the configuration that goes with them."""
    classifier = ClassifierConfig(**{"features": 2, "classes": 3, "steps": 9, "hidden_size": 5} | given)
    config = BundleConfig(
        classifier=classifier,
        classes=tuple(f"class {i}" for i in range(classifier.classes)),
        features=("pulse", "breath")[: classifier.features],
        metric="macro_f1",
        members=members,
        temperature=temperature,
        best_epoch=2,
        columns={"label": "y"},
        validation=scores(classifier.classes),
        test=replace(scores(classifier.classes), sequences=61),
        calibration=dict.fromkeys(
            ("validation", "test"),
            Comparison(reliability(classifier.classes), reliability(classifier.classes, 1.7)),
        ),
        provenance={"study": "hearts", "trial": 3, "packages": {"torch": "2.13"}, "commit": None},
    )
    return [weights(classifier, seed) for seed in range(members)], config


def drawn(picture: bytes) -> int:
    """The rectangles and circles of an SVG picture."""
    return sum(each.tag.rpartition("}")[2] in ("rect", "circle") for each in ET.fromstring(picture).iter())


def saved(folder: Path, members: int = 2, **given: Any) -> Path:
    states, config = make(members, **given)
    return bundle.save(folder, states, config, CURVE, report="<!doctype html>\n<title>a study</title>\n")


def sequences(*lengths: int, features: int = 2) -> list[np.ndarray[Any, np.dtype[np.float32]]]:
    rng = np.random.default_rng(sum(lengths))
    return [(rng.normal(size=(n, features)) * 3 + 1).astype(np.float32) for n in lengths]


class TestFolder:
    def test_what_is_saved_is_what_is_loaded(self, tmp_path: Path) -> None:
        states, config = make(normalization="channel", head_size=4, layers=2, bidirectional=True)
        loaded = bundle.load(bundle.save(tmp_path / "model", states, config, CURVE))
        assert loaded.config == config
        assert loaded.folder == tmp_path / "model"
        for model, state in zip(loaded.models, states, strict=True):
            assert not model.training
            assert model.state_dict().keys() == state.keys()
            assert all(torch.equal(model.state_dict()[name], state[name]) for name in state)

    def test_holds_its_files_readable_by_those_who_may_read_new_files(self, tmp_path: Path) -> None:
        folder = saved(tmp_path / "new" / "model")
        assert {path.name for path in folder.iterdir()} == {*bundle.FILES, SUMS}
        assert list(folder.parent.iterdir()) == [folder]
        plain = tmp_path / "plain"
        plain.mkdir()
        assert folder.stat().st_mode == plain.stat().st_mode

    def test_saving_twice_gives_the_same_bytes(self, tmp_path: Path) -> None:
        first, second = saved(tmp_path / "a"), saved(tmp_path / "b")
        assert all((first / name).read_bytes() == (second / name).read_bytes() for name in bundle.FILES)

    def test_loading_leaves_the_callers_random_numbers_alone(self, tmp_path: Path) -> None:
        folder = saved(tmp_path / "model")
        torch.manual_seed(5)
        expected = torch.rand(1)
        torch.manual_seed(5)
        bundle.load(folder)
        assert torch.equal(torch.rand(1), expected)

    def test_weights_of_an_lstm_load_into_a_plain_one(self, tmp_path: Path) -> None:
        folder = saved(tmp_path / "model", layers=2, bidirectional=True, patch_length=2)
        tensors = load_file(folder / "model.safetensors")
        lstm = torch.nn.LSTM(4, 5, 2, bidirectional=True)
        prefix = "member.1.lstm."
        lstm.load_state_dict({key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)})

    def test_pack_and_unpack_are_inverse(self) -> None:
        states, _ = make(members=11)
        for found, state in zip(bundle.unpack(bundle.pack(states)), states, strict=True):
            assert all(torch.equal(found[name], state[name]) for name in state)

    def test_an_existing_model_is_replaced_only_when_asked(self, tmp_path: Path) -> None:
        folder = saved(tmp_path / "model")
        states, config = make()
        with pytest.raises(BundleError, match="holds a saved model already"):
            bundle.save(folder, states, config, CURVE)
        bundle.save(folder, states, replace(config, best_epoch=1), CURVE, overwrite=True)
        assert bundle.load(folder).config.best_epoch == 1
        assert list(tmp_path.iterdir()) == [folder]

    def test_another_folder_is_never_replaced(self, tmp_path: Path) -> None:
        (tmp_path / "notes.txt").write_text("mine")
        states, config = make()
        with pytest.raises(BundleError, match="is no saved model: name a new folder"):
            bundle.save(tmp_path, states, config, CURVE, overwrite=True)
        assert (tmp_path / "notes.txt").read_text() == "mine"

    def test_an_empty_folder_is_taken(self, tmp_path: Path) -> None:
        assert bundle.load(saved(tmp_path)).config.members == 2

    def test_a_save_that_fails_leaves_nothing(self, tmp_path: Path) -> None:
        states, config = make()
        with pytest.raises(ValueError, match="JSON"):
            bundle.save(tmp_path / "model", states, replace(config, threshold=float("nan")), CURVE)
        assert list(tmp_path.iterdir()) == []

    def test_weights_that_do_not_fit_are_not_saved(self, tmp_path: Path) -> None:
        states, config = make()
        with pytest.raises(BundleError, match=r"is of 2 networks, got the weights of 1"):
            bundle.save(tmp_path / "model", states[:1], config, CURVE)
        wider = replace(config, classifier=replace(config.classifier, hidden_size=6))
        with pytest.raises(BundleError, match=r"lstm.weight_ih_l0 has shape \(20, 2\), expected \(24, 2\)"):
            bundle.save(tmp_path / "model", states, wider, CURVE)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("whole") / "model")


class TestChecksums:
    """One flipped bit of the weights loads and predicts something else; the format of coreutils' sha256sum tells it."""

    @pytest.fixture
    def folder(self, whole: Path, tmp_path: Path) -> Path:
        return Path(shutil.copytree(whole, tmp_path / "model"))

    @pytest.mark.parametrize("name", [*bundle.FILES, "model.onnx"])
    @pytest.mark.parametrize("damage", ["flipped", "torn", "empty"])
    def test_a_damaged_file_is_named_with_the_way_out(self, folder: Path, name: str, damage: str) -> None:
        if name == "model.onnx":
            (folder / name).write_bytes(b"a graph")
            write_checksums(folder)
            bundle.load(folder)
        content = (folder / name).read_bytes()
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        (folder / name).write_bytes({"flipped": flipped, "torn": content[:middle], "empty": b""}[damage])
        with pytest.raises(
            BundleError, match=rf"model/{name} does not have the content that SHA256SUMS says; fetch or"
        ):
            bundle.load(folder)
        (folder / name).unlink()
        with pytest.raises(BundleError, match=rf"lacks {name}"):
            bundle.load(folder)

    @pytest.mark.parametrize(
        "text", ["", "\n", "no sums\n", f"{'a' * 64}  ../config.json\n", f"{'a' * 64}  config.json"]
    )
    def test_a_damaged_list_is_named(self, folder: Path, text: str) -> None:
        (folder / SUMS).write_text(text)
        with pytest.raises(BundleError, match=r"model/SHA256SUMS is damaged; fetch or export the model again"):
            bundle.load(folder)

    def test_sha256sum_checks_it(self, folder: Path) -> None:
        if shutil.which("sha256sum") is None:
            pytest.skip("there is no sha256sum on this machine")
        subprocess.run(["sha256sum", "--strict", "-c", SUMS], cwd=folder, check=True, capture_output=True)

    def test_a_folder_of_an_earlier_version_loads(self, folder: Path) -> None:
        (folder / SUMS).unlink()
        assert bundle.load(folder).config.members == 2


@pytest.mark.parametrize("normalization", ["channel", "sequence"])
def test_a_model_of_an_earlier_format_predicts_as_it_did(tmp_path: Path, normalization: str) -> None:
    """Format 1 added 1e-5 to every deviation and did not say so in its configuration."""
    small = [one * 1e-5 for one in sequences(*LENGTHS)]
    states, config = make(normalization=normalization, epsilon=EARLIER_EPSILON)
    for state in states:
        state["mean"] *= 1e-5
        state["deviation"] *= 1e-5
    expected = bundle.assemble(config, states).predict(small).probabilities
    folder = bundle.save(tmp_path / "model", states, config, CURVE)
    (folder / SUMS).unlink()
    content = json.loads((folder / "config.json").read_text())
    for name in EARLIER[1]:
        del content["classifier"][name]
    for name in UNCALIBRATED:
        del content[name]
    (folder / "config.json").write_text(json.dumps(content | {"format": 1}))
    loaded = bundle.load(folder)
    assert loaded.config == replace(config, calibration={})
    np.testing.assert_array_equal(loaded.predict(small).probabilities, expected)
    otherwise = replace(config, classifier=replace(config.classifier, epsilon=0.0))
    assert not np.allclose(bundle.assemble(otherwise, states).predict(small).probabilities, expected, atol=1e-3)


class TestBrokenFolder:
    @pytest.fixture
    def folder(self, whole: Path, tmp_path: Path) -> Path:
        """Without checksums, as earlier versions saved it, so that each part is checked by itself."""
        folder = Path(shutil.copytree(whole, tmp_path / "model"))
        (folder / SUMS).unlink()
        return folder

    def change(self, folder: Path, **given: Any) -> None:
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({k: v for k, v in (content | given).items() if v != "gone"}))

    def test_missing_files_are_named(self, folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        with pytest.raises(BundleError, match=r"is no saved model: it lacks model\.safetensors"):
            bundle.load(folder)
        with pytest.raises(BundleError, match=r"it lacks model\.safetensors and config\.json"):
            bundle.load(folder / "nowhere")

    def test_a_newer_format_names_the_way_out(self, folder: Path) -> None:
        self.change(folder, format=7)
        with pytest.raises(BundleError, match="has format 7, this version of hpo reads up to 6: install a newer hpo"):
            bundle.load(folder)

    def test_missing_and_unexpected_keys_are_named(self, folder: Path) -> None:
        self.change(folder, metric="gone", colour="red")
        with pytest.raises(BundleError, match=r"config\.json: missing metric, unexpected colour"):
            bundle.load(folder)

    def test_missing_and_unexpected_tensors_are_named(self, folder: Path) -> None:
        states, _ = make()
        states[0]["tail.weight"] = states[0].pop("head.weight")
        (folder / "model.safetensors").write_bytes(bundle.pack(states))
        expected = r"missing member.0.head.weight; unexpected member.0.tail.weight"
        with pytest.raises(BundleError, match=expected):
            bundle.load(folder)

    @pytest.mark.parametrize("content", ["", "[]", "{}", '{"format"', "3"])
    def test_a_configuration_that_is_none(self, folder: Path, content: str) -> None:
        (folder / "config.json").write_text(content)
        with pytest.raises(BundleError, match="is not the configuration of a saved model"):
            bundle.load(folder)

    def test_weights_cut_short(self, folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-5])
        with pytest.raises(BundleError, match="is not a whole safetensors file"):
            bundle.load(folder)

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"members": 10**9}, "bytes are too few or too many for 1000000000 members"),
            ({"members": 10**12}, "members must be finite and at most 2147483647, got 1000000000000"),
            ({"members": "2"}, "members must be of type int, got '2'"),
            ({"members": True}, "members must be of type int, got 'True'"),
            ({"threshold": None}, "threshold must be of type float, got 'None'"),
            ({"temperature": "2"}, "temperature must be of type float, got '2'"),
            ({"temperature": 0.0}, r"temperature must be from 0.05 to 20.0, got 0.0"),
            ({"temperature": 30}, r"temperature must be from 0.05 to 20.0, got 30"),
            ({"temperature": "gone"}, "missing temperature"),
            ({"calibration": []}, "calibration must be of type dict"),
            ({"calibration": "gone"}, "missing calibration"),
            ({"calibration": {"train": {}}}, r"calibration must be of validation and test, got \['train'\]"),
            ({"calibration": {"test": {"before": {}}}}, "calibration: missing after"),
            ({"calibration": {"test": {"before": {}, "after": {}}}}, "calibration: missing number, missing ece"),
            ({"classes": [1, 2, 3]}, "classes must be a list of texts"),
            ({"classes": "abc"}, "classes must be a list of texts"),
            ({"provenance": []}, "provenance must be of type dict"),
        ],
    )
    def test_a_configuration_of_other_types_or_sizes(self, folder: Path, given: dict[str, Any], message: str) -> None:
        self.change(folder, **given)
        with pytest.raises(BundleError, match=message):
            bundle.load(folder)

    @pytest.mark.parametrize(("name", "value"), [("layers", 10**9), ("hidden_size", 2.5), ("dropout", "0")])
    def test_a_classifier_of_other_types_or_sizes(self, folder: Path, name: str, value: Any) -> None:
        content = json.loads((folder / "config.json").read_text())
        self.change(folder, classifier=content["classifier"] | {name: value})
        with pytest.raises(
            BundleError, match=f"{name} must be of type|too few or too many for 2 members of {value} layers"
        ):
            bundle.load(folder)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_weights_that_are_no_numbers(self, folder: Path, value: float) -> None:
        states, _ = make()
        states[1]["head.bias"][0] = value
        (folder / "model.safetensors").write_bytes(bundle.pack(states))
        with pytest.raises(BundleError, match=r"must hold finite numbers; these hold others: member\.1\.head\.bias"):
            bundle.load(folder)

    def test_too_few_class_names(self, folder: Path) -> None:
        self.change(folder, classes=["a", "b"])
        with pytest.raises(BundleError, match=r"a classifier of 3 classes needs as many names, got \['a', 'b'\]"):
            bundle.load(folder)


class TestPredict:
    def ready(self, **given: Any) -> Bundle:
        states, config = make(**given)
        return bundle.assemble(config, states)

    @pytest.mark.parametrize("pooling", [name for name in POOLINGS if name != "flatten"])
    @pytest.mark.parametrize("bidirectional", [False, True])
    @pytest.mark.parametrize("layers", [1, 2])
    @pytest.mark.parametrize("normalization", NORMALIZATIONS)
    @settings(max_examples=4, deadline=None)
    @given(
        lengths=st.lists(st.integers(1, 9), min_size=1, max_size=8), patch=st.integers(1, 4), batch=st.integers(1, 9)
    )
    def test_neither_batch_size_nor_company_nor_order_changes_an_answer(
        self,
        pooling: str,
        bidirectional: bool,
        layers: int,
        normalization: str,
        lengths: list[int],
        patch: int,
        batch: int,
    ) -> None:
        model = self.ready(
            pooling=pooling,
            bidirectional=bidirectional,
            layers=layers,
            patch_length=patch,
            normalization=normalization,
        )
        data = sequences(*lengths)
        together = model.predict(data, batch_size=batch).probabilities
        alone = np.concatenate([model.predict([one]).probabilities for one in data])
        np.testing.assert_allclose(together, alone, atol=TOLERANCE, rtol=0)

    def test_probabilities_are_the_mean_of_the_members(self) -> None:
        states, config = make()
        data = sequences(*LENGTHS)
        each = [bundle.assemble(replace(config, members=1), [state]).predict(data).probabilities for state in states]
        together = bundle.assemble(config, states).predict(data).probabilities
        assert not np.allclose(each[0], each[1], atol=1e-3)
        np.testing.assert_allclose(together, (each[0] + each[1]) / 2, atol=1e-6)

    @pytest.mark.parametrize("classes", [2, 3])
    @pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
    @pytest.mark.parametrize("members", [1, 3])
    def test_the_mean_of_the_members_is_calibrated(self, classes: int, temperature: float, members: int) -> None:
        data = sequences(*LENGTHS)
        plain = self.ready(classes=classes, members=members).predict(data)
        found = self.ready(classes=classes, members=members, temperature=temperature).predict(data)
        assert found.probabilities.dtype == np.float32
        np.testing.assert_allclose(found.probabilities, calibrate(plain.probabilities, temperature), atol=1e-6)
        assert (temperature == 1) == np.allclose(found.probabilities, plain.probabilities, atol=1e-3)
        assert found.labels.tolist() == plain.labels.tolist()

    @pytest.mark.parametrize("classes", [2, 3])
    def test_what_is_nearly_certain_is_calibrated_by_all_its_digits(self, classes: int) -> None:
        """In float32 a probability of 1 - 3e-9 is 1, whose temperature would not matter."""
        states, config = make(members=1, classes=classes, temperature=2.0)
        states[0]["head.weight"].zero_()
        states[0]["head.bias"] = torch.tensor([20.0]) if classes == 2 else torch.tensor([0.0, 0.0, 20.0])
        found = bundle.assemble(config, states).predict(sequences(5)).probabilities[0]
        rest = np.exp(-10.0)
        expected = np.array([rest, 1] if classes == 2 else [rest, rest, 1]) / (1 + (classes - 1) * rest)
        np.testing.assert_allclose(found, expected, rtol=1e-5)

    def test_labels_are_names_and_follow_the_threshold(self) -> None:
        model = self.ready(classes=2)
        p = model.predict(sequences(*LENGTHS)).probabilities[:, 1]
        threshold = float(np.median(p))
        found = replace(model, config=replace(model.config, threshold=threshold)).predict(sequences(*LENGTHS))
        assert found.labels.tolist() == ["class 1" if value >= threshold else "class 0" for value in p]
        assert len(set(found.labels)) == 2

    def test_more_classes_take_the_most_probable(self) -> None:
        found = self.ready().predict(sequences(*LENGTHS))
        assert found.labels.tolist() == [f"class {i}" for i in found.probabilities.argmax(axis=1)]

    def test_progress_hears_of_every_sequence(self) -> None:
        heard: list[int] = []
        self.ready().predict(sequences(*LENGTHS), batch_size=3, progress=heard.append)
        assert heard == [3, 3, 1]

    def test_a_padded_array_gives_what_the_list_gives(self) -> None:
        model, data = self.ready(), sequences(*LENGTHS)
        padded = np.full((len(data), 9, 2), np.nan)
        for row, one in zip(padded, data, strict=True):
            row[: len(one)] = one
        np.testing.assert_array_equal(model.predict(padded).probabilities, model.predict(data).probabilities)

    def test_named_features_are_taken_by_name(self) -> None:
        model, data = self.ready(), from_arrays(sequences(*LENGTHS), features=("pulse", "breath"))
        mixed = np.stack([data.values[:, :, 1], data.values[:, :, 0] * 0, data.values[:, :, 0]], axis=2)
        shuffled = replace(data, values=mixed, features=("breath", "age", "pulse"), missing=None)
        expected = model.predict(data).probabilities
        np.testing.assert_array_equal(model.predict(shuffled).probabilities, expected)

    def test_features_that_do_not_fit_are_errors(self) -> None:
        model = self.ready()
        named = from_arrays(sequences(3), features=("pulse", "age"))
        with pytest.raises(DataError, match=r"lacks the features \['breath'\] of the model; it has"):
            model.predict(named)
        with pytest.raises(DataError, match="the data has 3 features, expected 2: pulse, breath"):
            model.predict(sequences(4, features=3))

    @pytest.mark.parametrize("keep", [0, 4])
    def test_flatten_takes_the_lengths_it_has_weights_for(self, keep: int) -> None:
        model = self.ready(pooling="flatten", sequence_length=keep)
        assert model.predict(sequences(9, 9)).probabilities.shape == (2, 3)
        needed = "4 or more" if keep else "exactly 9"
        with pytest.raises(DataError, match=f"needs {needed} steps, sequence '1' has 3"):
            model.predict(sequences(9, 3))

    def test_a_batch_size_of_zero_is_refused(self) -> None:
        with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
            self.ready().predict(sequences(3), batch_size=0)

    def test_a_file_is_read_by_the_columns_of_training(self, tmp_path: Path) -> None:
        model, path = self.ready(), tmp_path / "new.csv"
        path.write_text("id,step,breath,age,pulse,y\na,0,1,9,2,\na,1,3,9,4,\nb,0,5,9,6,\n")
        expected = model.predict([np.array([[2, 1], [4, 3]]), np.array([[6, 5]])])
        found = model.predict(model.read(path))
        assert found.ids == ("a", "b")
        np.testing.assert_array_equal(found.probabilities, expected.probabilities)


class TestNames:
    """Features are matched by name where both sides have names. Cases from dmlc/xgboost/issues/8357,
    lightgbm-org/LightGBM/issues/4102 and scikit-learn/scikit-learn/issues/7242.
    """

    def ready(self, features: tuple[str, ...], named: bool | None) -> Bundle:
        states, config = make()
        return bundle.assemble(replace(config, features=features, named=named), states)

    def files(self, folder: Path, header: str, cells: str, name: str = "new.csv") -> Path:
        (folder / name).write_text(f"id,step,{header}\na,0,{cells}\n")
        return folder / name

    @pytest.mark.parametrize("named", [None, True, False])
    @pytest.mark.parametrize(("header", "cells"), [("x1,x0", "2,1"), ("x1,time,x0", "2,9,1"), ("x0,x1", "1,2")])
    def test_columns_that_are_called_as_the_models_are_matched_by_name(
        self, named: bool | None, header: str, cells: str, tmp_path: Path
    ) -> None:
        model, path = self.ready(("x0", "x1"), named), self.files(tmp_path, header, cells)
        expected = model.predict([np.array([[1, 2]])]).probabilities
        np.testing.assert_array_equal(model.predict(model.read(path)).probabilities, expected)
        np.testing.assert_array_equal(model.predict(read(path)).probabilities, expected)

    def test_a_model_without_names_takes_a_table_by_place(self, tmp_path: Path) -> None:
        path, many = self.files(tmp_path, "v,w", "1,2"), self.files(tmp_path, "v,w,time", "1,2,9", "many.csv")
        for named in (None, False):
            model = self.ready(("x0", "x1"), named)
            expected = model.predict([np.array([[1, 2]])]).probabilities
            np.testing.assert_array_equal(model.predict(model.read(path)).probabilities, expected)
            np.testing.assert_array_equal(model.predict(read(path)).probabilities, expected)
            with pytest.raises(DataError, match=r"many\.csv has 3 features, expected 2: x0, x1"):
                model.read(many)
            with pytest.raises(DataError, match=r"the model needs 2 features \['x0', 'x1'\], the data has 3"):
                model.predict(read(many))

    def test_a_model_whose_own_names_are_x0_and_x1_takes_no_others(self, tmp_path: Path) -> None:
        model, path = self.ready(("x0", "x1"), True), self.files(tmp_path, "v,w", "1,2")
        with pytest.raises(DataError, match=r"new\.csv has no feature column 'x0', 'x1'"):
            model.read(path)
        with pytest.raises(DataError, match=r"lacks the features \['x0', 'x1'\] of the model; it has \['v', 'w'\]"):
            model.predict(read(path))
        assert model.predict([np.array([[1, 2]])]).probabilities.shape == (1, 3)

    def test_whether_names_are_the_files_own_is_kept_and_may_be_unknown(self, tmp_path: Path) -> None:
        for named in (True, False, None):
            states, config = make()
            folder = bundle.save(tmp_path / "model", states, replace(config, named=named), CURVE, overwrite=True)
            assert bundle.load(folder).config.named is named
            assert ("named" in json.loads((folder / "config.json").read_text())) == (named is not None)

    def test_the_plan_of_a_study_says_whether_its_features_have_names(self, tmp_path: Path) -> None:
        rows = [f"s{i},0,{i},{-i},{'ab'[i % 2]}" for i in range(40)]
        X = np.array([[[i, -i]] for i in range(40)], dtype=float)
        np.savez(tmp_path / "train.npz", X=X, y=np.array(["ab"[i % 2] for i in range(40)]))
        for header in ("x0,x1", "v,w"):
            (tmp_path / "train.csv").write_text("\n".join([f"id,step,{header},label", *rows]))
            (tmp_path / "study.toml").write_text('[data]\ntrain = "train.csv"\n')
            plan, _, _ = make_plan(load(tmp_path / "study.toml"))
            assert plan.named is True
            assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
            # catboost/catboost/issues/1373: trained by place, tested by place
            (tmp_path / "study.toml").write_text('[data]\ntrain = "train.npz"\ntest = "train.csv"\n')
            plan, train, test = make_plan(load(tmp_path / "study.toml"))
            assert plan.named is False
            assert test is not None
            assert test.features == train.features == ("x0", "x1")
            np.testing.assert_array_equal(test.values, train.values)

    def test_a_data_frame_is_predicted_by_its_columns(self) -> None:
        import pyarrow as pa

        model = self.ready(("pulse", "breath"), True)
        table = pa.table({"breath": [2.0], "id": ["a"], "age": ["old"], "step": [0], "pulse": [1.0], "y": [None]})
        found = model.predict(table)
        assert found.ids == ("a",)
        np.testing.assert_array_equal(found.probabilities, model.predict([np.array([[1, 2]])]).probabilities)


class TestCsv:
    def test_holds_ids_classes_and_probabilities(self, tmp_path: Path) -> None:
        states, config = make(classes=2)
        model = bundle.assemble(replace(config, classes=('say "no"', "yes, é")), states)
        found = replace(model.predict(sequences(*LENGTHS)), ids=tuple("abcdefg"))
        found.to_csv(tmp_path / "out.csv")
        with (tmp_path / "out.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file))
        assert rows[0] == ["id", "predicted", 'probability_say "no"', "probability_yes, é"]
        assert [row[:2] for row in rows[1:]] == [[i, name] for i, name in zip("abcdefg", found.labels, strict=True)]
        np.testing.assert_array_equal(np.array([row[2:] for row in rows[1:]], np.float32), found.probabilities)

    def test_a_write_that_fails_leaves_the_old_file(self, tmp_path: Path) -> None:
        states, config = make()
        found = bundle.assemble(config, states).predict(sequences(3))
        (tmp_path / "taken").mkdir()
        with pytest.raises(OSError, match="taken"):
            found.to_csv(tmp_path / "taken")
        assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def run_example(readme: Path, needle: str) -> dict[str, Any]:
    """Run the README's python block that contains `needle`, in its folder; its names."""
    blocks = [block.split("```")[0] for block in readme.read_text(encoding="utf-8").split("```python\n")[1:]]
    (code,) = [block for block in blocks if needle in block]
    names: dict[str, Any] = {}
    before = Path.cwd()
    os.chdir(readme.parent)
    try:
        exec(compile(code, str(readme), "exec"), names)
    finally:
        os.chdir(before)
    return names


class TestCard:
    @pytest.mark.parametrize("pooling", POOLINGS)
    @pytest.mark.parametrize("bidirectional", [False, True])
    @pytest.mark.parametrize("layers", [1, 2])
    @pytest.mark.parametrize(
        "rest",
        [
            {"classes": 2, "normalization": "channel", "head_size": 4, "temperature": 2.5},
            {"classes": 3, "normalization": "sequence", "patch_length": 4, "temperature": 0.6},
            {"classes": 2, "sequence_length": 5, "patch_length": 2},
            {"classes": 2, "normalization": "channel", "stem": "conv", "stem_width": 3, "stem_stride": 4},
            {
                "classes": 3,
                "normalization": "sequence",
                "stem": "conv",
                "stem_layers": 2,
                "stem_width": 3,
                "stem_kernel": 3,
                "difference": True,
                "skip": True,
                "sequence_length": 5,
            },
            {
                "classes": 2,
                "normalization": "channel",
                "difference": True,
                "missing": "mask",
                "interval": 2.0,
                "patch_length": 2,
                "sequence_length": 5,
            },
            {"classes": 2, "normalization": "channel", "epsilon": EARLIER_EPSILON},
            {"classes": 2, "normalization": "sequence", "epsilon": EARLIER_EPSILON},
        ],
        ids=["channel", "sequence", "crop", "conv", "convs", "mask", "earlier channel", "earlier sequence"],
    )
    def test_its_plain_torch_example_gives_what_predict_gives(
        self, tmp_path: Path, pooling: str, bidirectional: bool, layers: int, rest: dict[str, Any]
    ) -> None:
        states, config = make(pooling=pooling, bidirectional=bidirectional, layers=layers, **rest)
        (tmp_path / "model.safetensors").write_bytes(bundle.pack(states))
        (tmp_path / "README.md").write_text(card.readme(config), encoding="utf-8")
        probabilities = run_example(tmp_path / "README.md", "def member")["probabilities"]
        data = gapped(from_arrays(sequences(*((9, 9) if pooling == "flatten" else LENGTHS))))
        steps = [one[:length] for one, length in zip(inputs(data, config.classifier), data.lengths, strict=True)]
        found = np.stack([probabilities(torch.from_numpy(one)) for one in steps])
        expected = bundle.assemble(config, states).predict(data).probabilities
        np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=0)

    def test_shows_scores_with_intervals(self, tmp_path: Path) -> None:
        folder = saved(tmp_path / "model")
        text = (folder / "README.md").read_text()
        test = bundle.load(folder).config.test
        assert test is not None
        low, high = test.intervals["auroc"]
        assert "validation (60 sequences) | test (61 sequences)" in text
        assert f"| {test.metrics['auroc']:.4f} [{low:.4f}, {high:.4f}] |" in text
        assert "- trial: 3" in text

    def test_shows_what_the_calibration_has_brought(self, tmp_path: Path) -> None:
        states, config = make(temperature=1.7)
        folder = bundle.save(tmp_path / "model", states, config, CURVE)
        text = (folder / "README.md").read_text()
        both = config.calibration["test"]
        cells = f"{both.before.ece:.4f} | {both.after.ece:.4f}"
        assert "| | validation, before | validation, after | test, before | test, after |" in text
        assert f"| ECE | {cells} | {cells} |" in text
        assert f"| Brier score | {both.before.brier:.4f} | {both.after.brier:.4f} |" in text
        assert "with T = 1.7 leaves the networks' probabilities milder; the predicted classes stay the same" in text
        assert "- the probabilities p become softmax(log p / 1.7): temperature scaling" in text
        assert (folder / "reliability.svg").read_bytes() == pictures.reliability_picture(config.calibration, 1.7)
        plain = card.readme(make()[1])
        assert "with T = 1 leaves the networks' probabilities as they are" in plain
        assert "become softmax" not in plain
        bare = bundle.save(tmp_path / "bare", states, replace(config, calibration={}), CURVE)
        assert "reliability" not in (bare / "README.md").read_text()
        assert not (bare / "reliability.svg").exists()

    @pytest.mark.parametrize("K", [2, 10, 40])
    @pytest.mark.parametrize("rows", [1, 3, 500])
    def test_a_diagram_is_drawn_of_few_rows_and_of_many(self, K: int, rows: int) -> None:
        probabilities = np.random.default_rng(rows).dirichlet(np.ones(K), rows)
        labels = np.arange(rows) % K
        sure = measure_reliability(np.eye(K)[labels], labels)
        both = Comparison(measure_reliability(probabilities, labels), sure)
        one = pictures.reliability_picture({"validation": both}, 0.3)
        assert drawn(one) == drawn(pictures.reliability(both, "validation").svg((0, 0)).encode()) + 3  # ground and keys
        assert drawn(pictures.reliability_picture({"validation": both, "test": both}, 0.3)) == 2 * drawn(one) - 1

    def test_names_of_the_data_are_neither_markdown_nor_html(self) -> None:
        _, config = make()
        names = ("a`b", "<script>\n# c", "d | e")
        undefined = metrics.measure(np.eye(3)[[0, 0]], np.array([0, 0]), classes=names)
        text = card.readme(replace(config, classes=names, test=undefined))
        assert "apart: `` a`b ``, `<script> # c`, `d | e`." in text
        assert "undefined: no sequence of class &lt;script> # c, d \\| e |" in text
        assert "\n# c" not in text

    def test_lists_what_happens_before_the_lstm(self) -> None:
        _, config = make(normalization="channel", patch_length=4, sequence_length=5)
        steps = preprocessing(config, config.classifier)
        assert [word for word in ("last 5 steps", "`mean`", "4 consecutive") if any(word in s for s in steps)] == [
            "last 5 steps",
            "`mean`",
            "4 consecutive",
        ]

    @pytest.mark.parametrize("K", [2, 31, 61, 200])
    def test_pictures_take_any_class_name(self, K: int) -> None:
        names = [f"</svg><script>&{i} 名 " * 4 for i in range(K)]
        picture = pictures.confusion_picture(np.eye(K, dtype=int).tolist(), names, "test")
        assert picture is not None
        assert drawn(picture) == K + 4  # the cells, those behind them, ground and keys
        assert b"<script>" not in picture

    def test_an_export_keeps_the_pictures_of_an_earlier_version(self, tmp_path: Path) -> None:
        folder = saved(tmp_path / "model")
        (folder / "curves.svg").unlink()
        (folder / "curves.png").write_bytes(b"\x89PNG\r\n\x1a\n")
        write_checksums(folder)
        out = export(folder, tmp_path / "out")
        assert (out / "curves.png").is_file()
        text = (out / "README.md").read_text()
        assert [name for name in ("curves.png", "curves.svg", "confusion.svg") if f"]({name})" in text] == [
            "curves.png",
            "confusion.svg",
        ]

    def test_of_too_many_classes_there_is_no_picture(self) -> None:
        assert pictures.confusion_picture(np.eye(201, dtype=int).tolist(), [""] * 201, "test") is None

    def test_a_single_epoch_makes_a_picture(self) -> None:
        assert drawn(pictures.curves({"train_loss": [1.0], "value": [0.5]}, 1, "auroc")) == 4

    def test_what_is_no_number_is_left_out(self) -> None:
        curve = {"train_loss": [math.inf, 1.0, math.nan], "value": [0.5, 0.6, 0.4], "log_loss": [math.nan] * 3}
        assert not re.search(rb"[ML ]-?(nan|inf)", pictures.curves(curve, 2, "auroc"))


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("interval", [None, 0.0, 2.0])
def test_several_data_together_are_predicted_as_each_alone(
    tmp_path: Path, pooling: str, normalization: str, interval: float | None
) -> None:
    more: dict[str, Any] = {"sequence_length": 1} if pooling == "flatten" else {"bidirectional": True}
    more |= {} if interval is None else {"missing": "mask", "interval": interval}
    model = bundle.load(saved(tmp_path / "m", pooling=pooling, normalization=normalization, **more))
    data = [from_arrays(sequences(*lengths)) for lengths in ((5,), LENGTHS, (1, 40), (3, 3))]
    even = replace(data[3], spacing=2.0)
    parts = [model.conform(part) for part in (*map(gapped, data[:3]), even)]
    for part, together in zip(parts, model.predict_each(parts, batch_size=4), strict=True):
        alone = model.predict(part)
        assert isinstance(together, Predictions)
        np.testing.assert_allclose(together.probabilities, alone.probabilities, atol=TOLERANCE)
        assert (together.ids, together.labels.tolist()) == (alone.ids, alone.labels.tolist())


def test_one_of_several_data_without_a_probability_is_no_error_of_the_others(tmp_path: Path) -> None:
    model = bundle.load(saved(tmp_path / "m", normalization="sequence", epsilon=1e-5))
    large = [np.array([[3e38, 1.0], [-3e38, 2.0], [3e38, 1.0]], np.float32)]
    parts = [model.conform(sequences(4)), model.conform(large)]
    fine, error = model.predict_each(parts)
    assert isinstance(fine, Predictions)
    assert str(error).startswith("sequence '0': the model gives it no probability")
    with pytest.raises(DataError, match="no probability"):
        model.predict(large)
