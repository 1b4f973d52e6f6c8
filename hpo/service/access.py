"""Who asks: the token of a request, and whether its role is enough."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from http import HTTPStatus
from typing import Annotated

from fastapi import Depends, Query, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from hpo.service.backend import Backend
from hpo.service.problems import Problem
from hpo.storage.access import Token

_bearer = HTTPBearer(auto_error=False, description="A token of `hpo token create`.")


def backend_of(request: Request) -> Backend:
    """What the routes share."""
    found: Backend = request.app.state.backend
    return found


def _token(
    request: Request,
    given: Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)],
) -> Token:
    """The token that the request carries. Raises Problem (401) without one that opens the door."""
    token = None
    if given is not None:
        with backend_of(request).database() as database:
            token = database.access.holder(given.credentials)
    if token is None:
        why = "a token is needed" if given is None else "this token is not known, has expired or was revoked"
        reason = f"{why}: send Authorization: Bearer TOKEN; `hpo token create` makes one"
        raise Problem(HTTPStatus.UNAUTHORIZED, reason, {"WWW-Authenticate": 'Bearer realm="hpo"'})
    request.state.token = token  # for the log
    return token


def _needs(role: str) -> Callable[[Token], Token]:
    def allowed(token: Annotated[Token, Depends(_token)]) -> Token:
        if not token.may(role):
            raise Problem(HTTPStatus.FORBIDDEN, f"this needs the role {role!r}, the token's is {token.role!r}")
        return token

    return allowed


Column = Annotated[str, Query(max_length=200)]  # the name of a table's column
Uses = Annotated[Backend, Depends(backend_of)]
Reader = Annotated[Token, Depends(_needs("read"))]
Submitter = Annotated[Token, Depends(_needs("submit"))]
Admin = Annotated[Token, Depends(_needs("admin"))]


def _near(
    request: Request,
    given: Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)],
) -> None:
    """Raise Problem (401) for a request from another machine without a token."""
    try:
        near = request.client is not None and ipaddress.ip_address(request.client.host).is_loopback
    except ValueError:
        near = False
    if not near:
        _token(request, given)


Near = Depends(_near)  # from this machine, or with a token of any role


def check_owner(token: Token, owner: str | None, what: str) -> None:
    """Raise Problem (403) where what belongs to another owner; an admin may do with all."""
    if not token.may("admin") and owner != token.owner:
        whose = "nobody's of this service" if owner is None else f"{owner}'s"
        raise Problem(HTTPStatus.FORBIDDEN, f"{what} is {whose}: only its owner or an admin may do this")
