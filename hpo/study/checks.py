"""Checks of the study file's values: each returns the value in its type, or raises CheckError."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from hpo.errors import StudyFault
from hpo.models.costs import Costs
from hpo.study.entries import show

SHARE_LEAST = 1e-9  # one sequence of more than any file holds
LONGEST_URL = 2_000  # characters
SQLITE = "sqlite:///"  # begins the address of a database file
COST_LEAST, COST_MOST = 1e-6, 1e6  # of a wrong decision
_URL = re.compile(
    r"https?://([a-z0-9]([a-z0-9_.-]*[a-z0-9])?|\[[0-9a-f:.]+\])(:[0-9]{1,5})?([/?][\w.~:/?@!$&'()*+,;=%\[\]-]*)?",
    re.IGNORECASE | re.ASCII,
)


NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")  # of a study


class CheckError(StudyFault):
    """A value breaks its rule. The message is the rule alone, such as "must be above 0"."""


class SecretError(CheckError):
    """A value may hold a secret. The message is the rule; the value is quoted nowhere."""


Check = Callable[[Any], Any]


def whole(low: int, high: int = 2**31 - 1) -> Check:
    """A check for whole numbers from `low` to `high`, both included."""

    def check(value: Any) -> int:
        if type(value) is not int:
            raise CheckError("must be a whole number")
        if not low <= value <= high:
            raise CheckError(f"must be at least {low}" if value < low else f"must be at most {high}")
        return value

    return check


def one_of(names: Sequence[str]) -> Check:
    """A check for these strings."""

    def check(value: Any) -> str:
        if not isinstance(value, str) or value not in names:
            raise CheckError("must be one of " + ", ".join(map(show, names)))
        return value

    return check


def text(value: Any) -> str:
    """A string that is not empty."""
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise CheckError("must be a string in quotes that is not empty")
    return value


def some_of(names: Sequence[str]) -> Check:
    """A check for lists of at least one of these strings, each once."""

    def check(value: Any) -> tuple[str, ...]:
        listed = value if isinstance(value, list) and value and all(isinstance(each, str) for each in value) else [""]
        if not set(listed) <= set(names) or len(set(listed)) < len(listed):
            raise CheckError("must be a list of at least one of " + ", ".join(map(show, names)) + ", each once")
        return tuple(listed)

    return check


def web_address(value: Any) -> str:
    """An address that is sent to. One with a user or a password is none: it would be shown wherever the study is."""
    if not isinstance(value, str) or len(value) > LONGEST_URL or not _URL.fullmatch(value):
        raise CheckError(
            f"must be an http:// or https:// URL of at most {LONGEST_URL} letters of ASCII, "
            "without user, password, fragment and spaces"
        )
    return value


def folder(value: Any) -> str:
    """The path of a folder."""
    if "://" in text(value):
        raise CheckError("must be the path of a folder")
    return str(value)


def tracking_uri(value: Any) -> str:
    """Where MLflow keeps runs: a server, or a file of SQLite. Whatever gives access is kept out of it, as it is stored
    and shown with the study."""
    if isinstance(value, str) and not value.startswith(SQLITE) and ("@" in value or "?" in value):
        raise SecretError(
            "must hold neither user, password nor a query, as it is stored with the study: set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, in the environment of "
            "launch and workers instead"
        )
    if isinstance(value, str) and value.startswith(SQLITE) and value != SQLITE and not set(value) & set("?#\0"):
        return value
    if not isinstance(value, str) or len(value) > LONGEST_URL or not _URL.fullmatch(value):
        raise CheckError(f"must be the http:// or https:// URL of an MLflow server, or {SQLITE}FILE.db")
    return value


def study_name(value: Any) -> str:
    """A study's name."""
    if not isinstance(value, str) or not NAME.fullmatch(value):
        raise CheckError(
            "must be 1 to 100 letters, digits, dots, dashes or underscores in quotes, the first a letter or digit"
        )
    return value


def positive(value: Any) -> float:
    """A finite number above 0."""
    if type(value) not in (int, float) or not 0 < value <= sys.float_info.max:
        raise CheckError("must be a finite number above 0")
    return float(value)


def share(value: Any) -> float:
    """A share, in (0, 1)."""
    if type(value) is not float or not 0 < value < 1:
        raise CheckError("must be a share between 0 and 1, both excluded")
    if value < SHARE_LEAST:
        raise CheckError(f"must be at least {SHARE_LEAST:g}")
    return value


def lease(value: Any) -> float:
    """Seconds; a shorter one would run out between two renewals of a busy machine."""
    if (seconds := duration(value)) < 1:
        raise CheckError("must be at least 1 second")
    return seconds


def duration(value: Any) -> float:
    """Seconds from a number or from "90s", "30m", "2h", "1d", "1h30m"."""
    if isinstance(value, str) and re.fullmatch(r"([0-9]+(\.[0-9]+)?[dhms])+", value):
        units = {"d": 86400, "h": 3600, "m": 60, "s": 1}
        value = sum(float(count) * units[unit] for count, unit in re.findall(r"([0-9.]+)([dhms])", value))
    if type(value) not in (int, float) or not 0 < value < 1e10:
        raise CheckError('must be above 0, such as "90s", "30m", "2h" or a number of seconds')
    return float(value)


def costs(value: Any) -> Costs:
    """What wrong decisions between two classes cost; what is left out costs 1."""
    keys = ("false_positive", "false_negative")
    table = value if isinstance(value, dict) else {}
    if not table or not set(table) <= set(keys):
        raise CheckError("must be a table such as { false_positive = 1, false_negative = 5 }")
    if not all(type(each) in (int, float) and COST_LEAST <= each <= COST_MOST for each in table.values()):
        raise CheckError(f"must hold numbers from {COST_LEAST:g} to {COST_MOST:g}")
    return Costs(*(float(table.get(key, 1.0)) for key in keys))


def gap(value: Any) -> int | float:
    """A number of sequences, or seconds from a duration like "7d"."""
    if type(value) is int and 0 <= value < 2**31:
        return value
    try:
        return duration(value if type(value) in (str, float) else None)
    except CheckError:
        raise CheckError('must be a number of sequences, such as 20, or a duration, such as "7d" or "12h"') from None
