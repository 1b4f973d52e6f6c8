"""The models' pages: versions with scores, aliases, downloads, report, card and predictions."""

from __future__ import annotations

from http import HTTPStatus
from urllib.parse import quote

from anyio.to_thread import run_sync
from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse
from markdown_it import MarkdownIt
from markupsafe import Markup

from hpo.errors import HpoError
from hpo.models.data.columns import ROLES
from hpo.promote.version_scores import scores_if_known
from hpo.service import models
from hpo.service.access import Uses
from hpo.service.backend import Backend
from hpo.service.pages.rendering import HEADERS, PageRoute, go, page
from hpo.service.pages.scores import by_name, parts_of, scored
from hpo.service.pages.visitor import FromReader, FromSubmitter, Looks
from hpo.service.predict import predictor_of
from hpo.service.problems import Problem, told
from hpo.service.schemas import Alias, Prediction
from hpo.storage.access import Token
from hpo.storage.registry import MissingModel

router = APIRouter(prefix="/models", route_class=PageRoute, include_in_schema=False)
ROWS = 100  # predictions that the page shows; the CSV has all
PICTURE_TYPES = {"svg": "image/svg+xml", "png": "image/png"}
PICTURE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; sandbox"  # opened by itself it is a document
DONE = {
    "named": "The alias names this version now.",
    "unnamed": "The alias names nothing any more.",
    "removed": "The version is deleted.",
}
_CARD = MarkdownIt("commonmark", {"html": False}).enable("table")


@router.get("/{name}")
def latest(name: str, request: Request, visitor: Looks, backend: Uses, done: str | None = None) -> Response:
    """The version that the name alone means."""
    return _shown(request, backend, visitor.token, name, "latest", done=DONE.get(done or ""))


@router.get("/{name}/{version}")
def one(name: str, version: str, request: Request, visitor: Looks, backend: Uses, done: str | None = None) -> Response:
    """One version: scores with intervals, parameters, files, aliases, and a form that predicts."""
    return _shown(request, backend, visitor.token, name, version, done=DONE.get(done or ""))


@router.get("/{name}/{version}/bundle")
def bundle(name: str, version: str, visitor: Looks, backend: Uses) -> StreamingResponse:
    """The model's folder as a zip archive."""
    return models.bundle(name, version, visitor.token, backend)


@router.get("/{name}/{version}/report")
def report(name: str, version: str, visitor: Looks, backend: Uses) -> Response:
    """The report of the study as of the model's promotion, as it was stored."""
    return models.report(name, version, visitor.token, backend)


@router.get("/{name}/{version}/card")
def card(name: str, version: str, request: Request, visitor: Looks, backend: Uses) -> Response:
    """The model card as a page. No HTML of the card's own gets in."""
    found = models.model(name, version, visitor.token, backend)
    text = bytes(models.card(name, version, visitor.token, backend).body).decode()
    return page(request, "card.html", model=found, card=Markup(_CARD.render(text)))


@router.get("/{name}/{version}/card.md")
def markdown(name: str, version: str, visitor: Looks, backend: Uses) -> Response:
    """The model card in Markdown, to keep."""
    found = models.model(name, version, visitor.token, backend)
    answer = models.card(name, version, visitor.token, backend)
    answer.headers["Content-Disposition"] = f'attachment; filename="{found.name}-v{found.version}.md"'
    return answer


@router.get("/{name}/{version}/{picture}.{kind}")
def picture(name: str, version: str, picture: str, kind: str, visitor: Looks, backend: Uses) -> Response:
    """A picture of the model card."""
    with backend.database() as database:
        key = database.registry.get(name, version).artifacts.get(f"{picture}.{kind}")
    if key is None or kind not in PICTURE_TYPES:
        raise Problem(HTTPStatus.NOT_FOUND, f"the model has no picture '{picture}.{kind}'")
    headers = {**HEADERS, "Cache-Control": "private", "Content-Security-Policy": PICTURE_POLICY}
    return Response(backend.store.get(key), media_type=PICTURE_TYPES[kind], headers=headers)


@router.post("/{name}/{version}/predict")
async def predict(name: str, version: str, request: Request, backend: Uses, form: FromReader) -> Response:
    """Predictions for a file: as a table, or as CSV."""
    columns = {role: form.text(role) for role in ROLES if form.text(role)}
    try:
        if "file" not in form.files:
            raise Problem(HTTPStatus.UNPROCESSABLE_ENTITY, "choose a file with sequences")
        predictor = predictor_of(request)
        model = await predictor.model(name, version)
        found = await predictor.prediction_of_file(request, model, form.files["file"], columns)
    except MissingModel:
        raise
    except HpoError as error:
        status, reason = told(request, error)
        return await run_sync(
            lambda: _shown(
                request, backend, form.token, name, version, status, failed={"predict": reason}, typed=form.fields
            )
        )
    if form.text("as") == "csv":
        headers = {**HEADERS, "Content-Disposition": f'attachment; filename="{found.model}-v{found.version}.csv"'}
        return Response(found.predictions().as_csv(), media_type="text/csv; charset=utf-8", headers=headers)
    return page(
        request,
        "predictions.html",
        found=found,
        file=form.files["file"].name,
        rows=_rows(found),
        counts=[(name, found.labels.count(name)) for name in found.classes],
        typed=form.fields,
    )


@router.post("/{name}/{version}/{action}")
def act(name: str, version: str, action: str, request: Request, backend: Uses, form: FromSubmitter) -> Response:
    """Let an alias name this version or nothing, or remove the version; what went wrong is said on its page."""
    try:
        if action == "alias":
            models.set_alias(name, form.text("alias"), Alias(version=_number(version)), form.token, backend)
            return go(f"{_path(name, version)}?done=named")
        if action == "unalias":
            models.drop_alias(name, form.text("alias"), form.token, backend)
            return go(f"{_path(name, version)}?done=unnamed")
        if action == "delete":
            models.delete(name, _number(version), form.token, backend)
            left = any(model.name == name for model in models.models(form.token, backend))
            return go(f"{_path(name) if left else '/'}?done=removed")
    except HpoError as error:
        status, reason = told(request, error)
        return _shown(request, backend, form.token, name, version, status, failed={action: reason}, typed=form.fields)
    raise Problem(HTTPStatus.NOT_FOUND, f"a version gets or loses an alias, or is deleted, not {action!r}")


def _path(name: str, version: str | None = None) -> str:
    path = f"/models/{quote(name, safe='')}"
    return path if version is None else f"{path}/{quote(version, safe='')}"


def _number(version: str) -> int:
    if not version.isdecimal() or not 0 < int(version) < 10**9:
        raise Problem(HTTPStatus.NOT_FOUND, f"name the version by its number, got {version[:50]!r}")
    return int(version)


def _shown(
    request: Request,
    backend: Backend,
    token: Token,
    name: str,
    wanted: str,
    status: HTTPStatus = HTTPStatus.OK,
    *,
    done: str | None = None,
    failed: dict[str, str] | None = None,
    typed: dict[str, str] | None = None,
) -> Response:
    chosen = scored(models.model(name, wanted, token, backend))
    (named,) = by_name(model for model in models.models(token, backend) if model.name == name)
    with backend.database() as database:
        version = database.registry.get(name, wanted)
        owner = None if version.study_id is None else database.access.owner_of(version.study_id)
        named_groups = models.knows_groups(database, token, version.study_id)
        found = scores_if_known(database.registry, name, version.version, backend.store, with_names=named_groups)
    return page(
        request,
        "model.html",
        status,
        chosen=chosen,
        named=named,
        owner=owner,
        has_report=models.REPORT in version.artifacts,
        parts=parts_of(found),
        named_groups=named_groups,
        done=done,
        failed=failed or {},
        typed=typed or {},
    )


def _rows(found: Prediction) -> list[tuple[str, str, float]]:
    """The first sequences: id, class, and its probability."""
    every = zip(found.ids, found.labels, found.probabilities, strict=True)
    return [(name, label, shares[found.classes.index(label)]) for name, label, shares in list(every)[:ROWS]]
