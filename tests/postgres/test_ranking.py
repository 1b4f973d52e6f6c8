"""One best: the statement of the displays agrees with the rule of the promotion."""

from __future__ import annotations

import math
import random
from typing import Literal

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState

from hpo.storage.leases import Leases
from hpo.storage.snapshot import BestTrial
from hpo.storage.terms import Terms
from hpo.storage.trials import TrialStorage
from hpo.study.ranking import best, rank, scores_of
from hpo.study.record import COPIED_FROM
from tests.conftest import execute

VALUES = (0.9, 0.905, 0.95, 0.97, 0.975, 0.98, 0.5, float("inf"), float("-inf"))
ODD = (5e-324, 1e300, 10**400, 7, float("inf"), float("nan"), "unknown", True, None)
LOG_LOSSES: tuple[object, ...] = (0.1, 0.2, 0.3, 0.4, 0.5) * 3 + ODD
STATES = (TrialState.COMPLETE,) * 6 + (TrialState.PRUNED, TrialState.FAIL, TrialState.RUNNING)


def random_trial(chance: random.Random) -> FrozenTrial:
    """Trained here, copied or another program's; in any state, of any value and log-loss."""
    state = chance.choice(STATES)
    value = chance.choice(VALUES[: chance.choice((6, 6, 6, 9))])
    attributes: dict[str, object] = {COPIED_FROM: "other/1"} if chance.random() < 0.1 else {}
    if not attributes and chance.random() < 0.8:
        attributes["seed"] = 0
    if chance.random() < 0.9:
        attributes["log_loss"] = chance.choice(LOG_LOSSES)
    values = [value] if state == TrialState.COMPLETE else None
    return optuna.trial.create_trial(state=state, values=values, user_attrs=attributes)


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
def test_the_displays_best_trial_is_the_one_to_be_promoted(
    storage: TrialStorage, database_url: str, direction: Literal["maximize", "minimize"]
) -> None:
    leases, told = Leases(storage), 0
    for seed in range(40):
        chance = random.Random(seed)
        study = optuna.create_study(storage=storage, direction=direction)
        resolution = chance.choice((0.0, 0.01, 0.05))
        leases.open_study(study._study_id, Terms(budget=9, resolution=resolution), {})
        study.add_trials([random_trial(chance) for _ in range(chance.choice((0, 1, 5, 8, 30, 30)))])
        if chance.random() < 0.3:  # as a plain script may store it
            nan = f"""UPDATE trial_values v SET value = 'NaN', value_type = 'FINITE' FROM trials t
                WHERE t.trial_id = v.trial_id AND t.study_id = {study._study_id} AND t.number % 3 = 0"""
            execute(database_url, nan)
        reader = TrialStorage(database_url)
        scores = scores_of(reader.get_all_trials(study._study_id))
        reader.close()
        wanted = best(scores, resolution, maximize=direction == "maximize")
        shown = leases.snapshot(study._study_id).best
        assert repr(shown) == repr(wanted)  # NaN is not equal to itself
        if shown is not None:
            metric = "auroc" if direction == "maximize" else "log_loss"
            assert shown.number == rank(scores, metric, resolution)[0]
            told += shown.ahead is not None
    assert told >= 3


def test_a_log_loss_that_is_no_number_is_worse_than_any() -> None:
    for odd in (*ODD[-5:], 10**400):
        trial = optuna.trial.create_trial(value=0.9, user_attrs={"seed": 0, "log_loss": odd})
        assert scores_of([trial]) == {trial.number: (0.9, math.inf)}


def test_a_snapshot_says_why_a_lower_value_is_best(storage: TrialStorage) -> None:
    """An acceptance run: displays called trial 6 the best (0.9769), summary and model trial 0 (0.9747)."""
    study = optuna.create_study(storage=storage, direction="maximize")
    leases = Leases(storage)
    leases.open_study(study._study_id, Terms(budget=9, resolution=0.5 / 67), {})
    for value, log_loss in ((0.9747, 0.21), (0.9, 0.1), (0.9769, 0.25)):
        attributes = {"seed": 0, "log_loss": log_loss}
        study.add_trial(optuna.trial.create_trial(value=value, user_attrs=attributes))
    shown = leases.snapshot(study._study_id).best
    assert shown == BestTrial(0, 0.9747, (2, 0.9769))
    assert shown.why == "trial 0 0.9747, equal to trial 2's 0.9769 within half a validation sequence, lower log-loss"
