"""Workers on a Ray cluster, an actor for each. Ray places and restarts them, Postgres alone says what is done.

    launcher ── places ──> detached actor `worker-3` on some node ── starts, starts again ──> hpo worker --study NAME

The actors belong to no launcher: when it is killed they finish the study, and the next launch finds them by the
study's namespace and goes on with them. A launch that is left by Ctrl-C ends them, as `LocalWorkers` does. An actor
leaves when its worker ends well; Ray starts it again elsewhere when its node dies, and its worker adopts what that
node's left behind.

Without an address Ray is started on this machine, on loopback and with a token of its own, by a supervisor
(`python -P -m hpo.launcher.ray_local NAME`) that ends it with the last launcher and the last actor of that study.

No password goes through Ray: an actor is given the database's address without it, and finds it in its node's
environment (HPO_DATABASE_PASSWORD_FILE, PGPASSWORD, or a HPO_DATABASE_URL of the node's own, which goes first).
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import logging
import math
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

from hpo.launcher.ray_actor import Report, WorkerActor
from hpo.launcher.ray_import import ClusterError, import_ray
from hpo.launcher.ray_local import cluster_of_this_machine
from hpo.launcher.workers import RESTARTS, STOP_S
from hpo.storage.artifacts import artifact_store
from hpo.storage.home import home, own_folder
from hpo.storage.url import without_password

log = logging.getLogger("hpo")

LOOK_S = 2.0  # between two looks at the cluster
PLACED_S = 20.0  # without a worker anywhere, before it is said
TAIL_S = 10.0  # for actors to hand out their logs
CONNECT_S = 10.0  # for a cluster's address to answer
RAY_CLIENT_PORT = 10001  # of ray://HOST
ANSWER_S = 10.0  # for actors that nobody has heard of yet, before they are ended as not placed


@dataclass(frozen=True)
class Cluster:
    """Where workers run, and what Ray sets aside for each."""

    address: str | None = None  # as `ray start` prints it, or auto; None: RAY_ADDRESS, else Ray on this machine alone
    cpus: float = 1.0  # cores of each worker, fractions allowed; one that trains keeps one busy
    gpus: float | None = None  # share of a GPU, at most 1; None: 1 where the cluster has GPUs, else 0

    def __post_init__(self) -> None:
        if not 0 <= self.cpus < math.inf:
            raise ClusterError(f"--cpus must be at least 0, got {self.cpus:g}")
        if self.gpus is not None and not 0 <= self.gpus <= 1:
            raise ClusterError(f"--gpus must be between 0 and 1, as a worker trains on one GPU, got {self.gpus:g}")
        if self.cpus == 0 and not self.gpus:
            raise ClusterError("--cpus 0 needs a share of a GPU: --gpus must be above 0")


# --------------------------------------------------------------------------------------------------- the launcher


def settings() -> dict[str, str]:
    """What workers must know, without a password."""
    given = {"host": socket.gethostname(), "HPO_HOME": str(home()), "HPO_ARTIFACTS": artifact_store().url}
    if url := os.environ.get("HPO_DATABASE_URL"):
        given["HPO_DATABASE_URL"] = without_password(url)
    if device := os.environ.get("HPO_DEVICE"):
        given["HPO_DEVICE"] = device
    return given


def namespace(study: str) -> str:
    """Of a study's actors: studies of one name in two databases are two."""
    given = settings()
    database = given.get("HPO_DATABASE_URL") or f"{given['host']}:{given['HPO_HOME']}"
    return f"hpo-{study}-{hashlib.sha256(database.encode()).hexdigest()[:12]}"


class RayWorkers:
    """A study's workers on the cluster that this process is connected to. A context manager: leaving it ends them.

    count: as many; None: as many as all nodes have room for, more when nodes join, but no more than `most`. Those that
    do not fit wait in Ray.
    """

    def __init__(self, study: str, count: int | None, slots: int | None, cluster: Cluster, most: int) -> None:
        self.study, self.count, self.slots, self.cluster, self.most = study, count, slots, cluster, most
        self.ray, self.namespace, self.settings = import_ray(), namespace(study), settings()
        self.where_logs_are = f"`hpo logs {study}`"
        self.gpus = self._gpus()
        self.actors: dict[int, Any] = {index: self._found(index) for index in self._running()}
        if self.actors:
            text = (
                "workers of an earlier launch, %d in all, go on with its --slots, --cpus and --gpus; Ctrl-C ends them"
            )
            log.warning(text, len(self.actors))
        self.reports: dict[int, Report] = {}
        self.gone: dict[int, str] = {}  # why, of actors that will not come back
        self._asked: dict[int, Any] = {}
        self._next_look = 0.0
        self._placed_by: float | None = time.monotonic() + PLACED_S
        self._check_reach()

    def __enter__(self) -> RayWorkers:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def tend(self) -> None:
        """Place workers where there is room for more. Raises ClusterError when each has given up."""
        if time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + LOOK_S
        for index in range(self.count or max(1, min(self.most, self._fitting()))):
            if index not in self.actors:
                self.actors[index] = self._place(index)
        self._collect_reports()
        self._warn()
        failed = [report for index, report in self.reports.items() if report.last_output and index not in self.gone]
        if failed and len(failed) == len(self.reports.keys() - self.gone.keys()):
            raise ClusterError(
                f"every worker of study {self.study!r} ended with an error, {RESTARTS} restarts each; "
                f"the last lines of {failed[0].log} on {failed[0].host}:\n{failed[0].last_output}"
            )

    def running(self) -> bool:
        """Whether some run, or will again; those that Ray could not place yet count as long as no other did."""
        return not self.reports.keys() | self.gone.keys() or bool(self.reports.keys() - self.gone.keys())

    def rest(self, timeout_s: float) -> None:
        time.sleep(timeout_s)

    def stop(self) -> None:
        """SIGTERM to all workers of the study: finish the batch, give the trial back, end. Then their actors go too."""
        with contextlib.suppress(self.ray.exceptions.RayError):
            for index in self._running():  # another launch's too
                self.actors.setdefault(index, self._found(index))
            self._collect_reports(ANSWER_S)  # Ray kills a worker together with an actor that was not asked to stop it
            alive = {index: actor for index, actor in self.actors.items() if index not in self.gone and actor}
            asked = [actor.stop.remote() for index, actor in alive.items() if index in self.reports]
            if asked:
                self.ray.wait(asked, num_returns=len(asked), timeout=STOP_S + 5.0)
            for actor in alive.values():
                with contextlib.suppress(self.ray.exceptions.RayError):
                    self.ray.kill(actor, no_restart=True)

    def _gpus(self) -> float:
        if self.cluster.gpus is not None:
            return self.cluster.gpus
        return 1.0 if any(resources.get("GPU") for resources in self._nodes()) else 0.0

    def _nodes(self) -> list[dict[str, float]]:
        """The resources of each node that is alive, in use or not."""
        return [node["Resources"] for node in self.ray.nodes() if node["Alive"]]

    def _fitting(self) -> int:
        """How many workers the nodes hold, were they all ours. A share of a GPU does not span two."""
        found = 0
        for resources in self._nodes():
            rooms = []
            if self.cluster.cpus:
                rooms.append(math.floor(resources.get("CPU", 0) / self.cluster.cpus + 1e-6))
            if self.gpus:
                rooms.append(int(resources.get("GPU", 0)) * math.floor(1 / self.gpus + 1e-6))
            found += min(rooms)
        return found

    def _place(self, index: int) -> Any:
        """The actor of that index: a new one, or one that an earlier launch has left at work."""
        options = {
            "name": f"worker-{index}",
            "namespace": self.namespace,
            "lifetime": "detached",
            "get_if_exists": True,
            "max_restarts": -1,  # on another node where its own is dead
            "max_task_retries": 0,  # it is asked again at the next look
            "max_concurrency": 4,  # a log is handed out while a worker is waited for
            "num_cpus": self.cluster.cpus,
            "num_gpus": self.gpus,
            "scheduling_strategy": "SPREAD",
        }
        make = self.ray.remote(WorkerActor).options(**options)
        return make.remote(self.study, index, self.slots, self.settings, self.gpus)

    def _running(self) -> list[int]:
        """The indices of the study's actors that are not dead."""
        return [int(name.removeprefix("worker-")) for name in _names(self.ray, self.namespace)]

    def _found(self, index: int) -> Any:
        try:
            return self.ray.get_actor(f"worker-{index}", namespace=self.namespace)
        except ValueError:  # gone meanwhile
            return self._place(index)

    def _collect_reports(self, timeout_s: float = 0.2) -> None:
        """The reports that come within that time: an actor that is not placed, or moves, sends none."""
        for index, actor in self.actors.items():
            if index not in self.gone and index not in self._asked:
                self._asked[index] = actor.look.remote()
        asked = list(self._asked.values())
        ready, _ = self.ray.wait(asked, num_returns=len(asked), timeout=timeout_s) if asked else ([], [])
        for index in [index for index, reference in self._asked.items() if reference in ready]:
            try:
                self.reports[index] = self.ray.get(self._asked.pop(index))
            except self.ray.exceptions.ActorDiedError as error:
                self._lose(index, str(error))
            except self.ray.exceptions.RayError:  # for now
                continue

    def _lose(self, index: int, why: str) -> None:
        """An actor that was there when we came and left before it said a word makes room for a new one."""
        if index in self.reports or "creation task" in why:
            self.gone[index] = why
            if index not in self.reports:
                log.warning("worker %d could not begin on its node: %s", index, why)
        else:
            del self.actors[index]

    def _warn(self) -> None:
        if self.reports or self.gone:
            self._placed_by = None
        elif self._placed_by is not None and time.monotonic() > self._placed_by:
            self._placed_by = None
            wanted = f"{self.cluster.cpus:g} CPUs and {self.gpus:g} GPUs"
            log.warning("Ray has placed no worker yet: each wants %s; the nodes have %s", wanted, self._nodes())

    def _check_reach(self) -> None:
        """The embedded server answers on its own machine only."""
        others = {node["NodeManagerHostname"] for node in self.ray.nodes() if node["Alive"]} - {socket.gethostname()}
        if others and not os.environ.get("HPO_DATABASE_URL"):
            raise ClusterError(
                f"the embedded database cannot be reached from {', '.join(sorted(others))}: set HPO_DATABASE_URL to a "
                "server that all nodes reach, and HPO_ARTIFACTS to a store that they share"
            )


@contextlib.contextmanager
def connected(cluster: Cluster, study: str) -> Iterator[None]:
    """Connected to Ray while the block runs, or to what this process is connected to already. Raises ClusterError.

    To be entered before signals are taken care of: Ray sets a handler for SIGTERM.
    """
    address = cluster.address or os.environ.get("RAY_ADDRESS")
    with contextlib.ExitStack() as stack:
        if address is None:
            address = stack.enter_context(cluster_of_this_machine(study))
        ray = import_ray()
        if not ray.is_initialized():
            _connect(ray, address)
            stack.callback(ray.shutdown)
        yield


def tails(cluster: Cluster, study: str, lines: int) -> dict[tuple[str, str], str]:
    """The last lines of workers' logs, by (host, path), of the actors that answer in time. Raises ClusterError."""
    with connected(cluster, study):
        ray, where = import_ray(), namespace(study)
        actors = [ray.get_actor(name, namespace=where) for name in _names(ray, where)]
        asked = [(actor.look.remote(), actor.tail.remote(lines)) for actor in actors]
        found, deadline = {}, time.monotonic() + TAIL_S
        for pair in asked:
            with contextlib.suppress(ray.exceptions.RayError):
                report, text = ray.get(list(pair), timeout=max(0.0, deadline - time.monotonic()))
                found[report.host, report.log] = text
        return found


def _connect(ray: ModuleType, address: str) -> None:
    """Ray puts the working directory before all else in the actors' path, where a user's `models` would hide ours."""
    folder = own_folder("ray")
    folder.mkdir(exist_ok=True)
    try:
        _look_at(address)
        with contextlib.chdir(folder):
            ray.init(address, log_to_driver=False, configure_logging=False, include_dashboard=None)
    except (OSError, RuntimeError, ValueError) as error:
        raise ClusterError(
            f"no Ray cluster at {address}: {error}; start one with `ray start --head`, or leave --address out for one "
            "of this machine alone"
        ) from None


def _look_at(address: str) -> None:
    """Raises OSError where nothing listens: Ray itself would knock for a quarter of an hour.

    That is so after a typing error, and where `auto` leads to a cluster that was killed: its address stays in a file.
    """
    scheme, separator, _ = address.rpartition("://")
    if address == "local" or (separator and scheme != "ray"):
        return
    if not separator:
        services = importlib.import_module("ray._private.services")  # Ray has no public way from `auto` to an address
        address = services.canonicalize_bootstrap_address_or_die(address)
    parts = urlsplit(f"//{address.removeprefix('ray://')}")
    with socket.create_connection((parts.hostname, parts.port or RAY_CLIENT_PORT), timeout=CONNECT_S):
        pass


def _names(ray: ModuleType, where: str) -> list[str]:
    named = ray.util.list_named_actors(all_namespaces=True)
    return sorted(actor["name"] for actor in named if actor["namespace"] == where)
