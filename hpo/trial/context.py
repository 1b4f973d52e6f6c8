"""What one trial sees of the world: its lease, its study, its worker's resources, and whether it is to stop."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from optuna.trial import TrialState

from hpo.datasets import Datasets
from hpo.models.bundle.bundle import pack
from hpo.models.bundle.config import BundleConfig, BundleError
from hpo.models.bundle.footprint import CALLS, measure
from hpo.models.data.sequences import DataError, Sequences
from hpo.models.fields import Value
from hpo.models.training.training import Epoch, StateError, Training, TrainingInterrupted
from hpo.storage.artifacts import ArtifactStore, DamagedArtifactError, MissingArtifactError
from hpo.storage.errors import LeaseLost, MissingRecord
from hpo.storage.heartbeat import Progress
from hpo.storage.keys import checkpoint_key, trial_key
from hpo.storage.leases import Lease
from hpo.storage.masking import mask
from hpo.study.lifecycle import OpenStudy
from hpo.study.limits import NONE, Limits, size_of
from hpo.study.notes import attach_artifact
from hpo.study.plan import Plan
from hpo.study.ranking import displaced
from hpo.study.record import FAILURE, TrialRecord
from hpo.track.tracker import Tracker
from hpo.trial import log as trial_log
from hpo.trial.checkpoints import CheckpointSchedule, drop_spent_checkpoints
from hpo.trial.curve import curve_of
from hpo.trial.device import device_name
from hpo.trial.device_lock import LOOK_S, SharedExclusiveLock
from hpo.trial.provenance import provenance

log = logging.getLogger("hpo")

WEIGHTS = "weights.safetensors"
FEW_CALLS = 3  # that the latency of a pruned trial is measured by, where no limit asks for it
SHOWN = {"curve.svg": "image/svg+xml", "log.csv": "text/csv"}  # on the trial's page; the weights are not


class StopReason(Enum):
    """Why a trial is not to go on as it does."""

    LEASE_LOST = "it is in other hands: nothing more of it is written"
    OUT_OF_TIME = "the study's wall-clock budget is spent: it ends with its whole epochs"
    CUT_OFF = "the study's wall-clock budget is spent, and its trials are in order: it is given back"
    WORKER_STOPS = "the worker is to end: it is given back"
    STUDY_STOPPED = "somebody stopped the study: it is given back"

    @property
    def gives_back(self) -> bool:
        """Whether the trial is to be given back after a checkpoint, for another worker to go on with."""
        return self in (StopReason.CUT_OFF, StopReason.WORKER_STOPS, StopReason.STUDY_STOPPED)


@dataclass(frozen=True)
class WorkerResources:
    """What a worker brings to every trial of its slots."""

    worker: str  # HOST-PID
    device: str
    store: ArtifactStore
    datasets: Datasets
    device_lock: SharedExclusiveLock
    stop_requested: threading.Event  # once set, all slots of the worker end
    tracker: Tracker | None = None  # writes the runs of [track]


class TrialContext:
    """One leased trial and all that may be done with it. The training asks it between two batches whether to stop."""

    def __init__(self, study: OpenStudy, lease: Lease, resources: WorkerResources, sequences: Sequences) -> None:
        """sequences: the study's training part."""
        self.lease, self.resources, self.sequences = lease, resources, sequences
        self.plan: Plan = study.plan
        self.name = f"study {study.name}, trial {lease.number}"  # in logs: a worker has trials of several studies
        self.reported = 0  # the last epoch that was reported to the database under this lease
        self._study = study
        self._checkpoint_key = lease.checkpoint_key
        self._schedule = CheckpointSchedule()
        self._training: Training | None = None
        self._short_epochs = True  # short enough to be finished before the trial stops
        self._waiting = False  # for the device
        self._renewals_waited = 0  # waiting for the device is progress too
        lease.heartbeat.progress = self._progress

    # ------------------------------------------------------------------------------------------------- whether to stop

    @property
    def stop_reason(self) -> StopReason | None:
        """The first that applies; None: go on."""
        heartbeat = self.lease.heartbeat
        if heartbeat.lost:
            return StopReason.LEASE_LOST
        if heartbeat.out_of_time:
            return StopReason.OUT_OF_TIME if self.plan.config.study.parallel is None else StopReason.CUT_OFF
        if self.resources.stop_requested.is_set():
            return StopReason.WORKER_STOPS
        return StopReason.STUDY_STOPPED if heartbeat.study_stopped else None

    def interrupts_epoch(self) -> bool:
        """Whether the running epoch is to be given up between two batches. A short one is finished first."""
        reason = self.stop_reason
        return reason is StopReason.LEASE_LOST or (reason is not None and not self._short_epochs)

    def watch(self, training: Training, *, short_epochs: bool) -> None:
        """Tell the lease's heartbeat of this training's progress from now on."""
        self._training, self._short_epochs = training, short_epochs

    def forget_training(self) -> None:
        """Let go of it: its memory is needed."""
        self._training = None

    @contextmanager
    def exclusive_device(self) -> Iterator[None]:
        """Wait until the other slots' trials have ended, and keep new ones waiting until the block ends.

        Raises TrainingInterrupted when the trial is to be given back, or was taken away, while it waits.
        """
        self._waiting = True
        with self.resources.device_lock.exclusive(self._gives_up_waiting):
            self._waiting = False
            if self._gives_up_waiting():  # asked for by the one that had it before
                raise TrainingInterrupted
            yield

    def wait_for_others(self, timeout_s: float) -> None:
        """Wait, that other processes may leave the device. Raises TrainingInterrupted like `exclusive_device`."""
        self._waiting = True
        deadline = time.monotonic() + timeout_s
        while (left_s := deadline - time.monotonic()) > 0:
            if self._gives_up_waiting():
                raise TrainingInterrupted
            self.resources.stop_requested.wait(min(LOOK_S, left_s))
        self._waiting = False

    def _gives_up_waiting(self) -> bool:
        return self.stop_reason not in (None, StopReason.OUT_OF_TIME)

    def _progress(self) -> Progress:
        """In batches: a hung training makes none, a long epoch does, and so does waiting for the device."""
        self._renewals_waited += self._waiting
        training = self._training
        batches = self._renewals_waited + (0 if training is None else training.batches)
        if training is None or not training.history:
            return Progress(batches)
        last = training.history[-1]
        return Progress(batches, last.number, last.value)

    # ------------------------------------------------------------------------------------------------- its checkpoints

    def restore(self, training: Training) -> None:
        """Go on from the last checkpoint that is whole. Without one from the start: the same epochs then give the same
        values. Raises LeaseLost.
        """
        while self._checkpoint_key is not None:
            try:
                training.restore(self.resources.store.get(self._checkpoint_key))
            except (MissingArtifactError, DamagedArtifactError, StateError) as error:
                self._drop_checkpoint(self._checkpoint_key, error)
            else:
                return

    def _drop_checkpoint(self, key: str, why: Exception) -> None:
        """Go back to the checkpoint before one that cannot be used."""
        self._checkpoint_key, epoch = self._study.leases.drop_checkpoint(self.lease, key)
        self.reported = min(self.reported, epoch or 0)
        goes_on = "starts again from its first epoch" if epoch is None else f"goes on after epoch {epoch}"
        log.warning("%s %s, without its checkpoint %s: %s", self.name, goes_on, key, why)
        self.resources.store.delete(key)

    @property
    def checkpoint_due(self) -> bool:
        return self._schedule.due

    def checkpoint(self, training: Training) -> None:
        """Store the training's state, have the database name it, and delete the checkpoint that is kept no longer.

        The database names a checkpoint after it is stored, under the lease. Raises LeaseLost.
        """
        store, lease, epoch, state = self.resources.store, self.lease, training.history[-1].number, training.state()
        key = checkpoint_key(lease.store_key, lease.number, lease.attempt, epoch, state)
        store.put(key, state)
        try:
            dropped = self._study.leases.checkpoint(lease, key, epoch)
        except LeaseLost:
            store.delete(key)
            raise
        if dropped is not None:
            store.delete(dropped)
        self._checkpoint_key = key
        self._schedule.written()

    def drop_spent_checkpoints(self) -> None:
        """Delete those of the study's ended trials."""
        drop_spent_checkpoints(self._study.leases, self.resources.store, self.lease.study_id)

    # ------------------------------------------------------------------------------------------------ what is recorded

    @property
    def seed(self) -> int:
        return self.plan.trial_seed(self.lease.number)

    @property
    def split(self) -> int:
        return self.plan.split(self.lease.number)

    def parameters(self) -> dict[str, Value]:
        """Drawn and recorded for a new trial, read for an adopted one."""
        return self._study.sampler.parameters(self.lease.trial_id)

    def report(self, epoch: Epoch) -> None:
        """Report an epoch to the database and the pruner, once."""
        self._study.storage.set_trial_intermediate_value(self.lease.trial_id, epoch.number, epoch.value)
        self.reported = epoch.number

    def should_prune(self) -> bool:
        """Whether the epoch that was reported last is to be the last one."""
        if not self._study.may_prune(self.lease.number, self.reported):
            return False  # without a look at the database, which most epochs need not wait for
        return self._study.should_prune(self.lease.trial_id)

    def finish(
        self, training: Training, params: Mapping[str, Value], files: Mapping[str, bytes], complete: bool
    ) -> None:
        """Store the trial's files and end it with all that is known of it, in one transaction.

        The weights of a trial among the best are kept, and those that it displaces are deleted. Raises LeaseLost, and
        MissingRecord for a study that was deleted: then what was stored is removed again.
        """
        best = training.best
        assert best is not None
        limits = self._study.limits
        record = self._record(training, best, params, complete, limits)
        dropped = self._displaced_weights(record, limits)
        if dropped is not None:
            files = {**files, WEIGHTS: pack(training.best_weights)}
        keys = self._keys(files)
        record = replace(record, weights=keys.get(WEIGHTS))
        try:
            self._store(files, keys)
            state = TrialState.COMPLETE if complete else TrialState.PRUNED
            self._end(state, [record.value], record.attributes(), limits)
        except (LeaseLost, MissingRecord):
            for key in keys.values():
                self.resources.store.delete(key)
            raise
        for key in dropped or ():
            self.resources.store.delete(key)

    def _displaced_weights(self, record: TrialRecord, limits: Limits) -> list[str] | None:
        """Weights to drop once this trial has ended; None where its own are not among the best that are kept."""
        if not record.complete or not limits.admit(vars(record)):
            return None
        return displaced(self._study.best_first(limits), self.plan, record.number, (record.value, record.log_loss))

    def _record(
        self, training: Training, best: Epoch, params: Mapping[str, Value], complete: bool, limits: Limits
    ) -> TrialRecord:
        history, asked = training.history, complete or limits.latency_ms is not None
        return TrialRecord(
            trial_id=self.lease.trial_id,
            number=self.lease.number,
            value=best.value if complete else history[-1].value,
            complete=complete,
            seed=self.seed,
            params=params,
            best_epoch=best.number,
            epochs=history[-1].number,
            log_loss=best.log_loss,
            threshold=best.threshold,
            curve=curve_of(history),
            parameters=training.parameters,
            training_seconds=round(sum(epoch.seconds for epoch in history), 3),
            device=device_name(self.resources.device),
            worker=self.resources.worker,
            attempt=self.lease.attempt,
            fused_optimizer=training.fused,
            lstm_kernel=training.lstm_kernel,
            best_origin=best.origin,
            origins=list(dict.fromkeys(epoch.origin for epoch in history)),
            provenance=provenance(),
            latency_ms=self._latency_ms(training, params, CALLS if asked else FEW_CALLS),
            size_mb=size_of(self.plan, params),
        )

    def _latency_ms(self, training: Training, params: Mapping[str, Value], calls: int) -> float | None:
        """Of the networks that predict together once the trial is promoted, by so many calls at most; None where they
        give no probability."""
        plan, networks = self.plan, training.best_weights[-self.plan.networks :]
        config = BundleConfig(
            plan.classifier(params),
            plan.classes,
            plan.features,
            plan.metric,
            members=len(networks),
            named=plan.named,
            fill=plan.fill,
        )
        try:
            return measure(config, networks, self.sequences, calls).latency_ms
        except (BundleError, DataError) as error:
            log.info("%s: the latency of a prediction was not measured: %s", self.name, error)
            return None

    def too_large(self, params: Mapping[str, Value]) -> bool:
        """Whether these parameters' weights are beyond the study's limit of size."""
        return self._study.limits.too_large(self.plan, params)

    def prune_untrained(self, params: Mapping[str, Value]) -> None:
        """End it without an epoch, as it is too large to be promoted: with its figure, for the sampler, and its log."""
        attributes = {
            "seed": self.seed,
            "params": dict(params),
            "size_mb": size_of(self.plan, params),
            "device": device_name(self.resources.device),
            "worker": self.resources.worker,
            "attempt": self.lease.attempt,
        }
        files = {"log.csv": trial_log.written()}
        self._store(files, self._keys(files))
        self._end(TrialState.PRUNED, None, attributes, self._study.limits)

    def give_back(self) -> None:
        """Let another worker go on with it, at once."""
        self._study.leases.release(self.lease)

    def fail(self, reason: str) -> None:
        """End it as failed, with the reason and its log."""
        files = {"log.csv": trial_log.written()}
        self._store(files, self._keys(files))
        self._end(TrialState.FAIL, None, {FAILURE: mask(reason)})

    def _keys(self, files: Mapping[str, bytes]) -> dict[str, str]:
        """The artifact keys of files of this attempt, such as "curve.svg"."""
        lease = self.lease
        return {
            name: trial_key(lease.store_key, lease.number, lease.attempt, name, content)
            for name, content in files.items()
        }

    def _end(
        self, state: TrialState, values: list[float] | None, attributes: Mapping[str, Any], limits: Limits = NONE
    ) -> None:
        """With the constraints by which Optuna's samplers and displays tell which trials are within the limits."""
        constraints = limits.constraints(attributes)
        self._study.storage.finish_trial(self.lease.trial_id, state, values, attributes, constraints)

    def _store(self, files: Mapping[str, bytes], keys: Mapping[str, str]) -> None:
        """All at once, as each waits for the disk; what can be looked at appears on the trial's page."""

        def put(name: str) -> None:
            self.resources.store.put(keys[name], files[name])

        try:
            with ThreadPoolExecutor(len(files)) as pool:
                list(pool.map(put, files))
        except RuntimeError:  # no thread could be started, for the want of memory or of processes
            for name in files:
                put(name)
        for name, mimetype in SHOWN.items():
            if name in files:
                attach_artifact(
                    self._study.storage, self.lease.study_id, self.lease.trial_id, keys[name], name, mimetype
                )
