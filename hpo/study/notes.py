"""What the dashboard shows of a study beside Optuna's own: the note of a study, the files of a trial.

Attributes under optuna-dashboard's own names, written by whoever works on the study.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial

from hpo.storage.artifacts import ArtifactStore, MissingArtifactError

METRIC_NAMES = "study:metric_names"  # a study's system attribute under Optuna's name: one name an objective
_NOTE_PART = 2045  # characters of one piece of a note, optuna-dashboard's own limit
_NOTE = "dashboard:note_str:"
_PROMOTED = "**Promoted:**"  # the line of a study's note that tells the model
_WIDENED = "**Wider:**"  # … and the one that tells how its space was widened


def attach_artifact(storage: BaseStorage, study_id: int, trial_id: int, key: str, filename: str, mimetype: str) -> None:
    """Show what is stored under `key` as a file of this trial, running or finished; nothing is copied."""
    shown = artifact_id(key)
    meta = json.dumps({"artifact_id": shown, "filename": filename, "mimetype": mimetype, "encoding": None})
    try:
        storage.set_trial_system_attr(trial_id, f"artifacts:{shown}", meta)
    except UpdateFinishedTrialError:
        # A finished trial takes no more attributes; the dashboard also looks for them on its study. Slower to
        # search (every trial against all of them), so only where needed.
        storage.set_study_system_attr(study_id, f"dashboard:artifacts:{trial_id}:{shown}", meta)


def log_of(store: ArtifactStore, trial: FrozenTrial) -> str | None:
    """What was logged of a trial that one of our workers ended, as CSV; None where nothing is kept."""
    key = attached(trial, "log.csv")
    try:
        return None if key is None else store.get(key).decode()
    except MissingArtifactError:
        return None


def attached(trial: FrozenTrial, filename: str) -> str | None:
    """The key of a file that was attached to the trial while it ran; None where there is none."""
    found = [json.loads(value) for key, value in trial.system_attrs.items() if key.startswith("artifacts:")]
    ids = [each["artifact_id"] for each in found if each["filename"] == filename]
    ours = [each for each in ids if "-" not in each]  # others are visitors' own
    return bytes.fromhex(ours[-1]).decode() if ours else None


def describe_study(storage: BaseStorage, study_id: int, metric_name: str, note_markdown: str) -> None:
    """Name the study's objective and replace its note on the dashboard (Markdown) where that differs."""
    storage.set_study_system_attr(study_id, METRIC_NAMES, [metric_name])
    _set_note(storage, study_id, storage.get_study_system_attrs(study_id), note_markdown)


def announce_model(storage: BaseStorage, study_id: int, sentence: str) -> None:
    """Begin the study's note with what is promoted, in place of what was; the rest of it stays as visitors left it."""
    _announce(storage, study_id, _PROMOTED, sentence)


def announce_widening(storage: BaseStorage, study_id: int, sentence: str) -> None:
    """Begin the study's note with how its space was widened last."""
    _announce(storage, study_id, _WIDENED, sentence)


def _announce(storage: BaseStorage, study_id: int, what: str, sentence: str) -> None:
    attrs = storage.get_study_system_attrs(study_id)
    pieces = (str(attrs.get(f"{_NOTE}{i}", "")) for i in range(_pieces(attrs)))
    rest = re.sub(rf"(?m)^{re.escape(what)}.*\n*", "", "".join(pieces))
    _set_note(storage, study_id, attrs, f"{what} {sentence}\n\n{rest}")


def _set_note(storage: BaseStorage, study_id: int, attrs: Mapping[str, Any], text: str) -> None:
    pieces = [text[i : i + _NOTE_PART] for i in range(0, len(text), _NOTE_PART)]
    pieces += [""] * (_pieces(attrs) - len(pieces))  # a shorter note blanks the pieces of a longer one
    if pieces == [attrs.get(f"{_NOTE}{i}") for i in range(len(pieces))]:
        return
    for i, part in enumerate(pieces):
        storage.set_study_system_attr(study_id, f"{_NOTE}{i}", part)
    storage.set_study_system_attr(study_id, "dashboard:note_ver", attrs.get("dashboard:note_ver", 0) + 1)


def _pieces(attrs: Mapping[str, Any]) -> int:
    return sum(name.startswith(_NOTE) for name in attrs)


def artifact_id(key: str) -> str:
    """A key's bytes in hex: the dashboard's addresses take only hex digits and dashes."""
    return key.encode().hex()
