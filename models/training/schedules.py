"""The learning rate as a function of the epochs so far: there is no state to save or to restore."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hpo.models.config import TrainingConfig

PLATEAU_PATIENCE, PLATEAU_FACTOR = 3, 0.5  # epochs without a better validation loss, then this factor
PLATEAU_BETTER = 1e-4  # share by which a validation loss must fall to be better


def learning_rate(config: TrainingConfig, log_losses: Sequence[float]) -> float:
    """The rate of the epoch that follows epochs with these validation log-losses.

    cosine: from the rate to 0 over all epochs (Loshchilov and Hutter, 2017, without restarts); plateau: halved after
    PLATEAU_PATIENCE epochs without a lower loss, as torch's ReduceLROnPlateau counts them.
    """
    rate, epoch = config.learning_rate, len(log_losses)
    if config.schedule == "cosine":
        return rate * (1 + math.cos(math.pi * epoch / config.epochs)) / 2
    if config.schedule == "plateau":
        least, stale = math.inf, 0
        for loss in log_losses:
            least, stale = (loss, 0) if loss < least * (1 - PLATEAU_BETTER) else (least, stale + 1)
            if stale > PLATEAU_PATIENCE:
                rate, stale = rate * PLATEAU_FACTOR, 0
    return rate
