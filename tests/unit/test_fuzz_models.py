"""Damaged model folders: benchmarks/fuzz_models.py for a moment, and what it has found."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from hpo.errors import SHOWN_MOST
from hpo.models import metrics
from hpo.models.bundle import bundle, card
from hpo.models.bundle.bundle import FILES, Bundle
from hpo.models.bundle.checksums import SUMS, write_checksums
from hpo.models.bundle.config import BundleError, from_json
from hpo.models.bundle.evaluation import evaluate
from hpo.models.bundle.export import ExportError, export
from hpo.models.classifier import Classifier, weights_of
from hpo.models.config import ClassifierConfig
from hpo.models.data.sequences import DataError, from_arrays
from hpo.terminal import show_evaluation, show_predictions
from tests.unit.test_bundle import make, saved
from tests.unit.test_classifier import POOLINGS

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "fuzz_models.py"
ESCAPE = "\x1b[31m<b>[x](y)\x9b\u202e"
STEPS = np.random.default_rng(0).normal(size=(9, 9, 2))


def test_only_our_own_errors_come_of_damaged_folders() -> None:
    """Inputs that are known, so that a failure is one that a change has brought."""
    command = [sys.executable, str(SCRIPT), "--seed", "5110", "--inputs", "280"]  # the exporters take seconds
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    tried, accepted, refused = map(int, re.findall(r"\d+", done.stdout)[:3])
    assert tried == 280
    assert accepted > 40
    assert refused > 150


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("whole") / "model")


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """Without checksums, so that each part is checked by itself."""
    folder = Path(shutil.copytree(whole, tmp_path / "model"))
    (folder / SUMS).unlink()
    return folder


FOOTPRINT = {"latency_ms": 1.5, "size_mb": 0.1, "steps": 9, "machine": "a CPU"}


def refused(folder: Path, message: str) -> None:
    with pytest.raises(BundleError, match=message) as found:
        bundle.load(folder)
    assert str(found.value).isprintable()
    assert len(str(found.value)) < SHOWN_MOST


def change(folder: Path, **given: Any) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | given))


# ------------------------------------------------------------------------------------------------ the configuration


@pytest.mark.parametrize(
    ("given", "message"),
    [
        pytest.param({"columns": {"pulse": "y"}}, "columns must name those of label, id, step, group", id="seed 33"),
        pytest.param({"columns": {"label": 3}}, "columns must name those of", id="a column that is no text"),
        pytest.param({"metric": "speed"}, "metric must be one of accuracy", id="metric"),
        pytest.param({"metric": ESCAPE}, r"metric must be one of .* got '\\x1b", id="a metric of escape codes"),
        pytest.param({"members": 0}, "members must be at least 1", id="no members"),
        pytest.param({"best_epoch": -3}, "best_epoch must be at least 1", id="best_epoch"),
        pytest.param({"threshold": float("nan")}, "threshold must be finite", id="NaN"),
        pytest.param({"threshold": float("inf")}, "threshold must be finite", id="infinity"),
        pytest.param({"threshold": 10**400}, "threshold must be finite", id="400 digits"),
        pytest.param({"named": "yes"}, "named must be true, false or null", id="named"),
        pytest.param({"classes": ["a", "a", "b"]}, "the names of the classes must differ", id="classes alike"),
        pytest.param({"classes": ["a", "b", "\ud800"]}, "neither a NUL nor half a character", id="half a character"),
        pytest.param({"features": ["a", "b\0"]}, "neither a NUL nor half a character", id="a NUL"),
        pytest.param({"footprint": 3}, "footprint: missing latency_ms", id="no footprint"),
        pytest.param({"footprint": FOOTPRINT | {"size_mb": 0}}, "size_mb above 0", id="no size"),
        pytest.param({"footprint": FOOTPRINT | {"latency_ms": float("nan")}}, "latency_ms and size", id="no latency"),
        pytest.param({"footprint": FOOTPRINT | {"steps": 1.5}}, "a number of steps", id="half a step"),
        pytest.param({"footprint": FOOTPRINT | {"machine": None}}, "and a machine", id="no machine"),
        pytest.param({"provenance": {"a": json.loads("[" * 60 + "]" * 60)}}, "nest more", id="deep"),
    ],
)
def test_fields_of_other_values_are_refused(folder: Path, given: dict[str, Any], message: str) -> None:
    change(folder, **given)
    refused(folder, message)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        pytest.param({"metrics": {"auroc": "x"}}, "metrics must be those of", id="seed 17"),
        pytest.param({"metrics": {ESCAPE: 0.5}}, "metrics must be those of", id="an unknown metric"),
        pytest.param({"metrics": {"auroc": float("nan")}}, "metrics must be those of", id="NaN"),
        pytest.param({"sequences": "60"}, "must be counts", id="seed 146"),
        pytest.param({"intervals": {"auroc": [1, 2, 3]}}, "intervals must be those of", id="seed 272"),
        pytest.param({"intervals": {"auroc": 3}}, "intervals must be those of", id="seed 304"),
        pytest.param({"confusion": 3}, "must be counts", id="a number"),
        pytest.param({"confusion": [3]}, "must be counts", id="seed 288"),
        pytest.param({"confusion": [[1, 2], [3]]}, "must be counts", id="no square"),
        pytest.param({"undefined": {"f1": 3}}, "undefined must be those of", id="undefined"),
        pytest.param({"methods": []}, "methods must be those of", id="methods"),
    ],
)
def test_scores_of_other_types_are_refused(folder: Path, part: dict[str, Any], message: str) -> None:
    content = json.loads((folder / "config.json").read_text())
    change(folder, validation=content["validation"] | part)
    refused(folder, message)


@pytest.mark.parametrize(
    "found",
    [
        pytest.param({"ece": "x"}, id="a text"),
        pytest.param({"ece": float("nan")}, id="NaN"),
        pytest.param({"brier": -1}, id="below 0"),
        pytest.param({"number": None}, id="no number"),
        pytest.param({"bins": []}, id="no bins"),
        pytest.param({"bins": 3}, id="a number"),
        pytest.param({"bins": [[0.1, 0.2]]}, id="bins of two"),
        pytest.param({"bins": [[0.1, 0.2, 2]]}, id="an accuracy above 1"),
        pytest.param({"bins": [[0.1, 0.2, 0.3]] * 101}, id="many bins"),
    ],
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_calibration_of_other_values_is_refused(folder: Path, when: str, found: dict[str, Any]) -> None:
    calibration = json.loads((folder / "config.json").read_text())["calibration"]
    calibration["test"][when] |= found
    change(folder, calibration=calibration)
    refused(folder, "calibration must be number, ece and brier, and of at most 100 bins share, confidence and accuracy")


@pytest.mark.parametrize("text", ["[" * 200_000, '{"a":' * 200_000, "9" * 5_000, '{"format": 2, "x": ' + "[" * 900])
def test_text_that_is_no_configuration_is_refused(folder: Path, text: str) -> None:
    """Seeds 49 and 352."""
    (folder / "config.json").write_text(text)
    refused(folder, "is not the configuration of a saved model")


@pytest.mark.parametrize(
    "given",
    [
        {"hidden_size": 2**31 - 1},
        {"layers": 10**6},
        {"patch_length": 10**9},
        {"head_size": 2**31 - 1},
        {"features": 10**6},
        {"pooling": "flatten", "steps": 10**9},
    ],
)
def test_sizes_are_compared_with_the_file_before_anything_is_made(folder: Path, given: dict[str, Any]) -> None:
    content = json.loads((folder / "config.json").read_text())
    names = {"features": [f"f{i}" for i in range(given.get("features", 2))]}
    change(folder, classifier=content["classifier"] | given, **names)
    refused(folder, "does not fit the configuration: .* bytes are too few or too many for 2 members")


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("given", [{}, {"layers": 3, "bidirectional": True, "head_size": 4, "patch_length": 2}])
@pytest.mark.parametrize("classes", [2, 3])
def test_the_sizes_are_those_of_a_classifier(pooling: str, given: dict[str, Any], classes: int) -> None:
    config = ClassifierConfig(features=3, classes=classes, steps=7, hidden_size=5, pooling=pooling, **given)
    state = Classifier(config).state_dict()
    assert weights_of(config) == (sum(tensor.numel() for tensor in state.values()), len(state))


def test_a_crop_to_more_steps_than_there_are_takes_no_memory(folder: Path) -> None:
    content = json.loads((folder / "config.json").read_text())
    change(folder, classifier=content["classifier"] | {"sequence_length": 2**31 - 1})
    cropped = bundle.load(folder)
    assert np.isfinite(cropped.predict(STEPS).probabilities).all()
    with pytest.raises(ExportError, match="sequences as long as in training, and of at most 131,072 steps, got 2,147"):
        export(folder, folder.parent / "out", "onnx")


# ------------------------------------------------------------------------------------------------ weights


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int64, torch.bool, torch.uint8])
def test_weights_of_another_type_are_refused(folder: Path, dtype: torch.dtype) -> None:
    """Seed 162."""
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, folder / "model.safetensors")
    refused(folder, "must hold numbers of type|too few or too many")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_weights_of_other_floats_are_taken_and_must_be_finite_in_float32(folder: Path, dtype: torch.dtype) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")
    assert np.isfinite(bundle.load(folder).predict(STEPS).probabilities).all()
    if dtype is torch.float64:
        tensors["member.0.head.bias"][0] = 1e300
        save_file(tensors, folder / "model.safetensors")
        refused(folder, r"must hold finite numbers; these hold others: member\.0\.head\.bias")


def test_a_sequence_that_gets_no_probability_is_an_error(folder: Path) -> None:
    """Seed 188: weights that are finite, but gave NaN."""
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if "weight_ih" in name or "head" in name:
            tensors[name] = torch.full_like(tensors[name], 3e38)
            tensors[name].view(-1)[::2] *= -1
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(DataError, match=r"sequence '\d': the model gives it no probability: its values, or the model"):
        bundle.load(folder).predict(STEPS * 1e30)


def test_weights_far_larger_than_the_configuration_says_are_not_read(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(10**10)  # without a block on the disk
    refused(folder, "does not fit the configuration: 10,000,000,000 bytes are too few or too many")


# ------------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize("name", [*FILES, SUMS])
def test_what_is_no_file_is_refused_and_nobody_waits_for_it(folder: Path, name: str) -> None:
    """Seeds 200, 290, 306, 367 and 404."""
    path = folder / name
    makers: tuple[Callable[[], object], ...] = (
        path.mkdir, lambda: os.mkfifo(path), lambda: path.symlink_to("/dev/zero"), lambda: path.symlink_to("/"),
    )  # fmt: skip
    for put in makers:
        path.unlink(missing_ok=True)
        put()
        refused(folder, f"lacks {name}|{name} is no file: fetch or export the model again")
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()


@pytest.mark.parametrize("name", [*FILES[1:], SUMS])
def test_a_file_of_gigabytes_is_refused(folder: Path, name: str) -> None:
    """Seed 263."""
    with (folder / name).open("ab") as file:
        file.truncate(8 * 10**9)
    refused(folder, f"{name} is larger than 33,554,432 bytes")


def test_an_export_gives_nothing_away_that_a_link_leads_to(folder: Path) -> None:
    (folder / "curves.svg").unlink()
    (folder.parent / "secret").write_text("a key")
    (folder / "report.html").unlink()
    (folder / "report.html").symlink_to("../secret")
    with pytest.raises(BundleError, match=r"report\.html is no page"):
        export(folder, folder.parent / "out")
    (folder / "report.html").unlink()
    (folder / "curves.svg").symlink_to("../secret")
    with pytest.raises(BundleError, match=r"curves\.svg is no SVG picture"):
        export(folder, folder.parent / "out")
    (folder / "curves.svg").unlink()
    (folder / "curves.svg").symlink_to("/proc/self/mem")  # seed 2000320
    (folder / "README.md").unlink()
    (folder / "README.md").symlink_to("/proc/self/mem")  # seed 3002682: it is written anew
    with pytest.raises(BundleError, match=r"curves\.svg cannot be read"):
        export(folder, folder.parent / "out")
    assert not (folder.parent / "out").exists()
    (folder / "curves.svg").unlink()
    assert (export(folder, folder.parent / "out") / "README.md").read_text().startswith("# hearts")


def test_names_in_the_checksums_that_are_none_and_folders_that_are_none(folder: Path) -> None:
    """Seed 88."""
    (folder / SUMS).write_text(f"{'0' * 64}  {'x' * 300}\n")
    refused(folder, "cannot be read: File name too long")
    refused(folder / ("x" * 300), "cannot be read: File name too long")
    refused(folder / "a\0b", "is no saved model")
    (folder / SUMS).write_text(f"{'0' * 64}  \x1b[31m\n")
    refused(folder, r"lacks \\x1b\[31m, which its SHA256SUMS lists")


# ------------------------------------------------------------------------------------------------ names


def ready(names: tuple[str, ...], **given: Any) -> Bundle:
    states, config = make(classes=len(names), **given)
    return bundle.assemble(replace(config, classes=names), states)


@pytest.mark.parametrize("name", ["\x1b[31m", "\x9b31m", "\u202eabc", "\x7f", "\x1b]0;title\a"])
def test_no_name_tells_the_terminal_anything(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Seeds 63 and 341."""
    model = ready(("a", name, "c"))
    data = from_arrays(STEPS, [("a", name, "c")[i % 3] for i in range(9)], ids=[f"{name}{i}" for i in range(9)])
    show_predictions(model.predict(data))
    show_evaluation(evaluate(model, data))
    shown = capsys.readouterr().out
    assert shown.replace("\n", "").isprintable()
    assert name.encode("unicode_escape").decode()[:4] in shown


def test_a_name_is_no_emoji_and_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    model = ready((":smile:", "[red]a[/red]"))
    show_predictions(model.predict(from_arrays(STEPS, ids=[f"{i}:smile:" for i in range(9)])))
    shown = capsys.readouterr().out
    assert "p(:smile:)" in shown
    assert "p([red]a[/red])" in shown
    assert "8:smile:" in shown


@pytest.mark.parametrize("format", ["safetensors", "onnx", "pt2"])
def test_no_name_is_more_than_text_in_the_card(format: str) -> None:
    """Seeds 27, 182 and 343."""
    states, config = make(classes=2)
    del states
    nasty = ("<script>", "![x](http://x)", "\\[x](y)", "\x1b[31m", "\x9b", "\u202e", "a\n\n# b", "```\n<b>", "`<b>`")
    for name in nasty:
        undefined = replace(metrics.Scores(2, {}, {}, ((0, 1), (1, 0))), undefined={"f1": name}, methods={"f1": name})
        text = card.readme(
            replace(
                config, classes=(name, "b"), features=("a", name), provenance={"study": name, name: [name]},
                validation=undefined,
            ), format,
        )  # fmt: skip
        assert text.replace("\n", "").isprintable()
        plain = re.sub(r"(?ms)^```\w+$.*?^```$", "", text)
        plain = re.sub(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", "", plain)
        assert not re.search(r"<[A-Za-z/!?]", plain)
        assert set(re.findall(r"\]\([^)]*\)", plain)) == {
            "](curves.svg)",
            "](confusion.svg)",
            "](reliability.svg)",
        }


def test_the_code_of_the_card_still_says_the_same_names() -> None:
    _, config = make(classes=2)
    text = card.readme(replace(config, classes=("\x9b\u202e\x7f", "é")), "onnx")
    line = next(line for line in text.splitlines() if "names = np.array(" in line)
    assert eval(line.split("= ")[1], {"np": np}).tolist() == ["\x9b\u202e\x7f", "é"]


def test_scores_of_many_classes_take_neither_minutes_nor_gigabytes() -> None:
    """A confusion matrix is of K^2 counts, of which thousands were drawn at once: 3 GB for 300 classes."""
    K = 300
    found = metrics.measure(np.full((9, K), 1 / K, np.float32), np.arange(9))
    assert 0 <= found.intervals["macro_f1"][0] < found.intervals["macro_f1"][1] <= 1
    many = {**asdict(ClassifierConfig(1, 2, 1)), "classes": 1001}
    with pytest.raises(BundleError, match="classes must be at most 1000, got 1001"):
        from_json(json.dumps({"format": 2, "classifier": many}).encode(), "config.json")


def test_the_docstring_states_the_bound_that_the_fuzzer_holds(folder: Path) -> None:
    assert "at most 64 MiB, 8 times the weights and 64 times config.json" in " ".join(str(bundle.load.__doc__).split())
    assert (
        'return 64 * MIB + 8 * used(model / "model.safetensors") + 64 * used(model / "config.json")'
        in SCRIPT.read_text()
    )
    write_checksums(folder)
    assert bundle.load(folder).config.members == 2
