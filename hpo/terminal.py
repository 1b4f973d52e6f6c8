"""Read-only views of studies on the terminal: live progress, tables, predictions."""

from __future__ import annotations

import json
import logging
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from datetime import datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from rich.console import Console, Group
from rich.live import Live
from rich.progress import Progress as Bars
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from hpo.errors import legible
from hpo.models.class_scores import (
    ModelScores,
    PartScores,
    part_scores,
    weakest,
    worst_first,
)
from hpo.models.config import METRICS
from hpo.storage.masking import mask
from hpo.storage.snapshot import BeyondLimits, Change, Dropped
from hpo.storage.terms import Standstill
from hpo.study.entries import show

if TYPE_CHECKING:
    from hpo.models.bundle.evaluation import Evaluation
    from hpo.models.bundle.predictions import Predictions
    from hpo.storage.access import Action, Token
    from hpo.storage.notices import Notice
    from hpo.storage.registry import ModelVersion
    from hpo.storage.snapshot import InFlight, Snapshot, WorkerGroup

PLAIN_S = 2.0  # between two lines where the output is not a terminal
WATCH_S = 2.0  # between two looks of `hpo status --watch`
OVER = ("finished", "stopped")  # states of a study in which nothing more happens by itself
SHOWN = 10  # predictions printed without an output file
MANY = 8  # classes: of more, only the predicted one's probability is printed
SHOWN_COUNTS = ("complete", "pruned", "failed", "running", "waiting")  # trials by state, in a table
WEAK_SHOWN = 3  # classes, and groups, in which a model fails, below a study's table
GROUPS_SHOWN = 3  # hosts and devices named in a row of a table
PIPED_WIDTH = 200  # columns of a table where the output is not a terminal
TABLE_WIDTH, MODELS_WIDTH = 110, 140  # columns that a table of studies or of models needs: narrower terminals get lines


class _Lines(logging.Handler):
    """What is logged, above the live view."""

    def __init__(self, console: Console) -> None:
        super().__init__(logging.INFO)
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        sign = "warning: " if record.levelno >= logging.WARNING else ""
        self._console.print(sign + mask(record.getMessage()), soft_wrap=True)


class ProgressDisplay:
    """Live view of one study: a bar, the best so far, a line per trial in flight; plain lines off a terminal, and in a
    notebook, where rich's live views need ipywidgets. What is logged meanwhile is shown, too.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._console = Console(stderr=True, markup=False, highlight=False)
        self._live: Live | None = None
        self._last = ("", 0.0)
        self._logger = logging.getLogger("hpo")
        self._lines = _Lines(self._console)
        self._level = self._logger.level  # before and after: it is the caller's

    def __enter__(self) -> ProgressDisplay:
        if not self._quiet:
            self._logger.addHandler(self._lines)
            self._logger.setLevel(logging.INFO)
        if self._console.is_terminal and not self._quiet:
            self._live = Live(console=self._console, refresh_per_second=4, transient=False)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._logger.removeHandler(self._lines)
        self._logger.setLevel(self._level)
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
            self._console.print(line, soft_wrap=True)


def _console() -> Console:
    """The standard output: names of studies and classes are no markup, and off a terminal no line is cut."""
    return Console(markup=False, width=None if sys.stdout.isatty() else PIPED_WIDTH)


def _ended(state: Snapshot) -> int:
    return sum(state.counts.get(name, 0) for name in ("complete", "pruned", "failed"))


def _best(state: Snapshot) -> str:
    """With the metric's name, where it is known."""
    if state.best is None:
        return "none yet"
    return f"{state.metric or ''} {state.best.value:.4f} (trial {state.best.number})".lstrip()


def _counts(state: Snapshot) -> str:
    counts = [f"{state.counts.get(name, 0)} {name}" for name in ("complete", "pruned", "failed", "running")]
    counts += [f"{waiting} waiting"] if (waiting := state.counts.get("waiting", 0)) else []
    return ", ".join(counts + ([] if state.beyond is None else [state.beyond.said]))


def _finals(state: Snapshot) -> list[str]:
    """How far its finals are, where they have begun."""
    return [] if state.finals is None else [f"finals {state.finals.ended}/{state.finals.budget}"]


def _headline(state: Snapshot) -> str:
    parts = [
        f"{state.name}: {_ended(state)}/{state.budget} trials",
        _counts(state),
        f"best {_best(state)}",
        *_finals(state),
        *([state.status] if state.status != "open" else []),
        *([state.standstill.said] if state.standstill is not None else []),
    ]
    return "; ".join(parts)


def _live_view(state: Snapshot) -> Group:
    bar = Table.grid(padding=(0, 1))
    ended = _ended(state)
    bar.add_row(
        state.name, ProgressBar(total=max(state.budget, 1), completed=ended, width=40), f"{ended}/{state.budget} trials"
    )
    left_s = _seconds_left(state)
    parts = [f"best {_best(state)}", _counts(state)]
    parts += [f"{state.rate_per_hour:.0f} an hour"] if state.rate_per_hour else []
    parts += [f"{_duration(left_s)} left"] if left_s else []
    parts += _finals(state)
    parts += [state.status] if state.status != "open" else ["promoting"] if ended >= state.budget else []
    parts += [state.standstill.said] if state.standstill is not None else []
    return Group(bar, Text("; ".join(parts)), *(Text(f"  {_in_flight(trial)}") for trial in state.in_flight))


def _in_flight(trial: InFlight) -> str:
    metric = "" if trial.metric is None else f", {trial.metric:.4f}"
    epoch = "starting" if trial.epoch is None else f"epoch {trial.epoch}{metric}"
    attempt = f", attempt {trial.attempt}" if trial.attempt > 1 else ""
    waits = "" if trial.alive else ", waits for another worker"
    return f"trial {trial.number}: {epoch} on {trial.device} ({trial.worker}{attempt}{waits})"


def _seconds_left(state: Snapshot) -> int | None:
    """Until the budget is spent at the rate so far, or the study's time is up."""
    if state.status != "open":
        return None
    left = [] if state.seconds_left is None else [state.seconds_left]
    if state.rate_per_hour:
        left.append(3600 * max(state.budget - _ended(state), 0) / state.rate_per_hour)
    return round(min(left)) if left else None


def status_row(state: Snapshot, scores: ModelScores | None = None) -> dict[str, Any]:
    """A study, JSON-able. scores: those of its promoted version, by class and by group."""
    return {
        "study": state.name,
        "status": state.status,
        "owner": state.owner,
        "priority": state.priority,
        "max_workers": state.max_workers,
        "metric": state.metric,
        "trials": dict(state.counts),
        "budget": state.budget,
        "patience": state.patience,
        "standstill": None if state.standstill is None else vars(state.standstill),
        "best": None if state.best is None else {"number": state.best.number, "value": state.best.value},
        "best_why": None if state.best is None else state.best.why,
        "finals": None if state.finals is None else vars(state.finals),
        "in_order": None if state.in_order is None else vars(state.in_order),
        "beyond_limits": None if state.beyond is None else vars(state.beyond),
        "version": state.promoted_version,
        "scores": None if scores is None else asdict(scores),
        "dropped": [dropped_row(each) for each in state.dropped],
        "dropped_winner": state.dropped_winner,
        "per_hour": None if state.rate_per_hour is None else round(state.rate_per_hour, 1),
        "seconds_left": _seconds_left(state),
        "workers": state.workers,
        "places": [vars(group) for group in state.worker_groups],
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


def dropped_row(found: Dropped) -> dict[str, Any]:
    """A trial that does not count, JSON-able."""
    return {"trial": found.number, "reason": found.reason, "by": found.by, "when": found.when.isoformat()}


def show_status(states: Sequence[Snapshot], *, detailed: bool) -> None:
    """Studies as tables."""
    console = _console()
    console.print(_status_view(states, console.width, detailed=detailed))


def show_weak(state: Snapshot, scores: ModelScores) -> None:
    """The classes and groups in which the study's promoted version fails, where there are some."""
    console = _console()
    if (weak := weakest(scores)) is not None:
        for line in _weak_lines(state.name, state.promoted_version, asdict(weak)):
            _say(console, line)


def _weak_lines(study: str, version: int | None, weak: Mapping[str, Any]) -> list[str]:
    """A `Weak` in words, a line a class or group."""
    count = f"{weak['sequences']:,} {'sequence' if weak['sequences'] == 1 else 'sequences'}"
    lines = [f"version {version} on the {weak['part']} part: accuracy {weak['accuracy']:.4f} of {count}, weaker on"]
    for each in weak["classes"][:WEAK_SHOWN]:
        taken = each["mistaken_for"]
        other = f", {taken['sequences']:,} taken for {taken['name']!r}" if taken else ""
        recall = _ranged(each["recall"], each["recall_interval"])
        lines.append(f"  class {each['name']!r}: recall {recall} of {each['sequences']:,}{other}")
    for each in weak["groups"][:WEAK_SHOWN]:
        name = "a group" if each["name"] is None else f"group {each['name']!r}"
        lines.append(f"  {name}: accuracy {_ranged(each['accuracy'], each['interval'])} of {each['sequences']:,}")
    more = [(len(weak[what]) - WEAK_SHOWN, what) for what in ("classes", "groups")]
    if left := " and ".join(f"{count:,} {what}" for count, what in more if count > 0):
        lines.append(f"  {left} more: hpo status {shlex.quote(study)} --json")
    return [legible(line, len(line) + 1) for line in lines]


def _ranged(value: float | None, interval: Sequence[float] | None) -> str:
    """A value with its 95 % interval; nothing for none."""
    if value is None:
        return ""
    return f"{value:.4f}" + (f" ({interval[0]:.4f} to {interval[1]:.4f})" if interval else "")


def watch_status(look: Callable[[], list[Snapshot]], *, as_json: bool, named: bool) -> list[Snapshot]:
    """`look` every WATCH_S: tables in place on a terminal, else what has changed in plain lines, or in JSON.

    Returns what it saw last when the study that was named is over, and at a Ctrl-C.
    """
    console = _console()
    in_place = console.is_terminal and not as_json
    shown: list[str] = []
    states: list[Snapshot] = []
    with suppress(KeyboardInterrupt), Live(console=console, auto_refresh=False) if in_place else nullcontext() as live:
        while True:
            states = look()
            if live is not None:
                live.update(_status_view(states, console.width, detailed=named), refresh=True)
            else:
                lines = [json.dumps(status_row(state)) if as_json else _headline(state) for state in states]
                for line in lines:
                    if line not in shown:
                        print(line, flush=True)
                shown = lines
            if named and states[0].status in OVER:
                break
            time.sleep(WATCH_S)
    return states


def _status_view(states: Sequence[Snapshot], width: int, *, detailed: bool) -> Group:
    """Studies in a table, or in lines where it does not fit into `width` columns; trials in flight where `detailed`."""
    if not states:
        return Group(Text("no studies yet; `hpo launch STUDY.toml` makes one"))
    reasons = [Text(f"{state.name}: {state.best.why}") for state in states if state.best and state.best.why]
    reasons += [Text(line) for state in states for line in _where_finals_are(state)]
    reasons += [Text(f"{each.name}: ended by patience: {each.standstill.said}") for each in states if each.standstill]
    reasons += [Text(f"{each.name}: trials not to be promoted: {each.beyond.said}") for each in states if each.beyond]
    in_order = [(state.name, state.in_order) for state in states if state.in_order]
    reasons += [Text(f"{name}: parallel = {order.parallel}: {order.said}") for name, order in in_order]
    reasons += [Text(line) for state in states for line in _dropped(state, detailed=detailed)]
    in_flight = states[0].in_flight if detailed else ()
    if width < TABLE_WIDTH:
        lines = [line for state in states for line in _study_lines(state)]
        return Group(*map(Text, lines), *reasons, *(Text(f"  {_in_flight(trial)}") for trial in in_flight))
    return Group(_study_table(states, detailed=detailed), *reasons, *([_flights(states[0])] if in_flight else []))


def _where_finals_are(state: Snapshot) -> list[str]:
    if state.finals is None:
        return []
    more = f"hpo status {shlex.quote(state.finals.name)}"
    return [f"{state.name}: {state.finals.ended} of {state.finals.budget} trainings of its finals have ended; {more}"]


def _dropped(state: Snapshot, *, detailed: bool) -> list[str]:
    """Which trials do not count: each with its reason where `detailed`."""
    if not state.dropped:
        return []
    if detailed:
        lines = [f"{state.name}: trial {each.number} does not count: {_why(each)}" for each in state.dropped]
    else:
        numbers = ", ".join(str(each.number) for each in state.dropped[:SHOWN]) + ", …" * (len(state.dropped) > SHOWN)
        lines = [f"{state.name}: dropped {'trial' if len(state.dropped) == 1 else 'trials'} {numbers}"]
    return lines + _superseded(state)


def _why(found: Dropped) -> str:
    return f"dropped {found.when.astimezone():%Y-%m-%d %H:%M} by {legible(found.by)}, {legible(found.reason)}"


def _superseded(state: Snapshot) -> list[str]:
    """What to do about a model whose trial was dropped."""
    if state.dropped_winner is None:
        return []
    name = shlex.quote(state.name)
    promoted = (
        f"{state.name}: version {state.promoted_version} is of trial {state.dropped_winner}, which does not count"
    )
    if state.best is None:
        return [f"{promoted}, and no other trial has completed: give the study more trials, or restore it"]
    return [f"{promoted}: `hpo promote {name}` makes one of trial {state.best.number}, which the name then means"]


def show_dropped(state: Snapshot, numbers: Sequence[int]) -> None:
    """What a study is like after trials were dropped."""
    console, few = _console(), {each.number: each for each in state.dropped}
    for number in numbers:
        _say(console, f"trial {number} of {state.name} does not count: {_why(few[number])}")
    _say(console, f"the best is {_best(state)}" if state.best else "no trial that counts has completed")
    more = "`hpo launch STUDY.toml --trials N` gives more"
    _say(console, f"the budget of {state.budget} trials stays as it is spent: {more}")
    for line in _superseded(state):
        _say(console, line)


def show_restored(state: Snapshot, numbers: Sequence[int]) -> None:
    """What a study is like after trials were restored."""
    console = _console()
    shown = f"{'trial' if len(numbers) == 1 else 'trials'} {', '.join(map(str, numbers))}"
    _say(console, f"{shown} of {state.name} {'counts' if len(numbers) == 1 else 'count'}; the best is {_best(state)}")
    if state.promoted_version is not None and state.best is not None and state.best.number in numbers:
        name = shlex.quote(state.name)
        _say(console, f"`hpo promote {name} --default` lets the name mean trial {state.best.number}'s model")


def show_trials(rows: Sequence[Mapping[str, Any]]) -> None:
    """A study's trials, as `study.record.trial_row` has them, a line each."""
    console = _console()
    if not rows:
        console.print("no trials yet")
    for row in rows:
        value = "" if row["value"] is None else f" {row['value']:.4f}"
        notes = [legible(row["failure"])] if row["failure"] else []
        if gone := row["dropped"]:
            notes += [_why(Dropped(**{**gone, "when": datetime.fromisoformat(gone["when"])}))]
        notes += [", ".join(f"{name} {_plain(each)}" for name, each in row["params"].items())]
        state = "failed" if row["state"] == "fail" else row["state"]
        _say(console, f"{row['number']:>4} {state}{value}" + "".join(f"; {each}" for each in notes if each))


def _study_lines(state: Snapshot) -> list[str]:
    left_s = _seconds_left(state)
    pace = [f"{state.rate_per_hour:.0f} an hour"] if state.rate_per_hour else []
    pace += [f"{_duration(left_s)} left"] if left_s is not None else []
    workers = _workers(state.worker_groups, GROUPS_SHOWN).replace("\n", ", ")
    return [
        f"{state.name}: {state.status}, {_ended(state)}/{state.budget} trials",
        f"  {_counts(state)}",
        f"  best {_best(state)}",
        f"  workers {workers}" + "".join(f"; {part}" for part in pace),
    ]


def _study_table(states: Sequence[Snapshot], *, detailed: bool) -> Table:
    table = Table("study", "status")
    for name in SHOWN_COUNTS:
        table.add_column(name, justify="right")
    table.add_column("budget", justify="right")
    table.add_column("best")
    table.add_column("workers")
    table.add_column("per hour", justify="right")
    table.add_column("left", justify="right")
    for state in states:
        left_s = _seconds_left(state)
        table.add_row(
            Text(state.name),
            state.status,
            *(str(state.counts.get(name, 0)) for name in SHOWN_COUNTS),
            str(state.budget),
            "" if state.best is None else _best(state),
            _workers(state.worker_groups, len(state.worker_groups) if detailed else GROUPS_SHOWN),
            "" if state.rate_per_hour is None else f"{state.rate_per_hour:.0f}",
            "" if left_s is None else _duration(left_s),
        )
    return table


def _workers(groups: Sequence[WorkerGroup], most: int) -> str:
    """Those alive by host and device, a line each."""
    if len(groups) > most:
        hosts = len({group.host for group in groups})
        return f"{sum(group.workers for group in groups)} on {hosts} hosts"
    lines = (f"{group.workers} on {group.host or 'an unknown host'} {group.device or ''}" for group in groups)
    return "\n".join(line.rstrip() for line in lines) or "0"


def _flights(state: Snapshot) -> Table:
    flying = Table("trial", "epoch", "metric", "worker", "host", "device", "attempt", title="in flight")
    for item in state.in_flight:
        metric = None if item.metric is None else f"{item.metric:.4f}"
        cells = (item.number, item.epoch, metric, item.worker, item.host, item.device, item.attempt)
        flying.add_row(*("" if cell is None else str(cell) for cell in cells))
    return flying


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes}:{rest:02d} min"


def model_row(model: ModelVersion) -> dict[str, Any]:
    """A promoted version, JSON-able."""
    return {
        "name": model.name,
        "version": model.version,
        "default": model.default,
        "trial": model.trial_number,
        "created": model.created_at.isoformat(),
        "estimate": model.scores.get("estimate"),
        "footprint": model.scores.get("footprint"),
        "calibration": model.scores.get("calibration"),
        "validation": model.scores["validation"],
        "test": model.scores.get("test"),
        "sequences": model.scores.get("sequences"),
        "test_looks": model.scores.get("test_looks"),
        "params": model.config["params"],
    }


def token_row(token: Token) -> dict[str, Any]:
    """A token without its secret, JSON-able."""
    times = {name: getattr(token, name) for name in ("created_at", "expires_at", "revoked_at")}
    shown = {name: None if value is None else value.isoformat() for name, value in times.items()}
    return {"token": token.token_id, "owner": token.owner, "role": token.role, "active": token.active, **shown}


def show_tokens(found: Sequence[Token]) -> None:
    """Tokens without their secrets, a line each."""
    console = _console()
    if not found:
        console.print("no tokens yet; `hpo token create` makes one")
    for token in found:
        ends = "revoked" if token.revoked_at else "expired" if not token.active else ""
        until = f"until {token.expires_at:%Y-%m-%d %H:%M}" if token.expires_at and not ends else ""
        about = ", ".join(filter(None, (f"made {token.created_at:%Y-%m-%d %H:%M}", until, ends)))
        console.print(f"{token.token_id}  {token.owner} may {token.role}; {about}", highlight=False, markup=False)


def action_row(action: Action) -> dict[str, Any]:
    """A line of the audit, JSON-able."""
    return {**vars(action), "happened_at": action.happened_at.isoformat()}


def show_actions(found: Sequence[Action]) -> None:
    """Who did what, a line each."""
    console = _console()
    if not found:
        console.print("nothing was written through the service yet")
    for action in found:
        detail = ", ".join(f"{name} {value}" for name, value in action.detail.items() if value is not None)
        told = f"{action.happened_at:%Y-%m-%d %H:%M:%S} {action.owner} ({action.token_id}): {action.action}"
        console.print(f"{told} {action.subject}" + (f" ({detail})" if detail else ""), highlight=False, markup=False)


def notice_row(notice: Notice) -> dict[str, Any]:
    """A notice, JSON-able; of its address the host alone, as the rest may be secret."""
    times = {name: getattr(notice, name) for name in ("created_at", "next_at", "delivered_at")}
    return {
        "notice": notice.notice,
        "study": notice.study_name,
        "event": notice.event,
        "host": urlsplit(notice.url).hostname,
        "state": notice.state,
        "attempts": notice.attempts,
        "fault": notice.fault,
        **{name: None if time is None else time.isoformat() for name, time in times.items()},
    }


def show_notices(found: Sequence[Notice]) -> None:
    """What was sent and what was not, a line each."""
    console = _console()
    if not found:
        console.print("no notices yet; [notify] url in a study file asks for some", markup=False)
    for notice in found:
        told = f"{notice.created_at:%Y-%m-%d %H:%M:%S} {notice.event} of {notice.study_name}: {notice.state}"
        tried = f", {notice.attempts} attempts" if notice.attempts > 1 else ""
        fault = f" ({notice.fault})" if notice.fault else ""
        console.print(f"{told}{tried}{fault}", highlight=False, markup=False)


def change_row(change: Change) -> dict[str, Any]:
    """A change of a study, JSON-able."""
    return {**vars(change), "when": change.when.isoformat()}


def show_changes(found: Sequence[Change]) -> None:
    """What was changed of a study, a line each."""
    console = _console()
    if not found:
        console.print("nothing was changed since it began")
    for change in found:
        told = f"{change.when.astimezone():%Y-%m-%d %H:%M} {legible(change.by)}: {change.what}"
        _say(console, f"{told} {_detail(change)}")


def _detail(change: Change) -> str:
    """What a change was, in words."""
    if change.what == "widen":
        entries = change.detail["space"].items()
        return "; ".join(f"space.{name} from {show(each['from'])} to {show(each['to'])}" for name, each in entries)
    reason = f", {legible(change.detail['reason'])}" if "reason" in change.detail else ""
    return f"trials {', '.join(map(str, change.detail['trials']))}{reason}"


def show_models(found: Sequence[ModelVersion]) -> None:
    """Promoted versions as a table, or in lines where that does not fit."""
    console = _console()
    if not found:
        console.print("no models yet; a study promotes its best trial when it ends")
        return
    rows = [_model_cells(model) for model in found]
    if console.width < MODELS_WIDTH:
        for name, version, trial, metric, validation, test, interval, looks, created in rows:
            console.print(f"{name} version {version}: trial {trial}, {created}", highlight=False)
            about = ", ".join(filter(None, (interval, f"look {looks} at that part" if looks else "")))
            tested = f"; test {test}" + (f", {about}" if about else "") if test else ""
            console.print(f"  {metric}: validation {validation}{tested}", highlight=False)
    else:
        table = Table("model", "version", "trial", "metric", "validation", "test", "95 % interval", "looks", "created")
        for cells in rows:
            table.add_row(*map(Text, cells))
        console.print(table)
    if any(model.scores.get("sequences") for model in found):
        _say(console, "in brackets: the number of sequences that a score is of")


def _model_cells(model: ModelVersion) -> tuple[str, ...]:
    metric = model.scores["metric"]
    test = model.scores.get("test") or {}
    interval = (model.scores.get("intervals") or {}).get(metric)
    return (
        model.name,
        f"{model.version} (default)" if model.default else str(model.version),
        str(model.trial_number),
        metric,
        f"{model.scores['validation'][metric]:.4f}{_counted(model.scores, 'validation')}",
        f"{test[metric]:.4f}{_counted(model.scores, 'test')}" if metric in test else "",
        f"{interval[0]:.4f} to {interval[1]:.4f}" if interval else "",
        str(model.scores.get("test_looks") or ""),
        f"{model.created_at:%Y-%m-%d %H:%M}",
    )


def _counted(scores: Mapping[str, Any], part: str, noun: str = "") -> str:
    """The number of the part's sequences in brackets; versions that were promoted earlier do not say."""
    sequences = (scores.get("sequences") or {}).get(part)
    return "" if sequences is None else f" ({sequences:,}{noun})"


def show_summary(summary: dict[str, Any]) -> None:
    """What a launch ended with."""
    console = _console()
    trials, model, best = summary["trials"], summary["model"], summary["best"]
    why = f" ({summary['best_why']})" if summary["best_why"] else ""
    still = summary.get("standstill")  # which an earlier service does not tell
    said = "" if still is None else f" ({Standstill(**still).said})"
    _say(
        console,
        f"{summary['study']}: {trials['complete']} complete, {trials['pruned']} pruned, {trials['failed']} failed "
        f"in {summary['seconds']:.1f} s, ended by {summary['ended_by']}{said}; best is trial {best['number']}, "
        f"{summary['metric']} {best['value']:.4f}{why}",
    )
    if (estimate := summary["estimate"]) is not None:
        _say(console, f"expect {summary['metric']} {_estimated(estimate)}")
    if (footprint := summary.get("footprint")) is not None:  # which an earlier version's model does not tell
        _say(console, f"one prediction takes {_footprint(footprint)}")
    if (beyond := summary.get("beyond_limits")) is not None:
        _say(console, f"trials that were not promoted for [limits]: {BeyondLimits(**beyond).said}")
    _say(
        console, "its configuration: " + ", ".join(f"{name} {_plain(value)}" for name, value in best["params"].items())
    )
    table = Table("metric", *(part + _counted(summary, part, " sequences") for part in ("validation", "test")))
    for name in METRICS:
        if (value := summary["validation"].get(name)) is None:
            continue
        test = (summary["test"] or {}).get(name)
        nothing = "undefined" if name in (summary["undefined"] or {}) else ""
        table.add_row(name, f"{value:.4f}", nothing if test is None else f"{test:.4f}")
    console.print(table)
    for line in _weak_lines(summary["study"], summary["model"]["version"], summary["weak"]) if summary["weak"] else ():
        _say(console, line)
    if summary["winner_dropped"]:
        again = f"`hpo promote {shlex.quote(summary['study'])}` makes one of the best that counts"
        _say(console, f"trial {best['number']} was dropped since and does not count: {again}")
    if summary["positive"] is not None:
        _say(console, f"f1 and average_precision are of class {summary['positive']!r} ([data] positive chooses)")
    _say(console, f"model {model['name']} version {model['version']}: {model['path']}")
    name, looks = shlex.quote(model["name"]), summary["test_looks"] or 0
    if looks > 1:
        _say(console, f"the test part was looked at {looks} times: what was chosen by it is no test any more")
    if model["default"] != model["version"]:
        _say(console, f"the name still means version {model['default']}, which is no worse on validation;")
        own = f"--version {model['version']} takes this one"
        _say(console, f"  {own}, hpo promote {name} --trial {best['number']} --default lets the name mean it")
    elif model["version"] > 1:
        _say(console, f"the name means version {model['version']} now")
    _say(console, f"next: hpo predict {name} DATA --out FILE.csv; hpo export {name} --out FOLDER; hpo dashboard")


def _footprint(found: Mapping[str, Any]) -> str:
    """What a prediction takes, in words."""
    steps = "1 step" if found["steps"] == 1 else f"{found['steps']:,} steps"
    return (
        f"{found['latency_ms']:.3g} ms for a sequence of {steps}, on one thread of {legible(found['machine'])}; "
        f"weights {found['size_mb']:.3g} MB"
    )


def _estimated(estimate: Mapping[str, Any]) -> str:
    """An estimate in words; an earlier version's model has none."""
    repeats = len(estimate["values"])
    how = f"mean of {repeats} fresh {'training' if repeats == 1 else 'trainings'}"
    low, high = estimate["interval"]
    return (
        f"{estimate['value']:.4f} (95 % {low:.4f} to {high:.4f}), {how}; it was selected by {estimate['selected']:.4f}"
    )


def _say(console: Console, line: str) -> None:
    """One line, whole: it is copied from the terminal."""
    console.print(line, highlight=False, soft_wrap=True)


def _plain(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)


def _name(name: str) -> Text:
    """A name of the data, of which a terminal takes no letter for a command."""
    return Text(legible(name))


def show_predictions(predictions: Predictions, rows: int = SHOWN) -> None:
    """The first rows as a table."""
    few = len(predictions.classes) <= MANY
    chances = [f"p({name})" for name in predictions.classes] if few else ["p(class)"]
    table = Table("id", "class")
    for chance in chances:
        table.add_column(_name(chance))
    for index in range(min(rows, len(predictions.labels))):
        row = predictions.probabilities[index]
        values = (f"{value:.4f}" for value in (row if few else [row.max()]))
        table.add_row(_name(predictions.ids[index]), _name(predictions.labels[index]), *values)
    console = _console()
    console.print(table)
    if len(predictions.labels) > rows:
        console.print(f"{rows} of {len(predictions.labels)} rows; --out FILE.csv writes all", highlight=False)


def evaluation_row(found: Evaluation) -> dict[str, Any]:
    """An evaluation, JSON-able, with the ids of the sequences that are wrong."""
    part = part_scores(found.predictions.classes, found.scores)
    by = {} if part is None else {name: asdict(part)[name] for name in ("by_class", "groups", "by_group")}
    return {
        **vars(found.scores),
        "ece": found.reliability.ece,
        "brier": found.reliability.brier,
        "classes": found.predictions.classes,
        **by,
        "wrong": [found.predictions.ids[row] for row in found.wrong],
    }


def show_evaluation(found: Evaluation, rows: int = SHOWN) -> None:
    """Scores, confusion and the first of the sequences that are wrong, the surest of them first."""
    console, scores, predictions = _console(), found.scores, found.predictions
    noun = "sequence" if scores.sequences == 1 else "sequences"
    _say(console, f"{scores.sequences} {noun}, {len(found.wrong)} of them wrong")
    table = Table("metric", "value", "95 % interval")
    for name, value in scores.metrics.items():
        low, high = scores.intervals.get(name, (None, None))
        table.add_row(name, f"{value:.4f}", "" if low is None or high is None else f"{low:.4f} to {high:.4f}")
    console.print(table)
    _say(console, f"calibration: ECE {found.reliability.ece:.4f}, Brier score {found.reliability.brier:.4f}")
    if scores.weighted:
        _say(console, "metrics and intervals are weighted, counts are of sequences")
    for name, reason in scores.undefined.items():
        _say(console, legible(f"{name} is undefined: {reason}"))
    if len(predictions.classes) <= MANY:
        counts = Table("true \\ predicted")
        for name in predictions.classes:
            counts.add_column(_name(name))
        for name, row in zip(predictions.classes, scores.confusion, strict=True):
            counts.add_row(_name(name), *map(str, row))
        console.print(counts)
    if (part := part_scores(predictions.classes, scores)) is not None:
        console.print(_class_table(part, rows))
        if part.by_group:
            console.print(_group_table(part, rows))
    if len(found.wrong):
        wrong = Table("id", "true", "predicted", "p(predicted)", title="wrong, the surest first")
        for row in found.wrong[:rows]:
            chance = f"{predictions.probabilities[row].max():.4f}"
            wrong.add_row(*map(_name, (predictions.ids[row], found.labels[row], predictions.labels[row], chance)))
        console.print(wrong)
    if len(found.wrong) > rows:
        _say(console, f"{rows} of {len(found.wrong)} that are wrong; --out FILE.csv writes all")


def _class_table(part: PartScores, rows: int) -> Table:
    """The first classes, those first in which the model fails most surely."""
    more = _more(len(part.by_class) - rows)
    table = Table("class", title="classes, the surest failures first", caption=more)
    table.add_column("sequences", justify="right")
    for name in ("recall, 95 % interval", "precision, 95 % interval", "f1", "taken for"):
        table.add_column(name)
    for each in worst_first(part.by_class)[:rows]:
        taken = "" if each.mistaken_for is None else f"{each.mistaken_for.name} ({each.mistaken_for.sequences:,})"
        table.add_row(
            _name(each.name),
            f"{each.sequences:,}",
            _ranged(each.recall, each.recall_interval) or "undefined",
            _ranged(each.precision, each.precision_interval) or "undefined",
            _ranged(each.f1, None) or "undefined",
            _name(taken),
        )
    return table


def _group_table(part: PartScores, rows: int) -> Table:
    """The first groups, those first in which the model fails most surely."""
    table = Table("group", title="groups, the surest failures first", caption=_more((part.groups or 0) - rows))
    table.add_column("sequences", justify="right")
    table.add_column("accuracy, 95 % interval")
    for each in part.by_group[:rows]:
        table.add_row(_name(each.name or ""), f"{each.sequences:,}", _ranged(each.accuracy, each.interval))
    return table


def _more(count: int) -> str | None:
    return f"{count:,} more, see --json" if count > 0 else None


@contextmanager
def counting(total: int, what: str) -> Iterator[Callable[[int], None]]:
    """A bar on the standard error; the block is given a function that takes the number of rows just done."""
    with Bars(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bars:
        task = bars.add_task(what, total=total)
        yield lambda rows: bars.advance(task, rows)
