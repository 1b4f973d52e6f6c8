"""optuna-dashboard for the studies of one database and their artifacts; off loopback it requires a password."""

from __future__ import annotations

import base64
import errno
import hashlib
import hmac
import ipaddress
import json
import logging
import math
import os
import re
import secrets
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, nullcontext
from http import HTTPStatus
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

import psycopg2
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna_dashboard import wsgi
from waitress import create_server

from hpo.dashboard.guesses import Guesses
from hpo.dashboard.origins import is_loopback_name, same_origin
from hpo.dashboard.routes import READS, GuardedRoutes
from hpo.errors import HpoError
from hpo.storage.artifacts import ArtifactError, ArtifactStore, MissingArtifactError
from hpo.storage.errors import DatabaseRefusal, LeaseLost, MissingRecord, PostgresError, TrialLeased
from hpo.storage.trials import trial_storage

log = logging.getLogger("hpo")

USER = "hpo"
_THREADS = 4
_RETRY_S = 10.0  # how long a request waits for a database that is out of reach
_KNOWN = "hpo-known"  # cookie of a browser that has given the password once: nobody's wrong guesses make it wait
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "SAMEORIGIN",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_POLICY_ENDING = "base-uri 'none';form-action 'self';frame-ancestors 'self'"
# Whatever is not a page of the dashboard may run no script: an artifact may be a web page that somebody stored.
_POLICY = f"default-src 'none';img-src 'self';media-src 'self';style-src 'unsafe-inline';{_POLICY_ENDING}"

# Long attributes wrap instead of making a trial's page several screens wide.
_STYLE = b"<style>main .MuiTypography-body1{white-space:normal}</style>"


class DashboardError(HpoError):
    """The dashboard cannot be served with these settings."""


class Rejection(NamedTuple):
    """The answer to a request that is not served."""

    status: HTTPStatus
    reason: str
    headers: tuple[tuple[str, str], ...] = ()


def serve(
    database_url: str,
    artifact_store: ArtifactStore,
    host: str = "127.0.0.1",
    port: int = 8080,
    password: str | None = None,
    allow_delete: bool = False,
    ready: Callable[[str], None] | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT. `port` 0 takes a free one; `ready` is called with the URL once it is listening.

    The password (user name `hpo`) is the argument, else HPO_DASHBOARD_PASSWORD, else the content of the file that
    HPO_DASHBOARD_PASSWORD_FILE names. Raises DashboardError without one off loopback, or if the port is taken.
    """
    password = dashboard_password() if password is None else password
    with _listening(host, port, password) as listener, _ended_by_signals():
        app = wsgi_app(database_url, artifact_store, password, allow_delete)
        server = create_server(app, sockets=[listener], threads=_THREADS, max_request_body_size=2**26)
        if ready:
            address, bound_port = listener.getsockname()[:2]
            ready(f"http://{f'[{address}]' if ':' in address else address}:{bound_port}/")
        server.run()
        server.close()


def dashboard_password() -> str | None:
    """HPO_DASHBOARD_PASSWORD, else the first line of the file HPO_DASHBOARD_PASSWORD_FILE, else None."""
    if password := os.environ.get("HPO_DASHBOARD_PASSWORD"):
        return password
    if not (file := os.environ.get("HPO_DASHBOARD_PASSWORD_FILE")):
        return None
    try:
        return Path(file).read_text(encoding="utf-8").partition("\n")[0].rstrip("\r")
    except OSError as error:
        raise DashboardError(f"HPO_DASHBOARD_PASSWORD_FILE names {file}: {error.strerror}") from error


def wsgi_app(
    storage: str | BaseStorage,
    artifact_store: ArtifactStore,
    password: str | None = None,
    allow_delete: bool = False,
) -> WSGIApplication:
    """The guarded application, for a database URL or a storage object.

    With a password, every request requires it. Without one, only requests to a loopback name are answered, so that a
    page that rebinds its own name to 127.0.0.1 is rejected. Deletion requires `allow_delete`.
    """
    if password == "":
        raise DashboardError("the dashboard's password must not be empty; set HPO_DASHBOARD_PASSWORD to one")
    if isinstance(storage, str):
        storage = trial_storage(storage, retry_s=_RETRY_S)  # an object: optuna-dashboard is slow with a URL
    door = _LoopbackOnly() if password is None else _PasswordRequired(password)
    return guarded_app(storage, artifact_store, door, GuardedRoutes(storage, allow_delete))


class Door(Protocol):
    """Decides who comes in."""

    def rejection(self, environ: WSGIEnvironment) -> Rejection | None:
        """Why the request is not served; None lets it in."""

    def greeting(self, environ: WSGIEnvironment) -> list[tuple[str, str]]:
        """Headers for a visitor who was let in."""


def guarded_app(
    storage: BaseStorage, artifact_store: ArtifactStore, door: Door, routes: GuardedRoutes
) -> WSGIApplication:
    """optuna-dashboard behind a door, with its routes as `routes` guards them."""
    page: Any = wsgi(storage, artifact_store=_ByArtifactId(artifact_store))
    routes.install(page)

    def guarded(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        given = _tidy(environ)
        extra: list[tuple[str, str]] = []

        def start(status: str, headers: list[tuple[str, str]], *error: Any) -> Any:
            return start_response(status, _with_security([*headers, *extra]), *error)

        try:
            if rejection := door.rejection(given) or _misdirected(given):
                return _rejected(rejection, start)
            extra.extend(door.greeting(given))
            return _styled(page, given, start) if is_page(given["PATH_INFO"]) else page(given, start)
        except Exception as error:
            return _rejected(_rejection_of(error, given), start)

    return guarded


def _tidy(environ: WSGIEnvironment) -> WSGIEnvironment:
    """A copy with what the dashboard takes for granted, and no body where none is read."""
    given = {"HTTP_ACCEPT_ENCODING": "", "PATH_INFO": "", **environ}
    for name in [name for name in given if name.startswith("HTTP_") and not str(given[name]).isascii()]:
        given[name] = given[name].encode("ascii", "replace").decode()  # no header that counts has other letters
    given.pop("HTTP_RANGE", None)  # a server may ignore it; Bottle leaves a file open where it is odd
    given["REQUEST_METHOD"] = str(environ.get("REQUEST_METHOD", "GET")).upper()
    if given["REQUEST_METHOD"] in READS or not re.fullmatch(r"[0-9]{1,18}", given.get("CONTENT_LENGTH") or ""):
        given |= {"CONTENT_LENGTH": "0", "CONTENT_TYPE": ""}
    return given


def is_page(path: str) -> bool:
    """Whether a path is that of the dashboard's page, which its script draws; not of what the script asks for."""
    return re.match(r"/dashboard(/|$)", path) is not None


def _misdirected(environ: WSGIEnvironment) -> Rejection | None:
    path: str = environ["PATH_INFO"]
    if not (path.isascii() and path.isprintable()):  # no address here has other letters
        return Rejection(HTTPStatus.NOT_FOUND, "there is no such page")
    origin = same_origin(environ.get("HTTP_SEC_FETCH_SITE"), environ.get("HTTP_ORIGIN"), environ.get("HTTP_HOST"))
    if environ["REQUEST_METHOD"] not in READS and origin is False:
        return Rejection(HTTPStatus.FORBIDDEN, "a page of another site may not change studies")
    return None


def _rejection_of(error: Exception, environ: WSGIEnvironment) -> Rejection:
    """Status and reason for an error in an answer. What is no user's doing is logged and not shown."""
    match error:
        case MissingArtifactError():
            return Rejection(HTTPStatus.NOT_FOUND, "there is no such file")
        case MissingRecord():
            return Rejection(HTTPStatus.NOT_FOUND, str(error))
        case TrialLeased() | LeaseLost() | UpdateFinishedTrialError():
            return Rejection(HTTPStatus.CONFLICT, str(error) or "the trial has ended")
        case psycopg2.DataError():
            return Rejection(HTTPStatus.BAD_REQUEST, "the database cannot hold such a value")
        case DatabaseRefusal():
            status, reason = HTTPStatus.SERVICE_UNAVAILABLE, "the database rejects this; the dashboard's log says why"
        case PostgresError():
            status, reason = HTTPStatus.SERVICE_UNAVAILABLE, "the database is out of reach"
        case ArtifactError():
            status, reason = HTTPStatus.SERVICE_UNAVAILABLE, "the artifact store fails; the dashboard's log says why"
        case _:
            status, reason = HTTPStatus.INTERNAL_SERVER_ERROR, "internal server error"
    where = traceback.extract_tb(error.__traceback__)[-1]
    told = f"{error}" if isinstance(error, HpoError) else f"{error!r} ({where.filename}:{where.lineno})"
    log.warning("%s %s: %s", environ["REQUEST_METHOD"], environ["PATH_INFO"], " ".join(told.split()))
    return Rejection(status, reason)


class _LoopbackOnly:
    """Without a password: only requests to a name of this machine itself."""

    def rejection(self, environ: WSGIEnvironment) -> Rejection | None:
        if is_loopback_name(environ.get("HTTP_HOST", "")):
            return None
        return Rejection(
            HTTPStatus.FORBIDDEN, "without a password only requests to localhost or 127.0.0.1 are answered"
        )

    def greeting(self, environ: WSGIEnvironment) -> list[tuple[str, str]]:
        return []


class _PasswordRequired:
    """Every request gives the password; whoever guesses has to wait."""

    def __init__(self, password: str) -> None:
        self._wanted = hashlib.sha256(f"{USER}:{password}".encode()).digest()
        self._guesses = Guesses()
        self._known = f"{_KNOWN}={secrets.token_hex(16)}"

    def rejection(self, environ: WSGIEnvironment) -> Rejection | None:
        given = _credentials(environ.get("HTTP_AUTHORIZATION", ""))
        # Digests have equal lengths, so that the comparison takes constant time.
        right = given is not None and hmac.compare_digest(hashlib.sha256(given).digest(), self._wanted)
        if given is not None and not (right and self._is_known(environ)):
            wait_s = math.ceil(self._guesses.wait_s(environ.get("REMOTE_ADDR", ""), right=right))
            if wait_s:
                reason = f"too many wrong passwords; try again in {wait_s} s"
                return Rejection(HTTPStatus.TOO_MANY_REQUESTS, reason, (("Retry-After", str(wait_s)),))
        if right:
            return None
        realm = ("WWW-Authenticate", 'Basic realm="hpo dashboard", charset="UTF-8"')
        return Rejection(HTTPStatus.UNAUTHORIZED, f"user name {USER} and the dashboard's password are needed", (realm,))

    def greeting(self, environ: WSGIEnvironment) -> list[tuple[str, str]]:
        """The cookie for a browser that has given the password."""
        if self._is_known(environ):
            return []
        return [("Set-Cookie", f"{self._known}; Path=/; HttpOnly; SameSite=Strict")]

    def _is_known(self, environ: WSGIEnvironment) -> bool:
        return self._known in re.split(r";\s*", environ.get("HTTP_COOKIE", ""))


class _ByArtifactId:
    """The store by the dashboard's ids: an attached artifact's key in hex, or the UUID of an upload from a page."""

    def __init__(self, store: ArtifactStore) -> None:
        self._store = store

    def open_reader(self, artifact_id: str) -> BinaryIO:
        return self._store.open_reader(artifact_id if "-" in artifact_id else bytes.fromhex(artifact_id).decode())

    def write(self, artifact_id: str, content_body: BinaryIO) -> None:
        self._store.write(artifact_id, content_body)

    def remove(self, artifact_id: str) -> None:
        """Remove an upload from a page; attached artifacts stay, as a promoted model may use them."""
        if "-" in artifact_id:
            self._store.remove(artifact_id)


@contextmanager
def _listening(host: str, port: int, password: str | None) -> Iterator[socket.socket]:
    """A listening socket. Raises DashboardError for an address that others can reach if there is no password."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        family, _, _, _, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
        if password is None and not ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback:
            raise DashboardError(
                f"a dashboard that others can reach ({host}) needs a password; set HPO_DASHBOARD_PASSWORD or "
                "HPO_DASHBOARD_PASSWORD_FILE, or serve on 127.0.0.1"
            )
        listener = socket.create_server(address[:2], family=family)
    except (OSError, OverflowError) as error:
        taken = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
        reason = "another program (a dashboard?) has it" if taken else str(error)
        raise DashboardError(f"cannot serve on {host} port {port}: {reason}; choose another --port") from error
    with listener:
        yield listener


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGINT end the block cleanly, in the main thread; other threads receive no signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    chosen = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, lambda *_: sys.exit(0)) for number in chosen]
    try:
        yield
    except SystemExit:
        pass
    finally:
        for number, handler in zip(chosen, before, strict=True):
            signal.signal(number, handler)


def _credentials(header: str) -> bytes | None:
    """USER:PASSWORD of a header, None where it is not of that form."""
    scheme, _, encoded = header.partition(" ")
    if scheme.lower() != "basic":
        return None
    try:
        given = base64.b64decode(encoded.strip(), validate=True)
    except ValueError:
        return None
    return given if b":" in given else None


def _rejected(rejection: Rejection, start: Any) -> list[bytes]:
    status, reason, headers = rejection
    body = json.dumps({"reason": reason}).encode()
    start(
        f"{status.value} {status.phrase}",
        [("Content-Type", "application/json"), ("Content-Length", str(len(body))), *headers],
    )
    return [body]


def _styled(page: WSGIApplication, environ: WSGIEnvironment, start: Any) -> list[bytes]:
    """The dashboard's page with our style added to its head."""
    started: list[Any] = []

    def note(status: str, headers: list[tuple[str, str]], *_: Any) -> Any:
        started[:] = status, headers

    conditional = ("HTTP_IF_MODIFIED_SINCE", "wsgi.file_wrapper")
    sent: Any = page({name: value for name, value in environ.items() if name not in conditional}, note)
    with closing(sent) if hasattr(sent, "close") else nullcontext():
        body = b"".join(sent).replace(b"</head>", _STYLE + b"</head>")
    status, headers = started
    kept = [(name, value) for name, value in headers if name.lower() not in ("content-length", "last-modified")]
    start(status, [*kept, ("Content-Length", str(len(body)))])
    return [body]


def _with_security(headers: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """With security headers: the page's own content policy, narrowed; no other site may read the answers."""
    own = [value for name, value in headers if name.lower() == "content-security-policy"]
    policy = f"{own[0]};{_POLICY_ENDING}" if own else _POLICY
    dropped = {"content-security-policy", "access-control-allow-origin", *map(str.lower, _HEADERS)}
    kept = [(name, value) for name, value in headers if name.lower() not in dropped]
    return [*kept, *_HEADERS.items(), ("Content-Security-Policy", policy)]
