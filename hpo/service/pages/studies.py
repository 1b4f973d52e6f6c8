"""The studies' pages: all of them with the models, one with its trials, and what may be done with it."""

from __future__ import annotations

import csv
from contextlib import suppress
from http import HTTPStatus
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import APIRouter, Header, Path, Query, Request, Response
from fastapi.responses import StreamingResponse

from hpo.errors import HpoError
from hpo.models.class_scores import Weak, weakest
from hpo.models.metrics import direction
from hpo.promote.version_scores import scores_if_known
from hpo.service import models, studies
from hpo.service.access import Uses
from hpo.service.backend import Backend
from hpo.service.pages.chart import chart, lines
from hpo.service.pages.rendering import PageRoute, go, page
from hpo.service.pages.scores import by_name
from hpo.service.pages.visitor import FromSubmitter, Looks
from hpo.service.problems import Problem, told
from hpo.service.schemas import Budget, Reason, Trial
from hpo.storage.access import Token
from hpo.storage.registry import MissingModel
from hpo.study.lifecycle import study_id_of

router = APIRouter(route_class=PageRoute, include_in_schema=False)
STUDIES = MODELS = 20  # of a page
TRIALS = 25
# What was done, as the page says it after the form was taken.
DONE = {
    "started": "The study has started.",
    "known": "This study is there already, with the same content.",
    "stopped": "The study is stopped. Trials that are running end at their next look at the database.",
    "resumed": "The study goes on.",
    "promoted": "The trial's model is a version now.",
    "deleted": "The study is deleted. Its promoted models stay.",
    "removed": "The model's last version is deleted.",
    "dropped": "The trial does not count any more. Its record stays.",
    "restored": "The trial counts again.",
}
Page = Annotated[int, Query(alias="page", ge=1, le=10**6)]
Number = Annotated[int, Path(ge=0, le=10**9)]
Done = Annotated[str | None, Query(max_length=20)]


@router.get("/")
def home(
    request: Request,
    visitor: Looks,
    backend: Uses,
    page_number: Page = 1,
    models_page: Annotated[int, Query(alias="models", ge=1, le=10**6)] = 1,
    done: Done = None,
) -> Response:
    """Studies with their progress, the newest first; models with their scores."""
    found = studies.studies(visitor.token, backend, (page_number - 1) * STUDIES, STUDIES + 1)
    named = by_name(models.models(visitor.token, backend))
    return page(
        request,
        "home.html",
        studies=found[:STUDIES],
        page_number=page_number,
        more=len(found) > STUDIES,
        models=named[(models_page - 1) * MODELS : models_page * MODELS],
        models_page=models_page,
        more_models=len(named) > models_page * MODELS,
        done=DONE.get(done or ""),
        idle=any(study.status == "open" and not study.workers for study in found),
    )


@router.get("/studies/{name}")
def study(
    name: str, request: Request, visitor: Looks, backend: Uses, page_number: Page = 1, done: Done = None
) -> Response:
    """One study: progress, values, trials, and what the visitor may do with it."""
    return _shown(request, backend, visitor.token, name, page_number, done=DONE.get(done or ""))


@router.get("/studies/{name}/report")
def report(name: str, visitor: Looks, backend: Uses) -> Response:
    """What the study found so far, as one page to keep."""
    return studies.report(name, visitor.token, backend)


@router.get("/studies/{name}/trials/{number}")
def trial(name: str, number: Number, request: Request, visitor: Looks, backend: Uses, done: Done = None) -> Response:
    """One trial: its curve, its parameters and its log, and whether it counts."""
    return _shown_trial(request, backend, visitor.token, name, number, done=DONE.get(done or ""))


def _shown_trial(
    request: Request,
    backend: Backend,
    token: Token,
    name: str,
    number: int,
    status: HTTPStatus = HTTPStatus.OK,
    *,
    done: str | None = None,
    failed: str | None = None,
    reason: str = "",
) -> Response:
    found = studies.trial(name, number, token, backend)
    state = studies.study(name, token, backend)
    reports = [found.reports[epoch] for epoch in sorted(found.reports, key=int)]
    curves = {state.metric or "value" if key == "value" else key: curve for key, curve in found.curve.items()}
    return page(
        request,
        "trial.html",
        status,
        done=done,
        failed=failed,
        reason=reason,
        study=state,
        trial=found,
        lines=lines(curves or {state.metric or "value": reports}),
        epochs=max(map(len, [reports, *found.curve.values()])),
        log=list(csv.reader(found.log.splitlines()[1:])) if found.log else [],
    )


@router.post("/studies/{name}/trials/{number}/{action}")
def act_on_trial(
    name: str, number: Number, action: str, request: Request, backend: Uses, form: FromSubmitter
) -> Response:
    """Drop or restore a trial; what went wrong is said on its page."""
    reason = form.text("reason")
    try:
        if action == "drop":
            why = Reason.model_construct(reason=reason)  # checked where it is stored
            studies.drop(name, number, form.token, backend, why)
            return go(f"{_path(name)}/trials/{number}?done=dropped")
        if action == "restore":
            studies.restore(name, number, form.token, backend)
            return go(f"{_path(name)}/trials/{number}?done=restored")
    except HpoError as error:
        status, text = told(request, error)
        if status is HTTPStatus.NOT_FOUND:
            raise
        return _shown_trial(request, backend, form.token, name, number, status, failed=text, reason=reason)
    raise Problem(HTTPStatus.NOT_FOUND, f"a trial is dropped or restored, not {action!r}")


@router.get("/studies/{name}/events")
async def events(
    name: str,
    request: Request,
    visitor: Looks,
    backend: Uses,
    last_event_id: Annotated[str | None, Header(alias="Last-Event-ID")] = None,
) -> StreamingResponse:
    """The study's events, for the script that keeps its page up to date."""
    return await studies.events(name, request, visitor.token, backend, last_event_id)


@router.post("/studies/{name}/{action}")
def act(name: str, action: str, request: Request, backend: Uses, form: FromSubmitter) -> Response:
    """Stop, resume, promote or delete a study; what went wrong is said on its page."""
    try:
        if action == "stop":
            studies.stop(name, form.token, backend)
            return go(f"{_path(name)}?done=stopped")
        if action == "resume":
            wanted = {what: _whole(form.text(what), what) for what in ("trials", "patience")}
            studies.resume(name, form.token, backend, Budget(**wanted))
            return go(f"{_path(name)}?done=resumed")
        if action == "promote":
            number = _whole(form.text("trial"), "trial")
            studies.promote(name, form.token, backend, number, default="default" in form.fields)
            return go(f"{_path(name)}?done=promoted")
        if action == "delete":
            studies.delete(name, form.token, backend)
            return go("/?done=deleted")
    except HpoError as error:
        status, reason = told(request, error)
        if status is HTTPStatus.NOT_FOUND and action != "promote":
            raise
        return _shown(request, backend, form.token, name, 1, status, failed={action: reason}, typed=form.fields)
    raise Problem(HTTPStatus.NOT_FOUND, f"a study is stopped, resumed, promoted or deleted, not {action!r}")


def _path(name: str) -> str:
    return f"/studies/{quote(name, safe='')}"


def _whole(text: str, what: str) -> int | None:
    """The number in a field; None for an empty one."""
    if not text:
        return None
    if not text.isdecimal() or len(text) > 9:
        raise Problem(HTTPStatus.UNPROCESSABLE_ENTITY, f"{what} must be a whole number, got {text[:50]!r}")
    return int(text)


def _shown(
    request: Request,
    backend: Backend,
    token: Token,
    name: str,
    page_number: int,
    status: HTTPStatus = HTTPStatus.OK,
    *,
    done: str | None = None,
    failed: dict[str, str] | None = None,
    typed: dict[str, str] | None = None,
) -> Response:
    found = studies.study(name, token, backend)
    everything = _trials(backend, token, name)
    newest = everything[::-1][(page_number - 1) * TRIALS : page_number * TRIALS]
    with backend.database() as database:
        study_id = study_id_of(database.storage, name)
    model: Any = None
    weak: Weak | None = None
    if found.version is not None:
        with suppress(MissingModel):  # deleted since
            model = models.model(name, str(found.version), token, backend)
            weak = _weak(backend, token, name, found.version, study_id)
    fixed = _fixed(everything)
    maximize = found.metric is None or direction(found.metric) == "maximize"
    return page(
        request,
        "study.html",
        status,
        study=found,
        study_id=study_id,
        model=model and by_name([model])[0].shown,
        weak=weak,
        chart=chart([each for each in everything if each.dropped is None], maximize=maximize),
        maximize=maximize,
        trials=newest,
        fixed=fixed,
        varied={name for trial in everything for name in trial.params} - set(fixed),
        total=len(everything),
        page_number=page_number,
        more=page_number * TRIALS < len(everything),
        done=done,
        failed=failed or {},
        typed=typed or {},
    )


def _weak(backend: Backend, token: Token, name: str, version: int, study_id: int) -> Weak | None:
    """Where a study's model fails, as far as that is known."""
    with backend.database() as database:
        with_names = models.knows_groups(database, token, study_id)
        found = scores_if_known(database.registry, name, version, backend.store, with_names=with_names)
    return None if found is None else weakest(found)


def _fixed(trials: list[Trial]) -> dict[str, Any]:
    """The parameters that are the same in all of several trials, which need no place in each row."""
    known = [trial.params for trial in trials if trial.params]
    if len(known) < 2:
        return {}
    return {name: value for name, value in known[0].items() if all(params.get(name) == value for params in known)}


def _trials(backend: Backend, token: Token, name: str) -> list[Trial]:
    """All of them, by number."""
    found: list[Trial] = []
    while True:
        some = studies.trials(name, token, backend, len(found), 1000)
        found += some.trials
        if not some.trials or len(found) >= some.total:
            return found
