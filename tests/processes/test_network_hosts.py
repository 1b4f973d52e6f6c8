"""Hosts that are really apart: network namespaces that reach Postgres and the S3 port of a hub, and nothing else.

desk     one     two          `hpo launch --detach`; a standing worker each, with a home of its own
  |       |       |           cables (veth pairs); pulling one is what `Network.pull` does
  +----- hub -----+           a switch that lets hosts talk to the hub only; Postgres, the S3 server
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any
from urllib.parse import quote
from uuid import uuid4
from xml.etree import ElementTree

import psycopg2
import pytest
from sqlalchemy import make_url

from hpo.models.bundle.bundle import load
from hpo.models.data.readers import read
from hpo.storage.server import server as embedded
from hpo.storage.trials import trial_storage
from tests.conftest import assert_exact, execute, wait_for

pytestmark = pytest.mark.xdist_group("hosts")  # its tests share a network

HOSTS = {"hub": "10.99.0.1", "desk": "10.99.0.2", "one": "10.99.0.3", "two": "10.99.0.4"}
S3_PORT, OTHER_PORT = 9000, 9001
EPOCHS = 400
END_S = 10  # a worker that is asked to stop has so long


class Network:
    """The four hosts; `run` and `start` are commands on one of them."""

    def __init__(self, stack: ExitStack) -> None:
        self.mark, self.stack = uuid4().hex[:6], stack
        for host in HOSTS:
            self._ip("netns", "add", self.name(host))
            stack.callback(subprocess.run, ["ip", "netns", "delete", self.name(host)], check=True)
            self.ip(host, "link set lo up")
        self.ip("hub", "link add switch type bridge")
        self.ip("hub", f"address add {HOSTS['hub']}/24 dev switch")
        self.ip("hub", "link set switch up")
        for host in ("desk", "one", "two"):
            self.ip("hub", f"link add {host} type veth peer name cable netns {self.name(host)}")
            self.ip("hub", f"link set {host} master switch")
            self.ip("hub", f"link set {host} type bridge_slave isolated on")
            self.ip("hub", f"link set {host} up")
            self.ip(host, f"address add {HOSTS[host]}/24 dev cable")
            self.ip(host, "link set cable up")

    def name(self, host: str) -> str:
        return f"hpo-{self.mark}-{host}"

    def ip(self, host: str, arguments: str) -> None:
        self._ip("-n", self.name(host), *arguments.split())

    def open_only(self, *ports: int) -> None:
        """Let the hosts reach these ports of the hub and nothing else."""
        for host in ("desk", "one", "two"):
            for port in ports:
                self.ip(host, f"rule add priority 1 to {HOSTS['hub']} ipproto tcp dport {port} lookup main")
            self.ip(host, "rule add priority 2 unreachable")

    def pull(self, host: str) -> None:
        self.ip("hub", f"link set {host} down")

    def plug(self, host: str) -> None:
        self.ip("hub", f"link set {host} up")

    def command(self, host: str, *command: object) -> list[str]:
        return ["ip", "netns", "exec", self.name(host), *map(str, command)]

    def python(self, host: str, code: str, *arguments: object, **settings: str) -> str:
        """What the code prints on the host."""
        command = self.command(host, sys.executable, "-P", "-c", code, *arguments)
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ | settings)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def start(
        self, log: Path, host: str, *command: object, env: dict[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """A process that is killed at the end if it still runs."""
        with log.open("wb") as output:
            popen = subprocess.Popen(
                self.command(host, *command), stdout=output, stderr=output, env=env, cwd=log.parent
            )
        self.stack.callback(popen.wait)
        self.stack.callback(popen.kill)
        return popen

    def _ip(self, *arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("network namespaces are made by root on Linux")
    if shutil.which("ip") is None and os.environ.get("CI") and shutil.which("apt-get"):
        subprocess.run(["apt-get", "install", "--yes", "iproute2"], check=True, capture_output=True)
    if shutil.which("ip") is None:
        pytest.skip("network namespaces are made with iproute2, which is not installed")
    with ExitStack() as stack:
        try:
            made = Network(stack)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"this machine makes no network namespaces: {error.stderr.strip()}")
        yield made


# Our embedded server, on an address that other hosts reach; its socket file is for the test itself.
POSTGRES = """
import sys
from hpo.storage.server import server as embedded
embedded.SETTINGS |= {"listen_addresses": "127.0.0.1," + sys.argv[1], "unix_socket_directories": sys.argv[2]}
print(embedded.start())
"""


@pytest.fixture(scope="module")
def database(network: Network, short_folder: Path) -> tuple[str, str]:
    """Two URLs of a server on the hub: for the hosts, and for this process, which is on none of them."""
    home, sockets = short_folder / "hub", short_folder / "hub-socket"
    sockets.mkdir()
    sockets.chmod(0o777)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HPO_HOME", str(home))
        patch.delenv("HPO_DATABASE_URL", raising=False)
        network.stack.callback(_stop, home)
        url = make_url(network.python("hub", POSTGRES, HOSTS["hub"], sockets))
    (rules,) = home.rglob("pg_hba.conf")
    with rules.open("a") as file:
        file.write("host all all 10.99.0.0/24 scram-sha-256\n")
    here = f"postgresql+psycopg2://hpo:{url.password}@/hpo?host={quote(str(sockets))}&port={url.port}"
    execute(here, "ALTER SYSTEM SET fsync = off", "SELECT pg_reload_conf()")
    assert url.port is not None
    network.open_only(url.port, S3_PORT)
    return url.set(host=HOSTS["hub"], drivername="postgresql").render_as_string(hide_password=False), here


def _stop(home: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HPO_HOME", str(home))
        patch.delenv("HPO_DATABASE_URL", raising=False)
        embedded.stop()


MAKE_BUCKET = """
import sys, time, urllib.request
while True:
    try:
        urllib.request.urlopen(urllib.request.Request(sys.argv[1], method="PUT"), timeout=5)
        break
    except OSError:
        time.sleep(0.1)
"""
LIST_BUCKET = "import sys, urllib.request; print(urllib.request.urlopen(sys.argv[1]).read().decode())"


@pytest.fixture(scope="module")
def bucket(network: Network, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Address of an empty bucket of a real S3 server on the hub."""
    log = tmp_path_factory.mktemp("s3") / "log"
    network.start(log, "hub", sys.executable, "-m", "moto.server", "-H", HOSTS["hub"], "-p", S3_PORT)
    url = f"http://{HOSTS['hub']}:{S3_PORT}/studies"
    network.python("hub", MAKE_BUCKET, url)
    return url


def keys(network: Network, bucket: str, prefix: str) -> set[str]:
    listing = ElementTree.fromstring(network.python("desk", LIST_BUCKET, f"{bucket}?list-type=2&prefix={prefix}"))
    return {key.text or "" for key in listing.iter("{http://s3.amazonaws.com/doc/2006-03-01/}Key")}


def settings(database: str, home: Path) -> dict[str, str]:
    """A host's environment: two addresses with their secrets, and a home of its own."""
    url = make_url(database)
    outside = ("HPO_", "PG", "COV", "PYTEST_", "XDG_", "AWS_")
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith(outside)},
        "HPO_HOME": str(home),
        "HPO_DATABASE_URL": f"postgresql://hpo@{url.host}:{url.port}/hpo",
        "PGPASSWORD": str(url.password),
        "HPO_ARTIFACTS": "s3://studies/hosts",
        "AWS_ENDPOINT_URL": f"http://{HOSTS['hub']}:{S3_PORT}",
        "AWS_ACCESS_KEY_ID": "somebody",
        "AWS_SECRET_ACCESS_KEY": "a-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "OMP_NUM_THREADS": "1",
    }


LISTEN = """
import socket, sys, threading
listener = socket.create_server((sys.argv[1], int(sys.argv[2])))
print("listening", flush=True)
while True:
    listener.accept()
"""
REACH = """
import socket, sys
for address in sys.argv[1:]:
    host, port = address.split(":")
    try:
        socket.create_connection((host, int(port)), 5).close()
        print(address, "reached")
    except OSError as error:
        print(address, error.strerror)
"""


def test_a_host_reaches_postgres_and_the_store_and_nothing_else(
    network: Network, database: tuple[str, str], bucket: str, tmp_path: Path
) -> None:
    listening = tmp_path / "listening"
    network.start(listening, "hub", sys.executable, "-c", LISTEN, HOSTS["hub"], OTHER_PORT)
    wait_for(lambda: listening.read_text() == "listening\n")
    open_ports = [f"{HOSTS['hub']}:{port}" for port in (make_url(database[0]).port, S3_PORT)]
    closed = [f"{HOSTS['hub']}:{OTHER_PORT}", f"{HOSTS['two']}:{S3_PORT}"]
    said = network.python("one", REACH, *open_ports, *closed).splitlines()
    assert said == [f"{address} reached" for address in open_ports] + [
        f"{address} Network is unreachable" for address in closed
    ]


class Host:
    """A host with a standing worker on it."""

    def __init__(self, network: Network, name: str, environment: dict[str, str], log: Path) -> None:
        self.name, self.log_path = name, log
        self.popen = network.start(log, name, sys.executable, "-P", "-m", "hpo", "worker", env=environment)

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    def holds(self, worker: str) -> bool:
        return worker.endswith(f"-{self.popen.pid}")

    def end(self) -> None:
        self.popen.send_signal(signal.SIGTERM)
        assert self.popen.wait(END_S) == 0, self.log
        assert "Traceback" not in self.log, self.log


def rows(url: str, query: str, *given: Any) -> list[tuple[Any, ...]]:
    with closing(psycopg2.connect(url.replace("+psycopg2", ""))) as connection, connection.cursor() as cursor:
        cursor.execute(query, given)
        return cursor.fetchall()


def in_flight(url: str, host: Host) -> int | None:
    """The trial that the host's worker holds, once there is a checkpoint of it."""
    query = "SELECT trial_id, worker FROM hpo.leases WHERE ended_at IS NULL AND checkpoint_key IS NOT NULL"
    return next((trial for trial, worker in rows(url, query) if host.holds(worker)), None)


def test_a_host_that_is_cut_off_loses_its_trial_to_another_and_nothing_lands_twice(
    network: Network,
    database: tuple[str, str],
    bucket: str,
    study_file: Callable[..., Path],
    tmp_path: Path,
) -> None:
    given, here = database
    one, two = (
        Host(network, name, settings(given, tmp_path / name), tmp_path / f"{name}.log") for name in ("one", "two")
    )
    file = study_file(trials=5, epochs=EPOCHS, study='pruner = "none"\nsampler = "random"\nlease = 2\nattempts = 9')
    file.write_text(file.read_text().replace("[train]", "validation = 0.25\n[train]\npatience = 0"))
    desk = settings(given, tmp_path / "desk")
    hpo = (sys.executable, "-P", "-m", "hpo")
    launched = network.start(tmp_path / "desk.log", "desk", *hpo, "launch", file, "--detach", env=desk)
    assert launched.wait(60) == 0, (tmp_path / "desk.log").read_text()

    wait_for(lambda: in_flight(here, one) is not None)
    network.pull("one")
    cut = rows(
        here, "SELECT trial_id, number, worker FROM hpo.leases JOIN trials USING (trial_id) WHERE ended_at IS NULL"
    )
    trial, number = next((trial, number) for trial, number, worker in cut if one.holds(worker))
    wait_for(lambda: two.holds(rows(here, "SELECT worker FROM hpo.leases WHERE trial_id = %s", trial)[0][0]))
    network.plug("one")
    gave_up = (
        f"trial {number}: left",
        "study waves is set aside: s3://studies/hosts cannot be used",
    )  # what met it first
    wait_for(lambda: any(text in one.log for text in gave_up))
    wait_for(lambda: rows(here, "SELECT state FROM trials WHERE trial_id = %s", trial) == [("COMPLETE",)])
    two.end()  # from here on the host that came back is alone
    wait_for(lambda: rows(here, "SELECT count(*) FROM hpo.models") == [(1,)])
    one.end()

    storage = trial_storage(here)
    study = storage.get_study_id_from_name("waves")
    found = storage.get_all_trials(study)
    storage.close()
    assert_exact(found, 5)
    leases = {trial: rest for trial, *rest in rows(here, "SELECT trial_id, attempt, worker, ended_at FROM hpo.leases")}
    for ended in found:
        attempt, worker, ended_at = leases[ended._trial_id]
        assert (ended.user_attrs["attempt"], ended.user_attrs["worker"]) == (attempt, worker)
        assert ended_at is not None
        assert sorted(ended.intermediate_values) == list(range(1, EPOCHS + 1))
    assert two.holds(leases[trial][1])
    *_, began = (line for line in two.log.splitlines() if f"trial {number}: epoch" in line)
    assert f"trial {number}: epoch 1," not in began  # from its checkpoint
    assert keys(network, bucket, "hosts/checkpoint-") == set()
    named = {f"{ended.number}-{ended.user_attrs['attempt']}" for ended in found}
    curves = keys(network, bucket, "hosts/curve-")
    assert {"-".join(key.removesuffix(".svg").split("-")[2:4]) for key in curves} == named  # then the content's hash
    assert len(curves) == len(found)
    weights = {f"hosts/{ended.user_attrs['weights']}" for ended in found if "weights" in ended.user_attrs}
    assert keys(network, bucket, "hosts/weights-") <= weights
    for host in ("one", "two"):
        assert {path.name for path in (tmp_path / host).iterdir()} <= {"cache", "hpo-native"}
    exported = network.start(tmp_path / "export.log", "desk", *hpo, "export", "waves", "--out", "model", env=desk)
    assert exported.wait(60) == 0, (tmp_path / "export.log").read_text()
    assert len(load(tmp_path / "model").predict(read(tmp_path / "waves.npz")).labels) == 60
