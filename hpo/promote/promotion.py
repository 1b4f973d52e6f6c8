"""Best trial to model: its best epoch's weights, evaluated, saved, registered, shown beside the trial."""

from __future__ import annotations

import logging
import math
import socket
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpo.models.data import Sequences
from hpo.storage.artifacts import ArtifactStore, MissingArtifactError, artifact_store
from hpo.storage.database import database_url
from hpo.storage.errors import LeaseLost
from hpo.storage.home import home
from hpo.storage.registry import ModelVersion, Registry, materialise, publish
from hpo.study.config import to_dict
from hpo.study.lifecycle import OpenStudy, open_study, ranked

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from hpo.models.bundle import BundleConfig
    from hpo.models.member import Weights
    from hpo.models.metrics import Scores
    from hpo.models.training import Training
    from hpo.storage.trials import TrialStorage

log = logging.getLogger("hpo")

MIMETYPES = {".png": "image/png", ".json": "application/json", ".md": "text/markdown"}
TOLERANCE = 1e-5  # the least between the recorded score and the same weights' on another machine or version


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
    with leases.promotion(study_id, worker) as held:
        if not held:
            return False
        own = ranked(opened)
        version = None
        if own:
            version = promote(opened, store, own[0], sequences).version
    try:
        leases.finish_promotion(study_id, worker, version)
    except LeaseLost as lost:  # or the study was opened again meanwhile
        log.warning("%s", lost)
        return False
    return True


def promote_trial(storage: TrialStorage, name: str, number: int | None) -> ModelVersion:
    """`hpo promote`: the trial of that number, or the best, as a new version."""
    from hpo.worker.worker import fetch_sequences

    opened, store = open_study(name, storage), artifact_store()
    own = ranked(opened)
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
    from hpo.models.bundle import save
    from hpo.trial.run import rebuild
    from hpo.worker.worker import choose_device

    attributes = trial.user_attrs
    training = rebuild(opened.plan, attributes, sequences, choose_device())
    training.load(_weights(store, attributes, training))
    validation = _check_score(opened, trial, training)
    config = _bundle_config(opened, trial, training)
    test = _test_scores(opened, store, config, training)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / opened.name
        scored = replace(config, validation=validation, test=test)
        save(folder, [member.weights() for member in training.members], scored, attributes["curve"])
        artifacts = publish(store, folder, f"model-{opened.study_id}-{trial.number}")
    model = Registry(opened.storage.connection).promote(
        name=opened.name,
        study_id=opened.study_id,
        study_name=opened.name,
        trial_number=trial.number,
        scores={
            "metric": opened.plan.metric,
            "value": trial.value,
            "validation": validation.metrics,
            "test": None if test is None else test.metrics,
            "intervals": None if test is None else test.intervals,
        },
        config={"params": attributes["params"]},
        artifacts=artifacts,
    )
    _show(opened, trial, model)
    log.info("study %s: trial %d is version %d", opened.name, trial.number, model.version)
    return model


def _weights(store: ArtifactStore, attributes: dict[str, Any], training: Training) -> list[Weights]:
    """The best epoch's weights: as kept, else trained again (training is exact)."""
    from hpo.models.bundle import unpack

    key = attributes.get("weights")
    if key is not None:
        try:
            return unpack(store.get(key))
        except MissingArtifactError:
            log.info("the weights %s were dropped for better trials': training again", key)
    while not training.finished and len(training.history) < attributes["epochs"]:
        training.advance()
    return training.best_weights


def _check_score(opened: OpenStudy, trial: FrozenTrial, training: Training) -> Scores:
    """The scores on validation; the study's metric must be the recorded value, to the bit where it was trained.

    Another machine's rounding may turn the class or the rank of a sequence, so that a metric moves by a step.
    """
    from hpo.models.metrics import measure
    from hpo.trial.provenance import device_name, provenance

    probabilities = training.validate()
    scores = measure(probabilities, training.labels, trial.user_attrs["threshold"], trial.user_attrs["seed"])
    value, recorded = scores.metrics[opened.plan.metric], trial.user_attrs
    same = recorded["device"] == device_name(str(training.device))
    same = same and recorded["provenance"]["torch"] == provenance()["torch"]
    same = same and recorded.get("lstm_kernel", "torch") == training.lstm_kernel
    same = same and recorded["worker"].rpartition("-")[0] == socket.gethostname()
    near = math.isclose(value, trial.value or 0.0, abs_tol=max(TOLERANCE, 1 / len(training.labels)))
    if value != trial.value and (same or not near):
        raise PromotionError(
            f"the promoted weights must give the recorded validation {opened.plan.metric} {trial.value!r}, they "
            f"give {value!r}; trial {trial.number} was trained on {recorded['device']} with torch "
            f"{recorded['provenance']['torch']}"
        )
    return scores


def _bundle_config(opened: OpenStudy, trial: FrozenTrial, training: Training) -> BundleConfig:
    from hpo.models.bundle import BundleConfig

    plan, attributes = opened.plan, trial.user_attrs
    data = plan.config.data
    kept = ("params", "seed", "parameters", "training_seconds", "device", "worker", "fused_optimizer", "lstm_kernel")
    return BundleConfig(
        classifier=training.members[0].model.config,
        classes=plan.classes,
        features=plan.features,
        metric=plan.metric,
        members=len(training.members),
        threshold=attributes["threshold"],
        best_epoch=attributes["best_epoch"],
        columns={"label": data.label, "id": data.id, "step": data.step, "group": data.group},
        provenance={
            "study": opened.name,
            "trial": trial.number,
            "data": plan.train,
            "test_data": plan.test,
            "config": to_dict(plan.config),
            **{name: attributes.get(name) for name in kept},
            **attributes["provenance"],
        },
    )


def _test_scores(opened: OpenStudy, store: ArtifactStore, config: BundleConfig, training: Training) -> Scores | None:
    """The members together on the test part: the only time that it is touched."""
    from hpo.models.bundle import assemble
    from hpo.models.metrics import measure
    from hpo.worker.worker import fetch_sequences

    if opened.plan.test is None:
        return None
    test = fetch_sequences(store, opened.plan.test)
    assert test.labels is not None
    bundle = assemble(config, [member.weights() for member in training.members], str(training.device))
    return measure(bundle.predict(test).probabilities, test.labels, config.threshold, opened.plan.config.study.seed)


def _show(opened: OpenStudy, trial: FrozenTrial, model: ModelVersion) -> None:
    """On the dashboard the bundle's files appear beside their trial, and the study's note tells the model."""
    from hpo.study.notes import announce_model, attach_artifact

    for name, key in sorted(model.artifacts.items()):
        mimetype = MIMETYPES.get(Path(name).suffix, "application/octet-stream")
        attach_artifact(opened.storage, opened.study_id, trial._trial_id, key, name, mimetype)
    metric, scores = opened.plan.metric, model.scores
    parts = {"validation": scores["validation"][metric], "test": (scores["test"] or {}).get(metric)}
    values = ", ".join(f"{value:.4f} on the {part} part" for part, value in parts.items() if value is not None)
    told = f"model `{model.name}` version {model.version} is trial {trial.number}: {metric} {values}"
    announce_model(opened.storage, opened.study_id, told)


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


def training_part(folder: Path) -> Sequences | None:
    """The data that a saved model was trained on, where the artifact store still has them."""
    from hpo.models.bundle import load
    from hpo.worker.worker import fetch_sequences

    try:
        return fetch_sequences(artifact_store(), load(folder).config.provenance["data"])
    except (KeyError, MissingArtifactError):
        return None
