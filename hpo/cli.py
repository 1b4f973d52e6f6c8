"""The commands. With `hpo/terminal.py` the only place that prints, and the only one that turns errors into lines.

Each command imports its own room: `hpo --help` answers in a tenth of a second, and torch takes two.
"""

from __future__ import annotations

import atexit
import gc
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from http import HTTPStatus
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from hpo.doctor import NO, diagnose
from hpo.errors import HpoError
from hpo.launcher.cores import limit_threads
from hpo.launcher.launch import launch as launch_study
from hpo.launcher.ray_import import ClusterError
from hpo.logs import say_error, set_up, wanted_format
from hpo.models.machine import prepare_process
from hpo.storage.interrupts import calls_end_with_a_signal
from hpo.storage.masking import mask, mask_errors
from hpo.study.checks import CheckError, duration

if TYPE_CHECKING:
    from hpo.client import Client
    from hpo.launcher.ray import Cluster
    from hpo.models.class_scores import ModelScores
    from hpo.storage.access import Access
    from hpo.storage.leases import Leases
    from hpo.storage.snapshot import Snapshot
    from hpo.storage.trials import TrialStorage


class ListedByName(TyperGroup):
    """Commands of which `list` may be left out: `hpo trials NAME` is `hpo trials list NAME`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        return super().resolve_command(ctx, args if args[0] in self.commands else ["list", *args])


app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Tune LSTM classifiers of sequences: Optuna studies in Postgres, many workers, exact results.",
)
db = typer.Typer(no_args_is_help=True, help="The database: the embedded server, or that of HPO_DATABASE_URL.")
app.add_typer(db, name="db")
token = typer.Typer(no_args_is_help=True, help="Who may use the service of `hpo serve`.")
app.add_typer(token, name="token")
trials_app = typer.Typer(
    cls=ListedByName,
    no_args_is_help=True,
    help="A study's trials; those that are not to count. `hpo trials NAME` lists them.",
)
app.add_typer(trials_app, name="trials")
models_app = typer.Typer(help="Promoted versions with their scores.")
app.add_typer(models_app, name="models")


class LogFormat(StrEnum):
    text = "text"
    json = "json"


StudyName = Annotated[str, typer.Argument(help="Name of a study.")]
TrialNumbers = Annotated[list[int], typer.Argument(help="Numbers of trials that have ended.", min=0)]
Reason = Annotated[str, typer.Option(help="Why, as others are to read it.")]
Slots = Annotated[str, typer.Option(help="Trials at once in one worker: a number, or auto (by the GPU's memory).")]
Address = Annotated[
    str | None, typer.Option(help="Ray's address, or auto; without it RAY_ADDRESS, else Ray is started here.")
]
Id = Annotated[str | None, typer.Option("--id", help="Column that tells sequences apart; as in training without it.")]
Step = Annotated[str | None, typer.Option(help="Column that orders a sequence's rows; as in training without it.")]
Label = Annotated[str | None, typer.Option(help="Column of the class; as in training without it.")]
Group = Annotated[str | None, typer.Option(help="Column of what belongs together; as in training without it.")]
Weight = Annotated[str | None, typer.Option(help="Column of how much a sequence counts; as in training without it.")]
Time = Annotated[str | None, typer.Option(help="Column that orders the sequences; as in training without it.")]
Json = Annotated[bool, typer.Option("--json", help="Print one line of JSON as the last line.")]
LogLines = Annotated[
    LogFormat | None, typer.Option("--log-format", help="Lines of the log: text or json; HPO_LOG_FORMAT without it.")
]


class Format(StrEnum):
    safetensors = "safetensors"
    onnx = "onnx"
    pt2 = "pt2"


class TableFormat(StrEnum):
    csv = "csv"
    json = "json"
    parquet = "parquet"


class Backend(StrEnum):
    local = "local"
    ray = "ray"


class Role(StrEnum):
    read = "read"
    submit = "submit"
    admin = "admin"


def main() -> None:
    """Run a command; an HpoError becomes one line and its exit status. What else is raised is a defect of ours."""
    mask_errors()
    limit_threads()
    atexit.register(gc.freeze)  # looking for garbage at exit takes half a second with Optuna and SQLAlchemy loaded
    try:
        with calls_end_with_a_signal(0.0):
            app()
    except OSError as error:
        names = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
        say_error(f"{names or 'the operating system refuses'}: {error.strerror or error}")
        sys.exit(1)
    except HpoError as error:
        say_error(str(error))
        sys.exit(error.exit_status)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hpo {version('hpo')}")
        raise typer.Exit


@app.callback()
def common(
    _: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """What every command has."""


@app.command()
def launch(
    study: Annotated[Path, typer.Argument(help="Study file (TOML), or a data file to tune with defaults.")],
    workers: Annotated[str, typer.Option(help="Worker processes: a number, or auto (one a core or GPU).")] = "auto",
    slots: Slots = "auto",
    on: Annotated[Backend, typer.Option(help="Where workers run: here, or where Ray places them.")] = Backend.local,
    address: Address = None,
    cpus: Annotated[float, typer.Option(help="Cores of each worker on Ray; fractions are allowed.")] = 1.0,
    gpus: Annotated[
        float | None, typer.Option(help="Share of a GPU of each worker on Ray; 1 where there are GPUs, else 0.")
    ] = None,
    detach: Annotated[bool, typer.Option(help="Create the study for standing workers and return.")] = False,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override, as in space.hidden_size=64.")] = None,
    trials: Annotated[int | None, typer.Option(help="The budget, also of a study that exists.", min=1)] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    as_json: Json = False,
    log_format: LogLines = None,
) -> None:
    """Create or resume a study, run workers, show progress, promote the best model.

    With HPO_SERVER and HPO_TOKEN set, it is submitted to that service, whose workers train; a Ctrl-C leaves it there.
    """
    if (client := _client()) is not None:
        if (workers, slots, on, address, cpus, gpus) != ("auto", "auto", Backend.local, None, 1.0, None):
            raise typer.BadParameter("the service of HPO_SERVER has workers of its own: leave out where they run")
        overrides = [*(set_ or ()), *([f"study.trials={trials}"] if trials else ())]
        _launch_there(client, study, overrides, detach=detach, quiet=quiet, as_json=as_json)
        return
    _log_as(log_format)  # the workers do
    count, at_once = _number("workers", workers), _number("slots", slots)
    cluster = _cluster(address, cpus, gpus) if on is Backend.ray else None
    if cluster is None and (address, cpus, gpus) != (None, 1.0, None):
        raise typer.BadParameter("--address, --cpus and --gpus go with --on ray")
    if detach and (cluster or (workers, slots) != ("auto", "auto")):
        raise typer.BadParameter("--detach starts no workers: --workers, --slots and --on ray go without it")
    summary = launch_study(
        study,
        workers=count,
        slots=at_once,
        cluster=cluster,
        overrides=set_ or (),
        trials=trials,
        detach=detach,
        quiet=quiet,
    )
    if detach:
        typer.echo(f"study {summary['study']} is open for {summary['trials']} trials; `hpo worker` serves it")
    elif not quiet and not as_json:
        from hpo.terminal import show_summary

        show_summary(summary)
    if as_json:
        typer.echo(json.dumps(summary))


@app.command()
def worker(
    study: Annotated[str | None, typer.Option(help="Serve this study only, until it is over.")] = None,
    slots: Slots = "auto",
    log_format: LogLines = None,
) -> None:
    """One standing worker: take trials of that study, or of any open study, until asked to stop."""
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))  # while it imports: it holds nothing yet
    _log_as(log_format)
    set_up()
    from hpo.worker.worker import work

    work(study, _number("slots", slots))


@app.command()
def status(
    name: Annotated[str | None, typer.Argument(help="Name of a study; all of them without it.")] = None,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Go on until that study is over, or Ctrl-C.")] = False,
    as_json: Json = False,
) -> None:
    """Studies with their trials by state, best value, workers, rate and time left; of one, where its model is weak."""
    if (client := _client()) is not None:
        from hpo.client import ServiceError, snapshot_of

        def look() -> list[Snapshot]:
            return [snapshot_of(each) for each in ([client.study(name)] if name else client.studies())]

        def scores_of(study: str, version: int) -> ModelScores | None:
            try:
                return client.scores(study, version)
            except ServiceError as error:  # the version is gone, or the service is of an earlier version
                if error.status != HTTPStatus.NOT_FOUND:
                    logging.getLogger("hpo").warning("%s", error)
                return None

        _show_status(look, scores_of, named=name is not None, watch=watch, as_json=as_json)
        return
    from hpo.promote.version_scores import scores_if_known
    from hpo.storage.registry import Registry
    from hpo.study.lifecycle import snapshots

    with _database() as (storage, leases):
        _show_status(
            lambda: snapshots(storage, leases, name),
            lambda study, version: scores_if_known(Registry(storage.connection), study, version),
            named=name is not None,
            watch=watch,
            as_json=as_json,
        )


def _show_status(
    look: Callable[[], list[Snapshot]],
    scores_of: Callable[[str, int], ModelScores | None],
    *,
    named: bool,
    watch: bool,
    as_json: bool,
) -> None:
    """What `look` sees; of one study that is `named` also the scores of its promoted version by class and by group."""
    from hpo.terminal import show_status, show_weak, status_row, watch_status

    states = watch_status(look, as_json=as_json, named=named) if watch else look()
    if watch and as_json:
        return
    scores = None
    if named and states and (version := states[0].promoted_version) is not None:
        scores = scores_of(states[0].name, version)
    if as_json:
        typer.echo(json.dumps([status_row(state, scores) for state in states]))
        return
    if not watch:
        show_status(states, detailed=named)
    if scores is not None:
        show_weak(states[0], scores)


@app.command()
def logs(
    name: StudyName,
    worker: Annotated[str | None, typer.Option("--worker", "-w", help="One worker: HOST-PID, or its file.")] = None,
    lines: Annotated[int, typer.Option("--lines", "-n", help="The last so many of each.", min=1)] = 20,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what is added, until the end.")] = False,
    trial: Annotated[
        int | None, typer.Option("--trial", "-t", help="What was logged of one trial that ended.", min=0)
    ] = None,
    address: Address = None,
) -> None:
    """The workers' logs: files of this machine, those of others through Ray or where they are. Or a trial's, as CSV."""
    if (client := _client()) is not None:
        if follow or address:
            raise HpoError(
                "a service gives the last lines: leave out --follow and --address, or see `hpo status --watch`"
            )
        if trial is not None:
            typer.echo(client.trial(name, trial).log or f"trial {trial} has no log yet\n", nl=False)
            return
        for log in client.logs(name, worker, lines):
            typer.echo(f"==> {log.title} <==\n{log.text}")
        return
    from hpo.launcher.logs import follow as follow_logs
    from hpo.launcher.logs import read_logs
    from hpo.storage.artifacts import artifact_store
    from hpo.study.lifecycle import study_id_of, trial_of
    from hpo.study.notes import log_of

    with _database() as (storage, leases):
        study_id = study_id_of(storage, name)
        if trial is not None:
            kept = log_of(artifact_store(), trial_of(storage, name, trial))
            typer.echo(kept or f"trial {trial} has no log yet\n", nl=False)
            return
        found = read_logs(leases, study_id, name, worker, lines, address)
        for each in found:
            typer.echo(f"==> {each.title} <==\n{each.text}")
        if follow:
            for line in follow_logs(leases, study_id, found):
                typer.echo(line)


@app.command()
def stop(name: StudyName) -> None:
    """End a study for all its workers; a later launch goes on with it."""
    if (client := _client()) is not None:
        client.stop(name)
        typer.echo(f"study {name} is stopped: its workers end within an epoch")
        return
    from hpo.notify import send_last
    from hpo.study.lifecycle import check_no_finals, study_id_of

    check_no_finals(name, "stop")
    with _database() as (storage, leases):
        study_id = study_id_of(storage, name)
        leases.stop(study_id)
        send_last(storage.connection, study_id)
    typer.echo(f"study {name} is stopped: its workers end within an epoch")


@app.command()
def delete(
    name: StudyName,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Remove a study with its trials and checkpoints. Promoted models stay."""
    from hpo.storage.artifacts import artifact_store
    from hpo.study.lifecycle import delete_study

    if not yes:
        typer.confirm(f"Delete study {name} with all its trials?", abort=True)
    if (client := _client()) is not None:
        client.delete(name)
        typer.echo(f"study {name} is deleted; its promoted models stay")
        return
    with _database() as (storage, _):
        delete_study(storage, artifact_store(), name)
    typer.echo(f"study {name} is deleted; its promoted models stay")


@trials_app.command("list")
def trials_list(
    name: StudyName,
    as_json: Json = False,
    form: Annotated[
        TableFormat | None, typer.Option("--format", help="A table with all that is recorded of each trial.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="File for the table; csv and json are printed without it.")] = None,
) -> None:
    """A study's trials by number: state, value, parameters, and whether they count."""
    from hpo.study.trial_table import TrialTable
    from hpo.terminal import show_trials

    _check_table(as_json, form, out)
    if (client := _client()) is not None:
        rows = [each.model_dump(mode="json") for each in client.trials(name)]
    else:
        from hpo.study.lifecycle import all_trial_rows

        with _database() as (storage, _):
            rows = all_trial_rows(storage, name)
    if form is not None and out is not None:
        TrialTable.of(rows).write(out, form.value)
        typer.echo(f"{len(rows)} {'trial' if len(rows) == 1 else 'trials'} in {out}")
    elif form is not None:
        typer.echo(TrialTable.of(rows).text(form.value), nl=False)
    elif as_json:
        typer.echo(json.dumps(rows))
    else:
        show_trials(rows)


def _check_table(as_json: bool, form: TableFormat | None, out: Path | None) -> None:
    """Raises BadParameter for options that do not go together."""
    if as_json and form is not None:
        raise typer.BadParameter("--json and --format are two forms of the same: leave one out")
    if out is not None and form is None:
        raise typer.BadParameter("--out needs --format: csv, json or parquet")
    if out is None and form is TableFormat.parquet:
        raise typer.BadParameter("--format parquet needs --out FILE: it cannot be printed")
    _check_out(out)


@trials_app.command("drop")
def trials_drop(name: StudyName, numbers: TrialNumbers, reason: Reason) -> None:
    """Let finished trials count no more: for the sampler, the pruner, the ranking and promotion. Their records stay."""
    from hpo.terminal import show_dropped

    if (client := _client()) is not None:
        from hpo.client import snapshot_of

        for number in numbers:
            client.drop(name, number, reason)
        show_dropped(snapshot_of(client.study(name)), numbers)
        return
    from hpo.storage.changes import drop, somebody
    from hpo.study.lifecycle import study_id_of
    from hpo.track.tracker import settle

    with _database() as (storage, leases):
        study_id = study_id_of(storage, name)
        drop(storage, study_id, numbers, reason, somebody())
        settle(storage, name)
        state = leases.snapshot(study_id)
    show_dropped(state, numbers)


@trials_app.command("restore")
def trials_restore(name: StudyName, numbers: TrialNumbers) -> None:
    """Let trials that were dropped count again."""
    from hpo.terminal import show_restored

    if (client := _client()) is not None:
        from hpo.client import snapshot_of

        for number in numbers:
            client.restore(name, number)
        show_restored(snapshot_of(client.study(name)), numbers)
        return
    from hpo.storage.changes import restore, somebody
    from hpo.study.lifecycle import study_id_of
    from hpo.track.tracker import settle

    with _database() as (storage, leases):
        study_id = study_id_of(storage, name)
        restore(storage, study_id, numbers, somebody())
        settle(storage, name)
        state = leases.snapshot(study_id)
    show_restored(state, numbers)


@app.command()
def changes(name: StudyName, as_json: Json = False) -> None:
    """What was changed of a study after it began: trials dropped and restored, a wider space; by whom and when."""
    from hpo.storage.snapshot import Change
    from hpo.terminal import change_row, show_changes

    if (client := _client()) is not None:
        found = [Change(**vars(each)) for each in client.changes(name)]
    else:
        from hpo.storage.changes import history
        from hpo.study.lifecycle import study_id_of

        with _database() as (storage, _):
            found = history(storage, study_id_of(storage, name))
    if as_json:
        typer.echo(json.dumps([change_row(each) for each in found]))
    else:
        show_changes(found)


@app.command()
def dashboard(
    host: Annotated[str, typer.Option(help="Address to listen on; off loopback a password is required.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 8080,
    allow_delete: Annotated[bool, typer.Option(help="Let visitors delete studies.")] = False,
) -> None:
    """optuna-dashboard over the studies. The password comes from HPO_DASHBOARD_PASSWORD (or ..._FILE)."""
    from hpo.dashboard.server import serve
    from hpo.storage.artifacts import artifact_store
    from hpo.storage.database import database_url

    serve(
        database_url(),
        artifact_store(),
        host,
        port,
        allow_delete=allow_delete,
        ready=lambda url: typer.echo(f"dashboard at {url} (Ctrl-C ends it)"),
    )


@app.command()
def promote(
    name: StudyName,
    trial: Annotated[int | None, typer.Option(help="Number of a completed trial; the best without it.")] = None,
    default: Annotated[bool, typer.Option("--default", help="Let the name mean it, better or not.")] = False,
) -> None:
    """Make a trial's model a new version; the name alone means it if it is better on validation."""
    from hpo.terminal import show_models

    if (client := _client()) is not None:
        from hpo.client import version_of

        show_models([version_of(client.promote(name, trial, default=default))])
        return
    from hpo.notify import send_last
    from hpo.promote.promotion import promote_trial
    from hpo.track.tracker import settle

    prepare_process()
    with _database() as (storage, _):
        model = promote_trial(storage, name, trial, as_default=default)
        if model.study_id is not None:
            send_last(storage.connection, model.study_id)
        settle(storage, name)
    show_models([model])


@app.command()
def report(
    name: StudyName,
    out: Annotated[Path, typer.Option(help="HTML file to write; one that is there is replaced.")] = Path("report.html"),
) -> None:
    """One HTML file that explains a study, over or not: its answer, how sure that is, its trials, how to repeat it."""
    _check_out(out)
    if (client := _client()) is not None:
        text = client.report(name)
    else:
        from hpo.promote.report import report_of
        from hpo.storage.artifacts import artifact_store
        from hpo.study.lifecycle import check_no_finals, open_study

        check_no_finals(name, "report")
        with _database() as (storage, _):
            text = report_of(open_study(name, storage), artifact_store())
    from hpo.storage.files import write_whole

    write_whole(out, text)
    typer.echo(f"the report of {name} is {out}")


@app.command()
def reproduce(
    name: StudyName,
    trial: Annotated[int | None, typer.Option(help="Number of a complete or pruned trial.")] = None,
    study: Annotated[bool, typer.Option("--study", help="The whole study, to the first trial that differs.")] = False,
) -> None:
    """Train a finished trial, or a whole study, again from what is recorded; exit status 1 where a bit differs."""
    from hpo.promote.reproduce import reproduce as again

    if (trial is None) is not study:
        raise typer.BadParameter("name what to train again: either --trial N or --study")
    prepare_process()
    if trial is None:
        _reproduce_study(name)
        return
    with _database() as (storage, _):
        found = again(storage, name, trial)
    if found.equal:
        typer.echo(f"trial {trial}: bit-equal over {found.epochs} epochs")
        return
    typer.echo(f"trial {trial} differs; {found.first_difference}")
    _say_causes(found.causes)
    raise typer.Exit(1)


def _reproduce_study(name: str) -> None:
    import optuna

    from hpo.promote.reproduce_study import reproduce_study

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with _database() as (storage, _):
        found = reproduce_study(storage, name)
    if found.difference is None:
        trials = "1 trial" if found.trials == 1 else f"{found.trials} trials"
        finals = f" and {found.finals} of its finals" if found.finals else ""
        typer.echo(f"{name}: {trials}{finals} run again, all bit-equal: parameters, states, values of every epoch")
        return
    equal = found.trials + found.finals - 1
    typer.echo(f"{name} differs, after {equal} equal trials, from {found.difference}")
    _say_causes(found.causes)
    raise typer.Exit(1)


def _say_causes(causes: Sequence[str]) -> None:
    typer.echo("likely causes:\n  " + ("\n  ".join(causes) or "none recorded: not the same code?"))


@models_app.callback(invoke_without_command=True)
def models(context: typer.Context, as_json: Json = False) -> None:
    """Promoted versions with their scores."""
    if context.invoked_subcommand is not None:
        return
    from hpo.terminal import model_row, show_models

    if (client := _client()) is not None:
        from hpo.client import version_of

        found = [version_of(each) for each in client.models()]
    else:
        from hpo.storage.database import database_url
        from hpo.storage.registry import Registry

        found = Registry(database_url()).models()
    if as_json:
        typer.echo(json.dumps([model_row(model) for model in found]))
    else:
        show_models(found)


@models_app.command("delete")
def models_delete(
    name: Annotated[str, typer.Argument(help="Name of a promoted model.")],
    version: Annotated[int, typer.Argument(help="Version; one that an alias names stays.", min=1)],
) -> None:
    """Remove a version, with its files in the artifact store."""
    from hpo.storage.artifacts import artifact_store
    from hpo.storage.database import database_url
    from hpo.storage.registry import Registry

    store = artifact_store()
    for key in Registry(database_url()).delete(name, version):
        store.delete(key)
    typer.echo(f"version {version} of {name} is deleted")


@app.command()
def alias(
    name: Annotated[str, typer.Argument(help="Name of a promoted model.")],
    alias: Annotated[str | None, typer.Argument(help="Such as production; what aliases have named without it.")] = None,
    version: Annotated[int | None, typer.Argument(help="The version that it names from now on.", min=1)] = None,
    drop: Annotated[bool, typer.Option("--delete", help="Let it name nothing any more.")] = False,
) -> None:
    """Let a name such as production mean a version, another one (a rollback), or none."""
    from hpo.storage.database import database_url
    from hpo.storage.registry import Registry

    if drop == (version is not None) and alias is not None:
        raise typer.BadParameter("give the version that the alias is to name, or --delete")
    registry = Registry(database_url())
    if alias is None:
        registry.get(name)  # or an error that lists the names
        for change in registry.alias_changes(name):
            named = "nothing" if change.version is None else f"version {change.version}"
            typer.echo(f"{change.changed_at:%Y-%m-%d %H:%M:%S} {change.alias}: {named}")
    elif drop:
        registry.drop_alias(name, alias)
        typer.echo(f"{alias} of {name} names nothing any more")
    else:
        found = registry.set_alias(name, alias, version)
        typer.echo(f"{alias} of {name} is version {found.version}")


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="Name of a promoted model, or a saved model folder.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    version: Annotated[int | None, typer.Option(help="Version; the default one without it.")] = None,
    format_: Annotated[Format, typer.Option("--format", help="What to add to the folder.")] = Format.safetensors,
    overwrite: Annotated[bool, typer.Option(help="Replace a saved model in that folder.")] = False,
) -> None:
    """Write a folder that works without the database."""
    if not Path(model).is_dir() and (client := _client()) is not None:
        if format_ is not Format.safetensors:
            raise typer.BadParameter(f"export the model first, then that folder with --format {format_.value}")
        typer.echo(f"exported to {client.download(model, out, version or 'latest')}")
        return
    from hpo.models.bundle.export import export as write
    from hpo.promote.promotion import training_part
    from hpo.promote.versions import model_folder

    folder = model_folder(model, version)
    real = None if Path(model).is_dir() or format_ is Format.safetensors else training_part(folder)
    write(folder, out, format_.value, sequences=real, overwrite=overwrite)
    typer.echo(f"exported to {out}")


@app.command()
def predict(
    model: Annotated[str, typer.Argument(help="A saved model folder, or the name of a promoted model.")],
    data: Annotated[Path, typer.Argument(help="Sequences: npz, csv, parquet or .ts; labels are not needed.")],
    out: Annotated[Path | None, typer.Option(help="CSV file to write; printed without it.")] = None,
    version: Annotated[int | None, typer.Option(help="Version of a promoted model.")] = None,
    batch_size: Annotated[int, typer.Option(help="Sequences in a batch.", min=1)] = 256,
    id_: Id = None,
    step: Step = None,
    label: Label = None,
    group: Group = None,
    time: Time = None,
    weight: Weight = None,
) -> None:
    """Class and probabilities of each sequence."""
    from hpo.terminal import counting, show_predictions

    _check_out(out)
    columns = _named(id=id_, step=step, label=label, group=group, time=time, weight=weight)
    if not Path(model).is_dir() and (client := _client()) is not None:
        found = client.predict(model, data, version or "latest", **columns).predictions()
        if out is None:
            show_predictions(found)
        else:
            found.to_csv(out)
            typer.echo(f"{len(found.ids)} predictions in {out}")
        return
    from hpo.models.bundle.bundle import load
    from hpo.promote.versions import model_folder

    bundle = load(model_folder(model, version))
    sequences = bundle.read(data, labeled=False, **columns)
    with counting(sequences.n, "predicting") as advance:
        predictions = bundle.predict(sequences, batch_size=batch_size, progress=advance)
    if out is None:
        show_predictions(predictions)
    else:
        predictions.to_csv(out)
        filled = f"; {sequences.filled} missing values filled" if sequences.filled else ""
        typer.echo(f"{sequences.n} predictions in {out}{filled}")


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="A saved model folder, or the name of a promoted model.")],
    data: Annotated[Path, typer.Argument(help="Labelled sequences: npz, csv, parquet or .ts.")],
    out: Annotated[Path | None, typer.Option(help="CSV file to write, with true and predicted class.")] = None,
    version: Annotated[int | None, typer.Option(help="Version of a promoted model.")] = None,
    batch_size: Annotated[int, typer.Option(help="Sequences in a batch.", min=1)] = 256,
    id_: Id = None,
    step: Step = None,
    label: Label = None,
    group: Group = None,
    time: Time = None,
    weight: Weight = None,
    as_json: Json = False,
) -> None:
    """Scores with intervals on labelled data, the confusion matrix, and the sequences that are wrong."""
    from hpo.models.bundle.bundle import load
    from hpo.models.bundle.evaluation import evaluate as measure
    from hpo.promote.versions import model_folder
    from hpo.terminal import counting, evaluation_row, show_evaluation

    _check_out(out)
    bundle = load(model_folder(model, version))
    columns = _named(id=id_, step=step, label=label, group=group, time=time, weight=weight)
    sequences = bundle.read(data, labeled=True, **columns)
    with counting(sequences.n, "predicting") as advance:
        found = measure(bundle, sequences, batch_size, advance)
    if out is not None:
        found.to_csv(out)
    if as_json:
        typer.echo(json.dumps(evaluation_row(found)))
        return
    show_evaluation(found)
    if out is not None:
        typer.echo(f"{found.scores.sequences} rows in {out}")


@app.command()
def demo(
    workers: Annotated[str, typer.Option(help="Worker processes: a number, or auto.")] = "2",
    trials: Annotated[int, typer.Option(help="Trials of the study.", min=1)] = 40,
) -> None:
    """The main job on real data that ships with the project."""
    from hpo.demo import run

    run(_number("workers", workers), trials)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Whether this machine has what training needs, and what to do where not; exit status 1 where something fails."""
    found = diagnose()
    works = all(finding.state != NO for finding in found)
    if as_json:
        typer.echo(json.dumps({"ok": works, "findings": [vars(finding) for finding in found]}))
    else:
        for finding in found:
            typer.echo(f"{finding.state:3} {finding.what}: {finding.detail}")
    if not works:
        raise typer.Exit(1)


@app.command()
def serve(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.", min=0, max=65535)] = 8000,
    max_body: Annotated[int, typer.Option(help="MiB that a data file may have.", min=1)] = 1024,
    max_rows: Annotated[int, typer.Option(help="Sequences of one prediction.", min=1)] = 10_000,
    max_steps: Annotated[int, typer.Option(help="Steps of one of its sequences.", min=1)] = 100_000,
    max_waiting: Annotated[int, typer.Option(help="Predictions that wait; more are answered with 503.", min=1)] = 256,
    allowed_host: Annotated[
        list[str] | None, typer.Option(help="A name by which browsers ask for pages, as of a proxy; may be repeated.")
    ] = None,
    max_writes: Annotated[int, typer.Option(help="Changes a minute that one owner may make.", min=1)] = 600,
    stall: Annotated[str, typer.Option(help="Without a byte for so long, a body is given up.")] = "30s",
    keep_uploads: Annotated[str, typer.Option(help="Data files that nobody has used for so long are removed.")] = "7d",
    log_format: LogLines = None,
    log_requests: Annotated[
        bool | None, typer.Option("--log-requests/--no-log-requests", help="A line a request; with json by default.")
    ] = None,
) -> None:
    """The service: pages for people, and data, studies, models and predictions over HTTP for holders of a token."""
    from hpo.service.backend import MIB, Limits
    from hpo.service.server import serve as listen

    def ready(url: str, anybody: bool) -> None:
        typer.echo(f"service at {url}, its routes at {url}docs (Ctrl-C ends it)")
        if not anybody:
            logging.getLogger("hpo").warning("nobody has a token yet: hpo token create --role admin --owner NAME")

    json_lines = _log_as(log_format) is LogFormat.json
    set_up()
    limits = Limits(
        body=max_body * MIB,
        rows=max_rows,
        steps=max_steps,
        waiting=max_waiting,
        writes=max_writes,
        stall_s=_duration("stall", stall),
        keep_s=_duration("keep-uploads", keep_uploads),
        log_requests=json_lines if log_requests is None else log_requests,
    )
    listen(host, port, limits, ready, allowed_host or ())


@token.command("create")
def token_create(
    role: Annotated[Role, typer.Option(help="What it allows: each role includes those before it.")],
    owner: Annotated[str, typer.Option(help="Whose it is; studies belong to their submitter.")],
    expires: Annotated[str | None, typer.Option(help="After which time, as in 90d; never without it.")] = None,
) -> None:
    """Make a token and print it; it cannot be shown again."""
    lifetime_s = None if expires is None else _duration("expires", expires)
    with _access() as access:
        made, text = access.create(role.value, owner, lifetime_s)
    until = "" if made.expires_at is None else f" until {made.expires_at:%Y-%m-%d %H:%M} UTC"
    typer.echo(f"token {made.token_id}: {made.owner} may {made.role}{until}; keep it, it is not shown again:", err=True)
    typer.echo(text)


@token.command("list")
def token_list(as_json: Json = False) -> None:
    """Every token, without its secret."""
    from hpo.terminal import show_tokens, token_row

    with _access() as access:
        found = access.tokens()
    if as_json:
        typer.echo(json.dumps([token_row(each) for each in found]))
    else:
        show_tokens(found)


@token.command("revoke")
def token_revoke(token_id: Annotated[str, typer.Argument(help="As `hpo token list` shows it.")]) -> None:
    """Let a token open nothing from now on."""
    with _access() as access:
        found = access.revoke(token_id)
    typer.echo(f"token {found.token_id} of {found.owner} opens nothing any more")


@app.command()
def audit(
    subject: Annotated[str | None, typer.Argument(help="Name of a study or model; all without it.")] = None,
    lines: Annotated[int, typer.Option("--lines", "-n", help="The last so many.", min=1)] = 50,
    as_json: Json = False,
) -> None:
    """Who wrote what through the service, and when; the newest first."""
    from hpo.terminal import action_row, show_actions

    with _access() as access:
        found = access.actions(subject, lines)
    if as_json:
        typer.echo(json.dumps([action_row(each) for each in found]))
    else:
        show_actions(found)


@app.command()
def notices(
    name: Annotated[str | None, typer.Argument(help="Name of a study; all without it.")] = None,
    lines: Annotated[int, typer.Option("--lines", "-n", help="The last so many.", min=1)] = 50,
    as_json: Json = False,
) -> None:
    """What was sent to the addresses of [notify], what waits, and why an attempt failed; the newest first."""
    from hpo.storage.notices import Notices
    from hpo.terminal import notice_row, show_notices

    with _database() as (storage, _):
        found = Notices(storage.connection).last(name, lines)
    if as_json:
        typer.echo(json.dumps([notice_row(each) for each in found]))
    else:
        show_notices(found)


@db.command("url")
def db_url(show_password: Annotated[bool, typer.Option(help="Print the password too.")] = False) -> None:
    """The database's address; starts the embedded server if that is the one in use."""
    from hpo.storage.database import database_url

    url = database_url()
    typer.echo(url if show_password else mask(url))


@db.command("check")
def db_check() -> None:
    """Whether the database is there, fits, and lets this role do its work; exit status 1 where not."""
    from hpo.storage.check import check
    from hpo.storage.database import database_url

    found = check(database_url())
    for finding in found:
        typer.echo(f"{'ok ' if finding.ok else 'NO '} {finding.what}: {mask(finding.detail)}")
    if not all(finding.ok for finding in found):
        raise typer.Exit(1)


@db.command("upgrade")
def db_upgrade() -> None:
    """Create the tables, or bring those of an earlier version up to date; takes the time that it needs."""
    from hpo.storage.database import database_url
    from hpo.storage.tables import HEAD, migrate

    migrate(database_url(), deadline_s=86400.0)
    typer.echo(f"the tables are at revision {HEAD}")


@db.command("start")
def db_start() -> None:
    """Start the embedded server, or find it running."""
    from hpo.storage.server.server import start

    typer.echo(f"running: {mask(start())}")


@db.command("stop")
def db_stop() -> None:
    """Stop the embedded server; its data stay."""
    from hpo.storage.server.server import stop as stop_server

    typer.echo("stopped" if stop_server() else "it was not running")


def _named(**columns: str | None) -> dict[str, str]:
    """The columns that an option names."""
    return {role: name for role, name in columns.items() if name is not None}


def _check_out(out: Path | None) -> None:
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        raise typer.BadParameter(f"--out must name a file in a folder that exists, got {str(out)!r}")


def _cluster(address: str | None, cpus: float, gpus: float | None) -> Cluster:
    """Raises ClusterError, before anything is begun where Ray is missing."""
    from hpo.launcher.ray import Cluster

    if find_spec("ray") is None:
        raise ClusterError("--on ray needs Ray: pip install 'hpo[ray]', on every node of the cluster")
    return Cluster(address, cpus, gpus)


def _log_as(given: LogFormat | None) -> LogFormat:
    """The format of the log, also of the processes that this one starts. Raises LogError for what is none."""
    if given is not None:
        os.environ["HPO_LOG_FORMAT"] = given.value
    return LogFormat(wanted_format())


def _number(option: str, text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise typer.BadParameter(f"--{option} must be auto or a number of at least 1, got {text!r}")
    return int(text)


def _duration(option: str, text: str) -> float:
    """Seconds from "30s" or "7d"."""
    try:
        return duration(text)
    except CheckError as error:
        raise typer.BadParameter(f"--{option} {error}, got {text!r}") from None


def _client() -> Client | None:
    """Of the service of HPO_SERVER; None where that is not set, and the commands work on the database."""
    if not os.environ.get("HPO_SERVER"):
        return None
    from hpo.client import connect

    return connect()


def _launch_there(
    client: Client, study: Path, overrides: list[str], *, detach: bool, quiet: bool, as_json: bool
) -> None:
    """Submit a study to the service, follow it to its end, and sum it up."""
    from hpo.client import snapshot_of
    from hpo.terminal import ProgressDisplay, show_summary

    began = time.monotonic()
    found = client.submit(study, overrides)
    if detach:
        typer.echo(f"study {found.name} is open for {found.budget} trials at {client.url}")
        return
    try:
        with ProgressDisplay(quiet=quiet) as display:
            for state in client.follow(found.name):
                display.update(snapshot_of(state))
    except KeyboardInterrupt:
        typer.echo(f"\nthe study goes on at {client.url}: hpo status {found.name}; hpo stop {found.name}", err=True)
        raise
    if state.status == "stopped":
        typer.echo(f"study {found.name} was stopped; `hpo launch` goes on with it")
        return
    summary = client.summary(found.name)
    summary["model"]["path"] = client.url
    summary |= {"logs": client.url, "seconds": round(time.monotonic() - began, 2)}
    if not quiet and not as_json:
        show_summary(summary)
    if as_json:
        typer.echo(json.dumps(summary))


@contextmanager
def _access() -> Iterator[Access]:
    """The tokens of the configured database."""
    from hpo.storage.access import Access
    from hpo.storage.connection import Connection
    from hpo.storage.database import database_url

    connection = Connection(database_url())
    try:
        yield Access(connection)
    finally:
        connection.close()


@contextmanager
def _database() -> Iterator[tuple[TrialStorage, Leases]]:
    """The configured database, closed after the block."""
    from hpo.storage.database import database_url
    from hpo.storage.leases import Leases
    from hpo.storage.trials import trial_storage

    storage = trial_storage(database_url())
    try:
        yield storage, Leases(storage)
    finally:
        storage.close()
