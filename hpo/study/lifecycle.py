"""A study: created or opened, its plan, its sampler and pruner, and the drawing of a trial's parameters."""

from __future__ import annotations

import json
import math
import tempfile
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpo.models.data import (
    Sequences,
    Split,
    check_trainable,
    fingerprint,
    holdout,
    read,
    save,
    split_folds,
    split_share,
)
from hpo.models.metrics import direction
from hpo.models.seeds import derive
from hpo.storage.artifacts import ArtifactStore
from hpo.storage.leases import Lease, Leases
from hpo.storage.locks import exclusively
from hpo.storage.terms import Terms
from hpo.storage.trials import TrialStorage
from hpo.study.config import Folds, StudyConfig, complete, differences, from_dict, to_dict
from hpo.study.notes import describe_study
from hpo.study.space import NEUTRAL, Entry, Value, cardinality, distribution, distributions, values, walk

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution

    Drawn = dict[str, tuple[Value, BaseDistribution]]  # a value by name, and what it was drawn from

ASKS = 10  # times that a sampler is asked again for a configuration that the study has already had
RANDOM_ASKS = 100  # random draws after that
BEGUN = "hpo:begun"  # a study's system attribute: `hpo launch` has begun to fill it
GRID_MOST = 100_000  # points that sampler "grid" can hold in memory


class StudyError(ValueError):
    """The study does not exist, or the study file contradicts it."""


@dataclass(frozen=True)
class Plan:
    """All that a worker must know of a study. Kept as JSON in the database, written once."""

    config: StudyConfig  # with metric, validation and every entry of the search space filled in from the data
    written: StudyConfig  # as in the file: what a later file is compared with
    train: str  # artifact key of the training part
    test: str | None  # artifact key of the test part
    classes: tuple[str, ...]
    features: tuple[str, ...]
    steps: int  # T of the training part
    sequences: int  # N of the training part

    @property
    def metric(self) -> str:
        assert self.config.study.metric is not None
        return self.config.study.metric

    @property
    def members(self) -> int:
        """Models that a trial trains: one a fold."""
        validation = self.config.data.validation
        return validation.folds if isinstance(validation, Folds) else 1

    def to_json(self) -> dict[str, Any]:
        return vars(self) | {"config": to_dict(self.config), "written": to_dict(self.written)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Plan:
        lists = {name: tuple(content[name]) for name in ("classes", "features")}
        configs = {name: from_dict(content[name]) for name in ("config", "written")}
        return cls(**{**content, **lists, **configs})


@dataclass(frozen=True)
class OpenStudy:
    """A study with the handles to work on it."""

    study: optuna.Study
    plan: Plan
    storage: TrialStorage
    leases: Leases
    signatures: dict[int, str] = field(default_factory=dict)  # of the configurations seen so far, by trial number

    @property
    def study_id(self) -> int:
        return self.study._study_id

    @property
    def name(self) -> str:
        return self.study.study_name


# ------------------------------------------------------------------------------------------------ create or open


def create_or_open(config: StudyConfig, storage: TrialStorage, store: ArtifactStore) -> OpenStudy:
    """The study of this file: a new one, or the one of that name if nothing contradicts it.

    Raises StudyError with the differences, and DataError for data that cannot be trained on.
    """
    plan, train, test = _plan(config)
    leases = Leases(storage)
    _check_warm_start(storage, config)
    with exclusively(
        storage.url, f"study {config.study.name}"
    ):  # launches of one file at once: the first one's is the study
        study_id = _find_or_create(storage, plan)
        stored = leases.study(study_id)
        if stored is not None:
            _check_same(Plan.from_json(stored.config), plan)
        for key, part in ((plan.train, train), (plan.test, test)):
            _publish(store, key, part)  # also where somebody emptied the artifact store
        if stored is None:
            _begin(storage, leases, study_id, plan)
    leases.reopen(study_id, trials=config.study.trials, timeout_s=config.study.timeout_s)
    return open_study(config.study.name, storage)


def _find_or_create(storage: TrialStorage, plan: Plan) -> int:
    """The id of the study of that name, made if there is none."""
    import optuna
    from optuna.exceptions import DuplicatedStudyError

    name = plan.config.study.name
    with suppress(DuplicatedStudyError):
        optuna.create_study(study_name=name, storage=storage, direction=direction(plan.metric))
    return storage.get_study_id_from_name(name)


def _begin(storage: TrialStorage, leases: Leases, study_id: int, plan: Plan) -> None:
    """Queue the first trials, then store the plan, which opens the study to workers.

    A launch that died in between left BEGUN on the study: what it had queued is not queued again.
    """
    if _trials(storage, study_id) and BEGUN not in storage.get_study_system_attrs(study_id):
        raise StudyError(
            f"the database already has a study named {plan.config.study.name!r} that was not made by `hpo launch`; "
            "choose another [study] name"
        )
    storage.set_study_system_attr(study_id, BEGUN, True)
    describe_study(storage, study_id, plan.metric, _note(plan))
    _enqueue(storage, study_id, plan)
    leases.open_study(study_id, _terms(plan.config), plan.to_json())


def open_study(name: str, storage: TrialStorage) -> OpenStudy:
    """The study of that name. Raises StudyError when there is none that `hpo launch` made."""
    import optuna

    leases = Leases(storage)
    row = leases.study(study_id_of(storage, name))
    if row is None:
        raise StudyError(f"study {name!r} was not made by `hpo launch`, so it has no plan to work from")
    try:
        plan = Plan.from_json(row.config)
    except (TypeError, KeyError, ValueError) as error:
        raise StudyError(f"study {name!r} was made by another version of hpo: use that one; {error}") from error
    study = optuna.load_study(
        study_name=name, storage=storage, sampler=optuna.samplers.RandomSampler(), pruner=make_pruner(plan)
    )
    return OpenStudy(study, plan, storage, leases)


def study_id_of(storage: TrialStorage, name: str) -> int:
    """Raises StudyError, naming those that there are, when there is no study of that name."""
    try:
        return storage.get_study_id_from_name(name)
    except KeyError:
        known = ", ".join(sorted(study.study_name for study in storage.get_all_studies())) or "none yet"
        raise StudyError(f"there is no study named {name!r}; known: {known}") from None


def delete_study(storage: TrialStorage, store: ArtifactStore, name: str) -> None:
    """Remove a study and its trials, checkpoints, weights, curves and logs. Data sets and promoted models stay."""
    study_id = study_id_of(storage, name)
    storage.delete_study(study_id)
    for kind in ("checkpoint", "weights", "curve", "log"):
        for key in store.keys(f"{kind}-{study_id}-"):
            store.delete(key)


def _plan(config: StudyConfig) -> tuple[Plan, Sequences, Sequences | None]:
    """What the file says about the data that it names."""
    data = config.data
    names: dict[str, Any] = {"label": data.label, "id": data.id, "step": data.step, "group": data.group}
    train = read(Path(data.train), labeled=True, **names)
    check_trainable(train)
    test = None
    if data.test is not None:
        test = read(Path(data.test), labeled=True, classes=train.classes, features=train.features, **names)
    elif data.holdout is not None:
        train, test = holdout(train, data.holdout, derive(config.study.seed, "holdout") % 2**32)
    completed = complete(
        config,
        n=train.n,
        steps=train.steps,
        features=train.n_features,
        classes=len(train.classes),
        variable=bool(train.lengths.min() < train.lengths.max()),
    )
    if completed.study.sampler == "grid":
        grid(completed.space)
    folds(completed, train)
    plan = Plan(
        config=completed,
        written=config,
        train=data_key(train),
        test=None if test is None else data_key(test),
        classes=train.classes,
        features=train.features,
        steps=train.steps,
        sequences=train.n,
    )
    return plan, train, test


def folds(config: StudyConfig, sequences: Sequences) -> list[Split]:
    """The study's validation parts: a function of its seed, the same for every trial. Raises DataError."""
    seed = derive(config.study.seed, "validation") % 2**32
    validation = config.data.validation
    if isinstance(validation, Folds):
        return split_folds(sequences, validation.folds, seed)
    assert validation is not None
    return split_share(sequences, validation, seed)


def data_key(sequences: Sequences) -> str:
    return f"data-{fingerprint(sequences)}.safetensors"


def _publish(store: ArtifactStore, key: str | None, part: Sequences | None) -> None:
    if key is None or part is None or store.exists(key):
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data"
        save(part, path)
        store.put(key, path)


def _check_same(stored: Plan, plan: Plan) -> None:
    lines = differences(stored.written, plan.written)
    for name in ("train", "test"):
        if getattr(stored, name) != getattr(plan, name):
            lines.append(f"data.{name}: the content of the file differs from the one that the study began with")
    if lines:
        raise StudyError(
            f"the study file contradicts the study {stored.config.study.name!r} in the database:\n  "
            + "\n  ".join(lines)
            + "\nchange it back, choose another [study] name, or `hpo delete` the study"
        )


def _terms(config: StudyConfig) -> Terms:
    study = config.study
    return Terms(study.trials, study.timeout_s, study.lease_s, max_attempts=study.attempts)


def _enqueue(storage: TrialStorage, study_id: int, plan: Plan) -> None:
    """Copy the trials of `warm_start`, then queue the [[enqueue]] tables."""
    import optuna

    study = optuna.load_study(study_name=storage.get_study_name_from_id(study_id), storage=storage)
    if plan.config.study.warm_start is not None:
        had = {trial.user_attrs.get("copied_from") for trial in _trials(storage, study_id)}
        study.add_trials(trial for trial in _warm_trials(storage, plan) if trial.user_attrs["copied_from"] not in had)
    for table in plan.config.enqueue:
        drawn = {name: value for name, value in table.items() if distribution(plan.config.space[name])}
        study.enqueue_trial(drawn, skip_if_exists=True)


def _check_warm_start(storage: TrialStorage, config: StudyConfig) -> None:
    name = config.study.warm_start
    if name is not None and name not in (known := sorted(study.study_name for study in storage.get_all_studies())):
        raise StudyError(
            f"study.warm_start names the study {name!r}, which does not exist; known: {', '.join(known) or 'none yet'}"
        )


def _warm_trials(storage: TrialStorage, plan: Plan) -> list[optuna.trial.FrozenTrial]:
    """The other study's finished trials whose every parameter lies in this study's space."""
    from optuna.trial import TrialState

    name = plan.config.study.warm_start
    assert name is not None
    other = storage.get_study_id_from_name(name)
    kept = []
    for trial in storage.get_all_trials(other, deepcopy=True, states=(TrialState.COMPLETE,)):
        spaces = {key: distribution(plan.config.space[key]) for key in trial.params if key in plan.config.space}
        fitting = {key: item for key, item in spaces.items() if item is not None}
        if fitting.keys() == trial.params.keys() and all(
            _contains(item, trial.params[key]) for key, item in fitting.items()
        ):
            trial.distributions = fitting
            trial.user_attrs = {"copied_from": f"{name}/{trial.number}"}
            trial.system_attrs = {}
            kept.append(trial)
    return kept


def _contains(item: BaseDistribution, value: Any) -> bool:
    try:
        return item._contains(item.to_internal_repr(value))
    except ValueError:  # not one of its choices, or not a number
        return False


def _trials(storage: TrialStorage, study_id: int) -> list[optuna.trial.FrozenTrial]:
    return storage.get_all_trials(study_id, deepcopy=False)


def _note(plan: Plan) -> str:
    """The dashboard's note: what is tuned, on what."""
    text = json.dumps(to_dict(plan.config), indent=1)
    return (
        f"**{plan.metric}** over {plan.sequences} sequences of at most {plan.steps} steps, "
        f"{len(plan.features)} features, {len(plan.classes)} classes\n\n```json\n{text}\n```"
    )


# --------------------------------------------------------------------------------------------- sampler and pruner


def make_sampler(plan: Plan, *seed_parts: int) -> optuna.samplers.BaseSampler:
    """The sampler for one draw, seeded by the study's seed and the parts: with one worker a study repeats itself."""
    import optuna

    study = plan.config.study
    seed = derive(study.seed, "sampler", *seed_parts) % 2**32
    name = study.sampler
    if name == "tpe":
        return optuna.samplers.TPESampler(seed=seed, multivariate=True)
    if name == "gp":
        return optuna.samplers.GPSampler(seed=seed)
    if name == "cmaes":
        return optuna.samplers.CmaEsSampler(seed=seed)
    if name == "qmc":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return optuna.samplers.QMCSampler(seed=study.seed)
    if name == "grid":
        return optuna.samplers.GridSampler(grid(plan.config.space), seed=study.seed)
    return optuna.samplers.RandomSampler(seed=seed)


def grid(space: Mapping[str, Entry]) -> dict[str, list[Any]]:
    """Every value of every entry. Raises StudyError for a continuous range, and for more than GRID_MOST points."""
    found: dict[str, list[Any]] = {}
    for name, entry in space.items():
        if distribution(entry) is None:
            continue
        every = values(entry)
        if every is None:
            raise StudyError(f'sampler "grid" needs finite entries, but space.{name} is continuous; list its values')
        found[name] = list(every)
    points = math.prod(map(len, found.values()))
    if points > GRID_MOST:
        raise StudyError(f'sampler "grid" takes at most {GRID_MOST} points, this space has {points}; fix some entries')
    return found


def make_pruner(plan: Plan) -> optuna.pruners.BasePruner:
    import optuna

    from hpo.study.pruning import MedianPruner

    epochs = plan.config.train.epochs
    name = plan.config.study.pruner
    least = max(1, min(epochs // 10, 5))  # epochs before a curve says anything
    if name == "hyperband":
        return optuna.pruners.HyperbandPruner(min_resource=least, max_resource=epochs, reduction_factor=3)
    if name == "halving":
        return optuna.pruners.SuccessiveHalvingPruner(min_resource=least, reduction_factor=3)
    if name == "median":
        return MedianPruner(n_warmup_steps=least)
    return optuna.pruners.NopPruner()


# ---------------------------------------------------------------------------------------------------------- asking


def ask(opened: OpenStudy, lease: Lease) -> dict[str, Value]:
    """Draw and record the parameters of a new trial, or read those of an adopted one.

    All are written in one statement, so that an adopted trial always has all of them or none. A configuration
    that the study has had is asked for again, then drawn at random. Returns every value of the space, constants
    included.
    """
    storage, space = opened.storage, opened.plan.config.space
    frozen = storage.get_trial(lease.trial_id)
    recorded = frozen.params
    if recorded:
        return walk(space, lambda name, _: recorded[name])
    fixed = frozen.system_attrs.get("fixed_params", {})
    if (drawn := _given(opened.plan, fixed)) is None:
        drawn = _new(opened, frozen, fixed)
    storage.set_trial_params(
        lease.trial_id, {name: (item.to_internal_repr(value), item) for name, (value, item) in drawn.items()}
    )
    return walk(space, lambda name, _: drawn[name][0])


def _given(plan: Plan, fixed: Mapping[str, Value]) -> Drawn | None:
    """The configuration of a queued trial; None where it leaves something to draw."""
    drawn: Drawn = {}

    def take(name: str, item: BaseDistribution) -> Value:
        drawn[name] = (fixed[name], item)
        return fixed[name]

    try:
        walk(plan.config.space, take)
    except KeyError:
        return None
    return drawn


def _new(opened: OpenStudy, frozen: optuna.trial.FrozenTrial, fixed: Mapping[str, Value]) -> Drawn:
    """A configuration that the study has not had, as far as that can be had."""
    opened.study._thread_local.cached_all_trials = None  # what samplers read; only Study.ask and tell empty it
    had = _configurations(opened)
    for attempt in range(ASKS + RANDOM_ASKS):
        drawn = _draw(opened, frozen, fixed, random=attempt >= ASKS, attempt=attempt)
        found = {name: value for name, (value, _) in drawn.items()}
        if fixed or _signature(found) not in had:
            break
    return drawn


def exhausted(opened: OpenStudy) -> bool:
    """Whether a finite space has no configuration left that the study has not had."""
    size = cardinality(opened.plan.config.space)
    opened.study._thread_local.cached_all_trials = None
    return size is not None and len(_configurations(opened)) >= size


def _draw(
    opened: OpenStudy,
    frozen: optuna.trial.FrozenTrial,
    fixed: Mapping[str, Value],
    *,
    random: bool,
    attempt: int,
) -> Drawn:
    """One proposal. The sampler sees all trials, not only those of its Hyperband bracket: a study of some
    dozens of trials is too small to be cut into four."""
    import optuna

    study, plan = opened.study, opened.plan
    if random:
        seed = derive(plan.config.study.seed, "random", frozen.number, attempt) % 2**32
        study.sampler = optuna.samplers.RandomSampler(seed=seed)
    else:
        study.sampler = make_sampler(plan, frozen.number, attempt)
    sampler = study.sampler
    sampler.before_trial(study, frozen)
    frozen = opened.storage.get_trial(frozen._trial_id)  # with what the sampler noted on it
    relative_space = _relative_space(plan, sampler) or sampler.infer_relative_search_space(study, frozen)
    relative = sampler.sample_relative(study, frozen, relative_space)
    drawn: Drawn = {}

    def draw(name: str, item: BaseDistribution) -> Value:
        value: Value
        if name in fixed:
            value = fixed[name]
        elif relative_space.get(name) == item and name in relative:
            value = relative[name]
        else:
            value = sampler.sample_independent(study, frozen, name, item)
        drawn[name] = (value, item)
        return value

    walk(plan.config.space, draw)
    return drawn


def _relative_space(plan: Plan, sampler: optuna.samplers.BaseSampler) -> dict[str, BaseDistribution] | None:
    """What TPE would infer from all trials, at a cost that grows with them: the parameters that are always active."""
    import optuna

    if not isinstance(sampler, optuna.samplers.TPESampler):
        return None
    found = distributions(plan.config.space)
    return {name: found[name] for name in sorted(found.keys() - NEUTRAL.keys())}


def ranked(opened: OpenStudy) -> list[optuna.trial.FrozenTrial]:
    """The completed trials that this study's workers trained, neither copied ones nor another program's; best first."""
    from optuna.trial import TrialState

    trials = opened.storage.get_all_trials(opened.study_id, deepcopy=False, states=(TrialState.COMPLETE,))
    own = {trial.number: trial for trial in trials if "seed" in trial.user_attrs}
    scores = {number: (trial.value or 0.0, trial.user_attrs.get("log_loss", math.inf)) for number, trial in own.items()}
    return [own[number] for number in rank(opened.plan, scores)]


def rank(plan: Plan, scores: Mapping[int, tuple[float, float]]) -> list[int]:
    """Trial numbers, best first, of value and log-loss by number.

    Values that no validation sequence tells apart from the top one are alike: among them the lower log-loss is better.
    The others follow by value, then log-loss. Equal trials stand in the order of their numbers.
    """
    sign = -1.0 if direction(plan.metric) == "maximize" else 1.0
    most = min((sign * value for value, _ in scores.values()), default=0.0) + _resolution(plan)

    def key(number: int) -> tuple[bool, float, float, int]:
        value, log_loss = scores[number]
        if sign * value <= most:
            return False, log_loss, sign * value, number
        return True, sign * value, log_loss, number

    return sorted(scores, key=key)


def _resolution(plan: Plan) -> float:
    """Half of one validation sequence's share: metrics closer than this are alike. Log-loss tells everything apart."""
    if plan.metric == "log_loss":
        return 0.0
    validation = plan.config.data.validation
    share = validation if isinstance(validation, float) else 1.0
    return 0.5 / (share * plan.sequences)


def _configurations(opened: OpenStudy) -> set[str]:
    """The signatures of all configurations that the study has had. A trial's parameters never change."""
    signatures = opened.signatures
    for trial in opened.study._get_trials(deepcopy=False, use_cache=True):
        if trial.params and trial.number not in signatures:
            signatures[trial.number] = _signature(trial.params)
    return set(signatures.values())


def _signature(params: Mapping[str, Any]) -> str:
    return json.dumps(params, sort_keys=True)
