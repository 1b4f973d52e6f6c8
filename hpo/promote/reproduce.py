"""Train a finished trial again from what is recorded, and say whether it gives the same bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch

from hpo.datasets import fetch_sequences
from hpo.errors import StudyFault
from hpo.models.device import device_errors
from hpo.models.training.training import Training
from hpo.storage.artifacts import artifact_store
from hpo.storage.trials import TrialStorage
from hpo.study.lifecycle import OpenStudy, open_study
from hpo.study.record import Curve, TrialRecord
from hpo.trial.build import rebuild
from hpo.trial.device import choose_device, device_name
from hpo.trial.provenance import PACKAGES, provenance


class ReproductionError(StudyFault):
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
    study = open_study(name, storage)
    record = _record(study, number)
    sequences = fetch_sequences(artifact_store(), study.plan.train)
    device = choose_device()
    with (
        device_errors(torch.device(device), lambda: "training again"),
        rebuild(study.plan, record, sequences, device) as training,
    ):
        for _ in range(record.epochs):
            training.advance()
    again = {kind: [getattr(epoch, kind) for epoch in training.history] for kind in record.curve}
    difference = _first_difference(record.curve, again)
    return Reproduction(number, record.epochs, difference is None, difference, _causes(record, training))


def _record(study: OpenStudy, number: int) -> TrialRecord:
    """Of a trial that has a recorded curve."""
    trials = study.storage.get_all_trials(study.study_id, deepcopy=False)
    trial = next((found for found in trials if found.number == number), None)
    record = None if trial is None else TrialRecord.of(trial)
    if record is None or not record.curve:
        state = "does not exist" if trial is None else f"is {trial.state.name.lower()} and has no recorded curve"
        raise ReproductionError(f"only a complete or pruned trial can be trained again; trial {number} {state}")
    return record


def _first_difference(recorded: Curve, again: Curve) -> str | None:
    for epoch in range(max(map(len, recorded.values()))):
        for kind in recorded:
            old, new = list(zip_longest(recorded[kind], again[kind]))[epoch]
            if old != new:
                return f"{kind.replace('_', ' ')} of epoch {epoch + 1}: recorded {old!r}, now {new!r}"
    return None


def _causes(record: TrialRecord, training: Training) -> tuple[str, ...]:
    """What is different now and may change bits, as `what: then, now`."""
    then = _what_changes_bits(record.provenance, record.device, record.fused_optimizer, record.lstm_kernel)
    device = device_name(str(training.device))
    now = _what_changes_bits(provenance(), device, training.fused, training.lstm_kernel)
    found = _compared(then, now)
    if len(record.origins) < 2:
        return found
    parts = ", then on ".join(origin or "what an earlier version did not record" for origin in record.origins)
    return (*found, f"origin: it changed in the middle of the trial, which was trained on {parts}")


def what_changed(then: TrialRecord, now: TrialRecord) -> tuple[str, ...]:
    """What may change bits and is not alike for two trainings, as `what: then, now`."""
    about = [
        _what_changes_bits(each.provenance, each.device, each.fused_optimizer, each.lstm_kernel) for each in (then, now)
    ]
    return _compared(*about)


def _compared(then: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(
        f"{name}: {then[name]} then, {now[name]} now"
        for name in now
        if then[name] != now[name] and not (name == "cpu" and then[name] is None)  # earlier versions did not record it
    )


def _what_changes_bits(made_with: Mapping[str, Any], device: str, fused: bool, kernel: str) -> dict[str, Any]:
    names = [*map(str.lower, PACKAGES), "python", "platform", "cpu", "threads", "commit"]
    about = {name: made_with.get(name) for name in names}
    return about | {"device": device, "fused_optimizer": fused, "lstm_kernel": kernel}
