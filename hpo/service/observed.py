"""Middleware: each request has an id, is measured, and is logged where that is asked for."""

from __future__ import annotations

import logging
import re
import time
import uuid
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hpo.errors import legible
from hpo.logs import about
from hpo.service.metrics import IN_FLIGHT, REQUESTS
from hpo.storage.access import Token

log = logging.getLogger("hpo.requests")

REQUEST_ID = "X-Request-Id"
PROBES = ("/healthz", "/readyz", "/metrics")  # asked for all the time: logged where they fail
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
GONE = 499  # the status of a request whose client went before it was answered, as proxies log it
_GIVEN = re.compile(r"[A-Za-z0-9._-]{1,100}")


class Observed:
    """The outermost middleware. The client's X-Request-Id, else a new one, is in the answer and in the log."""

    def __init__(self, app: ASGIApp, log_requests: bool) -> None:
        self._app, self._log_requests = app, log_requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(REQUEST_ID, "")
        request_id = given if _GIVEN.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        began_s, status, first_s = time.perf_counter(), GONE, None

        async def noted(message: Message) -> None:
            nonlocal status, first_s
            if message["type"] == "http.response.start":
                status, first_s = message["status"], time.perf_counter() - began_s
                MutableHeaders(scope=message)[REQUEST_ID] = request_id
            await send(message)

        with about(request_id=request_id), IN_FLIGHT.track_inprogress():
            try:
                await self._app(scope, receive, noted)
            except Exception:
                status = 500 if first_s is None else status
                raise
            finally:
                whole_s = time.perf_counter() - began_s
                self._note(scope, status, whole_s if first_s is None else first_s, whole_s)

    def _note(self, scope: Scope, status: int, first_s: float, whole_s: float) -> None:
        method = scope["method"] if scope["method"] in METHODS else "other"
        route = route_of(scope)
        REQUESTS.labels(method, route, str(status)).observe(first_s)
        if self._log_requests and (status >= 400 or route not in PROBES):
            _log(scope, method, route, status, whole_s)


def route_of(scope: Scope) -> str:
    """The template of the route that answered, never the path as a client wrote it: anybody can make up paths."""
    path = getattr(scope.get("route"), "path", None)
    if path is not None:
        return str(path)
    mounted = str(scope.get("root_path", "")).removeprefix(str(scope.get("app_root_path", "")))
    return mounted or "none"


def _log(scope: Scope, method: str, route: str, status: int, seconds: float) -> None:
    token: Token | None = scope["state"].get("token")
    path, milliseconds = legible(scope["path"]), round(1000 * seconds, 1)
    fields: dict[str, Any] = {"method": method, "route": route, "path": path, "status": status, "ms": milliseconds}
    who = "nobody"
    if token is not None:
        fields |= {"owner": token.owner, "token_id": token.token_id}
        who = f"{token.owner} ({token.token_id})"
    text = "%s %s: %d in %.1f ms, %s, request %s"
    request_id = scope["state"]["request_id"]
    log.info(text, method, path, status, milliseconds, who, request_id, extra={"fields": fields})
