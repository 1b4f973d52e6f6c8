"""A study from its creation to its deletion: created from a file or found, opened to work on, deleted."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.exceptions import DuplicatedStudyError
from optuna.trial import FrozenTrial, TrialState

from hpo.models.data.canonical import save
from hpo.models.data.sequences import Sequences
from hpo.models.metrics import direction
from hpo.storage.artifacts import ArtifactStore
from hpo.storage.changes import dropped, somebody, widen
from hpo.storage.errors import MissingRecord
from hpo.storage.keys import study_prefixes
from hpo.storage.leases import Leases
from hpo.storage.locks import exclusively
from hpo.storage.scratch import scratch_folder
from hpo.storage.snapshot import Snapshot
from hpo.storage.terms import Judgement, Notify, Patience, Standstill, StudyRow, Terms
from hpo.storage.trials import TrialStorage
from hpo.study.config import ConfigError, StudyConfig, TrackSection
from hpo.study.config import to_dict as config_dict
from hpo.study.counted import CountedTrials
from hpo.study.entries import Entry, contains, distribution, unparse
from hpo.study.limits import NONE, Limits, none_within
from hpo.study.notes import METRIC_NAMES, announce_widening, describe_study
from hpo.study.patience import JUDGED, judged, judged_in_order
from hpo.study.plan import MissingStudy, MissingTrial, Plan, StudyConflict, StudyError, make_plan, names_groups
from hpo.study.pruning import as_it_came, make_pruner, may_prune
from hpo.study.ranking import best_first
from hpo.study.readout import readout, suspicions
from hpo.study.record import COPIED_FROM, TrialRecord, trial_row
from hpo.study.sampling import ConfigurationSampler, grid
from hpo.study.space import DECIDED_BY, EARLIER, is_active
from hpo.study.widening import changes, continued, shown

log = logging.getLogger("hpo")

SEARCH_SHARE = 0.75  # of a study's time is for its search where finals follow
FINALS = "/finals"  # ends the name of a study's finals
TRACK = "hpo:track"  # a study's system attribute: where its trials are runs, too
BEGUN = "hpo:begun"  # a study's system attribute: `hpo launch` has begun to fill it


@dataclass(frozen=True)
class OpenStudy:
    """A study of the database, opened to work on it. For one thread at a time."""

    study_id: int
    name: str
    plan: Plan
    storage: TrialStorage
    sampler: ConfigurationSampler
    optuna_study: optuna.Study  # its trials are those that count
    counted: CountedTrials  # what the latter is a view of

    @property
    def leases(self) -> Leases:
        """Those of its trials."""
        return Leases(self.storage)

    @property
    def limits(self) -> Limits:
        """Those that it has now."""
        row = self.leases.study(self.study_id)
        return NONE if row is None else Limits.of(row)

    def best_first(self, limits: Limits | None = None) -> list[TrialRecord]:
        """The complete trials that may be promoted: within the study's limits, where these are not known already."""
        limits = limits or self.limits
        return [record for record in self.complete() if limits.admit(vars(record))]

    def complete(self) -> list[TrialRecord]:
        """The complete trials that our workers have trained, neither copied ones nor another program's, the best first;
        without those that were dropped."""
        trials = self.optuna_study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        return best_first(filter(None, map(TrialRecord.of, trials)), self.plan)

    def none_within(self) -> str | None:
        """Why it has no trial to promote, where that is its limits."""
        trials = self.optuna_study.get_trials(deepcopy=False, states=JUDGED)
        return none_within(self.limits, trials, self.name)

    def judge(self, patience: Patience) -> Judgement:
        """Whether the study has come to a standstill: by all of its trials that have ended, under `parallel` by those
        that the next one sees."""
        if (parallel := self.plan.config.study.parallel) is not None:
            trials = self.storage.drawn_trials(self.study_id)
            dropped = self.storage.dropped(self.study_id)
            return judged_in_order(trials, dropped, self.plan, patience, parallel, self.limits)
        trials = self.storage.get_all_trials(self.study_id, deepcopy=False, states=JUDGED)
        return judged(trials, self.storage.dropped(self.study_id), self.plan, patience, self.limits)

    def may_prune(self, number: int, epoch: int) -> bool:
        """Whether `should_prune` may say so of trial `number` after this epoch; it needs no look at the database."""
        return may_prune(self.plan, self.optuna_study, number, epoch)

    def should_prune(self, trial_id: int) -> bool:
        """Whether the trial's reports so far are worth no further epoch."""
        if self.plan.config.study.pruner == "none":
            return False  # and no look at the trial, for which its reports would have to be written first
        trial = as_it_came(self.plan, self.optuna_study, self.storage.get_trial(trial_id))
        if self.plan.config.study.parallel is None:
            return self.optuna_study.pruner.prune(self.optuna_study, trial)
        with self.counted.seen_by(self.study_id, trial):
            return self.optuna_study.pruner.prune(self.optuna_study, trial)


# ------------------------------------------------------------------------------------------------ create or open


def create_or_open(
    config: StudyConfig, storage: TrialStorage, store: ArtifactStore, owner: str | None = None
) -> OpenStudy:
    """The study of this file: a new one, or the one of that name if nothing contradicts it.

    An existing study goes on under the file's trials, timeout, patience, finals, limits, way of promotion, tracking,
    priority and max_workers, and in its space where that is a wider one; a new study belongs to `owner`.
    Raises StudyError with the differences, before anything is changed, and DataError for data that cannot be trained
    on.
    """
    plan, train, test = make_plan(config)
    if plan.config.study.sampler == "grid":
        grid(plan.config.space)
    leases = Leases(storage)
    name = config.study.name
    with exclusively(storage.url, f"study {name}"):  # who else launches it finds it, who deletes it waits
        stored = _stored(storage, leases, name)
        if stored is None:
            _check_warm_start(storage, config)
            study_id, wider = find_or_create(storage, plan, name), plan
            config = replace(config, study=replace(config.study, finalists=plan.config.study.finalists))
        else:
            study_id = stored.study_id
            if config.study.finalists is None:  # as it began
                config = replace(config, study=replace(config.study, finalists=stored.finalists))
            begun = _plan_of(stored, storage)
            if begun.rules != plan.rules:
                plan, train, test = make_plan(config, begun.rules)
            wider = continued(begun, plan)
            if wider.config.study.sampler == "grid":
                grid(wider.config.space)
        for key, part in ((plan.train, train), (plan.test, test)):
            _publish(store, key, part, plan.rules)  # also where the artifact store was emptied or damaged
        if stored is None:
            _begin(storage, leases, study_id, plan, owner)
        else:
            _widen(storage, study_id, begun, wider, config, owner or somebody())
            leases.set_notify(study_id, _notify(config))
            leases.want_finals(study_id, finalists=config.study.finalists or 0, repeats=config.study.repeats)
            if (begun.config.limits, begun.config.promote) != (config.limits, config.promote):
                written = config_dict(config)
                leases.set_promotion(study_id, written["limits"], written["promote"])
            leases.share(study_id, priority=config.study.priority, max_workers=config.study.max_workers)
        set_track(storage, study_id, config.track)
        for line in readout(plan, train, test):
            log.info("%s: %s", name, line)
        for line in suspicions(train, test):
            log.warning("%s: %s", name, line)
        given, timeout_s = config.study, search_time(config)
        row = leases.reopen(study_id, trials=given.trials, timeout_s=timeout_s, patience=given.patience)
        if row.finalists:
            text = "%s: then finals of the best %d, %d trainings each on fresh seeds and splits (study.finalists)"
            log.info(text, name, row.finalists, row.repeats)
        if row.standstill is not None and row.status != "open":
            log.warning("study %s: %s", name, over_by_patience(row.standstill))
        if row.budget > config.study.trials:
            text = "study %s: %d trials have begun, more than the %d that are asked for; no more are started"
            log.warning(text, name, row.started, config.study.trials)
        return open_study(name, storage)


def open_study(name: str, storage: TrialStorage) -> OpenStudy:
    """The study of that name. Raises StudyError when there is none that `hpo launch` made, or not as it made it."""
    study_id = study_id_of(storage, name)
    row = Leases(storage).study(study_id)
    if row is None:
        raise StudyError(f"study {name!r} was not made by `hpo launch`, so it has no plan to work from")
    plan, limits = _plan_of(row, storage), Limits.of(row)
    counted = CountedTrials(storage, plan, limits)
    study = optuna.load_study(
        study_name=name,
        storage=counted,
        sampler=optuna.samplers.RandomSampler(),
        pruner=make_pruner(plan, lambda: counted.basis(study_id)),
    )
    sampler = ConfigurationSampler(plan, study, counted, storage, limits)
    return OpenStudy(study_id, name, plan, storage, sampler, study, counted)


def over_by_patience(found: Standstill) -> str:
    """That a study has ended by its patience, and what lets it go on."""
    return f"over by its patience, as {found.said}; a larger study.patience, or 0 for none, lets it go on"


def _stored(storage: TrialStorage, leases: Leases, name: str) -> StudyRow | None:
    """The study of that name as `hpo launch` has stored it, if it has."""
    with suppress(MissingRecord):
        return leases.study(storage.get_study_id_from_name(name))
    return None


def _plan_of(row: StudyRow, storage: TrialStorage) -> Plan:
    """The stored plan. Raises StudyError for another version's, and where Optuna's tables contradict it."""
    try:
        plan = Plan.from_json(row.config)
    except (AttributeError, TypeError, KeyError, ValueError, ConfigError) as error:
        raise StudyError(f"study {row.name!r} was made by another version of hpo: use that one; {error}") from error
    _check_directions(storage, row.study_id, row.name, plan.metric)
    return plan


def _check_directions(storage: TrialStorage, study_id: int, name: str, metric: str) -> None:
    """Raise StudyError where the study does not have the metric as its only objective.

    Sampler, pruner and displays go by the directions in Optuna's tables, which others write too.
    """
    found: list[str] = []
    with suppress(MissingRecord):  # somebody removed them
        found = [each.name.lower() for each in storage.get_study_directions(study_id)]
    if found != [direction(metric)]:
        raise StudyError(
            f"study {name!r} in the database has the directions [{', '.join(found)}], but {metric} is one value to "
            f"{direction(metric)}; choose another [study] name, or `hpo delete {name}` and launch again"
        )


def study_id_of(storage: TrialStorage, name: str) -> int:
    """Raises StudyError, naming those that there are, when there is no study of that name."""
    try:
        return storage.get_study_id_from_name(name)
    except MissingRecord:
        known = ", ".join(sorted(study.study_name for study in storage.get_all_studies())) or "none yet"
        raise MissingStudy(f"there is no study named {name!r}; known: {known}") from None


def finals_name(study: str) -> str:
    """The name of a study's finals, which no study file can give."""
    return f"{study}{FINALS}"


def check_no_finals(name: str, action: str) -> None:
    """Raise StudyConflict for the name of finals: they are stopped and deleted with their study."""
    if name.endswith(FINALS):
        study = name.removesuffix(FINALS)
        raise StudyConflict(f"{name!r} are the finals of a study and not for themselves: `hpo {action} {study}`")


def trial_of(storage: TrialStorage, name: str, number: int) -> FrozenTrial:
    """A study's trial by its number. Raises MissingTrial, and StudyError when there is no such study."""
    found, total = storage.page(study_id_of(storage, name), number, 1)
    if not found:
        has = f"trials 0 to {total - 1}" if total else "no trials yet"
        raise MissingTrial(f"study {name!r} has {has}, not {number}")
    return found[0]


def trial_rows(storage: TrialStorage, study_id: int, trials: Sequence[FrozenTrial]) -> list[dict[str, Any]]:
    """What displays show of these trials of a study, a `study.record.trial_row` each."""
    gone = dropped(storage, study_id)
    leases = Leases(storage)
    holders, row = leases.holders([trial._trial_id for trial in trials]), leases.study(study_id)
    limits = NONE if row is None else Limits.of(row)
    return [{**trial_row(trial, gone, holders), **limits.of_trial(trial)} for trial in trials]


def all_trial_rows(storage: TrialStorage, name: str) -> list[dict[str, Any]]:
    """What displays show of a study's trials, by number. Raises StudyError when there is no such study."""
    study_id = study_id_of(storage, name)
    return trial_rows(storage, study_id, storage.get_all_trials(study_id, deepcopy=False))


def snapshots(storage: TrialStorage, leases: Leases, name: str | None) -> list[Snapshot]:
    """The study of that name, or all, as they are now. Raises StudyError."""
    if name is not None:
        try:
            return [leases.snapshot(study_id_of(storage, name))]
        except MissingRecord:
            raise MissingStudy(f"study {name!r} was not made by `hpo launch`; see it with `hpo dashboard`") from None
    return leases.snapshots(leases.study_ids())


def delete_study(storage: TrialStorage, store: ArtifactStore, name: str) -> None:
    """Remove a study and its trials, checkpoints, weights, curves and logs. Data sets and promoted models stay."""
    check_no_finals(name, "delete")
    with exclusively(storage.url, f"study {name}"):  # a submission of it ends before, or begins after
        study_id = study_id_of(storage, name)
        finals = Leases(storage).finals(study_id)
        for each in [study_id] if finals is None else [finals.study_id, study_id]:
            _delete(storage, store, each)


def _delete(storage: TrialStorage, store: ArtifactStore, study_id: int) -> None:
    row = Leases(storage).study(study_id)
    if row is not None:  # first, so that a deletion that was killed can be repeated
        _delete_files(store, row.store_key)
    storage.delete_study(study_id)
    if row is not None:  # what its workers have stored meanwhile
        _delete_files(store, row.store_key)


def _delete_files(store: ArtifactStore, store_key: str) -> None:
    for prefix in study_prefixes(store_key):
        for key in store.keys(prefix):
            store.delete(key)


def find_or_create(storage: TrialStorage, plan: Plan, name: str) -> int:
    """The id of the study of that name, made if there is none.

    Raises StudyError for another program's study, unless it is empty and has the same objective.
    """
    with suppress(DuplicatedStudyError):
        optuna.create_study(study_name=name, storage=storage, direction=direction(plan.metric))
    study_id = storage.get_study_id_from_name(name)
    _check_directions(storage, study_id, name, plan.metric)
    attributes = storage.get_study_system_attrs(study_id)
    if BEGUN in attributes:
        return study_id
    objective = attributes.get(METRIC_NAMES, [plan.metric])
    if objective != [plan.metric] or storage.get_all_trials(study_id, deepcopy=False):
        raise StudyConflict(
            f"the database already has a study named {name!r} that was not made by `hpo launch`, with trials or an "
            "objective of its own; choose another [study] name"
        )
    return study_id


def _begin(storage: TrialStorage, leases: Leases, study_id: int, plan: Plan, owner: str | None) -> None:
    """Queue the first trials, then store the plan, which opens the study to workers.

    A launch that died in between left BEGUN on the study: what it had queued is not queued again.
    """
    storage.set_study_system_attr(study_id, BEGUN, True)
    describe_study(storage, study_id, plan.metric, plan.note())
    _enqueue(storage, study_id, plan)
    study = plan.config.study
    terms = Terms(
        study.trials,
        search_time(plan.config),
        study.lease_s,
        max_attempts=study.attempts,
        resolution=plan.resolution,
        priority=study.priority,
        max_workers=study.max_workers,
        patience=study.patience,
        finalists=study.finalists or 0,
        repeats=study.repeats,
    )
    leases.open_study(study_id, terms, plan.to_json(), owner, _notify(plan.written))


def open_again(storage: TrialStorage, plan: Plan, terms: Terms, recorded: Sequence[FrozenTrial]) -> OpenStudy:
    """A study like a stored one, by its plan, in a database without it. recorded: its trials, of which copied ones are
    copied."""
    name = plan.config.study.name
    study_id = find_or_create(storage, plan, name)
    for trial in recorded:
        if COPIED_FROM in trial.user_attrs:
            storage.create_new_trial(study_id, trial)
    _queue(storage, study_id, plan)
    Leases(storage).open_study(study_id, terms, plan.to_json())
    return open_study(name, storage)


def _widen(storage: TrialStorage, study_id: int, begun: Plan, wider: Plan, config: StudyConfig, by: str) -> None:
    """Store the plan with the wider space, from which all later trials are drawn."""
    if wider is begun:
        return
    changed = changes(begun, wider)
    detail = {name: {"from": unparse(old), "to": unparse(new)} for name, (old, new) in changed.items()}
    name, terms = begun.config.study.name, config.study
    given: dict[str, Any] = {"trials": terms.trials, "timeout_s": search_time(config)}
    given |= {"patience": terms.patience, "revision": begun.revision}
    if not widen(storage, study_id, wider.to_json(), detail, by, **given):
        raise StudyConflict(f"the study {name!r} was changed by somebody else at this moment: launch it again")
    announce_widening(storage, study_id, shown(changed))
    log.info("study %s: wider for all trials that begin from now on: %s", name, shown(changed))


def search_time(config: StudyConfig) -> float | None:
    """Seconds that a study's search may take of what a file gives it, as finals follow or not; None: no end."""
    timeout_s = config.study.timeout_s
    return timeout_s if timeout_s is None or not config.study.finalists else SEARCH_SHARE * timeout_s


def _notify(config: StudyConfig) -> Notify:
    return Notify(config.notify.url, config.notify.on)


def set_track(storage: TrialStorage, study_id: int, track: TrackSection) -> None:
    """Where the study's trials are runs, too, from now on."""
    if track != track_of(storage, study_id):
        storage.set_study_system_attr(study_id, TRACK, vars(track))


def track_of(storage: TrialStorage, study_id: int) -> TrackSection:
    """Where the study's trials are runs, too. Raises MissingRecord for a study that was deleted."""
    return TrackSection(**storage.get_study_system_attrs(study_id).get(TRACK, {}))


def _publish(store: ArtifactStore, key: str | None, part: Sequences | None, rules: int) -> None:
    """Store a part of the data, unless it is there, undamaged."""
    if key is None or part is None or store.holds(key):
        return
    with scratch_folder() as folder:
        save(part, folder / "data", group_names=names_groups(rules))
        store.put(key, folder / "data")


# ------------------------------------------------------------------------------------------ trials to begin with


def _enqueue(storage: TrialStorage, study_id: int, plan: Plan) -> None:
    """Copy the trials of `warm_start`, then queue the [[enqueue]] tables."""
    study = optuna.load_study(study_name=storage.get_study_name_from_id(study_id), storage=storage)
    if plan.config.study.warm_start is not None:
        had = {trial.user_attrs.get(COPIED_FROM) for trial in storage.get_all_trials(study_id, deepcopy=False)}
        study.add_trials(trial for trial in _warm_trials(storage, plan) if trial.user_attrs[COPIED_FROM] not in had)
    _queue(storage, study_id, plan)


def _queue(storage: TrialStorage, study_id: int, plan: Plan) -> None:
    """Queue the [[enqueue]] tables."""
    study = optuna.load_study(study_name=storage.get_study_name_from_id(study_id), storage=storage)
    for table in plan.config.enqueue:
        drawn = {name: value for name, value in table.items() if distribution(plan.config.space[name])}
        study.enqueue_trial(drawn, skip_if_exists=True)


def _check_warm_start(storage: TrialStorage, config: StudyConfig) -> None:
    name = config.study.warm_start
    if name is not None and name not in (known := sorted(study.study_name for study in storage.get_all_studies())):
        raise StudyError(
            f"study.warm_start names the study {name!r}, which does not exist; known: {', '.join(known) or 'none yet'}"
        )


def _warm_trials(storage: TrialStorage, plan: Plan) -> list[FrozenTrial]:
    """The other study's complete trials that lie in this study's space, but for dropped ones."""
    name = plan.config.study.warm_start
    assert name is not None
    other = storage.get_study_id_from_name(name)
    kept = []
    for trial in CountedTrials(storage).get_all_trials(other, deepcopy=True, states=(TrialState.COMPLETE,)):
        params = _as_drawn(trial, plan.config.space)
        if params is not None:
            trial.params = {key: value for key, (value, _) in params.items()}
            trial.distributions = {key: item for key, (_, item) in params.items()}
            trial.user_attrs = {COPIED_FROM: f"{name}/{trial.number}"}
            trial.system_attrs = {}
            kept.append(trial)
    return kept


def _as_drawn(trial: FrozenTrial, space: Mapping[str, Entry]) -> dict[str, tuple[Any, BaseDistribution]] | None:
    """What this space would have drawn of another study's trial, also what was fixed there; None where what it drew, or
    what is drawn here, lies outside. What both have fixed may differ."""
    recorded = trial.user_attrs.get("params")
    fixed = {**EARLIER, **recorded} if isinstance(recorded, dict) else {}
    values = {**fixed, **trial.params}
    found: dict[str, tuple[Any, BaseDistribution]] = {}
    for key, value in values.items():
        if key not in space:
            if key in trial.params:
                return None
            continue
        if all(other in values for other in DECIDED_BY.get(key, ())) and not is_active(key, values):
            continue
        item = distribution(space[key])
        if item is not None:
            if not _contains(item, value):
                return None
            found[key] = value, item
        elif key in trial.params and not contains(space[key], value):
            return None
    return found


def _contains(item: BaseDistribution, value: Any) -> bool:
    try:
        return item._contains(item.to_internal_repr(value))
    except ValueError:  # not one of its choices, or not a number
        return False
