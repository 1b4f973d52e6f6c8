"""One trial from its parameters to its outcome: the only place that decides complete, pruned or failed."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import psycopg2
from optuna.trial import TrialState

from hpo.models.device import OutOfMemory
from hpo.models.fields import Value
from hpo.models.training.memory import release_memory
from hpo.models.training.training import Epoch, Training, TrainingInterrupted
from hpo.storage.artifacts import ArtifactError
from hpo.storage.errors import LeaseLost, MissingRecord, PostgresError
from hpo.trial import log as trial_log
from hpo.trial.build import build
from hpo.trial.context import StopReason, TrialContext
from hpo.trial.curve import curve_of, curve_svg

log = logging.getLogger("hpo")

SHORT_EPOCH_S = 5.0  # asked to stop, a worker still finishes an epoch that takes no longer than this

# Not the trial's fault: it goes on when the store, the database or the disk is back, or its study was deleted.
NOT_ITS_FAULT = (ArtifactError, PostgresError, psycopg2.Error, OSError, MissingRecord)


def run_trial(context: TrialContext) -> TrialState | None:
    """Train one leased trial to its end and record it.

    Returns its final state, or None when the trial was given back unfinished (asked to stop) or taken away (the
    lease was lost): another worker goes on with it.
    """
    device = context.resources.device
    trial_log.begin()
    try:
        return _train_with_memory(context)
    except LeaseLost as lost:
        log.warning("%s: %s", context.name, lost)
        return None
    except TrainingInterrupted:
        log.info("%s: given back, to go on from its last checkpoint", context.name)
        return None
    except NOT_ITS_FAULT:
        raise
    except Exception as error:
        log.exception("%s failed", context.name)
        context.fail(f"{type(error).__name__}: {error}")
        context.drop_spent_checkpoints()
        return TrialState.FAIL
    finally:
        context.forget_training()
        if device != "cpu":
            release_memory(device)  # one stream's memory is of no use to another


def _train_with_memory(context: TrialContext) -> TrialState:
    """Beside the other slots' trials; where memory runs out, once more with the device for itself."""
    device = context.resources.device
    try:
        return _train(context)
    except OutOfMemory as error:
        log.warning("%s waits until it has the device for itself: %s", context.name, error)
    context.forget_training()  # and outside of the clause, whose traceback holds on to it as well
    release_memory(device)
    with context.exclusive_device():
        release_memory(device)
        return _train(context)


def _train(context: TrialContext) -> TrialState:
    """The epochs, from the last checkpoint on, until the training is finished, pruned or stopped."""
    params = context.parameters()
    training = build(context.plan, params, context.seed, context.sequences, context.resources.device)
    context.restore(training)
    log.info("%s: epoch %d, %s", context.name, len(training.history) + 1, params)
    complete, last_s = True, 0.0
    while not training.finished:
        if context.stop_reason is StopReason.OUT_OF_TIME and training.history:
            break  # adopted after the study's time: it ends with what its checkpoint holds
        context.watch(training, short_epochs=last_s < SHORT_EPOCH_S)
        try:
            epoch = training.advance(context.interrupts_epoch)
        except TrainingInterrupted:
            if context.stop_reason is StopReason.OUT_OF_TIME and training.history:
                break  # long epochs: the trial ends with what the whole ones gave
            raise
        last_s = epoch.seconds
        _note(context, epoch)
        if epoch.number <= context.reported:
            continue  # done before memory ran out
        context.report(epoch)
        if context.stop_reason is StopReason.OUT_OF_TIME:
            break
        if not training.finished and context.should_prune():
            complete = False
            break
        _checkpoint(context, training)
    _finish(context, training, params, complete=complete)
    context.drop_spent_checkpoints()
    return TrialState.COMPLETE if complete else TrialState.PRUNED


def _note(context: TrialContext, epoch: Epoch) -> None:
    """A line for the trial's page alone."""
    trial_log.note(
        f"epoch {epoch.number}: {context.plan.metric} {epoch.value:.6g}, log-loss {epoch.log_loss:.6g}, "
        f"training loss {epoch.train_loss:.6g}, {epoch.seconds:.3g} s"
    )


def _checkpoint(context: TrialContext, training: Training) -> None:
    """Where one is due. Raises TrainingInterrupted after it when the trial is to be given back."""
    if training.finished:
        return
    reason = context.stop_reason
    gives_back = reason is not None and reason.gives_back
    if gives_back or context.checkpoint_due:
        context.checkpoint(training)
    if gives_back:
        raise TrainingInterrupted


def _finish(context: TrialContext, training: Training, params: Mapping[str, Value], *, complete: bool) -> None:
    """End it with what can be looked at: its curve and its log."""
    assert training.best is not None
    picture = curve_svg(curve_of(training.history), training.best.number, context.plan.metric)
    files = {"curve.svg": picture.encode(), "log.csv": trial_log.written()}
    context.finish(training, params, files, complete)
