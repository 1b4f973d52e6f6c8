"""Best trial to model: its best epoch's weights, evaluated, saved, registered, shown beside the trial."""

from __future__ import annotations

import logging
import math
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from storage.registry import ModelVersion, Registry, materialise, publish

from hpo.study import OpenStudy, open_study, ranked
from models.data import Sequences, read
from storage.artifacts import ArtifactStore, MissingArtifactError, artifact_store
from storage.postgres import database_url, home

if TYPE_CHECKING:
    from models.bundle import Bundle
    from optuna.trial import FrozenTrial
    from storage.trials import TrialStorage

    from models.training import Training, Weights

log = logging.getLogger("hpo")

RENEW_S = 10.0  # between two renewals of the promotion's lease
MIMETYPES = {".png": "image/png", ".json": "application/json", ".md": "text/markdown"}
TOLERANCE = 1e-5  # between the recorded score and the one of the same weights on another device or version


class PromotionError(RuntimeError):
    """There is nothing to promote, or the weights do not give the recorded score."""


def promote_once(opened: OpenStudy, store: ArtifactStore, worker: str, sequences: Sequences) -> bool:
    """Promote the best trial of a study that is over, unless somebody did or does.

    Returns whether nothing is left to do: False while another worker holds the promotion's lease.
    """
    leases, study_id = opened.leases, opened.study_id
    row = leases.study(study_id)
    if row is None or row.status == "finished":
        return True
    if not leases.take_promotion(study_id, worker):
        return False
    with _renewing(opened, worker):
        own = own_trials(opened)
        version = None
        if own:
            version = promote(opened, store, own[0], sequences).version
    leases.finish_promotion(study_id, worker, version)
    return True


@contextmanager
def _renewing(opened: OpenStudy, worker: str) -> Iterator[None]:
    """Keep the promotion's lease for as long as the block runs."""
    done = threading.Event()

    def renew() -> None:
        while not done.wait(RENEW_S):
            opened.leases.take_promotion(opened.study_id, worker)

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def own_trials(opened: OpenStudy) -> list[FrozenTrial]:
    """Completed trials that this study trained itself (not copied by `warm_start`), best first."""
    return [trial for trial in ranked(opened) if "seed" in trial.user_attrs]


def promote_trial(storage: TrialStorage, name: str, number: int | None) -> ModelVersion:
    """`hpo promote`: the trial of that number, or the best, as a new version."""
    from hpo.worker import fetch_sequences

    opened, store = open_study(name, storage), artifact_store()
    own = own_trials(opened)
    chosen = own if number is None else [trial for trial in own if trial.number == number]
    if not chosen:
        known = ", ".join(str(trial.number) for trial in own) or "none"
        wanted = "a completed trial" if number is None else f"trial {number}, completed"
        raise PromotionError(f"study {name!r} has not {wanted}; completed trials, best first: {known}")
    return promote(opened, store, chosen[0], fetch_sequences(store, opened.plan.train))


def promote(opened: OpenStudy, store: ArtifactStore, trial: FrozenTrial, sequences: Sequences) -> ModelVersion:
    """Make a completed trial's model a version of the registry.

    The members are evaluated on validation, which must give the recorded score, and then, together, once on
    the test part. Raises PromotionError.
    """
    from hpo.objective import build
    from hpo.worker import choose_device

    attributes = trial.user_attrs
    device = choose_device()
    training = build(opened.plan, attributes["params"], attributes["seed"], sequences, device)
    members = _weights(store, attributes, training)
    training.load(members)
    validation = _check_score(opened, trial, training)
    registry = Registry(database_url())
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / opened.name
        scores = _save(opened, store, trial, training, members, validation, folder)
        artifacts = publish(store, folder, f"model-{opened.study_id}-{trial.number}")
    config = {"params": attributes["params"], "study": opened.name, "trial": trial.number}
    model = registry.promote(
        name=opened.name,
        study_id=opened.study_id,
        study_name=opened.name,
        trial_number=trial.number,
        scores=scores,
        config=config,
        artifacts=artifacts,
    )
    _show(opened, trial, artifacts)
    log.info("study %s: trial %d is version %d", opened.name, trial.number, model.version)
    return model


def _weights(store: ArtifactStore, attributes: dict[str, Any], training: Training) -> list[Weights]:
    """The best epoch's weights: as kept, else trained again (training is exact)."""
    from hpo.objective import unpack

    key = attributes.get("weights")
    if key is not None:
        try:
            return unpack(store.get(key))
        except MissingArtifactError:
            log.info("the weights %s were dropped for better trials': training again", key)
    while not training.finished and len(training.history) < attributes["epochs"]:
        training.advance()
    return training.best_weights


def _check_score(opened: OpenStudy, trial: FrozenTrial, training: Training) -> dict[str, float]:
    """Every validation metric; the study's must be the recorded one, to the bit where it ran on this device."""
    from hpo.provenance import device_name, provenance
    from models.metrics import evaluate

    threshold = trial.user_attrs["threshold"]
    scores = evaluate(training.validate(), training.labels, threshold)
    value, metric = scores[opened.plan.metric], opened.plan.metric
    same = trial.user_attrs["device"] == device_name(str(training.device))
    same = same and trial.user_attrs["provenance"]["torch"] == provenance()["torch"]
    if value != trial.value and (same or not math.isclose(value, trial.value or 0.0, abs_tol=TOLERANCE)):
        raise PromotionError(
            f"the promoted weights must give the recorded validation {metric} {trial.value!r}, they give "
            f"{value!r}; trial {trial.number} was trained on {trial.user_attrs['device']} with torch "
            f"{trial.user_attrs['provenance']['torch']}"
        )
    return scores


def _save(
    opened: OpenStudy,
    store: ArtifactStore,
    trial: FrozenTrial,
    training: Training,
    members: list[Weights],
    validation: dict[str, float],
    folder: Path,
) -> dict[str, Any]:
    """Write the bundle, evaluate it on the test part, and write the scores into it. Returns the scores."""
    raise NotImplementedError


def _show(opened: OpenStudy, trial: FrozenTrial, artifacts: dict[str, str]) -> None:
    """The bundle's files appear beside their trial on the dashboard."""
    from hpo.dashboard import attach_artifact

    for name, key in sorted(artifacts.items()):
        mimetype = MIMETYPES.get(Path(name).suffix, "application/octet-stream")
        attach_artifact(opened.storage, opened.study_id, trial._trial_id, key, name, mimetype)


def materialise_model(model: ModelVersion) -> Path:
    """The folder of a promoted version on this machine, fetched from the artifact store if need be."""
    folder = home() / "models" / model.name / f"v{model.version}"
    materialise(artifact_store(), model.artifacts, folder)
    return folder


def model_folder(model: str, version: int | None) -> Path:
    """A saved model folder by its path, or a promoted model by its name."""
    if Path(model).is_dir():
        return Path(model)
    return materialise_model(Registry(database_url()).get(model, version))


def read_for(bundle: Bundle, path: Path) -> Sequences:
    """Sequences to predict, labels ignored, columns as the model was trained on."""
    return read(path, labeled=False, **bundle.config.columns)
