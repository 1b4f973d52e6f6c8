"""Ray itself, which is an optional dependency."""

from __future__ import annotations

from types import ModuleType

from hpo.launcher.workers import LaunchError


class ClusterError(LaunchError):
    """There is no such cluster, or it cannot run workers."""


def import_ray() -> ModuleType:
    """Raises ClusterError, naming the extra to install."""
    try:
        import ray
    except ImportError:
        raise ClusterError("--on ray needs Ray: pip install 'hpo[ray]', on every node of the cluster") from None
    found: ModuleType = ray
    return found
