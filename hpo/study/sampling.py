"""The configurations of a study's trials: the sampler, what it has had, and the next one."""

from __future__ import annotations

import itertools
import json
import math
import warnings
from collections.abc import Mapping
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial

from hpo.models.fields import Value
from hpo.models.seeds import derive
from hpo.storage.leases import Leases
from hpo.storage.trials import TrialStorage
from hpo.study.counted import CountedTrials
from hpo.study.entries import Entry, distribution, values
from hpo.study.limits import NONE, Limits
from hpo.study.plan import Plan, StudyError
from hpo.study.portfolio import portfolio_of
from hpo.study.space import NEUTRAL, cardinality, distributions, walk
from hpo.study.view import VIEW

Drawn = dict[str, tuple[Value, BaseDistribution]]  # a value by name, and what it was drawn from

DRAWS = 10  # by the sampler, until a configuration is one that the study has not had
RANDOM_DRAWS = 100  # at random, after that
QMC_STRIDE = 2**20  # places in the sequence between two attempts to draw the same trial
GRID_MOST = 100_000  # points that sampler "grid" can hold in memory


class ConfigurationSampler:
    """Draws the configurations of one study's trials. For one thread at a time."""

    def __init__(
        self, plan: Plan, study: optuna.Study, counted: CountedTrials, storage: TrialStorage, limits: Limits = NONE
    ) -> None:
        """counted: what the study is a view of."""
        self._plan, self._study, self._storage, self._limits = plan, study, storage, limits
        self._counted = counted
        self._first = portfolio_of(plan)
        self._signatures: dict[int, str] = {}  # of configurations, by trial number

    def parameters(self, trial_id: int) -> dict[str, Value]:
        """Draw and record the parameters of a new trial, or read those of an adopted one.

        All are written in one statement, so that an adopted trial always has all of them or none. A configuration
        that the study has had, or whose weights are beyond its limit of size, is drawn again, then drawn at random.
        What somebody has queued is not. Returns every value of the space, constants
        included.
        """
        space = self._plan.config.space
        trial = self._storage.get_trial(trial_id)
        drawn_before = trial.params or trial.intermediate_values or VIEW in trial.system_attrs
        if drawn_before:  # a space that has one value alone leaves no parameters
            recorded = {**self._plan.fixed, **trial.params}
            return walk(space, lambda name, _: recorded[name])
        if self._plan.finals:
            fixed = self._plan.finals[trial.number].params
        else:
            fixed = trial.system_attrs.get("fixed_params", {})
        with self._counted.seen_by(self._study._study_id, trial) as view:
            drawn = self._next(trial, fixed)
            if view is not None and self._leaves_none(drawn):
                Leases(self._storage).exhaust(self._study._study_id, self._plan.revision)
        params = {name: (item.to_internal_repr(value), item) for name, (value, item) in drawn.items()}
        self._storage.set_trial_params(trial_id, params, {} if view is None else {VIEW: view.to_json()})
        return walk(space, lambda name, _: drawn[name][0])

    def _next(self, trial: FrozenTrial, fixed: Mapping[str, Value]) -> Drawn:
        """What is queued, the portfolio's where it is the trial's turn, or a new configuration."""
        first = self._first[trial.number] if not fixed and trial.number < len(self._first) else None
        if (drawn := self._whole(first or fixed)) is None:
            drawn = self._new(trial, first or fixed)
        if first and self._too_large(drawn):
            drawn = self._new(trial, {})
        return drawn

    def exhausted(self) -> bool:
        """Whether a finite space has no configuration left that the study has not had."""
        if self._plan.finals:
            return False
        size = cardinality(self._plan.config.space)
        return size is not None and len(self._had()) >= size

    def _leaves_none(self, drawn: Drawn) -> bool:
        """Whether a finite space has no configuration left once this one is the study's. Under `parallel` whoever draws
        a trial says so before the next one can start; otherwise it is noticed by who wants to start one."""
        size = cardinality(self._plan.config.space)
        return size is not None and len(self._had() | {_signature(_values(drawn))}) >= size

    def _whole(self, fixed: Mapping[str, Value]) -> Drawn | None:
        """The configuration of these values; None where they leave something to draw."""
        drawn: Drawn = {}
        given = {**self._plan.fixed, **fixed} if fixed else {}  # what was fixed when it was queued, too

        def take(name: str, item: BaseDistribution) -> Value:
            drawn[name] = (given[name], item)
            return given[name]

        try:
            walk(self._plan.config.space, take)
        except KeyError:
            return None
        return drawn

    def _new(self, trial: FrozenTrial, fixed: Mapping[str, Value]) -> Drawn:
        """A configuration that the study has not had, as far as one is found."""
        had = self._had()
        for attempt in range(DRAWS + RANDOM_DRAWS):
            drawn = self._draw(trial, fixed, attempt)
            if fixed or (_signature(_values(drawn)) not in had and not self._too_large(drawn)):
                return drawn
        return self._left(had) or drawn

    def _too_large(self, drawn: Drawn) -> bool:
        """Whether the weights of a configuration are beyond the limit of size."""
        if self._limits.size_mb is None:
            return False
        return self._limits.too_large(self._plan, walk(self._plan.config.space, lambda name, _: drawn[name][0]))

    def _left(self, had: set[str]) -> Drawn | None:
        """The first configuration of a space of few that the study has not had: one within the limit of size, if
        there is one."""
        large: Drawn | None = None
        space = self._plan.config.space
        try:
            points = grid(space)
        except StudyError:
            return None
        for point in itertools.product(*points.values()):
            drawn = self._whole(dict(zip(points, point, strict=True)))
            assert drawn is not None  # a point has a value for each name
            if _signature(_values(drawn)) not in had:
                if not self._too_large(drawn):
                    return drawn
                large = large or drawn
        return large

    def _draw(self, trial: FrozenTrial, fixed: Mapping[str, Value], attempt: int) -> Drawn:
        """One proposal. The sampler sees all trials, not only those of its Hyperband bracket: a study of some
        dozens of trials is too small to be cut into four."""
        sampler = self._study.sampler = self._sampler(trial.number, attempt)
        sampler.before_trial(self._study, trial)
        trial = self._storage.get_trial(trial._trial_id)  # with what the sampler noted on it
        relative_space = self._relative_space(sampler) or sampler.infer_relative_search_space(self._study, trial)
        relative = sampler.sample_relative(self._study, trial, relative_space)
        drawn: Drawn = {}

        def draw(name: str, item: BaseDistribution) -> Value:
            value: Value
            if name in fixed:
                value = fixed[name]
            elif relative_space.get(name) == item and name in relative:
                value = relative[name]
            else:
                value = sampler.sample_independent(self._study, trial, name, item)
            drawn[name] = (value, item)
            return value

        walk(self._plan.config.space, draw)
        return drawn

    def _sampler(self, number: int, attempt: int) -> optuna.samplers.BaseSampler:
        """The one for this draw: the study's, then a random one."""
        if attempt < DRAWS:
            return make_sampler(self._plan, number, attempt)
        seed = derive(self._plan.config.study.seed, "random", number, attempt) % 2**32
        return optuna.samplers.RandomSampler(seed=seed)

    def _relative_space(self, sampler: optuna.samplers.BaseSampler) -> dict[str, BaseDistribution] | None:
        """The parameters that are always active: what TPE would infer from all trials, at a cost that grows with
        them."""
        if not isinstance(sampler, optuna.samplers.TPESampler):
            return None
        found = distributions(self._plan.config.space)
        return {name: found[name] for name in sorted(found.keys() - NEUTRAL.keys())}

    def _had(self) -> set[str]:
        """The signatures of the configurations that the study has had, but for those of trials that were dropped: these
        may be drawn again. A trial's parameters never change."""
        self._study._thread_local.cached_all_trials = None  # what samplers read; only Study.ask and tell empty it
        drawn = [trial for trial in self._study._get_trials(deepcopy=False, use_cache=True) if trial.params]
        for trial in drawn:
            if trial.number not in self._signatures:
                self._signatures[trial.number] = _signature(trial.params)
        return {self._signatures[trial.number] for trial in drawn}


def make_sampler(plan: Plan, *seed_parts: int) -> optuna.samplers.BaseSampler:
    """The sampler for one draw, seeded by the study's seed and the parts: with one worker a study repeats itself."""
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
            return QmcSampler(seed, *seed_parts)
    if name == "grid":
        return optuna.samplers.GridSampler(grid(plan.config.space), seed=study.seed)
    return optuna.samplers.RandomSampler(seed=seed)


class QmcSampler(optuna.samplers.QMCSampler):
    """Optuna's own, but for a trial's place in the sequence: a function of its number and of the attempt to draw it.

    Optuna counts the draws in an attribute of the study, also those of a worker that died before it wrote them.
    """

    def __init__(self, seed: int, number: int = 0, attempt: int = 0) -> None:
        super().__init__(seed=seed, warn_independent_sampling=False)
        self._place = number + attempt * QMC_STRIDE

    def _find_sample_id(self, study: optuna.Study, search_space: dict[str, BaseDistribution]) -> int:
        return self._place


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


def _values(drawn: Drawn) -> dict[str, Value]:
    return {name: value for name, (value, _) in drawn.items()}


def _signature(params: Mapping[str, Any]) -> str:
    return json.dumps(params, sort_keys=True)
