"""Predictions of `hpo serve` beside the same model in a plain FastAPI handler: latency and requests a second.

    python benchmarks/serve.py [--seconds 4] [--rounds 3] [--clients 1 8 32] [--target 10]

Two models of the same network (one LSTM of 32 units, its last output) are trained and promoted: one for
ItalyPowerDemand, 24 steps, and one for made series of 500 steps. Each request asks for one sequence of the test part,
over a kept connection of a client that has one request in progress. "plain" is what one writes first: `hpo.load`, a
handler that is a `def`, pydantic's models, no token, no database, one model, one process. Both are served by uvicorn
with one process and one thread of torch's, in turns, on the cores that client, servers and PostgreSQL share.
The client speaks HTTP by itself over asyncio's sockets, as libraries for it are slower than what is measured;
"/healthz" says what client and server reach without a prediction. Before it is timed each server's answers are compared
with what the model says of each sequence alone.

Exit status 1 where the service's p95 at 8 clients is above the target, or it answers fewer than 3 times the plain
handler's requests at 32, in the median of the rounds. The database is HPO_DATABASE_URL's or an embedded one made for
it; what is trained is removed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import numpy as np

# Python looks for modules beside the script first, where `storage` would be another benchmark.
sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != Path(__file__).resolve().parent]

from hpo.models.bundle.bundle import load  # noqa: E402
from hpo.models.data.readers import read  # noqa: E402
from hpo.models.machine import ONE_THREAD  # noqa: E402

EXAMPLES = Path(__file__).resolve().parent.parent / "examples/data"
STEPS, MADE, TESTED = 500, 200, 64
TIMES, AT_8, AT_32 = 3, 8, 32  # that many times the plain handler's requests at 32 clients
STUDY = """
[study]
name = "{name}"
trials = 1
[data]
train = "{train}"
validation = 0.25
[train]
epochs = {epochs}
[space]
hidden_size = 32
layers = 1
bidirectional = false
pooling = "last"
normalization = "channel"
patch_length = 1
sequence_length = 0
head_size = 0
"""
PLAIN = """
import sys, numpy as np, uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
import hpo

class Question(BaseModel):
    sequences: list[list[list[float]]]

class Answer(BaseModel):
    classes: list[str]
    labels: list[str]
    probabilities: list[list[float]]

app, model = FastAPI(), hpo.load(sys.argv[1])

@app.get("/healthz")
def healthz() -> dict[str, str]:
    return {"status": "ok"}

@app.post("/predict")
def predict(question: Question) -> Answer:
    found = model.predict([np.array(sequence) for sequence in question.sequences])
    return Answer(classes=found.classes, labels=found.labels.tolist(), probabilities=found.probabilities.tolist())

uvicorn.run(app, port=int(sys.argv[2]), log_level="warning", access_log=False)
"""


class Client(asyncio.Protocol):
    """One connection with one request in progress, until a time; the seconds of each answer are appended."""

    def __init__(self, requests: list[bytes], end: float, seconds: list[float], bodies: list[bytes] | None) -> None:
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._requests, self._end, self._seconds, self._bodies = requests, end, seconds, bodies
        self._next, self._received, self._began = 0, b"", 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._ask()

    def _ask(self) -> None:
        self._began = time.perf_counter()
        self._transport.write(self._requests[self._next % len(self._requests)])
        self._next += 1

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, mark, body = self._received.partition(b"\r\n\r\n")
        if not mark or len(body) < int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0]):
            return
        now = time.perf_counter()
        self._seconds.append(now - self._began)
        self._received = b""
        if not head.startswith(b"HTTP/1.1 200"):
            self.connection_lost(OSError(f"{head.decode()}: {body.decode()}"))
        if self._bodies is not None:
            self._bodies.append(body)
        if now < self._end or (self._bodies is not None and len(self._bodies) < len(self._requests)):
            self._ask()
        else:
            self._transport.close()
            self.connection_lost(None)

    def connection_lost(self, error: Exception | None) -> None:
        if self.ended.done():
            return
        if error is None:
            self.ended.set_result(None)
        else:
            self.ended.set_exception(error)


@dataclass(frozen=True)
class Measured:
    """What so many clients met."""

    p50: float  # ms
    p95: float  # ms
    rate: float  # requests a second


def drive(url: str, requests: list[bytes], clients: int, seconds: float) -> Measured:
    """Ask for so long with so many clients at once, each beginning with another request."""

    async def run() -> Measured:
        loop, (host, _, port) = asyncio.get_running_loop(), urlsplit(url).netloc.rpartition(":")
        found: list[float] = []
        began = time.perf_counter()
        made = []
        for index in range(clients):
            turned = requests[index % len(requests) :] + requests[: index % len(requests)]
            client = Client(turned, began + seconds, found, None)
            made.append((await loop.create_connection(lambda client=client: client, host, int(port)))[1])
        await asyncio.gather(*(client.ended for client in made))
        cuts = statistics.quantiles(found, n=20)
        return Measured(1e3 * statistics.median(found), 1e3 * cuts[18], len(found) / (time.perf_counter() - began))

    return asyncio.run(run())


def answers(url: str, requests: list[bytes]) -> list[bytes]:
    """The answer to each request, one after another."""

    async def run() -> list[bytes]:
        host, _, port = urlsplit(url).netloc.rpartition(":")
        bodies: list[bytes] = []
        client = Client(requests, 0, [], bodies)
        await asyncio.get_running_loop().create_connection(lambda: client, host, int(port))
        await client.ended
        return bodies

    return asyncio.run(run())


def request(method: str, path: str, token: str | None = None, content: object = None) -> bytes:
    """A request as it goes over the wire."""
    body = b"" if content is None else json.dumps(content).encode()
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}"]
    lines += ["Content-Type: application/json"] if body else []
    lines += [f"Authorization: Bearer {token}"] if token else []
    return "\r\n".join([*lines, "", ""]).encode() + body


def made_data(path: Path) -> Path:
    """Noisy sines of two frequencies, 500 steps each."""
    random = np.random.default_rng(0)
    slow = np.arange(MADE) % 2 == 0
    phase = random.uniform(0, 6, MADE)[:, None]
    X = np.sin(np.arange(STEPS) * np.where(slow, 0.05, 0.06)[:, None] + phase) + random.normal(0, 0.3, (MADE, STEPS))
    np.savez(path, X=X[:, :, None].round(4), y=np.where(slow, "slow", "fast"))
    return path


def command(*arguments: str) -> str:
    """What a command prints."""
    done = subprocess.run([sys.executable, "-P", "-m", "hpo", *arguments], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"hpo {' '.join(arguments)}: {done.stderr}")
    return done.stdout


@contextlib.contextmanager
def trained(folder: Path, train: Path, epochs: int) -> Iterator[tuple[str, Path]]:
    """A promoted model's name and its exported folder, removed at the end."""
    name = f"benchmark-{uuid4().hex[:8]}"
    (folder / "study.toml").write_text(STUDY.format(name=name, train=train, epochs=epochs))
    try:
        command("launch", str(folder / "study.toml"), "--workers", "1")
        command("export", name, "--out", str(folder / name))
        yield name, folder / name
    finally:
        command("delete", name, "--yes")
        command("models", "delete", name, "1")


@contextlib.contextmanager
def serving(command: list[str], url: str | None = None) -> Iterator[str]:
    """The address of a server, ended with the block; it prints one, or is known to listen at `url`."""
    with subprocess.Popen([sys.executable, "-P", *command], stdout=subprocess.PIPE, text=True) as server:
        try:
            if url is None:
                assert server.stdout is not None
                url = server.stdout.readline().split()[2].rstrip("/,")
            while server.poll() is None:
                with contextlib.suppress(OSError):
                    answers(url, [request("GET", "/healthz")])
                    break
                time.sleep(0.1)
            yield url
        finally:
            server.terminate()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def check(url: str, requests: list[bytes], folder: Path, sequences: list[Any]) -> float:
    """How far the answers are from what the model says of each sequence alone, at most."""
    model = load(folder)
    said = [json.loads(body)["probabilities"][0] for body in answers(url, requests)]
    alone = [model.predict([np.array(sequence)]).probabilities[0] for sequence in sequences]
    return float(np.abs(np.array(said) - np.array(alone)).max())


def measure(
    what: str, name: str, folder: Path, token: str, test: list[list[list[float]]], chosen: argparse.Namespace
) -> bool:
    """Print a model's figures; whether they reach the targets."""
    path = f"/v1/models/{name}/latest/predict"
    port = free_port()
    contents = [{"sequences": [sequence]} for sequence in test]
    found: dict[tuple[str, int], list[Measured]] = {}
    with (
        serving(["-m", "hpo", "serve", "--port", "0"]) as service,
        serving(["-c", PLAIN, str(folder), str(port)], f"http://127.0.0.1:{port}") as plain,
    ):
        ways = {
            "hpo serve": (service, [request("POST", path, token, content) for content in contents]),
            "plain": (plain, [request("POST", "/predict", None, content) for content in contents]),
            "hpo serve /healthz": (service, [request("GET", "/healthz")]),
        }
        for way in ("hpo serve", "plain"):
            print(f"{what}, {way}: answers differ from the model's by at most {check(*ways[way], folder, test):.1e}")
        for _ in range(chosen.rounds):
            for clients in chosen.clients:
                for way, (url, requests) in ways.items():
                    found.setdefault((way, clients), []).append(drive(url, requests, clients, chosen.seconds))
    print(
        f"\n{what}\n{'':<20}{'clients':>8}{'p50, ms':>10}{'p95, ms':>10}{'a second':>10}{'lowest':>10}{'highest':>10}"
    )
    for (way, clients), each in found.items():
        middle = [statistics.median(getattr(one, figure) for one in each) for figure in ("p50", "p95", "rate")]
        rates = [one.rate for one in each]
        print(
            f"{way:<20}{clients:>8}{middle[0]:>10.2f}{middle[1]:>10.2f}{middle[2]:>10.0f}{min(rates):>10.0f}{max(rates):>10.0f}"
        )
    reached = True
    if AT_8 in chosen.clients:
        p95 = statistics.median(one.p95 for one in found["hpo serve", AT_8])
        reached &= p95 <= chosen.target
        print(f"p95 at {AT_8} clients: {p95:.2f} ms, target {chosen.target:g} ms")
    if AT_32 in chosen.clients:
        pairs = zip(found["hpo serve", AT_32], found["plain", AT_32], strict=True)
        ratios = sorted(ours.rate / theirs.rate for ours, theirs in pairs)
        ratio = statistics.median(ratios)
        reached &= ratio >= TIMES
        print(f"requests a second at {AT_32} clients: {ratio:.1f} times the plain handler's "
              f"({ratios[0]:.1f} to {ratios[-1]:.1f}), target {TIMES}\n", flush=True)  # fmt: skip
    return reached


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3, help="of all measurements; medians are shown")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, AT_8, AT_32])
    parser.add_argument("--target", type=float, default=10.0, help="ms that p95 may be at 8 clients")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="hpo-") as home:
        folder = Path(home)
        own = {"HPO_HOME": str(folder / "home"), "HPO_ARTIFACTS": str(folder / "artifacts"), "HPO_DEVICE": "cpu"}
        os.environ.update({**ONE_THREAD, **own})
        embedded = "HPO_DATABASE_URL" not in os.environ
        try:
            token = command("token", "create", "--role", "read", "--owner", "benchmark").strip()
            italy = read(EXAMPLES / "ItalyPowerDemand_TEST.ts").values[:TESTED].astype(np.float64).tolist()
            long = made_data(folder / "made.npz")
            reached = []
            with trained(folder, EXAMPLES / "ItalyPowerDemand_TRAIN.ts", 20) as (name, model):
                reached.append(measure("ItalyPowerDemand, 24 steps", name, model, token, italy, chosen))
            with trained(folder, long, 3) as (name, model):
                steps = np.load(long)["X"][:TESTED].tolist()
                reached.append(measure("made series, 500 steps", name, model, token, steps, chosen))
            command("token", "revoke", token.split("_")[1])
        finally:
            if embedded:
                command("db", "stop")
    sys.exit(not all(reached))


if __name__ == "__main__":
    main()
