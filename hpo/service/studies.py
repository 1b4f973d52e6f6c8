"""Studies: submitted once however often that is repeated, watched, stopped, promoted, removed."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
import tomllib
from collections.abc import AsyncIterator, Mapping
from http import HTTPStatus
from typing import Annotated, Any

from anyio.to_thread import run_sync
from fastapi import APIRouter, Header, Path, Query, Request, Response
from fastapi.responses import HTMLResponse, StreamingResponse

from hpo.errors import HpoError
from hpo.launcher.logs import read_logs
from hpo.promote.promotion import promote_trial
from hpo.promote.report import report_of
from hpo.promote.summary import summary_of
from hpo.service.access import Reader, Submitter, Uses, check_owner
from hpo.service.backend import Backend, Database
from hpo.service.body import as_sent, json_of
from hpo.service.models import REPORT_HEADERS, knows_groups, model_of
from hpo.service.problems import Problem
from hpo.service.schemas import (
    Best,
    BeyondLimits,
    Budget,
    Change,
    Dropped,
    Finals,
    InOrder,
    Log,
    Model,
    Notice,
    Reason,
    Standstill,
    Study,
    Trial,
    TrialDetails,
    Trials,
)
from hpo.storage import changes, snapshot
from hpo.storage.access import Token
from hpo.storage.errors import MissingRecord
from hpo.storage.home import own_folder
from hpo.storage.keys import UPLOAD, uploaded_name
from hpo.storage.leases import UNCHANGED
from hpo.storage.masking import mask
from hpo.storage.notices import Notices
from hpo.storage.snapshot import Snapshot
from hpo.study.checks import NAME
from hpo.study.config import StudyConfig, config_of, default_name
from hpo.study.lifecycle import (
    create_or_open,
    delete_study,
    finals_name,
    open_study,
    over_by_patience,
    snapshots,
    study_id_of,
    trial_of,
    trial_rows,
)
from hpo.study.notes import log_of
from hpo.study.plan import MissingStudy, StudyConflict

router = APIRouter(prefix="/v1/studies", tags=["studies"])
LOOK_S = 0.5  # between two looks at a study whose events are followed
QUIET_S = 10.0  # after which a stream without events says that it is there
Number = Annotated[int, Path(ge=0, le=10**9)]
Key = Annotated[str | None, Header(alias="Idempotency-Key", min_length=1, max_length=200)]

_EXAMPLE = f"upload-{64 * '0'}-demand.csv"  # what POST /v1/data answers
_KEY = {"type": "string", "pattern": f"^{UPLOAD.pattern}$", "description": "A key that POST /v1/data gave."}
STUDY_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/toml": {
                "schema": {"type": "string"},
                "example": f'[study]\ntrials = 40\n\n[data]\ntrain = "{_EXAMPLE}"\n',
            },
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["data"],
                    "properties": {
                        "study": {
                            "type": "object",
                            "properties": {
                                "name": {"type": "string", "pattern": NAME.pattern},
                                "trials": {"type": "integer", "minimum": 1, "maximum": 2**31 - 1},
                            },
                        },
                        "data": {"type": "object", "required": ["train"], "properties": {"train": _KEY, "test": _KEY}},
                        "train": {"type": "object"},
                        "space": {"type": "object"},
                        "enqueue": {"type": "array", "items": {"type": "object"}},
                    },
                    "additionalProperties": False,
                },
                "example": {"study": {"trials": 40}, "data": {"train": _EXAMPLE}},
            },
        },
    }
}


EVENT = {
    "type": "object",
    "required": ["event", "data"],
    "properties": {
        "event": {"enum": ["progress", "end", "error"]},
        "id": {"type": "string"},
        "data": {"type": "string", "contentMediaType": "application/json"},
    },
}


@router.post("", status_code=HTTPStatus.CREATED, openapi_extra=STUDY_BODY, responses={200: {"model": Study}})
async def submit(
    request: Request, response: Response, token: Submitter, backend: Uses, idempotency_key: Key = None
) -> Study:
    """Open a study for the workers: a study file as TOML or JSON, whose [data] names keys of stored data files.

    Repeated with the same Idempotency-Key, or unchanged, it is the same study (200); with more trials, or a wider
    [space], it goes on. Another study of that name is a conflict (409), with the differences.
    """
    tables = _tables(request.headers.get("content-type", ""), await request.body())
    study, created = await run_sync(submit_study, backend, token, tables, idempotency_key)
    response.status_code = HTTPStatus.CREATED if created else HTTPStatus.OK
    response.headers["Location"] = f"/v1/studies/{study.name}"
    return study


@router.get("")
def studies(
    token: Reader,
    backend: Uses,
    offset: Annotated[int, Query(ge=0, le=10**6)] = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> list[Study]:
    """Studies, the newest first."""
    with backend.database() as database:
        page = database.leases.study_ids(limit, offset)
        return [_study(state) for state in reversed(database.leases.snapshots(page))]


@router.get("/{name}")
def study(name: str, token: Reader, backend: Uses) -> Study:
    """One study."""
    with backend.database() as database:
        return _state(database, name)


@router.get("/{name}/summary")
def summary(name: str, token: Reader, backend: Uses) -> dict[str, Any]:
    """What a study that is over has brought: its best trial, the promoted model and its scores (409 before)."""
    with backend.database() as database:
        study = open_study(name, database.storage)
        with_names = knows_groups(database, token, study.study_id)
        return summary_of(study, backend.store, with_names=with_names)


@router.get("/{name}/report", response_class=HTMLResponse)
def report(name: str, token: Reader, backend: Uses) -> HTMLResponse:
    """What the study was asked, what it found and how sure that is, over or not: one HTML file that needs nothing else.
    The sequences with the highest loss and what groups are called are for the study's owner and admins."""
    with backend.database() as database:
        study = open_study(name, database.storage)
        private = knows_groups(database, token, study.study_id)
        return HTMLResponse(report_of(study, backend.store, private=private), headers=REPORT_HEADERS)


@router.get("/{name}/notices")
def notices(name: str, token: Reader, backend: Uses, limit: Annotated[int, Query(ge=1, le=1000)] = 100) -> list[Notice]:
    """What was sent to the study's [notify] url, what waits, and why an attempt failed; the newest first."""
    with backend.database() as database:
        study_id_of(database.storage, name)  # 404 for one that there is not
        found = Notices(database.storage.connection).last(name, limit)
    return [
        Notice(
            notice=each.notice,
            event=each.event,
            state=each.state,
            attempts=each.attempts,
            fault=each.fault,
            created=each.created_at,
            next=each.next_at,
            delivered=each.delivered_at,
        )
        for each in found
    ]


@router.get("/{name}/changes")
def changed(name: str, token: Reader, backend: Uses) -> list[Change]:
    """What was changed of a study after it began, oldest first: trials dropped and restored, a wider space."""
    with backend.database() as database:
        found = changes.history(database.storage, study_id_of(database.storage, name))
    return [Change(**vars(each)) for each in found]


@router.get("/{name}/trials")
def trials(
    name: str,
    token: Reader,
    backend: Uses,
    offset: Annotated[int, Query(ge=0, le=10**9)] = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> Trials:
    """A study's trials, by number."""
    with backend.database() as database:
        study_id = study_id_of(database.storage, name)
        found, total = database.storage.page(study_id, offset, limit)
        rows = trial_rows(database.storage, study_id, found)
    return Trials(total=total, trials=list(map(Trial.model_validate, rows)))


@router.get("/{name}/trials/{number}")
def trial(name: str, number: Number, token: Reader, backend: Uses) -> TrialDetails:
    """One trial, with its learning curve and its log."""
    with backend.database() as database:
        found, shown = trial_of(database.storage, name, number), _trial(database, name, number)
    return TrialDetails(
        **vars(shown),
        reports={str(epoch): value for epoch, value in found.intermediate_values.items()},
        curve=found.user_attrs.get("curve", {}),
        seconds=shown.training_seconds,
        log=log_of(backend.store, found),
    )


@router.get("/{name}/finals")
def finals(name: str, token: Reader, backend: Uses) -> Study:
    """A study's finals: its best configurations, trained again on fresh seeds and splits (404 before they begin)."""
    return study(finals_name(name), token, backend)


@router.get("/{name}/finals/trials")
def trainings(
    name: str,
    token: Reader,
    backend: Uses,
    offset: Annotated[int, Query(ge=0, le=10**9)] = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> Trials:
    """The trials of a study's finals, by number: of each finalist the first repeat, then the second of each."""
    return trials(finals_name(name), token, backend, offset, limit)


@router.get("/{name}/finals/trials/{number}")
def training(name: str, number: Number, token: Reader, backend: Uses) -> TrialDetails:
    """One trial of a study's finals, with its learning curve and its log."""
    return trial(finals_name(name), number, token, backend)


@router.get("/{name}/logs")
def logs(
    name: str,
    token: Reader,
    backend: Uses,
    worker: Annotated[str | None, Query(max_length=300)] = None,
    lines: Annotated[int, Query(ge=1, le=10_000)] = 20,
) -> list[Log]:
    """The last lines of its workers' logs, of those that write on the service's machine; of others where they lie."""
    with backend.database() as database:
        study_id = study_id_of(database.storage, name)
        found = read_logs(database.leases, study_id, name, worker, lines, None)
    return [
        Log(host=each.host, path=each.path, title=each.title, workers=list(each.workers), text=each.text)
        for each in found
    ]


@router.get(
    "/{name}/events",
    response_class=StreamingResponse,
    responses={200: {"content": {"text/event-stream": {"schema": EVENT}}}},
)
async def events(
    name: str,
    request: Request,
    token: Reader,
    backend: Uses,
    last_event_id: Annotated[str | None, Header(alias="Last-Event-ID")] = None,
) -> StreamingResponse:
    """Server-sent events: `progress` whenever a trial begins or ends, `end` when the study is over.

    Each has the study as its data. After a lost connection, Last-Event-ID leaves out what was seen.
    """
    await run_sync(_named, backend, name)  # 404 now, not in the middle of the stream
    return StreamingResponse(_events(backend, name, request, last_event_id), media_type="text/event-stream")


@router.post("/{name}/stop")
def stop(name: str, token: Submitter, backend: Uses) -> Study:
    """End a study for all its workers; `resume` goes on with it."""
    with backend.database() as database:
        database.leases.stop(_owned(database, token, name))
        database.access.note(token, "study.stop", name)
        return _state(database, name)


@router.post("/{name}/resume")
def resume(name: str, token: Submitter, backend: Uses, budget: Budget | None = None) -> Study:
    """Go on with a study that was stopped, or with more trials, or more patience where its own is at its end (409)."""
    wanted = budget or Budget()
    patience = UNCHANGED if wanted.patience is None else wanted.patience or None
    with backend.database() as database:
        study_id = _owned(database, token, name)
        _check_patience(database, study_id, wanted.patience)
        database.leases.reopen(study_id, trials=wanted.trials, patience=patience)
        database.access.note(token, "study.resume", name, wanted.model_dump())
        return _state(database, name)


@router.post("/{name}/promote", status_code=HTTPStatus.CREATED)
def promote(
    name: str,
    token: Submitter,
    backend: Uses,
    trial: Annotated[int | None, Query(ge=0, le=10**9)] = None,
    default: bool = False,
) -> Model:
    """Make a trial's model a new version: the best one's without `trial`. `default`: the name alone means it."""
    with backend.database() as database:
        _owned(database, token, name)
        found = promote_trial(database.storage, name, trial, as_default=default)
        database.access.note(token, "study.promote", name, {"trial": found.trial_number, "version": found.version})
        return model_of(found)


@router.post("/{name}/trials/{number}/drop")
def drop(name: str, number: Number, token: Submitter, backend: Uses, why: Reason) -> Trial:
    """Let a finished trial count no more, for sampler, pruner, ranking and promotion. Its number, its record and its
    place in the budget stay; one that was dropped keeps its first reason."""
    with backend.database() as database:
        study_id = _owned(database, token, name)
        changes.drop(database.storage, study_id, [number], why.reason, token.owner)
        database.access.note(token, "trial.drop", name, {"trial": number, "reason": why.reason})
        return _trial(database, name, number)


@router.post("/{name}/trials/{number}/restore")
def restore(name: str, number: Number, token: Submitter, backend: Uses) -> Trial:
    """Let a trial that was dropped count again."""
    with backend.database() as database:
        study_id = _owned(database, token, name)
        changes.restore(database.storage, study_id, [number], token.owner)
        database.access.note(token, "trial.restore", name, {"trial": number})
        return _trial(database, name, number)


@router.delete("/{name}", status_code=HTTPStatus.NO_CONTENT)
def delete(name: str, token: Submitter, backend: Uses) -> None:
    """Remove a study with its trials and checkpoints. Promoted models stay."""
    with backend.database() as database:
        _owned(database, token, name)
        delete_study(database.storage, backend.store, name)
        database.access.note(token, "study.delete", name)


# ------------------------------------------------------------------------------------------------------- submitting


def _tables(content_type: str, body: bytes) -> dict[str, Any]:
    """The study file's tables. Raises Problem for what is neither TOML nor JSON."""
    kind = content_type.partition(";")[0].strip().lower()
    if kind == "application/json":
        found = json_of(body, "the study file")
    elif kind in ("", "application/toml", "text/plain", "application/x-www-form-urlencoded"):  # curl's own
        try:
            found = tomllib.loads(body.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise Problem(HTTPStatus.BAD_REQUEST, f"the study file is not valid TOML: {error}") from None
    else:
        reason = f"a study file is sent as application/toml or application/json, got {kind!r}"
        raise Problem(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, reason)
    if not isinstance(found, dict):
        raise Problem(HTTPStatus.BAD_REQUEST, "a study file is tables: [study], [data], [train], [space]")
    return found


def submit_study(backend: Backend, token: Token, tables: dict[str, Any], key: str | None) -> tuple[Study, bool]:
    """The study, and whether this has made it."""
    config = _config(backend, tables)
    name = config.study.name
    with backend.database() as database:
        if key is not None:
            database.access.claim(token.owner, key, name, _digest(tables))
        known = _known(database, name)
        if known is not None:
            _check_clash(database, token, known, name)
        with as_sent(own_folder("uploads")):
            opened = create_or_open(config, database.storage, backend.store, owner=token.owner)
        _check_clash(database, token, opened.study_id, name)  # whoever was first
        database.access.note(token, "study.submit", name, {"trials": config.study.trials})
        return _state(database, name), known is None


def _config(backend: Backend, tables: dict[str, Any]) -> StudyConfig:
    """The configuration whose data files lie on this machine. Raises ConfigError, and Problem for other data."""
    if "track" in tables:
        rule = "[track] is not taken by the service: its workers would write to folders and hosts that they alone reach"
        way = "leave it out, or have the study launched beside the database (`hpo launch`)"
        raise Problem(HTTPStatus.UNPROCESSABLE_ENTITY, f"{rule}; {way}")
    data = tables.get("data")
    if not isinstance(data, Mapping):
        raise Problem(HTTPStatus.UNPROCESSABLE_ENTITY, "a study needs [data] train, a key that POST /v1/data gave")
    for name in ("train", "test"):
        key = data.get(name)
        if key is None and name == "test":
            continue
        if not isinstance(key, str) or not UPLOAD.fullmatch(key) or not backend.store.renew(key):
            rule = "must be a key that POST /v1/data gave, and whose file is there"
            way = "one that nobody has used for a while (--keep-uploads of the service) is removed: send it again"
            reason = f"data.{name} {rule}, got {str(key)[:200]!r}; {way}"
            raise Problem(HTTPStatus.UNPROCESSABLE_ENTITY, reason)
        folder = backend.upload(key).parent
    study = tables.get("study", {})
    if isinstance(study, dict):
        tables = {**tables, "study": {"name": default_name(uploaded_name(data["train"])), **study}}
    with as_sent(folder):
        return config_of(tables, folder / "the study file")


def _digest(tables: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(tables, sort_keys=True, default=str).encode()).hexdigest()


def _known(database: Database, name: str) -> int | None:
    """The id of a study that `hpo` has made under that name."""
    try:
        study_id = database.storage.get_study_id_from_name(name)
    except MissingRecord:
        return None
    return None if database.leases.study(study_id) is None else study_id


def _check_clash(database: Database, token: Token, study_id: int, name: str) -> None:
    """Raise StudyConflict where the study of that name is another owner's: names are of the database, as workers,
    models and displays know a study by its name alone. Raises MissingStudy where it has been deleted meanwhile."""
    row = database.leases.study(study_id)
    if row is None:
        raise MissingStudy(f"study {name!r} was deleted while it was submitted: submit it again")
    if row.owner != token.owner and not token.may("admin"):
        whose = "was not submitted through the service" if row.owner is None else f"is {row.owner}'s"
        raise StudyConflict(f"a study named {name!r} is there already and {whose}; choose another [study] name")


# ---------------------------------------------------------------------------------------------------------- reading


def _owned(database: Database, token: Token, name: str) -> int:
    """The id of a study that the token's holder may change. Raises MissingStudy, and Problem for another's."""
    study_id = study_id_of(database.storage, name)
    row = database.leases.study(study_id)
    if row is None and not token.may("admin"):  # deleted a moment ago, or not there yet
        raise MissingStudy(f"there is no study named {name!r} that hpo has made")
    check_owner(token, None if row is None else row.owner, f"study {name!r}")
    return study_id


def _check_patience(database: Database, study_id: int, wanted: int | None) -> None:
    """Raise StudyConflict where a study that its patience ended would stay over, before anything is changed."""
    row = database.leases.study(study_id)
    if row is None or row.standstill is None or row.status == "stopped":
        return
    patience = row.patience if wanted is None else wanted or None
    if patience is not None and patience <= row.standstill.trials:
        raise StudyConflict(f"study {row.name!r} is {over_by_patience(row.standstill)}")


def _state(database: Database, name: str) -> Study:
    (found,) = snapshots(database.storage, database.leases, name)
    return _study(found)


def _named(backend: Backend, name: str) -> Study:
    with backend.database() as database:
        return _state(database, name)


def _study(state: Snapshot) -> Study:
    return Study(
        name=state.name,
        status=state.status,
        owner=state.owner,
        priority=state.priority,
        max_workers=state.max_workers,
        metric=state.metric,
        trials=dict(state.counts),
        budget=state.budget,
        best=None if state.best is None else Best(number=state.best.number, value=state.best.value),
        version=state.promoted_version,
        workers=state.workers,
        per_hour=state.rate_per_hour,
        seconds_left=state.seconds_left,
        dropped=list(map(_dropped, state.dropped)),
        dropped_winner=state.dropped_winner,
        finals=None if state.finals is None else Finals(**vars(state.finals)),
        patience=state.patience,
        standstill=None if state.standstill is None else Standstill(**vars(state.standstill)),
        beyond_limits=None if state.beyond is None else BeyondLimits(**vars(state.beyond)),
        in_order=None if state.in_order is None else InOrder(**vars(state.in_order)),
    )


def _dropped(found: snapshot.Dropped) -> Dropped:
    return Dropped(number=found.number, reason=found.reason, by=found.by, when=found.when)


def _trial(database: Database, name: str, number: int) -> Trial:
    """One trial as it is now. Raises MissingTrial and MissingStudy."""
    found = trial_of(database.storage, name, number)
    (row,) = trial_rows(database.storage, study_id_of(database.storage, name), [found])
    return Trial.model_validate(row)


# ----------------------------------------------------------------------------------------------------------- events


async def _events(backend: Backend, name: str, request: Request, seen: str | None) -> AsyncIterator[str]:
    """The study whenever it has changed; its state is the event's id, so that no process has to remember any."""
    said = time.monotonic()
    while not await request.is_disconnected():
        try:
            found = await run_sync(_named, backend, name)
        except HpoError as error:  # deleted, or the database is away: the client comes again, and is told
            yield f"event: error\ndata: {json.dumps(mask(str(error)))}\n\n"
            return
        over = found.status in ("finished", "stopped")
        now = _event_id(found)
        if now != seen or over:
            yield f"id: {now}\nevent: {'end' if over else 'progress'}\ndata: {found.model_dump_json()}\n\n"
            seen, said = now, time.monotonic()
        elif time.monotonic() - said > QUIET_S:
            yield ": nothing has changed\n\n"
            said = time.monotonic()
        if over:
            return
        await asyncio.sleep(LOOK_S)


def _event_id(found: Study) -> str:
    counts = "-".join(
        str(found.trials.get(state, 0)) for state in ("running", "complete", "pruned", "failed", "waiting")
    )
    dropped = "".join(f"-{each.number}" for each in found.dropped)
    finals = "" if found.finals is None else f"-finals-{found.finals.ended}"
    return f"{found.status}-{counts}-{found.version or 0}{dropped}{finals}"
