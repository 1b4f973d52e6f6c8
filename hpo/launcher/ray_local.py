"""Ray on this machine alone: started by the first launch of a study, ended with its last launcher and last actor.

home()/ray/NAME.alive    flock held by the supervisor as long as it lives; in it Ray's address, once it can be used
home()/ray/NAME.users    flock shared by launchers; the supervisor takes it alone to end
home()/ray/token         0600
"""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from hpo.launcher.ray_import import ClusterError, import_ray
from hpo.launcher.workers import STOP_S, tail
from hpo.storage.files import is_locked
from hpo.storage.home import own_folder

if sys.platform != "win32":
    import fcntl

START_S = 120.0  # for Ray to start
LOOPBACK = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # Ray's name for: this machine is 127.0.0.1, and listen nowhere else
    "RAY_AUTH_MODE": "token",  # others on this machine must not run code as this user
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # `WorkerActor` sees to it
}


def runs_here(study: str) -> bool:
    """Whether Ray runs on this machine for that study."""
    return is_locked(own_folder("ray") / f"{study}.alive")


@contextlib.contextmanager
def cluster_of_this_machine(study: str) -> Iterator[str]:
    """Address of a cluster of this machine alone, which another launch of the study may have started."""
    folder = own_folder("ray")
    folder.mkdir(exist_ok=True)
    supervisor: subprocess.Popen[bytes] | None = None
    with contextlib.ExitStack() as stack:
        stack.enter_context(_environment(LOOPBACK | {"RAY_AUTH_TOKEN_PATH": str(_token(folder))}))
        users = stack.enter_context((folder / f"{study}.users").open("a"))
        fcntl.flock(users, fcntl.LOCK_SH)
        deadline = time.monotonic() + START_S
        while not (address := _address(folder / f"{study}.alive")):
            if not runs_here(study) and (
                supervisor is None or supervisor.poll() == 0
            ):  # 0: another was faster, and has ended since
                supervisor = _start_supervisor(study)
            if time.monotonic() > deadline or (supervisor is not None and supervisor.poll()):
                path = _supervisor_log(study)
                raise ClusterError(f"Ray did not start on this machine; the last lines of {path}:\n{tail(path)}")
            time.sleep(0.1)
        yield address
    if supervisor is not None:
        with contextlib.suppress(subprocess.TimeoutExpired):  # another launch goes on with it
            supervisor.wait(STOP_S)


def _address(path: Path) -> str:
    return path.read_text() if is_locked(path) else ""


def _start_supervisor(study: str) -> subprocess.Popen[bytes]:
    path = _supervisor_log(study)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as output:
        command = [sys.executable, "-P", "-m", "hpo.launcher.ray_local", study]
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            cwd=own_folder("ray"),
        )


def _supervisor_log(study: str) -> Path:
    return own_folder("logs") / study / "ray.log"


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


def supervise(study: str) -> None:
    """The supervisor: start Ray, say where it is, end it when no launcher uses it and no actor is left."""
    folder = own_folder("ray")
    with (folder / f"{study}.alive").open("a+") as alive, (folder / f"{study}.users").open("a") as users:
        try:
            fcntl.flock(alive, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        alive.truncate(0)
        ray = import_ray()
        context = ray.init("local", include_dashboard=False, log_to_driver=False, namespace="hpo")
        alive.write(context.address_info["gcs_address"])
        alive.flush()
        while not _deserted(ray, users):
            time.sleep(0.5)
        ray.shutdown()


def _deserted(ray: ModuleType, users: Any) -> bool:
    """True under the lock, which keeps launchers waiting until the supervisor has ended."""
    try:
        fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    if not ray.util.list_named_actors(all_namespaces=True):
        return True
    fcntl.flock(users, fcntl.LOCK_UN)
    return False


if __name__ == "__main__":
    supervise(sys.argv[1])
