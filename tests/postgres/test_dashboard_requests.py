"""Odd and forbidden requests to the dashboard: closed routes, guesses, fuzz. In process, without a socket."""

from __future__ import annotations

import base64
import io
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

import bottle
import optuna
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from optuna.trial import TrialState

from hpo.dashboard.routes import LONGEST_NOTE, READS, GuardedRoutes
from hpo.dashboard.server import wsgi_app
from hpo.storage.artifacts import ArtifactStore, artifact_store
from hpo.storage.errors import DatabaseUnavailable, TrialLeased
from hpo.storage.leases import Lease, Leases
from hpo.storage.terms import Terms
from hpo.storage.trials import TrialStorage
from hpo.study.record import RESERVED

LOCAL = {"HTTP_HOST": "localhost"}


class Client:
    """Requests to a WSGI application."""

    def __init__(self, application: Any) -> None:
        self._application = application

    def __call__(self, method: str, path: str, body: Any = None, **environ: Any) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body. body: bytes as they are, anything else as JSON."""
        raw = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        target, _, query = path.partition("?")
        asked = {
            "REQUEST_METHOD": method,
            "PATH_INFO": unquote_to_bytes(target).decode("latin-1"),
            "QUERY_STRING": query,
            "SERVER_NAME": "localhost",
            "SERVER_PORT": "80",
            "SERVER_PROTOCOL": "HTTP/1.1",
            "REMOTE_ADDR": "127.0.0.1",
            "CONTENT_TYPE": "application/json",
            "CONTENT_LENGTH": str(len(raw)),
            "wsgi.input": io.BytesIO(raw),
            "wsgi.errors": io.StringIO(),
            "wsgi.url_scheme": "http",
            **LOCAL,
            **environ,
        }
        started: list[Any] = []

        def start(status: str, headers: list[tuple[str, str]], *_: Any) -> None:
            started[:] = status, headers

        sent = self._application(asked, start)
        answer = b"".join(sent)
        if hasattr(sent, "close"):
            sent.close()
        return int(started[0].split()[0]), {name.lower(): value for name, value in started[1]}, answer


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return artifact_store(str(tmp_path / "artifacts"))


@pytest.fixture
def held(storage: TrialStorage) -> Lease:
    """A study of ours, with a trial under lease."""
    study = optuna.create_study(storage=storage, study_name="power", direction="maximize")
    leases = Leases(storage)
    leases.open_study(study._study_id, Terms(budget=9), {})
    lease = leases.acquire(study._study_id, "w", "cpu")
    assert lease is not None
    storage.session.flush()
    return lease


@pytest.fixture
def client(held: Lease, database_url: str, store: ArtifactStore) -> Iterator[Client]:
    dashboards = TrialStorage(database_url, 0.0)
    yield Client(wsgi_app(dashboards, store))
    dashboards.close()


def reason(answer: tuple[int, dict[str, str], bytes]) -> str:
    return str(json.loads(answer[2])["reason"])


# --------------------------------------------------------------------------------------------------- closed routes


@pytest.mark.parametrize(
    ("method", "path", "body", "way"),
    [
        ("POST", "/api/studies", {"study_name": "new", "directions": ["minimize"]}, "hpo launch"),
        ("POST", "/api/studies/{study}/rename", {"study_name": "new"}, "warm_start"),
        ("POST", "/api/trials/{trial}/tell", {"state": "Complete", "values": [1.0]}, "hpo stop"),
        ("POST", "/api/trials/{trial}/tell", {"state": "Fail"}, "hpo stop"),
        ("POST", "/api/studies/{study}/{trial}/skip", {}, "plain Optuna"),
        ("POST", "/api/studies/{study}/preference", {"mode": "ChooseWorst", "clicked": 0}, "plain Optuna"),
        ("DELETE", "/api/studies/{study}/preference/1", {}, "plain Optuna"),
        ("POST", "/api/studies/{study}/preference/1", {}, "plain Optuna"),
        ("PUT", "/api/studies/{study}/preference_feedback_component", {"output_type": "note"}, "plain Optuna"),
        ("POST", "/incompatible-rdb-schema", None, "hpo db upgrade"),
        ("POST", "/api/llm/trial_filter_query", {"user_query": "all"}, "closed"),
        ("DELETE", "/api/studies/{study}", {}, "--allow-delete"),
        ("DELETE", "/api/artifacts/{study}/ab", {}, "--allow-delete"),
        ("DELETE", "/api/artifacts/{study}/{trial}/ab", {}, "--allow-delete"),
    ],
)
def test_what_would_break_a_study_is_closed_and_says_the_way(
    client: Client, held: Lease, storage: TrialStorage, method: str, path: str, body: Any, way: str
) -> None:
    """An acceptance run: a visitor created a study without a plan, and told a trial under lease."""
    path = path.format(study=held.study_id, trial=held.trial_id)
    before = [vars(study) for study in storage.get_all_studies()], storage.get_trial(held.trial_id)
    for variant in (path, f"{path}/", f"{path}//", path.replace("api", "%61p%69")):
        for verb in (method, method.lower()):
            answer = client(verb, variant, body, HTTP_X_HTTP_METHOD_OVERRIDE="PUT")
            assert (answer[0], way in reason(answer)) == (403, True), answer
    for variant in (path.upper(), f"/{path}", path.replace("/api", "/api/.")):  # other addresses, which there are not
        assert client(method, variant, body)[0] in (403, 404, 405)
    overridden = client("GET", path, body, HTTP_X_HTTP_METHOD_OVERRIDE=method, HTTP_X_METHOD=method)
    assert overridden[0] in (200, 302, 404, 405)
    assert ([vars(study) for study in storage.get_all_studies()], storage.get_trial(held.trial_id)) == before


def test_a_writing_route_that_nobody_has_looked_at_is_closed(storage: TrialStorage) -> None:
    app = bottle.Bottle()
    for method in ("POST", "PUT", "PATCH", "DELETE", "ANY", "PROXY"):
        app.route(f"/api/{method}", method, lambda: "written")
    app.route("/api/read", "GET", lambda: "read")
    GuardedRoutes(storage, allow_delete=True).install(app)
    ask = Client(app)
    for method in ("POST", "PUT", "PATCH", "DELETE", "ANY"):
        verb = "LOCK" if method == "ANY" else method
        assert "closed" in reason(ask(verb, f"/api/{method}"))
    assert ask("GET", "/api/read")[2] == b"read"
    assert ask("GET", "/api/ANY")[0] == 403


def test_each_route_of_the_installed_dashboard_is_known(storage: TrialStorage) -> None:
    """A new version's routes are looked at before they are opened, or listed as closed with a reason."""
    from optuna_dashboard import wsgi

    from hpo.dashboard.routes import CLOSED

    guarded = GuardedRoutes(storage, allow_delete=True)
    routes: Any = wsgi(storage)
    unknown = {
        route.rule
        for route in routes.routes
        if route.method not in READS and (route.method, route.rule) not in guarded._writes and route.rule not in CLOSED
    }
    assert all(rule.startswith("/api/llm/") for rule in unknown)


def test_a_visitor_may_annotate_but_not_forge_what_a_worker_records(client: Client, held: Lease) -> None:
    path = f"/api/trials/{held.trial_id}/user-attrs"
    assert client("POST", path, {"user_attrs": {"looked at": True}})[0] == 204
    for name in RESERVED:
        answer = client("POST", path, {"user_attrs": {"fine": 1, name: 1}})
        assert answer[0] == 403
        assert name in reason(answer)


def test_allowed_deletion_takes_only_files_of_that_study(
    held: Lease, storage: TrialStorage, store: ArtifactStore
) -> None:
    ask = Client(wsgi_app(storage, store, allow_delete=True))
    other = optuna.create_study(storage=storage)._study_id
    upload = {"file": "data:text/plain;base64,aGk=", "filename": "note.txt"}
    found = json.loads(ask("POST", f"/api/artifacts/{held.study_id}/{held.trial_id}", upload)[2])["artifact_id"]
    for path in (f"{other}/{found}", f"{held.study_id}/{found}", f"{other}/{held.trial_id}/{found}"):
        assert ask("DELETE", f"/api/artifacts/{path}", {})[0] == 404
    assert store.keys() == [found]
    assert ask("DELETE", f"/api/artifacts/{held.study_id}/{held.trial_id}/{found}", {})[0] == 204
    assert store.keys() == []


def test_errors_of_the_storage_have_their_status_on_every_route(
    client: Client, held: Lease, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    note = {"version": 1, "body": "seen"}
    paths = [
        ("GET", "/api/studies", None),
        ("GET", f"/api/studies/{held.study_id}", None),
        ("GET", f"/api/studies/{held.study_id}/param_importances", None),
        ("GET", f"/csv/{held.study_id}", None),
        ("GET", f"/artifacts/{held.study_id}/ab", None),
        ("PUT", f"/api/studies/{held.study_id}/note", note),
        ("POST", f"/api/trials/{held.trial_id}/user-attrs", {"user_attrs": {"a": 1}}),
    ]
    secret = "at /var/lib/secret.py"
    for error, status, logged in (
        (DatabaseUnavailable(secret), 503, True),
        (TrialLeased("under lease"), 409, False),
        (RuntimeError(secret), 500, True),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(TrialStorage, "_query", lambda *_, _error=error, **__: (_ for _ in ()).throw(_error))
            patch.setattr(
                TrialStorage, "set_trial_user_attr", lambda *_, _error=error, **__: (_ for _ in ()).throw(_error)
            )
            for method, path, body in paths:
                caplog.clear()
                with caplog.at_level(logging.WARNING):
                    answer = client(method, path, body)
                assert answer[0] == status, (path, answer)
                assert b"secret" not in answer[2]
                assert len(caplog.records) == logged
                assert all("\n" not in record.getMessage() for record in caplog.records)


# ------------------------------------------------------------------------------------------------------ odd requests

HUGE = "9" * 19
TARGETS = [
    "/api/studies/{study}",
    "/api/studies/{study}/param_importances",
    "/api/studies/{study}/plot/contour",
    "/api/studies/{study}/note",
    "/api/studies/{study}/{trial}/note",
    "/api/trials/{trial}/user-attrs",
    "/api/artifacts/{study}",
    "/api/artifacts/{study}/{trial}",
    "/artifacts/{study}/ab",
    "/artifacts/{study}/{trial}/ab",
    "/csv/{study}",
]
NUMBERS = ["0", "999", "2147483647", "2147483648", HUGE, "9" * 5000, "-1", "-" + HUGE, "1.5", "%D9%A1", "1%00", "1%ff"]
PATHS = ["/", "//", "", "/%00", "/%ff%fe", "/static/%00", "/static/..%2f..%2fetc/passwd", "/static/" + "a" * 9000]
PATHS += ["/dashboard/%E0%A4%A", "/dashboard\n", "/favicon.ico", "/static/", "/static/bundle.js", "/api/meta", "*", "x"]
HEADERS = [
    {"HTTP_RANGE": value}
    for value in ("x", "bytes=", "bytes=-", "bytes=9-1", f"bytes={HUGE}-", "bytes=0-" + "9" * 5000)
]
HEADERS += [{"HTTP_IF_MODIFIED_SINCE": value} for value in ("x", "9" * 99, "Thu, 32 Foo 99999 99:99:99 GMT", "\xff")]
HEADERS += [{"HTTP_ORIGIN": value} for value in ("http://[", "\xe4", "a" * 9999, "http://localhost:x", "")]
HEADERS += [{"CONTENT_LENGTH": value} for value in ("x", "-5", "", HUGE + HUGE, "9" * 5000)]
HEADERS += [
    {"CONTENT_TYPE": value} for value in ("", "text/plain", "multipart/form-data", "application/json; charset=x")
]
HEADERS += [{"HTTP_COOKIE": "\xff=;;=\xff"}, {"HTTP_ACCEPT_ENCODING": "\xff"}, {"HTTP_TRANSFER_ENCODING": "chunked"}]
BODIES = [
    b"",
    b"{",
    b"\xff\xfe",
    b"[" * 100_000,
    b"1" * 5000,
    b"null",
    b"[]",
    b'"a"',
    b"1",
    b"NaN",
    b'{"version": 1e999}',
]
VALUES: list[Any] = [None, True, 1, -1, 10**30, 1.5, "", "a\0b", "\ud800", "x" * 3000, [], [[1]], {}, {"a": {"b": []}}]


def test_odd_numbers_of_studies_and_trials_are_not_found(client: Client, held: Lease) -> None:
    body = {"version": 1, "body": "", "user_attrs": {"a": 1}, "file": "data:a;base64,aGk="}
    right = {"study": held.study_id, "trial": held.trial_id}
    for target in TARGETS:
        for kind in (kind for kind in right if f"{{{kind}}}" in target):
            for number in NUMBERS:
                path = target.format(**{**right, kind: number})
                for method in ("GET", "HEAD", "PUT", "POST", "DELETE"):
                    assert 400 <= client(method, path, body)[0] < 500, (method, path[:99])


@pytest.mark.parametrize("after", ["-1", "x", "1.5", "%D9%A1", "9" * 5000, "%00", "%ff", "+1", " 1", "1_0", ""])
def test_an_odd_number_of_trials_is_a_bad_request(client: Client, held: Lease, after: str) -> None:
    assert client("GET", f"/api/studies/{held.study_id}?after={after}")[0] == 400


def test_a_number_of_trials_beyond_all_is_an_empty_list(client: Client, held: Lease) -> None:
    answer = client("GET", f"/api/studies/{held.study_id}?after=9999999999999999999")
    assert (answer[0], json.loads(answer[2])["trials"]) == (200, [])


def test_odd_paths_headers_and_methods_are_no_fault_of_ours(client: Client, held: Lease) -> None:
    known = [target.format(study=held.study_id, trial=held.trial_id) for target in TARGETS]
    for path in (*PATHS, *known):
        for method in (
            "GET",
            "HEAD",
            "PUT",
            "POST",
            "DELETE",
            "OPTIONS",
            "PATCH",
            "TRACE",
            "CONNECT",
            "FOO",
            "",
            "\xff",
        ):
            assert client(method, path, {})[0] < 500, (method, path[:99])
        for header in HEADERS:
            for method in ("GET", "PUT", "POST"):
                assert client(method, path, {}, **header)[0] < 500, (method, path[:99], header)


def test_odd_bodies_are_bad_requests_and_leave_no_trace(
    client: Client, held: Lease, storage: TrialStorage, store: ArtifactStore
) -> None:
    study, trial = f"/api/studies/{held.study_id}", held.trial_id
    for method, path, field in (
        ("PUT", f"{study}/note", "body"),
        ("PUT", f"{study}/{trial}/note", "body"),
        ("POST", f"/api/trials/{trial}/user-attrs", "user_attrs"),
        ("POST", f"/api/artifacts/{held.study_id}", "file"),
        ("POST", f"/api/artifacts/{held.study_id}/{trial}", "file"),
    ):
        for raw in BODIES:
            assert client(method, path, raw)[0] == 400, (path, raw[:99])
        for value in VALUES:
            assert client(method, path, {"version": 99, field: value})[0] < 500
            assert client(method, path, {"version": value, "body": value, "filename": value, "file": value})[0] < 500
        assert client(method, path, {"version": 1, "body": "x", "file": "data:,a", "filename": 1, "user_attrs": 1})[
            0
        ] in (
            204,
            400,
        )
    assert client("PUT", f"{study}/note", {"version": 2, "body": "x" * (LONGEST_NOTE + 1)})[0] == 413
    for name in ("a\0", "\ud800", "x" * 513, "a\n"):
        assert client("POST", f"/api/trials/{trial}/user-attrs", {"user_attrs": {name: 1}})[0] == 400
    assert client("GET", study)[0] == 200
    assert store.keys() == []


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.fixed_dictionaries(
    {},
    optional=dict.fromkeys(("version", "body", "user_attrs", "file", "filename", "remove_associated_artifacts"), JSON),
)


@settings(
    max_examples=int(os.environ.get("HPO_FUZZ", "150")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    method=st.sampled_from(["GET", "HEAD", "PUT", "POST", "DELETE", "PATCH"]) | st.text(max_size=5),
    target=st.sampled_from(TARGETS),
    ids=st.tuples(st.sampled_from([None, *NUMBERS]), st.sampled_from([None, *NUMBERS])),
    query=st.text(st.characters(max_codepoint=255), max_size=20).map("after={}".format) | st.just(""),
    body=FIELDS | JSON | st.binary(max_size=50),
    headers=st.dictionaries(
        st.sampled_from(
            ["RANGE", "IF_MODIFIED_SINCE", "ORIGIN", "AUTHORIZATION", "COOKIE", "SEC_FETCH_SITE", "ACCEPT"]
        ),
        st.text(st.characters(max_codepoint=255), max_size=30),
        max_size=2,
    ),
)
def test_no_request_is_a_fault_of_ours(
    client: Client, held: Lease, method: str, target: str, ids: Any, query: str, body: Any, headers: dict[str, str]
) -> None:
    """An acceptance run: odd headers, parameters and bodies gave 500."""
    path = target.format(study=ids[0] or held.study_id, trial=ids[1] or held.trial_id)
    sent = {f"HTTP_{name}": value for name, value in headers.items()}
    answer = client(method, path, body, QUERY_STRING=query, **sent)
    assert answer[0] < 500
    assert client("GET", f"/api/studies/{held.study_id}")[0] == 200  # nor does it leave a page broken


def test_the_study_of_a_leased_trial_is_whole_after_all(client: Client, held: Lease, storage: TrialStorage) -> None:
    client("POST", f"/api/trials/{held.trial_id}/tell", {"state": "Complete", "values": [1.0]})
    assert storage.get_trial(held.trial_id).state == TrialState.RUNNING


# ----------------------------------------------------------------------------------------------------------- guesses


def basic(password: str, user: str = "hpo") -> dict[str, str]:
    return {"HTTP_AUTHORIZATION": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}


def test_who_guesses_has_to_wait_and_nobody_else(held: Lease, storage: TrialStorage, store: ArtifactStore) -> None:
    """An acceptance run: 200 wrong passwords were answered in 1.5 s."""
    ask = Client(wsgi_app(storage, store, "right"))
    welcomed = ask("GET", "/api/meta", **basic("right"))
    assert welcomed[0] == 200
    cookie = welcomed[1]["set-cookie"].partition(";")[0]
    answers = [ask("GET", "/api/meta", **basic(f"wrong {number}")) for number in range(200)]
    rejected = [answer for answer in answers if answer[0] == 429]
    assert len(rejected) > 150
    assert all(int(answer[1]["retry-after"]) > 0 for answer in rejected)
    assert {answer[0] for answer in answers} == {401, 429}
    assert ask("GET", "/api/meta", **basic("right"))[0] == 429  # a guess like any other
    spoofed = {"HTTP_X_FORWARDED_FOR": "192.0.2.7", "HTTP_FORWARDED": "for=192.0.2.7"}
    assert ask("GET", "/api/meta", **spoofed, **basic("wrong"))[0] == 429
    assert ask("GET", "/api/meta", REMOTE_ADDR="192.0.2.7", **basic("right"))[0] == 200
    assert ask("GET", "/api/meta", HTTP_COOKIE=f"a=b; {cookie}", **basic("right"))[0] == 200  # a browser known already
    assert ask("GET", "/api/meta", HTTP_COOKIE=cookie, **basic("wrong"))[0] == 429  # but the cookie is no password
    assert ask("GET", "/api/meta", HTTP_COOKIE=cookie)[0] == 401


@pytest.mark.parametrize(
    "header", ["", "Basic", "Basic \xe4", "Basic " + "A" * 100_000, "Basic aHBv", "\xff\xff", "Digest x", "Basic ===="]
)
def test_an_odd_authorization_is_none(held: Lease, storage: TrialStorage, store: ArtifactStore, header: str) -> None:
    ask = Client(wsgi_app(storage, store, "right"))
    assert ask("GET", "/api/meta", HTTP_AUTHORIZATION=header)[0] == 401


@pytest.mark.parametrize("host", ["\xe4", "[::1", "a" * 9999, "127.0.0.1:x", "localhost\n", "١٢٧.0.0.1", "127.1"])
def test_an_odd_host_is_no_loopback_name(client: Client, host: str) -> None:
    assert client("GET", "/api/meta", HTTP_HOST=host)[0] == 403
