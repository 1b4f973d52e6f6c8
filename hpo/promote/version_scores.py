"""A promoted version's scores by class and by group, from what was stored when it was promoted. Imports no torch."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

from hpo.errors import StudyFault
from hpo.models.bundle.config import from_json
from hpo.models.class_scores import ModelScores, PartScores, model_scores
from hpo.storage.artifacts import ArtifactStore, artifact_store
from hpo.storage.registry import MissingModel, ModelVersion, Registry

log = logging.getLogger("hpo")

FILE = "config.json"  # of a saved model
KEPT = 16  # versions whose scores stay in memory, as pages ask for them again and again


def version_scores(
    model: ModelVersion, store: ArtifactStore, registry: Registry, *, with_names: bool = True
) -> ModelScores:
    """The version's parts by class and by group; by class also of one that an earlier version of hpo has promoted.

    with_names: say what the groups are called, which the database alone knows. Raises ArtifactError where config.json
    is not in the store or is damaged, BundleError where a newer hpo wrote it.
    """
    if FILE not in model.artifacts:
        return ModelScores(None, None)
    found = _scores_of(store, model.artifacts[FILE])
    if not with_names or not any(part and part.groups for part in (found.validation, found.test)):
        return found
    names = registry.group_names(model)
    return ModelScores(_named(found.validation, names.get("validation", ())), _named(found.test, names.get("test", ())))


def scores_if_known(
    registry: Registry, name: str, version: int, store: ArtifactStore | None = None, *, with_names: bool = True
) -> ModelScores | None:
    """`version_scores` for a display that goes on without: None for a version that is gone, and with a warning where
    its config.json cannot be read. store: the one of HPO_ARTIFACTS without one."""
    try:
        model = registry.get(name, version)
        return version_scores(model, store or artifact_store(), registry, with_names=with_names)
    except MissingModel:
        return None
    except StudyFault as fault:
        log.warning("%s version %d has no scores by class here: %s", name, version, fault)
        return None


@lru_cache(maxsize=KEPT)
def _scores_of(store: ArtifactStore, key: str) -> ModelScores:
    """A key names its content, so what it holds does not change."""
    config = from_json(store.get(key), key)
    return model_scores(config.classes, config.validation, config.test)


def _named(part: PartScores | None, names: Sequence[str]) -> PartScores | None:
    """The part with the names of its groups, where there are as many."""
    if part is None or len(names) != len(part.by_group):
        return part
    rows = zip(part.by_group, names, strict=True)
    return replace(part, by_group=tuple(replace(group, name=name) for group, name in rows))
