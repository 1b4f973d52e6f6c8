"""In and out: a token becomes a session of the browser."""

from __future__ import annotations

import math
from http import HTTPStatus
from typing import Annotated
from urllib.parse import urlsplit

from anyio.to_thread import run_sync
from fastapi import APIRouter, Query, Request, Response

from hpo.dashboard.guesses import Guesses
from hpo.service.access import COOKIE, Uses
from hpo.service.backend import Backend
from hpo.service.body import received_form
from hpo.service.pages.rendering import PageRoute, go, page
from hpo.service.pages.visitor import LOGIN, FromReader, check_host, check_origin, visitor_of

router = APIRouter(route_class=PageRoute, include_in_schema=False)


@router.get(LOGIN)
def login(request: Request, backend: Uses, next: Annotated[str, Query(max_length=2000)] = "/") -> Response:
    """The form for a token; who is signed in goes on."""
    check_host(request)
    if visitor_of(request) is not None:
        return go(_own(next))
    with backend.database() as database:
        return page(request, "login.html", next=_own(next), reason=None, anybody=database.access.any())


@router.post(LOGIN)
async def sign_in(request: Request, backend: Uses) -> Response:
    """Let the browser in with its token. Wrong ones are slowed, as the dashboard's passwords are."""
    check_host(request)
    check_origin(request)  # nobody signs another's browser in; a form token would need a session first
    async with received_form(request, files=1) as (fields, _):
        text, then = fields.get("token", "").strip(), _own(fields.get("next", "/"))
    return await run_sync(_signed_in, request, backend, text, then)


@router.post("/logout")
def sign_out(request: Request, backend: Uses, form: FromReader) -> Response:
    """End the session, in the database too."""
    with backend.database() as database:
        database.sessions.end(request.cookies[COOKIE])
        database.access.note(form.token, "session.end", form.token.owner)
    answer = go(LOGIN)
    answer.delete_cookie(COOKIE, path="/", httponly=True, samesite="lax")
    return answer


def _signed_in(request: Request, backend: Backend, text: str, then: str) -> Response:
    guesses: Guesses = request.app.state.guesses
    with backend.database() as database:
        token = database.access.holder(text)
        address = "" if request.client is None else request.client.host
        wait_s = math.ceil(guesses.wait_s(address, right=token is not None))
        if token is None or wait_s:
            status, headers = HTTPStatus.UNAUTHORIZED, {}
            reason = "this token is not known, has expired or was revoked; `hpo token create` makes one"
            if wait_s:
                status, headers = HTTPStatus.TOO_MANY_REQUESTS, {"Retry-After": str(wait_s)}
                reason = f"too many wrong tokens; try again in {wait_s} s"
            anybody = database.access.any()
            return page(request, "login.html", status, headers, next=then, reason=reason, anybody=anybody)
        cookie, lasts_s = database.sessions.begin(token)
        database.access.note(token, "session.begin", token.owner)
    answer = go(then)
    # Lax: a link in a message leads into the pages, which change nothing when they are read.
    answer.set_cookie(
        COOKIE, cookie, int(lasts_s), path="/", secure=request.url.scheme == "https", httponly=True, samesite="lax"
    )
    return answer


def _own(path: str) -> str:
    """A path of these pages; the first one for anything that leads elsewhere."""
    found = urlsplit(path)
    own = path.startswith("/") and not path.startswith(("//", "/\\")) and not found.scheme and not found.netloc
    return path if own and path.isprintable() and path.isascii() else "/"
