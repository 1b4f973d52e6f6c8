"""Workers forked from a warm host, and spawned ones: started again, never lost, gone when the launch is."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from optuna.trial import FrozenTrial

from hpo.launcher.forkserver import ForkedProcess, ForkServer, ForkServerError, forks
from hpo.launcher.local import LocalWorkers, start_forkserver
from hpo.launcher.workers import LaunchError
from hpo.storage.artifacts import artifact_store
from hpo.storage.liveness import worker_name
from hpo.storage.trials import trial_storage
from hpo.study.config import load
from hpo.study.lifecycle import OpenStudy, create_or_open
from tests.conftest import Cli, assert_exact, processes_of, wait_for

LONG, ENDLESS = 60, 100_000  # epochs of a trial: longer than it takes to kill its worker; longer than a test
Trials = Callable[..., list[FrozenTrial]]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux")


@pytest.fixture
def here(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """This test's environment in this process; the folder that its logs are in."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return Path(environment["HPO_HOME"]) / "logs" / "waves"


@pytest.fixture
def opened(here: Path, study_file: Callable[..., Path], database_url: str) -> Iterator[Callable[..., OpenStudy]]:
    """opened(trials=…, epochs=…) makes the study "waves" of waves.toml: every epoch is trained, leases are short."""
    storage = trial_storage(database_url)

    def make(trials: int, epochs: int) -> OpenStudy:
        file = study_file(trials=trials, epochs=epochs, study='pruner = "none"\nlease = 2')
        file.write_text(file.read_text().replace("[train]", "[train]\npatience = 0"))
        return create_or_open(load(file), storage, artifact_store())

    yield make
    storage.close()


@pytest.fixture(scope="module")
def host() -> Iterator[ForkServer]:
    with ForkServer() as warm:
        yield warm


def at_work(opened: OpenStudy) -> int:
    """How many trials are under way."""
    return len(opened.leases.snapshot(opened.study_id).in_flight)


def tend_until(group: LocalWorkers, done: Callable[[], bool]) -> None:
    def tended() -> bool:
        group.tend()
        return done()

    wait_for(tended, 240)


def over(opened: OpenStudy) -> bool:
    return opened.leases.snapshot(opened.study_id).status == "finished"


def forked(host: ForkServer, index: int, log: Path, environment: dict[str, str]) -> ForkedProcess:
    """A worker of a host that was started outside this test's environment."""
    log.parent.mkdir(parents=True, exist_ok=True)
    return host.fork(index, log, environment | {"HPO_WORKER_INDEX": str(index)}, {"study": "waves"})


def test_two_forked_workers_finish_a_study_and_leave_their_logs(
    host: ForkServer, opened: Callable[..., OpenStudy], here: Path, environment: dict[str, str], trials: Trials
) -> None:
    opened(trials=4, epochs=3)
    logs = [here / f"worker-{index}.log" for index in range(2)]
    logs[0].parent.mkdir(parents=True)
    logs[0].write_text("of an earlier launch\n")
    workers = [forked(host, index, log, environment) for index, log in enumerate(logs)]
    assert [worker.wait(60) for worker in workers] == [0, 0]
    assert_exact(trials(), 4)
    assert logs[0].read_text().startswith("of an earlier launch\n")
    for worker, log in zip(workers, logs, strict=True):
        assert f"-{worker.pid} on cpu" in log.read_text()
        assert "study waves is over: budget" in log.read_text()
    assert {trial.user_attrs["worker"].rpartition("-")[2] for trial in trials()} <= {str(w.pid) for w in workers}


def test_a_host_stays_fit_to_fork(host: ForkServer, opened: Callable[..., OpenStudy], here: Path) -> None:
    """One thread, no connection; a worker leads a session of its own and holds none of the host's pipes."""
    opened(trials=1, epochs=ENDLESS)
    worker = forked(host, 0, here / "worker-0.log", dict(os.environ))
    wait_for(lambda: worker.poll() is not None or "epoch 1" in text(here / "worker-0.log"))
    assert worker.pid is not None
    parent, child = psutil.Process(host.pid), psutil.Process(worker.pid)
    assert parent.num_threads() == 1
    assert parent.net_connections() == []
    assert os.getsid(child.pid) == child.pid
    assert not pipes(host.pid) & pipes(child.pid)
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(60) == 0
    assert "given back" in text(here / "worker-0.log")


def pipes(pid: int) -> set[str]:
    """The pipes that a process holds, by their names in /proc."""
    return {name for fd in Path(f"/proc/{pid}/fd").iterdir() if (name := str(fd.readlink())).startswith("pipe:")}


def text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


LATE = """
import sys
from hpo.launcher.forkserver_process import preload

preload()
had = set(sys.modules)
from hpo.worker.worker import work

work("waves")
late = [name for name in set(sys.modules) - had if name.split(".")[0] in ("torch", "optuna", "scipy", "sklearn", "hpo")]
print(*late)
"""


def test_what_takes_long_to_import_is_there_before_a_fork(
    opened: Callable[..., OpenStudy], environment: dict[str, str]
) -> None:
    opened(trials=11, epochs=1)  # the sampler is in earnest after ten
    done = subprocess.run([sys.executable, "-P", "-c", LATE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) < 10  # a few of torch's own; an optimiser's or a sampler's would be hundreds


@pytest.mark.parametrize(("start", "count"), [("fork", 2), ("spawn", 1)])
def test_a_killed_worker_is_started_again_and_trials_stay_exact(
    start: str, count: int, opened: Callable[..., OpenStudy], trials: Trials, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HPO_START", start)
    study = opened(trials=3, epochs=LONG)
    with start_forkserver() as server, LocalWorkers("waves", count, server=server) as group:
        assert (server is None) == (start == "spawn")
        tend_until(group, lambda: at_work(study) > 0)
        victim = group.processes[0]
        assert victim.popen.pid is not None
        os.kill(victim.popen.pid, signal.SIGKILL)
        wait_for(lambda: victim.popen.poll() == -signal.SIGKILL)
        tend_until(group, lambda: over(study))
    assert_exact(trials(), 3)
    assert [process.restarts for process in group.processes] == [1, 0][:count]


def test_a_worker_that_gets_on_before_each_kill_has_its_restarts_back(
    opened: Callable[..., OpenStudy], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("RESTARTS", 1), ("PAUSE_S", 0.01)):
        monkeypatch.setattr(sys.modules["hpo.launcher.local"], name, value)
    study = opened(trials=1, epochs=ENDLESS)
    with start_forkserver() as server, LocalWorkers("waves", 1, server=server, leases=study.leases) as group:
        for _ in range(4):
            kill_after_a_checkpoint(study, group)
        assert group.running()


def kill_after_a_checkpoint(study: OpenStudy, group: LocalWorkers) -> None:
    """Of the only worker, which is started again."""
    worker = group.processes[0].popen
    tend_until(group, lambda: worker.pid is not None and advanced(study, worker.pid))
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    tend_until(group, lambda: group.processes[0].popen is not worker)


def advanced(opened: OpenStudy, pid: int) -> bool:
    return opened.leases.trials_advanced_by(worker_name(pid)) > 0


@pytest.mark.parametrize("start", ["fork", "spawn"])
@pytest.mark.parametrize("busy", [True, False])
def test_stop_gives_trials_back_and_leaves_no_process(
    start: str,
    busy: bool,
    opened: Callable[..., OpenStudy],
    environment: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HPO_START", start)
    study = opened(trials=2, epochs=ENDLESS)
    with start_forkserver() as server, LocalWorkers("waves", 2, server=server) as group:
        if busy:
            tend_until(group, lambda: at_work(study) == 2)
        group.stop()
        assert processes_of(environment["HPO_HOME"]) == []
    assert not any(trial.alive for trial in study.leases.snapshot(study.study_id).in_flight)


def test_a_worker_that_dies_at_once_ends_the_launch_with_the_tail_of_its_log(
    opened: Callable[..., OpenStudy], here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened(trials=2, epochs=1)
    (tmp_path / "file").touch()
    monkeypatch.setenv("HPO_ARTIFACTS", str(tmp_path / "file"))
    monkeypatch.setattr(sys.modules["hpo.launcher.local"], "PAUSE_S", 0.01)
    with start_forkserver() as server, LocalWorkers("waves", 2, server=server) as group:
        with pytest.raises(
            LaunchError, match=r"every worker of study 'waves' ended with an error, 5 restarts each"
        ) as got:
            tend_until(group, lambda: False)
        assert not group.running()
    assert str(tmp_path / "file") in str(got.value)
    assert (here / "worker-1.log").read_text().count("hpo: artifact folder ") == 6


def test_a_host_that_cannot_begin_ends_the_launch_with_its_last_words(
    opened: Callable[..., OpenStudy], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('no torch today')")
    opened(trials=2, epochs=1)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(sys.modules["hpo.launcher.local"], "PAUSE_S", 0.01)
    words = "ImportError: no torch today\nthe fork server ended with status 1"
    with (
        start_forkserver() as server,
        LocalWorkers("waves", 1, server=server) as group,
        pytest.raises(LaunchError, match=words),
    ):
        tend_until(group, lambda: False)


def launched(file: Path, environment: dict[str, str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-P", "-m", "hpo", "launch", str(file), "--workers", "2", "--json", "--quiet"]
    return subprocess.Popen(command, cwd=file.parent, env=environment, stdout=subprocess.PIPE, text=True)


def host_of(launcher: int) -> psutil.Process:
    return next(
        child for child in psutil.Process(launcher).children() if "hpo.launcher.forkserver_process" in child.cmdline()
    )


def test_a_killed_host_ends_its_workers_and_the_study_ends_exactly(
    opened: Callable[..., OpenStudy], tmp_path: Path, environment: dict[str, str], trials: Trials
) -> None:
    study = opened(trials=4, epochs=LONG)
    with launched(tmp_path / "waves.toml", environment) as launcher:
        wait_for(lambda: at_work(study) > 0)
        host = host_of(launcher.pid)
        before = host.children()
        host.kill()
        _, alive = psutil.wait_procs(before, timeout=30)
        assert not alive
        output, _ = launcher.communicate(timeout=120)
    assert json.loads(output.splitlines()[-1])["trials"]["complete"] == 4
    assert_exact(trials(), 4)
    assert processes_of(environment["HPO_HOME"]) == []


def test_without_their_launcher_workers_finish_the_study_and_the_host_ends(
    opened: Callable[..., OpenStudy], tmp_path: Path, environment: dict[str, str], trials: Trials
) -> None:
    study = opened(trials=4, epochs=LONG)
    with launched(tmp_path / "waves.toml", environment) as launcher:
        wait_for(lambda: at_work(study) > 0)
        launcher.kill()
    assert processes_of(environment["HPO_HOME"]) != []
    wait_for(lambda: processes_of(environment["HPO_HOME"]) == [], 240)
    assert over(study)
    assert_exact(trials(), 4)


def test_an_error_before_the_study_exists_leaves_no_host(cli: Cli, environment: dict[str, str]) -> None:
    done = cli("launch", "missing.toml")
    assert done.returncode == 1
    assert "missing.toml" in done.stderr
    assert processes_of(environment["HPO_HOME"]) == []


def test_an_unknown_way_to_start_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPO_START", "vfork")
    with pytest.raises(ForkServerError, match="HPO_START must be fork or spawn, got 'vfork'"):
        forks()
