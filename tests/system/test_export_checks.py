"""Exports: what they check, refuse and leave behind. tests/system/test_export.py exports every kind of network."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hpo.models.bundle import bundle, card, export
from hpo.models.bundle.config import BundleError, to_json
from hpo.models.bundle.export import ExportError
from hpo.models.config import EARLIER_EPSILON
from hpo.models.data.gaps import inputs
from hpo.models.data.sequences import Sequences, from_arrays
from tests.unit.test_bundle import CURVE, make, run_example, sequences
from tests.unit.test_mask import gapped

pytestmark = pytest.mark.usefixtures("one_thread")


def saved(folder: Path, **given: Any) -> Path:
    states, config = make(**given)
    return bundle.save(folder, states, config, CURVE)


def light(folder: Path, **given: Any) -> Path:
    """A saved model without card and pictures."""
    states, config = make(**given)
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(bundle.pack(states))
    (folder / "config.json").write_text(to_json(config))
    return folder


def padded(*lengths: int) -> Sequences:
    return gapped(from_arrays(sequences(*lengths)))


@pytest.mark.parametrize("format", ["onnx", "pt2"])
class TestGraph:
    def test_of_one_member_and_one_step(self, tmp_path: Path, format: str) -> None:
        folder = light(tmp_path / "model", members=1, steps=1, features=1)
        export.export(folder, tmp_path / "out", format)

    def test_is_silent(self, tmp_path: Path, format: str, capfd: pytest.CaptureFixture[str]) -> None:
        export.export(light(tmp_path / "model", layers=2), tmp_path / "out", format)
        assert capfd.readouterr() == ("", "")

    def test_is_checked_on_the_sequences_given(
        self, tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder, data = light(tmp_path / "model"), padded(*range(1, 9), *range(1, 40))
        checked = set()
        run = getattr(export, f"_run_{format}")

        def noting(path: Path) -> export.Run:
            graph = run(path)

            def note(values: Any, lengths: Any) -> Any:
                checked.add(values.shape)
                return graph(values, lengths)

            return note

        monkeypatch.setattr(export, f"_run_{format}", noting)
        export.export(folder, tmp_path / "out", format, sequences=data)
        assert {(32, 39, 2), (7, 39, 2), (1, 39, 2)} <= checked

    def test_a_graph_that_differs_is_not_kept(
        self, tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = light(tmp_path / "model")
        wrong = light(tmp_path / "wrong", pooling="mean")  # has the same weights
        write = getattr(export, f"_write_{format}")
        monkeypatch.setattr(export, f"_write_{format}", lambda _, path: write(bundle.load(wrong), path))
        expected = rf"model.{format} must give torch's probabilities within 1e-05, its largest difference is 0\.\d+;"
        with pytest.raises(ExportError, match=expected):
            export.export(folder, tmp_path / "out", format)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "wrong"]

    def test_a_graph_that_gives_no_numbers_is_not_kept(
        self, tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(export, "_difference", lambda *_: float("nan"))
        with pytest.raises(ExportError, match="largest difference is nan"):
            export.export(light(tmp_path / "model"), tmp_path / "out", format)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("gap", [np.nan, np.inf])
    @pytest.mark.parametrize(
        "given",
        [{"pooling": "max"}, {"normalization": "sequence", "sequence_length": 4}, {"missing": "mask", "interval": 2.0}],
        ids=str,
    )
    def test_a_gap_gives_nan_for_its_sequence_alone_and_none_behind_an_end(
        self, tmp_path: Path, format: str, given: dict[str, Any], gap: float
    ) -> None:
        """onnxruntime's LSTM gives finite, wrong probabilities."""
        out = export.export(light(tmp_path / "model", members=1, **given), tmp_path / "out", format)
        graph, data = getattr(export, f"_run_{format}")(out / f"model.{format}"), padded(9, 3, 5, 7)
        model = bundle.load(out)
        values = inputs(data, model.config.classifier).copy()
        values[np.arange(9) >= data.lengths[:, None]] = gap
        values[1, 1, 0] = gap
        values[3, 0, -1] = gap
        expected = model.predict(data).probabilities
        expected[1] = np.nan
        if "sequence_length" not in given:  # else the gap is cropped away
            expected[3] = np.nan
        np.testing.assert_allclose(graph(values, data.lengths), expected, atol=2e-6)

    def test_a_graph_that_takes_a_gap_for_a_number_is_not_kept(
        self, tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(export, "_known", lambda probabilities, unknown: probabilities.nan_to_num())
        expected = rf"model.{format} must give NaN for a sequence with nan, and torch's probabilities for the others"
        with pytest.raises(ExportError, match=expected):
            export.export(light(tmp_path / "model", members=1), tmp_path / "out", format)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("normalization", ["channel", "sequence"])
    def test_a_feature_that_does_not_vary_and_what_earlier_versions_trained(
        self, tmp_path: Path, format: str, normalization: str
    ) -> None:
        for epsilon in (0.0, EARLIER_EPSILON):
            states, config = make(members=1, normalization=normalization, epsilon=epsilon)
            states[0]["deviation"][1] = 0
            (tmp_path / "model").mkdir(exist_ok=True)
            (tmp_path / "model" / "model.safetensors").write_bytes(bundle.pack(states))
            (tmp_path / "model" / "config.json").write_text(to_json(config))
            constant = [one * [1, 0] + [0, 5.0 if epsilon else 1.7e9] for one in sequences(9, 3, 5)]
            export.export(tmp_path / "model", tmp_path / "out", format, sequences=from_arrays(constant), overwrite=True)

    def test_an_exporter_that_fails_says_why(
        self, tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: object) -> None:
            raise RuntimeError("unsupported operator")

        monkeypatch.setattr(export, f"_write_{format}", fail)
        with pytest.raises(ExportError, match=rf"cannot export this model as model.{format}: unsupported operator"):
            export.export(light(tmp_path / "model"), tmp_path / "out", format)
        assert not (tmp_path / "out").exists()


class TestReadme:
    @pytest.mark.parametrize("given", [{}, {"missing": "mask", "interval": 2.0}], ids=str)
    def test_onnx_example_predicts_with_numpy_and_onnxruntime_alone(
        self, tmp_path: Path, given: dict[str, Any]
    ) -> None:
        out = export.export(light(tmp_path / "model", classes=2, members=1, **given), tmp_path / "out", "onnx")
        predict = run_example(out / "README.md", "onnxruntime")["predict"]
        data, model = padded(9, 3, 1, 5), bundle.load(out)
        labels, probabilities = predict(inputs(data, model.config.classifier), data.lengths)
        expected = model.predict(data)
        assert labels.tolist() == expected.labels.tolist()
        np.testing.assert_allclose(probabilities, expected.probabilities, atol=2e-6)

    def test_pt2_example_loads_the_graph(self, tmp_path: Path) -> None:
        out = export.export(light(tmp_path / "model"), tmp_path / "out", "pt2")
        model = run_example(out / "README.md", "torch.export.load")["model"]
        data = padded(9, 3, 1, 5)
        found = model(torch.from_numpy(data.values), torch.from_numpy(data.lengths)).numpy()
        np.testing.assert_allclose(found, bundle.load(out).predict(data).probabilities, atol=2e-6)

    @pytest.mark.parametrize("format", ["onnx", "pt2"])
    def test_says_what_becomes_of_a_gap(self, format: str) -> None:
        text = card.readme(make()[1], format)
        assert "a NaN or an infinity within a sequence's length gives NaN for that sequence" in text

    @pytest.mark.parametrize("format", ["onnx", "pt2"])
    def test_says_what_marks_a_graph_takes(self, format: str) -> None:
        text = card.readme(make(missing="mask", interval=60.0)[1], format)
        assert "values (N, T, 6) float32" in text
        assert "the marks of the features" in text
        assert "log(1 + d / 60.0)" in text
        assert "and where the steps are (N, T), times or numbers as in training" in text

    def test_says_that_flatten_needs_the_training_length(self, tmp_path: Path) -> None:
        out = export.export(light(tmp_path / "model", pooling="flatten"), tmp_path / "out", "onnx")
        assert "values (N, 9, 2) float32" in (out / "README.md").read_text()


class TestFolder:
    def test_safetensors_is_the_saved_model(self, tmp_path: Path) -> None:
        folder = saved(tmp_path / "model")
        out = export.export(folder, tmp_path / "out")
        assert {path.name: path.read_bytes() for path in out.iterdir()} == {
            path.name: path.read_bytes() for path in folder.iterdir()
        }

    def test_an_export_exports_again_without_the_graph_of_another_format(self, tmp_path: Path) -> None:
        first = export.export(light(tmp_path / "model"), tmp_path / "first", "onnx")
        second = export.export(bundle.load(first), tmp_path / "second")
        assert {path.name for path in second.iterdir()} == {
            "model.safetensors",
            "config.json",
            "README.md",
            "SHA256SUMS",
        }

    def test_works_where_the_original_is_gone(self, tmp_path: Path) -> None:
        folder = light(tmp_path / "model")
        expected = bundle.load(folder).predict(padded(9, 3)).probabilities
        out = export.export(folder, tmp_path / "out")
        shutil.rmtree(folder)
        np.testing.assert_array_equal(bundle.load(out).predict(padded(9, 3)).probabilities, expected)

    def test_an_existing_model_is_replaced_only_when_asked(self, tmp_path: Path) -> None:
        folder, out = light(tmp_path / "model"), light(tmp_path / "out", classes=2)
        with pytest.raises(BundleError, match="holds a saved model already"):
            export.export(folder, out)
        export.export(folder, out, overwrite=True)
        assert json.loads((out / "config.json").read_text())["classifier"]["classes"] == 3

    def test_a_model_in_memory_is_saved_first(self, tmp_path: Path) -> None:
        states, config = make()
        with pytest.raises(ExportError, match="save it and load its folder"):
            export.export(bundle.assemble(config, states), tmp_path / "out")

    def test_an_unknown_format_is_an_error_that_names_the_known_ones(self, tmp_path: Path) -> None:
        with pytest.raises(ExportError, match="one of safetensors, onnx, pt2, got 'tflite'"):
            export.export(tmp_path, tmp_path / "out", "tflite")

    @pytest.mark.parametrize("absent", ["onnx", "onnxruntime"])
    def test_without_onnx_it_names_the_extra(
        self, tmp_path: Path, absent: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, absent, None)  # as if it were not installed
        with pytest.raises(ExportError, match=rf"needs {absent}: pip install 'hpo\[onnx\]'"):
            export.export(light(tmp_path / "model"), tmp_path / "out", "onnx")
        assert not (tmp_path / "out").exists()
