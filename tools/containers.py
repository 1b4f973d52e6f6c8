"""The image's roles as processes in namespaces of their own, as an engine would run them, and what they must show.

`tools/image.py` runs this in a network namespace without a way out. A container is a process tree with a root file
system that is read-only but for its volumes, the image's user, no capabilities and no way to get any. Settings,
commands and health checks are those of docker-compose.yml and examples/kubernetes/service.yaml. In the place of what
is not there: PostgreSQL is the one that the image brings, under the address, password and options that Compose gives
its own; the pod's store is a folder. All containers share one network, and /etc/hosts has the names of services.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import yaml

ROOT = Path(__file__).resolve().parents[1]
COMPOSE = ROOT / "docker-compose.yml"
SERVICE = ROOT / "examples" / "kubernetes" / "service.yaml"
DATA = ROOT / "examples" / "data"
PASSWORDS = {"HPO_DB_PASSWORD": "not 'a' default", "HPO_DASHBOARD_PASSWORD": "nor @ this: one"}
OUTSIDE = "198.51.100.1"  # an address that is not loopback, as a load balancer or a kubelet comes from one
STUDY = '[study]\nname = "{name}"\ntrials = 2\n[data]\ntrain = "{train}"\n[train]\nepochs = 2\n'

# What a mount namespace becomes before the command starts; the last words are the command.
SETUP = """
root=$1 volumes=$2 folder=$3; shift 3
echo "$HOSTNAME" >/proc/sys/kernel/hostname
mount --bind "$root" "$root"
mount -t proc proc "$root/proc"
mount -t tmpfs -o mode=755 tmpfs "$root/dev"
mkdir "$root/dev/shm"
mount -t tmpfs -o size=64m,mode=1777 tmpfs "$root/dev/shm"
for device in null zero full random urandom; do
    touch "$root/dev/$device"
    mount --bind "/dev/$device" "$root/dev/$device"
done
ln -s /proc/self/fd "$root/dev/fd"
printf '%s\\n' "$volumes" | while IFS='|' read -r outside inside options; do
    mount --bind "$outside" "$root$inside"
    mount -o "remount,bind,$options" "$root$inside"
done
mount -o remount,bind,ro "$root"
exec chroot "$root" env --chdir="$folder" "$@"
"""


@dataclass(frozen=True)
class Image:
    """Its files, mounted, and its configuration as Docker writes it."""

    root: Path
    config: dict[str, Any]

    def user(self) -> tuple[int, int, str]:
        """Number, group and home of the user that it names."""
        for line in (self.root / "etc/passwd").read_text().splitlines():
            name, _, number, group, _, home, _ = line.split(":")
            if self.config["User"] in (name, number):
                return int(number), int(group), home
        raise AssertionError(f"the image's user {self.config['User']} is not in its /etc/passwd")


@dataclass
class Container:
    """A command of the image with its settings; volumes: (folder outside, path inside, rw or ro)."""

    image: Image
    name: str
    folder: Path  # of its log and its volumes
    command: list[str]
    environment: dict[str, str]
    volumes: list[tuple[Path, str, str]]
    health: list[str] = field(default_factory=list)
    grace_s: float = 30.0

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    def argv(self, command: list[str]) -> list[str]:
        """The command in the namespaces of a new container."""
        for _, inside, _ in self.volumes:
            made = self.image.root / inside.lstrip("/")
            if not made.exists():
                made.mkdir(parents=True)  # an engine makes the mount point, too
        volumes = "\n".join(f"{outside}|{inside}|{options}" for outside, inside, options in self.volumes)
        alone = ["unshare", "--mount", "--pid", "--ipc", "--uts", "--fork", "--kill-child", "sh", "-euc", SETUP, "sh"]
        where = [str(self.image.root), volumes, self.image.config["WorkingDir"]]
        return [*alone, *where, *self.unprivileged(command)]

    def unprivileged(self, command: list[str]) -> list[str]:
        """The command as the image's user, without any capability, now or later."""
        user, group, _ = self.image.user()
        who = [f"--reuid={user}", f"--regid={group}", "--init-groups"]
        return ["setpriv", *who, "--inh-caps=-all", "--bounding-set=-all", "--no-new-privs", *command]

    def variables(self) -> dict[str, str]:
        own = dict(entry.split("=", 1) for entry in self.image.config["Env"])
        return {**own, "HOME": self.image.user()[2], "HOSTNAME": self.name, **self.environment}

    def run(self, *command: str, timeout_s: float = 300) -> str:
        """What a new container of these settings prints, as with `docker compose run --rm`. It must end well."""
        argv = self.argv([*self.image.config["Entrypoint"], *command])
        done = subprocess.run(argv, env=self.variables(), capture_output=True, text=True, timeout=timeout_s)
        require(done.returncode == 0, f"{' '.join(command)} ends with {done.returncode}: {done.stdout}{done.stderr}")
        return done.stdout

    @contextmanager
    def up(self) -> Iterator[Running]:
        """Within the block it runs; then SIGTERM must end it with status 0 in its time."""
        command = [*self.image.config["Entrypoint"], *self.command]
        with (self.folder / "log").open("wb") as log:
            process = subprocess.Popen(self.argv(command), env=self.variables(), stdout=log, stderr=log)
        try:
            running = Running(self, process)
            yield running
            require(process.poll() is None, f"{self.name} has ended: {self.log}")
            os.kill(running.first, signal.SIGTERM)
            require(process.wait(self.grace_s) == 0, f"{self.name} ended with {process.returncode}: {self.log}")
        finally:
            end_all(process)


class Running:
    """A container that runs."""

    def __init__(self, container: Container, process: subprocess.Popen[bytes]) -> None:
        self.container, self.process = container, process
        wait_for(lambda: child_of(process) is not None, self)
        self.first = child_of(process) or 0  # number 1 of the container

    def execute(self, *command: str) -> subprocess.CompletedProcess[str]:
        """A command in it, as `docker exec` and probes do."""
        join = [
            "nsenter",
            f"--target={self.first}",
            "--mount",
            "--pid",
            "--ipc",
            "--uts",
            f"--root=/proc/{self.first}/root",
        ]
        folder = self.container.image.config["WorkingDir"]
        argv = [*join, "env", f"--chdir={folder}", *self.container.unprivileged(list(command))]
        return subprocess.run(
            argv, env=self.container.variables(), capture_output=True, text=True, timeout=60, start_new_session=True
        )

    def healthy(self) -> bool:
        return self.execute(*self.container.health).returncode == 0

    def confined(self) -> None:
        """Fails where it could write elsewhere than into its volumes, or is more than its user."""
        status = dict(line.split(":\t", 1) for line in Path(f"/proc/{self.first}/status").read_text().splitlines())
        user, group, _ = self.container.image.user()
        require(status["Uid"].split() == 4 * [str(user)] and status["Gid"].split() == 4 * [str(group)], str(status))
        for kind in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
            require(int(status[kind], 16) == 0, f"{self.container.name} has {kind} {status[kind]}")
        require(status["NoNewPrivs"].strip() == "1", "it may gain privileges")
        mounts = [line.split() for line in Path(f"/proc/{self.first}/mountinfo").read_text().splitlines()]
        writable = {mount[4] for mount in mounts if "ro" not in mount[5].split(",")}
        volumes = {inside for _, inside, options in self.container.volumes if options == "rw"}
        engine = {path for path in writable if path == "/proc" or path.startswith("/dev")}
        require(writable - engine == volumes, f"{self.container.name} may write to {writable}")
        for path in ("/app", "/etc", "/usr", "/home"):
            tried = self.execute("touch", f"{path}/tried")
            require("Read-only file system" in tried.stderr, f"{path}: {tried.stderr}")

    def memory_mib(self) -> int:
        """The most that its first process has used."""
        (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{self.first}/status").read_text())
        return int(peak) // 1024


# ------------------------------------------------------------------------------------------- from files to containers


def interpolated(node: Any, variables: Mapping[str, str]) -> Any:
    """The node with ${NAME:?message} and ${NAME:-default} filled in, as Compose does.

    Raises ValueError with the message where a required variable is missing or empty.
    """
    if isinstance(node, dict):
        return {key: interpolated(value, variables) for key, value in node.items()}
    if isinstance(node, list):
        return [interpolated(value, variables) for value in node]
    if not isinstance(node, str):
        return node

    def fill(found: re.Match[str]) -> str:
        name, kind, rest = found.groups()
        if not variables.get(name) and kind == ":?":
            raise ValueError(rest)
        return variables.get(name) or rest

    return re.sub(r"\$\{(\w+)(:[?-])([^}]*)\}", fill, node)


class Machine:
    """Where containers lie, and what they share."""

    def __init__(self, image: Image, work: Path) -> None:
        self.image, self.work = image, work
        self.compose = interpolated(yaml.safe_load(COMPOSE.read_text()), PASSWORDS)
        self.hosts = work / "hosts"
        self.hosts.write_text(f"127.0.0.1 localhost postgres\n{OUTSIDE} serve\n")

    def compose_service(self, name: str, *, extra: tuple[tuple[Path, str, str], ...] = ()) -> Container:
        """A service of docker-compose.yml, of our image; extra: volumes, as `--volume` adds them."""
        settings = self.compose["services"][name]
        require(settings["cap_drop"] == ["ALL"], f"{name} keeps capabilities")
        require(settings["security_opt"] == ["no-new-privileges:true"], f"{name} may gain privileges")
        require(settings["read_only"] is True, f"{name} may write to its image")
        folder = self._folder(name)
        volumes = [self._volume(folder, volume) for volume in settings["volumes"]]
        return Container(
            image=self.image,
            name=folder.name,
            folder=folder,
            command=settings["command"],
            environment=settings["environment"],
            volumes=[(self.hosts, "/etc/hosts", "ro"), *volumes, *extra],
            health=settings["healthcheck"]["test"][1:],
            grace_s=float(settings["stop_grace_period"].removesuffix("s")),
        )

    def database(self) -> Container:
        """Compose's service postgres, as the programs that the image brings."""
        settings = self.compose["services"]["postgres"]
        folder = self._folder("postgres")
        image = Image(self.image.root, {**self.image.config, "Entrypoint": ["sh", "-euc", DATABASE, "sh"]})
        (release,) = re.findall(r"^postgres:(\d+)", settings["image"])
        (programs,) = image.root.glob(f"app/.venv/lib/python3*/site-packages/*/pginstall{release}/bin")
        path = f"/{programs.relative_to(image.root)}:/usr/sbin:/usr/bin:/sbin:/bin"
        volumes = [self._volume(folder, volume) for volume in ("/tmp", *settings["volumes"])]
        for outside, _, _ in volumes:
            os.chown(outside, *image.user()[:2])
        return Container(
            image=image,
            name="postgres",
            folder=folder,
            command=settings["command"],
            environment={**settings["environment"], "PATH": path},
            volumes=[(self.hosts, "/etc/hosts", "ro"), *volumes],
            health=settings["healthcheck"]["test"][1:],
            grace_s=float(settings["stop_grace_period"].removesuffix("s")),
        )

    def pod(self) -> tuple[Container, dict[str, Any]]:
        """The pod of examples/kubernetes/service.yaml and its container's settings."""
        deployment = next(each for each in yaml.safe_load_all(SERVICE.read_text()) if each["kind"] == "Deployment")
        spec = deployment["spec"]["template"]["spec"]
        (settings,) = spec["containers"]
        rights = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
        require(settings["securityContext"] == rights, "the pod has other rights than containers here")
        require(str(spec["securityContext"]["runAsUser"]) == self.image.config["User"], "the pod has another user")
        compose = self.compose["services"]["serve"]["environment"]
        secret = {"database-url": compose["HPO_DATABASE_URL"], "database-password": compose["PGPASSWORD"]}
        environment = {}
        for entry in settings["env"]:
            key = entry.get("valueFrom", {}).get("secretKeyRef", {}).get("key")
            if key is None or key in secret:
                environment[entry["name"]] = entry["value"] if key is None else secret[key]
        folder = self._folder("pod")
        volumes = []
        for mount in settings["volumeMounts"]:  # an emptyDir belongs to root and to fsGroup
            outside = folder / mount["name"]
            outside.mkdir()
            os.chown(outside, 0, spec["securityContext"]["fsGroup"])
            outside.chmod(0o2777)
            volumes.append((outside, mount["mountPath"], "rw"))
        store = self._volume(folder, "artifacts:/artifacts")
        container = Container(
            image=self.image,
            name=folder.name,
            folder=folder,
            command=settings["args"],
            environment={**environment, "HPO_ARTIFACTS": "/artifacts"},
            volumes=[(self.hosts, "/etc/hosts", "ro"), *volumes, store],
            grace_s=float(spec["terminationGracePeriodSeconds"]),
        )
        return container, settings

    def _folder(self, name: str) -> Path:
        """A new one."""
        folder = self.work / f"{name}-{sum(1 for _ in self.work.glob(f'{name}-*')) + 1}"
        folder.mkdir()
        return folder

    def _volume(self, folder: Path, text: str) -> tuple[Path, str, str]:
        """A volume as Compose writes it; a new one belongs to whom the image gives the path."""
        name, _, inside = text.rpartition(":")
        outside = self.work / f"volume-{name}" if name else folder / inside.strip("/").replace("/", "-")
        if not outside.exists():
            outside.mkdir()
            found = self.image.root / inside.lstrip("/")
            user, group, _ = self.image.user()
            about = found.stat() if found.exists() else None
            os.chown(outside, about.st_uid if about else user, about.st_gid if about else group)
            outside.chmod(about.st_mode if about else 0o755)
        return outside, inside, "rw"


# Makes a database of $POSTGRES_… if there is none, and becomes the server, as the official image's own script does.
DATABASE = """
export PGDATA=/var/lib/postgresql/data
if [ ! -e "$PGDATA" ]; then
    printf %s "$POSTGRES_PASSWORD" >/tmp/password
    initdb --no-sync --encoding=UTF8 --locale=C.UTF-8 --auth=scram-sha-256 \\
        --username="$POSTGRES_USER" --pwfile=/tmp/password >/tmp/initdb.log
    rm /tmp/password
    echo 'host all all all scram-sha-256' >>"$PGDATA/pg_hba.conf"
    echo "CREATE DATABASE $POSTGRES_DB" | postgres --single postgres >/dev/null
fi
exec "$@" -c listen_addresses='*' -c unix_socket_directories=/tmp
"""


# -------------------------------------------------------------------------------------------------- what they must show


def child_of(process: subprocess.Popen[bytes]) -> int | None:
    """What `unshare --fork` has started: number 1 of its namespace, whose end is the end of all in there."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return int(children[0]) if children else None


def end_all(process: subprocess.Popen[bytes]) -> None:
    """End `unshare --fork` and all in its namespaces, and wait until nothing is left of them."""
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.kill(child_of(process) or process.pid, signal.SIGKILL)
    process.wait()


def require(true: bool, what: str) -> None:
    if not true:
        raise SystemExit(f"containers: {what}")


def wait_for(condition: Callable[[], bool], running: Running, timeout_s: float = 120) -> None:
    """Ends the process with the container's log where it ends before, or after timeout_s."""
    deadline = time.monotonic() + timeout_s
    name = running.container.name
    while not condition():
        require(running.process.poll() is None, f"{name} has ended: {running.container.log}")
        require(time.monotonic() < deadline, f"{name} is not there after {timeout_s:g} s: {running.container.log}")
        time.sleep(0.2)


def say(what: str) -> None:
    print(what, flush=True)


def show_all(machine: Machine) -> None:
    """Every role, from the data to a prediction."""
    with ExitStack() as stack:
        database = stack.enter_context(machine.database().up())
        wait_for(database.healthy, database)
        say(f"postgres: {database.execute('postgres', '--version').stdout.strip()}, healthy")
        serve = stack.enter_context(machine.compose_service("serve").up())
        wait_for(serve.healthy, serve)
        serve.confined()
        pod, settings = machine.pod()
        second = stack.enter_context(pod.up())
        show_probes(second, settings)
        second.confined()
        worker = stack.enter_context(machine.compose_service("worker").up())
        wait_for(worker.healthy, worker)
        worker.confined()
        say("serve, pod and worker: healthy, as the image's user, read-only but for their volumes, no capabilities")

        token = machine.compose_service("serve").run("token", "create", "--role", "admin", "--owner", "ada").split()[-1]
        with client(8080, token) as first, client(8000, token) as other:
            show_service(first, other)
            show_launches(machine, other)
        show_dashboard(machine)
        found = machine.compose_service("worker").run("doctor")
        require("ok  kernel" in found, found)
        say(f"serve used {serve.memory_mib()} MiB, the pod {second.memory_mib()}, the worker {worker.memory_mib()}")
    logs = "\n".join(path.read_text() for path in machine.work.glob("*/log"))
    require(not any(secret in logs for secret in (*PASSWORDS.values(), token)), "a secret is in a log")
    say("all ended by SIGTERM with status 0; no secret in their logs")


def client(port: int, token: str | None = None) -> httpx.Client:
    """An HTTP client of a service, from elsewhere than loopback."""
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    return httpx.Client(base_url=f"http://{OUTSIDE}:{port}", headers=headers, timeout=60, trust_env=False)


def show_probes(pod: Running, settings: dict[str, Any]) -> None:
    """The kubelet's requests come from its node and without a token, its programs run in the pod."""
    (port,) = (entry["containerPort"] for entry in settings["ports"] if entry["name"] == "http")
    with client(port) as kubelet:

        def answers(probe: str) -> bool:
            try:
                return kubelet.get(settings[probe]["httpGet"]["path"]).is_success
            except httpx.TransportError:
                return False

        wait_for(lambda: answers("startupProbe"), pod)
        require(answers("livenessProbe"), "the pod is not live")
        require(kubelet.get("/readyz").status_code == 401, "readiness is told to everybody")
    ready = pod.execute(*settings["readinessProbe"]["exec"]["command"])
    require(ready.returncode == 0, f"the pod is not ready: {ready.stderr}")
    for hook in settings["lifecycle"].values():
        require(pod.execute(*hook["exec"]["command"]).returncode == 0, f"{hook} failed")
    say("pod: started, live and ready by its probes")


def show_service(first: httpx.Client, other: httpx.Client) -> None:
    """From the data to a prediction, through two servers."""
    for path in ("/v1/studies", "/v1/models", "/readyz"):
        refused = httpx.get(f"{first.base_url}{path}", trust_env=False)
        require(refused.status_code == 401, f"{path} answers {refused.status_code} without a token")
    with (DATA / "ItalyPowerDemand_TRAIN.ts").open("rb") as file:
        key = answered(first.post("/v1/data", files={"file": file}), 201)["key"]
    form = {"Content-Type": "application/toml"}
    answered(first.post("/v1/studies", content=STUDY.format(name="demand", train=key), headers=form), 201)
    require(ends(other, "demand") == "finished", "the study did not end well")
    with (DATA / "ItalyPowerDemand_TEST.ts").open("rb") as file:
        found = answered(other.post("/v1/models/demand/latest/predict", files={"file": file}), 200)
    require(len(found["labels"]) == len(found["probabilities"]) == 1029, str(found)[:1000])
    say("serve: 401 without a token; data sent, a study run by the worker, its model predicts in the other server")


def show_launches(machine: Machine, client: httpx.Client) -> None:
    """A study that is created for the worker, and one with workers of the launch's own."""
    studies = machine.work / "studies"
    studies.mkdir()
    shutil.copy(DATA / "ItalyPowerDemand_TRAIN.ts", studies)
    (studies / "detached.toml").write_text(STUDY.format(name="detached", train="ItalyPowerDemand_TRAIN.ts"))
    (studies / "launched.toml").write_text(STUDY.format(name="launched", train="ItalyPowerDemand_TRAIN.ts"))
    launch = machine.compose_service("worker", extra=((studies, "/studies", "ro"),))
    launch.run("launch", "--detach", "/studies/detached.toml")
    require(ends(client, "detached") == "finished", "the worker did not serve the study")
    launch.run("launch", "--workers", "2", "/studies/launched.toml")
    require(answered(client.get("/v1/studies/launched"), 200)["version"] == 1, "the launch promoted nothing")
    say("launch: a study for the worker, and one with workers of its own")


def show_dashboard(machine: Machine) -> None:
    dashboard = machine.compose_service("worker")
    dashboard.command = ["dashboard", "--host", "0.0.0.0", "--port", "8081"]
    dashboard.environment = {**dashboard.environment, "HPO_DASHBOARD_PASSWORD": PASSWORDS["HPO_DASHBOARD_PASSWORD"]}
    url = f"http://{OUTSIDE}:8081/api/studies"

    def status(*, auth: tuple[str, str] | None = None) -> int:
        try:
            return httpx.get(url, auth=auth, trust_env=False).status_code
        except httpx.TransportError:
            return 0

    with dashboard.up() as running:
        wait_for(lambda: status() == 401, running)
        running.confined()
        require(status(auth=("hpo", PASSWORDS["HPO_DASHBOARD_PASSWORD"])) == 200, "the password opens nothing")
    say("dashboard: 401 without the password, studies with it")


def answered(answer: httpx.Response, status: int) -> dict[str, Any]:
    require(answer.status_code == status, f"{answer.url} answers {answer.status_code}: {answer.text}")
    found: dict[str, Any] = answer.json()
    return found


def ends(client: httpx.Client, name: str) -> str:
    """How the study ends, by its events."""
    last: dict[str, Any] = {}
    with client.stream("GET", f"/v1/studies/{name}/events") as stream:
        for line in stream.iter_lines():
            if line.startswith("data: "):
                last = json.loads(line.removeprefix("data: "))
    return str(last.get("status"))


def main() -> None:
    """`python -m tools.containers IMAGE.json FOLDER`, in a network namespace of its own."""
    about = json.loads(Path(sys.argv[1]).read_text())
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    subprocess.run(["ip", "address", "add", f"{OUTSIDE}/32", "dev", "lo"], check=True)
    show_all(Machine(Image(Path(about["root"]), about["config"]), Path(sys.argv[2])))


if __name__ == "__main__":
    main()
