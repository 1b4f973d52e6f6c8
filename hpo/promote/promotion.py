"""Best trial to model: its best epoch's weights, evaluated, saved, registered, shown beside the trial."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from hpo.datasets import fetch_sequences
from hpo.errors import StudyFault, legible
from hpo.models.bundle.bundle import assemble, load, save
from hpo.models.bundle.config import BundleConfig, Component, Footprint
from hpo.models.bundle.footprint import measure as measure_footprint
from hpo.models.bundle.footprint import size_of
from hpo.models.calibration import Calibration, Comparison, calibrate, calibration_of, measure_reliability
from hpo.models.classifier import Weights
from hpo.models.data.sequences import Sequences
from hpo.models.device import OutOfMemory
from hpo.models.diagnosis import Diagnosis, diagnose
from hpo.models.estimate import Estimate
from hpo.models.metrics import Scores, count_groups, measure, predict_labels
from hpo.models.training.training import Rows
from hpo.promote.composition import Share, compose
from hpo.promote.finals import winner
from hpo.promote.report import report_at_promotion, without_paths
from hpo.promote.trained import Trained
from hpo.promote.weights import PromotionError
from hpo.storage.artifacts import ArtifactStore, DamagedArtifactError, MissingArtifactError, artifact_store
from hpo.storage.changes import dropped
from hpo.storage.errors import LeaseLost
from hpo.storage.keys import model_prefix
from hpo.storage.leases import Leases
from hpo.storage.notices import Notices
from hpo.storage.registry import ModelVersion, Registry, publish
from hpo.storage.scratch import scratch_folder
from hpo.storage.trials import TrialStorage
from hpo.study.config import to_dict
from hpo.study.finals import Finalist, finalists_of, prepare_finals
from hpo.study.lifecycle import OpenStudy, open_study
from hpo.study.notes import announce_model, attach_artifact
from hpo.study.plan import Plan
from hpo.study.ranking import rank
from hpo.study.record import TrialRecord
from hpo.trial.checkpoints import drop_all_checkpoints
from hpo.trial.context import WorkerResources
from hpo.trial.device import choose_device

log = logging.getLogger("hpo")

MIMETYPES = {
    ".svg": "image/svg+xml",
    ".png": "image/png",  # of a version that was stored with such pictures
    ".html": "text/html",
    ".json": "application/json",
    ".md": "text/markdown",
}
OF_EACH_REPEAT = ("seed", "training_seconds", "device", "fused_optimizer", "lstm_kernel")
RECORDED = ("params", "seed", "parameters", "training_seconds", "device", "fused_optimizer", "lstm_kernel")


def promote_when_over(study: OpenStudy, resources: WorkerResources, leases: Leases) -> bool:
    """Promote the best trial of a study that is over, unless somebody did or does. Where its file asks for finals,
    these begin first, and their winner is promoted once they are over.

    Returns whether nothing is left to do: False while another worker holds the promotion's lease, or finals run.
    """
    row = leases.study(study.study_id)
    if row is None or row.status == "finished":
        return True
    running = leases.finals(study.study_id)
    if running is not None and not running.over:
        return False
    with leases.promotion(study.study_id, resources.worker) as ours:
        if not ours:
            return False
        if not _finals_are_over(study):
            leases.release_promotions(resources.worker)
            return False
        version = None
        if (found := _best(study)) is not None:
            with _failure_told(study):
                sequences = resources.datasets.get(study.plan.train)
                record, finalist = found
                version = promote(study, resources.store, record, sequences, finalist).version
        if resources.tracker is not None:
            resources.tracker.settle(study.storage, study.name)
        for each in (row, leases.study(running.study_id) if running is not None else None):
            if each is not None:
                drop_all_checkpoints(leases, resources.store, each.study_id, each.store_key)
    try:
        leases.finish_promotion(study.study_id, resources.worker, version)
    except LeaseLost as lost:  # or the study was opened again meanwhile
        log.warning("%s", lost)
        return False
    return True


def _finals_are_over(study: OpenStudy) -> bool:
    """Whether nothing of the study's finals is left to train, also as it wants none; else they have begun now."""
    if prepare_finals(study) is None:
        return True
    found = study.leases.finals(study.study_id)
    return found is None or found.over


def _best(study: OpenStudy) -> tuple[TrialRecord, Finalist | None] | None:
    """The trial to promote: the winner of the finals, else the best one; None where none is complete."""
    finalist = winner(finalists_of(study), study.plan)
    if finalist is not None:
        return finalist.record, finalist
    best = study.best_first()
    return (best[0], None) if best else None


@contextmanager
def _failure_told(study: OpenStudy) -> Iterator[None]:
    """A fault in the block is told to whom the study names, and goes on."""
    try:
        yield
    except StudyFault as fault:
        reason = f"its promotion failed: {legible(str(fault))}"
        Notices(study.storage.connection).note_failure(study.study_id, reason)
        raise


def promote_trial(storage: TrialStorage, name: str, number: int | None, *, as_default: bool = False) -> ModelVersion:
    """`hpo promote`: the trial of that number, or the best, as a new version.

    as_default: it becomes the version that the name alone means, even if it is not better on validation.
    """
    study, store = open_study(name, storage), artifact_store()
    complete, gone = study.complete(), dropped(storage, study.study_id)
    if number in gone:
        why = f"trial {number} was dropped by {gone[number].by}: {legible(gone[number].reason)}"
        raise PromotionError(f"{why}; `hpo trials restore {name} {number}` lets it count again")
    chosen = _best(study) if number is None else None
    if number is not None and (wanted := [record for record in complete if record.number == number]):
        chosen = wanted[0], None
    if chosen is None and number is None and (reason := study.none_within()) is not None:
        raise PromotionError(f"study {name!r} has nothing to promote: {reason}")
    if chosen is None:
        known = ", ".join(str(record.number) for record in complete) or "none"
        what = "a completed trial" if number is None else f"trial {number}, completed"
        rest = f"; dropped: {', '.join(map(str, gone))}" if gone else ""
        raise PromotionError(f"study {name!r} has not {what}; completed trials, best first: {known}{rest}")
    record, finalist = chosen
    sequences = fetch_sequences(store, study.plan.train)
    model = promote(study, store, record, sequences, finalist, as_default=as_default)
    study.leases.promote_again(study.study_id, model.version)
    return model


def promote(
    study: OpenStudy,
    store: ArtifactStore,
    record: TrialRecord,
    sequences: Sequences,
    finalist: Finalist | None = None,
    *,
    as_default: bool = False,
) -> ModelVersion:
    """Make a complete trial's model a version of the registry; finalist: its repeats in the finals, together.

    It becomes the one that the name alone means if it is within the study's limits and better on validation than that
    one, if that one's trial was dropped or is beyond the limits, or `as_default`. The members are evaluated on
    validation, which must give the recorded score, and calibrated by it (`_calibration`); then, together, they are
    evaluated once on the test part. Of rolling folds the last member is the model. Raises PromotionError.
    """
    device = choose_device()
    try:
        composed = compose(study, store, record, finalist, sequences, device)
        trained, estimate = composed.trained, composed.estimate
        members, validation = trained.members, trained.scores
        calibration = _calibration(trained, sequences)
        config = replace(
            _bundle_config(study, composed.shares),
            temperature=calibration.temperature,
            threshold=calibration.threshold,
            estimate=estimate,
        )
        registry = Registry(study.storage.connection)
        config = replace(config, footprint=_footprint(registry, study, record, config, members, sequences))
        test, compared, diagnosis = _test_scores(study.plan, store, config, members, device)
    except OutOfMemory as error:
        raise PromotionError(f"the model of trial {record.number} cannot be evaluated now: {error}") from None
    if diagnosis is None:
        diagnosis = _diagnosed("validation", sequences, trained.probabilities, config, trained.rows)
    reliable = {"validation": calibration.comparison, **({} if compared is None else {"test": compared})}
    config = replace(config, validation=validation, test=test, calibration=reliable)
    report = report_at_promotion(study, record, config, diagnosis)
    with scratch_folder() as scratch:
        folder = scratch / "model"
        curve = (record if finalist is None else finalist.first).curve
        save(folder, members, config, curve, report=report)
        artifacts = publish(store, folder, model_prefix(_store_key(study), record.number))
    grouped = {"validation": validation.groups, "test": None if test is None else test.groups}
    earlier = _default(registry, study.name)
    able = {each.number for each in study.best_first()}
    replaces = as_default or (earlier is not None and _has_lost(study, earlier, able | {record.number}))
    model = registry.promote(
        name=study.name,
        study_id=study.study_id,
        study_name=study.name,
        trial_number=record.number,
        scores={
            "metric": study.plan.metric,
            "value": record.value,
            **({} if estimate is None else {"estimate": asdict(estimate)}),
            **({} if config.footprint is None else {"footprint": asdict(config.footprint)}),
            "calibration": {part: each.summary for part, each in reliable.items()},
            "validation": validation.metrics,
            "test": None if test is None else test.metrics,
            "sequences": {"validation": validation.sequences, "test": None if test is None else test.sequences},
            "intervals": None if test is None else test.intervals,
            **({} if test is None else {"test_part": study.plan.test}),
            "methods": None if test is None else test.methods,
            "undefined": None if test is None else test.undefined,
        },
        latest=replaces or earlier is None or (record.number in able and is_better(study, record, earlier, estimate)),
        config={"params": record.params},
        diagnosis=None if diagnosis is None else diagnosis.to_json(),
        group_names={part: groups.names for part, groups in grouped.items() if groups and groups.names},
        artifacts=artifacts,
    )
    if replaces and not model.default:  # it was a version already
        model = registry.make_default(study.name, model.version)
    _show(study.storage, study.study_id, record, model)
    log.info("study %s: trial %d is version %d", study.name, record.number, model.version)
    if earlier is not None and model.version != earlier.version:
        log.info("study %s: the name alone means version %d", study.name, (model if model.default else earlier).version)
    return model


def is_better(study: OpenStudy, record: TrialRecord, earlier: ModelVersion, estimate: Estimate | None = None) -> bool:
    """Whether a trial is better on validation than an earlier version, by the rule for trials. One of another study,
    which may have other data, is not compared, nor is the same trial. What has won finals is better than what was in
    none.
    """
    scores, plan = earlier.scores, study.plan
    if earlier.study_id != study.study_id or earlier.trial_number == record.number:
        return True
    if estimate is not None or scores.get("estimate") is not None:
        return estimate is not None
    old = scores["value"], scores["validation"]["log_loss"]
    return rank({0: old, 1: (record.value, record.log_loss)}, plan.metric, plan.resolution)[0] == 1


def _footprint(
    registry: Registry,
    study: OpenStudy,
    record: TrialRecord,
    config: BundleConfig,
    members: Sequence[Weights],
    sequences: Sequences,
) -> Footprint:
    """What a prediction takes. It is measured once for a trial's model, which has the same files, and so is the same
    version, however often it is promoted."""
    size = size_of(config)
    for model in registry.models():
        known = model.scores.get("footprint")
        if (model.study_id, model.trial_number) == (study.study_id, record.number) and known is not None:
            found = Footprint(**known)
            if found.size_mb == size:
                return found
    return measure_footprint(config, members, sequences)


def _has_lost(study: OpenStudy, version: ModelVersion, able: Collection[int]) -> bool:
    """Whether a version is of a trial of this study that may not be promoted any more: it was dropped, or is beyond
    the limits. able: numbers of those that may."""
    return version.study_id == study.study_id and version.trial_number not in able


def _default(registry: Registry, name: str) -> ModelVersion | None:
    return next((model for model in registry.models() if model.name == name and model.default), None)


def _store_key(study: OpenStudy) -> str:
    row = study.leases.study(study.study_id)
    assert row is not None  # an open study has a plan, and with it terms
    return row.store_key


def _calibration(trained: Trained, sequences: Sequences) -> Calibration:
    """By what networks say of sequences that they have not trained on; of rolling folds by those of all blocks, though
    the last network alone is the model: its own block has too few."""
    assert sequences.labels is not None
    weights = None if sequences.weights is None else sequences.weights[trained.rows]
    return calibration_of(trained.probabilities, sequences.labels[trained.rows], weights, trained.threshold)


def _bundle_config(study: OpenStudy, shares: Sequence[Share]) -> BundleConfig:
    """Of a trial's model; the first of its repeats in the finals has its curve and best epoch."""
    plan, own = study.plan, shares[0]
    record, used = own.record, own.repeats
    recorded = {name: getattr(record, name) for name in RECORDED} | _finals_recorded(own)
    if len(shares) > 1:
        recorded["ensemble"] = [
            {"trial": each.record.number, "weight": each.weight, "params": each.record.params, **_finals_recorded(each)}
            for each in shares
        ]
    return BundleConfig(
        classifier=plan.classifier(record.params),
        members=own.networks,
        others=tuple(Component(plan.classifier(each.record.params), each.networks, each.weight) for each in shares[1:]),
        classes=plan.classes,
        features=plan.features,
        named=plan.named,
        fill=plan.fill,
        gaps=plan.gaps,
        metric=plan.metric,
        best_epoch=(used[min(used)] if used else record).best_epoch,
        columns=plan.config.data.columns,
        costs=plan.config.promote.costs,
        provenance={
            "study": study.name,
            "trial": record.number,
            "data": plan.train,
            "test_data": plan.test,
            "config": without_paths(to_dict(plan.config)),
            **recorded,
            **record.provenance,
        },
    )


def _finals_recorded(share: Share) -> dict[str, Any]:
    """Which trainings of the finals a configuration's networks are of, and what is recorded of each."""
    used = share.repeats
    if not used:
        return {}
    numbers = {str(repeat): each.number for repeat, each in used.items()}
    return {"finals": numbers} | {name: [getattr(each, name) for each in used.values()] for name in OF_EACH_REPEAT}


def _test_scores(
    plan: Plan, store: ArtifactStore, config: BundleConfig, members: list[Weights], device: str
) -> tuple[Scores | None, Comparison | None, Diagnosis | None]:
    """The members together on the test part, calibrated, what the calibration brings there, and what a report draws of
    it: the only time that it is touched."""
    if plan.test is None:
        return None, None, None
    test = fetch_sequences(store, plan.test)
    assert test.labels is not None
    model = assemble(config, members, device)
    probabilities = model.predict(test).probabilities
    before = replace(model, config=replace(config, temperature=1.0)).predict(test).probabilities
    scores = measure(probabilities, test.labels, config.threshold, plan.config.study.seed, plan.classes, test.weights)
    if scores.undefined:
        reason = next(iter(scores.undefined.values()))
        log.warning("the test part holds %s: %s have no value on it", reason, ", ".join(scores.undefined))
    right = predict_labels(probabilities, config.threshold) == test.labels
    reliable = (measure_reliability(each, test.labels, test.weights) for each in (before, probabilities))
    scores = replace(scores, groups=count_groups(right, test.groups, test.group_names))
    return scores, Comparison(*reliable), _diagnosed("test", test, probabilities, config)


def _diagnosed(
    part: str, sequences: Sequences, probabilities: NDArray[Any], config: BundleConfig, rows: Rows | None = None
) -> Diagnosis | None:
    """What a report draws of the model's predictions, those of the validation part calibrated here; None, with a
    warning, where that fails: a report is no reason for a model to be lost."""
    try:
        if part == "validation":
            probabilities = calibrate(probabilities, config.temperature)
        return diagnose(part, sequences, probabilities, config.threshold, rows)
    except Exception as error:
        log.warning("the report has neither curves nor sequences: %s: %s", type(error).__name__, error)
        return None


def _show(storage: TrialStorage, study_id: int, record: TrialRecord, model: ModelVersion) -> None:
    """On the dashboard the bundle's files appear beside their trial, and the study's note tells the model."""
    for name, key in sorted(model.artifacts.items()):
        mimetype = MIMETYPES.get(Path(name).suffix, "application/octet-stream")
        attach_artifact(storage, study_id, record.trial_id, key, name, mimetype)
    metric, scores = model.scores["metric"], model.scores
    parts = {"validation": scores["validation"][metric], "test": (scores["test"] or {}).get(metric)}
    values = ", ".join(f"{value:.4f} on the {part} part" for part, value in parts.items() if value is not None)
    sentence = f"model `{model.name}` version {model.version} is trial {record.number}: {metric} {values}"
    sentence += f"; its report is report.html among the trial's files, or `hpo report {model.name}`"
    announce_model(storage, study_id, sentence)


def training_part(folder: Path) -> Sequences | None:
    """The data that a saved model was trained on, where the artifact store still has them."""
    try:
        return fetch_sequences(artifact_store(), load(folder).config.provenance["data"])
    except (KeyError, MissingArtifactError, DamagedArtifactError):
        return None
