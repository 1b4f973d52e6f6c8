"""The pages of a dashboard over a study of many trials: seconds a request, beside stock optuna-dashboard's.

    python benchmarks/dashboard.py [--trials 2000] [--requests 30] [--target 0.5]

The trials are like those of a study of this project: 12 parameters, up to 50 epochs, four of five pruned, attributes
and a curve each; eight are RUNNING. Each request is what a browser sends, over HTTP to a dashboard process of its own.
"busy": a trial ended since the last request. Exit status 1 where the slowest median of warm requests is above the
target. The database is HPO_DATABASE_URL or the embedded server; the study made is deleted.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import gzip
import http.client
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState, create_trial

# Python looks for modules beside the script first, where `storage` would be another benchmark.
sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != Path(__file__).resolve().parent]

from hpo.storage.database import database_url  # noqa: E402
from hpo.storage.trials import TrialStorage, trial_storage  # noqa: E402
from hpo.study.notes import describe_study  # noqa: E402
from hpo.trial.provenance import provenance  # noqa: E402

PASSWORD = "benchmark"
EPOCHS, RUNNING = 50, 8
SPACE: dict[str, BaseDistribution] = {
    "normalization": CategoricalDistribution(("none", "channel", "sequence")),
    "sequence_length": CategoricalDistribution((0, 64, 128)),
    "patch_length": CategoricalDistribution((1, 2, 4, 8)),
    "hidden_size": IntDistribution(16, 128, log=True),
    "layers": IntDistribution(1, 2),
    "bidirectional": CategoricalDistribution((False, True)),
    "pooling": CategoricalDistribution(("last", "mean", "max", "attention")),
    "dropout": FloatDistribution(0.0, 0.5),
    "batch_size": CategoricalDistribution((16, 32, 64)),
    "learning_rate": FloatDistribution(1e-3, 2e-2, log=True),
    "weight_decay": FloatDistribution(1e-6, 1e-2, log=True),
    "schedule": CategoricalDistribution(("constant", "cosine")),
}
STOCK = """
import sys
from optuna_dashboard import wsgi
from waitress import create_server
from hpo.storage.trials import trial_storage
server = create_server(wsgi(trial_storage(sys.argv[1])), host="127.0.0.1", port=0)
print(f"at http://127.0.0.1:{server.effective_port}/", flush=True)
server.run()
"""


def draw(numbers: random.Random, name: str) -> object:
    space = SPACE[name]
    if isinstance(space, CategoricalDistribution):
        return numbers.choice(space.choices)
    if isinstance(space, IntDistribution):
        return numbers.randint(space.low, space.high)
    assert isinstance(space, FloatDistribution)
    return numbers.uniform(space.low, space.high)


def trial(numbers: random.Random, state: TrialState) -> optuna.trial.FrozenTrial:
    """A trial like one of ours."""
    epochs = EPOCHS if state != TrialState.PRUNED else numbers.randint(1, 15)
    curve = {name: [numbers.random() for _ in range(epochs)] for name in ("value", "train_loss", "log_loss")}
    params = {name: draw(numbers, name) for name in SPACE}
    key = uuid.uuid4().hex
    shown = {"artifact_id": key, "filename": "curve.svg", "mimetype": "image/svg+xml", "encoding": None}
    attributes = {
        "seed": numbers.getrandbits(63),
        "params": params,
        "best_epoch": epochs,
        "epochs": epochs,
        "log_loss": numbers.random(),
        "threshold": 0.5,
        "curve": curve,
        "parameters": 20_000,
        "training_seconds": 1.234,
        "device": "cpu",
        "worker": "host-1234",
        "attempt": 1,
        "fused_optimizer": True,
        "lstm_kernel": "torch",
        "provenance": provenance(),
    }
    return create_trial(
        state=state,
        params=params,
        distributions=SPACE,
        value=curve["value"][-1] if state.is_finished() else None,
        intermediate_values=dict(enumerate(curve["value"], 1)),
        user_attrs=attributes if state.is_finished() else {},
        system_attrs={f"artifacts:{key}": json.dumps(shown)} if state.is_finished() else {},
    )


@contextlib.contextmanager
def filled(storage: TrialStorage, count: int) -> Iterator[optuna.Study]:
    """A study of so many trials, deleted at the end."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    numbers = random.Random(0)
    study = optuna.create_study(storage=storage, study_name=f"benchmark-{uuid.uuid4().hex[:8]}", direction="maximize")
    describe_study(storage, study._study_id, "auroc", "**auroc**\n" + "x" * 3000)
    try:
        for index in range(count):
            running = index >= count - RUNNING
            ended = TrialState.COMPLETE if index % 5 == 0 else TrialState.PRUNED
            study.add_trial(trial(numbers, TrialState.RUNNING if running else ended))
        yield study
    finally:
        storage.delete_study(study._study_id)


@contextlib.contextmanager
def serving(command: list[str], url: str) -> Iterator[str]:
    """The address of a dashboard process, ended with the block."""
    environment = {**os.environ, "HPO_DATABASE_URL": url, "HPO_DASHBOARD_PASSWORD": PASSWORD}
    with subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True, env=environment) as server:
        assert server.stdout is not None
        try:
            yield next(word for word in server.stdout.readline().split() if word.startswith("http")).rstrip("/")
        finally:
            server.terminate()


def get(address: str, path: str, *, zipped: bool = False) -> tuple[float, int, bytes]:
    """Seconds to the last byte, bytes sent, the body."""
    login = base64.b64encode(f"hpo:{PASSWORD}".encode()).decode()
    headers = {"Authorization": f"Basic {login}", **({"Accept-Encoding": "gzip, deflate, br"} if zipped else {})}
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=120)
    connection.connect()
    began = time.perf_counter()
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    body = answer.read()
    seconds = time.perf_counter() - began
    connection.close()
    assert answer.status == 200, (path, answer.status, body[:200])
    unpacked = gzip.decompress(body) if answer.getheader("Content-Encoding") == "gzip" else body
    return seconds, len(body), unpacked


def measure(what: str, ask: Callable[[], tuple[float, int, bytes]], requests: int) -> float:
    """Print the first request and the spread of the others; their median."""
    first, *warm = [ask()[:2] for _ in range(requests + 1)]
    seconds = sorted(taken for taken, _ in warm)
    middle = statistics.median(seconds)
    tenth = len(seconds) // 10
    print(f"{what:<44}{first[0]:9.3f}{middle:9.3f}{seconds[tenth]:9.3f}{seconds[-1 - tenth]:9.3f}"
          f"{warm[-1][1] / 1e6:9.2f}", flush=True)  # fmt: skip
    return middle


def pages(storage: TrialStorage, study: optuna.Study, address: str, requests: int, *, ours: bool) -> float:
    """Measure what a browser asks for on a study's page; the slowest median."""
    detail, count = f"/api/studies/{study._study_id}", len(study.get_trials(deepcopy=False))
    numbers = random.Random(1)

    def busy() -> tuple[float, int, bytes]:
        study.add_trial(trial(numbers, TrialState.PRUNED))
        storage.session.flush()
        return get(address, f"{detail}?after=0")

    who = "hpo" if ours else "stock"
    medians = [
        measure(f"{who}: all trials", lambda: get(address, f"{detail}?after=0"), requests),
        measure(f"{who}: all trials, gzip accepted", lambda: get(address, f"{detail}?after=0", zipped=True), requests),
        measure(f"{who}: the last {RUNNING} trials", lambda: get(address, f"{detail}?after={count - 8}"), requests),
        measure(f"{who}: importances", lambda: get(address, f"{detail}/param_importances"), requests),
        measure(f"{who}: list of studies", lambda: get(address, "/api/studies"), requests),
        measure(f"{who}: the page itself", lambda: get(address, f"/dashboard/studies/{study._study_id}"), requests),
        measure(f"{who}: all trials, busy", busy, requests),
        measure(f"{who}: importances, after that", lambda: get(address, f"{detail}/param_importances"), requests),
    ]
    return max(medians)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--requests", type=int, default=30, help="warm requests of each kind")
    parser.add_argument("--target", type=float, default=0.5, help="seconds that the slowest median may take")
    parser.add_argument("--no-stock", action="store_true", help="leave stock optuna-dashboard out")
    chosen = parser.parse_args()
    url = database_url()
    storage = trial_storage(url)
    with tempfile.TemporaryDirectory() as folder, filled(storage, chosen.trials) as study:
        print(f"{chosen.trials} trials; seconds: {'first':>28}{'median':>9}{'10 %':>9}{'90 %':>9}{'MB':>9}")
        os.environ.setdefault("HPO_ARTIFACTS", folder)
        if not chosen.no_stock:
            with serving(["-P", "-c", STOCK, url], url) as address:
                pages(storage, study, address, max(3, chosen.requests // 5), ours=False)
        with serving(["-P", "-m", "hpo", "dashboard", "--port", "0"], url) as address:
            slowest = pages(storage, study, address, chosen.requests, ours=True)
    storage.close()
    print(f"slowest median {slowest:.3f} s, target {chosen.target} s")
    sys.exit(slowest > chosen.target)


if __name__ == "__main__":
    main()
