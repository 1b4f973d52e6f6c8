"""A study whose database is far away: what its trials wait for, over a proxy that delays what passes.

    python benchmarks/far.py [--round-trips 0 10 50] [--pruners none median hyperband] [--trials 6] [--epochs 12]

`hpo launch` with two workers over one list of configurations, whose epochs take some tenths of a second; no promotion
counts. Utilisation is the share of the trials' time, from the first begin to the last end on both workers, in which
epochs are computed. The rest is shown by what a trial was doing: milliseconds a call of its own wall time, and calls.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

HERE = Path(__file__).resolve().parent
# Python looks for modules beside the script first, where `storage` would be the benchmark of that name.
sys.path[:] = [*(path for path in sys.path if Path(path or ".").resolve() != HERE), str(HERE)]

from spans import TRAINING, VALIDATION, Span, kinds, prepare, spans  # noqa: E402
from study import WORKERS, Case, server, timed, write_data  # noqa: E402

SHOWN = ("report", "pruner", "checkpoint", "lease taken", "sampling", "trial finished", "artifacts stored")
SHOWN += ("old checkpoints dropped", "lease given back")
STUDY = """[study]
name = "{name}"
trials = {trials}
finalists = 0
pruner = "{pruner}"
sampler = "random"
[data]
train = "{folder}/train.npz"
validation = 0.2
[train]
epochs = {epochs}
patience = 0
[space]
stem = "conv"
hidden_size = 64
layers = 1
batch_size = 32
normalization = "channel"
learning_rate = {{ low = 1e-3, high = 3e-3, log = true }}
"""


class Delay:
    """A proxy on loopback: each byte arrives half a round trip later, in both directions."""

    def __init__(self, url: str, seconds: float) -> None:
        """seconds: of a round trip."""
        self._server, self._seconds = urlsplit(url), seconds
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        listening = asyncio.start_server(self._accept, "127.0.0.1", 0)
        self._listener = asyncio.run_coroutine_threadsafe(listening, self._loop).result()
        port = self._listener.sockets[0].getsockname()[1]
        user, _, _ = self._server.netloc.rpartition("@")
        self.url = self._server._replace(netloc=f"{user}@127.0.0.1:{port}").geturl()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream = await asyncio.open_connection(self._server.hostname, self._server.port)
        for pair in ((reader, upstream[1]), (upstream[0], writer)):
            task = self._loop.create_task(self._pass_on(*pair))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Whatever comes, later by half a round trip, without holding up what comes after it."""
        while data := await reader.read(2**16):
            self._loop.call_later(self._seconds / 2, writer.write, data)
        self._loop.call_later(self._seconds / 2, writer.close)


def run(case: Case, folder: Path, pruner: str, round_trip_ms: float) -> None:
    """One launch; a line of the table."""
    from hpo.storage.database import database_url

    name = f"far-{pruner}-{round_trip_ms:g}"
    path, watched = folder / f"{name}.toml", folder / f"spans-{name}"
    path.write_text(STUDY.format(name=name, trials=case.trials, epochs=case.epochs, pruner=pruner, folder=folder))
    url = Delay(database_url(), round_trip_ms / 1000).url
    environment = prepare(watched) | {"HPO_DATABASE_URL": url, "HPO_ARTIFACTS": str(folder / "artifacts")}
    command = [sys.executable, "-P", "-m", "hpo", "launch", str(path), "--workers", str(WORKERS), "--quiet"]
    timed(command, environment, name, folder)
    show(pruner, round_trip_ms, spans(watched))


def show(pruner: str, round_trip_ms: float, found: list[Span]) -> None:
    """The line of one launch."""
    trials = [span for span in found if span.name.endswith(":run_trial")]
    whole = WORKERS * (max(span.end for span in trials) - min(span.begin for span in trials))
    by_kind = kinds(found)
    computed = by_kind[TRAINING][1] + by_kind[VALIDATION][1]
    epochs = sum(span.name.endswith(":Training._train") for span in found)
    cells = []
    for kind in SHOWN:
        calls, wall, _ = by_kind.get(kind, (0, 0.0, 0.0))
        cells.append(f"{1000 * wall / calls:.0f} ({calls})" if calls else "–")
    print(
        f"| {pruner} | {round_trip_ms:g} | {100 * computed / whole:.0f} % | {epochs} | "
        f"{1000 * computed / epochs:.0f} | {' | '.join(cells)} |",
        flush=True,
    )


@contextmanager
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="far-") as name:
        Path(name).chmod(0o711)  # root's server runs as another user
        yield Path(name)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--round-trips", nargs="+", type=float, default=[0, 10, 50], help="milliseconds")
    pruners = ["none", "median", "hyperband", "halving"]
    options.add_argument("--pruners", nargs="+", default=pruners[:3], choices=pruners)
    options.add_argument("--trials", type=int, default=6)
    options.add_argument("--epochs", type=int, default=12)
    given = options.parse_args()
    case = Case("levels", "accuracy", given.trials, given.epochs, 1.0)
    with scratch() as folder, server(folder):
        write_data(case, folder)
        print(f"{WORKERS} workers, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n")
        heads = ("pruner", "round trip, ms", "utilisation", "epochs", "ms each", *(f"{kind}, ms" for kind in SHOWN))
        print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
        for pruner in given.pruners:
            for round_trip_ms in given.round_trips:
                run(case, folder, pruner, round_trip_ms)


if __name__ == "__main__":
    main()
