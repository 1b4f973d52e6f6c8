"""The application: routes, who may use them, and what errors look like."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus
from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, FastAPI, Response
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from pydantic import BaseModel

from hpo.errors import HpoError
from hpo.service import data, models, studies
from hpo.service.access import Near, Uses
from hpo.service.backend import Backend
from hpo.service.body import BodyLimit
from hpo.service.metrics import MEDIA_TYPE as METRICS
from hpo.service.metrics import metrics_of
from hpo.service.observed import Observed
from hpo.service.problems import MEDIA_TYPE, Problem, answers_with_problems
from hpo.storage.tables import ensure

health = APIRouter(tags=["health"])
# What every route may answer, beside its own.
_PROBLEM: dict[str, Any] = {
    "description": "What was wrong, and what to do.",
    "content": {
        MEDIA_TYPE: {
            "schema": {
                "type": "object",
                "required": ["title", "status", "detail"],
                "properties": {
                    "type": {"type": "string"},
                    "title": {"type": "string"},
                    "status": {"type": "integer"},
                    "detail": {"type": "string"},
                },
            }
        }
    },
}
PROBLEMS: dict[int | str, dict[str, Any]] = {
    int(status): _PROBLEM
    for status in (
        HTTPStatus.BAD_REQUEST,
        HTTPStatus.UNAUTHORIZED,
        HTTPStatus.FORBIDDEN,
        HTTPStatus.NOT_FOUND,
        HTTPStatus.CONFLICT,
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
        HTTPStatus.UNPROCESSABLE_ENTITY,
        HTTPStatus.SERVICE_UNAVAILABLE,
    )
}


class Health(BaseModel):
    """That the process answers."""

    status: str


@health.get("/healthz")
def healthz() -> Health:
    """The process answers. The only route without a token."""
    return Health(status="ok")


@health.get("/readyz", dependencies=[Near], responses={int(HTTPStatus.SERVICE_UNAVAILABLE): _PROBLEM})
def readyz(backend: Uses) -> Health:
    """Database and artifact store answer, too."""
    try:
        ensure(backend.probe)
        backend.store.check()
    except HpoError as error:
        raise Problem(HTTPStatus.SERVICE_UNAVAILABLE, f"not ready: {error}", {"Retry-After": "5"}) from None
    return Health(status="ok")


@health.get(
    "/metrics",
    dependencies=[Near],
    response_class=PlainTextResponse,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
def metrics(backend: Uses) -> Response:
    """Studies, trials, workers, requests and predictions, for Prometheus."""
    return Response(metrics_of(backend), media_type=METRICS)


def make_app(backend: Backend) -> FastAPI:
    """The ASGI application over a database and an artifact store."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        backend.close()

    app = FastAPI(
        title="hpo",
        version=version("hpo"),
        description="Tune LSTM classifiers of sequences: send data and a study, watch it, take the model, predict.",
        lifespan=lifespan,
        openapi_url=None,  # its own routes would ask nobody
        docs_url=None,
        redoc_url=None,
    )
    app.state.backend = backend
    app.add_middleware(BodyLimit, limits=backend.limits)
    app.add_middleware(Observed, log_requests=backend.limits.log_requests)  # the last one sees all
    answers_with_problems(app)
    app.include_router(health)
    for part in (data, studies, models):
        app.include_router(part.router, responses=PROBLEMS)

    @app.get("/openapi.json", dependencies=[Near], include_in_schema=False)
    def openapi() -> JSONResponse:
        """What the routes take and answer."""
        return JSONResponse(app.openapi())

    @app.get("/docs", dependencies=[Near], include_in_schema=False)
    def docs() -> HTMLResponse:
        """The same, to read."""
        return get_swagger_ui_html(openapi_url="openapi.json", title="hpo")

    return app
