"""Promoted model versions: numbered from 1 by name, with aliases; and the way of their files into the store."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from hpo.storage.artifacts import ArtifactStore
from hpo.storage.tables import aliases as _aliases
from hpo.storage.tables import migrate
from hpo.storage.tables import models as _models

LATEST = "latest"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_DIGEST = re.compile(r"-([0-9a-f]{64})-")


class RegistryError(RuntimeError):
    """There is no such model, version or alias; or what was to be registered breaks a rule."""


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


class Registry:
    """The promoted models of a database; creates the tables where there are none."""

    def __init__(self, database: str | sa.Engine) -> None:
        from hpo.storage.postgres import engine

        if isinstance(database, str):
            migrate(database)
        self._engine = engine(database) if isinstance(database, str) else database

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
    ) -> ModelVersion:
        """The trial's model as the next version of `name`, which becomes "latest"; one transaction.

        Safe with several promoters at once. The same trial with the same artifacts again is the version that
        it was. Raises RegistryError for a name that breaks the rule, or values that JSON does not have (NaN).
        """
        _check_name("a model name", name)
        row = {
            "study_id": study_id,
            "study_name": study_name,
            "trial_number": trial_number,
            "scores": _json("scores", scores),
            "config": _json("config", config),
            "artifacts": dict(artifacts),
        }
        identity = ("study_id", "trial_number", "artifacts")
        with self._engine.begin() as connection:
            _lock(connection, name)
            same = sa.and_(_models.c.name == name, *(_models.c[column] == row[column] for column in identity))
            found = connection.scalar(sa.select(sa.func.max(_models.c.version)).where(same))
            version = found or 1 + (_newest(connection, name) or 0)
            if not found:
                connection.execute(sa.insert(_models).values(name=name, version=version, **row))
                _point(connection, name, LATEST, version)
            return _find(connection, name, version)

    def models(self) -> list[ModelVersion]:
        """Every version, by name and number."""
        with self._engine.begin() as connection:
            return _read(connection, sa.true())

    def get(self, name: str, version: int | str | None = None) -> ModelVersion:
        """One version by its number or alias; without either the latest. RegistryError lists what there is."""
        with self._engine.begin() as connection:
            return _find(connection, name, version)

    def set_alias(self, name: str, alias: str, version: int | str | None = None) -> ModelVersion:
        """Let an alias such as "champion" name a version, the latest by default; it names one at a time."""
        _check_name("an alias", alias)
        if alias == LATEST or alias.isdecimal():
            raise RegistryError(f'an alias is neither a number nor "{LATEST}", which promotion sets, got {alias!r}')
        with self._engine.begin() as connection:
            _lock(connection, name)
            _point(connection, name, alias, _find(connection, name, version).version)
            return _find(connection, name, alias)

    def delete(self, name: str, version: int | str | None = None) -> list[str]:
        """Remove one version, or the whole name without one, with its aliases; "latest" moves to the newest left.

        Returns the keys of the artifacts that no version names any more, for the caller to delete. The
        number of the newest version is given again once that is removed.
        """
        with self._engine.begin() as connection:
            _lock(connection, name)
            model, chosen = _find(connection, name, version), _models.c.name == name
            if version is not None:
                chosen &= _models.c.version == model.version
            gone = connection.scalars(sa.delete(_models).where(chosen).returning(_models.c.artifacts)).all()
            if newest := _newest(connection, name):
                _point(connection, name, LATEST, newest)
            kept = {key for model in _read(connection, sa.true()) for key in model.artifacts.values()}
        return sorted({key for artifacts in gone for key in artifacts.values()} - kept)


def publish(store: ArtifactStore, folder: Path, prefix: str) -> dict[str, str]:
    """Store the files of a flat folder; file name -> key.

    A key is `prefix-SHA256-name`: other content has another key, and the same content is stored once.
    """
    artifacts = {}
    for path in sorted(folder.iterdir()):
        if not path.is_file():
            raise RegistryError(f"a model folder holds files only, got a folder: {path}")
        key = artifacts[path.name] = f"{prefix}-{_sha256(path)}-{path.name}"
        if not store.exists(key):
            store.put(key, path)
    return artifacts


def materialise(store: ArtifactStore, artifacts: Mapping[str, str], folder: Path) -> None:
    """Fetch published files; the folder appears with all of them, checked, or not at all.

    A folder that has them already is left as it is; one that has others is a RegistryError.
    """
    if any(Path(name).name != name for name in artifacts):
        raise RegistryError(f"a model's files have plain names, got {sorted(artifacts)}")
    if _holds(folder, artifacts):
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    part.mkdir()
    try:
        for name, key in artifacts.items():
            store.fetch(key, part / name)
        if not _holds(part, artifacts):
            raise RegistryError(f"{store.url}: the content of a file is not what its key says, in {artifacts}")
        part.rename(folder)
    except OSError as error:
        if not _holds(folder, artifacts):  # else another process was first
            raise RegistryError(f"{folder} is in the way: it holds other files; remove it") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _holds(folder: Path, artifacts: Mapping[str, str]) -> bool:
    """Whether the folder has every file with the content that its key names."""
    return all(
        (folder / name).is_file() and _DIGEST.findall(key)[:1] == [_sha256(folder / name)]
        for name, key in artifacts.items()
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_name(what: str, name: str) -> None:
    if not _NAME.fullmatch(name):
        raise RegistryError(f"{what} is 1 to 100 of A-Z a-z 0-9 . _ - and begins with a letter or digit, got {name!r}")


def _json(what: str, value: Mapping[str, Any]) -> Any:
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise RegistryError(f"{what} must be JSON with finite numbers: {error}") from error


def _lock(connection: sa.Connection, name: str) -> None:
    """One writer of a name at a time, until the transaction's end."""
    connection.execute(sa.select(sa.func.pg_advisory_xact_lock(sa.func.hashtextextended(f"hpo.models {name}", 0))))


def _newest(connection: sa.Connection, name: str) -> int | None:
    newest: int | None = connection.scalar(sa.select(sa.func.max(_models.c.version)).where(_models.c.name == name))
    return newest


def _point(connection: sa.Connection, name: str, alias: str, version: int) -> None:
    from sqlalchemy.dialects.postgresql import insert

    row = insert(_aliases).values(name=name, alias=alias, version=version)
    connection.execute(row.on_conflict_do_update(index_elements=["name", "alias"], set_={"version": version}))


def _find(connection: sa.Connection, name: str, version: int | str | None) -> ModelVersion:
    """By number or alias; the latest without either."""
    found = _read(connection, _models.c.name == name)
    if not found:
        names = connection.scalars(sa.select(_models.c.name).distinct().order_by(_models.c.name))
        raise RegistryError(f"no model is named {name!r}; there are: {', '.join(names) or 'none yet'}")
    wanted = str(LATEST if version is None else version)
    for model in found:
        if wanted in (str(model.version), *model.aliases):
            return model
    known = ", ".join(" = ".join((str(model.version), *model.aliases)) for model in found)
    raise RegistryError(f"model {name!r} has no version or alias {wanted!r}; there are: {known}")


def _read(connection: sa.Connection, where: sa.ColumnElement[bool]) -> list[ModelVersion]:
    named = sa.and_(_aliases.c.name == _models.c.name, _aliases.c.version == _models.c.version)
    of_version = sa.select(_aliases.c.alias).where(named).order_by(_aliases.c.alias)
    query = sa.select(_models, sa.func.array(of_version.scalar_subquery()).label("aliases")).where(where)
    rows = connection.execute(query.order_by(_models.c.name, _models.c.version)).mappings()
    return [ModelVersion(**{**row, "aliases": tuple(row["aliases"])}) for row in rows]
