"""What a study that is over has brought."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from hpo.errors import StudyFault
from hpo.models.class_scores import weakest
from hpo.promote.version_scores import scores_if_known
from hpo.storage.artifacts import ArtifactStore
from hpo.storage.registry import Registry
from hpo.storage.snapshot import Snapshot
from hpo.study.lifecycle import OpenStudy
from hpo.study.record import failure_of


class NoModel(StudyFault):
    """The study has no model: none of its trials completed, or it is not over yet."""


def summary_of(study: OpenStudy, store: ArtifactStore | None = None, *, with_names: bool = True) -> dict[str, Any]:
    """Its trials, its best one and the promoted model with its scores, and where it is weak; JSON-able.

    store: the one of HPO_ARTIFACTS without one. with_names: say what the groups of the data are called. Raises NoModel.
    """
    state, row = study.leases.snapshot(study.study_id), study.leases.study(study.study_id)
    out_of_time = row is not None and row.out_of_time
    if state.status in ("open", "stopped"):
        raise NoModel(f"study {study.name!r} is not over yet: it is {state.status}")
    if state.promoted_version is None:
        timeout_s = row.timeout_s if row is not None and out_of_time else None
        reason = None if state.best is not None else study.none_within()
        raise NoModel(_no_model(study.name, _failures(study), timeout_s, reason))
    registry = Registry(study.storage.connection)
    model = registry.get(study.name, state.promoted_version)
    scores = model.scores
    found = scores_if_known(registry, model.name, model.version, store, with_names=with_names)
    weak = None if found is None else weakest(found)
    best = state.best if state.best is not None and state.best.number == model.trial_number else None
    return {
        "study": study.name,
        "metric": scores["metric"],
        "ended_by": ended_by(state, out_of_time=out_of_time),
        "standstill": None if state.standstill is None else vars(state.standstill),
        "trials": {name: state.counts.get(name, 0) for name in ("complete", "pruned", "failed")},
        "best": {
            "number": model.trial_number,
            "value": scores["value"],
            "params": model.config["params"],
        },
        "estimate": scores.get("estimate"),
        "footprint": scores.get("footprint"),
        "beyond_limits": None if state.beyond is None else vars(state.beyond),
        "best_why": None if best is None else best.why,
        "dropped": [each.number for each in state.dropped],
        "winner_dropped": state.dropped_winner is not None,
        "model": {
            "name": model.name,
            "version": model.version,
            "default": registry.get(study.name).version,
        },
        "validation": scores["validation"],
        "test": scores.get("test"),
        "sequences": scores.get("sequences"),
        "positive": study.plan.classes[1] if len(study.plan.classes) == 2 else None,
        "test_looks": scores.get("test_looks"),
        "undefined": scores.get("undefined"),
        "weak": None if weak is None else asdict(weak),
    }


def ended_by(state: Snapshot, *, out_of_time: bool) -> str:
    """What has ended a study that is over."""
    if state.standstill is not None:
        return "patience"
    return "budget" if state.started >= state.budget else "timeout" if out_of_time else "exhausted space"


def _failures(study: OpenStudy) -> list[str]:
    trials = study.storage.get_all_trials(study.study_id, deepcopy=False)
    return [reason for trial in trials if (reason := failure_of(trial)) is not None]


def _no_model(name: str, failures: Sequence[str], timeout_s: float | None, limited: str | None) -> str:
    """Why a study ended without a model. timeout_s: its wall-clock budget, where that ran out. limited: that its limits
    left none of its trials."""
    if limited is not None:
        return f"study {name!r} ended without a model: {limited}"
    reason = f"; the first of {len(failures)} failures: {failures[0]}" if failures else ""
    if timeout_s is not None:
        reason += f"; its study.timeout of {timeout_s:g} s ran out: give it more and launch it again"
    return f"study {name!r} ended without a completed trial{reason}"
