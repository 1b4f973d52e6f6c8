"""Train a finished trial again from what is recorded, and say whether it gives the same bits."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from hpo.storage.artifacts import artifact_store
from hpo.study.lifecycle import open_study

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from hpo.models.training.training import Training
    from hpo.storage.trials import TrialStorage

COMPARED = (
    "device",
    "fused_optimizer",
    "lstm_kernel",
)  # of a trial's attributes: what changes bits beside packages and threads


class ReproductionError(ValueError):
    """The trial cannot be trained again."""


@dataclass(frozen=True)
class Reproduction:
    """One trial's epochs, recorded and trained again."""

    number: int
    epochs: int
    equal: bool  # value, training loss and log-loss of every epoch, bit for bit
    first_difference: str | None  # the first epoch that differs, and how
    causes: tuple[str, ...]  # what is not as it was when the trial ran


def reproduce(storage: TrialStorage, name: str, number: int) -> Reproduction:
    """Train trial `number` of study `name` again for as many epochs as it had. Raises ReproductionError."""
    from hpo.trial.run import rebuild
    from hpo.worker.worker import choose_device, fetch_sequences

    opened = open_study(name, storage)
    trial = next((found for found in opened.study.get_trials(deepcopy=False) if found.number == number), None)
    if trial is None or "curve" not in trial.user_attrs:
        state = "does not exist" if trial is None else f"is {trial.state.name.lower()} and has no recorded curve"
        raise ReproductionError(f"only a complete or pruned trial can be trained again; trial {number} {state}")
    attributes = trial.user_attrs
    sequences = fetch_sequences(artifact_store(), opened.plan.train)
    training = rebuild(opened.plan, attributes, sequences, choose_device())
    for _ in range(attributes["epochs"]):
        training.advance()
    again = {kind: [getattr(epoch, kind) for epoch in training.history] for kind in attributes["curve"]}
    difference = _first_difference(attributes["curve"], again)
    causes = _causes(trial, training)
    return Reproduction(number, attributes["epochs"], difference is None, difference, causes)


def _first_difference(recorded: dict[str, list[float]], again: dict[str, list[float]]) -> str | None:
    for epoch in range(max(map(len, recorded.values()))):
        for kind in recorded:
            old, new = list(zip_longest(recorded[kind], again[kind]))[epoch]
            if old != new:
                return f"{kind.replace('_', ' ')} of epoch {epoch + 1}: recorded {old!r}, now {new!r}"
    return None


def _causes(trial: FrozenTrial, training: Training) -> tuple[str, ...]:
    """What is different now, as `what: then, now`."""
    from hpo.trial.provenance import device_name, provenance

    then: dict[str, Any] = {**trial.user_attrs["provenance"]}
    then |= {name: trial.user_attrs.get(name) for name in COMPARED}
    now: dict[str, Any] = provenance() | {"device": device_name(str(training.device))}
    now |= {"fused_optimizer": training.fused, "lstm_kernel": training.lstm_kernel}
    return tuple(f"{name}: {then[name]} then, {now.get(name)} now" for name in then if then[name] != now.get(name))
