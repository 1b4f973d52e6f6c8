"""The JSON that a study's page requests, in optuna-dashboard's own form; a finished trial is encoded only once."""

from __future__ import annotations

import gzip
import json
import re
import threading
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from optuna.storages import BaseStorage
from optuna.study._frozen import FrozenStudy
from optuna.trial import FrozenTrial
from optuna_dashboard._custom_plot_data import get_plotly_graph_objects
from optuna_dashboard._inmemory_cache import _CachedExtraStudyProperty
from optuna_dashboard._serializer import serialize_frozen_trial, serialize_study_detail

OF_TRIAL = re.compile(r"dashboard:(?:artifacts:)?(\d+):")  # a study's attribute that belongs to one of its trials


def compressed(answer: bytes) -> bytes:
    """The answer as a gzip file. Level 1, because level 6 takes three times as long to save a third of the bytes."""
    return gzip.compress(answer, compresslevel=1, mtime=0)


@dataclass
class _Cache:
    """What is cached of one study."""

    spaces: _CachedExtraStudyProperty  # of its finished trials: running ones do not have all their parameters yet
    trials: dict[int, tuple[Mapping[str, Any], bytes]] = field(default_factory=dict)  # id -> study attributes, JSON


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
        except KeyError:
            self._caches.pop(study_id, None)
            return None
        if len(directions) != 1 or system.get("preference:is_preferential"):
            return None
        study = FrozenStudy(name, None, user, system, study_id, directions=directions)
        with self._lock:
            cache = self._caches.setdefault(study_id, _Cache(_CachedExtraStudyProperty()))
            cache.spaces.update([t for t in trials if t.state.is_finished() and t._trial_id not in cache.trials])
            encoded = _trials(cache, study, trials)
            detail = _detail(study, cache, trials)
        best = _best(trials, encoded, maximize=directions[0].name == "MAXIMIZE")
        # The object is closed again around its two lists of trials, which are encoded already.
        return b'%s, "best_trials": [%s], "trials": [%s]}' % (detail[:-1], best, b",".join(encoded[after:]))


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


def _trials(cache: _Cache, study: FrozenStudy, trials: list[FrozenTrial]) -> list[bytes]:
    """The trials, each as a JSON object. A finished one is cached until the study's attributes about it change."""
    attrs: defaultdict[int, dict[str, Any]] = defaultdict(dict)
    for key, value in study.system_attrs.items():
        if match := OF_TRIAL.match(key):
            attrs[int(match[1])][key] = value
    all_encoded = []
    for trial in trials:
        own = attrs.get(trial._trial_id, {})
        encoded_with, encoded = cache.trials.get(trial._trial_id, (None, b""))
        if encoded_with != own:
            encoded = _trial(study._study_id, trial, own)
            if trial.state.is_finished():
                cache.trials[trial._trial_id] = (own, encoded)
        all_encoded.append(encoded)
    return all_encoded


def _trial(study_id: int, trial: FrozenTrial, study_attrs: dict[str, Any]) -> bytes:
    serialized = serialize_frozen_trial(study_id, trial, study_attrs)
    serialized["constraints"] = list(trial.constraints.values())  # including those that Optuna 5 stores one by one
    return json.dumps(serialized).encode()


def _best(trials: list[FrozenTrial], encoded: list[bytes], *, maximize: bool) -> bytes:
    """The first complete trial with the best value, as Optuna's storages choose it; empty before one is complete."""
    complete = [(trial.value or 0.0, text) for trial, text in zip(trials, encoded, strict=True) if _complete(trial)]
    best = max if maximize else min
    return best(complete, key=lambda scored: scored[0])[1] if complete else b""


def _complete(trial: FrozenTrial) -> bool:
    return trial.state.name == "COMPLETE"
