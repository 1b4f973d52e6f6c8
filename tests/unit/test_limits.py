"""What a prediction takes, and which trials are within a study's limits of it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from optuna.trial import FrozenTrial, TrialState, create_trial
from safetensors.torch import load as parse_tensors

from hpo.models.bundle import bundle, footprint
from hpo.models.bundle.config import BundleError, from_json, to_json
from hpo.models.config import ClassifierConfig
from hpo.models.data.sequences import Sequences, from_arrays
from hpo.storage.terms import StudyRow
from hpo.study.limits import NONE, Limits, none_within
from tests.unit.test_bundle import CURVE, LENGTHS, make, saved, sequences, weights

pytestmark = pytest.mark.usefixtures("one_thread")


def data() -> Sequences:
    return from_arrays(sequences(*LENGTHS), features=("pulse", "breath"))


class Counted(bundle.Bundle):
    """A bundle that notes what it is asked to predict."""

    asked: list[Sequences]

    def predict(self, data: Any, *rest: Any, **more: Any) -> Any:
        self.asked.append(data)
        return super().predict(data, *rest, **more)


def test_the_latency_is_of_few_predictions_of_the_longest_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Sequences] = []
    threads: list[int] = []

    def assemble(*given: Any) -> bundle.Bundle:
        made = bundle.assemble(*given)
        counted = Counted(made.config, made.models)
        object.__setattr__(counted, "asked", asked)
        threads.append(torch.get_num_threads())
        return counted

    monkeypatch.setattr(footprint, "assemble", assemble)
    states, config = make(members=2)
    torch.set_num_threads(2)
    found = footprint.measure(config, states, data())
    assert torch.get_num_threads() == threads[0] == 2  # as before
    assert found.latency_ms > 0
    assert math.isfinite(found.latency_ms)
    assert found.steps == max(LENGTHS)
    assert found.machine
    assert {(each.n, int(each.lengths[0])) for each in asked} == {(1, max(LENGTHS))}
    assert footprint.WARM_UP < len(asked) <= footprint.WARM_UP + footprint.CALLS


@pytest.mark.parametrize("given", [{}, {"layers": 2, "bidirectional": True, "head_size": 3}, {"stem": "conv"}])
def test_the_size_is_that_of_the_stored_weights_of_all_networks(given: dict[str, Any]) -> None:
    states, config = make(members=3, **given)
    stored = parse_tensors(bundle.pack(states))
    assert footprint.size_mb(config.classifier, 3) * 1e6 == sum(each.nbytes for each in stored.values())
    assert footprint.measure(config, states, data()).size_mb == footprint.size_mb(config.classifier, 3)
    assert footprint.size_mb(config.classifier, 3) == pytest.approx(3 * footprint.size_mb(config.classifier, 1))


def test_weights_that_are_no_numbers_are_not_measured() -> None:
    states, config = make(members=1)
    states[0]["lstm.weight_hh_l0"][0, 0] = math.nan
    with pytest.raises(BundleError, match="must hold finite numbers"):
        footprint.measure(config, states, data())


def test_a_saved_model_says_what_a_prediction_takes(tmp_path: Path) -> None:
    states, config = make(members=2)
    told = replace(config, footprint=footprint.measure(config, states, data()))
    assert from_json(to_json(told).encode(), "config.json") == told
    assert told.footprint is not None
    folder = bundle.save(tmp_path / "model", states, told, CURVE)
    assert bundle.load(folder).config.footprint == told.footprint
    card = (folder / "README.md").read_text()
    assert f"its weights take {told.footprint.size_mb:.3g} MB (10^6 bytes)" in card
    assert f"one sequence of 9 steps takes {told.footprint.latency_ms:.3g} ms on one thread" in card
    assert bundle.load(saved(tmp_path / "earlier")).config.footprint is None


# --- which trials are within the limits ---


def test_a_study_of_an_earlier_version_has_no_limits() -> None:
    earlier = cast("StudyRow", SimpleNamespace(config={"config": {"study": {}}}))
    assert Limits.of(earlier) == NONE
    assert NONE.admit({})
    assert NONE.constraints({"size_mb": 1.0}) == {}
    assert NONE.of_trial(trial(None, None)) == {"latency_ms": None, "size_mb": None, "feasible": None}


def trial(size: float | None, latency: float | None, state: TrialState = TrialState.COMPLETE) -> FrozenTrial:
    known = {name: value for name, value in (("size_mb", size), ("latency_ms", latency)) if value is not None}
    return create_trial(state=state, value=0.5, user_attrs={"seed": 0, **known})


def test_a_trial_is_within_the_limits_that_its_figures_are_known_to_keep() -> None:
    limits = Limits(latency_ms=4.0, size_mb=0.5)
    assert limits.admit({"latency_ms": 4.0, "size_mb": 0.5})
    assert not limits.admit({"latency_ms": 4.1, "size_mb": 0.5})
    assert not limits.admit({"latency_ms": 4.0, "size_mb": 0.6})
    for unknown in (
        {},
        {"latency_ms": 1.0},
        {"latency_ms": math.nan, "size_mb": 0.1},
        {"latency_ms": "1", "size_mb": 1},
    ):
        assert not limits.admit(unknown)
    assert limits.constraints({"latency_ms": 6.0, "size_mb": 0.25}) == {
        "constraints:latency_ms": 0.5,
        "constraints:size_mb": -0.5,
    }
    assert limits.constraints({}) == {"constraints:latency_ms": 0.0, "constraints:size_mb": 0.0}
    assert limits.of_trial(trial(0.6, 1.0)) == {"latency_ms": 1.0, "size_mb": 0.6, "feasible": False}
    assert limits.of_trial(trial(0.6, None))["feasible"] is False
    assert limits.of_trial(trial(0.4, None))["feasible"] is None
    assert limits.of_trial(create_trial(value=0.5, user_attrs={"size_mb": 0.1, "latency_ms": 1.0})) == {
        "latency_ms": None,  # another program's
        "size_mb": None,
        "feasible": None,
    }


def test_why_nothing_is_promoted_names_the_limits_the_nearest_trial_and_the_way_out() -> None:
    limits = Limits(latency_ms=4.0, size_mb=0.5)
    pruned = trial(0.51, None, TrialState.PRUNED)
    found = none_within(limits, [trial(5.0, 1.0), pruned, trial(0.6, 8.0), trial(1.0, 3.0)], "waves")
    assert found == (
        "no completed trial is within [limits] latency_ms at most 4 and size_mb at most 0.5: the nearest, trial -1, "
        "has latency_ms 3 and size_mb 1; raise the limit and launch again, or narrow [space] in a study of another "
        "name; `hpo promote waves --trial -1` takes it all the same"
    )
    only_pruned = none_within(limits, [pruned], "waves")
    assert only_pruned is not None
    assert only_pruned.endswith(
        "trial -1, has size_mb 0.51; raise the limit and launch again, or narrow [space] in a study of another name"
    )
    earlier = none_within(limits, [trial(None, None)], "waves")
    assert earlier is not None
    assert "as an earlier version did not measure what theirs take; `hpo promote waves --trial N`" in earlier
    assert none_within(NONE, [trial(1.0, 1.0)], "waves") is None
    assert none_within(limits, [trial(0.1, 1.0, TrialState.PRUNED)], "waves") is None  # that is not the reason


def test_a_network_is_as_large_as_its_configuration_says() -> None:
    config = ClassifierConfig(features=2, classes=3, steps=9, hidden_size=5)
    assert footprint.size_mb(config, 1) * 1e6 == 4 * sum(each.numel() for each in weights(config).values())
