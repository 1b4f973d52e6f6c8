"""`hpo.launch`: starts the fork server, whose imports take longest, before this process imports anything heavy."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from hpo.launcher.forkserver import ForkServer
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
    show: Callable[[Snapshot], None] = lambda _: None,
    server: ForkServer | None = None,
) -> dict[str, Any]:
    """Create or go on with the study of a file (TOML, or bare data), run it to its end, and sum it up.

    workers: processes on this machine; None: one a CPU core, or one a GPU, but no more than trials. slots: trials at
    once in each; None: as many as fit the GPU. cluster: Ray's, to place the workers on instead, without `workers` as
    many as fit, and no more than trials either. overrides: as in `study.trials=10`. trials: a new budget for a study
    that exists. detach: create the study and return without starting anything. show: called with the state of the
    study a few times a second. server: a fork server that the caller has started already, to be ended here.
    Raises ConfigError, DataError, StudyError, LaunchError, and Interrupted after a Ctrl-C or SIGTERM.
    """
    if detach and (workers is not None or cluster is not None):
        raise LaunchError("a detached launch starts no workers: leave out --workers and --on ray, or --detach")
    needs_none = server is not None or detach or cluster is not None
    with nullcontext(server) if needs_none else start_forkserver() as forkserver:
        from hpo.launcher import supervision  # while the fork server imports what workers need

        config = supervision.read_config(study, overrides, trials)
        if detach:
            return supervision.create(config)
        if cluster is not None:
            return supervision.run_on_ray(config, cluster, workers, slots, show)
        return supervision.run_here(config, forkserver, workers, slots, show)
