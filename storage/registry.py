"""Promoted model versions: numbered from 1 by name, with aliases; and their files in the artifact store.

Each change is one transaction, under a lock on the name, and safe to repeat after a lost connection.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime
from pathlib import Path
from typing import Any

from hpo.errors import StudyFault
from hpo.storage.artifacts import ArtifactStore, DamagedArtifactError
from hpo.storage.connection import Connection, Row
from hpo.storage.keys import content_hash, described, model_key
from hpo.storage.statements import statement
from hpo.storage.tables import ensure
from hpo.temporary import temporary_folder

log = logging.getLogger("hpo")

LATEST = "latest"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_LOCK_MODEL = statement("lock_model")
_ADD_VERSION, _ADDED_VERSION = statement("add_version"), statement("added_version")
_RENEW_REPORT = statement("renew_report")
_ALL_VERSIONS, _VERSIONS_OF, _MODEL_NAMES = (
    statement("all_versions"),
    statement("versions_of"),
    statement("model_names"),
)
_GROUP_NAMES, _DIAGNOSIS = statement("group_names"), statement("diagnosis")
_SET_ALIAS, _DROP_ALIAS, _ALIAS_CHANGES = (statement(name) for name in ("set_alias", "drop_alias", "alias_changes"))
_DELETE = [statement(name) for name in ("lock_model", "delete_versions", "latest_is_newest", "kept_artifacts")]


class RegistryError(StudyFault):
    """There is no such model, version or alias; or what was to be registered breaks a rule."""


class MissingModel(RegistryError):
    """There is no such model, version or alias."""


class NamedModel(RegistryError):
    """An alias names the version: somebody relies on it."""


@dataclass(frozen=True)
class ModelVersion:
    """One promoted model."""

    name: str
    version: int  # 1, 2, … within the name
    study_id: int | None
    study_name: str | None
    trial_number: int | None
    created_at: datetime  # by the database's clock, with a time zone
    scores: dict[str, Any]  # JSON
    config: dict[str, Any]  # JSON
    artifacts: dict[str, str]  # file name -> key in the artifact store
    aliases: tuple[str, ...] = field(default=(), compare=False)  # those that named it when it was read

    @property
    def default(self) -> bool:
        """Whether the name alone meant this version when it was read."""
        return LATEST in self.aliases


@dataclass(frozen=True)
class AliasChange:
    """That an alias has named another version from some time on."""

    alias: str
    version: int | None  # None: it was taken away
    changed_at: datetime


class Registry:
    """The promoted models of a database; creates the tables where there are none.

    database: a URL, or a connection to share, with its patience. Raises DatabaseUnavailable like it.
    """

    def __init__(self, database: str | Connection) -> None:
        self._connection = Connection(database) if isinstance(database, str) else database
        ensure(self._connection)

    def promote(
        self,
        name: str,
        *,
        study_id: int,
        study_name: str,
        trial_number: int,
        scores: Mapping[str, Any],
        config: Mapping[str, Any],
        artifacts: Mapping[str, str],
        group_names: Mapping[str, Sequence[str]] | None = None,
        diagnosis: Mapping[str, Any] | None = None,
        latest: bool = True,
    ) -> ModelVersion:
        """The trial's model as the next version of `name`; one transaction.

        group_names: of each part of the data the names of the groups whose scores its files hold, in their order; only
        `group_names` tells them again. diagnosis: what a report draws of its predictions, which only `diagnosis` tells
        again, as it holds values of the data.
        latest: whether it becomes "latest", the version that the name alone means; the first one does anyway. Where
        scores name a test_part, they are stored with test_looks: how many versions were measured on that part.
        Safe with several promoters at once. The same trial with the same artifacts again, whatever its report says by
        now, is the version that it was, with the new report. Raises RegistryError for a name that breaks the rule, or
        values that JSON does not have (NaN).
        """
        _check_name("a model name", name)
        hidden = {"group_names": group_names, "diagnosis": diagnosis}
        given = {
            "name": name,
            "study": study_id,
            "study_name": study_name,
            "trial_number": trial_number,
            "scores": _json("scores", scores),
            "config": _json("config", {**config, **{key: value for key, value in hidden.items() if value}}),
            "artifacts": json.dumps(dict(artifacts)),
            "latest": latest,
        }
        (row,) = self._connection.execute(_LOCK_MODEL, _ADD_VERSION, _RENEW_REPORT, _ADDED_VERSION, given=given)
        return _version(row)

    def models(self) -> list[ModelVersion]:
        """Every version, by name and number."""
        return [_version(row) for row in self._connection.execute(_ALL_VERSIONS)]

    def get(self, name: str, version: int | str | None = None) -> ModelVersion:
        """One version by its number or alias; without either the latest. RegistryError lists what there is."""
        rows = self._connection.execute(_VERSIONS_OF, given={"name": name})
        return self._chosen(rows, name, version)

    def group_names(self, model: ModelVersion) -> dict[str, list[str]]:
        """The names of the groups by part, as `promote` got them; empty for a version without, or that is gone."""
        rows = self._connection.execute(_GROUP_NAMES, given={"name": model.name, "version": model.version})
        return next((names for (names,) in rows if names), {})

    def diagnosis(self, model: ModelVersion) -> dict[str, Any] | None:
        """What `promote` got to draw of the version's predictions; None where there is nothing, or no such version."""
        rows = self._connection.execute(_DIAGNOSIS, given={"name": model.name, "version": model.version})
        return next((found for (found,) in rows), None)

    def set_alias(self, name: str, alias: str, version: int | str | None = None) -> ModelVersion:
        """Let an alias such as "champion" name a version, the latest by default; it names one at a time."""
        _check_name("an alias", alias)
        if alias == LATEST or alias.isdecimal():
            raise RegistryError(f'an alias is neither a number nor "{LATEST}", which promotion sets, got {alias!r}')
        given = {"name": name, "alias": alias, "wanted": _wanted(version)}
        rows = self._connection.execute(_LOCK_MODEL, _SET_ALIAS, _VERSIONS_OF, given=given)
        return self._chosen(rows, name, version)

    def make_default(self, name: str, version: int) -> ModelVersion:
        """Let the name alone mean that version."""
        given = {"name": name, "alias": LATEST, "wanted": _wanted(version)}
        rows = self._connection.execute(_LOCK_MODEL, _SET_ALIAS, _VERSIONS_OF, given=given)
        return self._chosen(rows, name, version)

    def drop_alias(self, name: str, alias: str) -> None:
        """Let an alias name nothing any more. Raises MissingModel where it names nothing."""
        if alias == LATEST:
            raise RegistryError(f'"{LATEST}" names the version that the name alone means, and stays')
        self.get(name, alias)
        self._connection.execute(_LOCK_MODEL, _DROP_ALIAS, given={"name": name, "alias": alias})

    def alias_changes(self, name: str) -> list[AliasChange]:
        """Which versions the aliases of a name have named, the newest change first."""
        return [AliasChange(*row) for row in self._connection.execute(_ALIAS_CHANGES, given={"name": name})]

    def delete(self, name: str, version: int | str | None = None) -> list[str]:
        """Remove one version, or the whole name without one; "latest" moves to the newest left.

        Returns the keys of the artifacts that no version names any more, for the caller to delete. The
        number of the newest version is given again once that is removed. Raises RegistryError where another alias
        names one of them.
        """
        rows = self._connection.execute(_VERSIONS_OF, given={"name": name})
        model = self._chosen(rows, name, version)
        gone = [_version(row) for row in rows] if version is None else [model]
        _check_unnamed(gone)
        known = {(each.version, each.created_at) for each in gone}
        given = {"name": name, "versions": [v for v, _ in known], "created": [created for _, created in known]}
        kept = {key for (key,) in self._connection.execute(*_DELETE, given=given)}
        left = map(_version, self._connection.execute(_VERSIONS_OF, given={"name": name}))
        _check_unnamed([each for each in left if (each.version, each.created_at) in known])  # since it was looked at
        return sorted({key for each in gone for key in each.artifacts.values()} - kept)

    def _chosen(self, rows: list[Row], name: str, version: int | str | None) -> ModelVersion:
        """Of a name's versions the one of that number or alias, the latest without either."""
        if not rows:
            names = [known for (known,) in self._connection.execute(_MODEL_NAMES)]
            raise MissingModel(f"no model is named {name!r}; there are: {', '.join(names) or 'none yet'}")
        wanted, models = _wanted(version), [_version(row) for row in rows]
        for model in models:
            if wanted in (str(model.version), *model.aliases):
                return model
        known = ", ".join(" = ".join((str(model.version), *model.aliases)) for model in models)
        raise MissingModel(f"model {name!r} has no version or alias {wanted!r}; there are: {known}")


def publish(store: ArtifactStore, folder: Path, prefix: str) -> dict[str, str]:
    """Store the files of a flat folder; file name -> key.

    A key is `prefix-SHA256-name`: other content has another key, and the same content is stored once. What is damaged
    in the store is stored again.
    """
    artifacts = {}
    for path in sorted(folder.iterdir()):
        if not path.is_file():
            raise RegistryError(f"a model folder holds files only, got a folder: {path}")
        key = artifacts[path.name] = model_key(prefix, _sha256(path), path.name)
        if not store.holds(key):
            store.put(key, path)
    return artifacts


def materialise(store: ArtifactStore, artifacts: Mapping[str, str], folder: Path, *, repair: bool = False) -> None:
    """Fetch published files; the folder appears with all of them, checked, or not at all.

    A folder that has them already is left as it is. One that lacks some or has others under their names is a
    RegistryError or, with `repair`, gets them; what else lies in it stays. RegistryError also for a damaged artifact.
    """
    if any(Path(name).name != name for name in artifacts):
        raise RegistryError(f"a model's files have plain names, got {sorted(artifacts)}")
    if holds(folder, artifacts):
        return
    if repair and folder.is_dir():
        _repair(store, artifacts, folder)
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with temporary_folder(folder.parent, "part") as part:
            for name, key in artifacts.items():
                _fetch(store, key, part / name)
            part.rename(folder)
    except OSError as error:
        if not holds(folder, artifacts):  # else another process was first
            raise RegistryError(f"{folder} is in the way: it holds other files; remove it") from error


def holds(folder: Path, artifacts: Mapping[str, str]) -> bool:
    """Whether the folder has every file with the content that its key names."""
    return all(_is_whole(folder / name, key) for name, key in artifacts.items())


def _repair(store: ArtifactStore, artifacts: Mapping[str, str], folder: Path) -> None:
    for name, key in artifacts.items():
        if not _is_whole(folder / name, key):
            log.warning("%s is missing or damaged: it is fetched again", folder / name)
            _fetch(store, key, folder / name)


def _fetch(store: ArtifactStore, key: str, path: Path) -> None:
    try:
        store.fetch(key, path)
    except DamagedArtifactError as error:
        raise RegistryError(
            f"{described(key)} is damaged in {store.place}: it is not what its key says, {key}; promote the trial "
            "again, which stores it anew"
        ) from error


def _is_whole(path: Path, key: str) -> bool:
    return path.is_file() and content_hash(key) == _sha256(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_unnamed(models: list[ModelVersion]) -> None:
    """Raise NamedModel where an alias other than "latest" names one of them: somebody relies on it."""
    for model in models:
        if names := [alias for alias in model.aliases if alias != LATEST]:
            raise NamedModel(
                f"version {model.version} of {model.name!r} is what {', '.join(names)} names: let that name another "
                f"version first, or none (`hpo alias {model.name} {names[0]} --delete`)"
            )


def _check_name(what: str, name: str) -> None:
    if not _NAME.fullmatch(name):
        raise RegistryError(f"{what} is 1 to 100 of A-Z a-z 0-9 . _ - and begins with a letter or digit, got {name!r}")


def _json(what: str, value: Mapping[str, Any]) -> str:
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise RegistryError(f"{what} must be JSON with finite numbers: {error}") from error


def _wanted(version: int | str | None) -> str:
    return str(LATEST if version is None else version)


def _version(row: Row) -> ModelVersion:
    names = [each.name for each in fields(ModelVersion)]
    return ModelVersion(**{**dict(zip(names, row, strict=True)), "aliases": tuple(row[-1])})
