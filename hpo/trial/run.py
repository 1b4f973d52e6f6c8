"""One trial from its parameters to its outcome: the only place that decides complete, pruned or failed."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg2
from optuna.trial import TrialState

from hpo.models.bundle import pack
from hpo.models.classifier import ClassifierConfig
from hpo.models.data import Sequences
from hpo.models.machine import release_memory
from hpo.models.native import Kernel
from hpo.models.native import load as load_kernel
from hpo.models.seeds import derive
from hpo.models.training import Epoch, Interrupted, OutOfMemory, Training, TrainingConfig
from hpo.storage.artifacts import ArtifactError, ArtifactStore, MissingArtifactError
from hpo.storage.errors import LeaseLost, PostgresError
from hpo.storage.home import home
from hpo.storage.leases import Lease
from hpo.study.lifecycle import OpenStudy, Plan, ask, folds, rank, ranked
from hpo.study.notes import attach_artifact
from hpo.trial import log as trial_log
from hpo.trial.curve import curve_svg
from hpo.trial.provenance import device_name, provenance

if TYPE_CHECKING:
    from hpo.worker.worker import Attention

log = logging.getLogger("hpo")

FIRST_CHECKPOINT_S = 0.5  # a trial of less than that is soon trained again …
CHECKPOINT_S = 10.0  # … and a long one loses no more than this
SHOWN = {"curve.svg": "image/svg+xml", "log.csv": "text/csv"}  # on the trial's page; the weights are not
PATIENT_EPOCH_S = 5.0  # asked to stop, a worker still finishes an epoch that takes no longer than this


@dataclass(frozen=True)
class Bench:
    """What a worker brings to a trial."""

    worker: str
    device: str
    store: ArtifactStore
    sequences: Sequences  # the training part


def build(
    plan: Plan, params: Mapping[str, Any], seed: int, sequences: Sequences, device: str, *, native: bool = True
) -> Training:
    """The training of one configuration: parameters, seed and data are all that it depends on.

    native: run the LSTM on a CPU through the kernel of `hpo.models.native`, where this machine can build it.
    """
    classifier, config = configurations(plan, params, seed)
    kernel = lstm_kernel() if native and device == "cpu" else None
    return Training(sequences, folds(plan.config, sequences), classifier, config, device, kernel=kernel)


def rebuild(plan: Plan, attributes: Mapping[str, Any], sequences: Sequences, device: str) -> Training:
    """The training of a finished trial, from what is recorded of it."""
    native = attributes.get("lstm_kernel", "torch") != "torch"
    return build(plan, attributes["params"], attributes["seed"], sequences, device, native=native)


def lstm_kernel() -> Kernel | None:
    """The native kernel, compiled once for this machine and user, where there is a compiler. HPO_NATIVE=0: none."""
    if os.environ.get("HPO_NATIVE", "1") == "0":
        return None
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111 (raises for no one)
    writable = Path(cache) if os.access(cache, os.W_OK) else home()
    return load_kernel(writable / "hpo-native")


def configurations(plan: Plan, params: Mapping[str, Any], seed: int) -> tuple[ClassifierConfig, TrainingConfig]:
    given = dict(params)
    classifier = ClassifierConfig(
        features=len(plan.features),
        classes=len(plan.classes),
        steps=plan.steps,
        **_take(given, ClassifierConfig),
    )
    train = plan.config.train
    config = TrainingConfig(
        metric=plan.metric,
        epochs=train.epochs,
        patience=train.patience,
        precision=train.precision,
        seed=seed,
        **_take(given, TrainingConfig),
    )
    return classifier, config


def trial_seed(plan: Plan, number: int) -> int:
    return derive(plan.config.study.seed, "trial", number)


def run_trial(opened: OpenStudy, lease: Lease, bench: Bench, attention: Attention) -> TrialState | None:
    """Train one leased trial to its end and record it.

    Returns its final state, or None when the trial was given back unfinished (asked to stop) or taken away (the
    lease was lost): another worker goes on with it.
    """
    trial_log.begin()
    named = _named(opened, lease)
    checkpoints = _Checkpoints(opened, lease, bench.store)
    try:
        try:
            return _run(opened, lease, bench, attention, checkpoints)
        except OutOfMemory as error:
            log.warning("%s waits until it has the device for itself: %s", named, error)
        attention.forget_training()  # and outside of the clause, whose traceback holds on to it as well
        release_memory(bench.device)
        with attention.alone():
            release_memory(bench.device)
            return _run(opened, lease, bench, attention, checkpoints)
    except LeaseLost as lost:
        log.warning("%s: %s", named, lost)
        return None
    except Interrupted:
        log.info("%s: given back, to go on from its last checkpoint", named)
        return None
    except (ArtifactError, PostgresError, psycopg2.Error, OSError, KeyError):
        raise  # not the trial's fault: it goes on when the store, the database or the disk is back
    except Exception as error:
        log.exception("%s failed", named)
        reason = f"{type(error).__name__}: {error}"
        _show(opened, lease, bench.store, {"log.csv": trial_log.written()})
        opened.storage.finish_trial(lease.trial_id, TrialState.FAIL, None, {"failure": reason})
        drop_spent_checkpoints(opened, bench.store)
        return TrialState.FAIL
    finally:
        if bench.device != "cpu":
            release_memory(bench.device)  # one stream's memory is of no use to another


def _run(opened: OpenStudy, lease: Lease, bench: Bench, attention: Attention, checkpoints: _Checkpoints) -> TrialState:
    params = ask(opened, lease)
    seed = trial_seed(opened.plan, lease.number)
    training = build(opened.plan, params, seed, bench.sequences, bench.device)
    checkpoints.restore(training)
    log.info("%s: epoch %d, %s", _named(opened, lease), len(training.history) + 1, params)
    last_s = 0.0
    state = TrialState.COMPLETE
    while not training.finished:
        attention.watch(lease, training, patient=last_s < PATIENT_EPOCH_S)
        try:
            epoch = training.advance(attention.interrupted)
        except Interrupted:
            if attention.out_of_time and training.history:
                break  # long epochs: the trial ends with what the whole ones gave
            raise
        last_s = epoch.seconds
        trial_log.note(
            f"epoch {epoch.number}: {opened.plan.metric} {epoch.value:.6g}, log-loss {epoch.log_loss:.6g}, "
            f"training loss {epoch.train_loss:.6g}, {epoch.seconds:.3g} s"
        )
        if epoch.number <= checkpoints.reported:
            continue  # done before memory ran out
        opened.storage.set_trial_intermediate_value(lease.trial_id, epoch.number, epoch.value)
        checkpoints.reported = epoch.number
        if attention.out_of_time:
            break
        if not training.finished and _prune(opened, lease):
            state = TrialState.PRUNED
            break
        checkpoints.after(training, attention)
    _finish(opened, lease, bench, training, state, {"seed": seed, "params": params})
    drop_spent_checkpoints(opened, bench.store)
    return state


def _prune(opened: OpenStudy, lease: Lease) -> bool:
    if opened.plan.config.study.pruner == "none":
        return False  # and no look at the trial, for which its reports would have to be written first
    return opened.study.pruner.prune(opened.study, opened.storage.get_trial(lease.trial_id))


def drop_spent_checkpoints(opened: OpenStudy, store: ArtifactStore) -> None:
    """Delete the checkpoints of ended trials: of failed ones, and those whose worker died before it could."""
    if keys := opened.leases.spent_checkpoints(opened.study_id):
        for key in keys:
            store.delete(key)
        opened.leases.forget_checkpoints(opened.study_id, keys)


class _Checkpoints:
    """The trial's checkpoints in the artifact store: at most one current, named by the database."""

    def __init__(self, opened: OpenStudy, lease: Lease, store: ArtifactStore) -> None:
        self.opened, self.lease, self.store = opened, lease, store
        self.key = lease.checkpoint_key
        self.reported = 0  # the last epoch that the database was told of under this lease
        self.began_at = self.written_at = time.monotonic()

    def restore(self, training: Training) -> None:
        """Go on from the current one. Without it from the start: the same epochs then give the same values."""
        if self.key is None:
            return
        try:
            training.restore(self.store.get(self.key))
        except MissingArtifactError as missing:
            log.warning("%s starts again from its first epoch: %s", _named(self.opened, self.lease), missing)

    def after(self, training: Training, attention: Attention) -> None:
        """Checkpoint where one is due. Raises Interrupted after it when the worker was asked to stop."""
        number = training.history[-1].number
        if training.finished:
            return
        asked = attention.asked_to_stop
        now = time.monotonic()
        due_s = min(CHECKPOINT_S, max(FIRST_CHECKPOINT_S, (now - self.began_at) / 2))  # ever rarer at first
        if asked or now - self.written_at >= due_s:
            self._write(training.state(), number)
        if asked:
            raise Interrupted

    def _write(self, state: bytes, epoch: int) -> None:
        lease = self.lease
        key = f"checkpoint-{lease.study_id}-{lease.number}-{lease.attempt}-{epoch}"
        self.store.put(key, state)
        try:
            replaced = self.opened.leases.checkpoint(lease, key, epoch)
        except LeaseLost:
            self.store.delete(key)
            raise
        if replaced is not None and replaced != key:
            self.store.delete(replaced)
        self.key = key
        self.written_at = time.monotonic()


def _finish(
    opened: OpenStudy,
    lease: Lease,
    bench: Bench,
    training: Training,
    state: TrialState,
    recorded: dict[str, Any],
) -> None:
    """Record all that is known of the trial and end it, in one transaction."""
    best = training.best
    assert best is not None
    curve = {name: [getattr(epoch, name) for epoch in training.history] for name in ("value", "train_loss", "log_loss")}
    files = {"curve.svg": curve_svg(curve, best.number, opened.plan.metric).encode(), "log.csv": trial_log.written()}
    attributes = recorded | {
        "best_epoch": best.number,
        "epochs": training.history[-1].number,
        "log_loss": best.log_loss,
        "threshold": best.threshold,
        "curve": curve,
        "parameters": training.parameters,
        "training_seconds": round(sum(epoch.seconds for epoch in training.history), 3),
        "device": device_name(bench.device),
        "worker": bench.worker,
        "attempt": lease.attempt,
        "fused_optimizer": training.fused,
        "lstm_kernel": training.lstm_kernel,
        "provenance": provenance(),
    }
    value, dropped = best.value, None
    if state == TrialState.PRUNED:
        value = training.history[-1].value
    elif (dropped := displaced(opened, lease.number, best)) is not None:
        files["weights.safetensors"] = pack(training.best_weights)
        attributes["weights"] = _key(lease, "weights.safetensors")
    try:
        _show(opened, lease, bench.store, files)
        opened.storage.finish_trial(lease.trial_id, state, [value], attributes)
    except (LeaseLost, KeyError):  # taken away or deleted: what was written under this attempt is nobody's
        for name in files:
            bench.store.delete(_key(lease, name))
        raise
    for key in dropped or ():
        bench.store.delete(key)


def _named(opened: OpenStudy, lease: Lease) -> str:
    """As the log calls it: a standing worker has trials of several studies."""
    return f"study {opened.name}, trial {lease.number}"


def _key(lease: Lease, name: str) -> str:
    kind, _, ending = name.partition(".")
    return f"{kind}-{lease.study_id}-{lease.number}-{lease.attempt}.{ending}"


def _show(opened: OpenStudy, lease: Lease, store: ArtifactStore, files: Mapping[str, bytes]) -> None:
    """Store files of this attempt, at once, as each waits for the disk; what can be looked at appears on its page."""
    with ThreadPoolExecutor(len(files)) as pool:
        list(pool.map(lambda name: store.put(_key(lease, name), files[name]), files))
    for name, mimetype in SHOWN.items():
        if name in files:
            attach_artifact(opened.storage, opened.study_id, lease.trial_id, _key(lease, name), name, mimetype)


def displaced(opened: OpenStudy, number: int, best: Epoch) -> list[str] | None:
    """Weights to drop once this trial is complete, or None where it is not among the best `train.keep_best`."""
    others = {trial.number: trial for trial in ranked(opened)}
    scores = {other: (trial.value or 0.0, trial.user_attrs["log_loss"]) for other, trial in others.items()}
    places = rank(opened.plan, scores | {number: (best.value, best.log_loss)})
    kept, dropped = places[: (keep := opened.plan.config.train.keep_best)], places[keep:]
    if number not in kept:
        return None
    return [key for other in dropped if (key := others[other].user_attrs.get("weights")) is not None]


def _take(params: dict[str, Any], kind: type) -> dict[str, Any]:
    names = {item.name for item in fields(kind)}
    return {name: value for name, value in params.items() if name in names}
