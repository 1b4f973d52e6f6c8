"""When a trial's checkpoint is due, and which checkpoints nobody needs any more."""

from __future__ import annotations

import time

from hpo.storage.artifacts import ArtifactStore
from hpo.storage.keys import checkpoint_prefix
from hpo.storage.leases import Leases

FIRST_CHECKPOINT_S = 0.5  # a trial of less than that is soon trained again …
CHECKPOINT_S = 10.0  # … and a long one loses no more than this


class CheckpointSchedule:
    """That of one trial: ever rarer at first, then every CHECKPOINT_S seconds."""

    def __init__(self) -> None:
        self._began_at = self._written_at = time.monotonic()

    @property
    def due(self) -> bool:
        now = time.monotonic()
        return now - self._written_at >= min(CHECKPOINT_S, max(FIRST_CHECKPOINT_S, (now - self._began_at) / 2))

    def written(self) -> None:
        """One has just been written."""
        self._written_at = time.monotonic()


def drop_spent_checkpoints(leases: Leases, store: ArtifactStore, study_id: int) -> None:
    """Delete the checkpoints of ended trials: of failed ones, and those whose worker died before it could."""
    if keys := leases.spent_checkpoints(study_id):
        for key in keys:
            store.delete(key)
        leases.forget_checkpoints(study_id, keys)


def drop_all_checkpoints(leases: Leases, store: ArtifactStore, study_id: int, store_key: str) -> None:
    """Delete the checkpoints of a study that is over, also those that no row names: of workers that were killed, or
    lost their connection, between storing one and naming it. Those of trials that its time has cut off stay."""
    kept = set(leases.kept_checkpoints(study_id))
    for key in store.keys(checkpoint_prefix(store_key)):
        if key not in kept:
            store.delete(key)
