"""One trial from its parameters to its outcome: the only place that decides complete, pruned or failed."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import psycopg2
import torch
from optuna.trial import TrialState

from hpo.errors import WorkerFault
from hpo.models.device import OutOfMemory, device_errors
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

MIB = 2**20
MUCH = 2**30  # bytes of a card in other processes' hands that are worth waiting for: more than their contexts
PAUSES_S = (10.0, 30.0, 90.0)  # before a trial that has the device for itself, but for other processes, tries again
SHORT_EPOCH_S = 5.0  # asked to stop, a worker still finishes an epoch that takes no longer than this

# Not the trial's fault: it goes on when the store, the database or the disk is back, or its study was deleted.
NOT_ITS_FAULT = (ArtifactError, PostgresError, psycopg2.Error, OSError, MissingRecord)


def run_trial(context: TrialContext) -> TrialState | None:
    """Train one leased trial to its end and record it.

    Returns its final state, or None when the trial was given back unfinished (asked to stop) or taken away (the
    lease was lost): another worker goes on with it. Raises DeviceLost, once the worker's slots are asked to stop.
    """
    trial_log.begin()
    try:
        return _train_with_memory(context)
    except LeaseLost as lost:
        log.warning("%s: %s", context.name, lost)
        return None
    except TrainingInterrupted:
        log.info("%s: given back, to go on from its last checkpoint", context.name)
        context.give_back()  # a device that is found lost below is no fault of a trial that merely waited for it
        return None
    except (WorkerFault, *NOT_ITS_FAULT):
        raise
    except Exception as error:
        log.exception("%s failed", context.name)
        if isinstance(error, OutOfMemory):  # what records it needs some memory, which the traceback holds on to
            error.__traceback__ = error.__context__ = None
            context.forget_training()
            _release_memory(context)
        context.fail(f"{type(error).__name__}: {error}")
        context.drop_spent_checkpoints()
        return TrialState.FAIL
    finally:
        context.forget_training()
        if context.resources.device != "cpu":
            _release_memory(context)  # one stream's memory is of no use to another


@contextmanager
def _device_errors(context: TrialContext) -> Iterator[None]:
    """Errors of the device become OutOfMemory or DeviceLost, also those of what a training does not call itself. On a
    lost device no slot begins anything more: they are asked to stop before any learns that it may go on.
    """
    try:
        with device_errors(torch.device(context.resources.device), lambda: f"{context.name}, beside its training"):
            yield
    except WorkerFault:
        context.resources.stop_requested.set()
        raise


def _release_memory(context: TrialContext) -> None:
    with _device_errors(context):
        release_memory(context.resources.device)


def _train_with_memory(context: TrialContext) -> TrialState:
    """Beside the other slots' trials; where memory runs out, once more with the device for itself.

    So is a trial that was lost without getting further: if it brings its worker down again, it does so alone.
    """
    if context.lease.lost:
        log.info("%s was lost without getting further: it runs with the device for itself", context.name)
    else:
        try:
            return _train(context)
        except OutOfMemory as error:
            log.warning("%s waits until it has the device for itself: %s", context.name, error)
        context.forget_training()  # and outside of the clause, whose traceback holds on to it as well
        _release_memory(context)
    with context.exclusive_device():
        return _train_alone(context)


def _train_alone(context: TrialContext) -> TrialState:
    """With the device for itself; other processes that hold much of its memory are waited for, a few times."""
    pauses = iter(PAUSES_S)
    while True:
        _release_memory(context)
        try:
            return _train(context)
        except OutOfMemory as error:
            with _device_errors(context):
                held = held_by_others(context.resources.device)
            if held < MUCH:
                raise
            text, pause_s = f"others hold {held // MIB} MiB of it: {error}", next(pauses, None)
            if pause_s is None:
                raise OutOfMemory(f"{error}; other processes held {held // MIB} MiB of the device") from None
        log.warning("%s does not fit and tries the device again after %g s, %s", context.name, pause_s, text)
        context.forget_training()
        context.wait_for_others(pause_s)


def held_by_others(device: str) -> int:
    """Bytes of a card's memory that this process's allocator has not taken: those of other processes, and contexts."""
    if torch.device(device).type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device)


def _train(context: TrialContext) -> TrialState:
    """One training from its beginning or last checkpoint to the trial's end; its memory is free after it."""
    params = context.parameters()
    if context.too_large(params):
        log.info("%s is not trained: its weights are beyond limits.size_mb, %s", context.name, params)
        context.prune_untrained(params)
        context.drop_spent_checkpoints()
        return TrialState.PRUNED
    with (
        _device_errors(context),
        build(
            context.plan, params, context.seed, context.sequences, context.resources.device, split=context.split
        ) as training,
    ):
        return _train_to_end(context, training, params)


def _train_to_end(context: TrialContext, training: Training, params: Mapping[str, Value]) -> TrialState:
    """The epochs, from the last checkpoint on, until the training is finished, pruned or stopped."""
    context.restore(training)
    log.info("%s: epoch %d, %s", context.name, len(training.history) + 1, params)
    complete, last_s = True, 0.0
    while not training.finished:
        if context.stop_reason is StopReason.OUT_OF_TIME and training.history:
            complete = not context.plan.finals  # adopted after the study's time: it ends with what its checkpoint holds
            break
        context.watch(training, short_epochs=last_s < SHORT_EPOCH_S)
        try:
            epoch = training.advance(context.interrupts_epoch)
        except TrainingInterrupted:
            if context.stop_reason is StopReason.OUT_OF_TIME and training.history:
                complete = not context.plan.finals  # long epochs: the trial ends with what the whole ones gave
                break
            raise
        last_s = epoch.seconds
        _note(context, epoch)
        if epoch.number <= context.reported:
            continue  # done before memory ran out
        context.report(epoch)
        if context.stop_reason is StopReason.OUT_OF_TIME:
            complete = training.finished or not context.plan.finals
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
