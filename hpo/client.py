"""The service from elsewhere: `hpo.connect(url, token)`, and what the commands use where HPO_SERVER is set.

It needs neither the database's password nor torch. What it asks for is safe to repeat, so a lost connection, or a
server that is restarted, is waited out.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import httpx
from pydantic import TypeAdapter

from hpo.errors import HpoError
from hpo.models.class_scores import ModelScores
from hpo.models.data.columns import ROLES
from hpo.service.schemas import Change, DataFile, Log, Model, Notice, Prediction, Study, Trial, TrialDetails
from hpo.study.config import ConfigError, default_name, tables_of
from hpo.study.trial_table import TrialTable
from hpo.temporary import temporary_folder

if TYPE_CHECKING:
    import pandas as pd

    from hpo.storage.registry import ModelVersion
    from hpo.storage.snapshot import Snapshot

T = TypeVar("T")
RETRY_S = 60.0  # how long a service that does not answer is asked again
PAUSE_S = 0.5  # before it is asked again for the first time
LONGEST_PAUSE_S = 5.0
PASSING = (408, 429, 502, 503, 504)  # statuses after which the same request may be served
TIMEOUT = httpx.Timeout(60.0, connect=10.0)
STREAM = httpx.Timeout(30.0, connect=10.0)  # a stream of events says something at least so often
BLOCK = 2**20


class ServiceError(HpoError):
    """The service does not serve the request; the message is its own."""

    def __init__(self, message: str, status: int | None = None, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.status = status  # of HTTP; None where nothing answered
        self.retry_after_s = retry_after_s  # before which it asks not to be asked again


def connect(url: str | None = None, token: str | None = None, retry_s: float = RETRY_S) -> Client:
    """A client of the service at `url`, without one of HPO_SERVER; the token is HPO_TOKEN's without one.

    retry_s: how long a service that does not answer is asked again. Raises ServiceError.
    """
    url, token = url or os.environ.get("HPO_SERVER"), token or os.environ.get("HPO_TOKEN")
    if not url:
        raise ServiceError("which service? Give its URL, or set HPO_SERVER")
    if not token:
        raise ServiceError("the service wants a token: set HPO_TOKEN to one that `hpo token create` has made")
    return Client(url, token, retry_s)


class Client:
    """See `connect`. A context manager, which closes its connections."""

    def __init__(self, url: str, token: str, retry_s: float = RETRY_S) -> None:
        self.url, self._retry_s = url.rstrip("/"), retry_s
        self._http = httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {token}"}, timeout=TIMEOUT)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    # -------------------------------------------------------------------------------------------------------- data

    def upload(self, path: str | Path, **columns: str) -> str:
        """The key of a data file, which is sent unless the service has it. Raises ServiceError and OSError.

        columns: label, id, step and group name those of a table.
        """
        path = Path(path)
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        for found in self._ask("GET", "/v1/data", params={"sha256": digest}).json():
            if Path(found["key"]).suffixes == path.suffixes:  # read as the same format
                return str(found["key"])
        return self.check(path, **columns).key

    def check(self, path: str | Path, **columns: str) -> DataFile:
        """Send a data file; what the service has read from it."""
        path = Path(path)
        answer = self._ask("POST", "/v1/data", files=path, params=columns)
        return DataFile.model_validate(answer.json())

    # ----------------------------------------------------------------------------------------------------- studies

    def submit(self, study: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Study:
        """Open the study of a file (TOML, or bare data), whose data files are sent first, or of its tables.

        The same content submitted again is the same study. Raises ServiceError, with the differences where another
        study has that name, and ConfigError.
        """
        if isinstance(study, Mapping):
            tables, folder = json.loads(json.dumps(study)), Path()
        else:
            tables, folder = tables_of(Path(study), overrides), Path(study).parent
        keyed = self._with_keys(tables, folder)
        try:
            return self._submit(keyed)
        except ServiceError as error:
            if error.status != httpx.codes.UNPROCESSABLE_ENTITY or self._has_data(keyed["data"]):
                raise
        return self._submit(self._with_keys(tables, folder))  # data that were removed a moment ago are sent again

    def _submit(self, tables: dict[str, Any]) -> Study:
        content = json.dumps(tables, sort_keys=True, default=str)
        key = hashlib.sha256(content.encode()).hexdigest()
        headers = {"Idempotency-Key": key, "Content-Type": "application/json"}
        return Study.model_validate(self._ask("POST", "/v1/studies", content=content, headers=headers).json())

    def _has_data(self, data: Mapping[str, Any]) -> bool:
        """Whether the service still has the data files of these keys: what nobody has used for a week it removes."""
        try:
            for part in ("train", "test"):
                if part in data:
                    self._ask("GET", f"/v1/data/{data[part]}")
        except ServiceError as error:
            if error.status == httpx.codes.NOT_FOUND:
                return False
            raise
        return True

    def studies(self) -> list[Study]:
        """The newest hundred."""
        return [Study.model_validate(each) for each in self._ask("GET", "/v1/studies").json()]

    def study(self, name: str) -> Study:
        """One study, as it is now."""
        return Study.model_validate(self._ask("GET", f"/v1/studies/{name}").json())

    def trials(self, name: str) -> Iterator[Trial]:
        """All of them, by number."""
        total, offset = 1, 0
        while offset < total:
            page = self._ask("GET", f"/v1/studies/{name}/trials", params={"offset": offset, "limit": 1000}).json()
            total, offset = page["total"], offset + 1000
            yield from map(Trial.model_validate, page["trials"])

    def frame(self, name: str) -> pd.DataFrame:
        """All trials, as `hpo.trials` has those of a database; an earlier service says less of each.

        Raises HpoError without pandas.
        """
        return TrialTable.of(each.model_dump(mode="json") for each in self.trials(name)).frame()

    def trial(self, name: str, number: int) -> TrialDetails:
        """One trial, with its learning curve and its log."""
        return TrialDetails.model_validate(self._ask("GET", f"/v1/studies/{name}/trials/{number}").json())

    def logs(self, name: str, worker: str | None = None, lines: int = 20) -> list[Log]:
        """The last lines of its workers' logs, where they write on the service's machine; of others where they lie."""
        wanted = {"lines": lines} | ({} if worker is None else {"worker": worker})
        found = self._ask("GET", f"/v1/studies/{name}/logs", params=wanted).json()
        return [Log.model_validate(each) for each in found]

    def follow(self, name: str) -> Iterator[Study]:
        """The study whenever it changes, until it is over; a lost connection is made again."""
        last, lost_since = None, None
        while True:
            headers: dict[str, str] = {} if last is None else {"Last-Event-ID": last}
            try:
                with self._http.stream("GET", f"/v1/studies/{name}/events", headers=headers, timeout=STREAM) as stream:
                    _check(stream)
                    lost_since = None
                    for event in _events(stream):
                        if event.get("event") == "error":
                            break
                        if "data" in event:
                            last = event.get("id", last)
                            yield Study.model_validate_json(event["data"])
                        if event.get("event") == "end":
                            return
            except httpx.TransportError:
                pass
            except ServiceError as error:
                if error.status not in PASSING:
                    raise
            lost_since = lost_since or time.monotonic()
            if time.monotonic() - lost_since > self._retry_s:
                raise ServiceError(f"{self.url} does not answer any more; the study goes on: hpo status {name}")
            time.sleep(PAUSE_S)

    def summary(self, name: str) -> dict[str, Any]:
        """What a study that is over has brought. Raises ServiceError where it has no model."""
        found: dict[str, Any] = self._ask("GET", f"/v1/studies/{name}/summary").json()
        return found

    def notices(self, name: str) -> list[Notice]:
        """What was sent to the study's [notify] url, the newest first."""
        return [Notice.model_validate(each) for each in self._ask("GET", f"/v1/studies/{name}/notices").json()]

    def changes(self, name: str) -> list[Change]:
        """What was changed of a study after it began, oldest first."""
        return [Change.model_validate(each) for each in self._ask("GET", f"/v1/studies/{name}/changes").json()]

    def stop(self, name: str) -> Study:
        """End a study for all its workers."""
        return Study.model_validate(self._ask("POST", f"/v1/studies/{name}/stop").json())

    def resume(self, name: str, trials: int | None = None, patience: int | None = None) -> Study:
        """Go on with a study that was stopped, or with more trials, or more patience (0: without end)."""
        wanted = {"trials": trials} | ({} if patience is None else {"patience": patience})
        return Study.model_validate(self._ask("POST", f"/v1/studies/{name}/resume", json=wanted).json())

    def promote(self, name: str, trial: int | None = None, *, default: bool = False) -> Model:
        """Make a trial's model a new version: the best one's without `trial`."""
        wanted = {"default": default} | ({} if trial is None else {"trial": trial})
        return Model.model_validate(self._ask("POST", f"/v1/studies/{name}/promote", params=wanted).json())

    def drop(self, name: str, number: int, reason: str) -> Trial:
        """Let a finished trial count no more, for sampler, pruner, ranking and promotion; its record stays."""
        answer = self._ask("POST", f"/v1/studies/{name}/trials/{number}/drop", json={"reason": reason})
        return Trial.model_validate(answer.json())

    def restore(self, name: str, number: int) -> Trial:
        """Let a trial that was dropped count again."""
        return Trial.model_validate(self._ask("POST", f"/v1/studies/{name}/trials/{number}/restore").json())

    def delete(self, name: str) -> None:
        """Remove a study with its trials; promoted models stay."""
        self._ask("DELETE", f"/v1/studies/{name}")

    # ------------------------------------------------------------------------------------------------------ models

    def models(self) -> list[Model]:
        """Every version, by name and number."""
        return [Model.model_validate(each) for each in self._ask("GET", "/v1/models").json()]

    def model(self, name: str, version: int | str = "latest") -> Model:
        """One version, by its number or an alias."""
        return Model.model_validate(self._ask("GET", f"/v1/models/{name}/{version}").json())

    def scores(self, name: str, version: int | str = "latest") -> ModelScores:
        """A version's parts by class and by group; what the groups are called is for the study's owner and admins."""
        found = self._ask("GET", f"/v1/models/{name}/{version}/scores").json()
        return TypeAdapter(ModelScores).validate_python(found)

    def report(self, study: str) -> str:
        """The report of a study, over or not, as HTML; values of its data are for the study's owner and admins."""
        return self._ask("GET", f"/v1/studies/{study}/report").text

    def download(self, name: str, out: str | Path, version: int | str = "latest") -> Path:
        """Write the folder of a version, which `hpo.load` reads, to `out`, a new one; it appears whole or not at all.

        Raises ServiceError and OSError.
        """
        out = Path(out)
        if out.exists():
            raise ServiceError(f"{out} is there already: name a new folder")
        with temporary_folder(out.absolute().parent, "part") as part:
            self._until_answered(lambda: self._fetch(f"/v1/models/{name}/{version}/bundle", part / "bundle.zip"))
            (part / "model").mkdir()
            with zipfile.ZipFile(part / "bundle.zip") as archive:
                for entry in archive.infolist():
                    (part / "model" / Path(entry.filename).name).write_bytes(archive.read(entry))
            (part / "model").rename(out)
        return out

    def predict(
        self,
        name: str,
        data: str | Path | Sequence[Any],
        version: int | str = "latest",
        *,
        steps: Sequence[Sequence[Any]] | None = None,
        **columns: str,
    ) -> Prediction:
        """Class and probabilities of the sequences of a data file, or of lists of steps of values.

        steps: of lists, where those of each sequence are, numbers or texts of times; needed by a model that is told
        times. columns: label, id, step, group, time and weight, where those of the file are not called as in training.
        """
        path = f"/v1/models/{name}/{version}/predict"
        if isinstance(data, str | Path):
            answer = self._ask("POST", path, files=Path(data), params=columns)
        else:
            given = [getattr(sequence, "tolist", lambda sequence=sequence: sequence)() for sequence in data]
            more = {} if steps is None else {"steps": [list(row) for row in steps]}
            answer = self._ask("POST", path, json={"sequences": given, **more})
        return Prediction.model_validate(answer.json())

    # ------------------------------------------------------------------------------------------------------ asking

    def _with_keys(self, tables: dict[str, Any], folder: Path) -> dict[str, Any]:
        """The tables with the keys of their data files, which are sent, and the name that their data give them."""
        data = tables.get("data")
        if not isinstance(data, dict) or not isinstance(data.get("train"), str):
            raise ConfigError("a study needs [data] train, the path of a data file")
        columns = {role: data[role] for role in ROLES if isinstance(data.get(role), str)}
        keys = {
            part: self.upload((folder / data[part]).expanduser(), **columns)
            for part in ("train", "test")
            if isinstance(data.get(part), str)
        }
        study = {"name": default_name(data["train"]), **tables.get("study", {})}
        return {**tables, "study": study, "data": {**data, **keys}}

    def _ask(self, method: str, path: str, *, files: Path | None = None, **given: Any) -> httpx.Response:
        """The answer; see `_until_answered`. What was removed by a request whose answer was lost, is removed."""
        tries = 0

        def ask() -> httpx.Response:
            nonlocal tries
            tries += 1
            answer = self._send(method, path, files, given)
            if method != "DELETE" or tries == 1 or answer.status_code != httpx.codes.NOT_FOUND:
                _check(answer)
            return answer

        return self._until_answered(ask)

    def _until_answered(self, ask: Callable[[], T]) -> T:
        """What `ask` returns, called again while nothing answers, or with a status that passes. Raises ServiceError."""
        failed_since, pause = None, PAUSE_S
        while True:
            try:
                return ask()
            except httpx.TransportError as error:
                failure = ServiceError(f"{self.url} does not answer: {error}")
            except httpx.HTTPError as error:
                raise ServiceError(f"{self.url}: {error}") from None
            except ServiceError as error:
                if error.status not in PASSING:
                    raise
                failure = error
            failed_since = failed_since or time.monotonic()
            wait_s = max(pause, failure.retry_after_s)
            if time.monotonic() + wait_s > failed_since + self._retry_s:
                raise failure
            time.sleep(wait_s)
            pause = min(2 * pause, LONGEST_PAUSE_S)

    def _fetch(self, path: str, target: Path) -> None:
        with self._http.stream("GET", path) as stream:
            _check(stream)
            with target.open("wb") as file:
                for block in stream.iter_bytes(BLOCK):
                    file.write(block)

    def _send(self, method: str, path: str, files: Path | None, given: Mapping[str, Any]) -> httpx.Response:
        if files is None:
            return self._http.request(method, path, **given)
        with files.open("rb") as file:
            return self._http.request(method, path, files={"file": (files.name, file)}, **given)


def snapshot_of(study: Study) -> Snapshot:
    """What displays take; of its workers it knows the number alone."""
    from hpo.storage.snapshot import BestTrial, BeyondLimits, Dropped, FinalsProgress, InOrder, Snapshot, WorkerGroup
    from hpo.storage.terms import Standstill

    best = None
    if study.best is not None and study.best.value is not None:
        best = BestTrial(study.best.number, study.best.value)
    groups = (WorkerGroup(None, None, study.workers),) if study.workers else ()
    return Snapshot(
        study_id=0,
        name=study.name,
        status=study.status,
        budget=study.budget,
        started=sum(study.trials.get(state, 0) for state in ("complete", "pruned", "failed", "running")),
        seconds_left=study.seconds_left,
        promoted_version=study.version,
        counts=study.trials,
        best=best,
        in_flight=(),
        worker_groups=groups,
        rate_per_hour=study.per_hour,
        first_started_at=None,
        last_ended_at=None,
        metric=study.metric,
        owner=study.owner,
        priority=study.priority,
        max_workers=study.max_workers,
        dropped=tuple(Dropped(each.number, each.reason, each.by, each.when) for each in study.dropped),
        dropped_winner=study.dropped_winner,
        finals=None if study.finals is None else FinalsProgress(**study.finals.model_dump()),
        patience=study.patience,
        standstill=None if study.standstill is None else Standstill(study.standstill.since, study.standstill.trials),
        beyond=None if study.beyond_limits is None else BeyondLimits(**study.beyond_limits.model_dump()),
        in_order=None if study.in_order is None else InOrder(**study.in_order.model_dump()),
    )


def version_of(model: Model) -> ModelVersion:
    """What displays take."""
    from hpo.storage.registry import ModelVersion

    return ModelVersion(
        name=model.name,
        version=model.version,
        study_id=None,
        study_name=model.study,
        trial_number=model.trial,
        created_at=model.created,
        scores=model.scores,
        config={"params": model.params},
        artifacts={},
        aliases=tuple(model.aliases),
    )


def _check(answer: httpx.Response) -> None:
    """Raise ServiceError for what is no success."""
    if not answer.is_success:
        answer.read()
        after = answer.headers.get("retry-after", "")
        raise ServiceError(_reason(answer), answer.status_code, float(after) if after.isdecimal() else 0.0)


def _reason(answer: httpx.Response) -> str:
    """What the service says was wrong."""
    with suppress(ValueError, TypeError, KeyError):
        return str(answer.json()["detail"])
    return f"{answer.url} answers {answer.status_code} {answer.reason_phrase}"


def _events(stream: httpx.Response) -> Iterator[dict[str, str]]:
    event: dict[str, str] = {}
    for line in stream.iter_lines():
        if not line:
            yield event
            event = {}
        elif not line.startswith(":"):  # a comment, which says that the service is there
            name, _, value = line.partition(": ")
            event[name] = value
