"""A trial's best weights, evaluated: as they were kept, else trained again, which gives the same bits."""

from __future__ import annotations

import logging
import math
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from hpo.errors import StudyFault
from hpo.models.bundle.bundle import unpack
from hpo.models.bundle.config import BundleError
from hpo.models.data.sequences import Sequences
from hpo.models.device import device_errors
from hpo.models.metrics import Scores
from hpo.models.training.memory import release_memory
from hpo.models.training.training import StateError, Training
from hpo.promote.trained import Trained, decided
from hpo.storage.artifacts import ArtifactStore, DamagedArtifactError, MissingArtifactError
from hpo.storage.keys import content_hash
from hpo.study.plan import Plan
from hpo.study.record import TrialRecord
from hpo.trial.build import rebuild
from hpo.trial.device import device_name
from hpo.trial.provenance import provenance

log = logging.getLogger("hpo")

TOLERANCE = 1e-5  # the least between the recorded score and the same weights' on another machine or version


class PromotionError(StudyFault):
    """There is nothing to promote, or the weights do not give the recorded score."""


def trained_networks(
    plan: Plan, store: ArtifactStore, record: TrialRecord, sequences: Sequences, device: str
) -> Trained:
    """The best epoch's weights, as kept, else trained again (training is exact); with their scores on validation.

    The device's memory is free again when it returns. Raises PromotionError where they do not give the recorded score.
    """
    if record.weights is not None:
        with _memory_for(device), rebuild(plan, record, sequences, device) as training:
            kept = _load_kept(plan, store, record, record.weights, training, sequences)
            if kept is not None:
                return decided(plan, kept, sequences)
    with _memory_for(device), rebuild(plan, record, sequences, device) as training:  # whatever was loaded before
        while not training.finished and len(training.history) < record.epochs:
            training.advance()
        training.load(training.best_weights)
        exact = _trained_here(record, training) and set(record.origins) <= {training.origin, ""}
        trained = Trained.of(plan, record, training, sequences)
        _check_value(plan.metric, record, training, trained.scores, exact)
        return decided(plan, trained, sequences)


@contextmanager
def _memory_for(device: str) -> Iterator[None]:
    """Errors of the device become OutOfMemory and DeviceLost; what the block has taken of its memory is given back."""
    with device_errors(torch.device(device), lambda: "evaluating a model"):
        try:
            yield
        finally:
            if device != "cpu":
                release_memory(device)


def _load_kept(
    plan: Plan, store: ArtifactStore, record: TrialRecord, weights: str, training: Training, sequences: Sequences
) -> Trained | None:
    """Load the weights that were kept and measure them; None where they are gone or damaged."""
    try:
        training.load(unpack(store.get(weights)))
        trained = Trained.of(plan, record, training, sequences)
        _check_value(plan.metric, record, training, trained.scores, _trained_here(record, training))
    except MissingArtifactError:
        log.info("the weights %s were dropped for better trials': training again", weights)
        return None
    except (DamagedArtifactError, BundleError, StateError) as error:
        log.warning("the weights %s are damaged: training again: %s", weights, error)
        return None
    except PromotionError as error:
        if content_hash(weights) is not None:
            raise  # they are what was stored
        log.warning("the weights %s may be damaged: training again: %s", weights, error)
        return None
    if content_hash(weights) is None and not _same_log_loss(record, training, trained.scores.metrics["log_loss"]):
        log.warning("the weights %s give another log-loss than recorded, they may be damaged: training again", weights)
        return None
    return trained


def _same_log_loss(record: TrialRecord, training: Training, log_loss: float) -> bool:
    """What tells weights without a hash from those that were scored: one bit of them shows in it."""
    if log_loss == record.log_loss or not math.isfinite(record.log_loss):
        return True
    return not _trained_here(record, training) and math.isclose(log_loss, record.log_loss, rel_tol=1e-3)


def _check_value(metric: str, record: TrialRecord, training: Training, scores: Scores, exact: bool) -> None:
    """Raise PromotionError unless the study's metric on validation is the recorded value, `exact`ly where it was
    computed here.

    Another machine's rounding may turn the class or the rank of a sequence, so that a metric moves by a step.
    """
    value, weights = scores.metrics[metric], training.row_weights
    step = 1 / len(training.labels) if weights is None else float(weights.max() / weights.sum())
    near = math.isclose(value, record.value, abs_tol=max(TOLERANCE, step))
    if value != record.value and (exact or not near):
        raise PromotionError(
            f"the promoted weights must give the recorded validation {metric} {record.value!r}, they "
            f"give {value!r} on {training.origin}; trial {record.number} was trained on {_places(record)}"
        )


def _trained_here(record: TrialRecord, training: Training) -> bool:
    """Whether the best epoch was computed on this machine's device with the same torch and kernel, so that its weights
    give the same bits. Earlier versions recorded where the trial ended."""
    if record.best_origin:
        return record.best_origin == training.origin
    return (
        record.device == device_name(str(training.device))
        and record.provenance.get("torch") == provenance()["torch"]
        and record.lstm_kernel == training.lstm_kernel
        and record.worker.rpartition("-")[0] == socket.gethostname()
    )


def _places(record: TrialRecord) -> str:
    """Where a trial was trained, for a message."""
    if record.best_origin:
        return " then ".join(filter(None, record.origins))
    return f"{record.device} with torch {record.provenance.get('torch')}"
