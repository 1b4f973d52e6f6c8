"""A trial's checkpoints in the artifact store: at most one is current, and the database names it."""

from __future__ import annotations

import logging
import time

from hpo.models.training.training import Training
from hpo.storage.artifacts import ArtifactStore, MissingArtifactError
from hpo.storage.errors import LeaseLost
from hpo.storage.keys import checkpoint_key
from hpo.storage.leases import Lease, Leases

log = logging.getLogger("hpo")

FIRST_CHECKPOINT_S = 0.5  # a trial of less than that is soon trained again …
CHECKPOINT_S = 10.0  # … and a long one loses no more than this


class Checkpoints:
    """Those of one trial under one lease."""

    def __init__(self, leases: Leases, lease: Lease, store: ArtifactStore, name: str) -> None:
        """name: of the trial, for the log."""
        self._leases, self._lease, self._store, self._name = leases, lease, store, name
        self._key = lease.checkpoint_key
        self._began_at = self._written_at = time.monotonic()

    def restore(self, training: Training) -> None:
        """Go on from the current one. Without it from the start: the same epochs then give the same values."""
        if self._key is None:
            return
        try:
            training.restore(self._store.get(self._key))
        except MissingArtifactError as missing:
            log.warning("%s starts again from its first epoch: %s", self._name, missing)

    @property
    def due(self) -> bool:
        """Whether it is time for one: ever rarer at first, then every CHECKPOINT_S."""
        now = time.monotonic()
        return now - self._written_at >= min(CHECKPOINT_S, max(FIRST_CHECKPOINT_S, (now - self._began_at) / 2))

    def write(self, training: Training) -> None:
        """Store the training's state, have the database name it, and delete the one that it replaces.

        The database names a checkpoint after it is stored, under the lease. Raises LeaseLost.
        """
        epoch, lease = training.history[-1].number, self._lease
        key = checkpoint_key(lease.study_id, lease.number, lease.attempt, epoch)
        self._store.put(key, training.state())
        try:
            replaced = self._leases.checkpoint(lease, key, epoch)
        except LeaseLost:
            self._store.delete(key)
            raise
        if replaced is not None and replaced != key:
            self._store.delete(replaced)
        self._key = key
        self._written_at = time.monotonic()


def drop_spent_checkpoints(leases: Leases, store: ArtifactStore, study_id: int) -> None:
    """Delete the checkpoints of ended trials: of failed ones, and those whose worker died before it could."""
    if keys := leases.spent_checkpoints(study_id):
        for key in keys:
            store.delete(key)
        leases.forget_checkpoints(study_id, keys)
