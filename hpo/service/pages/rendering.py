"""From a template and what it shows to an answer."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from http import HTTPStatus
from typing import Any
from urllib.parse import quote

from anyio.to_thread import run_sync
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, RedirectResponse
from fastapi.routing import APIRoute
from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.exceptions import HTTPException

from hpo.errors import HpoError
from hpo.report.words import FILTERS
from hpo.service.pages.visitor import LOGIN, Visitor, visitor_of
from hpo.service.problems import Problem, told
from hpo.storage.masking import mask

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_ENVIRONMENT = Environment(
    loader=PackageLoader("hpo.service.pages"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_ENVIRONMENT.filters.update(FILTERS, quoted=lambda text: quote(text, safe=""))


def page(
    request: Request, template: str, status: int = HTTPStatus.OK, headers: Mapping[str, str] | None = None, **shown: Any
) -> HTMLResponse:
    """The answer with a template's page, for the visitor of the request."""
    visitor: Visitor | None = getattr(request.state, "visitor", None)
    text = _ENVIRONMENT.get_template(template).render(visitor=visitor, path=request.url.path, **shown)
    return HTMLResponse(text, int(status), {**HEADERS, **(headers or {})})


def go(path: str) -> RedirectResponse:
    """After a form was taken: the page to see next, so that a reload does not send the form again."""
    return RedirectResponse(path, HTTPStatus.SEE_OTHER, {"Cache-Control": "no-store"})


class PageRoute(APIRoute):
    """A route whose errors are pages; one that needs a visitor leads to the log-in."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def answered(request: Request) -> Response:
            try:
                return await handler(request)
            except Problem as error:
                if error.status is HTTPStatus.UNAUTHORIZED and request.method == "GET":
                    return go(f"{LOGIN}?next={quote(request.url.path)}")
                return await failure(request, error.status, str(error), error.headers)
            except HpoError as error:
                return await failure(request, *told(request, error))
            except RequestValidationError as error:
                first = error.errors()[0]
                return await failure(request, HTTPStatus.UNPROCESSABLE_ENTITY, f"{first['loc'][-1]}: {first['msg']}")
            except HTTPException as error:
                return await failure(request, HTTPStatus(error.status_code), str(error.detail))

        return answered


def answers_with_pages(app: FastAPI) -> None:
    """A browser that asks for what is not there, and is no program that asks for the API, is answered by a page."""
    told_otherwise: Any = app.exception_handlers[HTTPException]

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        if request.url.path.startswith("/v1/") or "text/html" not in request.headers.get("accept", ""):
            answer: Response = await told_otherwise(request, error)
            return answer
        missing = error.status_code == HTTPStatus.NOT_FOUND
        return await failure(
            request, HTTPStatus(error.status_code), "there is no such page" if missing else str(error.detail)
        )


async def failure(
    request: Request, status: HTTPStatus, reason: str, headers: Mapping[str, str] | None = None
) -> HTMLResponse:
    """The page for a request that is not served."""
    if not hasattr(request.state, "visitor"):
        request.state.visitor = await run_sync(lambda: visitor_of(request, quiet=True))
    kept = {name: value for name, value in (headers or {}).items() if name != "WWW-Authenticate"}
    return page(request, "error.html", status, kept, code=status, reason=mask(reason))
