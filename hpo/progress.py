"""Read-only views of studies on the terminal: live progress, tables, predictions."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import Progress as Bars
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from models.metrics import METRICS

if TYPE_CHECKING:
    from models.bundle import Predictions
    from storage.leases import Leases, Snapshot
    from storage.registry import ModelVersion
    from storage.trials import TrialStorage

PLAIN_S = 2.0  # between two lines where the output is not a terminal
SHOWN = 10  # predictions printed without an output file
MANY = 8  # classes: of more, only the predicted one's probability is printed
PIPED_WIDTH = 200  # columns of a table where the output is not a terminal


class Progress:
    """Live view of one study: a bar, the best so far, a line per trial in flight; plain lines off a terminal."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._console = Console(stderr=True)
        self._live: Live | None = None
        self._last = ("", 0.0)

    def __enter__(self) -> Progress:
        if self._console.is_terminal and not self._quiet:
            self._live = Live(console=self._console, refresh_per_second=4, transient=False)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self, state: Snapshot) -> None:
        """Show the study as it is now."""
        if self._quiet:
            return
        if self._live is not None:
            self._live.update(_live_view(state))
            return
        line = _headline(state)
        now = time.monotonic()
        if line != self._last[0] and (now - self._last[1] >= PLAIN_S or state.status == "finished"):
            self._last = (line, now)
            self._console.print(line, highlight=False, soft_wrap=True)


def _console() -> Console:
    """The standard output: names of studies and classes are no markup, and off a terminal no line is cut."""
    return Console(markup=False, width=None if sys.stdout.isatty() else PIPED_WIDTH)


def _headline(state: Snapshot) -> str:
    counts = state.counts
    best = "none yet" if state.best_value is None else f"{state.best_value:.4f} (trial {state.best_number})"
    running = counts.get("running", 0)
    ended = sum(counts.get(name, 0) for name in ("complete", "pruned", "failed"))
    parts = [
        f"{state.name}: {ended}/{state.budget} trials",
        f"{counts.get('complete', 0)} complete, {counts.get('pruned', 0)} pruned, {counts.get('failed', 0)} failed, "
        f"{running} running",
        f"best {best}",
    ]
    if state.status != "open":
        parts.append(state.status)
    return "; ".join(parts)


def _live_view(state: Snapshot) -> Group:
    ended = sum(state.counts.get(name, 0) for name in ("complete", "pruned", "failed"))
    rows: list[Any] = [Text(_headline(state)), ProgressBar(total=state.budget, completed=ended, width=60)]
    for trial in state.in_flight:
        metric = "" if trial.metric is None else f" {trial.metric:.4f}"
        epoch = "starting" if trial.epoch is None else f"epoch {trial.epoch}{metric}"
        attempt = f", attempt {trial.attempt}" if trial.attempt > 1 else ""
        rows.append(Text(f"  trial {trial.number}: {epoch} on {trial.device} ({trial.worker}{attempt})"))
    return Group(*rows)


def status_rows(storage: TrialStorage, leases: Leases, name: str | None) -> list[dict[str, Any]]:
    """One JSON-able row a study."""
    from hpo.study import study_id_of

    ids = [study_id_of(storage, name)] if name is not None else [row.study_id for row in leases.studies()]
    return [_status_row(leases.snapshot(study_id)) for study_id in ids]


def _status_row(state: Snapshot) -> dict[str, Any]:
    ended = sum(state.counts.get(name, 0) for name in ("complete", "pruned", "failed"))
    left_s = None
    if state.rate_per_hour and state.status == "open":
        left_s = round(3600 * max(state.budget - ended, 0) / state.rate_per_hour)
    return {
        "study": state.name,
        "status": state.status,
        "trials": dict(state.counts),
        "budget": state.budget,
        "best": None if state.best_value is None else {"number": state.best_number, "value": state.best_value},
        "version": state.promoted_version,
        "per_hour": None if state.rate_per_hour is None else round(state.rate_per_hour, 1),
        "seconds_left": left_s,
        "workers": state.workers,
        "in_flight": [
            {
                "trial": item.number,
                "worker": item.worker,
                "host": item.host,
                "device": item.device,
                "epoch": item.epoch,
                "metric": item.metric,
                "attempt": item.attempt,
            }
            for item in state.in_flight
        ],
    }


def show_status(rows: Sequence[dict[str, Any]], *, detailed: bool) -> None:
    """The rows of `status_rows` as tables."""
    console = _console()
    if not rows:
        console.print("no studies yet; `hpo launch STUDY.toml` makes one")
        return
    table = Table("study", "status", "complete", "pruned", "failed", "running", "budget", "best", "workers")
    table.add_column("per hour", justify="right")
    table.add_column("left", justify="right")
    for row in rows:
        counts, best = row["trials"], row["best"]
        table.add_row(
            row["study"],
            row["status"],
            *(str(counts.get(name, 0)) for name in ("complete", "pruned", "failed", "running")),
            str(row["budget"]),
            "" if best is None else f"{best['value']:.4f} (trial {best['number']})",
            str(row["workers"]),
            "" if row["per_hour"] is None else f"{row['per_hour']:.0f}",
            "" if row["seconds_left"] is None else _duration(row["seconds_left"]),
        )
    console.print(table)
    if detailed:
        _show_in_flight(console, rows[0])


def _show_in_flight(console: Console, row: dict[str, Any]) -> None:
    flying = Table("trial", "epoch", "metric", "worker", "host", "device", "attempt", title="in flight")
    for item in row["in_flight"]:
        cells = (item[name] for name in ("trial", "epoch", "metric", "worker", "host", "device", "attempt"))
        flying.add_row(*("" if cell is None else str(cell) for cell in cells))
    if row["in_flight"]:
        console.print(flying)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes}:{rest:02d} min"


def model_row(model: ModelVersion) -> dict[str, Any]:
    """A promoted version, JSON-able."""
    return {
        "name": model.name,
        "version": model.version,
        "trial": model.trial_number,
        "created": model.created_at.isoformat(),
        "validation": model.scores["validation"],
        "test": model.scores.get("test"),
        "params": model.config["params"],
    }


def show_models(found: Sequence[ModelVersion]) -> None:
    """Promoted versions as a table."""
    console = _console()
    if not found:
        console.print("no models yet; a study promotes its best trial when it ends")
        return
    table = Table("model", "version", "trial", "metric", "validation", "test", "95 % interval", "created")
    for model in found:
        metric = model.scores["metric"]
        test = model.scores.get("test") or {}
        interval = (model.scores.get("intervals") or {}).get(metric)
        table.add_row(
            model.name,
            str(model.version),
            str(model.trial_number),
            metric,
            f"{model.scores['validation'][metric]:.4f}",
            f"{test[metric]:.4f}" if metric in test else "",
            f"{interval[0]:.4f} to {interval[1]:.4f}" if interval else "",
            f"{model.created_at:%Y-%m-%d %H:%M}",
        )
    console.print(table)


def show_summary(summary: dict[str, Any]) -> None:
    """What a launch ended with."""
    console = _console()
    trials, model, best = summary["trials"], summary["model"], summary["best"]
    console.print(
        f"{summary['study']}: {trials['complete']} complete, {trials['pruned']} pruned, {trials['failed']} failed "
        f"in {summary['seconds']:.1f} s, ended by {summary['ended_by']}; best is trial {best['number']}",
        highlight=False,
        soft_wrap=True,
    )
    table = Table("metric", "validation", "test")
    for name in METRICS:
        if (value := summary["validation"].get(name)) is None:
            continue
        test = (summary["test"] or {}).get(name)
        table.add_row(name, f"{value:.4f}", "" if test is None else f"{test:.4f}")
    console.print(table)
    console.print(f"model {model['name']} version {model['version']}: {model['path']}", highlight=False, soft_wrap=True)


def show_predictions(predictions: Predictions, rows: int = SHOWN) -> None:
    """The first rows as a table."""
    few = len(predictions.classes) <= MANY
    chances = [f"p({name})" for name in predictions.classes] if few else ["p(class)"]
    table = Table("id", "class", *chances)
    for index in range(min(rows, len(predictions.labels))):
        row = predictions.probabilities[index]
        values = (f"{value:.4f}" for value in (row if few else [row.max()]))
        table.add_row(predictions.ids[index], predictions.labels[index], *values)
    console = _console()
    console.print(table)
    if len(predictions.labels) > rows:
        console.print(f"{rows} of {len(predictions.labels)} rows; --out FILE.csv writes all", highlight=False)


@contextmanager
def counting(total: int, what: str) -> Iterator[Callable[[int], None]]:
    """A bar on the standard error; the block is given a function that takes the number of rows just done."""
    with Bars(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bars:
        task = bars.add_task(what, total=total)
        yield lambda rows: bars.advance(task, rows)
