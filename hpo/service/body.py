"""What a request brings: never more than its limit, and a file never in memory."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

import anyio
from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hpo.models.data.sequences import DataError
from hpo.service.backend import MIB, Limits
from hpo.service.problems import Problem, answer
from hpo.storage.home import own_folder
from hpo.study.config import ConfigError
from hpo.temporary import temporary_folder

NAME = re.compile(r"[^A-Za-z0-9._-]+")
FIELDS = 20  # of a page's form
CONTROL = re.compile(r"[\x00-\x1f\x7f]")
SLOWEST = 1024  # bytes a second: a body that comes drop by drop is given up, too
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


class PlainAddress:
    """Middleware: an address with control characters is answered with 400. No name has any, no table takes a NUL."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (CONTROL.search(scope["path"]) or b"%00" in scope["query_string"]):
            await answer(HTTPStatus.BAD_REQUEST, "an address has no control characters")(scope, receive, send)
        else:
            await self._app(scope, receive, send)


class BodyLimit:
    """Middleware: a body beyond its limit is answered with 413, at once where its length is announced; one that stalls,
    or comes slower than SLOWEST, with 408.
    """

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
        body = _Body(receive, send, most, self._limits.stall_s)
        await self._app(scope, body.receive, body.send)


class _Body:
    """One request's, as its application receives it: in time and within its limit, or not to its end."""

    def __init__(self, receive: Receive, send: Send, most: int, stall_s: float) -> None:
        self._receive, self._send, self._most, self._stall_s = receive, send, most, stall_s
        self._waited_s, self._received = 0.0, 0
        self._whole = self._answered = False

    async def receive(self) -> Message:
        """The next part. Raises Problem, but for a request that is being answered, whose rest nobody waits for."""
        if self._whole:
            return await self._receive()  # that the client has gone
        message, began = None, time.monotonic()
        slowest_s = self._stall_s + self._received / SLOWEST - self._waited_s
        with anyio.move_on_after(min(self._stall_s, max(0.0, slowest_s))):
            message = await self._receive()
        self._waited_s += time.monotonic() - began
        if message is None:
            reason = f"the body has stalled: {self._received} bytes, then nothing in time (--stall of the service)"
            return self._given_up(Problem(HTTPStatus.REQUEST_TIMEOUT, reason, {"Connection": "close"}))
        self._received += len(message.get("body", b""))
        self._whole = not message.get("more_body", False)
        if self._received > self._most:
            return self._given_up(Problem(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, _too_large(self._most)))
        return message

    async def send(self, message: Message) -> None:
        self._answered = True
        await self._send(message)

    def _given_up(self, problem: Problem) -> Message:
        if not self._answered:
            raise problem
        return {"type": "http.disconnect"}


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
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "multipart/form-data":
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


@contextmanager
def as_sent(folder: Path) -> Iterator[None]:
    """Errors of the block name files of this folder as their senders do: where they lie here is nobody's business."""
    try:
        yield
    except (DataError, ConfigError) as error:
        raise type(error)(str(error).replace(f"{folder}/", "")) from None


def json_of(body: bytes, what: str = "the body") -> Any:
    """What JSON holds. Raises Problem for what is none: NaN, halves of surrogate pairs, and what is nested too deep."""
    try:
        found = json.loads(body, parse_constant=_no_number)
        json.dumps(found, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise Problem(HTTPStatus.BAD_REQUEST, f"{what} is not valid JSON: {error}") from None
    return found


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no number in JSON")
