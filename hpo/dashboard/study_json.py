"""What a study's page asks for, in optuna-dashboard's own shape; trials that have ended are encoded once."""

from __future__ import annotations

import json
import re
import struct
import threading
import zlib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from optuna.storages import BaseStorage
    from optuna.study._frozen import FrozenStudy
    from optuna.trial import FrozenTrial
    from optuna_dashboard._inmemory_cache import _CachedExtraStudyProperty

OF_TRIAL = re.compile(r"dashboard:(?:artifacts:)?(\d+):")  # a study's attribute that belongs to one of its trials
# RFC 1952: no name, no time, an unknown system; RFC 1951: a last block with nothing in it.
GZIP_HEAD, LAST_BLOCK = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff", b"\x03\x00"


class Piece(NamedTuple):
    """A part of an answer."""

    text: bytes
    packed: bytes  # deflated on its own, ending at a whole byte: pieces in a row are one stream


def piece(text: bytes) -> Piece:
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return Piece(text, packer.compress(text) + packer.flush(zlib.Z_SYNC_FLUSH))


COMMA, BETWEEN, END = piece(b","), piece(b'], "trials": ['), piece(b"]}")


def joined(pieces: Iterable[Piece], *, zipped: bool) -> bytes:
    """The answer as it is sent, as one gzip member where the browser takes that."""
    pieces = list(pieces)
    text = b"".join(part.text for part in pieces)
    if not zipped:
        return text
    check = struct.pack("<LL", zlib.crc32(text), len(text) % 2**32)
    return b"".join((GZIP_HEAD, *(part.packed for part in pieces), LAST_BLOCK, check))


@dataclass
class _Known:
    """What is kept of a study."""

    spaces: _CachedExtraStudyProperty  # of its ended trials: those that run have not all their parameters yet
    trials: dict[int, tuple[Mapping[str, Any], Piece]] = field(default_factory=dict)  # id -> what it was made with


class Pages:
    """Studies of one storage, as `GET /api/studies/ID?after=N` answers them."""

    def __init__(self, storage: BaseStorage) -> None:
        self._storage = storage
        self._known: dict[int, _Known] = {}
        self._lock = threading.Lock()  # two first requests do not encode the same

    def study(self, study_id: int, after: int) -> list[Piece] | None:
        """The study as it is now, with its trials from the number `after` on.

        None where it does not exist, or has several objectives or none: optuna-dashboard's own answer is right then.
        """
        from optuna.study._frozen import FrozenStudy
        from optuna_dashboard._inmemory_cache import _CachedExtraStudyProperty

        storage = self._storage
        try:
            name, directions = storage.get_study_name_from_id(study_id), storage.get_study_directions(study_id)
            user, system = storage.get_study_user_attrs(study_id), storage.get_study_system_attrs(study_id)
            trials = storage.get_all_trials(study_id, deepcopy=False)
        except KeyError:
            self._known.pop(study_id, None)
            return None
        if len(directions) != 1 or system.get("preference:is_preferential"):
            return None
        study = FrozenStudy(name, None, user, system, study_id, directions=directions)
        with self._lock:
            known = self._known.setdefault(study_id, _Known(_CachedExtraStudyProperty()))
            known.spaces.update([t for t in trials if t.state.is_finished() and t._trial_id not in known.trials])
            pieces = _trials(known, study, trials)
            head = _head(study, known, trials)
        best = _best(trials, pieces, maximize=directions[0].name == "MAXIMIZE")
        return [head, *best, BETWEEN, *_listed(pieces[after:]), END]


def _head(study: FrozenStudy, known: _Known, trials: list[FrozenTrial]) -> Piece:
    """Everything but the trials, up to where the best of them belong."""
    from optuna_dashboard._custom_plot_data import get_plotly_graph_objects
    from optuna_dashboard._serializer import serialize_study_detail

    spaces = known.spaces
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
    return piece(json.dumps(detail).encode()[:-1] + b', "best_trials": [')


def _trials(known: _Known, study: FrozenStudy, trials: list[FrozenTrial]) -> list[Piece]:
    """The trials, of which the ended ones are kept for as long as what the study says of them is the same."""
    attrs: defaultdict[int, dict[str, Any]] = defaultdict(dict)
    for key, value in study.system_attrs.items():
        if match := OF_TRIAL.match(key):
            attrs[int(match[1])][key] = value
    pieces = []
    for trial in trials:
        own = attrs.get(trial._trial_id, {})
        made_with, encoded = known.trials.get(trial._trial_id, (None, COMMA))
        if made_with != own:
            encoded = _trial(study._study_id, trial, own)
            if trial.state.is_finished():
                known.trials[trial._trial_id] = (own, encoded)
        pieces.append(encoded)
    return pieces


def _trial(study_id: int, trial: FrozenTrial, study_attrs: dict[str, Any]) -> Piece:
    from optuna_dashboard._serializer import serialize_frozen_trial

    serialized = serialize_frozen_trial(study_id, trial, study_attrs)
    serialized["constraints"] = list(trial.constraints.values())  # also those that Optuna 5 keeps one by one
    return piece(json.dumps(serialized).encode())


def _best(trials: list[FrozenTrial], pieces: list[Piece], *, maximize: bool) -> list[Piece]:
    """The first of the best values, as Optuna's storages have it; nothing before a trial is complete."""
    complete = [(trial.value or 0.0, part) for trial, part in zip(trials, pieces, strict=True) if _complete(trial)]
    best = max if maximize else min
    return [best(complete, key=lambda scored: scored[0])[1]] if complete else []


def _complete(trial: FrozenTrial) -> bool:
    return trial.state.name == "COMPLETE"


def _listed(pieces: list[Piece]) -> list[Piece]:
    """With commas between them."""
    return [part for encoded in pieces for part in (COMMA, encoded)][1:]
