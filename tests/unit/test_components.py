"""A saved model of several configurations: the mean of theirs by weight, whatever each of them looks like."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hpo.models.bundle import bundle, card, footprint
from hpo.models.bundle.checksums import SUMS
from hpo.models.bundle.config import BundleConfig, BundleError, Component, to_json
from hpo.models.calibration import calibrate
from hpo.models.data.gaps import inputs
from hpo.models.data.sequences import DataError, Sequences, from_arrays
from tests.unit.test_bundle import CURVE, LENGTHS, TOLERANCE, make, run_example, sequences
from tests.unit.test_mask import gapped

pytestmark = pytest.mark.usefixtures("one_thread")

SEVERAL: dict[str, list[dict[str, Any]]] = {
    "widths": [{"hidden_size": 5, "normalization": "channel"}, {"hidden_size": 3, "layers": 2, "bidirectional": True}],
    "kinds": [
        {"pooling": "mean", "normalization": "sequence", "sequence_length": 5},
        {"stem": "conv", "stem_width": 3, "stem_stride": 4, "pooling": "concat", "skip": True},
        {"patch_length": 2, "head_size": 4, "pooling": "attention", "difference": True},
    ],
    "marks": [
        {"normalization": "channel"},
        {"missing": "mask", "interval": 2.0, "sequence_length": 5},
        {"missing": "mask", "interval": 0.0, "bidirectional": True},
    ],
    "fixed": [{"pooling": "flatten"}, {"pooling": "max"}],
}
MEMBERS, WEIGHTS = (2, 1, 3), (0.5, 0.3, 0.2)


def make_several(
    name: str, temperature: float = 1.7, classes: int = 3
) -> tuple[list[dict[str, torch.Tensor]], BundleConfig]:
    parts = [
        make(members=members, temperature=temperature, classes=classes, **given)
        for members, given in zip(MEMBERS, SEVERAL[name], strict=False)
    ]
    rest = (*WEIGHTS[1 : len(parts) - 1], sum(WEIGHTS[len(parts) - 1 :]))
    others = tuple(
        Component(config.classifier, config.members, weight)
        for (_, config), weight in zip(parts[1:], rest, strict=True)
    )
    return [state for states, _ in parts for state in states], replace(parts[0][1], others=others)


def data(name: str) -> Sequences:
    return gapped(from_arrays(sequences(*((9,) * 5 if name == "fixed" else LENGTHS))))


def expected(name: str, temperature: float, classes: int) -> np.ndarray[Any, Any]:
    """By a model of each configuration."""
    config = make_several(name, temperature, classes)[1]
    found = np.zeros((data(name).n, classes))
    for members, given, each in zip(MEMBERS, SEVERAL[name], config.components, strict=False):
        states, alone = make(members=members, classes=classes, **given)
        found = found + each.weight * bundle.assemble(alone, states).predict(data(name)).probabilities
    return calibrate(found, temperature)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("name", SEVERAL)
def test_probabilities_are_the_weighted_mean_of_each_configurations(
    tmp_path: Path, name: str, temperature: float, classes: int
) -> None:
    states, config = make_several(name, temperature, classes)
    loaded = bundle.load(bundle.save(tmp_path / "model", states, config, CURVE))
    assert loaded.config == config
    assert len(loaded.models) == config.networks == len(states)
    found = loaded.predict(data(name)).probabilities
    np.testing.assert_allclose(found, expected(name, temperature, classes), atol=5e-6, rtol=0)


@pytest.mark.parametrize("name", SEVERAL)
def test_what_else_is_in_a_batch_changes_nothing(name: str) -> None:
    states, config = make_several(name)
    model, given = bundle.assemble(config, states), data(name)
    together = model.predict(given).probabilities
    alone = np.concatenate([model.predict(given.take([row])).probabilities for row in range(given.n)])
    np.testing.assert_allclose(together, alone, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("name", SEVERAL)
def test_the_cards_plain_torch_example_gives_what_predict_gives(
    tmp_path: Path, name: str, temperature: float, classes: int
) -> None:
    states, config = make_several(name, temperature, classes)
    (tmp_path / "model.safetensors").write_bytes(bundle.pack(states))
    (tmp_path / "README.md").write_text(card.readme(config), encoding="utf-8")
    probabilities = run_example(tmp_path / "README.md", "def member_1")["probabilities"]
    given = data(name)
    steps = [one[:length] for one, length in zip(inputs(given, config.widest), given.lengths, strict=True)]
    found = np.stack([probabilities(torch.from_numpy(one)) for one in steps])
    wanted = bundle.assemble(config, states).predict(given).probabilities
    np.testing.assert_allclose(found, wanted, atol=5e-6, rtol=0)


def test_the_card_names_each_configuration() -> None:
    states, config = make_several("kinds")
    text = card.readme(config)
    assert "6 networks of 3 configurations" in text
    assert "### Configuration 1: weight 0.5\n\n2 networks, numbers 0 to 1 of the weights' file:" in text
    assert "### Configuration 2: weight 0.3\n\n1 network, number 2 of the weights' file:" in text
    assert text.count("-layer LSTM of 5 units") == 3
    measured = footprint.measure(config, states, data("kinds"))
    assert measured.size_mb * 1e6 == pytest.approx(sum(t.nbytes for state in states for t in state.values()))


def test_the_longest_requirement_of_any_configuration_counts() -> None:
    states, config = make_several("fixed")
    with pytest.raises(DataError, match="flatten pooling needs exactly 9 steps"):
        bundle.assemble(config, states).predict(from_arrays(sequences(9, 8)))


def test_earlier_versions_are_told_to_be_replaced_and_read_other_models_still() -> None:
    """They refuse format 6; a model of one configuration is of format 5."""
    assert json.loads(to_json(make_several("widths")[1]))["format"] == 6
    plain = json.loads(to_json(make()[1]))
    assert plain["format"] == 5
    assert "others" not in plain


DAMAGES: dict[str, tuple[str, Any, str]] = {
    "no list": ("others", {}, "others must be a list"),
    "no object": ("others", [7], "others: missing classifier"),
    "no classifier": ("classifier", None, "classifier: missing"),
    "another number of classes": ("classifier.classes", 2, "features, classes and steps alike"),
    "a wrong classifier": ("classifier.hidden_size", -4, "hidden_size"),
    "no networks": ("members", 0, "needs networks and a weight of at least"),
    "many networks": ("members", 10**9, "too few or too many"),
    "no number of networks": ("members", "many", "members must be of type int"),
    "all of the weight": ("weight", 1.0, "which sum to 1"),
    "no weight": ("weight", 1e-300, "a weight of at least 1e-09"),
    "a text as weight": ("weight", "much", "weight must be of type float"),
    "another field": ("more", 1, "unexpected more"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_configuration_is_refused_in_one_line(tmp_path: Path, damage: str) -> None:
    states, config = make_several("widths")
    folder = bundle.save(tmp_path / "model", states, config, CURVE)
    (folder / SUMS).unlink()
    content = json.loads((folder / "config.json").read_text())
    name, value, rule = DAMAGES[damage]
    if name == "others":
        content["others"] = value
    else:
        *above, last = name.split(".")
        target = content["others"][0]
        for each in above:
            target = target[each]
        target[last] = value
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(BundleError, match=rule) as refused:
        bundle.load(folder)
    assert len(str(refused.value).splitlines()) == 1


def test_times_of_different_units_do_not_go_together() -> None:
    config = make_several("marks")[1]
    other = Component(replace(config.others[0].classifier, interval=3.0), 1, 0.1)
    with pytest.raises(BundleError, match="one interval of steps"):
        replace(config, others=(*config.others, other))
