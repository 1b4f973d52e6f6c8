"""Rows of Optuna's tables to FrozenTrial, and values to what the tables keep."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

from optuna.distributions import BaseDistribution, distribution_to_json, json_to_distribution
from optuna.trial import FrozenTrial, TrialState

from hpo.storage.connection import Row

# What a float that is not finite reads as, in JSON and as the type beside the value.
_NOT_FINITE = {"INF_POS": float("inf"), "INF_NEG": float("-inf"), "NAN": float("nan")}


def read_float(value: float | str) -> float:
    """A float from JSON, where NaN and the infinities are words."""
    return _NOT_FINITE[value] if value in _NOT_FINITE else float(value)


def float_columns(value: float) -> tuple[float | None, str]:
    """A float as the tables keep it: value and type."""
    if value != value:
        return None, "NAN"
    if value in (float("inf"), float("-inf")):
        return None, "INF_POS" if value > 0 else "INF_NEG"
    return float(value), "FINITE"


@lru_cache(maxsize=4096)
def read_distribution(text: str) -> BaseDistribution:
    """A distribution from its JSON; the same object for the same text."""
    return json_to_distribution(text)


def frozen_trial(row: Row) -> FrozenTrial:
    """A trial from id, number, state, start, end and details (see trials.sql)."""
    trial_id, number, state, started, completed, (values, params, user, system, reports) = row[:6]
    distributions = {name: read_distribution(text) for name, _, text in params or ()}
    return FrozenTrial(
        number=number,
        state=TrialState[state],
        value=None,
        values=[read_float(value) for value in values] if values else None,
        datetime_start=_local(started),
        datetime_complete=_local(completed),
        params={name: distributions[name].to_external_repr(float(value)) for name, value, _ in params or ()},
        distributions=distributions,
        user_attrs=read_attributes(user),
        system_attrs=read_attributes(system),
        intermediate_values={int(step): read_float(value) for step, value in (reports or {}).items()},
        trial_id=trial_id,
    )


def read_attributes(texts: dict[str, str] | None) -> dict[str, Any]:
    """Attributes from their JSON texts."""
    return {key: json.loads(text) for key, text in (texts or {}).items()}


def template_columns(template: FrozenTrial) -> dict[str, Any]:
    """The parameters of `copy_trial` for a trial like the template, but for the study."""
    params = [(name, template.distributions[name].to_internal_repr(value)) for name, value in template.params.items()]
    texts = [(name, value, distribution_to_json(template.distributions[name])) for name, value in params]
    reports = [(step, *float_columns(value)) for step, value in template.intermediate_values.items()]
    return {
        "state": template.state.name,
        "start": _utc(template.datetime_start),
        "complete": _utc(template.datetime_complete),
        **columns([float_columns(value) for value in template.values or ()], "v_value", "v_type"),
        **columns(texts, "p_name", "p_value", "p_text"),
        **columns([(key, json.dumps(value)) for key, value in template.user_attrs.items()], "user_key", "user_text"),
        **columns(
            [(key, json.dumps(value)) for key, value in template.system_attrs.items()], "system_key", "system_text"
        ),
        **columns(reports, "r_step", "r_value", "r_type"),
    }


def columns(rows: list[Row], *names: str) -> dict[str, list[Any]]:
    """Rows as one list a column, as `unnest` takes them."""
    return {name: [row[i] for row in rows] for i, name in enumerate(names)}


def _local(moment: datetime | None) -> datetime | None:
    """Naive UTC, as the tables have it, to naive local time, as FrozenTrial has it."""
    # With the fold that tells the two hours apart which are one by the local clock when summer time ends.
    return moment and datetime.fromtimestamp(moment.replace(tzinfo=UTC).timestamp())


def _utc(moment: datetime | None) -> datetime | None:
    return moment and moment.astimezone(UTC).replace(tzinfo=None)
