"""What is written of a study to where its trials are runs: those that have ended, with those of its finals."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from hpo.errors import legible
from hpo.models.fields import Value
from hpo.storage.errors import MissingRecord
from hpo.storage.leases import Leases
from hpo.storage.masking import mask
from hpo.storage.registry import Registry
from hpo.storage.trials import TrialStorage
from hpo.study.lifecycle import trial_rows
from hpo.study.plan import Plan
from hpo.study.record import COPIED_FROM

ENDED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
FIGURES = ("value", "best_epoch", "epochs", "training_seconds", "weight_count", "latency_ms", "size_mb")
TEXT_MOST = 500  # characters of a reason

Series = Mapping[int, float]  # by epoch, from 1


@dataclass(frozen=True)
class EndedTrial:
    """A trial that has ended, as a run. Nothing of it changes any more but its notes."""

    key: str  # STORE KEY/NUMBER: no two trials have the same, also after a study was deleted and launched again
    store_key: str  # of its study
    number: int
    finals: bool  # it is one of the finals of the study
    state: str  # complete, pruned or fail
    started: float  # seconds since 1970
    ended: float
    params: Mapping[str, Value]
    series: Mapping[str, Series]
    figures: Mapping[str, float]
    tags: Mapping[str, str]
    notes: Mapping[str, str]  # hpo.dropped and hpo.model, which come and go

    @property
    def name(self) -> str:
        """Of the run."""
        return f"trial-{self.number:04d}"


@dataclass(frozen=True)
class Ended:
    """All trials of a study that have ended."""

    study: str  # its name
    trials: tuple[EndedTrial, ...]

    def digest(self, target: str) -> str:
        """What stands for all of it as runs of this target: the same while there is nothing to write."""
        runs = [(trial.key, dict(trial.notes)) for trial in self.trials]
        return hashlib.sha256(json.dumps([target, runs], sort_keys=True).encode()).hexdigest()


def ended_trials(storage: TrialStorage, study_id: int) -> Ended:
    """Those of the study and of its finals. Raises MissingRecord for a study that was deleted, and PostgresError."""
    leases = Leases(storage)
    row, finals = leases.study(study_id), leases.finals(study_id)
    if row is None:
        raise MissingRecord(f"study {study_id} has no terms")
    models = Registry(storage.connection).models()
    promoted = {
        model.trial_number: f"{model.name}/{model.version}"
        for model in sorted(models, key=lambda model: model.version)
        if model.study_id == study_id
    }
    trials = _of(storage, study_id, row.name, promoted)
    if finals is not None:
        trials += _of(storage, finals.study_id, row.name, {}, finals=True)
    return Ended(row.name, tuple(trials))


def _of(
    storage: TrialStorage, study_id: int, name: str, models: Mapping[int | None, str], *, finals: bool = False
) -> list[EndedTrial]:
    row = Leases(storage).study(study_id)
    if row is None:
        return []
    metric = Plan.from_json(row.config).metric
    found = storage.get_all_trials(study_id, deepcopy=False, states=ENDED)
    own = [trial for trial in found if COPIED_FROM not in trial.user_attrs]
    return [
        _ended(trial, shown, metric, row.store_key, name, models.get(trial.number), finals=finals)
        for trial, shown in zip(own, trial_rows(storage, study_id, own), strict=True)
    ]


def _ended(
    trial: FrozenTrial,
    shown: Mapping[str, Any],
    metric: str,
    store_key: str,
    study: str,
    model: str | None,
    *,
    finals: bool,
) -> EndedTrial:
    """shown: what displays show of it. study: what the runs are of, also those of finals."""
    started, ended = (_seconds(shown[name]) for name in ("started", "ended"))
    ended = ended or started or 0.0
    tags = {
        "hpo.key": f"{store_key}/{trial.number}",
        "hpo.study": study,
        "hpo.trial": str(trial.number),
        "hpo.state": shown["state"],
        **({"hpo.finals": "true"} if finals else {}),
        **{f"hpo.{name}": str(shown[name]) for name in ("seed", "worker", "device") if shown[name] is not None},
        **({"hpo.failure": _said(shown["failure"])} if shown["failure"] else {}),
    }
    notes = {"hpo.dropped": _said(shown["dropped"]["reason"])} if shown["dropped"] else {}
    return EndedTrial(
        key=tags["hpo.key"],
        store_key=store_key,
        number=trial.number,
        finals=finals,
        state=shown["state"],
        started=started or ended,
        ended=ended,
        params=shown["params"],
        series=_series(trial, metric),
        figures={name: float(shown[name]) for name in FIGURES if shown.get(name) is not None},
        tags=tags,
        notes=notes if model is None else {**notes, "hpo.model": model},
    )


def _series(trial: FrozenTrial, metric: str) -> dict[str, Series]:
    """The metric, train_loss and log_loss by epoch; of a trial that failed the metric alone, as it was reported."""
    curve = trial.user_attrs.get("curve")
    if not isinstance(curve, dict):
        return {metric: _finite(trial.intermediate_values)}
    named = {metric if name == "value" else name: values for name, values in curve.items()}
    return {name: _finite(dict(enumerate(values, 1))) for name, values in named.items()}


def _finite(values: Mapping[int, float]) -> Series:
    return {epoch: float(value) for epoch, value in values.items() if value is not None and math.isfinite(value)}


def _seconds(moment: str | None) -> float | None:
    return None if moment is None else datetime.fromisoformat(moment).timestamp()


def _said(text: str) -> str:
    return legible(mask(text), TEXT_MOST)
