"""optuna-dashboard for the studies of one database and their artifacts; off loopback it requires a password."""

from __future__ import annotations

import base64
import binascii
import errno
import hashlib
import hmac
import ipaddress
import json
import logging
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, nullcontext
from http import HTTPStatus
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import parse_qs, urlsplit
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from optuna.storages import BaseStorage
from optuna_dashboard import wsgi
from waitress import create_server

from hpo.dashboard.study_json import StudyJson, compressed
from hpo.errors import HpoError
from hpo.storage.artifacts import ArtifactStore
from hpo.storage.errors import PostgresError
from hpo.storage.trials import trial_storage

log = logging.getLogger("hpo")

USER = "hpo"
_THREADS = 4
_RETRY_S = 10.0  # how long a request waits for a database that is out of reach
_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
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
    page: WSGIApplication = wsgi(storage, artifact_store=_ByArtifactId(artifact_store))
    studies = StudyJson(storage)

    def guarded(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        def start(status: str, headers: list[tuple[str, str]], *error: Any) -> Any:
            return start_response(status, _with_security(headers), *error)

        if rejection := _rejection(environ, password, allow_delete):
            return _rejected(*rejection, start)
        if environ["REQUEST_METHOD"] == "GET" and (answer := _study(studies, environ, start)) is not None:
            return answer
        if re.match(r"/dashboard(/|$)", environ["PATH_INFO"]):
            return _styled(page, environ, start)
        return page(environ, start)

    return guarded


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


def _rejection(environ: WSGIEnvironment, password: str | None, allow_delete: bool) -> tuple[HTTPStatus, str] | None:
    """Status and reason if a request is rejected, else None."""
    if password is None and not _is_loopback_name(environ.get("HTTP_HOST", "")):
        return HTTPStatus.FORBIDDEN, "without a password only requests to localhost or 127.0.0.1 are answered"
    if password is not None and not _authorized(environ.get("HTTP_AUTHORIZATION", ""), password):
        return HTTPStatus.UNAUTHORIZED, f"user name {USER} and the dashboard's password are needed"
    if environ["REQUEST_METHOD"] not in _SAFE_METHODS and _from_another_site(environ):
        return HTTPStatus.FORBIDDEN, "a page of another site may not change studies"
    if not allow_delete and _deletes(environ):
        return HTTPStatus.FORBIDDEN, "deletion is off; start the dashboard with --allow-delete"
    return None


def _is_loopback_name(host: str) -> bool:
    """Whether a Host header names this machine itself: localhost, 127.x.x.x or [::1], with or without a port."""
    name = re.sub(r":\d+$", "", host).strip("[]").lower()
    try:
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _authorized(header: str, password: str) -> bool:
    scheme, _, encoded = header.partition(" ")
    try:
        given = base64.b64decode(encoded.strip(), validate=True) if scheme.lower() == "basic" else b""
    except binascii.Error:
        given = b""
    wanted = f"{USER}:{password}".encode()
    # Digests have equal lengths, so that the comparison takes constant time.
    return hmac.compare_digest(hashlib.sha256(given).digest(), hashlib.sha256(wanted).digest())


def _from_another_site(environ: WSGIEnvironment) -> bool:
    """By Sec-Fetch-Site, which browsers send over TLS and to loopback; else by Origin."""
    if site := environ.get("HTTP_SEC_FETCH_SITE"):
        return site not in ("same-origin", "none")
    origin = environ.get("HTTP_ORIGIN")
    return origin is not None and urlsplit(origin).netloc != environ.get("HTTP_HOST")


def _deletes(environ: WSGIEnvironment) -> bool:
    """Whether it is a DELETE or a rename: optuna-dashboard renames by copying the study and deleting the old one."""
    path: str = environ["PATH_INFO"]
    return environ["REQUEST_METHOD"] == "DELETE" or path.rstrip("/").endswith("/rename")


def _rejected(status: HTTPStatus, reason: str, start: Any) -> list[bytes]:
    body = json.dumps({"reason": reason}).encode()
    headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
    if status is HTTPStatus.UNAUTHORIZED:
        headers.append(("WWW-Authenticate", 'Basic realm="hpo dashboard", charset="UTF-8"'))
    start(f"{status.value} {status.phrase}", headers)
    return [body]


def _study(studies: StudyJson, environ: WSGIEnvironment, start: Any) -> list[bytes] | None:
    """The answer to the request that a study's page repeats every few seconds; None for any other request."""
    match = re.fullmatch(r"/api/studies/(\d+)/*", environ["PATH_INFO"])
    after = parse_qs(environ.get("QUERY_STRING", "")).get("after", ["0"])[-1]
    try:
        body = studies.study(int(match[1]), int(after)) if match and after.isdecimal() else None
    except PostgresError as error:
        log.warning("%s", error)
        return _rejected(HTTPStatus.SERVICE_UNAVAILABLE, "the database is out of reach", start)
    if body is None:
        return None
    headers = [("Content-Type", "application/json"), ("Vary", "Accept-Encoding")]
    if "gzip" in environ.get("HTTP_ACCEPT_ENCODING", ""):
        body = compressed(body)
        headers.append(("Content-Encoding", "gzip"))
    start("200 OK", [*headers, ("Content-Length", str(len(body)))])
    return [body]


def _styled(page: WSGIApplication, environ: WSGIEnvironment, start: Any) -> list[bytes]:
    """The dashboard's page with our style added to its head."""
    started: list[Any] = []

    def note(status: str, headers: list[tuple[str, str]], *_: Any) -> Any:
        started[:] = status, headers

    conditional = ("HTTP_IF_MODIFIED_SINCE", "HTTP_RANGE", "wsgi.file_wrapper")
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
