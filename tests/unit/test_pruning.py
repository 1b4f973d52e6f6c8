"""Our pruners decide as Optuna's."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.trial import TrialState, create_trial

from hpo.study.config import StudySection, TrainSection
from hpo.study.pruning import MedianPruner, make_pruner, may_prune

FLOATS = st.floats(-10, 10) | st.just(float("nan"))
CURVES = st.lists(st.dictionaries(st.integers(0, 3), FLOATS), min_size=0, max_size=9)


@settings(deadline=None)
@given(CURVES, st.dictionaries(st.integers(0, 3), FLOATS), st.sampled_from(["minimize", "maximize"]))
def test_every_decision_is_that_of_optunas_median_pruner(
    curves: list[dict[int, float]], own: dict[int, float], direction: str
) -> None:
    for startup, warmup, interval in ((0, 0, 1), (3, 1, 2)):
        ours = MedianPruner(startup, warmup, interval)
        theirs = optuna.pruners.MedianPruner(startup, warmup, interval)
        study = optuna.create_study(direction="maximize" if direction == "maximize" else "minimize")
        trial = create_trial(state=TrialState.RUNNING, intermediate_values=own)
        for curve in [None, *curves]:
            if curve is not None:
                study.add_trial(create_trial(value=0.0, intermediate_values=curve))
            expected = theirs.prune(study, trial) if not _only_nan(study, own) else None
            assert expected is None or ours.prune(study, trial) == expected


def _only_nan(study: optuna.Study, own: dict[int, float]) -> bool:
    """Where numpy warns of a part without numbers, which is an error in our tests."""
    if not own:
        return False
    step = max(own)
    at_step = [t.intermediate_values[step] for t in study.trials if step in t.intermediate_values]
    return all(v != v for v in own.values()) or (bool(at_step) and all(v != v for v in at_step))


def test_a_trial_without_one_number_is_pruned_and_infinities_are_ranked() -> None:
    study = optuna.create_study()
    for value in (1.0, 2.0, float("inf")):
        study.add_trial(create_trial(value=0.0, intermediate_values={0: value}))
    decisions = {
        value: MedianPruner(0).prune(study, create_trial(state=TrialState.RUNNING, intermediate_values={0: value}))
        for value in (1.5, 2.0, 2.5, float("inf"), float("-inf"), float("nan"))
    }
    assert list(decisions.values()) == [False, False, True, True, False, True]


@pytest.mark.parametrize("pruner", ["hyperband", "halving", "median", "none"])
@pytest.mark.parametrize("epochs", [1, 4, 30, 100])
def test_after_an_epoch_that_cannot_end_a_trial_every_pruner_lets_it_go_on(pruner: str, epochs: int) -> None:
    """Trials that are asked after each epoch, as Optuna's are, and trials that are asked where it may matter."""
    always, sparing = (_decisions(pruner, epochs, sparing=sparing) for sparing in (False, True))
    assert always == sparing
    if pruner != "none" and epochs > 4:
        assert any(any(asked) for asked in always)


def _decisions(pruner: str, epochs: int, *, sparing: bool) -> list[list[bool]]:
    """Of each of 40 trials, by epoch."""
    study_section = replace(StudySection(name="study"), pruner=pruner)
    plan = SimpleNamespace(config=SimpleNamespace(study=study_section, train=replace(TrainSection(), epochs=epochs)))
    random, found = np.random.default_rng(0), []
    study = optuna.create_study(direction="maximize", pruner=make_pruner(plan))  # type: ignore[arg-type]
    for _ in range(40):
        trial, asked = study.ask(), []
        for epoch, value in enumerate(random.normal(random.normal(), 0.5, epochs), 1):
            trial.report(value, epoch)
            looks = not sparing or may_prune(plan, study, trial.number, epoch)  # type: ignore[arg-type]
            asked.append(looks and trial.should_prune())
        study.tell(
            trial, state=TrialState.PRUNED if any(asked) else TrialState.COMPLETE, values=None if any(asked) else value
        )
        found.append(asked)
    return found
