"""A finished trial as the project records it: typed here, attributes of Optuna's trial in the database."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from hpo.models.fields import Value
from hpo.storage.snapshot import Dropped, Holder

FAILURE = "failure"  # attribute of a failed trial: why it failed
WORKER_FAULT = "worker_fault"  # attribute of a trial whose worker lost its device: what that worker said
COPIED_FROM = "copied_from"  # attribute of a trial that a study was warm-started with: STUDY/NUMBER
WAITED = "waited_s"  # attribute of a trial that had to wait for those before it: for how many seconds
COLUMN = {"column": True}  # of what Optuna keeps outside its user attributes
Curve = dict[str, list[float]]  # "value", "train_loss" and "log_loss", one number an epoch


@dataclass(frozen=True)
class TrialRecord:
    """A trial that one of our workers has trained to its end, complete or pruned.

    The defaults stand for what was not recorded of a trial, as by earlier versions.
    """

    trial_id: int = field(metadata=COLUMN)
    number: int = field(metadata=COLUMN)
    value: float = field(metadata=COLUMN)  # the metric: of a complete trial's best epoch, of a pruned one's last
    complete: bool = field(metadata=COLUMN)  # else pruned
    seed: int
    params: Mapping[str, Value] = field(default_factory=dict)  # every entry of the search space, constants included
    best_epoch: int = 1  # from 1
    epochs: int = 0  # trained
    log_loss: float = math.inf  # of the best epoch, on the validation part
    threshold: float = 0.5  # of two classes: the probability from which the second one is predicted
    curve: Curve = field(default_factory=dict)
    parameters: int = 0  # weights that were trained, all members together
    training_seconds: float = 0.0
    device: str = "cpu"
    worker: str = ""  # HOST-PID
    attempt: int = 1  # leases that it took
    fused_optimizer: bool = False  # whether one kernel made each step
    lstm_kernel: str = "torch"  # name of the native kernel's build, or "torch"
    best_origin: str = ""  # where the best epoch was computed: host, device, kernel, torch
    origins: list[str] = field(default_factory=list)  # of all epochs, each once, in the order of the epochs
    provenance: Mapping[str, Any] = field(default_factory=dict)
    weights: str | None = None  # artifact key of the best epoch's weights, while they are kept
    # of one sequence, by the networks that predict together once the trial is promoted (see hpo/models/bundle/
    # footprint.py); measured, so another time it is another. None: not recorded, or they give no probability
    latency_ms: float | None = None
    size_mb: float | None = None  # 10^6 bytes of these networks' weights

    @classmethod
    def of(cls, trial: FrozenTrial) -> TrialRecord | None:
        """None for a trial that none of our workers has trained to its end: running, failed, copied, foreign."""
        attributes = trial.user_attrs
        if not trained_by_us(trial) or not trial.state.is_finished() or trial.value is None:
            return None
        known = {name: attributes[name] for name in ATTRIBUTES if name in attributes}
        return cls(trial._trial_id, trial.number, trial.value, trial.state == TrialState.COMPLETE, **known)

    def attributes(self) -> dict[str, Any]:
        """Optuna's user attributes, from which `of` makes the record again."""
        found = {name: getattr(self, name) for name in ATTRIBUTES}
        return {name: value for name, value in found.items() if name not in OPTIONAL or value is not None}


OPTIONAL = ("weights", "latency_ms", "size_mb")  # attributes that need not be there
ATTRIBUTES = tuple(item.name for item in fields(TrialRecord) if item.metadata != COLUMN)
_NUMBERS = {  # attributes that displays show of each trial
    "best_epoch": int,
    "epochs": int,
    "log_loss": float,
    "threshold": float,
    "seed": int,
    "training_seconds": float,
}
# User attributes that only our workers and launches set.
RESERVED = frozenset((*ATTRIBUTES, FAILURE, WORKER_FAULT, COPIED_FROM, WAITED))


def trial_row(trial: FrozenTrial, dropped: Mapping[int, Dropped], holders: Mapping[int, Holder]) -> dict[str, Any]:
    """What displays show of a trial, JSON-able; None for what is not known.

    dropped: those of its study that do not count, by number. holders: who trains a trial, or did so last, by its id.
    """
    value = trial.values[0] if trial.values else math.nan
    gone = dropped.get(trial.number)
    return {
        "number": trial.number,
        "state": trial.state.name.lower(),
        "value": value if math.isfinite(value) else None,
        "params": dict(trial.user_attrs.get("params", trial.params)),
        "started": _utc(trial.datetime_start),
        "ended": _utc(trial.datetime_complete),
        "failure": failure_of(trial),
        "dropped": None if gone is None else {**vars(gone), "when": gone.when.isoformat()},
        **_training_of(trial, holders.get(trial._trial_id)),
    }


def _training_of(trial: FrozenTrial, holder: Holder | None) -> dict[str, Any]:
    """What was recorded of a trial's training, and who trains it: known before it ends, and where it fails."""
    attributes = trial.user_attrs if trained_by_us(trial) else {}
    recorded = attributes.get("device")
    return {
        **{name: _number(attributes.get(name), kind) for name, kind in _NUMBERS.items()},
        "weight_count": _number(attributes.get("parameters"), int),
        "device": recorded if isinstance(recorded, str) else holder and holder.device,
        "worker": holder and holder.worker,
        "attempt": holder and holder.attempt,
    }


def _number(value: object, kind: type) -> float | None:
    """The number, where it is a finite one of that kind: other programs write attributes, too."""
    if isinstance(value, bool) or not isinstance(value, int if kind is int else int | float):
        return None
    return value if math.isfinite(value) else None


def _utc(moment: datetime | None) -> str | None:
    """A moment with its zone, of Optuna's local one without."""
    return None if moment is None else moment.astimezone(UTC).isoformat()


def trained_by_us(trial: FrozenTrial) -> bool:
    """Whether one of our workers trained it to its end: it is neither copied nor another program's."""
    return "seed" in trial.user_attrs


def failure_of(trial: FrozenTrial) -> str | None:
    """Why a trial failed, as far as that is recorded."""
    reason: str | None = trial.user_attrs.get(FAILURE)
    return reason
