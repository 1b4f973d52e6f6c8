"""Workers on a Ray cluster, an actor for each. Ray places and restarts them, Postgres alone says what is done.

    launcher ── places ──> detached actor `worker-3` on some node ── starts, starts again ──> hpo worker --study NAME

The actors belong to no launcher: when it is killed they finish the study, and the next launch finds them by the
study's namespace and goes on with them. A launch that is left by Ctrl-C ends them, as `LocalWorkers` does. An actor
leaves when its worker ends well; Ray starts it again elsewhere when its node dies, and its worker adopts what that
node's left behind.

Without an address Ray is started on this machine, on loopback and with a token of its own, by a keeper
(`python -P -m hpo.launcher.ray NAME`) that ends it with the last launcher and the last actor of that study.

No password goes through Ray: an actor is given the database's address without it, and finds it in its node's
environment (HPO_DATABASE_PASSWORD_FILE, PGPASSWORD, or a HPO_DATABASE_URL of the node's own, which goes first).
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hpo.launcher.launch import PAUSE_S, RESTARTS, STOP_S, LaunchError, tail
from hpo.models.machine import ONE_THREAD
from hpo.storage.home import home

if TYPE_CHECKING:
    from types import ModuleType

log = logging.getLogger("hpo")

LOOK_S = 2.0  # between two looks at the cluster
PLACED_S = 20.0  # without a worker anywhere, before it is said
FAREWELL_S = 30.0  # that an actor which gave up stays, for its launcher to hear why
KEEPER_S = 120.0  # for Ray to start
TAIL_S = 10.0  # for actors to hand out their logs
LOOPBACK = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # Ray's name for: this machine is 127.0.0.1, and listen nowhere else
    "RAY_AUTH_MODE": "token",  # others on this machine must not run code as this user
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # `Placed` sees to it
}
# Run before the worker, which takes its place: a SIGTERM to it when its actor dies, so that it gives its trial back.
WITH_ACTOR = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


class ClusterError(LaunchError):
    """There is no such cluster, or it cannot run workers."""


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


class Report(NamedTuple):
    """What an actor says of its worker."""

    host: str
    log: str
    failures: int  # ends with an error, in this actor's life
    last_words: str  # "" unless it gave up


# ---------------------------------------------------------------------------------------------------- on the nodes


class Placed:
    """The actor. Keeps a worker process running on its node until that ends well, and leaves with it."""

    def __init__(self, study: str, index: int, slots: int | None, settings: Mapping[str, str], gpus: float) -> None:
        self.command = ["-P", "-m", "hpo", "worker", "--study", study, "--slots", str(slots or "auto")]
        self.environment = environment(settings)
        if gpus == 0:
            self.environment["CUDA_VISIBLE_DEVICES"] = ""  # those of others; else as Ray has set it
        folder = Path(self.environment.get("HPO_HOME") or home()) / "logs" / study
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / f"worker-{socket.gethostname()}-{index}.log"
        self.environment |= {"HPO_WORKER_INDEX": str(index), "HPO_LOG": str(self.log)}
        self.me = _ray().get_runtime_context().current_actor
        self.told = threading.Event()
        self.popen: subprocess.Popen[bytes] | None = None
        self.failures, self.last_words = 0, ""
        self.thread = threading.Thread(target=self._keep, daemon=True)
        self.thread.start()

    def look(self) -> Report:
        return Report(socket.gethostname(), str(self.log), self.failures, self.last_words)

    def tail(self, lines: int) -> str:
        """The last lines of the log."""
        return tail(self.log, lines)

    def stop(self) -> None:
        """SIGTERM to the worker, SIGKILL after STOP_S; returns when it has ended."""
        self.told.set()
        popen = self.popen
        if popen is None:
            return
        popen.send_signal(signal.SIGTERM)
        try:
            popen.wait(STOP_S)
        except subprocess.TimeoutExpired:
            popen.kill()
            popen.wait()

    def _keep(self) -> None:
        """In one thread: the worker gets its SIGTERM when the thread that started it ends, not with the process."""
        while not self.told.is_set():
            self.popen = self._start()
            if self.told.is_set():  # after it was looked for
                self.popen.terminate()
            if self.popen.wait() == 0 or self.told.is_set():
                break
            if self.failures == RESTARTS:
                self.last_words = tail(self.log) or "nothing was logged"
                self.told.wait(FAREWELL_S)
                break
            self.told.wait(PAUSE_S * 2**self.failures)
            self.failures += 1
        _ray().kill(self.me, no_restart=True)

    def _start(self) -> subprocess.Popen[bytes]:
        begin = [sys.executable, "-I", "-S", "-c", WITH_ACTOR, str(os.getpid())]
        with self.log.open("ab") as output:
            return subprocess.Popen(
                [*begin, *self.command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=self.environment,
                start_new_session=True,
            )


def environment(settings: Mapping[str, str]) -> dict[str, str]:
    """Of a worker on this node: the node's own goes before what the launcher says. Its home only on its machine."""
    given = dict(settings)
    if given.pop("host", None) != socket.gethostname():
        given.pop("HPO_HOME", None)
    return given | dict(os.environ) | ONE_THREAD


# --------------------------------------------------------------------------------------------------- the launcher


def settings() -> dict[str, str]:
    """What workers must know, without a password."""
    from hpo.storage.artifacts import artifact_store

    given = {"host": socket.gethostname(), "HPO_HOME": str(home()), "HPO_ARTIFACTS": artifact_store().url}
    if url := os.environ.get("HPO_DATABASE_URL"):
        given["HPO_DATABASE_URL"] = without_password(url)
    return given


def without_password(url: str) -> str:
    from sqlalchemy import make_url

    parsed = make_url(url)._replace(password=None)  # `set` leaves it where it is given None
    return parsed.difference_update_query(["password"]).render_as_string(hide_password=False)


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
        self.ray, self.namespace, self.settings = _ray(), namespace(study), settings()
        self.folder = f"`hpo logs {study}`"
        self.gpus = self._gpus()
        self.actors: dict[int, Any] = {index: self._found(index) for index in self._running()}
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
        self._hear()
        self._warn()
        failed = [report for index, report in self.reports.items() if report.last_words and index not in self.gone]
        if failed and len(failed) == len(self.reports.keys() - self.gone.keys()):
            raise ClusterError(
                f"every worker of study {self.study!r} ended with an error, {RESTARTS} restarts each; "
                f"the last lines of {failed[0].log} on {failed[0].host}:\n{failed[0].last_words}"
            )

    def running(self) -> bool:
        """Whether some run, or will again; those that Ray could not place yet count as long as no other did."""
        return not self.reports.keys() | self.gone.keys() or bool(self.reports.keys() - self.gone.keys())

    def rest(self, timeout_s: float) -> None:
        time.sleep(timeout_s)

    def stop(self) -> None:
        """SIGTERM to all workers of the study: finish the batch, give the trial back, end. Then their actors go too."""
        with contextlib.suppress(self.ray.exceptions.RayError):
            self._hear()
            for index in self._running():  # another launch's too
                self.actors.setdefault(index, self._found(index))
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
        make = self.ray.remote(Placed).options(**options)
        return make.remote(self.study, index, self.slots, self.settings, self.gpus)

    def _running(self) -> list[int]:
        """The indices of the study's actors that are not dead."""
        return [int(name.removeprefix("worker-")) for name in _names(self.ray, self.namespace)]

    def _found(self, index: int) -> Any:
        try:
            return self.ray.get_actor(f"worker-{index}", namespace=self.namespace)
        except ValueError:  # gone meanwhile
            return self._place(index)

    def _hear(self) -> None:
        """Take in what actors have said since, without waiting: one that is not placed, or moves, says nothing."""
        for index, actor in self.actors.items():
            if index not in self.gone and index not in self._asked:
                self._asked[index] = actor.look.remote()
        asked = list(self._asked.values())
        ready, _ = self.ray.wait(asked, num_returns=len(asked), timeout=0.2) if asked else ([], [])
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
            address = stack.enter_context(_of_our_own(study))
        ray = _ray()
        if not ray.is_initialized():
            _connect(ray, address)
            stack.callback(ray.shutdown)
        yield


def tails(cluster: Cluster, study: str, lines: int) -> dict[tuple[str, str], str]:
    """The last lines of workers' logs, by (host, path), of the actors that answer in time. Raises ClusterError."""
    with connected(cluster, study):
        ray, where = _ray(), namespace(study)
        actors = [ray.get_actor(name, namespace=where) for name in _names(ray, where)]
        asked = [(actor.look.remote(), actor.tail.remote(lines)) for actor in actors]
        found, deadline = {}, time.monotonic() + TAIL_S
        for pair in asked:
            with contextlib.suppress(ray.exceptions.RayError):
                report, text = ray.get(list(pair), timeout=max(0.0, deadline - time.monotonic()))
                found[report.host, report.log] = text
        return found


def kept(study: str) -> bool:
    """Whether Ray runs on this machine for that study."""
    return _held(home() / "ray" / f"{study}.alive")


def _ray() -> ModuleType:
    try:
        import ray
    except ImportError:
        raise ClusterError("--on ray needs Ray: pip install 'hpo[ray]', on every node of the cluster") from None
    found: ModuleType = ray
    return found


def _connect(ray: ModuleType, address: str) -> None:
    """Ray puts the working directory before all else in the actors' path, where a user's `models` would hide ours."""
    folder = home() / "ray"
    folder.mkdir(exist_ok=True)
    try:
        with contextlib.chdir(folder):
            ray.init(address, log_to_driver=False, configure_logging=False, include_dashboard=None)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ClusterError(
            f"no Ray cluster at {address}: {error}; start one with `ray start --head`, or leave --address out for one "
            "of this machine alone"
        ) from None


def _names(ray: ModuleType, where: str) -> list[str]:
    named = ray.util.list_named_actors(all_namespaces=True)
    return sorted(actor["name"] for actor in named if actor["namespace"] == where)


# ------------------------------------------------------------------------------------------- Ray on this machine alone

# home()/ray/NAME.alive    flock held by the keeper as long as it lives; in it Ray's address, once it can be used
# home()/ray/NAME.users    flock shared by launchers; the keeper takes it alone to end
# home()/ray/token         0600


@contextlib.contextmanager
def _of_our_own(study: str) -> Iterator[str]:
    """Address of a cluster of this machine alone, which another launch of the study may have started."""
    import fcntl

    folder = home() / "ray"
    folder.mkdir(exist_ok=True)
    keeper: subprocess.Popen[bytes] | None = None
    with contextlib.ExitStack() as stack:
        stack.enter_context(_environment(LOOPBACK | {"RAY_AUTH_TOKEN_PATH": str(_token(folder))}))
        users = stack.enter_context((folder / f"{study}.users").open("a"))
        fcntl.flock(users, fcntl.LOCK_SH)
        deadline = time.monotonic() + KEEPER_S
        while not (address := _address(folder / f"{study}.alive")):
            if not kept(study) and (keeper is None or keeper.poll() == 0):  # 0: another was faster, and has ended since
                keeper = _start_keeper(study)
            if time.monotonic() > deadline or (keeper is not None and keeper.poll()):
                path = _keeper_log(study)
                raise ClusterError(f"Ray did not start on this machine; the last lines of {path}:\n{tail(path)}")
            time.sleep(0.1)
        yield address
    if keeper is not None:
        with contextlib.suppress(subprocess.TimeoutExpired):  # another launch goes on with it
            keeper.wait(STOP_S)


def _address(path: Path) -> str:
    return path.read_text() if _held(path) else ""


def _start_keeper(study: str) -> subprocess.Popen[bytes]:
    path = _keeper_log(study)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as output:
        command = [sys.executable, "-P", "-m", "hpo.launcher.ray", study]
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True, cwd=home() / "ray"
        )


def _keeper_log(study: str) -> Path:
    return home() / "logs" / study / "ray.log"


def _token(folder: Path) -> Path:
    """The file with the token that Ray on this machine asks for, made once."""
    path = folder / "token"
    if not path.exists():
        part = folder / f"token.{os.getpid()}"
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:  # noqa: PTH123
            file.write(secrets.token_hex(32))
        with contextlib.suppress(FileExistsError):  # another launch was faster
            os.link(part, path)
        part.unlink()
    return path


@contextlib.contextmanager
def _environment(added: Mapping[str, str]) -> Iterator[None]:
    earlier = {name: os.environ.get(name) for name in added}
    os.environ.update(added)
    try:
        yield
    finally:
        for name, value in earlier.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _held(path: Path) -> bool:
    """Whether a process holds the lock."""
    import fcntl

    try:
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def keep(study: str) -> None:
    """The keeper: start Ray, say where it is, end it when no launcher uses it and no actor is left."""
    import fcntl

    folder = home() / "ray"
    with (folder / f"{study}.alive").open("a+") as alive, (folder / f"{study}.users").open("a") as users:
        try:
            fcntl.flock(alive, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        alive.truncate(0)
        ray = _ray()
        context = ray.init("local", include_dashboard=False, log_to_driver=False, namespace="hpo")
        alive.write(context.address_info["gcs_address"])
        alive.flush()
        while not _deserted(ray, users):
            time.sleep(0.5)
        ray.shutdown()


def _deserted(ray: ModuleType, users: Any) -> bool:
    """True under the lock, which keeps launchers waiting until the keeper has ended."""
    import fcntl

    try:
        fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    if not ray.util.list_named_actors(all_namespaces=True):
        return True
    fcntl.flock(users, fcntl.LOCK_UN)
    return False


if __name__ == "__main__":
    keep(sys.argv[1])
