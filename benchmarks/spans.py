"""Where the seconds of a launch go: spans of functions in all of its processes, from outside, for `study.py --seconds`.

Python imports `sitecustomize` at the start of each process. The one that `prepare` writes wraps the functions below as
soon as their modules are imported, so the package has no line for it. A span is a line of JSON: name, process, begin
and end by the machine's monotonic clock, and the part of its wall and processor time that lies in no span within it, of
its thread. Wall seconds grow with what else the machine does; processor seconds hardly do.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

TRAINING, VALIDATION = "training", "validation"
WATCHED = {  # what a function's own time counts as, by module and name
    "hpo.launcher.supervision": {"run_here": "launcher: rest", "wait": "launcher: rest", "summary": "summing up"},
    "hpo.study.lifecycle": {"create_or_open": "study created from its data", "open_study": "study opened"},
    "hpo.models.machine": {"tune_allocator": "worker: rest"},  # what the fork server calls after its imports
    "hpo.worker.worker": {
        "work": "worker: rest",
        "Worker.__init__": "worker begins",
        "Worker._leave": "worker leaves",
        "Worker.rest": "worker waits for work",
    },
    "hpo.storage.leases": {"Leases.acquire": "lease taken", "Leases.release": "lease given back"},
    "hpo.datasets": {"Datasets.get": "data fetched"},
    "hpo.trial.run": {"run_trial": "trial: rest", "_finish": "curve and log"},
    "hpo.trial.build": {"build": "training built"},
    "hpo.trial.context": {
        "TrialContext.parameters": "sampling",
        "TrialContext.report": "report",
        "TrialContext.should_prune": "pruner",
        "TrialContext.checkpoint": "checkpoint",
        "TrialContext.finish": "trial finished",
        "TrialContext._latency_ms": "latency measured",
        "TrialContext._store": "artifacts stored",
        "TrialContext.drop_spent_checkpoints": "old checkpoints dropped",
    },
    "hpo.models.training.training": {
        "Training.advance": VALIDATION,
        "Training._train": TRAINING,
        "Training._validate": VALIDATION,
    },
    "hpo.promote.promotion": {
        "promote_when_over": "promotion: rest",
        "promote": "promotion: rest",
        "_footprint": "promotion: latency measured",
        "_calibration": "promotion: calibration",
        "_test_scores": "promotion: test part",
        "_show": "promotion: shown on the dashboard",
    },
    "hpo.promote.composition": {"compose": "promotion: weights scored"},
    "hpo.promote.report": {"report_at_promotion": "promotion: report"},
    "hpo.models.bundle.bundle": {"save": "promotion: model saved", "_pictures": "promotion: pictures"},
    "hpo.storage.registry": {"publish": "promotion: files stored", "Registry.promote": "promotion: registered"},
}


@dataclass(frozen=True)
class Span:
    """One call."""

    name: str  # MODULE:FUNCTION
    kind: str
    pid: int
    begin: float
    end: float
    wall_s: float  # outside of the spans within it
    cpu_s: float
    process_s: float  # processor seconds of its process before it


def prepare(folder: Path) -> dict[str, str]:
    """The environment in which processes write their spans into this folder, to be read by `spans`."""
    folder.mkdir()
    lines = [
        "import importlib.util, sys",
        f"spec = importlib.util.spec_from_file_location('hpo_spans', {str(Path(__file__).resolve())!r})",
        "module = sys.modules['hpo_spans'] = importlib.util.module_from_spec(spec)",
        "spec.loader.exec_module(module)",
        f"module.install({str(folder / 'spans.jsonl')!r})",
    ]
    (folder / "sitecustomize.py").write_text("\n".join(lines) + "\n")
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)}


def spans(folder: Path) -> list[Span]:
    """Those of processes that have ended, in the order of their ends."""
    return [Span(**json.loads(line)) for line in (folder / "spans.jsonl").read_text().splitlines()]


def install(path: str) -> None:
    """Watch this process and what it forks."""
    sys.meta_path.insert(0, _Finder(_Recorder(path)))


class _Recorder:
    def __init__(self, path: str) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        self._thread = threading.local()

    def watched(self, function: Callable[..., Any], name: str, kind: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*given: Any, **named: Any) -> Any:
            within = self._thread.__dict__.setdefault("within", [])  # wall and processor seconds of inner spans
            within.append([0.0, 0.0])
            begin, cpu, process = time.monotonic(), time.thread_time(), time.process_time()
            try:
                return function(*given, **named)
            finally:
                end, used = time.monotonic(), time.thread_time() - cpu
                inner_wall, inner_cpu = within.pop()
                if within:
                    within[-1][0] += end - begin
                    within[-1][1] += used
                own = {"wall_s": end - begin - inner_wall, "cpu_s": used - inner_cpu, "process_s": process}
                content = {"name": name, "kind": kind, "pid": os.getpid(), "begin": begin, "end": end, **own}
                os.write(self._descriptor, json.dumps(content).encode() + b"\n")

        return call


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the modules of WATCHED, and wraps their functions once they are loaded."""

    def __init__(self, recorder: _Recorder) -> None:
        self._recorder = recorder

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in WATCHED:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_wrap(module: ModuleType) -> None:
                load(module)
                self._wrap(module)

            spec.loader.exec_module = load_and_wrap  # type: ignore[method-assign]
        return spec

    def _wrap(self, module: ModuleType) -> None:
        for name, kind in WATCHED[module.__name__].items():
            owner, _, attribute = name.rpartition(".")
            holder = getattr(module, owner) if owner else module
            function = getattr(holder, attribute)
            setattr(holder, attribute, self._recorder.watched(function, f"{module.__name__}:{name}", kind))


# --------------------------------------------------------------------------------------------------------- the tables


def moments(found: Sequence[Span], began: float, ended: float) -> dict[str, float]:
    """Wall seconds of a launch, one after the other, from the command to its end."""

    def first(name: str) -> float:
        return min(span.begin for span in found if span.name.endswith(f":{name}"))

    def last(name: str) -> float:
        return max(span.end for span in found if span.name.endswith(f":{name}"))

    places = {
        "from the command to the launcher's work": first("run_here"),
        "… to the study in the database": last("create_or_open"),
        "… to the end of the fork server's imports": first("tune_allocator"),
        "… to a forked worker": first("work"),
        "… to its first trial": first("run_trial"),
        "… to its first step": first("Training._train"),
        "trials, until the last one has ended": last("run_trial"),
        "… to the promotion": first("promote"),
        "promotion": last("promote"),
        "… to the last worker's end": last("work"),
        "… until the launcher knows": last("wait"),
        "summing up, and the command's end": ended,
    }
    times = [began, *places.values()]
    return {name: at - before for name, at, before in zip(places, times[1:], times, strict=False)}


def kinds(found: Sequence[Span]) -> dict[str, tuple[int, float, float]]:
    """Calls, wall and processor seconds of all processes by kind, the most processor seconds first."""
    sums: dict[str, tuple[int, float, float]] = {}
    for span in found:
        calls, wall, cpu = sums.get(span.kind, (0, 0.0, 0.0))
        sums[span.kind] = calls + 1, wall + span.wall_s, cpu + span.cpu_s
    for kind, name in (("command's imports", "run_here"), ("fork server's imports", "tune_allocator")):
        span = next(span for span in sorted(found, key=lambda each: each.begin) if span.name.endswith(f":{name}"))
        sums[kind] = 1, 0.0, span.process_s
    return dict(sorted(sums.items(), key=lambda item: -item[1][2]))


def show(runs: Sequence[tuple[list[Span], float, float, float]]) -> None:
    """Print the medians over runs: spans, begin and end of the command, and its processor seconds."""
    by_moment = [moments(found, began, ended) for found, began, ended, _ in runs]
    print("\n| wall seconds of the launch | s |\n|---|---|")
    for name in by_moment[0]:
        print(f"| {name} | {statistics.median(each[name] for each in by_moment):.2f} |")
    print(f"| in all | {statistics.median(ended - began for _, began, ended, _ in runs):.2f} |")
    by_kind = [kinds(found) for found, *_ in runs]
    print("\n| of all processes | calls | wall s | processor s | ms a call |\n|---|---|---|---|---|")
    names = dict.fromkeys(name for each in by_kind for name in each)
    rows = {name: [each.get(name, (0, 0.0, 0.0)) for each in by_kind] for name in names}
    for name, row in rows.items():
        calls, wall, cpu = (statistics.median(values) for values in zip(*row, strict=True))
        print(f"| {name} | {calls:.0f} | {wall:.2f} | {cpu:.2f} | {1000 * cpu / max(calls, 1):.1f} |")
    seen = [sum(cpu for _, _, cpu in each.values()) for each in by_kind]
    unseen = statistics.median(cpu - part for (*_, cpu), part in zip(runs, seen, strict=True))
    print(f"| other threads, the embedded server's checks, ends of processes | | | {unseen:.2f} | |")
    print(f"| in all | | | {statistics.median(cpu for *_, cpu in runs):.2f} | |")
