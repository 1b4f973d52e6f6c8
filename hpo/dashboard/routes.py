"""optuna-dashboard's routes as we serve them: what would break a study is closed, an odd request is a 4xx.

Writing routes are open by name, so that a new version's new route is closed until somebody has looked at it.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from bottle import Bottle, HTTPError, request, response
from optuna.storages import BaseStorage
from optuna_dashboard._bottle_util import parse_data_uri
from optuna_dashboard.artifact._backend import list_study_artifacts, list_trial_artifacts

from hpo.dashboard.study_json import StudyJson, compressed
from hpo.study.record import RESERVED

READS = ("GET", "HEAD", "OPTIONS")
LARGEST_ID = 2**31 - 1
LONGEST_NOTE = 100_000  # characters; each 2,045 of them are a row
LONGEST_NAME = 255  # characters of a file's name
LONGEST_KEY = 512  # characters of an attribute's name, by Optuna's tables

STUDY, TRIAL = "/api/studies/<study_id:int>", "/api/studies/<study_id:int>/<trial_id:int>"
STUDY_FILES, TRIAL_FILES = "/api/artifacts/<study_id:int>", "/api/artifacts/<study_id:int>/<trial_id:int>"
FILE = "/<artifact_id:re:[0-9a-fA-F-]+>"
PLOT, CSV = f"{STUDY}/plot/<plot_type>", "/csv/<study_id:int>"
DELETIONS = {STUDY, STUDY_FILES + FILE, TRIAL_FILES + FILE}
PREFERENCE = "studies of preferences are not for `hpo`: record them with a script of plain Optuna"

# Why a writing route is closed, and the way to do it.
CLOSED = {
    "/api/studies": "a study made here has no plan and no worker serves it: use `hpo launch STUDY.toml`",
    f"{STUDY}/rename": "a renamed study is a copy without its plan, and the original is deleted: launch a study file "
    "with another [study] name, and `warm_start` to begin with this study's trials",
    "/api/trials/<trial_id:int>/tell": "only the worker that holds a trial ends it: use `hpo stop` to end the study, "
    "or [[enqueue]] in its file to try parameters of your own",
    f"{TRIAL}/skip": PREFERENCE,
    f"{STUDY}/preference": PREFERENCE,
    f"{STUDY}/preference/<history_id>": PREFERENCE,
    f"{STUDY}/preference_feedback_component": PREFERENCE,
    "/incompatible-rdb-schema": "use `hpo db upgrade` to upgrade the tables",
}
UNKNOWN = "this way to write is closed, as it might break a study: use the `hpo` commands, or a script of plain Optuna"
NO_DELETION = "deletion is off; start the dashboard with --allow-delete"

Arguments = Mapping[str, Any]
Body = Mapping[str, Any]


class GuardedRoutes:
    """A plugin of Bottle around each view of the dashboard, whatever way a request took to it.

    The views run without the dashboard's own handler of errors: those that a user can act on pass through.
    """

    name, api = "hpo", 2

    def __init__(
        self,
        storage: BaseStorage,
        allow_delete: bool,
        closed: Mapping[tuple[str, str], str] | None = None,
        check_writer: Callable[[Arguments], None] | None = None,
    ) -> None:
        """closed: more routes that are closed, and why. check_writer raises HTTPError for a visitor who may not write
        to the study or trial of these arguments."""
        self._storage, self._allow_delete = storage, allow_delete
        self._closed, self._check_writer = closed or {}, check_writer or _check_nothing
        self._studies = StudyJson(storage)
        self._writing_notes = threading.Lock()  # so that two visitors' pieces of a note do not mix
        self._writes: dict[tuple[str, str], Callable[[Arguments], None]] = {
            ("PUT", f"{STUDY}/note"): self._check_note,
            ("PUT", f"{TRIAL}/note"): self._check_note,
            ("POST", "/api/trials/<trial_id:int>/user-attrs"): _check_attributes,
            ("POST", STUDY_FILES): self._check_upload,
            ("POST", TRIAL_FILES): self._check_upload,
            **{("DELETE", rule): self._check_deletion for rule in DELETIONS},
        }

    def install(self, app: Bottle) -> None:
        """Guard every view of the app, and let errors through to its caller."""
        app.catchall = False
        app.default_error_handler = _reason_as_json
        app.install(self)

    def apply(self, callback: Callable[..., Any], route: Any) -> Callable[..., Any]:
        """The view to call instead, by Bottle's protocol."""
        method, rule = route.method, route.rule
        if reason := self._why_closed(method, rule):
            return _refusal(reason)
        view = inspect.unwrap(callback)
        if (method, rule) == ("GET", STUDY):
            view = self._study_view(view)
        elif rule == PLOT:
            view = _plot_view(view)
        check = self._writes.get((method, rule), _check_nothing)
        held: AbstractContextManager[Any] = self._writing_notes if rule.endswith("/note") else nullcontext()

        def checked(**args: Any) -> Any:
            if any(isinstance(value, int) and not 0 <= value <= LARGEST_ID for value in args.values()):
                raise HTTPError(404, "there is no study or trial of that number")
            if rule.startswith("/api/"):
                response.content_type = "application/json"
            if method not in READS:
                self._check_writer(args)
            check(args)
            with held:
                return view(**args)

        return checked

    def _why_closed(self, method: str, rule: str) -> str | None:
        if method in READS:
            return None
        if (method, rule) in self._closed:
            return self._closed[method, rule]
        if (method, rule) not in self._writes:
            return CLOSED.get(rule, UNKNOWN)
        return NO_DELETION if method == "DELETE" and not self._allow_delete else None

    def _study_view(self, theirs: Callable[..., Any]) -> Callable[..., Any]:
        """The answer to the request that a study's page repeats every few seconds."""

        def view(study_id: int) -> Any:
            after = request.query.get("after", "0")
            if not re.fullmatch(r"[0-9]{1,20}", after):
                raise HTTPError(400, "`after` is a number of trials, 0 or more")
            body = self._studies.study(study_id, int(after))
            if body is None:
                return theirs(study_id)
            response.add_header("Vary", "Accept-Encoding")
            if "gzip" in request.get_header("Accept-Encoding", ""):
                response.set_header("Content-Encoding", "gzip")
                return compressed(body)
            return body

        return view

    # ------------------------------------------------------------------------------------------ checks of what is sent

    def _check_note(self, args: Arguments) -> None:
        body = _body()
        if type(body.get("version")) is not int or not isinstance(body.get("body"), str):
            raise HTTPError(400, "a note has a `version`, a whole number, and a `body`, a text")
        if len(body["body"]) > LONGEST_NOTE:
            raise HTTPError(413, f"a note has at most {LONGEST_NOTE} characters")
        self._check_known(args)

    def _check_upload(self, args: Arguments) -> None:
        body = _body()
        name = body.get("filename", "")
        if not isinstance(body.get("file"), str) or not isinstance(name, str) or len(name) > LONGEST_NAME:
            raise HTTPError(
                400, f"an upload has a `file`, a data URI, and a `filename` of at most {LONGEST_NAME} letters"
            )
        try:
            parse_data_uri(body["file"])
        except ValueError:
            raise HTTPError(400, "`file` is not a data URI in base64") from None
        self._check_known(args)

    def _check_deletion(self, args: Arguments) -> None:
        _body(needed=False)
        trial = self._check_known(args)
        if (artifact_id := args.get("artifact_id")) is None:
            return
        attributes = self._storage.get_study_system_attrs(args["study_id"])
        found = (
            list_study_artifacts(attributes)
            if trial is None
            else list_trial_artifacts(attributes, self._storage.get_trial_system_attrs(trial._trial_id), trial)
        )
        if artifact_id not in (artifact["artifact_id"] for artifact in found):
            raise HTTPError(404, "there is no such file")

    def _check_known(self, args: Arguments) -> Any:
        """The trial of that study, None for the study itself. Raises MissingRecord, and HTTPError for another's."""
        study_id, trial_id = args["study_id"], args.get("trial_id")
        self._storage.get_study_name_from_id(study_id)
        if trial_id is None:
            return None
        for trial in self._storage.get_all_trials(study_id, deepcopy=False):
            if trial._trial_id == trial_id:
                return trial
        raise HTTPError(404, f"study {study_id} has no trial of the id {trial_id}")


def _check_nothing(args: Arguments) -> None:
    """For a route that reads."""


def _check_attributes(args: Arguments) -> None:
    attributes = _body().get("user_attrs")
    if not isinstance(attributes, dict):
        raise HTTPError(400, "`user_attrs` is an object of names and values")
    for key in attributes:
        if key in RESERVED:
            raise HTTPError(403, f"the attribute {key!r} is what a worker records of a trial: choose another name")
        if not key.isprintable() or len(key) > LONGEST_KEY:
            raise HTTPError(400, f"an attribute's name has at most {LONGEST_KEY} printable characters")


def _body(*, needed: bool = True) -> Body:
    """The request's JSON object. Raises HTTPError for anything else."""
    try:
        body = request.json
    except RecursionError:
        raise HTTPError(400, "the JSON is nested too deeply") from None
    if body is None and not needed:
        return {}
    if not isinstance(body, dict):
        raise HTTPError(400, "a JSON object is needed, sent as application/json")
    return body


def _refusal(reason: str) -> Callable[..., Any]:
    def refuse(**_: Any) -> Any:
        raise HTTPError(403, reason)

    return refuse


def _plot_view(theirs: Callable[..., Any]) -> Callable[..., Any]:
    """Pictures by plotly, which is no dependency of ours; the page draws its own."""

    def view(**args: Any) -> Any:
        if importlib.util.find_spec("plotly") is None:
            raise HTTPError(404, "plotly is not installed")
        try:
            return theirs(**args)
        except (ImportError, ValueError) as error:
            raise HTTPError(400, f"this study has no such picture: {error}") from error

    return view


def _reason_as_json(error: HTTPError) -> str:
    """What the dashboard's page shows of an error; also where no route was found."""
    response.content_type = "application/json"
    return json.dumps({"reason": str(error.body)})
