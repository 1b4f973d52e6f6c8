"""Many training runs: studies of LSTM classifiers shared by many workers.

import hpo
summary = hpo.launch("study.toml", workers=4)
model = hpo.load(summary["model"]["path"])
predictions = model.predict(hpo.read("new.npz", labeled=False))

The calls of this module are the public ones, and so are the exceptions that they raise: all of them are `HpoError`s.
Nothing else of the package imports it.
"""

from __future__ import annotations

from importlib import import_module

TYPE_CHECKING = (
    False  # as type checkers know it: `typing` takes longer than all of this, and a Ctrl-C is heard after it
)
if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any

    import pandas as pd

    from hpo.client import Client, ServiceError
    from hpo.errors import HpoError
    from hpo.launcher.launch import launch
    from hpo.launcher.workers import Interrupted, LaunchError
    from hpo.models.bundle.bundle import Bundle
    from hpo.models.bundle.config import BundleError
    from hpo.models.data.sequences import DataError, Sequences
    from hpo.models.device import DeviceLost, OutOfMemory
    from hpo.storage.artifacts import ArtifactError
    from hpo.storage.errors import PostgresError, SchemaError
    from hpo.storage.registry import RegistryError
    from hpo.storage.trials import TrialStorage
    from hpo.study.config import ConfigError
    from hpo.study.plan import StudyError

__all__ = [
    "ArtifactError",
    "BundleError",
    "ConfigError",
    "DataError",
    "DeviceLost",
    "HpoError",
    "Interrupted",
    "LaunchError",
    "OutOfMemory",
    "PostgresError",
    "RegistryError",
    "SchemaError",
    "ServiceError",
    "StudyError",
    "connect",
    "launch",
    "load",
    "read",
    "storage_for",
    "trials",
]
_ELSEWHERE = {  # found when asked for: what defines them may import torch or Optuna, and the command starts here
    "ArtifactError": "hpo.storage.artifacts",
    "BundleError": "hpo.models.bundle.config",
    "ConfigError": "hpo.study.config",
    "DataError": "hpo.models.data.sequences",
    "DeviceLost": "hpo.models.device",
    "HpoError": "hpo.errors",
    "Interrupted": "hpo.launcher.workers",
    "LaunchError": "hpo.launcher.workers",
    "OutOfMemory": "hpo.models.device",
    "PostgresError": "hpo.storage.errors",
    "RegistryError": "hpo.storage.registry",
    "ServiceError": "hpo.client",
    "SchemaError": "hpo.storage.errors",
    "StudyError": "hpo.study.plan",
    "launch": "hpo.launcher.launch",
}


def __getattr__(name: str) -> Any:
    if name not in _ELSEWHERE:
        raise AttributeError(f"module 'hpo' has no attribute {name!r}")
    return getattr(import_module(_ELSEWHERE[name]), name)


def read(data: Any, **columns: Any) -> Sequences:
    """The sequences of a npz, csv, parquet or .ts file, a data frame of pandas or polars, a dict of arrays or an array.

    It is `hpo.models.data.readers.read`, with its keywords: `label`, `id`, `step` and `group` name the columns of a
    table that are called otherwise (group may be the id), `time` the one that orders the sequences and `weight` the
    one that says how much they count, so that neither is a feature; `labeled=False` reads data without labels.

    Raises DataError, which names the file, the row and the way out.
    """
    from hpo.models.data.columns import ROLES
    from hpo.models.data.readers import read as read_file

    if columns.get("labeled") is None:  # else a label or a group that is named may be missing from new data
        columns = {"needed": [role for role in ROLES if columns.get(role) is not None], **columns}
    return read_file(data, **columns)


def connect(url: str | None = None, token: str | None = None) -> Client:
    """A client of the service at `url` (HPO_SERVER without one) for the holder of a token (HPO_TOKEN without one).

    Needs neither the database's password nor a GPU, nor torch. Raises ServiceError.
    """
    from hpo.client import connect as connect_to

    return connect_to(url, token)


def load(folder: str | Path, device: str = "cpu") -> Bundle:
    """A saved model folder, ready to predict. Needs no database. Raises BundleError."""
    from hpo.models.bundle.bundle import load as load_bundle

    return load_bundle(folder, device)


def storage_for(url: str | None = None, retry_s: float = 60.0) -> TrialStorage:
    """A fast Optuna storage on PostgreSQL, for any Optuna script: `optuna.create_study(storage=hpo.storage_for(url))`.

    It keeps studies in Optuna's own tables, which plain Optuna and optuna-dashboard read and write beside it, and adds
    its own in the schema `hpo`. url: a postgresql:// URL or libpq's key=value pairs; None: HPO_DATABASE_URL, else the
    embedded server, which is started. retry_s: seconds that a lost connection is tried again. Raises PostgresError and
    SchemaError.
    """
    from hpo.storage.database import database_url
    from hpo.storage.trials import trial_storage
    from hpo.storage.url import normalized

    return trial_storage(normalized(url, "url") if url else database_url(), retry_s)


def trials(name: str) -> pd.DataFrame:
    """A study's trials, a row each, by number: state, value, parameters as `params.NAME`, and all that is recorded.

    From the database of HPO_DATABASE_URL, else the embedded one; `hpo.connect(url).frame(name)` asks a service. The
    columns are those of `hpo trials list NAME --format csv`, with pandas' types that know missing values. Needs
    `pip install 'hpo[pandas]'`.

    Raises StudyError when there is no such study, PostgresError, and HpoError without pandas.
    """
    from hpo.storage.database import database_url
    from hpo.storage.trials import trial_storage
    from hpo.study.lifecycle import all_trial_rows
    from hpo.study.trial_table import TrialTable

    storage = trial_storage(database_url())
    try:
        return TrialTable.of(all_trial_rows(storage, name)).frame()
    finally:
        storage.close()
