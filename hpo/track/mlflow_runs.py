"""Trials as runs of MLflow: one each, found again by a tag, also where a writer was killed in the middle."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hpo.storage.masking import remember
from hpo.track.ended import Ended, EndedTrial
from hpo.track.settings import TrackError

if TYPE_CHECKING:
    from mlflow.entities import Metric, Run

STATUS = {"complete": "FINISHED", "pruned": "KILLED", "fail": "FAILED"}
NOTES = ("hpo.dropped", "hpo.model")
AT_ONCE = 1000  # metrics that a request may bring, and runs that it asks for
TEXT_MOST = 5000  # characters of a tag or parameter
# A server that is away, or does not answer, is left for the next time. What the user has set goes before.
SETTINGS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",  # seconds
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER": "false",
    "MLFLOW_CONFIGURE_LOGGING": "false",  # the log is ours
    "MLFLOW_DISABLE_TELEMETRY": "true",  # nothing is told to others than whom the study file names
}


@dataclass
class _Known:
    """A run that exists."""

    run_id: str
    whole: bool  # all of the trial was written
    notes: dict[str, str]
    deleted: bool = False  # by somebody, in MLflow


class MlflowRuns:
    """The runs of one study, for as long as the process remembers them; whole ones never change but for their notes."""

    def __init__(self, uri: str) -> None:
        """Imports MLflow, which takes seconds."""
        for name, value in SETTINGS.items():
            os.environ.setdefault(name, value)
        for name in ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"):
            remember(os.environ.get(name))
        for name in ("mlflow", "alembic", "urllib3.connectionpool"):
            logging.getLogger(name).setLevel(logging.ERROR)
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient(tracking_uri=uri)
        self._known: dict[str, _Known] = {}  # by the trial's key
        self._unchecked: list[EndedTrial] = []  # those that this process has written, until it has seen one run of each

    def write(self, ended: Ended) -> Iterator[EndedTrial]:
        """Write what is not there yet; yields each trial before its run is written, so that the caller may stop.

        Raises TrackError, and MLflow's own exceptions.
        """
        experiment = self._experiment(ended.study)
        self._look(experiment, [trial for trial in ended.trials if trial.key not in self._known])
        for trial in ended.trials:
            run = self._known.get(trial.key)
            if run is not None and run.deleted:
                continue
            if run is None or not run.whole:
                yield trial
                self._unchecked.append(trial)
                run = self._written(experiment, trial, run)
            if run.notes != trial.notes:
                yield trial
                self._annotate(run, trial)
        self._look(experiment, self._unchecked)  # a request whose answer was lost has been repeated
        self._unchecked = []

    def _experiment(self, name: str) -> str:
        found = self._client.get_experiment_by_name(name)
        if found is None:
            return str(self._client.create_experiment(name))
        if found.lifecycle_stage != "active":
            raise TrackError(f"the experiment {name!r} was deleted in MLflow: restore it there, or remove it for good")
        return str(found.experiment_id)

    def _look(self, experiment: str, trials: Sequence[EndedTrial]) -> None:
        """Learn of the runs of these trials. Of several of one trial (a request was repeated, or two processes wrote it
        at once) one stays, the same whoever looks. One that somebody deleted counts: it is not made again."""
        from mlflow.entities import ViewType

        if not trials:
            return
        since = int(1000 * min(trial.started for trial in trials))
        wanted = {trial.key for trial in trials}
        found: dict[str, list[Run]] = {}
        token = None
        while True:
            page = self._client.search_runs(
                [experiment],
                f"attributes.start_time >= {since}",
                run_view_type=ViewType.ALL,
                max_results=AT_ONCE,
                page_token=token,
            )
            for run in page:
                if (key := run.data.tags.get("hpo.key")) in wanted:
                    found.setdefault(key, []).append(run)
            if not (token := page.token):
                break
        for key, runs in found.items():
            first, *others = sorted(runs, key=_rank)
            for other in others:
                if other.info.lifecycle_stage == "active":
                    self._client.delete_run(other.info.run_id)
            tags = first.data.tags
            deleted = first.info.lifecycle_stage != "active"
            notes = {name: tags[name] for name in NOTES if name in tags}
            self._known[key] = _Known(first.info.run_id, _is_whole(first), notes, deleted)

    def _written(self, experiment: str, trial: EndedTrial, run: _Known | None) -> _Known:
        """The trial's run, begun anew or gone on with, with all that is known of the trial."""
        from mlflow.entities import Param

        points = _points(trial)
        if run is None:
            tags = {**trial.tags, "mlflow.source.name": "hpo", "mlflow.source.type": "JOB"}
            made = self._client.create_run(experiment, int(1000 * trial.started), _cut(tags), trial.name)
            run = self._known[trial.key] = _Known(made.info.run_id, False, {})
        else:
            points = self._lacking(run.run_id, points)
        params = [Param(name, str(value)[:TEXT_MOST]) for name, value in trial.params.items()]
        self._client.log_batch(run.run_id, params=params)
        for first in range(0, len(points), AT_ONCE):
            self._client.log_batch(run.run_id, metrics=points[first : first + AT_ONCE])
        self._client.set_terminated(run.run_id, STATUS[trial.state], int(1000 * trial.ended))
        run.whole = True
        return run

    def _lacking(self, run_id: str, points: list[Metric]) -> list[Metric]:
        """The points that a writer which was killed has not written: not every store drops what it has."""
        names = {point.key for point in points}
        had = {(name, each.step) for name in names for each in self._client.get_metric_history(run_id, name)}
        return [point for point in points if (point.key, point.step) not in had]

    def _annotate(self, run: _Known, trial: EndedTrial) -> None:
        for name in run.notes.keys() - trial.notes.keys():
            self._client.delete_tag(run.run_id, name)
        for name, value in trial.notes.items():
            if run.notes.get(name) != value:
                self._client.set_tag(run.run_id, name, value)
        run.notes = dict(trial.notes)


def _rank(run: Run) -> tuple[bool, bool, str]:
    return run.info.lifecycle_stage != "active", not _is_whole(run), run.info.run_id


def _is_whole(run: Run) -> bool:
    return run.info.status in STATUS.values()


def _points(trial: EndedTrial) -> list[Metric]:
    """All at the trial's end: when an epoch ended is not recorded."""
    from mlflow.entities import Metric

    at = int(1000 * trial.ended)
    last = max((epoch for series in trial.series.values() for epoch in series), default=0)
    points = [
        Metric(name, value, at, epoch) for name, by_epoch in trial.series.items() for epoch, value in by_epoch.items()
    ]
    return points + [Metric(name, value, at, last) for name, value in trial.figures.items()]


def _cut(tags: dict[str, str]) -> dict[str, str]:
    return {name: value[:TEXT_MOST] for name, value in tags.items()}
