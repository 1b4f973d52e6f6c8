"""A study's trials as csv, JSON, parquet and a data frame: each comes back as it was stored."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import FloatDistribution, IntDistribution
from optuna.trial import TrialState, create_trial

import hpo
from hpo.storage.changes import drop
from hpo.storage.trials import TrialStorage
from hpo.study.lifecycle import OpenStudy, all_trial_rows
from hpo.study.space import PARAMETERS
from hpo.study.trial_table import TableError, TrialTable
from tests.postgres.test_dropped import opened  # noqa: F401 - a fixture

REASON = 'wrong sensor, "left"\r\nthe other one, too\n'
FAILURE = "ValueError: loss is nan,\nat epoch 2"
COLUMNS = [
    *("number", "state", "value"),
    *(f"params.{name}" for name in PARAMETERS),
    *("best_epoch", "epochs", "log_loss", "threshold", "seed", "training_seconds", "weight_count"),
    *("latency_ms", "size_mb", "feasible"),
    *("device", "worker", "attempt", "started", "ended"),
    *("failure", "dropped", "dropped_reason", "dropped_by", "dropped_at"),
]  # as people's scripts name them


@pytest.fixture
def study(opened: Callable[..., OpenStudy]) -> OpenStudy:  # noqa: F811
    """Trial 0 complete, 1 pruned, 2 failed, 3 complete and dropped, 4 running; 5 is another program's."""
    made = opened("hidden_size = { low = 4, high = 64 }", 'sampler = "random"\ntrials = 5')
    recorded = {"best_epoch": 2, "epochs": 3, "log_loss": 0.1 + 0.2, "threshold": 0.5, "training_seconds": 1.25}
    ends = [
        (TrialState.COMPLETE, 1 / 3),
        (TrialState.PRUNED, 0.25),
        (TrialState.FAIL, None),
        (TrialState.COMPLETE, 0.9),
    ]
    for number, (state, value) in enumerate(ends):
        lease = made.leases.acquire(made.study_id, f"host-{number}", "cpu")
        assert lease is not None
        params = made.sampler.parameters(lease.trial_id)
        attributes = {"seed": 2**63 - 1 - number, "params": params, "parameters": 77, "device": "cpu", **recorded}
        given = {"failure": FAILURE} if value is None else attributes
        made.storage.finish_trial(lease.trial_id, state, None if value is None else [value], given)
    lease = made.leases.acquire(made.study_id, "host-4", "cuda:0")
    assert lease is not None
    drop(made.storage, made.study_id, [3], REASON, "ada")
    params = {"hidden_size": 7, "other": 0.5}
    items = {"hidden_size": IntDistribution(1, 9), "other": FloatDistribution(0, 1)}
    attributes = {"seed": "x", "device": 1, "log_loss": "low"}
    foreign = create_trial(params=params, distributions=items, value=float("inf"), user_attrs=attributes)
    made.storage.create_new_trial(made.study_id, foreign)
    return made


@pytest.fixture
def table(study: OpenStudy) -> TrialTable:
    return TrialTable.of(all_trial_rows(study.storage, "waves"))


def test_a_row_has_all_that_is_recorded_of_its_trial(study: OpenStudy, table: TrialTable) -> None:
    assert list(table.kinds) == [*COLUMNS[:31], "params.other", *COLUMNS[31:]]
    complete, pruned, failed, gone, running, foreign = table.rows
    assert [row["number"] for row in table.rows] == list(range(6))
    assert [row["state"] for row in table.rows] == ["complete", "pruned", "fail", "complete", "running", "complete"]
    assert [row["value"] for row in table.rows] == [1 / 3, 0.25, None, 0.9, None, None]  # infinite is not known
    stored = study.storage.get_all_trials(study.study_id, deepcopy=False)
    assert {name: complete[f"params.{name}"] for name in PARAMETERS} == {
        name: stored[0].user_attrs["params"].get(name) for name in PARAMETERS
    }
    assert (complete["params.hidden_size"], complete["params.learning_rate"]) == (stored[0].params["hidden_size"], 0.01)
    assert (pruned["best_epoch"], pruned["epochs"], pruned["log_loss"], pruned["seed"]) == (2, 3, 0.1 + 0.2, 2**63 - 2)
    assert (complete["weight_count"], complete["threshold"], complete["training_seconds"]) == (77, 0.5, 1.25)
    assert (failed["failure"], failed["worker"], failed["device"], failed["attempt"]) == (FAILURE, "host-2", "cpu", 1)
    assert failed["params.hidden_size"] == stored[2].params["hidden_size"]
    assert (gone["dropped"], gone["dropped_reason"], gone["dropped_by"]) == (True, REASON, "ada")
    assert [row["dropped"] for row in table.rows] == [False, False, False, True, False, False]
    assert (running["worker"], running["device"], running["ended"], running["seed"]) == ("host-4", "cuda:0", None, None)
    assert (foreign["params.hidden_size"], foreign["params.other"]) == (7, "0.5")
    assert {foreign[name] for name in ("worker", "device", "attempt", "seed", "log_loss")} == {None}
    for row in table.rows:
        assert row["started"].utcoffset() is not None
    assert complete["started"] <= complete["ended"] <= gone["dropped_at"] <= datetime.now(UTC)


def test_csv_and_json_come_back_as_they_were(table: TrialTable) -> None:
    lines = list(csv.DictReader(io.StringIO(table.text("csv"), newline="")))
    assert table.text("csv").startswith(",".join(table.kinds) + "\r\n")
    assert [_read(line, table) for line in lines] == table.rows
    assert (lines[3]["dropped_reason"], lines[2]["failure"], lines[2]["value"]) == (REASON, FAILURE, "")
    objects = json.loads(table.text("json"), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert [{name: _timed(value, table.kinds[name]) for name, value in each.items()} for each in objects] == table.rows


def test_parquet_and_a_data_frame_come_back_as_they_were(
    study: OpenStudy, table: TrialTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    table.write(tmp_path / "trials.parquet", "parquet")
    assert parquet.read_table(tmp_path / "trials.parquet").to_pylist() == table.rows
    assert [path.name for path in tmp_path.glob("*trials*")] == ["trials.parquet"]
    pandas = pytest.importorskip("pandas")
    monkeypatch.setenv("HPO_DATABASE_URL", study.storage.url)
    frame = hpo.trials("waves")
    assert list(frame.columns) == list(table.kinds)
    types = {name: str(frame.dtypes[name]) for name in ("number", "value", "state", "dropped", "started", "seed")}
    assert types == {
        "number": "Int64", "value": "float64", "state": "string", "dropped": "boolean",
        "started": "datetime64[us, UTC]", "seed": "Int64",
    }  # fmt: skip
    known = [{name: value for name, value in row.items() if not pandas.isna(value)} for row in frame.to_dict("records")]
    assert known == [{name: value for name, value in row.items() if value is not None} for row in table.rows]
    assert frame.groupby("state")["value"].max()["complete"] == 0.9
    with pytest.raises(hpo.StudyError, match="there is no study named 'none'"):
        hpo.trials("none")


def test_a_study_without_trials_has_the_same_columns() -> None:
    empty = TrialTable.of([])
    assert list(empty.kinds) == COLUMNS
    assert (empty.text("csv"), empty.text("json")) == (",".join(COLUMNS) + "\r\n", "[]\n")
    assert list(pytest.importorskip("pandas").DataFrame(empty.frame()).columns) == COLUMNS


def test_an_earlier_services_trials_lack_what_it_did_not_say() -> None:
    trial = {"number": 0, "state": "complete", "value": 0.5, "params": {"layers": 1}, "started": None, "ended": None}
    (row,) = TrialTable.of([{**trial, "failure": None}]).rows
    assert (row["value"], row["params.layers"], row["seed"], row["dropped"]) == (0.5, 1, None, False)


@pytest.mark.parametrize("value", [3.5, "many", True, 2**70])
def test_what_another_program_has_set_in_a_parameters_name_is_text(value: Any) -> None:
    rows = [{"number": n, "state": "complete", "params": {"layers": each}} for n, each in enumerate((2, value))]
    shown = value if isinstance(value, str) else json.dumps(value)
    assert [row["params.layers"] for row in TrialTable.of(rows).rows] == ["2", shown]


@pytest.mark.parametrize(("library", "message"), [
    ("pyarrow", r"parquet needs pyarrow: pip install 'hpo\[parquet\]'"),
    ("pandas", r"a data frame needs pandas: pip install 'hpo\[pandas\]'"),
])  # fmt: skip
def test_a_library_that_is_missing_is_named_with_its_extra(
    library: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(TableError, match=message):
        TrialTable.of([]).frame() if library == "pandas" else TrialTable.of([]).write(tmp_path / "t", "parquet")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def berlin() -> Iterator[None]:
    """The local clock of a country with summer time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TZ", "Europe/Berlin")
        time.tzset()
        yield
    time.tzset()
    assert os.environ.get("TZ") != "Europe/Berlin"


def test_the_hour_that_recurs_when_summer_time_ends_is_told_apart(storage: TrialStorage, berlin: None) -> None:
    study_id = storage.create_new_study([optuna.study.StudyDirection.MAXIMIZE], "night")
    moments = [datetime(2026, 10, 25, hour, 30, tzinfo=UTC) for hour in (0, 1)]  # both are 02:30 in Berlin
    for moment in moments:
        template = create_trial(value=1.0)
        template.datetime_start = template.datetime_complete = moment.astimezone()
        storage.create_new_trial(study_id, template)
    assert [row["ended"] for row in TrialTable.of(all_trial_rows(storage, "night")).rows] == moments


def _read(line: dict[str, str], table: TrialTable) -> dict[str, Any]:
    """A line of csv by the kinds of its columns, as a reader has to."""
    return {name: None if text == "" else _value(text, table.kinds[name]) for name, text in line.items()}


def _value(text: str, kind: type) -> Any:
    if kind is bool:
        return {"true": True, "false": False}[text]
    return _timed(text, kind) if kind is datetime else kind(text)


def _timed(value: Any, kind: type) -> Any:
    return datetime.fromisoformat(value) if kind is datetime and value is not None else value
