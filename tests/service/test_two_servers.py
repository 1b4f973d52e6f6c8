"""Two processes of the service behind one address, as on two machines: one is killed, the client goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest

import hpo
from hpo.client import Client
from hpo.service.schemas import Study
from hpo.storage.keys import KEY, UPLOADS
from hpo.storage.registry import Registry
from tests.conftest import fresh_database, wait_for
from tests.service.conftest import Service, environment_of
from tests.service.processes import Relay, Server, files_below

pytestmark = pytest.mark.xdist_group("service-two")


class Pair:
    """Two servers of one database and one artifact store, with a home each, and the relay in front of them."""

    def __init__(self, folder: Path, database_url: str, ports: list[int]) -> None:
        self.service = Service("", database_url, environment_of(folder, database_url))
        homes = [{**self.service.environment, "HPO_HOME": str(folder / f"home{i}")} for i in (0, 1)]
        self.servers = [Server(homes[i], ports[i], folder / f"server{i}.log") for i in (0, 1)]
        self.artifacts = folder / "artifacts"
        self.relay = Relay(ports)

    @contextmanager
    def one_killed(self) -> Iterator[Callable[[int], None]]:
        """Within the block kill(index) kills one of them; afterwards it runs again."""
        killed = []

        def kill(index: int) -> None:
            self.servers[index].kill()
            killed.append(index)

        yield kill
        assert self.relay.done
        assert len(killed) == 1
        self.servers[killed[0]].start()


@pytest.fixture(scope="module")
def pair(
    server: str, template: str, tmp_path_factory: pytest.TempPathFactory, two_free_ports: list[int]
) -> Iterator[Pair]:
    with fresh_database(server, template) as url, ExitStack() as stack:
        made = Pair(tmp_path_factory.mktemp("pair"), url, two_free_ports)
        stack.callback(made.relay.close)
        for each in made.servers:
            stack.callback(each.stop)
            each.start()
        yield made


@pytest.fixture(scope="module")
def client(pair: Pair) -> Iterator[Client]:
    with hpo.connect(pair.relay.url, pair.service.token()) as made:
        yield made


@pytest.fixture(scope="module")
def model(
    pair: Pair, client: Client, waves: Path, task: Callable[..., str], tmp_path_factory: pytest.TempPathFactory
) -> str:
    """The name of a promoted model."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "waves.npz").write_bytes(waves.read_bytes())
    (folder / "waves.toml").write_text(task("waves", "waves.npz"))
    client.submit(folder / "waves.toml")
    pair.service.work("waves")
    return "waves"


def test_an_upload(pair: Pair, client: Client, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    np.savez(tmp_path / "noise.npz", X=random.normal(size=(2000, 100, 2)), y=random.integers(0, 2, 2000))
    with pair.one_killed() as kill:
        pair.relay.on_request(b"POST /v1/data", 1_000_000, kill)
        found = client.check(tmp_path / "noise.npz")
    assert found.sequences == 2000
    assert client.upload(tmp_path / "noise.npz") == found.key
    stored = files_below(pair.artifacts)
    assert len([name for name in stored if name.startswith(UPLOADS) and name.endswith("-noise.npz")]) == 1
    assert all(KEY.fullmatch(name) for name in stored)  # and no part of one
    for each in pair.servers:
        assert not files_below(Path(each.environment["HPO_HOME"]) / "uploads")


def test_a_submission_whose_answer_is_lost(
    pair: Pair, client: Client, waves: Path, task: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "lost.npz").write_bytes(waves.read_bytes())
    (tmp_path / "lost.toml").write_text(task("lost", "lost.npz"))
    with pair.one_killed() as kill:
        pair.relay.on_answer(b"HTTP/1.1 201", kill)
        client.upload(tmp_path / "lost.npz")  # the answer to this one is lost, too
    with pair.one_killed() as kill:
        pair.relay.on_answer(b"HTTP/1.1 201", kill)
        assert client.submit(tmp_path / "lost.toml").name == "lost"
    with pair.one_killed() as kill:
        pair.relay.on_answer(b"HTTP/1.1 204", kill)
        client.delete("lost")  # gone is gone


def test_a_stream_of_events(pair: Pair, client: Client, waves: Path, task: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "stream.npz").write_bytes(waves.read_bytes())
    (tmp_path / "stream.toml").write_text(task("stream", "stream.npz", 3))
    client.submit(tmp_path / "stream.toml")
    with pair.one_killed() as kill:
        following = client.follow("stream")
        states: list[Study] = [next(following)]
        pair.relay.on_answer(b"event: progress", kill)
        worker = threading.Thread(target=pair.service.work, args=("stream",))
        worker.start()
        states += following
        worker.join(60)
    assert states[-1].status == "finished"
    assert states[-1].trials["complete"] == 3
    shown = [(each.status, each.version, *sorted(each.trials.items())) for each in states]
    assert len(set(shown)) == len(shown)  # nothing twice


def test_a_prediction_and_a_download(pair: Pair, client: Client, model: str, waves: Path, tmp_path: Path) -> None:
    with pair.one_killed() as kill:
        pair.relay.on_request(b"/predict HTTP/1.1", 1, kill)
        found = client.predict(model, waves)
    with pair.one_killed() as kill:
        pair.relay.on_answer(b"application/zip", kill)
        client.download(model, tmp_path / "model")
    assert list(tmp_path.iterdir()) == [tmp_path / "model"]
    np.testing.assert_allclose(
        found.probabilities, hpo.load(tmp_path / "model").predict(np.load(waves)["X"]).probabilities, atol=1e-6
    )


def test_a_promotion_happens_once(pair: Pair, client: Client, model: str) -> None:
    best = client.model(model).trial
    assert best is not None
    with pair.one_killed() as kill:
        pair.relay.on_answer(b"HTTP/1.1 201", kill)
        assert client.promote(model, 1 - best).version == 2
    assert [each.version for each in Registry(pair.service.database_url).models() if each.name == model] == [1, 2]


def test_data_that_were_removed_a_moment_ago_are_sent_again(
    pair: Pair, client: Client, waves: Path, task: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "again.npz").write_bytes(waves.read_bytes() + b"")
    (tmp_path / "again.toml").write_text(task("again", "again.npz"))

    def expire(_: int) -> None:
        for name in files_below(pair.artifacts):
            if name.startswith(UPLOADS):
                (pair.artifacts / name).unlink()

    pair.relay.on_request(b"POST /v1/studies", 1, expire)
    assert client.submit(tmp_path / "again.toml").name == "again"
    assert pair.relay.done


def test_a_launch_outlives_a_restart_of_the_only_server(
    pair: Pair, waves: Path, task: Callable[..., str], tmp_path: Path
) -> None:
    """And a Ctrl-C detaches while the service is away, too."""
    (tmp_path / "restart.npz").write_bytes(waves.read_bytes())
    (tmp_path / "restart.toml").write_text(task("restart", "restart.npz"))
    alone = pair.servers[0]
    environment = {**pair.service.environment, "HPO_SERVER": alone.url, "HPO_TOKEN": pair.service.token()}
    del environment["HPO_DATABASE_URL"], environment["HPO_ARTIFACTS"]
    environment["HPO_HOME"] = str(tmp_path / "home")
    command = [sys.executable, "-P", "-m", "hpo", "launch", "restart.toml"]

    def launch(*options: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*command, *options],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    with launch("--json") as stays, launch() as leaves:
        for each in (stays, leaves):
            assert each.stderr is not None
            each.stderr.readline()  # the study is followed
        alone.kill()
        os.kill(leaves.pid, signal.SIGINT)
        _, said = leaves.communicate(timeout=30)
        assert leaves.returncode == 130
        assert f"the study goes on at {alone.url}: hpo status restart; hpo stop restart" in said
        alone.start()
        pair.service.work("restart")
        out, said = stays.communicate(timeout=60)
        assert stays.returncode == 0, said
    summary = json.loads(out.splitlines()[-1])
    assert (summary["study"], summary["trials"]["complete"], summary["model"]["version"]) == ("restart", 2, 1)


@pytest.mark.parametrize("status", ["502 Bad Gateway", "503 Service Unavailable", "504 Gateway Timeout"])
def test_an_answer_that_passes_is_waited_out_as_long_as_it_says(pair: Pair, model: str, status: str) -> None:
    def refusal(after_s: int) -> bytes:
        return f"HTTP/1.1 {status}\r\nRetry-After: {after_s}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode()

    def connect(retry_s: float) -> Client:
        return Client(pair.relay.url, pair.service.token(), retry_s)

    pair.relay.refuse(refusal(1), refusal(0))
    with connect(30) as patient:
        assert patient.study(model).name == model
    pair.relay.refuse(refusal(0))
    with connect(30) as patient:
        assert [each.status for each in patient.follow(model)] == ["finished"]
    pair.relay.refuse(refusal(60))
    with connect(30) as impatient, pytest.raises(hpo.ServiceError, match=status.split()[0]) as error:
        impatient.study(model)
    assert error.value.retry_after_s == 60
    assert pair.relay.done


def test_a_service_that_stays_away_is_given_up(pair: Pair, client: Client, model: str) -> None:
    with Client(pair.relay.url, pair.service.token(), retry_s=1.0) as impatient:
        for each in pair.servers:
            each.kill()
        with pytest.raises(hpo.ServiceError, match=f"the study goes on: hpo status {model}"):
            list(impatient.follow(model))
        with pytest.raises(hpo.ServiceError, match="does not answer"):
            impatient.study(model)
        for each in pair.servers:
            each.start()
    wait_for(lambda: client.study(model).status == "finished")
