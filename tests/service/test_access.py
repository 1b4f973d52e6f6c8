"""Who may do what: every route without a token, with one that opens nothing, and with a role too low."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from fastapi import FastAPI
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute

from hpo.service.app import make_app
from hpo.service.backend import Backend
from hpo.storage.access import ROLES, Access
from hpo.storage.artifacts import FolderStore
from tests.service.conftest import Service, serving

OPEN = {"/healthz"}
NEAR = {"/readyz", "/metrics", "/openapi.json", "/docs"}  # from this machine, with a token, or signed in


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> FastAPI:
    return make_app(Backend("postgresql://nowhere", FolderStore(tmp_path_factory.mktemp("store"))))


def routes(app: FastAPI) -> list[tuple[str, str, str]]:
    """(method, path, the least role) of every route, read from what it depends on."""
    found = []
    for route in leaves(app.routes):
        if route.include_in_schema and route.path not in OPEN | NEAR:
            roles = [_role(call) for call in _calls(route.dependant) if "allowed" in getattr(call, "__qualname__", "")]
            assert roles, f"{route.path} asks for no token"
            role = max(roles, key=ROLES.index)
            found += [(method, re.sub(r"\{[^}]*\}", "1", route.path), role) for method in sorted(route.methods or ())]
    described = {re.sub(r"\{[^}]*\}", "1", path) for path in app.openapi()["paths"]}
    assert {path for _, path, _ in found} == described - OPEN - NEAR
    return found


def leaves(routes: Iterable[Any]) -> Iterator[APIRoute]:
    for route in routes:
        if isinstance(route, APIRoute):
            yield route
        elif hasattr(route, "original_router"):
            yield from leaves(route.original_router.routes)


def _calls(dependant: Dependant) -> Iterator[Callable[..., Any]]:
    for each in dependant.dependencies:
        assert each.call is not None
        yield each.call
        yield from _calls(each)


def _role(call: Callable[..., Any]) -> str:
    return next(str(cell.cell_contents) for cell in call.__closure__ or () if cell.cell_contents in ROLES)


def test_every_route_without_a_token_is_401(app: FastAPI, service: Service) -> None:
    found = routes(app)
    assert len(found) > 15
    revoked = service.token("admin")
    access = Access(service.database_url)
    access.revoke(access.holder(revoked).token_id)  # type: ignore[union-attr]
    for wrong in (None, "x", "hpo", revoked, f"hpo_{'0' * 12}_{'a' * 43}"):
        with service.with_token(wrong) as client:
            for method, path, _ in found:
                answer = client.request(method, path)
                assert answer.status_code == 401, (method, path)
                assert answer.headers["content-type"] == "application/problem+json"
                assert answer.headers["www-authenticate"].startswith("Bearer")
                assert "hpo token create" in answer.json()["detail"]


def test_every_route_with_a_role_too_low_is_403(app: FastAPI, service: Service) -> None:
    with ExitStack() as stack:
        clients = {role: stack.enter_context(service.client(role)) for role in ROLES}
        for method, path, needed in routes(app):
            for role in ROLES[: ROLES.index(needed)]:
                answer = clients[role].request(method, path)
                assert answer.status_code == 403, (method, path, role)
                assert answer.json()["detail"] == f"this needs the role {needed!r}, the token's is {role!r}"
            for role in ROLES[ROLES.index(needed) :]:
                assert clients[role].request(method, path).status_code not in (401, 403), (method, path, role)


def test_without_a_token_only_health_is_told(service: Service) -> None:
    with service.with_token(None) as client:
        for path in ("/healthz", "/readyz"):
            assert client.get(path).json() == {"status": "ok"}
        assert "/v1/studies" in client.get("/openapi.json").json()["paths"]
        assert "/v1/studies/{name}/events" in client.get("/docs").text
        for path in ("/nowhere", "/v1", "/v1/data/../studies"):
            assert client.get(path).status_code in (401, 404)


def test_from_another_machine_a_token_is_needed_for_all_but_health(service: Service, tmp_path: Path) -> None:
    app = make_app(Backend(service.database_url, FolderStore(tmp_path)))
    token = {"Authorization": f"Bearer {service.token('read')}"}

    async def ask(path: str, headers: dict[str, str]) -> int:
        transport = httpx.ASGITransport(app, client=("192.0.2.7", 4711))
        async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
            return (await client.get(path, headers=headers)).status_code

    for path in NEAR:
        assert asyncio.run(ask(path, {})) == (303 if path == "/docs" else 401)  # to the log-in
        assert asyncio.run(ask(path, token)) == 200
    assert asyncio.run(ask("/healthz", {})) == 200
    app.state.backend.close()


def test_an_owner_who_changes_too_much_waits(service: Service) -> None:
    """Others do not, nor whoever reads."""
    with serving(service.environment, "--max-writes", "2") as address:
        other = Service(address, service.database_url, service.environment)
        with other.client(owner="hasty") as client, other.client(owner="calm") as calm:
            assert [client.post("/v1/studies/none/stop").status_code for _ in range(3)] == [404, 404, 429]
            refused = client.delete("/v1/studies/none")
            assert (refused.status_code, refused.headers["Retry-After"]) == (429, "30")
            assert refused.json()["detail"].startswith("hasty may change something 2 times a minute: try again in ")
            assert client.get("/v1/studies").status_code == 200
            assert calm.post("/v1/studies/none/stop").status_code == 404


OTHER = ("GET", "HEAD", "OPTIONS", "TRACE", "PATCH", "PUT", "POST", "DELETE", "CONNECT", "BREW")


def test_no_other_method_and_no_other_spelling_opens_a_route(app: FastAPI, service: Service) -> None:
    """Of the pages' routes too."""
    served = set()
    for route in leaves(app.routes):
        served |= {(method, re.sub(r"\{[^}]*\}", "1", route.path)) for method in route.methods or ()}
    paths = sorted({path for _, path in served} - OPEN - NEAR)
    asked = [(method, path) for path in paths for method in OTHER if (method, path) not in served]
    for path in set(paths) - {"/", "/login"}:
        spelled = (f"/{path}", path.upper(), f"{path}%2f", f"{path};x", f"{path}%20", f"{path}%00")
        around = (f"/healthz/..{path}", f"/assets/..{path}", f"/assets/%2e%2e{path}")
        asked += [("GET", other) for other in (*spelled, *around)]
    assert len(asked) > 200
    with service.with_token(None) as client:
        for method, path in asked:
            answer = client.request(method, path)
            assert answer.status_code in (303, 307, 400, 401, 404, 405), (method, path, answer.status_code)
            to = urlsplit(answer.headers.get("location", "/login")).path
            assert to == "/login" or (to in paths and answer.status_code == 307), (method, path, to)  # asks there
