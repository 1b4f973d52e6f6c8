"""Exports give torch's answers for every pooling, direction, depth, normalization, patch and crop."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpo.models.bundle import bundle, export
from hpo.models.bundle.config import to_json
from hpo.models.data.gaps import inputs
from hpo.models.data.sequences import Sequences
from tests.system.test_export_checks import light, padded
from tests.unit.test_classifier import POOLINGS
from tests.unit.test_components import SEVERAL, make_several

VARIANTS: dict[str, dict[str, Any]] = {
    "channel": {"classes": 2, "normalization": "channel", "head_size": 4, "dropout": 0.5, "temperature": 2.5},
    "sequence": {"classes": 3, "normalization": "sequence", "patch_length": 4, "temperature": 0.4},
    "conv": {"classes": 2, "normalization": "channel", "stem": "conv", "stem_width": 3, "stem_stride": 4},
    "convs": {
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
    "crop": {"classes": 2, "sequence_length": 5, "patch_length": 2},
    "mask": {
        "classes": 2,
        "missing": "mask",
        "interval": 2.0,
        "normalization": "channel",
        "difference": True,
        "sequence_length": 5,
    },
}
NETWORKS = [*itertools.product(POOLINGS, (False, True), (1, 2), VARIANTS)]
# Every pair of pooling, direction, depth and variant: the pt2 exporter needs seconds for each network.
PAIRS = [
    (pooling, bool((i + j) % 2), 1 + (i + j) // 2 % 2, variant)
    for i, pooling in enumerate(POOLINGS)
    for j, variant in enumerate(VARIANTS)
]


def probes(pooling: str, keep: int) -> list[Sequences]:
    """Batches that the export itself does not check: other N, T and lengths."""
    if pooling == "flatten" and not keep:
        return [padded(9), padded(*[9] * 6)]
    if pooling == "flatten":
        return [padded(5), padded(12, 5, 7)]
    return [padded(1), padded(14), padded(2, 7, 1, 3, 3, 6), padded(*range(1, 12))]


def check_graph(folder: Path, out: Path, format: str, pooling: str, keep: int = 0) -> None:
    export.export(folder, out, format)
    loaded = bundle.load(out)
    run = {"onnx": export._run_onnx, "pt2": export._run_pt2}[format](out / f"model.{format}")
    for probe in probes(pooling, keep):
        expected = loaded.predict(probe).probabilities
        given = inputs(probe, loaded.config.widest)
        np.testing.assert_allclose(run(given, probe.lengths), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize(("pooling", "bidirectional", "layers", "variant"), NETWORKS)
def test_onnx(tmp_path: Path, pooling: str, bidirectional: bool, layers: int, variant: str) -> None:
    rest = VARIANTS[variant] | {"pooling": pooling, "bidirectional": bidirectional, "layers": layers}
    folder = light(tmp_path / "model", **rest)
    check_graph(folder, tmp_path / "out", "onnx", pooling, rest.get("sequence_length", 0))


@pytest.mark.parametrize(("pooling", "bidirectional", "layers", "variant"), PAIRS)
def test_pt2(tmp_path: Path, pooling: str, bidirectional: bool, layers: int, variant: str) -> None:
    rest = VARIANTS[variant] | {"pooling": pooling, "bidirectional": bidirectional, "layers": layers}
    folder = light(tmp_path / "model", **rest)
    check_graph(folder, tmp_path / "out", "pt2", pooling, rest.get("sequence_length", 0))


@pytest.mark.parametrize("format", ["onnx", "pt2"])
@pytest.mark.parametrize("name", SEVERAL)
def test_of_several_configurations(tmp_path: Path, name: str, format: str) -> None:
    states, config = make_several(name)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(bundle.pack(states))
    (folder / "config.json").write_text(to_json(config))
    check_graph(folder, tmp_path / "out", format, "flatten" if name == "fixed" else "last")
