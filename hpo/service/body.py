"""What a request brings: never more than its limit, and a file never in memory."""

from __future__ import annotations

import hashlib
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

import anyio
from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hpo.service.backend import MIB, Limits
from hpo.service.problems import Problem, answer
from hpo.storage.home import own_folder
from hpo.temporary import temporary_folder

NAME = re.compile(r"[^A-Za-z0-9._-]+")
FIELDS = 20  # of a page's form
LONGEST_NAME = 100  # letters of a file's name that are kept
FILES = ("/data", "/predict", "/new")  # what paths end with that take a data file

# How a route that takes a file is described: FastAPI would read the whole body before it knows who asks.
FILE_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {"file": {"type": "string", "format": "binary"}},
                }
            },
        },
    }
}


class BodyLimit:
    """Middleware: a body beyond its limit is answered with 413, at once where its length is announced."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self._app, self._limits = app, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        most = self._limits.body if scope["path"].endswith(FILES) else self._limits.text
        announced = dict(scope["headers"]).get(b"content-length", b"")
        if announced.isdigit() and int(announced) > most:
            await answer(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, _too_large(most))(scope, receive, send)
            return
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > most:
                raise Problem(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, _too_large(most))
            return message

        await self._app(scope, counted, send)


def _too_large(most: int) -> str:
    return f"a body of at most {most / MIB:g} MiB is taken here; the service's --max-body raises that of data files"


@dataclass(frozen=True)
class Received:
    """An uploaded file, in a folder that is removed after the request."""

    path: Path
    name: str  # as the client called it, of harmless letters
    sha256: str


@asynccontextmanager
async def received_file(request: Request) -> AsyncIterator[Received]:
    """The part `file` of a multipart form. Raises Problem for another body."""
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        reason = "send the file as multipart/form-data in a part named file: curl -F file=@data.csv"
        raise Problem(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, reason)
    own = own_folder("uploads")
    own.mkdir(parents=True, exist_ok=True)
    async with request.form(max_files=1, max_fields=1) as form:
        file = form.get("file")
        if not isinstance(file, UploadFile):
            raise Problem(HTTPStatus.UNPROCESSABLE_ENTITY, "the form has no part named file with a file's content")
        with temporary_folder(own, "upload") as folder:
            yield await _kept(file, folder)


@asynccontextmanager
async def received_form(request: Request, files: int) -> AsyncIterator[tuple[dict[str, str], dict[str, Received]]]:
    """The fields of a page's form, and its files: at most so many. A file that was not chosen is left out."""
    own = own_folder("uploads")
    own.mkdir(parents=True, exist_ok=True)
    async with request.form(max_files=files, max_fields=FIELDS) as form:
        with temporary_folder(own, "upload") as folder:
            fields: dict[str, str] = {}
            found: dict[str, Received] = {}
            for part, value in form.items():
                if not isinstance(value, UploadFile):
                    fields[part] = value
                elif value.filename:
                    (folder / str(len(found))).mkdir()
                    found[part] = await _kept(value, folder / str(len(found)))
            yield fields, found


async def _kept(file: UploadFile, folder: Path) -> Received:
    name = NAME.sub("_", Path(file.filename or "data").name)[-LONGEST_NAME:].lstrip("._-") or "data"
    digest = hashlib.sha256()
    async with await anyio.open_file(folder / name, "wb") as target:
        while block := await file.read(MIB):
            digest.update(block)
            await target.write(block)
    return Received(folder / name, name, digest.hexdigest())
