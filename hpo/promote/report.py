"""The report of a study: its facts, from the database, the store and what a promotion has at hand, and its HTML."""

from __future__ import annotations

import copy
import logging
import shlex
from collections.abc import Container, Mapping, Sequence
from datetime import datetime
from math import isfinite
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from hpo.models.bundle.config import BundleConfig, BundleError, from_json, to_json
from hpo.models.class_scores import model_scores
from hpo.models.diagnosis import Diagnosis
from hpo.models.metrics import direction
from hpo.promote.finals import contenders
from hpo.promote.finals import winner as winner_of
from hpo.promote.summary import ended_by
from hpo.promote.version_scores import FILE, version_scores
from hpo.report.facts import (
    Asked,
    Cost,
    Facts,
    FinalistFact,
    Importances,
    ModelFact,
    Repeat,
    Slice,
    TrialFact,
)
from hpo.report.figures import best_first
from hpo.report.rendering import render
from hpo.storage.artifacts import ArtifactError, ArtifactStore
from hpo.storage.keys import content_hash
from hpo.storage.registry import MissingModel, ModelVersion, Registry
from hpo.storage.snapshot import Snapshot
from hpo.storage.terms import StudyRow
from hpo.study.config import Folds, StudyConfig, to_dict
from hpo.study.counted import CountedTrials
from hpo.study.entries import written
from hpo.study.finals import Finalist, finalists_of
from hpo.study.lifecycle import OpenStudy, open_study, trial_rows
from hpo.study.limits import Limits
from hpo.study.plan import Plan
from hpo.study.record import COPIED_FROM, TrialRecord, trained_by_us

log = logging.getLogger("hpo")

LEAST_TRIALS = 20  # complete and pruned ones, before importances say anything
GOOD_SHARE, GOOD_LEAST = 0.1, 5  # of the trials that importances tell from others: a tenth, but so many at least
SLICES, SLICE_LEAST = 6, 0.03  # parameters whose values are drawn, and the share of importance that each has at least


def report_of(study: OpenStudy, store: ArtifactStore, *, private: bool = True) -> str:
    """The report of a study, over or not, with its promoted model if it has one.

    private: with what is the data owner's alone: values and ids of sequences, names of groups, and what failed trials
    and workers say.
    """
    registry = Registry(study.storage.connection)
    state = study.leases.snapshot(study.study_id)
    version = _promoted(registry, study, state)
    model = None if version is None else _model(version, store, registry, private=private)
    return render(facts_of(study, model, state, private=private))


def report_at_promotion(
    study: OpenStudy, record: TrialRecord, config: BundleConfig, diagnosis: Diagnosis | None
) -> str | None:
    """The report that lies in the model's folder, which is passed on: nothing in it is the data owner's alone. config:
    with its scores. None, with a warning, where it fails, as a model is worth more than its report."""
    try:
        shared = from_json(to_json(config).encode(), "the model")  # as whoever gets it reads it
        scores = model_scores(shared.classes, shared.validation, shared.test)
        model = ModelFact(study.name, None, record.number, record.value, shared, scores, diagnosis, None)
        return render(facts_of(study, model, study.leases.snapshot(study.study_id), private=False))
    except Exception as error:
        log.warning("study %s: the model has no report: %s: %s", study.name, type(error).__name__, error)
        return None


def facts_of(study: OpenStudy, model: ModelFact | None, state: Snapshot, *, private: bool) -> Facts:
    """All that the report says; the state is the study's."""
    plan = study.plan
    stored = study.storage.get_all_trials(study.study_id, deepcopy=False)
    trials = _trials(study, stored, private=private)
    finals_row = study.leases.finals(study.study_id)
    trainings: tuple[TrialFact, ...] = ()
    if finals_row is not None:
        found = study.storage.get_all_trials(finals_row.study_id, deepcopy=False)
        trainings = _trials(open_study(finals_row.name, study.storage), found, private=private)
    over = state.status not in ("open", "stopped") and (finals_row is None or finals_row.over)
    row = study.leases.study(study.study_id)
    best = study.best_first()
    records = [record for record in map(TrialRecord.of, stored) if record is not None]
    return Facts(
        study=study.name,
        over=over,
        state="in its finals" if state.status not in ("open", "stopped") else state.status,
        ended_by=ended_by(state, out_of_time=row is not None and row.out_of_time) if over else None,
        asked=_asked(plan, state, row, study.limits),
        trials=trials,
        best=best[0].number if best else None,
        finals=tuple(_finals(finalists_of(study), plan, over=over)),
        resolution=plan.resolution,
        importances=_importances(study),
        model=model,
        cost=_cost(trials, trainings),
        repeat=_repeat(study, records, best, model, finals=bool(trainings)),
        private=private,
    )


# --------------------------------------------------------------------------------------------------------- the model


def _promoted(registry: Registry, study: OpenStudy, state: Snapshot) -> ModelVersion | None:
    """The version that the study was promoted to; None where there is none, or it was deleted."""
    if state.promoted_version is None:
        return None
    try:
        found = registry.get(study.name, state.promoted_version)
    except MissingModel:
        return None
    return found if found.study_id == study.study_id else None


def _model(version: ModelVersion, store: ArtifactStore, registry: Registry, *, private: bool) -> ModelFact | None:
    """What is known of a version; None, with a warning, where its config.json cannot be read."""
    try:
        key = version.artifacts[FILE]
        config = from_json(store.get(key), key)
        scores = version_scores(version, store, registry, with_names=private)
    except (KeyError, ArtifactError, BundleError) as error:
        log.warning("%s version %d is left out of the report: %s", version.name, version.version, error)
        return None
    return ModelFact(
        version.name,
        version.version,
        version.trial_number or 0,
        version.scores.get("value", 0.0),
        config,
        scores,
        _diagnosis(registry.diagnosis(version)),
        version.scores.get("test_looks"),
    )


def _diagnosis(content: Mapping[str, Any] | None) -> Diagnosis | None:
    """None where an earlier version stored none, or a later one another form."""
    try:
        return None if content is None else Diagnosis.from_json(content)
    except (KeyError, TypeError):
        return None


# --------------------------------------------------------------------------------------------------------- the study


def _asked(plan: Plan, state: Snapshot, row: StudyRow | None, limits: Limits) -> Asked:
    study, data = plan.config.study, plan.config.data
    return Asked(
        metric=plan.metric,
        maximize=direction(plan.metric) == "maximize",
        budget=state.budget,
        timeout_s=study.timeout_s,
        patience=state.patience,
        sampler=study.sampler,
        pruner=study.pruner,
        finalists=0 if row is None else row.finalists,
        repeats=study.repeats if row is None else row.repeats,
        data=Path(data.train).name,
        test=_test_part(plan),
        validation=_validation(plan),
        classes=plan.classes,
        features=plan.features,
        sequences=plan.sequences,
        steps=plan.steps,
        members=plan.members,
        columns={role: name for role, name in data.columns.items() if name != role or role in ("time", "weight")},
        limits=limits.given,
    )


def _test_part(plan: Plan) -> str | None:
    data = plan.config.data
    if plan.test is None:
        return None
    if data.test is not None:
        return f"the file {Path(data.test).name}, looked at once, after everything was chosen"
    which = "the latest" if data.time is not None else "drawn at random,"
    return f"{which} {100 * (data.holdout or 0):.0f} % of the sequences, looked at once, after everything was chosen"


def _validation(plan: Plan) -> str:
    validation, ordered = plan.config.data.validation, plan.config.data.time is not None
    if isinstance(validation, Folds):
        if ordered:
            return f"{validation.folds} rolling folds: each block is predicted by a network trained on what was before"
        return f"{validation.folds} folds: every sequence is predicted by a network that has not trained on it"
    return f"{'the latest' if ordered else 'a drawn'} {100 * (validation or 0):.0f} % of the training part"


def _trials(study: OpenStudy, stored: Sequence[FrozenTrial], *, private: bool) -> tuple[TrialFact, ...]:
    """The study's own trials by number, neither copied ones nor another program's."""
    own = [trial for trial in stored if COPIED_FROM not in trial.user_attrs and _ours(trial)]
    rows = trial_rows(study.storage, study.study_id, own)
    found = [_trial(row, trial, private=private) for row, trial in zip(rows, own, strict=True)]
    return tuple(sorted(found, key=lambda each: each.number))


def _ours(trial: FrozenTrial) -> bool:
    return trained_by_us(trial) or trial.state not in (TrialState.COMPLETE, TrialState.PRUNED)


def _trial(row: Mapping[str, Any], trial: FrozenTrial, *, private: bool) -> TrialFact:
    curve = trial.user_attrs.get("curve")
    if not isinstance(curve, Mapping):
        curve = {"value": [value for _, value in sorted(trial.intermediate_values.items())]}
    begin, end = (None if row[name] is None else datetime.fromisoformat(row[name]) for name in ("started", "ended"))
    return TrialFact(
        number=row["number"],
        state="failed" if row["state"] == "fail" else row["state"],
        value=row["value"],
        params=row["params"],
        training_s=row["training_seconds"],
        span=None if begin is None or end is None else (begin, end),
        worker=row["worker"] if private else None if row["worker"] is None else _unnamed(row["worker"]),
        device=row["device"],
        failure=row["failure"] if private else None if row["failure"] is None else _kind(row["failure"]),
        dropped=row["dropped"] is not None,
        curve=curve,
        **{name: row[name] for name in ("latency_ms", "size_mb", "feasible")},
    )


def _unnamed(worker: str) -> str:
    """A worker without the name of its host."""
    return f"worker {worker.rpartition('-')[2]}"


def _kind(failure: str) -> str:
    """What kind of failure it was, without its words."""
    return f"{failure.split(':')[0]} (the study's own report says more)" if ":" in failure else failure


def _finals(finalists: Sequence[Finalist], plan: Plan, *, over: bool) -> list[FinalistFact]:
    """The configurations that were trained again, the best mean first; a winner only once that is over."""
    equal = {each.record.number for each in contenders(finalists, plan)}
    won = winner_of(finalists, plan) if over else None
    found = [
        FinalistFact(
            trial=each.record.number,
            selected=each.record.value,
            values=tuple(record.value for record in each.repeats.values()),
            weights=max(record.parameters for record in each.repeats.values()),
            equal=each.record.number in equal,
            winner=won is not None and each.record.number == won.record.number,
            curves=tuple(record.curve for record in each.repeats.values()),
        )
        for each in finalists
        if each.repeats
    ]
    return best_first(found, maximize=direction(plan.metric) == "maximize")


class _Judged(CountedTrials):
    """These trials alone, whatever a study has."""

    def __init__(self, study: OpenStudy, trials: list[FrozenTrial]) -> None:
        super().__init__(study.storage)
        self._judged = trials

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        return [trial for trial in self._judged if states is None or trial.state in states]


def _importances(study: OpenStudy) -> Importances | None:
    """By PED-ANOVA over the complete and pruned trials that count; None for too few, or equal values.

    It tells the distribution of a parameter among the good trials from that among all. Pruned ones have no value to
    compare, but others were better when they were stopped: they are none of the good. These are the best tenth, but
    five at least, as Optuna's documentation asks.
    """
    trials = study.optuna_study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    complete = [
        trial for trial in trials if trial.state == TrialState.COMPLETE and trial.values and isfinite(trial.values[0])
    ]
    values = [trial.values[0] for trial in complete]
    if len(complete) < GOOD_LEAST or len(trials) < LEAST_TRIALS or len(set(values)) == 1:
        return None
    import optuna
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances  # may import scikit-learn: 2 s

    worse = min(values) - 1 if direction(study.plan.metric) == "maximize" else max(values) + 1
    pruned = [_with_value(trial, worse) for trial in trials if trial.state == TrialState.PRUNED]
    judged = [*complete, *pruned]
    quantile = min(max(GOOD_SHARE, GOOD_LEAST / len(judged)), len(complete) / len(judged))
    if quantile == 1.0:
        return None
    evaluator = PedAnovaImportanceEvaluator(target_quantile=quantile)
    view = optuna.load_study(study_name=study.name, storage=_Judged(study, judged))
    shares = get_param_importances(view, evaluator=evaluator)
    if not sum(shares.values()) > 0:
        return None
    slices = [
        Slice(
            name=name,
            importance=share,
            log=any(getattr(trial.distributions.get(name), "log", False) for trial in complete),
            points=tuple(
                (trial.params[name], trial.values[0], trial.number) for trial in complete if name in trial.params
            ),
            pruned=tuple(trial.params[name] for trial in pruned if name in trial.params),
        )
        for name, share in list(shares.items())[:SLICES]
        if share >= SLICE_LEAST
    ]
    return Importances(tuple(shares.items()), tuple(slices), len(judged), quantile)


def _with_value(trial: FrozenTrial, value: float) -> FrozenTrial:
    """The trial as a complete one with that value."""
    found = copy.copy(trial)
    found.state, found.values = TrialState.COMPLETE, [value]
    return found


def _cost(trials: tuple[TrialFact, ...], trainings: tuple[TrialFact, ...]) -> Cost:
    ends = [trial.span for trial in (*trials, *trainings) if trial.span is not None]
    began, ended = min((begin for begin, _ in ends), default=None), max((end for _, end in ends), default=None)
    wall_s = None if began is None or ended is None else (ended - began).total_seconds()
    return Cost(wall_s, began, ended, trials, trainings)


# -------------------------------------------------------------------------------------------------------- repeat it


def _repeat(
    study: OpenStudy,
    records: Sequence[TrialRecord],
    best: Sequence[TrialRecord],
    model: ModelFact | None,
    *,
    finals: bool,
) -> Repeat:
    plan, name = study.plan, shlex.quote(study.name)
    number = model.trial if model is not None else best[0].number if best else None
    chosen = next((record for record in records if record.number == number), best[0] if best else None)
    commands = ["hpo launch study.toml   # the study file below, beside its data"]
    if chosen is not None:
        commands.append(f"hpo reproduce {name} --trial {chosen.number}   # trains the winner again, bit for bit")
    if finals:
        commands.append(f"hpo reproduce {shlex.quote(study.name + '/finals')} --trial 0   # a training of its finals")
    commands.append(f"hpo report {name}   # this report, as of then")
    parts = {"training": plan.train, "test": plan.test}
    return Repeat(
        versions={} if chosen is None else dict(chosen.provenance),
        devices=tuple(sorted({record.device for record in records})),
        kernels=tuple(sorted({record.lstm_kernel for record in records})),
        seed=plan.config.study.seed,
        checksums={part: content_hash(key) or key for part, key in parts.items() if key is not None},
        commands=tuple(commands),
        study_file=study_file(plan.config),
    )


def study_file(config: StudyConfig) -> str:
    """A study file in TOML with every default written out; of data files their names."""
    tables = without_paths(to_dict(config))
    text = []
    for name, table in tables.items():
        for each in table if name == "enqueue" else [table]:
            text.append(f"[[{name}]]" if name == "enqueue" else f"[{name}]")
            text += [f"{key} = {written(value)}" for key, value in each.items()] + [""]
    return "\n".join(text).rstrip() + "\n"


def without_paths(tables: dict[str, Any]) -> dict[str, Any]:
    """A study's tables for those to whom a model is given: the names of its files, not where they lie."""
    data = {key: Path(value).name if key in ("train", "test") else value for key, value in tables["data"].items()}
    return {**tables, "data": data}
