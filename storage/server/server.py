"""Starts, finds and stops the embedded PostgreSQL server of HPO_HOME.

The server belongs to one home and is shared by every process of that user on the machine. It listens on 127.0.0.1
only, with a random password (scram-sha-256), and runs until `stop()`.

    home/                 HPO_HOME, else the user's data folder
      postgres/           0700 (root: 0711), ours
        lock              flock: one process at a time initialises, starts, repairs or stops
        password          0600
        server.json       {"home", "place", "host", "port"}: whose, the data root, where it answers
        alive             flock held by the server's own processes: free means that none of them lives
        data/             PostgreSQL's files, `server.log` among them

PostgreSQL refuses to run as root, so root's server runs as `nobody`. Where `nobody` cannot enter the home
(/root is 0700), the data root with `alive` and `data` is /var/lib/hpo-<hash of the home> instead: /var/lib
outlives restarts and is not swept as /var/tmp is. No existing folder's owner or mode is changed. Programs that
cannot be started from where they lie are copied, see programs.py.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from hpo.storage.errors import PostgresError
from hpo.storage.files import LockTimeout, is_locked, locked, write_whole
from hpo.storage.home import home, made_folder
from hpo.storage.server.processes import PROGRAM_S, may_enter, postmaster, run, server_processes, unprivileged
from hpo.storage.server.programs import Programs, programs_for
from hpo.storage.url import mask

USER = DATABASE = "hpo"
PATIENCE_S = 60.0  # for a server that starts, recovers or stops
ORPHAN_GRACE_S = 2.0  # for backends to notice that their postmaster is gone
SETTINGS = {
    "cluster_name": "hpo",  # seen in ps
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",  # TCP serves every client and has no path that could be too long
    "dynamic_shared_memory_type": "mmap",  # /dev/shm is swept at logout by systemd, and small in containers
    "max_connections": "300",
    "shared_buffers": "128MB",
    "max_wal_size": "512MB",
    "max_parallel_workers_per_gather": "0",  # the cores belong to the trainings
    "jit": "off",
    "log_checkpoints": "off",
    "timezone": "UTC",
    "log_timezone": "UTC",
}


@dataclass(frozen=True)
class Status:
    """What `status()` found; it starts nothing."""

    running: bool  # it accepts a connection now
    url: str  # password masked; "" where no server was ever started
    data: Path | None  # of the embedded server; None for HPO_DATABASE_URL
    log: Path | None  # of the embedded server


@dataclass(frozen=True)
class _Record:
    """server.json: the last start of one home's server."""

    home: str  # a copied home is not served by the original's server
    data_root: str  # folder of `data`
    host: str  # host name of the machine it runs on; "" after a clean stop
    port: int  # 127.0.0.1; kept over restarts where it stays free


def start() -> str:
    """URL of the embedded server of `home()`, started if it does not answer: a few ms where it does.

    Raises PostgresError.
    """
    folder = _folder()
    with _explained(folder):
        record = _read(folder)
        if record and record.host and not _trouble(folder, record.port):
            return _url(folder, record.port)
        with locked(folder / "lock", timeout_s=PROGRAM_S):
            return _url(folder, _start(folder, _read(folder)))


def revive() -> None:
    """Start the embedded server again if it died. One that `stop()` ended, or that never ran here, stays down."""
    folder = _folder()
    record = _read(folder)
    if record and record.host and _trouble(folder, record.port):
        start()


def stop() -> bool:
    """End the embedded server of `home()` (open connections are cut, nothing committed is lost).

    True if it ran. Raises PostgresError where it runs on another host or does not end.
    """
    folder = _folder()
    with _explained(folder), locked(folder / "lock", timeout_s=PROGRAM_S):
        record = _read(folder)
        data_root = Path(record.data_root) if record else folder
        ran = bool(server_processes(data_root / "data"))
        _settle(folder, data_root, end=True)
        if record:
            _save(folder, replace(record, host=""))
        return ran


@contextlib.contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """What the operating system rejects, as a PostgresError."""
    try:
        yield
    except LockTimeout as error:
        raise PostgresError(str(error)) from None
    except (OSError, subprocess.SubprocessError) as error:
        way_out = "set HPO_HOME to another folder, or HPO_DATABASE_URL to another server"
        raise PostgresError(f"no PostgreSQL server under {folder}: {error}; {way_out}") from error


def status() -> Status:
    """Whether the embedded server answers, and where; starts nothing. Raises PostgresError."""
    folder = _folder()
    record = _read(folder)
    if record is None:
        return Status(False, "", None, None)
    data = Path(record.data_root) / "data"
    running = bool(record.host) and not _trouble(folder, record.port)
    return Status(running, mask(_url(folder, record.port)), data, data / "server.log")


def _folder() -> Path:
    """home/postgres. Raises PostgresError if it is another user's."""
    folder = made_folder(home() / "postgres")
    owner = folder.stat().st_uid
    if owner != os.geteuid():
        raise PostgresError(
            f"{folder} belongs to uid {owner}, this process runs as uid {os.geteuid()}; "
            "run as that user or set HPO_HOME to another folder"
        )
    return folder


def _read(folder: Path) -> _Record | None:
    """server.json; None where there is none or where it came with a copy of another home.

    A moved home, whose old path is gone, keeps its server. Raises PostgresError on another host than its own.
    """
    try:
        content = json.loads((folder / "server.json").read_text())
        record = _Record(content["home"], content["place"], content["host"], content["port"])
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError):
        raise PostgresError(f"{folder / 'server.json'} is damaged; remove it") from None
    if record.home != str(folder.parent):
        if Path(record.home).exists():
            return None
        data_root = record.data_root if Path(record.data_root).exists() else str(folder)
        record = replace(record, home=str(folder.parent), data_root=data_root)
    if record.host not in ("", socket.gethostname()):
        raise PostgresError(
            f"the PostgreSQL server of {folder.parent} runs on host {record.host!r}, this is host "
            f"{socket.gethostname()!r}, and its data is for one host at a time; run `hpo db stop` there, set "
            f"HPO_HOME or HPO_DATABASE_URL here, or, if that host is gone, remove {folder / 'server.json'}"
        )
    return record


def _url(folder: Path, port: int) -> str:
    return f"postgresql+psycopg2://{USER}:{_password(folder)}@127.0.0.1:{port}/{DATABASE}"


def _password(folder: Path) -> str:
    try:
        return (folder / "password").read_text()
    except FileNotFoundError:
        raise PostgresError(
            f"{folder / 'password'} is missing, and without it the data in {folder} cannot be used; "
            "put it back, or move that folder away to begin anew"
        ) from None


def _save(folder: Path, record: _Record) -> None:
    content = {"home": record.home, "place": record.data_root, "host": record.host, "port": record.port}
    write_whole(folder / "server.json", json.dumps(content), 0o600)


def _trouble(folder: Path, port: int) -> str:
    """Why our server does not answer on the port; "" if it does.

    The password proves the server to us as well as us to it: scram is asked for, so that whoever took the
    port of a dead server neither passes for it nor sees the password.
    """
    import psycopg2
    from psycopg2.extensions import libpq_version

    target = _url(folder, port).replace("+psycopg2", "") + "?sslmode=disable&connect_timeout=10"
    if libpq_version() >= 160_000:
        target += "&require_auth=scram-sha-256"
    try:
        psycopg2.connect(target).close()
    except psycopg2.OperationalError as error:
        full = "too many clients" in str(error) or "connection slots are reserved" in str(error)
        return "" if full else str(error).strip()
    return ""


def _start(folder: Path, record: _Record | None) -> int:
    """Under the lock: bring the server up, whatever was left behind; its port."""
    data_root = Path(record.data_root) if record and Path(record.data_root).exists() else _data_root(folder)
    data, port = data_root / "data", record.port if record else 0
    if data_root != folder and not (folder / "password").exists():
        _set_aside(folder, data_root)
    with programs_for(data) as programs:
        if not data.exists():
            _initialize(programs, folder, data_root)
        live = _settle(folder, data_root)
        for _ in range(5):
            port = live or _free_port(port)
            _save(folder, _Record(str(folder.parent), str(data_root), socket.gethostname(), port))
            if live or _launch(programs, data_root, port):
                break
    if not live:
        _remove_old_copies(data_root)
        if trouble := _trouble(folder, port):
            raise PostgresError(f"PostgreSQL on {data} does not answer: {trouble}; log: {data / 'server.log'}")
    return port


def _remove_old_copies(data_root: Path) -> None:
    """Remove the copies of programs that earlier versions left beside the data: no server runs from them any more."""
    for old in [*data_root.glob("programs-*"), data_root / "programs.new"]:
        shutil.rmtree(old, ignore_errors=True)


def _set_aside(folder: Path, data_root: Path) -> None:
    """End the server of a home that was removed since, and keep its data under another name."""
    if (data_root / "data").exists():
        _settle(folder, data_root, end=True)
        (data_root / "data").rename(data_root / f"data-{time.time_ns()}")


def _free_port(wanted: int) -> int:
    """The wanted port of 127.0.0.1 if it is free, else any free one."""
    for port in (wanted, 0):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT is free
            probe.bind(("127.0.0.1", port))
            return int(probe.getsockname()[1])
    raise PostgresError("no free port on 127.0.0.1")


def _launch(programs: Programs, data_root: Path, port: int) -> bool:
    """pg_ctl start; False where the port was taken meanwhile. The server inherits the lock on `alive`.

    pg_ctl hands its command to a shell, so nothing in it but the programs' own path comes from outside.
    """
    data, log = data_root / "data", data_root / "data" / "server.log"
    options = " ".join(f"-c {name}={value}" for name, value in {**SETTINGS, "port": str(port)}.items())
    with contextlib.suppress(FileNotFoundError):
        log.replace(data / "server.log.1")
    with locked(data_root / "alive", timeout_s=1.0) as alive:
        command = [programs.folder / "pg_ctl", "start", "-w", "-t", f"{PATIENCE_S:g}", "-l", "server.log"]
        done = run([*command, "-o", options], data, descriptors=(alive, *programs.descriptors))
    if done.returncode == 0:
        return True
    said = run(["tail", "-n", "20", "server.log"], data).stdout  # read with the server's rights, not root's
    if "could not create any TCP/IP sockets" in said:
        return False
    raise PostgresError(f"PostgreSQL did not start on {data}: {(said or done.stderr).strip()}; log: {log}")


def _settle(folder: Path, data_root: Path, end: bool = False) -> int | None:
    """Port of the server that runs on the data, once it answers; None once no process of it is left.

    `end`: ask it to end. After kill -9 of the postmaster its backends live on for a moment, or until their
    query ends: they get ORPHAN_GRACE_S. postmaster.pid is removed when none is left, and not before: by now its
    number may be another process's, which would keep PostgreSQL from starting.
    """
    data, began = data_root / "data", time.monotonic()
    while (pids := server_processes(data)) or is_locked(data_root / "alive"):
        pid, port = postmaster(data)
        trouble = f"processes {pids or 'of another container'} hold it"
        if pid in pids:
            trouble = "shutting down" if end else _trouble(folder, port)
            if not trouble:
                return port
            if "authentication failed" in trouble or "does not exist" in trouble:
                raise PostgresError(f"PostgreSQL on {data} refuses us: {trouble}")
            if "shutting down" in trouble:
                os.kill(pid, signal.SIGINT)  # fast: do not wait for clients to leave
        elif time.monotonic() > began + ORPHAN_GRACE_S:
            for left in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(left, signal.SIGKILL)
        if time.monotonic() > began + PATIENCE_S:
            raise PostgresError(f"PostgreSQL on {data} neither answers nor ends: {trouble}")
        time.sleep(0.02)
    (data / "postmaster.pid").unlink(missing_ok=True)
    return None


def _data_root(folder: Path) -> Path:
    """Folder for the data: ours below the home, or for root one that `nobody` can enter."""
    if may_enter(folder):
        return folder
    data_root = Path("/var/lib") / f"hpo-{hashlib.sha256(os.fsencode(folder.parent)).hexdigest()[:12]}"
    if made_folder(data_root).stat().st_uid != os.geteuid() or not may_enter(data_root):
        raise PostgresError(
            f"PostgreSQL runs as `nobody` for root, which may enter neither {folder} nor {data_root}; "
            "set HPO_HOME to a folder that it may enter, or run as a plain user"
        )
    return data_root


def _initialize(programs: Programs, folder: Path, data_root: Path) -> None:
    """initdb and our database, beside `data` and then renamed: `data` is whole or not there."""
    if not (folder / "password").exists():
        write_whole(folder / "password", secrets.token_urlsafe(24), 0o600)
    for left in data_root.glob("data.new-*"):  # by a start that was killed; its initdb may still be at it
        shutil.rmtree(left, ignore_errors=True)
    staged, secret = Path(tempfile.mkdtemp(dir=data_root, prefix="data.new-")), data_root / "password.new"
    write_whole(secret, _password(folder), 0o600)
    if server := unprivileged():
        for path in (staged, secret):
            os.chown(path, server["user"], server["group"])
    options = f"--pgdata=. --username={USER} --auth=scram-sha-256 --encoding=UTF8 --locale=C --no-sync"
    try:
        done = run([programs.folder / "initdb", *options.split(), "--pwfile", secret], staged)
    finally:
        secret.unlink()
    if done.returncode == 0:
        alone = ["--single", "-F", "-D", ".", "-c", "exit_on_error=on", "postgres"]
        done = run([programs.folder / "postgres", *alone], staged, text=f"CREATE DATABASE {DATABASE};\n")
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip()
        raise PostgresError(f"initdb failed in {data_root}: {said}; set HPO_DATABASE_URL to use another server")
    os.sync()  # all at once: a tenth of the time of initdb's file by file
    staged.rename(data_root / "data")
