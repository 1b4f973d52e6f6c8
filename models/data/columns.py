"""The roles of a table's columns, and which of them one column may have. Neither torch nor numpy."""

from __future__ import annotations

from collections.abc import Mapping

ROLES = ("label", "id", "step", "group", "time", "weight")
BESIDE = ("time", "weight")  # those that have no column unless one is named; new data need none
MAY_SHARE = {"group": {"id"}, "time": {"id", "step", "group"}}  # of a role those whose column may be its own, too
RULE = (
    "label, id, step, group, time and weight must be different columns, but that group may be id, and time id, step or "
    "group"
)


def clash(columns: Mapping[str, str]) -> str | None:
    """The rule that columns by role break, if two are one that must not be."""
    named = [(role, columns[role]) for role in ROLES if role in columns]
    pairs = [(one, other) for i, (other, name) in enumerate(named) for one, same in named[i + 1 :] if same == name]
    return RULE if any(other not in MAY_SHARE.get(one, ()) for one, other in pairs) else None
