"""The routes for programs, to read: from the OpenAPI description, with no script of another site."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request, Response

from hpo.service.access import Near
from hpo.service.pages.rendering import PageRoute, page
from hpo.service.pages.visitor import visitor_of

router = APIRouter(route_class=PageRoute, include_in_schema=False)


@dataclass(frozen=True)
class Operation:
    """One route."""

    method: str
    path: str
    says: str
    parameters: list[tuple[str, str, str, bool]]  # name, place, type, whether it is needed
    bodies: list[tuple[str, str]]  # media type, example or schema
    answers: list[tuple[str, str, str]]  # status, description, schema


@router.get("/docs", dependencies=[Near])
def docs(request: Request) -> Response:
    """Every route: what it does, takes and answers."""
    request.state.visitor = visitor_of(request)
    description = request.app.openapi()
    groups: dict[str, list[Operation]] = {}
    for tag, operation in _operations(description):
        groups.setdefault(tag, []).append(operation)
    schemas = {name: _text(schema) for name, schema in description["components"]["schemas"].items()}
    return page(request, "docs.html", groups=groups, about=description["info"], schemas=schemas)


def _operations(description: dict[str, Any]) -> list[tuple[str, Operation]]:
    """Tag and operation, in the order of the routes."""
    return [
        (operation.get("tags", [""])[0], _operation(method, path, operation))
        for path, methods in description["paths"].items()
        for method, operation in methods.items()
    ]


def _operation(method: str, path: str, given: dict[str, Any]) -> Operation:
    content = given.get("requestBody", {}).get("content", {})
    return Operation(
        method=method.upper(),
        path=path,
        says=given.get("description", ""),
        parameters=[
            (each["name"], each["in"], _kind(each.get("schema", {})), each.get("required", False))
            for each in given.get("parameters", [])
        ],
        bodies=[(kind, _text(body.get("example") or body.get("schema", {}))) for kind, body in content.items()],
        answers=[
            (status, answer.get("description", ""), " ".join(map(_kind, _schemas(answer))))
            for status, answer in given.get("responses", {}).items()
            if status.startswith("2")
        ],
    )


def _schemas(answer: dict[str, Any]) -> list[dict[str, Any]]:
    return [content.get("schema", {}) for content in answer.get("content", {}).values()]


def _kind(schema: dict[str, Any]) -> str:
    """A schema in a word."""
    if "$ref" in schema:
        return str(schema["$ref"].rsplit("/", 1)[-1])
    if schema.get("type") == "array":
        return f"list of {_kind(schema.get('items', {}))}"
    if "anyOf" in schema:
        return " or ".join(_kind(each) for each in schema["anyOf"] if each.get("type") != "null")
    return str(schema.get("type", ""))


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, indent=2, ensure_ascii=False)
