"""A new study in two steps: send the data and see what was read, then start."""

from __future__ import annotations

from dataclasses import fields
from http import HTTPStatus
from typing import Any, TypeVar
from urllib.parse import quote

from fastapi import APIRouter, Request, Response

from hpo.errors import HpoError
from hpo.models.data.columns import ROLES
from hpo.service.access import Uses
from hpo.service.backend import Backend
from hpo.service.data import describe, keep
from hpo.service.pages.rendering import PageRoute, go, page
from hpo.service.pages.visitor import FromSubmitter, Posted, Submits
from hpo.service.problems import Problem, told
from hpo.service.schemas import DataFile
from hpo.service.studies import submit_study
from hpo.storage.keys import UPLOAD, uploaded_name
from hpo.study.config import DataSection, StudySection, default_name

router = APIRouter(route_class=PageRoute, include_in_schema=False)
PARTS = ("train", "test")
T = TypeVar("T")
_DEFAULTS = {item.name: item.default for item in (*fields(DataSection), *fields(StudySection))}
COLUMNS = {role: str(_DEFAULTS[role] or "") for role in ROLES}  # "": no column has that role unless one is named
SOURCE = " (the study file)"  # how the command line's errors end


@router.get("/new")
def new(request: Request, visitor: Submits) -> Response:
    """The form for data files."""
    return page(request, "new.html", typed={}, columns=COLUMNS, reason=None)


@router.post("/new")
def check(request: Request, backend: Uses, form: FromSubmitter) -> Response:
    """Store the files; what was read from them, and the form that starts a study."""
    try:
        if "train" not in form.files:
            raise Problem(HTTPStatus.UNPROCESSABLE_ENTITY, "choose a file with training data")
        found = {
            part: keep(backend, form.token, form.files[part], _columns(form)) for part in PARTS if part in form.files
        }
    except HpoError as error:
        status, reason = told(request, error)
        return page(request, "new.html", status, typed=form.fields, columns=COLUMNS, reason=reason)
    typed = {
        "name": default_name(uploaded_name(found["train"].key)),
        "trials": str(_DEFAULTS["trials"]),
        **{part: data.key for part, data in found.items()},
        **_columns(form),
    }
    return _start_page(request, found, typed)


@router.post("/new/start")
def start(request: Request, backend: Uses, form: FromSubmitter) -> Response:
    """Submit the study, as `POST /v1/studies` does."""
    try:
        study, created = submit_study(backend, form.token, _tables(form), None)
    except HpoError as error:
        status, reason = told(request, error)
        return _start_page(request, _read_again(backend, form), form.fields, status, reason.removesuffix(SOURCE))
    return go(f"/studies/{quote(study.name, safe='')}?done={'started' if created else 'known'}")


def _start_page(
    request: Request,
    found: dict[str, DataFile],
    typed: dict[str, str],
    status: HTTPStatus = HTTPStatus.OK,
    reason: str | None = None,
) -> Response:
    names = {part: uploaded_name(data.key) for part, data in found.items()}
    return page(request, "start.html", status, found=found, names=names, typed=typed, columns=COLUMNS, reason=reason)


def _columns(form: Posted) -> dict[str, str]:
    return _filled({role: form.text(role) or usual for role, usual in COLUMNS.items()})


def _tables(form: Posted) -> dict[str, Any]:
    """A study file's tables; what is left empty takes its default."""
    trials = form.text("trials")
    study = {
        "name": form.text("name"),
        "trials": int(trials) if trials.isdecimal() and len(trials) < 10 else trials,
        "timeout": form.text("timeout"),
    }
    named = {role: column for role, column in _columns(form).items() if column != COLUMNS[role]}
    parts = {part: form.text(part) for part in PARTS}
    return {"study": _filled(study), "data": {**_filled(parts), **named}}


def _filled(table: dict[str, T]) -> dict[str, T]:
    return {key: value for key, value in table.items() if value != ""}


def _read_again(backend: Backend, form: Posted) -> dict[str, DataFile]:
    """What the stored files hold. Raises Problem where the form names none."""
    keys = {part: form.text(part) for part in PARTS if form.text(part)}
    if "train" not in keys or not all(UPLOAD.fullmatch(key) and backend.store.exists(key) for key in keys.values()):
        raise Problem(HTTPStatus.UNPROCESSABLE_ENTITY, "the data files are gone: send them again")
    return {part: describe(backend, key, _columns(form)) for part, key in keys.items()}
