"""The application: routes, who may use them, and what errors look like."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus
from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, FastAPI, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import BaseModel
from starlette.staticfiles import StaticFiles

from hpo.dashboard.guesses import Guesses
from hpo.errors import HpoError
from hpo.service import data, models, predict, studies
from hpo.service.access import Near, Uses
from hpo.service.backend import Backend
from hpo.service.body import BodyLimit, PlainAddress
from hpo.service.dashboard import mount_dashboard
from hpo.service.hosts import Hosts
from hpo.service.metrics import MEDIA_TYPE as METRICS
from hpo.service.metrics import metrics_of
from hpo.service.observed import Observed
from hpo.service.pages import docs, new, signing
from hpo.service.pages import models as model_pages
from hpo.service.pages import studies as study_pages
from hpo.service.pages.rendering import answers_with_pages
from hpo.service.predictions import Predictor
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
        HTTPStatus.METHOD_NOT_ALLOWED,
        HTTPStatus.REQUEST_TIMEOUT,
        HTTPStatus.CONFLICT,
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
        HTTPStatus.UNPROCESSABLE_ENTITY,
        HTTPStatus.TOO_MANY_REQUESTS,
        HTTPStatus.SERVICE_UNAVAILABLE,
    )
}


class Health(BaseModel):
    """That the process answers."""

    status: str


@health.get("/healthz")
async def healthz() -> Health:
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


def make_app(backend: Backend, hosts: Hosts = Hosts()) -> FastAPI:
    """The ASGI application over a database and an artifact store; `hosts`: by which names it serves pages."""

    predictor = Predictor(backend)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        predictor.close()
        dashboard.close()
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
    app.state.backend, app.state.predictor = backend, predictor
    app.state.hosts, app.state.guesses = hosts, Guesses()
    app.add_middleware(BodyLimit, limits=backend.limits)
    app.add_middleware(PlainAddress)
    app.add_middleware(Observed, log_requests=backend.limits.log_requests)  # the last one sees all
    answers_with_problems(app)
    answers_with_pages(app)
    for part in (predict, data, studies, models):
        app.include_router(part.router, responses=PROBLEMS)
    app.include_router(health)
    for pages in (signing, new, study_pages, model_pages, docs):
        app.include_router(pages.router)
    app.mount("/assets", StaticFiles(packages=[("hpo.service.pages", "assets")]))
    dashboard = mount_dashboard(app, backend, hosts)

    @app.get("/openapi.json", dependencies=[Near], include_in_schema=False)
    def openapi() -> JSONResponse:
        """What the routes take and answer."""
        return JSONResponse(app.openapi())

    return app
