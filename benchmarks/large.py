"""A data file larger than memory: what each stage of a study takes of time and of memory, mapped and held in memory.

    python benchmarks/large.py [--mb 1000] [--kinds npz gaps csv] [--folder /var/tmp] [--epochs 1] [--no-memory]

Makes a file of labelled sequences (100 steps, 8 features, float32) and goes through the stages of a study with it, each
way in a process of its own: plan (read, order, split, compare, hash), store (the canonical files), build (one training
on the default configuration, prepared), epoch (one, with its validation), evaluate (the test part). `mapped` is what
`hpo` does; `memory` the same code where no array is mapped. npz: whole; gaps: npz of unequal lengths with 1 in 50
values missing; csv: long form, of a tenth of the size.

Anonymous memory is what the kernel cannot take back without a swap (RssAnon), read every 5 ms from outside and given as
what a stage's peak is above the process with everything imported; `file` is RssFile and RssShmem, pages of files that
it takes back when it needs them. --cap N: the processes may have N MiB of private memory more than that (RLIMIT_DATA).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
# Python looks for modules beside the script first, where `storage` would be the benchmark of that name.
sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != HERE]

T, F = 100, 8
MIB = 2**20
EVERY_S = 0.005


def make(path: Path, kind: str, size: int) -> None:
    """A file of about so many bytes, written in pieces: two classes that differ in the level of a few steps."""
    if kind == "csv":
        return _make_csv(path, size // 10)
    n = size // (4 * T * F)
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, n)
    values = np.lib.format.open_memmap(path.with_suffix(".npy"), "w+", np.float32, (n, T, F))
    lengths = rng.integers(T // 2, T + 1, n) if kind == "gaps" else np.full(n, T)
    for start in range(0, n, 1000):
        some = rng.normal(size=(min(1000, n - start), T, F)).astype(np.float32)
        some[:, :20] += labels[start : start + 1000, None, None] * 0.5
        if kind == "gaps":
            some[rng.random(some.shape) < 0.02] = np.nan
            some[np.arange(T) >= lengths[start : start + 1000, None]] = np.nan
        values[start : start + 1000] = some
    values.flush()
    np.savez(path, X=values, y=labels)
    path.with_suffix(".npy").unlink()
    return None


def _make_csv(path: Path, size: int) -> None:
    n = size // (T * F * 8)
    rng = np.random.default_rng(0)
    with path.open("w") as file:
        file.write(",".join(["id", "step", "label", *(f"f{i}" for i in range(F))]) + "\n")
        for i in range(n):
            label = rng.integers(0, 2)
            for step, row in enumerate(rng.normal(size=(T, F)) + 0.5 * label):
                file.write(f"{i},{step},{label}," + ",".join(f"{value:.4f}" for value in row) + "\n")


def run_stages(path: Path, way: str, epochs: int, cap_mib: int | None) -> None:
    """In a process of its own: each stage, announced on standard output before and after it."""
    import torch  # noqa: F401

    from hpo.models.bundle import bundle
    from hpo.models.bundle.config import BundleConfig
    from hpo.models.bundle.evaluation import evaluate
    from hpo.models.data import buffers
    from hpo.models.data.canonical import load, save
    from hpo.models.machine import one_thread
    from hpo.study.config import config_for_data
    from hpo.study.plan import make_plan
    from hpo.study.portfolio import portfolio_of
    from hpo.trial.build import build, lstm_kernel

    one_thread()
    lstm_kernel()
    if way == "memory":
        buffers.IN_MEMORY = sys.maxsize
    if cap_mib is not None:
        own = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData"))
        limit = int(own.split()[1]) * 1024 + cap_mib * MIB
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    def stage(name: str, call: Callable[[], Any]) -> Any:
        print(json.dumps({"begin": name}), flush=True)
        started, cpu = time.perf_counter(), time.process_time()
        result = call()
        seconds = time.perf_counter() - started, time.process_time() - cpu
        print(json.dumps({"end": name, "seconds": seconds}), flush=True)
        return result

    stored = path.parent / "train", path.parent / "test"
    config = config_for_data(path, [f"train.epochs={epochs}", "data.validation=0.2"])

    def plan_and_store() -> Any:
        plan, train, test = stage("plan", lambda: make_plan(config))
        assert test is not None
        stage("store", lambda: (save(train, stored[0]), save(test, stored[1])))
        return plan

    plan = plan_and_store()
    params = dict(portfolio_of(plan)[0])
    sequences = load(stored[0])
    training = stage("build", lambda: build(plan, params, 0, sequences, "cpu"))
    for _ in range(epochs):
        epoch = stage("epoch", training.advance)
    about = {"classes": plan.classes, "features": plan.features, "metric": plan.metric, "fill": plan.fill}
    model = bundle.assemble(BundleConfig(plan.classifier(params), **about), training.weights())
    found = stage("evaluate", lambda: evaluate(model, load(stored[1])))
    result = [epoch.train_loss, epoch.log_loss, found.scores.metrics["log_loss"]]
    print(json.dumps({"key": plan.train, "result": result}), flush=True)


def watch(path: Path, way: str, epochs: int, cap_mib: int | None) -> dict[str, Any]:
    """The stages of one way: seconds, and peaks of memory in MiB."""
    command = [sys.executable, __file__, "--stages", way, "--file", str(path), "--epochs", str(epochs)]
    command += [] if cap_mib is None else ["--cap", str(cap_mib)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    found: dict[str, Any] = {}
    now: list[str] = []
    base: list[int] = []
    peaks: dict[str, list[int]] = {}

    def sample() -> None:
        while process.poll() is None:
            if now:
                anonymous, file = _resident(process.pid)
                kept = peaks.setdefault(now[0], [0, 0])
                kept[:] = max(kept[0], anonymous), max(kept[1], file)
            time.sleep(EVERY_S)

    thread = threading.Thread(target=sample)
    thread.start()
    for line in process.stdout:
        told = json.loads(line)
        if "begin" in told:
            base[:] = base or [_resident(process.pid)[0]]
            now[:] = [told["begin"]]
        elif "end" in told:
            anonymous, file = peaks.get(told["end"], [base[0], 0])
            found[told["end"]] = *told["seconds"], (anonymous - base[0]) / 1024, file / 1024
        else:
            found |= told
    thread.join()
    found["code"] = process.wait()
    return found


def _resident(pid: int) -> tuple[int, int]:
    """KiB of anonymous pages, and of those of files."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0, 0
    sizes = {line.split(":")[0]: int(line.split()[1]) for line in text.splitlines() if line.startswith("Rss")}
    return sizes.get("RssAnon", 0), sizes.get("RssFile", 0) + sizes.get("RssShmem", 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=int, default=1000)
    parser.add_argument("--kinds", nargs="+", default=["npz", "gaps", "csv"])
    parser.add_argument("--folder", type=Path, default=Path("/var/tmp"))
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--cap", type=int, help="MiB")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--stages", help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.stages:
        run_stages(given.file, given.stages, given.epochs, given.cap)
        return
    print("kind  way     stage     seconds   of CPU  anonymous MiB  file MiB")
    for kind in given.kinds:
        with tempfile.TemporaryDirectory(dir=given.folder) as folder:
            path = Path(folder) / f"data.{'csv' if kind == 'csv' else 'npz'}"
            make(path, kind, given.mb * 10**6)
            os.sync()
            results = []
            for way in ["mapped"] if given.no_memory else ["mapped", "memory"]:
                found = watch(path, way, given.epochs, given.cap)
                for name in ("plan", "store", "build", "epoch", "evaluate"):
                    if name in found:
                        seconds, cpu, anonymous, file = found[name]
                        times = f"{seconds:8.1f} {cpu:8.1f}"
                        print(f"{kind:5} {way:7} {name:8} {times} {anonymous:14.0f} {file:9.0f}", flush=True)
                results.append((found.get("key"), found.get("result")))
                print(f"{kind:5} {way:7} ended with {found['code']}", flush=True)
            if len(results) == 2:
                print(f"{kind:5} {path.stat().st_size / 1e6:.0f} MB: the same results: {results[0] == results[1]}")


if __name__ == "__main__":
    main()
