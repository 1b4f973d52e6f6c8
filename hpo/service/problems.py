"""Errors as application/problem+json (RFC 9457), with the texts that the command line would print."""

from __future__ import annotations

import errno
import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match

from hpo.errors import HpoError, WorkerFault
from hpo.launcher.logs import LogsError
from hpo.models.bundle.config import BundleError
from hpo.models.data.buffers import NoRoom
from hpo.models.data.sequences import DataError
from hpo.models.device import OutOfMemory
from hpo.promote.summary import NoModel
from hpo.promote.weights import PromotionError
from hpo.storage.access import AccessError, SubmissionConflict
from hpo.storage.artifacts import ArtifactError, DamagedArtifactError, MissingArtifactError
from hpo.storage.changes import ReasonError, UnfinishedTrial
from hpo.storage.errors import DatabaseRefusal, MissingRecord, PostgresError
from hpo.storage.masking import mask
from hpo.storage.registry import MissingModel, NamedModel, RegistryError
from hpo.study.config import ConfigError
from hpo.study.plan import MissingStudy, MissingTrial, StudyConflict, StudyError

log = logging.getLogger("hpo")

MEDIA_TYPE = "application/problem+json"
RETRY_S = 5  # after which a client may ask again
# The first that fits decides.
STATUS: tuple[tuple[type[Exception], HTTPStatus], ...] = (
    (MissingStudy, HTTPStatus.NOT_FOUND),
    (MissingModel, HTTPStatus.NOT_FOUND),
    (MissingRecord, HTTPStatus.NOT_FOUND),
    (MissingArtifactError, HTTPStatus.NOT_FOUND),
    (LogsError, HTTPStatus.NOT_FOUND),
    (MissingTrial, HTTPStatus.NOT_FOUND),
    (StudyConflict, HTTPStatus.CONFLICT),
    (UnfinishedTrial, HTTPStatus.CONFLICT),
    (SubmissionConflict, HTTPStatus.CONFLICT),
    (NoModel, HTTPStatus.CONFLICT),
    (PromotionError, HTTPStatus.CONFLICT),
    (NamedModel, HTTPStatus.CONFLICT),
    (OutOfMemory, HTTPStatus.REQUEST_ENTITY_TOO_LARGE),
    (DamagedArtifactError, HTTPStatus.INTERNAL_SERVER_ERROR),
    (BundleError, HTTPStatus.INTERNAL_SERVER_ERROR),
    (DatabaseRefusal, HTTPStatus.SERVICE_UNAVAILABLE),
    (PostgresError, HTTPStatus.SERVICE_UNAVAILABLE),
    (ArtifactError, HTTPStatus.SERVICE_UNAVAILABLE),
    (NoRoom, HTTPStatus.SERVICE_UNAVAILABLE),
    (WorkerFault, HTTPStatus.SERVICE_UNAVAILABLE),
    (ConfigError, HTTPStatus.UNPROCESSABLE_ENTITY),
    (DataError, HTTPStatus.UNPROCESSABLE_ENTITY),
    (StudyError, HTTPStatus.UNPROCESSABLE_ENTITY),
    (RegistryError, HTTPStatus.UNPROCESSABLE_ENTITY),
    (AccessError, HTTPStatus.UNPROCESSABLE_ENTITY),
    (ReasonError, HTTPStatus.UNPROCESSABLE_ENTITY),
)


class Problem(HpoError):
    """A request that is not served."""

    def __init__(self, status: HTTPStatus, detail: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status, self.headers = status, dict(headers or {})


def answer(status: HTTPStatus, detail: str, headers: Mapping[str, str] | None = None, **more: Any) -> JSONResponse:
    """The document that says what was wrong and what to do."""
    content = {"type": "about:blank", "title": status.phrase, "status": int(status), "detail": mask(detail), **more}
    return JSONResponse(content, int(status), dict(headers or {}), MEDIA_TYPE)


def told(request: Request, error: HpoError) -> tuple[HTTPStatus, str]:
    """The status for an error and what the client is told; the log has what is no client's doing."""
    if isinstance(error, Problem):
        return error.status, str(error)
    status = next((status for kind, status in STATUS if isinstance(error, kind)), HTTPStatus.INTERNAL_SERVER_ERROR)
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        log.warning("%s %s: %s", request.method, request.url.path, " ".join(str(error).split()))
    return status, "the service's log says why" if isinstance(error, DatabaseRefusal) else str(error)


def answers_with_problems(app: FastAPI) -> None:
    """Every error of the app's routes is answered by a problem document."""

    @app.exception_handler(Problem)
    async def problem(_: Request, error: Problem) -> JSONResponse:
        return answer(error.status, str(error), error.headers)

    @app.exception_handler(HpoError)
    async def known(request: Request, error: HpoError) -> JSONResponse:
        status, detail = told(request, error)
        headers = {"Retry-After": str(RETRY_S)} if status is HTTPStatus.SERVICE_UNAVAILABLE else None
        return answer(status, detail, headers)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        if isinstance(error.__cause__, Problem):  # met while FastAPI read the body
            return await problem(request, error.__cause__)
        if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
            allowed = ", ".join(_methods(app, request))
            detail = f"{request.method} is not served here: {allowed} may be asked"
            return answer(HTTPStatus.METHOD_NOT_ALLOWED, detail, {"Allow": allowed})
        return answer(HTTPStatus(error.status_code), str(error.detail), error.headers)

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, _: ClientDisconnect) -> JSONResponse:
        return answer(HTTPStatus.BAD_REQUEST, "the body ends before its end")  # nobody reads it

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        faults = [{"at": ".".join(map(str, each["loc"])), "fault": each["msg"]} for each in error.errors()]
        detail = "; ".join(f"{each['at']}: {each['fault']}" for each in faults)
        return answer(HTTPStatus.UNPROCESSABLE_ENTITY, detail, faults=faults)

    @app.exception_handler(OSError)
    async def system(request: Request, error: OSError) -> JSONResponse:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            return await unforeseen(request, error)
        log.error("%s %s: %s", request.method, request.url.path, error)
        reason = "the service has no room for this at the moment"
        return answer(HTTPStatus.SERVICE_UNAVAILABLE, reason, {"Retry-After": str(RETRY_S)})

    @app.exception_handler(Exception)
    async def unforeseen(request: Request, error: Exception) -> JSONResponse:
        log.error("%s %s", request.method, request.url.path, exc_info=error)
        headers = {"X-Request-Id": request.state.request_id}  # by which the log is searched
        return answer(HTTPStatus.INTERNAL_SERVER_ERROR, "internal server error; the service's log has it", headers)


def _methods(app: FastAPI, request: Request) -> list[str]:
    """Those that are served at the request's address; the router names those of the first route there alone."""
    return [
        method
        for method in ("GET", "POST", "PUT", "PATCH", "DELETE")
        if any(route.matches({**request.scope, "method": method})[0] is Match.FULL for route in app.routes)
    ]
