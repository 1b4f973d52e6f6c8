"""optuna-dashboard below /dashboard, for browsers that are signed in; none of its routes can harm a study."""

from __future__ import annotations

import threading
from http import HTTPStatus
from http.cookies import CookieError, SimpleCookie
from typing import TYPE_CHECKING
from urllib.parse import quote

from a2wsgi import WSGIMiddleware
from bottle import HTTPError, request
from fastapi import FastAPI
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from hpo.dashboard.origins import same_origin
from hpo.dashboard.routes import DELETIONS, READS, STUDY, STUDY_FILES, TRIAL_FILES, Arguments, GuardedRoutes
from hpo.dashboard.server import Rejection, guarded_app, is_page
from hpo.service.access import COOKIE, check_owner, check_rate, check_role
from hpo.service.backend import Backend
from hpo.service.hosts import Hosts, refusal
from hpo.service.problems import Problem, answer
from hpo.storage.access import Token
from hpo.storage.trials import TrialStorage, trial_storage

if TYPE_CHECKING:
    from wsgiref.types import WSGIApplication, WSGIEnvironment

# Its script asks for these paths, wherever its page is.
PATHS = ("/dashboard", "/api", "/static", "/artifacts", "/csv", "/favicon.ico", "/incompatible-rdb-schema")
THREADS = 4  # requests to it at once
RETRY_S = 5.0  # how long a request waits for a database that is out of reach
VISITOR = "hpo.visitor"  # where the door leaves the token in a request's environment

_NO_FILES = "files are sent with a study or a prediction, not to the dashboard: use /new, or POST /v1/data"
_NO_DELETION = "files of trials go with their study, which is deleted on its page below /studies, or by `hpo delete`"
CLOSED = {
    ("POST", STUDY_FILES): _NO_FILES,
    ("POST", TRIAL_FILES): _NO_FILES,
    **{("DELETE", rule): _NO_DELETION for rule in DELETIONS},
    ("DELETE", STUDY): "a study is deleted on its page below /studies, or by `hpo delete`: its checkpoints go with it",
    (
        "POST",
        "/api/studies",
    ): "a study made here has no plan and no worker serves it: use /new, or `hpo launch`",
}


class Dashboard:
    """The ASGI application; opened at its first request."""

    def __init__(self, backend: Backend, hosts: Hosts) -> None:
        self._backend, self._hosts = backend, hosts
        self._opening = threading.Lock()
        self._storage: TrialStorage | None = None
        self._app: WSGIApplication | None = None
        self._server = WSGIMiddleware(self._answered, workers=THREADS)  # type: ignore[arg-type]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not scope["query_string"].isascii():  # which WSGI cannot say
            await answer(HTTPStatus.BAD_REQUEST, "the address holds letters that are not encoded")(scope, receive, send)
            return
        await self._server(scope, receive, send)  # type: ignore[arg-type]

    def close(self) -> None:
        """Close its connection to the database."""
        self._server.executor.shutdown(wait=False)
        if self._storage is not None:
            self._storage.close()

    def _answered(self, environ: WSGIEnvironment, start_response: object) -> object:
        return self._opened()(environ, start_response)  # type: ignore[arg-type]

    def _opened(self) -> WSGIApplication:
        with self._opening:
            if self._app is None:
                self._storage = trial_storage(self._backend.url, RETRY_S)
                routes = GuardedRoutes(
                    self._storage, allow_delete=False, closed=CLOSED, check_writer=_Writers(self._backend).check
                )
                door = _SignedIn(self._backend, self._hosts)
                self._app = guarded_app(self._storage, self._backend.store, door, routes)
            return self._app


def mount_dashboard(app: FastAPI, backend: Backend, hosts: Hosts) -> Dashboard:
    """Serve the dashboard's paths."""
    found = Dashboard(backend, hosts)
    for path in PATHS:
        app.router.routes += [Route(path, found), Route(f"{path}/{{rest:path}}", found)]
    return found


class _SignedIn:
    """Every request comes from a browser that is signed in; its page leads the others to the log-in."""

    def __init__(self, backend: Backend, hosts: Hosts) -> None:
        self._backend, self._hosts = backend, hosts

    def rejection(self, environ: WSGIEnvironment) -> Rejection | None:
        host = environ.get("HTTP_HOST", "")
        if not self._hosts.admits(host):
            return Rejection(HTTPStatus.FORBIDDEN, refusal(host))
        visitor = self._visitor(environ.get("HTTP_COOKIE", ""))
        if visitor is None:
            path = environ["PATH_INFO"]
            if is_page(path):
                where = (("Location", f"/login?next={quote(path)}"),)
                return Rejection(HTTPStatus.SEE_OTHER, "sign in first", where)
            return Rejection(HTTPStatus.UNAUTHORIZED, "sign in first, at /login")
        environ[VISITOR] = visitor
        if environ["REQUEST_METHOD"] in READS:
            return None
        if not same_origin(environ.get("HTTP_SEC_FETCH_SITE"), environ.get("HTTP_ORIGIN"), host):
            return Rejection(HTTPStatus.FORBIDDEN, "a page of another site may not change studies")
        return None

    def greeting(self, environ: WSGIEnvironment) -> list[tuple[str, str]]:
        return []

    def _visitor(self, cookies: str) -> Token | None:
        try:
            found = SimpleCookie(cookies).get(COOKIE)
        except CookieError:
            return None
        if found is None:
            return None
        with self._backend.database() as database:
            return database.sessions.holder(found.value)


class _Writers:
    """Notes and attributes are written by a study's owner or an admin; the audit has them."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def check(self, args: Arguments) -> None:
        """Raise HTTPError for a visitor who may not write there."""
        visitor: Token = request.environ[VISITOR]
        study_id, trial_id = args.get("study_id"), args.get("trial_id")
        with self._backend.database() as database:
            found = database.access.annotated(study_id=study_id, trial_id=trial_id)
            if found is None:
                raise HTTPError(404, "there is no such study or trial")
            name, owner = found
            try:
                check_role(visitor, "submit")
                check_owner(visitor, owner, f"study {name!r}")
                check_rate(self._backend, visitor)
            except Problem as problem:
                raise HTTPError(int(problem.status), str(problem)) from None
            database.access.note(visitor, "study.annotate", name, {"path": request.path})
