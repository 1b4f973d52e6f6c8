"""Promoted models: their versions, aliases, files and predictions."""

from __future__ import annotations

import io
import tempfile
import threading
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from datetime import datetime
from http import HTTPStatus
from typing import IO, Annotated, Any

import numpy as np
from anyio.to_thread import run_sync
from fastapi import APIRouter, Path, Request
from fastapi.responses import PlainTextResponse, StreamingResponse

from hpo.models.bundle.bundle import Bundle, load
from hpo.models.bundle.predictions import Predictions
from hpo.models.data.sequences import DataError, Sequences
from hpo.promote.versions import materialise_model
from hpo.service.access import Column, Reader, Submitter, Uses, check_owner
from hpo.service.backend import MIB, Backend, Database
from hpo.service.body import FILE_BODY, received_file
from hpo.service.metrics import predicting
from hpo.service.problems import Problem
from hpo.service.schemas import Alias, Model, Prediction
from hpo.storage.access import Token
from hpo.storage.registry import ModelVersion

router = APIRouter(prefix="/v1/models", tags=["models"])
IN_MEMORY = 8  # models
Version = Annotated[str, Path(max_length=100, description="A number, or an alias such as latest.")]

PREDICT_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["sequences"],
                    "properties": {
                        "sequences": {
                            "type": "array",
                            "items": {"type": "array", "items": {"type": "array", "items": {"type": "number"}}},
                        }
                    },
                },
                "example": {"sequences": [[[0.1], [0.3], [0.2]]]},
            },
            **FILE_BODY["requestBody"]["content"],
        },
    }
}


@router.get("")
def models(token: Reader, backend: Uses) -> list[Model]:
    """Every version, by name and number."""
    with backend.database() as database:
        return [model_of(each) for each in database.registry.models()]


@router.get("/{name}/{version}")
def model(name: str, version: Version, token: Reader, backend: Uses) -> Model:
    """One version."""
    with backend.database() as database:
        return model_of(database.registry.get(name, version))


@router.get(
    "/{name}/{version}/bundle",
    response_class=StreamingResponse,
    responses={200: {"content": {"application/zip": {"schema": {"type": "string", "format": "binary"}}}}},
)
def bundle(name: str, version: Version, token: Reader, backend: Uses) -> StreamingResponse:
    """The model's folder as a zip archive: it predicts with `hpo.load`, and its README says how to without hpo."""
    with backend.database() as database:
        found = database.registry.get(name, version)
    archive = _zipped(backend, found)
    headers = {"Content-Disposition": f'attachment; filename="{found.name}-v{found.version}.zip"'}
    return StreamingResponse(_blocks(archive), media_type="application/zip", headers=headers)


@router.get("/{name}/{version}/report", response_class=PlainTextResponse)
def report(name: str, version: Version, token: Reader, backend: Uses) -> PlainTextResponse:
    """The model card, in Markdown."""
    with backend.database() as database:
        found = database.registry.get(name, version)
    return PlainTextResponse(backend.store.get(found.artifacts["README.md"]).decode(), media_type="text/markdown")


@router.put("/{name}/aliases/{alias}")
def set_alias(name: str, alias: str, to: Alias, token: Submitter, backend: Uses) -> Model:
    """Let an alias such as `production` name a version; what asks for it gets that one from now on."""
    with backend.database() as database:
        _check_owner(database, token, database.registry.get(name, to.version))
        found = database.registry.set_alias(name, alias, to.version)
        database.access.note(token, "model.alias", name, {"alias": alias, "version": to.version})
        return model_of(found)


@router.delete("/{name}/aliases/{alias}", status_code=HTTPStatus.NO_CONTENT)
def drop_alias(name: str, alias: str, token: Submitter, backend: Uses) -> None:
    """Let an alias name nothing any more."""
    with backend.database() as database:
        _check_owner(database, token, database.registry.get(name, alias))
        database.registry.drop_alias(name, alias)
        database.access.note(token, "model.alias", name, {"alias": alias})


@router.delete("/{name}/{version}", status_code=HTTPStatus.NO_CONTENT)
def delete(name: str, version: Annotated[int, Path(ge=1, le=10**9)], token: Submitter, backend: Uses) -> None:
    """Remove a version that no alias but `latest` names."""
    with backend.database() as database:
        found = database.registry.get(name, version)
        _check_owner(database, token, found)
        for key in database.registry.delete(name, version):
            backend.store.delete(key)
        database.access.note(token, "model.delete", name, {"version": version})


@router.post("/{name}/{version}/predict", openapi_extra=PREDICT_BODY)
async def predict(
    name: str,
    version: Version,
    request: Request,
    token: Reader,
    backend: Uses,
    label: Column | None = None,
    id: Column | None = None,
    step: Column | None = None,
    group: Column | None = None,
) -> Prediction:
    """Class and probabilities of sequences, each a list of steps with a value for each feature, or of a data file.

    label, id, step and group name columns of the file that are not called as in training.
    """
    loaded, found = await run_sync(_loaded, backend, name, version)
    if request.headers.get("content-type", "").lower().startswith("application/json"):
        try:
            content = await request.json()
        except ValueError as error:
            raise Problem(HTTPStatus.BAD_REQUEST, f"the body is not valid JSON: {error}") from None
        if not isinstance(content, dict) or not isinstance(content.get("sequences"), list):
            raise Problem(HTTPStatus.UNPROCESSABLE_ENTITY, "the body is an object with a list `sequences`")
        predicted = await run_sync(_predicted, backend, loaded, content["sequences"])
    else:
        async with received_file(request) as file:
            try:
                given = {"label": label, "id": id, "step": step, "group": group}
                columns = {role: column for role, column in given.items() if column is not None}
                predicted = await run_sync(
                    lambda: _predicted(backend, loaded, loaded.read(file.path, labeled=False, **columns))
                )
            except DataError as error:
                raise DataError(str(error).replace(str(file.path), file.name)) from None
    return Prediction(
        model=found.name,
        version=found.version,
        classes=list(predicted.classes),
        ids=list(predicted.ids),
        labels=predicted.labels.tolist(),
        probabilities=predicted.probabilities.tolist(),
    )


def model_of(found: ModelVersion) -> Model:
    """A version as the service says it."""
    return Model(
        name=found.name,
        version=found.version,
        aliases=list(found.aliases),
        study=found.study_name,
        trial=found.trial_number,
        created=found.created_at,
        scores=found.scores,
        params=found.config["params"],
    )


def _check_owner(database: Database, token: Token, found: ModelVersion) -> None:
    owner = None if found.study_id is None else database.access.owner_of(found.study_id)
    check_owner(token, owner, f"model {found.name!r}")


# ------------------------------------------------------------------------------------------------------- predictions


class Loaded:
    """The last models that were asked for, by what they hold: an alias that moves on is another model at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._models: OrderedDict[tuple[str, int, datetime], Bundle] = OrderedDict()

    def get(self, found: ModelVersion) -> Bundle:
        key = (found.name, found.version, found.created_at)
        with self._lock:
            if key not in self._models:
                self._models[key] = load(materialise_model(found))
            self._models.move_to_end(key)
            while len(self._models) > IN_MEMORY:
                self._models.popitem(last=False)
            return self._models[key]


LOADED = Loaded()


def _loaded(backend: Backend, name: str, version: str) -> tuple[Bundle, ModelVersion]:
    with backend.database() as database:
        found = database.registry.get(name, version)
    return LOADED.get(found), found


def _predicted(backend: Backend, model: Bundle, given: list[Any] | Sequences) -> Predictions:
    """Raises DataError for what the model does not take, and Problem for too much at once."""
    count = given.n if isinstance(given, Sequences) else len(given)
    if count > backend.limits.rows:
        reason = f"at most {backend.limits.rows} sequences are predicted at once, got {count}"
        raise Problem(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, reason)
    if not count:
        raise DataError("there is no sequence to predict")
    sequences = given if isinstance(given, Sequences) else [_array(i, sequence) for i, sequence in enumerate(given)]
    with predicting(count):
        return model.predict(sequences)


def _array(row: int, sequence: Any) -> np.ndarray[Any, Any]:
    """Numbers, and null where a value is missing. Raises DataError."""
    try:
        if np.array(sequence).dtype.kind in "fiuO":
            return np.array(sequence, dtype=np.float64)  # null is NaN
    except (TypeError, ValueError, OverflowError):
        pass
    rule = "a list of steps, each a list of a number (or null) for each feature"
    raise DataError(f"sequence {row} must be {rule}")


def _zipped(backend: Backend, found: ModelVersion) -> IO[bytes]:
    archive = tempfile.SpooledTemporaryFile(16 * MIB)  # noqa: SIM115 (closed by who reads it)
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for name, key in found.artifacts.items():
            with backend.store.open_reader(key) as source, file.open(f"{found.name}/{name}", "w") as target:
                while block := source.read(MIB):
                    target.write(block)
    archive.seek(0, io.SEEK_SET)
    return archive


def _blocks(file: IO[bytes]) -> Iterator[bytes]:
    with file:
        while block := file.read(MIB):
            yield block
