"""The JSON that a study's page requests, in optuna-dashboard's own form; a finished trial is encoded only once."""

from __future__ import annotations

import copy
import gzip
import json
import math
import re
import sys
import threading
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC
from typing import Any

from optuna.storages import BaseStorage
from optuna.study._frozen import FrozenStudy
from optuna.trial import FrozenTrial, TrialState
from optuna_dashboard._custom_plot_data import get_plotly_graph_objects
from optuna_dashboard._inmemory_cache import _CachedExtraStudyProperty
from optuna_dashboard._serializer import serialize_frozen_trial, serialize_study_detail

from hpo.storage.changes import dropped
from hpo.storage.leases import Leases
from hpo.storage.snapshot import BestTrial, Dropped
from hpo.storage.trials import TrialStorage
from hpo.study import ranking
from hpo.study.limits import NONE, Limits

DROPPED = "dropped: does not count"  # name of the attribute that is shown with such a trial
OF_TRIAL = re.compile(r"dashboard:(?:artifacts:)?(\d+):")  # a study's attribute that belongs to one of its trials


def compressed(answer: bytes) -> bytes:
    """The answer as a gzip file. Level 1, because level 6 takes three times as long to save a third of the bytes."""
    return gzip.compress(answer, compresslevel=1, mtime=0)


@dataclass
class _Cache:
    """What is cached of one study."""

    spaces: _CachedExtraStudyProperty  # of its finished trials: running ones do not have all their parameters yet
    trials: dict[int, tuple[Mapping[str, Any], bytes]] = field(default_factory=dict)  # id -> study attributes, JSON
    resolution: float | None = None  # values closer than this are equal; None for a study that is not one of `hpo`


class StudyJson:
    """The studies of one storage, as `GET /api/studies/ID?after=N` returns them."""

    def __init__(self, storage: BaseStorage) -> None:
        self._storage = storage
        self._caches: dict[int, _Cache] = {}
        self._lock = threading.Lock()  # so that two first requests do not both encode every trial

    def study(self, study_id: int, after: int) -> bytes | None:
        """The study as it is now, with its trials from number `after` on.

        None if it does not exist or does not have exactly one objective: optuna-dashboard's own answer is right then.
        """
        storage = self._storage
        try:
            name, directions = storage.get_study_name_from_id(study_id), storage.get_study_directions(study_id)
            user, system = storage.get_study_user_attrs(study_id), storage.get_study_system_attrs(study_id)
            trials = storage.get_all_trials(study_id, deepcopy=False)
            gone = self._dropped(study_id)
        except KeyError:
            self._caches.pop(study_id, None)
            return None
        if len(directions) != 1 or system.get("preference:is_preferential"):
            return None
        study = FrozenStudy(name, None, user, system, study_id, directions=directions)
        with self._lock:
            cache = self._caches.setdefault(study_id, _Cache(_CachedExtraStudyProperty()))
            cache.spaces.update([t for t in trials if t.state.is_finished() and t._trial_id not in cache.trials])
            if cache.resolution is None:
                cache.resolution = self._resolution(study_id)
            encoded = _trials(cache, study, trials, gone)
            counted = [trial for trial in trials if trial.number not in gone]
            limits = NONE if cache.resolution is None else self._limits(study_id)
            chosen = _best(counted, cache.resolution, limits, maximize=directions[0].name == "MAXIMIZE")
            if chosen is not None and chosen.why is not None:
                study.user_attrs = {"best trial": chosen.why, **user}
            detail = _detail(study, cache, trials)
        best = b"" if chosen is None else encoded[chosen.number]
        # The object is closed again around its two lists of trials, which are encoded already.
        return b'%s, "best_trials": [%s], "trials": [%s]}' % (detail[:-1], best, b",".join(encoded[after:]))

    def _dropped(self, study_id: int) -> dict[int, Dropped]:
        """The trials that do not count, by number. Most studies have none."""
        storage = self._storage
        if not isinstance(storage, TrialStorage) or not storage.dropped(study_id):
            return {}
        return dropped(storage, study_id)

    def _limits(self, study_id: int) -> Limits:
        row = Leases(self._storage).study(study_id) if isinstance(self._storage, TrialStorage) else None
        return NONE if row is None else Limits.of(row)

    def _resolution(self, study_id: int) -> float | None:
        row = Leases(self._storage).study(study_id) if isinstance(self._storage, TrialStorage) else None
        return None if row is None else row.resolution


def _detail(study: FrozenStudy, cache: _Cache, trials: list[FrozenTrial]) -> bytes:
    """Everything but the lists of trials, as a JSON object."""
    spaces = cache.spaces
    reported = spaces.has_intermediate_values or any(t.intermediate_values for t in trials if not t.state.is_finished())
    detail = serialize_study_detail(
        study,
        [],
        [],
        spaces.intersection_search_space,
        spaces.union_search_space,
        spaces.union_user_attrs,
        reported,
        get_plotly_graph_objects(study.system_attrs),
        [],
    )
    del detail["best_trials"], detail["trials"]
    return json.dumps(detail).encode()


def _trials(cache: _Cache, study: FrozenStudy, trials: list[FrozenTrial], gone: Mapping[int, Dropped]) -> list[bytes]:
    """The trials, each as a JSON object. A finished one is cached until the study's attributes about it change, or
    whether it counts. One that does not has an attribute more than its record, which says so."""
    attrs: defaultdict[int, dict[str, Any]] = defaultdict(dict)
    for key, value in study.system_attrs.items():
        if match := OF_TRIAL.match(key):
            attrs[int(match[1])][key] = value
    all_encoded = []
    for trial in trials:
        own = attrs.get(trial._trial_id, {})
        if trial.number in gone:
            own = {**own, DROPPED: _why(gone[trial.number])}
        encoded_with, encoded = cache.trials.get(trial._trial_id, (None, b""))
        if encoded_with != own:
            encoded = _trial(study._study_id, trial, own)
            if trial.state.is_finished():
                cache.trials[trial._trial_id] = (own, encoded)
        all_encoded.append(encoded)
    return all_encoded


def _why(found: Dropped) -> str:
    return f"{found.reason} ({found.by}, {found.when.astimezone(UTC):%Y-%m-%d %H:%M} UTC)"


def _trial(study_id: int, trial: FrozenTrial, study_attrs: dict[str, Any]) -> bytes:
    if any(map(math.isnan, trial.values or ())):  # a plain script may store it, and the page cannot show it
        trial = copy.copy(trial)
        trial._values = None
    if DROPPED in study_attrs:
        trial = copy.copy(trial)
        trial.user_attrs = {DROPPED: study_attrs[DROPPED], **trial.user_attrs}
    serialized = serialize_frozen_trial(study_id, trial, study_attrs)
    # Those that Optuna 5 stores one by one too. JSON has no infinity.
    serialized["constraints"] = [
        value if math.isfinite(value) else math.copysign(sys.float_info.max, value)
        for value in trial.constraints.values()
    ]
    return json.dumps(serialized).encode()


def _best(trials: list[FrozenTrial], resolution: float | None, limits: Limits, *, maximize: bool) -> BestTrial | None:
    """By the rule of hpo/study/ranking.py; for another program's study, as Optuna's storages choose."""
    if resolution is not None:
        return ranking.best(ranking.scores_of(trials, limits), resolution, maximize=maximize)
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    if not complete:
        return None
    choose = max if maximize else min
    best = choose(complete, key=lambda trial: trial.value or 0.0)
    return BestTrial(best.number, best.value or 0.0)
