"""Who asks: the token of a request, and whether its role is enough."""

from __future__ import annotations

import ipaddress
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Annotated

from fastapi import Depends, Path, Query, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from hpo.service.backend import Backend
from hpo.service.hosts import Hosts
from hpo.service.problems import Problem
from hpo.storage.access import Token

COOKIE = "hpo-session"  # of a browser that is signed in
_bearer = HTTPBearer(auto_error=False, description="A token of `hpo token create`.")


async def backend_of(request: Request) -> Backend:
    """What the routes share."""
    found: Backend = request.app.state.backend
    return found


def hosts_of(request: Request) -> Hosts:
    """The names that pages are served by."""
    found: Hosts = request.app.state.hosts
    return found


def signed_in(request: Request) -> Token | None:
    """The token of a browser that is signed in. Raises Problem where it asks by a name that is not ours."""
    cookie = request.cookies.get(COOKIE)
    if cookie is None:
        return None
    hosts_of(request).check(request.headers.get("host", ""))
    backend: Backend = request.app.state.backend
    with backend.database() as database:
        found = database.sessions.holder(cookie)
    request.state.token = found  # for the log
    return found


def _token(
    request: Request,
    given: Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)],
) -> Token:
    """The token that the request carries. Raises Problem (401) without one that opens the door."""
    token = None
    if given is not None:
        backend: Backend = request.app.state.backend
        with backend.database() as database:
            token = database.access.holder(given.credentials)
    request.state.token = opened(token, shown=given is not None)  # for the log
    found: Token = request.state.token
    return found


def opened(token: Token | None, *, shown: bool = True) -> Token:
    """The token that was found. Raises Problem (401) where none was. shown: whether the request carries one."""
    if token is None:
        why = "this token is not known, has expired or was revoked" if shown else "a token is needed"
        reason = f"{why}: send Authorization: Bearer TOKEN; `hpo token create` makes one"
        raise Problem(HTTPStatus.UNAUTHORIZED, reason, {"WWW-Authenticate": 'Bearer realm="hpo"'})
    return token


async def bearer(request: Request) -> str | None:
    """The text of the token that the request carries."""
    given = await _bearer(request)
    return None if given is None else given.credentials


def _needs(role: str) -> Callable[[Request, Token], Awaitable[Token]]:
    async def allowed(request: Request, token: Annotated[Token, Depends(_token)]) -> Token:  # waits for nothing
        check_role(token, role)
        if role != "read":  # these routes change something
            check_rate(request.app.state.backend, token)
        return token

    return allowed


def check_rate(backend: Backend, token: Token) -> None:
    """Raise Problem (429) where the owner has changed too much in the last minute."""
    if wait_s := backend.writes.wait_s(token.owner):
        reason = f"{token.owner} may change something {backend.writes.most} times a minute: try again in {wait_s} s"
        raise Problem(HTTPStatus.TOO_MANY_REQUESTS, reason, {"Retry-After": str(wait_s)})


def check_role(token: Token, role: str) -> None:
    """Raise Problem (403) where the token's role is lower."""
    if not token.may(role):
        raise Problem(HTTPStatus.FORBIDDEN, f"this needs the role {role!r}, the token's is {token.role!r}")


Column = Annotated[str, Query(max_length=200)]  # the name of a table's column
Version = Annotated[str, Path(max_length=100, description="A number, or an alias such as latest.")]  # of a model
Uses = Annotated[Backend, Depends(backend_of)]
Reader = Annotated[Token, Depends(_needs("read"))]
Submitter = Annotated[Token, Depends(_needs("submit"))]
Admin = Annotated[Token, Depends(_needs("admin"))]


def _near(
    request: Request,
    given: Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)],
) -> None:
    """Raise Problem (401) for a request from another machine without a token or a session."""
    try:
        near = request.client is not None and ipaddress.ip_address(request.client.host).is_loopback
    except ValueError:
        near = False
    if not near and (given is not None or signed_in(request) is None):
        _token(request, given)


Near = Depends(_near)  # from this machine, or with a token of any role, or signed in


def check_owner(token: Token, owner: str | None, what: str) -> None:
    """Raise Problem (403) where what belongs to another owner; an admin may do with all."""
    if not token.may("admin") and owner != token.owner:
        whose = "nobody's of this service" if owner is None else f"{owner}'s"
        raise Problem(HTTPStatus.FORBIDDEN, f"{what} is {whose}: only its owner or an admin may do this")
