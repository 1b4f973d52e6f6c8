"""What a prediction of the promoted model may take: which trials are within the limits of a study, and which are not.

A trial's figures are measured once and recorded with it, limits or none; whether it is within the limits follows from
these and from the limits that the study has now. So limits may change at any time, for all of its trials.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from optuna.trial import FrozenTrial

from hpo.models.fields import Value
from hpo.storage.terms import StudyRow
from hpo.study.plan import Plan
from hpo.study.record import trained_by_us

CONSTRAINT = "constraints:"  # begins the system attributes in which Optuna keeps a trial's constraints
FAR = 1e9  # the largest constraint: a sampler computes with it
FIGURES = ("latency_ms", "size_mb")  # of a trial's user attributes


@dataclass(frozen=True)
class Limits:
    """The limits of a study. The fragment `within_limits` of storage/sql/studies.sql states the rule once more."""

    latency_ms: float | None = None
    size_mb: float | None = None

    @classmethod
    def of(cls, row: StudyRow) -> Limits:
        """Those of a study by its terms."""
        given = row.config.get("config", {}).get("limits", {})
        return cls(**{name: given.get(name) for name in FIGURES})

    @property
    def given(self) -> dict[str, float]:
        """Those that there are, by name."""
        return {name: limit for name in FIGURES if (limit := getattr(self, name)) is not None}

    def excess(self, figures: Mapping[str, Any]) -> dict[str, float | None]:
        """How far a trial is beyond each of the limits, as a share of it: 0.5 is half as much again, 0 and below is
        within. None: its figure is not known. figures: its user attributes, or its record's fields."""
        return {
            name: None if (found := _number(figures.get(name))) is None else found / limit - 1
            for name, limit in self.given.items()
        }

    def admit(self, figures: Mapping[str, Any]) -> bool:
        """Whether a trial is known to be within all of the limits."""
        known = ((_number(figures.get(name)), limit) for name, limit in self.given.items())
        return all(found is not None and found <= limit for found, limit in known)

    def of_trial(self, trial: FrozenTrial) -> dict[str, Any]:
        """What displays show of a trial: its figures, and whether it is within the limits. None where that is not
        known, or there are none."""
        ours = trial.user_attrs if trained_by_us(trial) else {}
        known = {name: _number(ours.get(name)) for name in FIGURES}
        excesses = self.excess(ours).values()
        violated = any(excess is not None and excess > 0 for excess in excesses)
        judged = violated or (bool(excesses) and None not in excesses)
        return {
            **known,
            "feasible": self.admit(ours) if judged else None,
        }

    def constraints(self, figures: Mapping[str, Any]) -> dict[str, float]:
        """The same as Optuna's constraints, by the names of their system attributes; a figure that is not known, as of
        an earlier version's trial, does not steer the search."""
        return {CONSTRAINT + name: min(excess or 0.0, FAR) for name, excess in self.excess(figures).items()}

    def too_large(self, plan: Plan, params: Mapping[str, Value]) -> bool:
        """Whether a configuration is beyond the limit of size, which is known before it is trained."""
        return self.size_mb is not None and size_of(plan, params) > self.size_mb

    @property
    def said(self) -> str:
        """In words: "size_mb at most 0.5"."""
        return " and ".join(f"{name} at most {limit:g}" for name, limit in self.given.items())


NONE = Limits()


def size_of(plan: Plan, params: Mapping[str, Value]) -> float:
    """10^6 bytes of weights of a trial with these parameters: the figure size_mb."""
    from hpo.models.bundle.footprint import size_mb  # with it comes torch, which a look at studies does without

    return size_mb(plan.classifier(params), plan.networks)


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        return None
    return float(value)


def none_within(limits: Limits, trials: Iterable[FrozenTrial], name: str) -> str | None:
    """Why a study whose trials have ended has none to promote: the limits, the trial that comes nearest to them with
    its figures, and the way out. trials: those that count. None where no limit is the reason."""
    beyond = [trial for trial in trials if trained_by_us(trial) and not limits.admit(trial.user_attrs)]
    if not beyond:
        return None
    begin = f"no completed trial is within [limits] {limits.said}"
    complete = [trial for trial in beyond if trial.state.name == "COMPLETE"]
    known = [trial for trial in complete or beyond if _beyond(limits, trial) < math.inf]
    if not known:
        take = f"`hpo promote {name} --trial N` takes one all the same"
        return f"{begin}, as an earlier version did not measure what theirs take; {take}"
    nearest = min(known, key=lambda trial: (_beyond(limits, trial), trial.number))
    figures = limits.of_trial(nearest)
    shown = " and ".join(f"{name} {figures[name]:.4g}" for name in FIGURES if figures[name] is not None)
    out = "raise the limit and launch again, or narrow [space] in a study of another name"
    if nearest.state.name == "COMPLETE":
        out += f"; `hpo promote {name} --trial {nearest.number}` takes it all the same"
    return f"{begin}: the nearest, trial {nearest.number}, has {shown}; {out}"


def _beyond(limits: Limits, trial: FrozenTrial) -> float:
    """How far a trial is beyond the limits, all together; infinite where nothing is known of it."""
    known = [excess for excess in limits.excess(trial.user_attrs).values() if excess is not None]
    return sum(max(0.0, excess) for excess in known) if known else math.inf
