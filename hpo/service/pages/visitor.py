"""Who looks at the pages: a browser that is signed in, and whether a form is one of ours."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Annotated

from fastapi import Depends, Request

from hpo.dashboard.origins import same_origin
from hpo.errors import HpoError
from hpo.service.access import COOKIE, check_rate, check_role, hosts_of, signed_in
from hpo.service.body import Received, received_form
from hpo.service.problems import Problem
from hpo.storage.access import Token

LOGIN = "/login"
FORM_TOKEN = "form_token"  # the field of every form, without which none is taken
FILES = 2  # of a form


@dataclass(frozen=True)
class Visitor:
    """The holder of a token, in a browser."""

    token: Token
    form_token: str  # in each form that this browser is given

    def may(self, role: str) -> bool:
        """Whether the token's role allows it."""
        return self.token.may(role)

    def owns(self, owner: str | None) -> bool:
        """Whether the visitor may change what belongs to that owner."""
        return self.may("admin") or (self.may("submit") and owner == self.token.owner)


@dataclass(frozen=True)
class Posted:
    """A form that one of our pages has sent."""

    visitor: Visitor
    fields: dict[str, str]
    files: dict[str, Received] = field(default_factory=dict)

    @property
    def token(self) -> Token:
        return self.visitor.token

    def text(self, name: str) -> str:
        """What was typed into a field; "" where nothing was."""
        return self.fields.get(name, "").strip()


def visitor_of(request: Request, *, quiet: bool = False) -> Visitor | None:
    """Whoever is signed in; None for nobody. quiet: also where the database is away."""
    try:
        token = signed_in(request)
    except HpoError:
        if not quiet:
            raise
        return None
    return None if token is None else Visitor(token, form_token(request.cookies[COOKIE]))


def form_token(cookie: str) -> str:
    """What a page's forms carry: nobody without the cookie can make it, and the cookie does not follow from it."""
    return hmac.new(cookie.encode("utf-8", "replace"), FORM_TOKEN.encode(), hashlib.sha256).hexdigest()


def check_host(request: Request) -> None:
    """Raise Problem for a name by which pages are not served."""
    hosts_of(request).check(request.headers.get("host", ""))


def check_origin(request: Request) -> None:
    """Raise Problem for a form that no page of ours has sent; browsers say which page sends one."""
    headers = request.headers
    if not same_origin(headers.get("sec-fetch-site"), headers.get("origin"), headers.get("host")):
        raise Problem(HTTPStatus.FORBIDDEN, "a page of another site may not do this: open it here and try again")


def _known(request: Request) -> Visitor:
    check_host(request)
    found = visitor_of(request)
    if found is None:
        raise Problem(HTTPStatus.UNAUTHORIZED, "sign in first; a session ends after some hours and with its token")
    request.state.visitor = found
    return found


def _needs(role: str) -> Callable[[Visitor], Visitor]:
    def allowed(visitor: Annotated[Visitor, Depends(_known)]) -> Visitor:
        check_role(visitor.token, role)
        return visitor

    return allowed


def _form_for(role: str) -> Callable[..., AsyncIterator[Posted]]:
    async def posted(request: Request, visitor: Visitor = Depends(_needs(role))) -> AsyncIterator[Posted]:
        check_origin(request)
        if role != "read":
            check_rate(request.app.state.backend, visitor.token)
        async with received_form(request, FILES) as (fields, files):
            if not hmac.compare_digest(fields.get(FORM_TOKEN, "").encode(), visitor.form_token.encode()):
                raise Problem(HTTPStatus.FORBIDDEN, "this form is of an earlier session: reload its page and try again")
            yield Posted(visitor, fields, files)

    return posted


Looks = Annotated[Visitor, Depends(_needs("read"))]
Submits = Annotated[Visitor, Depends(_needs("submit"))]
FromReader = Annotated[Posted, Depends(_form_for("read"))]
FromSubmitter = Annotated[Posted, Depends(_form_for("submit"))]
