"""`hpo.launch`: starts the fork server, whose imports take longest, before this process imports anything heavy."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from hpo.launcher.local import start_forkserver
from hpo.launcher.workers import LaunchError

if TYPE_CHECKING:
    from hpo.launcher.ray import Cluster
    from hpo.storage.snapshot import Snapshot
    from hpo.study.config import StudyConfig


def launch(
    study: str | os.PathLike[str] | StudyConfig,
    *,
    workers: int | None = None,
    slots: int | None = 1,
    cluster: Cluster | None = None,
    overrides: Sequence[str] = (),
    trials: int | None = None,
    detach: bool = False,
    quiet: bool = False,
    show: Callable[[Snapshot], None] | None = None,
) -> dict[str, Any]:
    """Create or go on with the study of a file (TOML, or bare data), run it to its end, and sum it up.

    workers: processes on this machine; None: one a CPU core, or one a GPU, but no more than trials. slots: trials at
    once in each; None: as many as fit the GPU. cluster: Ray's, to place the workers on instead, without `workers` as
    many as fit, and no more than trials either. overrides: as in `study.trials=10`. trials: a new budget for a study
    that exists. detach: create the study and return without starting anything.
    While it runs, what was read of the data and how far the study is go to the standard error: on a terminal in place,
    else, as in a log or below a notebook's cell, in a line where something has changed. quiet: nothing is shown. show:
    called instead, with the state of the study a few times a second.
    Raises ConfigError, DataError, StudyError, LaunchError, and Interrupted after a Ctrl-C or SIGTERM.
    """
    if detach and (workers is not None or cluster is not None):
        raise LaunchError("a detached launch starts no workers: leave out --workers and --on ray, or --detach")
    with nullcontext() if detach or cluster is not None else start_forkserver() as forkserver:
        from hpo.launcher import supervision  # while the fork server imports what workers need
        from hpo.terminal import ProgressDisplay

        with ProgressDisplay(quiet=quiet or show is not None) as display:
            config = supervision.read_config(study, overrides, trials)
            show = display.update if show is None else show
            if detach:
                return supervision.create(config)
            if cluster is not None:
                return supervision.run_on_ray(config, cluster, workers, slots, show)
            return supervision.run_here(config, forkserver, workers, slots, show)
