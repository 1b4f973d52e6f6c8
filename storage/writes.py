"""What is to be written to trials, and the statement that writes a batch of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from hpo.storage.connection import Row
from hpo.storage.records import columns, float_columns
from hpo.storage.statements import BoundStatement, statement

NO_WAIT: BoundStatement = ("SET LOCAL synchronous_commit = off", None)  # a commit that does not wait for the disk
_REPORTS, _WRITE = statement("reports"), statement("write")


@dataclass(frozen=True)
class Fence:
    """The lease under which a trial is written to: writes with an older attempt, or another worker's, are rejected.

    The worker's name is there for a database that comes back without its last commits.
    """

    study_id: int
    trial_id: int
    number: int
    worker: str
    attempt: int


@dataclass
class Writes:
    """What is to be written to one trial: JSON texts, and floats with NaN and infinities."""

    params: dict[str, tuple[float, str]] = field(default_factory=dict)  # name -> internal value, distribution
    user: dict[str, str] = field(default_factory=dict)
    system: dict[str, str] = field(default_factory=dict)
    reports: dict[int, float] = field(default_factory=dict)  # step -> value

    def update(self, later: Writes) -> None:
        """Add what comes later, which replaces what has the same name."""
        self.params.update(later.params)
        self.user.update(later.user)
        self.system.update(later.system)
        self.reports.update(later.reports)


def bind(batch: Mapping[int, Writes], fences: Mapping[int, Fence]) -> BoundStatement:
    """The one statement that writes a batch (trial id -> writes), each trial under its fence if it has one.

    It fails with a division by zero where a trial of the batch may not be written to, and then writes nothing.
    """
    held = [fences.get(trial_id) for trial_id in batch]
    reports: list[Row] = [(i, step, *float_columns(v)) for i, w in batch.items() for step, v in w.reports.items()]
    given = {
        "trials": list(batch),
        "attempts": [fence and fence.attempt for fence in held],
        "workers": [fence and fence.worker for fence in held],
        "count": len(batch),
        **columns(reports, "r_trial", "r_step", "r_value", "r_type"),
    }
    if not any(w.params or w.user or w.system for w in batch.values()):
        return _REPORTS, given
    params: list[Row] = [(i, name, *param) for i, w in batch.items() for name, param in w.params.items()]
    user: list[Row] = [(i, *item) for i, w in batch.items() for item in w.user.items()]
    system: list[Row] = [(i, *item) for i, w in batch.items() for item in w.system.items()]
    given |= columns(params, "p_trial", "p_name", "p_value", "p_text")
    given |= columns(user, "user_trial", "user_key", "user_text")
    given |= columns(system, "system_trial", "system_key", "system_text")
    return _WRITE, given
