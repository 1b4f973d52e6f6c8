"""The service against its own description: `schemathesis` asks each route for what it serves, and for what not."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.service.conftest import Service, upload

pytestmark = pytest.mark.xdist_group("service-schema")

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "unsupported_method",
    "allow_header_conformance",
)


@pytest.fixture(scope="module")
def known(service: Service, waves: Path, task: Callable[..., str]) -> dict[str, object]:
    """Path parameters for which there is something: a study that is over, its model, its data."""
    with service.client() as client:
        key = upload(client, waves)
        assert client.post("/v1/studies", content=task("waves", key)).status_code == 201
        service.work("waves")
        assert client.put("/v1/models/waves/aliases/production", json={"version": 1}).status_code == 200
    return {"name": "waves", "version": "latest", "key": key, "number": 1, "alias": "production"}


def ask(service: Service, folder: Path, token: str | None, *options: str, known: dict[str, object]) -> str:
    """What schemathesis says; it ends with 0 where nothing is wrong."""
    lines = [f'"path.{name}" = {json.dumps(value)}' for name, value in known.items()]
    (folder / "schemathesis.toml").write_text("\n".join(["[parameters]", *lines]) + "\n")
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "--config-file", "schemathesis.toml"),
        *("run", f"{service.url}/openapi.json", "--checks", ",".join(CHECKS), "--seed", "1", "--no-shrink"),
        *("--continue-on-failure", "--request-timeout", "30", "--no-color"),
        *(() if token is None else ("--header", f"Authorization: Bearer {token}")),
        *options,
    ]
    environment = {**service.environment, "SCHEMATHESIS_HOOKS": "tests.service.schema_hooks"}
    environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_what_is_there_is_answered_as_described(service: Service, known: dict[str, object], tmp_path: Path) -> None:
    """The same on a study, a model and a data file that are there, by their owner; nothing of it is removed."""
    options = ("--phases", "examples,coverage,fuzzing", "--max-examples", "10", "--exclude-method", "DELETE")
    ask(service, tmp_path, service.token(), *options, known=known)
    with service.client() as client:
        assert client.get("/v1/studies/waves").json()["trials"]["complete"] == 2
        assert client.get("/v1/models/waves/1").json()["version"] == 1


@pytest.mark.parametrize("role", [None, "read", "submit", "admin"])
def test_no_role_is_answered_what_is_not_described(
    service: Service, known: dict[str, object], tmp_path: Path, role: str | None
) -> None:
    """Made-up names and bodies, wrong methods, and values at the edges, on every route."""
    token = None if role is None else service.token(role, owner="eve")
    said = ask(service, tmp_path, token, "--phases", "coverage,fuzzing", "--max-examples", "5", known={})
    assert "Selected: 0" not in said
    with service.client() as client:
        if role != "admin":  # who may remove what it is told of
            assert client.get("/v1/studies/waves").json()["owner"] == "ada"
