"""From a configuration to its training: parameters, seed and data are all that it depends on."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpo.errors import HpoError
from hpo.models.config import ClassifierConfig, TrainingConfig
from hpo.models.data.order import ranks
from hpo.models.data.sequences import Sequences
from hpo.models.kernel.native import Kernel
from hpo.models.kernel.native import load as load_kernel
from hpo.models.training.training import Training
from hpo.storage.home import home
from hpo.study.plan import Plan, fields_of, validation_parts
from hpo.study.record import TrialRecord


def build(
    plan: Plan,
    params: Mapping[str, Any],
    seed: int,
    sequences: Sequences,
    device: str,
    *,
    split: int = 0,
    native: bool = True,
) -> Training:
    """The training of one configuration on the training part. Raises OutOfMemory.

    split: of the data, see `Plan.split`. native: train on a CPU in native code, where this machine can build it.
    """
    classifier, config = configurations(plan, params, seed)
    kernel = lstm_kernel() if native and device == "cpu" else None
    parts = validation_parts(plan.config, sequences, plan.rules, split)
    columns = ranks(plan.features) if plan.rules > 2 else None
    return Training(sequences, parts, classifier, config, device, kernel=kernel, columns=columns)


def rebuild(plan: Plan, record: TrialRecord, sequences: Sequences, device: str) -> Training:
    """The training of a finished trial, from what is recorded of it."""
    split, native = plan.split(record.number), record.lstm_kernel != "torch"
    return build(plan, record.params, record.seed, sequences, device, split=split, native=native)


def native_wanted() -> bool:
    """Whether HPO_NATIVE leaves the native kernel on. Raises HpoError for another value than 0 and 1."""
    given = os.environ.get("HPO_NATIVE", "1")
    if given not in ("0", "1"):
        raise HpoError(f"HPO_NATIVE must be 0 (train on torch) or 1 (in native code), got {given!r}")
    return given == "1"


def lstm_kernel() -> Kernel | None:
    """The native kernel, compiled once for this machine and user, where there is a compiler. HPO_NATIVE=0: none.

    It is kept in the user's cache, or in HPO_HOME where others may write to that.
    """
    if not native_wanted():
        return None
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111 (raises for no one)
    own = home() / "hpo-native"
    return load_kernel(Path(cache) / "hpo-native", own) if os.access(cache, os.W_OK) else load_kernel(own)


def configurations(plan: Plan, params: Mapping[str, Any], seed: int) -> tuple[ClassifierConfig, TrainingConfig]:
    """The network and the training that a study's plan and a trial's parameters describe."""
    train = plan.config.train
    config = TrainingConfig(
        metric=plan.metric,
        epochs=train.epochs,
        patience=train.patience,
        precision=train.precision,
        seed=seed,
        **fields_of(TrainingConfig, params),
    )
    return plan.classifier(params), config
