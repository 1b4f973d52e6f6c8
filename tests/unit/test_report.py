"""The report: what it says, that whatever people named shows and does nothing, and that it needs nothing else."""

from __future__ import annotations

import json
import math
import re
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score

from hpo.models.bundle.config import Component, Footprint
from hpo.models.charts import Axis, round_ticks
from hpo.models.costs import Costs
from hpo.models.data.sequences import from_arrays
from hpo.models.diagnosis import CLASSES, FEATURES, HARDEST, POINTS, STEPS, Diagnosis, class_curves, diagnose
from hpo.promote.report import study_file
from hpo.report.figures import front_of
from hpo.report.rendering import answer, finals_say, render, spent
from hpo.study.config import Folds, config_of, load, to_dict
from tests.reports import (
    NASTY,
    asked,
    check_report,
    estimate,
    facts,
    finalist,
    importances,
    model_fact,
    trial,
)

EXAMPLES = Path(__file__).parents[2] / "examples"


def many(n: int = 60) -> tuple:  # type: ignore[type-arg]
    states = ("complete", "complete", "pruned", "complete", "failed")
    return tuple(
        trial(i, states[i % 5], None if i % 5 == 4 else 0.5 + 0.3 * math.sin(i), failure=f"{NASTY} {i % 2}")
        if i % 5 == 4
        else trial(i, states[i % 5], 0.5 + 0.3 * math.sin(i))
        for i in range(n)
    )


# ------------------------------------------------------------------------------------------------------- what it says


def test_everything_at_once() -> None:
    trials = many()
    finals = (
        finalist(6, (0.8, 0.84, 0.82), 300, equal=True),
        finalist(0, (0.79, 0.83, 0.82), 100, equal=True, winner=True),
        finalist(8, (0.6, 0.62, 0.61), 50),
    )
    text = render(
        facts(
            trials,
            finals=finals,
            importances=importances(tuple(t for t in trials if t.counts)),
            model=model_fact(("no", "yes"), estimate=estimate()),
            asked=asked(test="drawn", finalists=3),
        )
    )
    found = check_report(text)
    wanted = {"answer", "asked", "finals", "trials", "importance", "learning", "quality", "hard", "cost", "repeat"}
    assert wanted <= set(found.ids)
    assert {f"#{name}" for name in wanted} == set(found.links)
    for shown in (
        "<strong>0.8100</strong>",
        "95 % interval 0.7000 to 0.9000",
        "6 trials: ",
        "the fewest weights (100)",
    ):
        assert shown in text
    charts = found.tags.count("svg")
    assert charts == 1 + 1 + 1 + 3 + 3 + 1 + 2 + 2 + len(model_fact(("no", "yes")).diagnosis.hardest) + 1  # type: ignore[union-attr]


def timed(*points: tuple[float, float | None]) -> tuple:  # type: ignore[type-arg]
    """Trials of these values and latencies."""
    return tuple(trial(i, value=value, latency_ms=ms, size_mb=0.5) for i, (value, ms) in enumerate(points))


@pytest.mark.parametrize("maximize", [True, False])
def test_the_front_holds_those_that_none_is_better_and_no_slower_than(maximize: bool) -> None:
    points = [(0.5, 2.0), (0.6, 1.0), (0.7, 4.0), (0.7, 3.0), (0.4, 0.5), (0.65, 9.0)]
    found = [
        (ms, value if maximize else -value, each) for (value, ms), each in zip(points, timed(*points), strict=True)
    ]
    assert [each.number for _, _, each in front_of(found, maximize=maximize)] == [4, 1, 3]


def test_score_and_latency_are_drawn_with_the_limit() -> None:
    trials = (*timed((0.5, 2.0), (0.6, 1.0), (0.7, 4.0), (0.8, None)), trial(4, latency_ms=3.0, feasible=False))
    text = render(facts(trials, asked=asked(limits={"latency_ms": 3.5, "size_mb": 1.0})))
    found = check_report(text)
    assert "latency" in found.ids
    assert "accuracy of 4 complete trials by the latency of a prediction; the front has 2 of them" in text
    assert "limit: 3.5 ms" in text
    assert "latency_ms 3.5, size_mb 1" in text
    for limits in ({}, {"size_mb": 1.0}):
        free = render(facts(trials, asked=asked(limits=limits)))
        assert "latency" in check_report(free).ids
        assert "limit: " not in free
    assert "latency" not in check_report(render(facts(timed((0.5, 2.0), (0.6, None), (0.7, None))))).ids


def test_the_model_says_what_it_takes_and_what_its_mistakes_cost() -> None:
    model = model_fact(("no", "yes"))
    config = replace(model.config, footprint=Footprint(2.5, 1.25, 12, NASTY), costs=Costs(1, 5))
    text = render(facts(model=replace(model, config=config)))
    check_report(text)
    assert "takes 2.5 ms on one thread of &lt;script" in text
    assert "its weights take 1.25 MB" in text
    assert "To take no for yes costs 1, the other way round 5" in text


def test_a_model_of_several_finalists_says_how_much_each_counts_and_what_the_estimate_leaves_out() -> None:
    model = model_fact(("no", "yes"), estimate=estimate())
    others = (Component(model.config.classifier, 2, 0.2), Component(model.config.classifier, 3, 0.05))
    shares = [{"trial": trial, "weight": weight} for trial, weight in ((0, 0.75), (4, 0.2), (2, 0.05))]
    config = replace(model.config, others=others, provenance={"ensemble": shares})
    text = render(facts(model=replace(model, config=config)))
    check_report(text)
    assert "is 6 networks: those of the winner, trial 0, and, by greedy selection, of 2 other finalists." in text
    assert "0 (0.75), 4 (0.2), 2 (0.05). Its probabilities are calibrated, with temperature 1.3." in text
    assert "Other finalists predict with it, which this mean leaves out." in text
    assert "by greedy selection" not in render(facts(model=model))


def test_the_winner_of_finals_is_not_called_the_best_of_the_study() -> None:
    trials = (trial(0, value=0.9), trial(1, value=0.8))
    text = render(facts(trials, model=model_fact(("no", "yes"), trial=1)))
    check_report(text)
    assert "Value by which trial 1 was selected" in text


def test_the_only_finalist_is_not_said_to_be_better_than_others() -> None:
    found = facts(finals=(finalist(0, (0.8, 0.9), winner=True, equal=True),))
    assert finals_say(found) == "Trial 0 was the only finalist; the mean of its fresh values is 0.8500."
    assert "not told apart" not in render(found)


@pytest.mark.parametrize("maximize", [True, False])
def test_a_study_without_a_complete_trial(maximize: bool) -> None:
    trials = (trial(0, "failed", None, failure="out of memory"), trial(1, "running", None))
    text = render(facts(trials, over=False, asked=asked(maximize=maximize)))
    found = check_report(text)
    assert "No trial has completed yet" in text
    assert "1 trial: out of memory" in text
    assert not {"finals", "importance", "learning", "quality", "hard"} & set(found.ids)


def test_a_study_that_has_not_begun() -> None:
    text = render(facts((), over=False))
    check_report(text)
    assert "No trial has begun of 10 trials." in text
    assert "No trial has ended yet" in text


def test_a_running_study_says_so_and_one_without_a_model_how_to_make_one() -> None:
    assert "it may still change" in render(facts(over=False))
    assert "<code>hpo promote study</code>" in render(facts())


@pytest.mark.parametrize("test", [True, False])
@pytest.mark.parametrize("classes", [("no", "yes"), ("a", "b", "c"), tuple(f"class number {i}" for i in range(30))])
def test_any_number_of_classes_with_or_without_a_test_part(classes: tuple[str, ...], test: bool) -> None:
    model = model_fact(classes, test=test)
    text = render(facts(model=model, asked=asked(classes=classes)))
    check_report(text)
    assert f"Confusion matrix, {'test' if test else 'validation'} part" in text
    counts = [count for row in model.config.validation.confusion for count in row]  # type: ignore[union-attr]
    assert text.count('class="box cell ') == sum(count > 0 for count in counts)
    assert ("each predicted by networks that have not trained on it" in text) != test


def test_a_thousand_classes_stay_a_small_file() -> None:
    text = render(facts(model=model_fact(tuple(f"class {i}" for i in range(1000)), n=3000)))
    found = check_report(text)
    assert "quality" in found.ids
    assert "box cell" not in text
    assert len(text) < 400_000


def test_a_model_of_an_earlier_version_has_what_is_known_of_it() -> None:
    model = model_fact(("no", "yes"), diagnosis=None)
    bare = replace(model.config, calibration={}, validation=None, test=None, temperature=1.0)
    known = replace(model, config=bare, scores=replace(model.scores, validation=None, test=None), test_looks=None)
    for each in (model, known):
        text = render(facts(model=each))
        found = check_report(text)
        assert "hard" not in found.ids
        assert "version 3" in text


def test_what_is_the_data_owners_alone_is_not_in_a_report_that_is_passed_on() -> None:
    model = model_fact(("no", "yes"))
    assert model.diagnosis is not None
    ids = [f"patient {each.id}" for each in model.diagnosis.hardest]
    hardest = tuple(replace(each, id=name) for each, name in zip(model.diagnosis.hardest, ids, strict=True))
    model = replace(model, diagnosis=replace(model.diagnosis, hardest=hardest))
    shown, shared = (render(facts(model=model, private=private)) for private in (True, False))
    assert all(name in shown for name in ids)
    assert "patient" not in shared
    assert "hpo report study" in shared


def test_whatever_people_named_is_shown_and_is_no_html() -> None:
    classes = (f"a{NASTY}", f"b{NASTY}")
    trials = (trial(0, params={"pooling": NASTY}, worker=NASTY, device=NASTY), trial(1, "failed", None, failure=NASTY))
    text = render(
        facts(
            trials,
            study=NASTY,
            model=model_fact(classes),
            asked=asked(classes=classes, features=(NASTY,), data=NASTY, columns={"id": NASTY}),
            importances=replace(importances((trial(0),)), shares=((NASTY, 1.0),)),
        )
    )
    check_report(text)
    assert "alert(1)&lt;/script&gt;" in text
    assert "<script" not in text.lower()


def test_equal_facts_give_equal_bytes() -> None:
    first, second = (render(facts(many(), model=model_fact(("no", "yes")))) for _ in range(2))
    assert first == second


def test_values_that_are_no_numbers_leave_the_rest_whole() -> None:
    broken = {"value": [math.nan, None, math.inf], "train_loss": []}
    trials = (trial(0, curve=broken), trial(1, "pruned", None), trial(2, value=0.5), trial(3, value=None))
    check_report(render(facts(trials)))


def test_a_dropped_winner_is_named() -> None:
    text = render(facts((trial(0, dropped=True), trial(1)), model=model_fact(("a", "b"))))
    assert "Trial 0 was dropped since" in text
    assert "Dropped, so not counted: trial 0" in text


def test_hundreds_of_trials_stay_a_small_file() -> None:
    text = render(facts(many(1000), model=model_fact(("no", "yes"))))
    check_report(text)
    assert len(text) < 600_000


# ------------------------------------------------------------------------------------------------------- the answer


def test_the_answer_is_the_most_trustworthy_number() -> None:
    model = model_fact(("no", "yes"), estimate=estimate())
    tested = replace(model, config=replace(model.config, estimate=None))
    selected = replace(model, config=replace(model.config, estimate=None, test=None))
    finals = (finalist(0, (0.7, 0.8), winner=True),)
    says = [answer(facts(model=each)) for each in (model, tested, selected)]
    says += [answer(facts(finals=finals)), answer(facts())]
    assert [each and each.says for each in says] == [
        "Expected accuracy",
        "accuracy on the test part",
        "Selected accuracy, flattering",
        "Fresh accuracy",
        "Selected accuracy, flattering",
    ]
    assert says[1] is not None
    assert says[1].interval == tested.config.test.intervals["accuracy"]  # type: ignore[union-attr]
    assert answer(facts(())) is None


def test_looks_at_the_test_part_are_counted() -> None:
    found = answer(facts(model=model_fact(("no", "yes"), test_looks=4)))
    assert found is not None
    assert "which 4 versions of models have been measured on" in found.why


@pytest.mark.parametrize(
    ("finals", "says"),
    [
        ((finalist(3, (0.9,), winner=True, equal=True), finalist(1, (0.5,))), "no other finalist comes within"),
        (
            (finalist(3, (0.9,), 200, equal=True), finalist(1, (0.89,), 100, equal=True, winner=True)),
            "trial 1 won, with the fewest weights (100): the cheaper of equals",
        ),
        (
            (finalist(3, (0.9,), 100, equal=True), finalist(1, (0.89,), 100, equal=True, winner=True)),
            "trial 1 won, with the lower log-loss",
        ),
    ],
)
def test_why_a_finalist_won(finals: tuple, says: str) -> None:  # type: ignore[type-arg]
    assert says in (finals_say(facts(finals=finals)) or "")


def test_finals_that_run_have_no_winner_yet() -> None:
    running = facts(over=False, finals=(finalist(3, (0.9,), equal=True), finalist(1, (0.5,))))
    assert finals_say(running) is None
    check_report(render(running))


def test_the_standard_error_of_a_mean() -> None:
    values = (0.8, 0.84, 0.82)
    assert finalist(0, values).error == pytest.approx(np.std(values, ddof=1) / math.sqrt(3))
    assert finalist(0, (0.8,)).error is None


def test_time_is_shared_out_by_how_trials_ended() -> None:
    found = {each.state: each for each in spent(facts(many(50)).cost)}
    assert {state: each.trials for state, each in found.items()} == {"complete": 30, "pruned": 10, "failed": 10}
    assert found["failed"].held_s == pytest.approx(50.0)
    assert found["pruned"].training_s == pytest.approx(40.0)


# --------------------------------------------------------------------------------------------------------- diagnosis


@given(st.integers(2, 4), st.integers(0, 10**6))
def test_curves_end_where_they_must_and_their_areas_are_scikit_learns(K: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(K), random.integers(0, K, 40)])
    probabilities = random.dirichlet(np.ones(K), len(labels)).round(1)  # with ties
    probabilities[:, 0] += 1 - probabilities.sum(1)
    probabilities = np.clip(probabilities, 0, 1)
    probabilities /= probabilities.sum(1, keepdims=True)
    classes = tuple("abcd"[:K])
    found = class_curves(probabilities, labels, classes)
    assert len(found) == (1 if K == 2 else K)
    for each in found:
        k = classes.index(each.name)
        assert each.auroc == pytest.approx(roc_auc_score(labels == k, probabilities[:, k]))
        assert each.average_precision == pytest.approx(average_precision_score(labels == k, probabilities[:, k]))
        roc = np.array(each.roc)
        assert (roc[0] == 0).all()
        assert (roc[-1] == 1).all()
        assert (np.diff(roc, axis=0) >= 0).all()
        assert np.trapezoid(roc[:, 1], roc[:, 0]) == pytest.approx(each.auroc, abs=2e-3)


def test_long_curves_are_thinned_and_keep_their_area() -> None:
    random = np.random.default_rng(0)
    labels = random.integers(0, 2, 20_000)
    positive = 1 / (1 + np.exp(-random.normal(size=20_000) - 2 * labels))
    (found,) = class_curves(np.stack([1 - positive, positive], 1), labels, ("a", "b"))
    assert len(found.roc) <= POINTS + 2
    assert np.trapezoid(*np.array(found.roc).T[::-1]) == pytest.approx(found.auroc, abs=2e-3)


def test_weights_of_zero_are_as_if_the_row_were_not_there() -> None:
    random = np.random.default_rng(1)
    labels, probabilities = random.integers(0, 3, 50), random.dirichlet(np.ones(3), 50)
    X = random.normal(size=(50, 5, 1))
    weights = (np.arange(50) % 3 > 0).astype(float)
    classes = ("a", "b", "c")
    all_of_them = replace(from_arrays(X, [classes[k] for k in labels], classes=classes), weights=weights)
    rows = np.flatnonzero(weights)
    counted = diagnose("test", all_of_them, probabilities, 0.5)
    without = diagnose("test", all_of_them.take(rows), probabilities[rows], 0.5)
    assert counted.curves == without.curves
    assert counted.hardest == without.hardest


def test_the_hardest_sequences_have_the_highest_losses() -> None:
    random = np.random.default_rng(2)
    labels, probabilities = random.integers(0, 3, 40), random.dirichlet(np.ones(3), 40)
    X = random.normal(size=(40, 300, 9))
    sequences = from_arrays(X, ["abc"[k] for k in labels], classes=("a", "b", "c"), ids=[f"s{i}" for i in range(40)])
    rows = np.arange(5, 40)
    found = diagnose("validation", sequences, probabilities[rows], 0.5, rows)
    losses = -np.log(probabilities[rows, labels[rows]])
    assert [each.id for each in found.hardest] == [f"s{rows[i]}" for i in np.argsort(-losses)[:HARDEST]]
    assert [each.loss for each in found.hardest] == pytest.approx(np.sort(losses)[::-1][:HARDEST], abs=1e-3)
    first = found.hardest[0]
    assert (first.steps, first.all_features, len(first.features)) == (300, 9, FEATURES)
    assert {len(line) for line in first.values} == {STEPS}
    column = int(first.features[0][1:])
    assert first.values[0][0] == pytest.approx(X[int(first.id[1:]), 0, column], rel=1e-3)


def test_a_diagnosis_comes_back_from_json_and_is_small() -> None:
    found = model_fact(tuple(f"c{i}" for i in range(40)), n=4000).diagnosis
    assert found is not None
    text = json.dumps(found.to_json(), allow_nan=False)
    assert Diagnosis.from_json(json.loads(text)) == found
    assert len(found.curves) == CLASSES
    assert len(text) < 60_000


# ------------------------------------------------------------------------------------------------- charts and files


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9))
def test_ticks_are_few_round_and_within(low: float, span: float) -> None:
    high = low + span
    found = round_ticks(low, high)
    if high - low < 1e-9 * max(abs(low), abs(high)):
        return
    assert 1 <= len(found) <= 12
    slack = 1e-6 * span + 1e-9 * abs(low)
    assert all(low - slack <= tick <= high + slack for tick in found)


@pytest.mark.parametrize(
    ("axis", "texts"),
    [
        (Axis(0.0, 1.0), ["0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        (Axis(1e-4, 1e-1, log=True), ["0.0001", "0.001", "0.01", "0.1"]),
        (Axis(1, 3, whole=True), ["1", "2", "3"]),
        (Axis(1, 12), ["2", "4", "6", "8", "10", "12"]),
        (Axis.named(["mean", "last"]), ["mean", "last"]),
    ],
)
def test_ticks_as_they_are_written(axis: Axis, texts: list[str]) -> None:
    assert [text for _, text in axis.marks()] == texts


def test_the_study_file_in_a_report_is_the_study(tmp_path: Path) -> None:
    (tmp_path / "waves.npz").touch()
    path = tmp_path / "study.toml"
    path.write_text(
        '[study]\nname = "waves"\nfinalists = 2\n[data]\ntrain = "waves.npz"\nvalidation = { folds = 3 }\n'
        '[space]\nhidden_size = { low = 4, high = 12, step = 4 }\npooling = ["mean", "max"]\n'
        "learning_rate = { low = 0.001, high = 0.1, log = true }\n[[enqueue]]\nhidden_size = 8\n"
    )
    config = load(path)
    text = study_file(config)
    again = config_of(tomllib.loads(text), path)
    assert 'train = "waves.npz"' in text
    assert again.data.validation == Folds(3)
    tables, others = to_dict(again), to_dict(config)
    assert {**tables, "data": {}} == {**others, "data": {}}


def test_the_style_sheet_has_no_colour_but_by_name() -> None:
    """Every colour of a chart follows light, dark and print."""
    text = (Path(__file__).parents[2] / "hpo/report/templates/report.css").read_text()
    rules = re.sub(r"(?s):root \{.*?\}", "", text)
    assert set(re.findall(r"#[0-9a-f]{3,6}\b", rules)) <= {"#fff"}  # of paper
