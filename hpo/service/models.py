"""Promoted models: their versions, aliases and files."""

from __future__ import annotations

import io
import tempfile
import zipfile
from collections.abc import Iterator
from http import HTTPStatus
from typing import IO, Annotated

from fastapi import APIRouter, Path
from fastapi.responses import HTMLResponse, PlainTextResponse, StreamingResponse

from hpo.models.class_scores import ModelScores
from hpo.promote.version_scores import version_scores
from hpo.service.access import Reader, Submitter, Uses, Version, check_owner
from hpo.service.backend import MIB, Backend, Database
from hpo.service.problems import Problem
from hpo.service.schemas import Alias, Model
from hpo.storage.access import Token
from hpo.storage.locks import exclusively
from hpo.storage.registry import ModelVersion

router = APIRouter(prefix="/v1/models", tags=["models"])
REPORT = "report.html"  # of a model's files
# A report is a page with a style sheet within it and nothing else: no script of whoever wrote it runs, and nothing is
# loaded.
REPORT_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; sandbox",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
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


@router.get("/{name}/{version}/scores")
def scores(name: str, version: Version, token: Reader, backend: Uses) -> ModelScores:
    """The validation and the test part by class and by group, each class against the rest, with 95 % intervals. What
    the groups are called, only the study's owner and admins are told."""
    with backend.database() as database:
        found = database.registry.get(name, version)
        named = knows_groups(database, token, found.study_id)
        return version_scores(found, backend.store, database.registry, with_names=named)


class Markdown(PlainTextResponse):
    """A text for people."""

    media_type = "text/markdown"


@router.get("/{name}/{version}/report", response_class=HTMLResponse)
def report(name: str, version: Version, token: Reader, backend: Uses) -> HTMLResponse:
    """The report of the study as of the model's promotion: one HTML file that needs nothing else. 404 for a model of an
    earlier version, which has none; its study's report and its card say as much as is known."""
    with backend.database() as database:
        found = database.registry.get(name, version)
    if REPORT not in found.artifacts:
        what = f"{found.name} version {found.version} was promoted without a report"
        raise Problem(HTTPStatus.NOT_FOUND, f"{what}: see its card, or its study's report")
    return HTMLResponse(backend.store.get(found.artifacts[REPORT]), headers=REPORT_HEADERS)


@router.get("/{name}/{version}/card", response_class=Markdown)
def card(name: str, version: Version, token: Reader, backend: Uses) -> Markdown:
    """The model card, in Markdown."""
    with backend.database() as database:
        found = database.registry.get(name, version)
    return Markdown(backend.store.get(found.artifacts["README.md"]).decode())


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
    with exclusively(backend.url, f"model {name}"), backend.database() as database:
        _check_owner(database, token, database.registry.get(name, alias))
        database.registry.drop_alias(name, alias)
        database.access.note(token, "model.alias", name, {"alias": alias})


@router.delete("/{name}/{version}", status_code=HTTPStatus.NO_CONTENT)
def delete(name: str, version: Annotated[int, Path(ge=1, le=10**9)], token: Submitter, backend: Uses) -> None:
    """Remove a version that no alias but `latest` names."""
    # One after the other: who comes second finds none.
    with exclusively(backend.url, f"model {name}"), backend.database() as database:
        found = database.registry.get(name, version)
        _check_owner(database, token, found)
        for key in database.registry.delete(name, version):
            backend.store.delete(key)
        database.access.note(token, "model.delete", name, {"version": version})


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


def knows_groups(database: Database, token: Token, study_id: int | None) -> bool:
    """Whether the token's holder may know what the groups in a study's data are called, which may be people: its owner
    and admins."""
    if token.may("admin"):
        return True
    return study_id is not None and database.access.owner_of(study_id) == token.owner


def _check_owner(database: Database, token: Token, found: ModelVersion) -> None:
    owner = None if found.study_id is None else database.access.owner_of(found.study_id)
    check_owner(token, owner, f"model {found.name!r}")


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
