"""On a GPU weights lie as cuDNN wants them, those of each call in one buffer with gaps. It must change no number."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hpo.models.training.training import Training
from tests.gpu.cases import CONFIGURATIONS, Given, advanced, training
from tests.gpu.emulation import installed


def numbers(subject: Training) -> list[float]:
    return [number for epoch in subject.history for number in (epoch.train_loss, epoch.log_loss)]


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_it_changes_no_number_and_checkpoints_go_both_ways(name: str) -> None:
    """A layer and a direction at a time, and norms summed buffer by buffer, differ from the whole by rounding alone."""
    given = CONFIGURATIONS[name]
    with installed():
        one = advanced(training(given, graphs=False, classes=3))
        state = one.state()
    other = advanced(training(given, graphs=False, classes=3))
    assert len(one.members[0].learner.parameters.buffers) > len(other.members[0].learner.parameters.buffers) == 1
    tolerance = 2e-2 if given.get("precision") == "bfloat16" else 1e-4
    assert numbers(one) == pytest.approx(numbers(other), abs=tolerance)
    with installed():
        one.restore(other.state())
        one.advance()
        assert all(torch.isfinite(buffer).all() for buffer in one.members[0].learner.parameters.buffers)
    other.restore(state)
    other.advance()
    assert numbers(one) == pytest.approx(numbers(other), abs=tolerance)


@pytest.mark.parametrize("variable", [False, True])
@pytest.mark.parametrize("given", [{}, {"bidirectional": True}])
def test_every_call_of_cudnn_finds_its_weights_in_one_buffer(
    variable: bool, given: Given, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In training and in validation, with dropout and without, in batches that happen to be of one length: otherwise
    cuDNN copies all weights at each call, and torch warns of it.
    """
    called: dict[frozenset[int], set[int]] = {}  # by the weights of a call, their storages
    real: Any = torch.lstm

    def lstm(values: torch.Tensor, states: object, weights: list[torch.Tensor], *rest: object) -> Any:
        called[frozenset(map(id, weights))] = {weight.untyped_storage()._cdata for weight in weights}
        return real(values, states, weights, *rest)

    with installed():
        subject = training({"layers": 2, "dropout": 0.3, **given}, graphs=False, variable=variable)
        whole = subject.members[0].learner.parameters
        monkeypatch.setattr(torch, "lstm", lstm)
        monkeypatch.setattr(torch.nn.LSTM, "forward", None)  # all layers at once: laid out otherwise
        advanced(subject, 1)
        model = subject.members[0].learner.model.eval()
        model.logits(torch.zeros(5, 3, 2), None)
    assert all(len(storages) == 1 for storages in called.values())
    found = sorted(storage for storages in called.values() for storage in storages)
    assert found == sorted(buffer.untyped_storage()._cdata for buffer in whole.buffers[:-1])  # each call has its own
