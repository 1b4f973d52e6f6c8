"""A real PostgreSQL for the whole test session, a fresh database on it for each test, and small studies."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

import numpy as np
import psutil
import psycopg2
import pytest
from hypothesis import HealthCheck, settings

from hpo.storage.server import server as embedded
from hpo.storage.tables import migrate

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

# Tests run side by side, and several threads in each would get in each other's way.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Also beside a GPU, all but what tests/gpu asks of it is about workers on a CPU.
os.environ.setdefault("HPO_DEVICE", "cpu")

# A busy machine is no failure: properties are held to what they say, not to how soon.
settings.register_profile("hpo", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("hpo")

# A shell's background job ignores Ctrl-C, and so would every process that a test starts and interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_xdist_auto_num_workers() -> int:
    """For `pytest -n auto`: one more than cores, as tests of processes wait much; each worker has its own server."""
    return min(8, 1 + (os.cpu_count() or 1))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests of one xdist_group must meet in one worker: pytest-xdist marks them in their names, or nothing does."""
    if hasattr(config, "workerinput"):
        lost = [item.nodeid for item in items if item.get_closest_marker("xdist_group") and "@" not in item.nodeid]
        assert not lost, f"pytest-xdist does not group {lost[:3]}: its version does not fit pytest's"


Cli = Callable[..., subprocess.CompletedProcess[str]]
TEMPLATE = "hpo_template"
# A space of 270 configurations, which every sampler takes: few steps of each entry that is tuned.
STEPPED = """\
hidden_size = { low = 2, high = 6, step = 2 }
learning_rate = { low = 0.01, high = 0.09, step = 0.02 }
weight_decay = { low = 0.0, high = 0.1, step = 0.05 }
dropout = { low = 0.1, high = 0.3, step = 0.1 }
layers = [1, 2]
bidirectional = false
pooling = "mean"
normalization = "none"
head_size = 0
difference = false
stem = "none"
label_smoothing = 0.0
mixup = 0.0
jitter = 0.0
skip = false
batch_size = 16
"""
SMALL = """
hidden_size = { low = 4, high = 12, step = 4 }
layers = 1
head_size = 0
batch_size = 16
stem = "patch"
difference = false
"""  # a search space of quick trials


@pytest.fixture(autouse=True)
def _denormals() -> Iterator[None]:
    """Take back what `prepare_process` sets for the whole process: other tests draw denormal numbers."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_flush_denormal(False)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Torch computes in one thread: tests run side by side, and small networks are slower in several."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def short_folder() -> Iterator[Path]:
    """A folder with a short path that every user may enter, removed at the end."""
    folder = Path(tempfile.mkdtemp(prefix="hpo-", dir=_memory()))
    folder.chmod(0o711)
    yield folder
    left = [process for process in psutil.process_iter(["cwd"]) if (process.info["cwd"] or "").startswith(str(folder))]
    shutil.rmtree(folder)
    assert not left, "a test left processes behind"


def _memory() -> str | None:
    """/dev/shm where it has room and runs programs: a dozen data folders are slow to write to a disk and remove."""
    with suppress(OSError):
        about = os.statvfs("/dev/shm")
        if about.f_bavail * about.f_frsize > 2**32 and not about.f_flag & os.ST_NOEXEC:
            return "/dev/shm"
    return None


@pytest.fixture(scope="session")
def server(short_folder: Path) -> Iterator[str]:
    """URL of an embedded server in a home of its own, stopped at the end of the session."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HPO_HOME", str(short_folder / "server"))
        url = embedded.start()
    execute(url, "ALTER SYSTEM SET fsync = off", "SELECT pg_reload_conf()")
    yield url
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HPO_HOME", str(short_folder / "server"))
        embedded.stop()


def execute(url: str, *statements: str) -> None:
    """Run each statement in a transaction of its own."""
    with closing(psycopg2.connect(url.replace("+psycopg2", ""))) as connection:
        connection.autocommit = True
        for statement in statements:
            connection.cursor().execute(statement)


@pytest.fixture(scope="session")
def template(server: str) -> str:
    """Name of a database with the project's tables, made once."""
    execute(server, f"CREATE DATABASE {TEMPLATE}")
    migrate(_database(server, TEMPLATE))
    execute(server, f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{TEMPLATE}'")
    return TEMPLATE


# A trigger that waits while somebody holds the advisory lock 1.
WAITING = """
CREATE OR REPLACE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql SET lock_timeout = 0 AS
    $$ BEGIN PERFORM pg_advisory_xact_lock_shared(1); RETURN NEW; END $$;
CREATE OR REPLACE TRIGGER wait BEFORE INSERT ON trial_intermediate_values FOR EACH ROW EXECUTE FUNCTION wait();
SELECT pg_advisory_lock(1)
"""


@contextmanager
def reports_wait(url: str) -> Iterator[None]:
    """Within the block no trial gets further than its next report, so that one that is running stays so."""
    with closing(psycopg2.connect(url.replace("+psycopg2", ""))) as connection:
        connection.autocommit = True
        connection.cursor().execute(WAITING)
        yield


def _database(server: str, name: str) -> str:
    """The server's URL with another database."""
    return server.rsplit("/", 1)[0] + "/" + name


@contextmanager
def fresh_database(server: str, template: str) -> Iterator[str]:
    """URL of a copy of the template, dropped afterwards, live connections or not."""
    name = f"test_{uuid4().hex[:12]}"
    execute(server, f"CREATE DATABASE {name} TEMPLATE {template}")
    yield _database(server, name)
    execute(server, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def database_url(server: str, template: str) -> Iterator[str]:
    """URL of a fresh database with the project's tables."""
    with fresh_database(server, template) as url:
        yield url


@pytest.fixture
def empty_database_url(server: str) -> Iterator[str]:
    """URL of a fresh database without tables."""
    with fresh_database(server, "template0") as url:
        yield url


def command_environment(folder: Path, url: str) -> dict[str, str]:
    """Environment of a command: that database, a home and artifacts in the folder; one thread a process."""
    outside = ("HPO_", "PG", "COV", "PYTEST_", "XDG_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(outside)}
    return {
        **kept,
        "HPO_HOME": str(folder / "home"),
        "HPO_DATABASE_URL": url,
        "HPO_ARTIFACTS": str(folder / "artifacts"),
        "HPO_DEVICE": "cpu",
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture
def environment(tmp_path: Path, database_url: str) -> dict[str, str]:
    """Environment of a command of this test."""
    return command_environment(tmp_path, database_url)


@pytest.fixture
def cli(environment: dict[str, str], tmp_path: Path) -> Cli:
    """cli("launch", "study.toml", …) runs the command in tmp_path; cwd, env and timeout_s may be given."""

    def run(
        *args: object, timeout_s: float = 120, cwd: Path = tmp_path, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-P", "-m", "hpo", *map(str, args)]
        settings = environment if env is None else env
        return subprocess.run(command, cwd=cwd, env=settings, capture_output=True, text=True, timeout=timeout_s)

    return run


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """60 noisy sines of two frequencies, 8 to 12 steps, two features; labels are words."""
    random = np.random.default_rng(0)
    lengths = random.integers(8, 13, 60)
    steps = np.arange(12)[None, :, None]
    labels = np.arange(60) % 2
    X = np.sin(steps * (1 + labels[:, None, None])) + random.normal(0, 0.4, (60, 12, 2))
    np.savez(tmp_path / "waves.npz", X=X, y=np.array(["slow", "fast"])[labels], lengths=lengths)
    return tmp_path / "waves.npz"


@pytest.fixture
def study_file(data: Path) -> Callable[..., Path]:
    """study_file(trials=6, epochs=4, space=…, more=…) writes waves.toml beside the data."""

    def write(
        trials: int = 6, epochs: int = 4, space: str = SMALL, more: str = "", study: str = "", train: str = ""
    ) -> Path:
        path = data.parent / "waves.toml"
        path.write_text(
            f'[study]\nname = "waves"\ntrials = {trials}\n{study}\n[data]\ntrain = "waves.npz"\n'
            f"[train]\nepochs = {epochs}\n{train}\n[space]\n{space}\n{more}\n"
        )
        return path

    return write


@pytest.fixture
def trials(database_url: str) -> Callable[..., list[FrozenTrial]]:
    """trials(name) reads a study's trials from the database."""
    from hpo.storage.trials import trial_storage

    def read_trials(name: str = "waves") -> list[FrozenTrial]:
        storage = trial_storage(database_url)
        try:
            return storage.get_all_trials(storage.get_study_id_from_name(name))
        finally:
            storage.close()

    return read_trials


def wait_for(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    """A guard against hanging, no measurement."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def processes_of(home: str) -> list[psutil.Process]:
    """The processes that run in this test's environment, but for the test's own."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("HPO_HOME") == home and process.pid != os.getpid():
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
    return found


def assert_exact(found: list[FrozenTrial], count: int) -> None:
    """`count` trials, numbered without a gap, each ended."""
    assert sorted(trial.number for trial in found) == list(range(count))
    assert all(trial.state.is_finished() for trial in found)
