"""A study's trials as a table, one row a trial: for csv, JSON, parquet and a data frame.

Imports neither torch nor Optuna, so that a client of the service starts at once.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpo.errors import HpoError
from hpo.storage.files import part_file, write_whole
from hpo.study.space import PARAMETERS

if TYPE_CHECKING:
    import pandas as pd

Kind = type  # int, float, bool, str or datetime (with a time zone)

PARAMS = "params."  # begins the name of a parameter's column
BEFORE: dict[str, Kind] = {"number": int, "state": str, "value": float}
TRAINED: dict[str, Kind] = {  # of `study.record.trial_row`, under the same names
    "best_epoch": int,
    "epochs": int,
    "log_loss": float,
    "threshold": float,
    "seed": int,
    "training_seconds": float,
    "weight_count": int,
    "latency_ms": float,
    "size_mb": float,
    "feasible": bool,
    "device": str,
    "worker": str,
    "attempt": int,
}
AFTER: dict[str, Kind] = {
    **TRAINED,
    "started": datetime,
    "ended": datetime,
    "failure": str,
    "dropped": bool,
    "dropped_reason": str,
    "dropped_by": str,
    "dropped_at": datetime,
}
_FRAME_TYPES = {  # of pandas, that know a missing value
    int: "Int64",
    float: "float64",
    bool: "boolean",
    str: "string",
    datetime: "datetime64[us, UTC]",
}


class TableError(HpoError):
    """The table needs a library that is not installed; the message names the extra."""


@dataclass(frozen=True)
class TrialTable:
    """The columns are the same for every study; a value that is not known, or not finite, is None."""

    kinds: Mapping[str, Kind]  # of the columns, in their order
    rows: list[dict[str, Any]]  # a value of its column's kind each, or None; in the order of the trials' numbers

    @classmethod
    def of(cls, trials: Iterable[Mapping[str, Any]]) -> TrialTable:
        """From rows of `study.record.trial_row`, or a service's trials as JSON, which an earlier service has less of.

        A parameter that this version does not know, as another program's, has a column of texts behind the others.
        """
        found = sorted(trials, key=lambda trial: int(trial["number"]))
        params = [trial["params"] for trial in found]
        names = [*PARAMETERS, *sorted({name for each in params for name in each} - PARAMETERS.keys())]
        own = {PARAMS + name: _kind(name, params) for name in names}
        kinds = {**BEFORE, **own, **AFTER}
        return cls(kinds, [_row(trial, kinds) for trial in found])

    def write(self, path: Path, form: str) -> None:
        """Write a file of the form csv, json or parquet; it appears whole or not at all.

        Raises OSError, and TableError where parquet's library is missing.
        """
        if form == "parquet":
            self._write_parquet(path)
        else:
            write_whole(path, self.text(form))

    def text(self, form: str) -> str:
        """The table as csv (RFC 4180, missing values empty) or json (a list of objects, missing values null)."""
        if form == "json":
            return json.dumps([{name: _plain(value) for name, value in row.items()} for row in self.rows]) + "\n"
        text = io.StringIO(newline="")
        writer = csv.writer(text)
        writer.writerow(self.kinds)
        writer.writerows([_cell(value) for value in row.values()] for row in self.rows)
        return text.getvalue()

    def frame(self) -> pd.DataFrame:
        """A data frame with pandas' types that know missing values. Raises TableError without pandas."""
        try:
            import pandas as pd
        except ImportError:
            raise TableError("a data frame needs pandas: pip install 'hpo[pandas]'") from None
        columns = {name: pd.Series(self._column(name), dtype=_FRAME_TYPES[kind]) for name, kind in self.kinds.items()}
        return pd.DataFrame(columns)

    def _write_parquet(self, path: Path) -> None:
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError:
            raise TableError("parquet needs pyarrow: pip install 'hpo[parquet]'") from None
        types = {
            int: pa.int64(),
            float: pa.float64(),
            bool: pa.bool_(),
            str: pa.string(),
            datetime: pa.timestamp("us", tz="UTC"),
        }
        columns = {name: pa.array(self._column(name), types[kind]) for name, kind in self.kinds.items()}
        with part_file(path) as part:
            pq.write_table(pa.table(columns), part)

    def _column(self, name: str) -> list[Any]:
        return [row[name] for row in self.rows]


def _row(trial: Mapping[str, Any], kinds: Mapping[str, Kind]) -> dict[str, Any]:
    gone = trial.get("dropped")
    more = {} if gone is None else {"reason": gone["reason"], "by": gone["by"], "at": gone["when"]}
    given = {
        **{name: trial.get(name) for name in kinds},
        **{PARAMS + name: value for name, value in trial["params"].items()},
        "dropped": gone is not None,
        **{f"dropped_{name}": value for name, value in more.items()},
    }
    return {name: _of_kind(given[name], kind) for name, kind in kinds.items()}


def _kind(name: str, params: Iterable[Mapping[str, Any]]) -> Kind:
    """What a parameter's column holds: what the space admits, or texts where another program has set others."""
    if name not in PARAMETERS:
        return str
    kind = PARAMETERS[name].kind
    return kind if all(_fits(each[name], kind) for each in params if name in each) else str


def _fits(value: Any, kind: Kind) -> bool:
    """Whether a column of that kind holds the value: whole numbers are numbers, and truth is none."""
    if isinstance(value, bool) or not isinstance(value, int):
        return type(value) is kind
    return kind is float or (kind is int and abs(value) < 2**63)


def _of_kind(value: Any, kind: Kind) -> Any:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return None
    if kind is datetime:
        return datetime.fromisoformat(value)
    if kind is str:
        return value if isinstance(value, str) else json.dumps(value)
    return kind(value)


def _plain(value: Any) -> Any:
    return value.isoformat() if isinstance(value, datetime) else value


def _cell(value: Any) -> str:
    """A value as csv has it: numbers in full, truth as true and false, times in ISO 8601."""
    if isinstance(value, bool):
        return str(value).lower()
    return "" if value is None else repr(value) if isinstance(value, float) else str(_plain(value))
