"""Data files: checked when they arrive, stored by their content."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from typing import Annotated, Any

import numpy as np
from anyio.to_thread import run_sync
from fastapi import APIRouter, Query, Request

from hpo.models.data.columns import BESIDE
from hpo.models.data.readers import read
from hpo.models.data.sequences import Sequences
from hpo.service.access import Column, Reader, Submitter, Uses
from hpo.service.backend import Backend
from hpo.service.body import FILE_BODY, Received, as_sent, received_file
from hpo.service.problems import Problem
from hpo.service.schemas import DataFile, StoredData
from hpo.storage.access import Token
from hpo.storage.keys import UPLOAD, upload_key, uploaded_name

log = logging.getLogger("hpo")
router = APIRouter(prefix="/v1/data", tags=["data"])


@router.post("", status_code=HTTPStatus.CREATED, openapi_extra=FILE_BODY)
async def upload(
    request: Request,
    token: Submitter,
    backend: Uses,
    label: Column = "label",
    id: Column = "id",
    step: Column = "step",
    group: Column = "group",
    time: Column | None = None,
    weight: Column | None = None,
) -> DataFile:
    """Store a data file of any format that is read: npz, csv, tsv, parquet, ts; label, id, step, group, time
    and weight name columns.

    The same content under the same name has the same key, however often it is sent. What nobody has sent, asked for or
    submitted for a week (--keep-uploads of the service) is removed; studies keep their data.
    """
    async with received_file(request) as file:
        given = {"label": label, "id": id, "step": step, "group": group, "time": time, "weight": weight}
        columns = {role: column for role, column in given.items() if column is not None}
        return await run_sync(keep, backend, token, file, columns)


def keep(backend: Backend, token: Token, file: Received, columns: Mapping[str, Any]) -> DataFile:
    """Check an uploaded file and store it, unless it is there. Raises DataError."""
    found, warnings = _checked(file, columns)
    key = upload_key(file.sha256, file.name)
    if not backend.store.renew(key):
        backend.store.put(key, file.path)
    with backend.database() as database:
        database.access.note(token, "data.upload", file.name, {"key": key})
    return _described(key, found, warnings)


def describe(backend: Backend, key: str, columns: Mapping[str, Any]) -> DataFile:
    """What a stored data file holds. Raises DataError, and ArtifactError where it is not there."""
    path = backend.upload(key)
    return _described(key, *_checked(Received(path, uploaded_name(key), ""), columns))


def _described(key: str, found: Sequences, warnings: list[str]) -> DataFile:
    counts = [] if found.labels is None else np.bincount(found.labels, minlength=len(found.classes)).tolist()
    return DataFile(
        key=key,
        sequences=found.n,
        steps=found.steps,
        features=list(found.features),
        classes=dict(zip(found.classes, counts, strict=bool(counts))),
        groups=None if found.groups is None else len(found.group_names),
        filled=found.filled,
        warnings=warnings,
    )


@router.get("")
def known(token: Reader, backend: Uses, sha256: Annotated[str, Query(pattern="^[0-9a-f]{64}$")]) -> list[StoredData]:
    """The stored data files of that content: none has to be sent twice."""
    return [StoredData(key=key) for key in backend.store.keys(upload_key(sha256, "")) if backend.store.renew(key)]


@router.get("/{key}")
def stored(key: str, token: Reader, backend: Uses) -> StoredData:
    """Whether the store has a data file: nothing has to be sent twice."""
    if not UPLOAD.fullmatch(key) or not backend.store.renew(key):
        raise Problem(HTTPStatus.NOT_FOUND, f"there is no data file {key!r}: POST /v1/data stores one")
    return StoredData(key=key)


def _checked(file: Received, columns: Mapping[str, Any]) -> tuple[Sequences, list[str]]:
    """What a file holds, and what its reader warns of. Raises DataError, which names the file as its sender does."""
    with _warnings() as warnings, as_sent(file.path.parent):
        found = read(file.path, needed=[role for role in BESIDE if role in columns], **columns)
    return found, [text.replace(str(file.path), file.name) for text in warnings]


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """What this thread logs as warnings while the block runs."""
    found: list[str] = []
    thread = threading.get_ident()

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.thread == thread and record.levelno >= logging.WARNING:
                found.append(record.getMessage())

    handler = Kept()
    log.addHandler(handler)
    try:
        yield found
    finally:
        log.removeHandler(handler)
