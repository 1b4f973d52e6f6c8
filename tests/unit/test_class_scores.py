"""Scores by class and by group, from small counts by hand, against scikit-learn, and as what they promise."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from sklearn import metrics as sk

from hpo.models import metrics
from hpo.models.bundle import bundle, card
from hpo.models.bundle.config import BundleConfig, BundleError, from_json, to_json
from hpo.models.bundle.evaluation import Evaluation, evaluate
from hpo.models.class_scores import (
    GroupScore,
    Mistake,
    ModelScores,
    PartScores,
    class_scores,
    model_scores,
    part_scores,
    weakest,
    worst_first,
)
from hpo.models.config import ClassifierConfig
from hpo.models.data.sequences import from_arrays
from hpo.models.metrics import GROUPS_KEPT, Groups, Scores, count_groups, proportion_interval
from hpo.terminal import evaluation_row, show_evaluation
from tests.unit.test_bundle import CURVE, make

STORED = Path(__file__).with_name("stored")
FIXTURES = Path(__file__).parents[1] / "fixtures"
EARLIER = [STORED / "model", *(FIXTURES / version / "model" for version in ("before_the_redesign", "before_the_stem"))]
# Of 10 walks 4 are taken for runs and 1 for sitting; sitting is found always; nothing is predicted as lying.
COUNTS = ((5, 4, 1, 0), (1, 9, 0, 0), (0, 0, 5, 0), (0, 0, 2, 0))
NAMES = ("walk", "run", "sit", "lie")


def scores_of(counts: Any, groups: Groups | None = None) -> Scores:
    return Scores(int(np.sum(counts)), {}, {}, tuple(map(tuple, counts)), groups=groups)


def part_of(names: tuple[str, ...], counts: Any, groups: Groups | None = None) -> PartScores:
    found = part_scores(names, scores_of(counts, groups))
    assert found is not None
    return found


@st.composite
def labels(draw: st.DrawFn) -> tuple[int, np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """A number of classes, true and predicted labels; classes may lack either."""
    K, N = draw(st.integers(2, 6)), draw(st.integers(1, 60))
    true, predicted = (draw(st.lists(st.integers(0, K - 1), min_size=N, max_size=N)) for _ in range(2))
    return K, np.array(true), np.array(predicted)


# ------------------------------------------------------------------------------------------------------------ by class


def test_each_class_against_the_rest_by_hand() -> None:
    walk, run, sit, lie = class_scores(NAMES, COUNTS)
    assert (walk.name, walk.sequences, walk.recall, walk.mistaken_for) == ("walk", 10, 0.5, Mistake("run", 4))
    assert walk.recall_interval == pytest.approx((0.1871, 0.8129), abs=1e-4)  # 5 of 10, Clopper and Pearson's table
    assert (walk.precision, run.precision, sit.precision) == (5 / 6, 9 / 13, 5 / 8)
    assert walk.f1 == pytest.approx(2 * 0.5 * (5 / 6) / (0.5 + 5 / 6))
    assert (run.mistaken_for, sit.mistaken_for, sit.recall) == (Mistake("walk", 1), None, 1.0)
    assert (lie.recall, lie.f1, lie.precision, lie.precision_interval) == (0.0, 0.0, None, None)
    assert lie.undefined == {"precision": "no sequence is predicted as this class"}
    assert lie.mistaken_for == Mistake("sit", 2)


def test_a_class_without_a_sequence_has_no_recall_and_no_f1_but_may_have_a_precision() -> None:
    a, b, c = class_scores(("a", "b", "c"), ((2, 1, 0), (0, 0, 0), (0, 0, 3)))
    assert (b.sequences, b.recall, b.recall_interval, b.f1, b.mistaken_for) == (0, None, None, None, None)
    assert b.precision == 0.0
    assert b.undefined == dict.fromkeys(("recall", "f1"), "no sequence is of this class")
    assert a.undefined == c.undefined == {}
    (_, nothing) = class_scores(("a", "b"), ((2, 0), (0, 0)))
    assert (nothing.precision, set(nothing.undefined)) == (None, {"recall", "f1", "precision"})


def test_of_classes_that_it_is_taken_for_equally_often_the_first_is_named() -> None:
    (a, *_) = class_scores(("a", "b", "c"), ((0, 2, 2), (0, 1, 0), (0, 0, 1)))
    assert a.mistaken_for == Mistake("b", 2)


@given(labels())
def test_recall_precision_and_f1_are_those_of_scikit_learn(drawn: Any) -> None:
    K, true, predicted = drawn
    counts = sk.confusion_matrix(true, predicted, labels=np.arange(K)).tolist()
    found = class_scores([str(k) for k in range(K)], counts)
    expected = sk.precision_recall_fscore_support(true, predicted, labels=np.arange(K), zero_division=np.nan)
    for each, precision, recall, f1, support in zip(found, *expected, strict=True):
        assert each.sequences == support
        assert (each.precision is None) == math.isnan(precision) == ("precision" in each.undefined)
        assert (each.recall is None) == math.isnan(recall) == ("recall" in each.undefined)
        assert each.precision is None or each.precision == pytest.approx(precision)
        assert each.recall is None or (each.recall, each.f1) == pytest.approx((recall, f1))


@given(labels())
def test_recalls_weighted_by_their_sequences_are_the_accuracy(drawn: Any) -> None:
    K, true, predicted = drawn
    part = part_of(tuple(map(str, range(K))), sk.confusion_matrix(true, predicted, labels=np.arange(K)).tolist())
    assert part.accuracy == pytest.approx(float((true == predicted).mean()))
    assert sum(each.sequences for each in part.by_class) == part.sequences == len(true)
    hits = sum((each.recall or 0) * each.sequences for each in part.by_class)
    assert hits / part.sequences == pytest.approx(part.accuracy)
    for each in part.by_class:
        for value, interval in ((each.recall, each.recall_interval), (each.precision, each.precision_interval)):
            assert (value is None) == (interval is None)
            assert value is None or interval is None or 0 <= interval[0] <= value <= interval[1] <= 1
        wrong = each.sequences - round((each.recall or 0) * each.sequences)
        assert (each.mistaken_for is None) == (wrong == 0)
        assert each.mistaken_for is None or wrong / (K - 1) <= each.mistaken_for.sequences <= wrong


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.8])
def test_of_two_classes_the_threshold_decides(threshold: float) -> None:
    p = np.linspace(0, 1, 21)
    y = np.arange(21) % 2
    scores = metrics.measure(np.stack([1 - p, p], axis=1), y, threshold, classes=("no", "yes"))
    part = part_scores(("no", "yes"), scores)
    assert part is not None
    no, yes = part.by_class
    assert yes.recall == float((p[y == 1] >= threshold).mean())
    assert no.recall == float((p[y == 0] < threshold).mean())
    assert yes.f1 == pytest.approx(scores.metrics["f1"])
    assert ((no.recall or 0) + (yes.recall or 0)) / 2 == pytest.approx(scores.metrics["balanced_accuracy"])


def test_a_part_without_a_sequence_has_no_scores() -> None:
    assert part_scores(("a", "b"), scores_of(((0, 0), (0, 0)))) is None
    assert part_scores(("a", "b"), None) is None


# ------------------------------------------------------------------------------------------------------------ by group


def test_groups_by_hand_the_surest_failures_first() -> None:
    """One wrong sequence of one may be chance; 30 right of 100 is not."""
    sizes = {"p1": (100, 30), "p2": (1, 0), "p3": (4, 4), "p4": (4, 0)}
    groups = np.repeat(np.arange(4), [n for n, _ in sizes.values()])
    right = np.concatenate([np.arange(n) < hits for n, hits in sizes.values()])
    shuffled = np.random.default_rng(0).permutation(len(groups))
    found = count_groups(right[shuffled], groups[shuffled], tuple(sizes))
    assert found == Groups(4, ((100, 30), (4, 0), (1, 0), (4, 4)), ("p1", "p4", "p2", "p3"))
    part = part_of(("a", "b"), ((34, 37), (38, 0)), found)
    assert part.groups == 4
    assert part.by_group[1] == GroupScore("p4", 4, 0, 0.0, proportion_interval(0, 4))
    assert [each.name for each in part.by_group] == ["p1", "p4", "p2", "p3"]


def test_equal_groups_stand_in_the_order_of_their_names_whatever_their_codes() -> None:
    """A file and a study's stored data number groups by different orders of their sequences."""
    for names in itertools.permutations(("Ada", "Bob", "Cyd")):
        found = count_groups(np.arange(6) % 2 == 0, np.repeat(np.arange(3), 2), names)
        assert found is not None
        assert found.names == ("Ada", "Bob", "Cyd")


@given(st.lists(st.tuples(st.integers(0, 8), st.booleans()), min_size=1, max_size=60))
def test_groups_hold_every_sequence_and_come_in_order_of_their_intervals(rows: list[tuple[int, bool]]) -> None:
    codes, right = np.array([code for code, _ in rows]), np.array([hit for _, hit in rows])
    found = count_groups(right, codes, tuple(f"g{c}" for c in range(9)))
    if len(set(codes.tolist())) == len(codes):
        assert found is None
        return
    assert found is not None
    assert found.total == len(found.counts) == len(set(codes.tolist()))
    assert tuple(map(sum, zip(*found.counts, strict=True))) == (len(codes), right.sum())
    for name, (sequences, hits) in zip(found.names, found.counts, strict=True):
        at = codes == int(name[1:])
        assert (sequences, hits) == (at.sum(), right[at].sum())
    ends = [proportion_interval(hits, sequences)[1] for sequences, hits in found.counts]
    assert ends == pytest.approx(sorted(ends), abs=1e-12)


def test_without_groups_or_where_each_sequence_is_one_there_are_none() -> None:
    assert count_groups(np.ones(3, bool), None, ()) is None
    assert count_groups(np.ones(3, bool), np.arange(3), ("a", "b", "c")) is None


def test_of_very_many_groups_the_worst_are_kept_and_all_are_counted() -> None:
    total = GROUPS_KEPT + 20
    groups = np.repeat(np.arange(total), 2)
    right = groups >= 5  # the first five are wrong
    found = count_groups(right, groups, tuple(f"g{i:04}" for i in range(total)))
    assert found is not None
    assert (found.total, len(found.counts), len(found.names)) == (total, GROUPS_KEPT, GROUPS_KEPT)
    assert found.names[:6] == ("g0000", "g0001", "g0002", "g0003", "g0004", "g0005")


# ------------------------------------------------------------------------------------------------------------- weakest


def test_classes_come_in_order_of_what_is_sure_and_those_without_a_sequence_last() -> None:
    names = ("all", "none of one", "30 of 100", "absent", "half of 40")
    counts = ((9, 0, 0, 0, 0), (1, 0, 0, 0, 0), (70, 0, 30, 0, 0), (0, 0, 0, 0, 0), (20, 0, 0, 0, 20))
    found = [each.name for each in worst_first(class_scores(names, counts))]
    assert found == ["30 of 100", "half of 40", "none of one", "all", "absent"]


def test_weak_is_what_lies_below_the_accuracy_beyond_chance() -> None:
    part = part_of(("a", "b", "c"), ((90, 0, 0), (20, 10, 0), (1, 0, 1)), Groups(2, ((61, 40), (61, 61)), ("x", "y")))
    found = weakest(ModelScores(validation=None, test=part))
    assert found is not None
    assert (found.part, found.sequences, found.accuracy) == ("test", 122, 101 / 122)
    assert [each.name for each in found.classes] == ["b"]  # one of two may be chance
    assert [each.name for each in found.groups] == ["x"]
    even = part_of(("a", "b"), ((9, 1), (1, 9)))
    assert weakest(ModelScores(part, even)) is None  # the test part speaks, and says nothing
    validated = weakest(ModelScores(part, None))
    assert validated is not None
    assert validated.part == "validation"
    assert weakest(ModelScores(None, None)) is None


# ------------------------------------------------------------------------------------------------------ the saved model


def config_of(counts: Any, names: tuple[str, ...], groups: Groups | None = None) -> BundleConfig:
    scores = scores_of(counts, groups)
    classifier = ClassifierConfig(features=1, classes=len(names), steps=9)
    return BundleConfig(classifier, names, ("x0",), "accuracy", validation=scores, test=scores)


def test_the_folder_has_the_counts_of_the_groups_and_not_their_names(tmp_path: Path) -> None:
    """They may be those of patients, and whoever gets the model is not to learn who was in its data."""
    states, config = make()
    groups = Groups(40, ((9, 2), (51, 50)), ("Ada Lovelace", "Grace Hopper"))
    config = replace(config, test=replace(config.test, groups=groups))  # type: ignore[type-var]
    folder = bundle.save(tmp_path / "model", states, config, CURVE)
    for file in folder.iterdir():
        assert not any(name in file.read_bytes() for name in (b"Ada", b"Lovelace", b"Grace", b"Hopper")), file
    loaded = bundle.load(folder).config
    assert loaded.test is not None
    assert loaded.test.groups == Groups(40, ((9, 2), (51, 50)))
    found = model_scores(loaded.classes, loaded.validation, loaded.test)
    assert found.test is not None
    assert [(each.name, each.right) for each in found.test.by_group] == [(None, 2), (None, 50)]
    assert from_json(to_json(loaded).encode(), "it") == loaded
    text = (folder / "README.md").read_text()
    assert "the worst 2 of 40 groups of the data" in text
    assert "| 9 | 0.2222 [0.0281, 0.6001] |" in text


def test_a_model_without_groups_is_written_as_before() -> None:
    _, config = make()
    content = json.loads(to_json(config))
    assert set(content["test"]) == {"sequences", "metrics", "intervals", "confusion", "undefined", "methods"}


@pytest.mark.parametrize(
    "groups",
    [
        3,
        {"total": 1},
        {"total": 1, "counts": [[2, 3]]},
        {"total": 1, "counts": [[0, 0]]},
        {"total": 0, "counts": [[1, 1]]},
        {"total": True, "counts": [[1, 1]]},
        {"total": 2, "counts": [[1, 1], [1]]},
        {"total": 2, "counts": []},
        {"total": 1, "counts": [[1, 1]], "names": ["Ada"]},
        {"total": 2000, "counts": [[1, 1]] * (GROUPS_KEPT + 1)},
    ],
)
def test_groups_of_a_stranger_that_are_none_are_refused(groups: Any) -> None:
    content = json.loads(to_json(make()[1]))
    content["validation"]["groups"] = groups
    with pytest.raises(BundleError, match=r"config\.json, validation: groups must be their total and, of at most 1000"):
        from_json(json.dumps(content).encode(), "config.json")


def test_counts_of_other_classes_than_the_models_are_refused() -> None:
    content = json.loads(to_json(make()[1]))
    content["validation"]["confusion"] = [[1]]
    with pytest.raises(BundleError, match="validation: a classifier of 3 classes needs the counts of as many, got 1"):
        from_json(json.dumps(content).encode(), "config.json")


@pytest.mark.parametrize("folder", EARLIER)
def test_a_model_of_an_earlier_version_is_scored_by_class_from_its_counts(folder: Path, tmp_path: Path) -> None:
    config = bundle.load(folder).config
    found = model_scores(config.classes, config.validation, config.test)
    for scores, part in ((config.validation, found.validation), (config.test, found.test)):
        if scores is None:
            assert part is None
            continue
        assert part is not None
        assert part.accuracy == pytest.approx(scores.metrics["accuracy"])
        recalls = [each.recall for each in part.by_class if each.recall is not None]
        assert np.mean(recalls) == pytest.approx(scores.metrics["balanced_accuracy"])
        assert (part.groups, part.by_group) == (None, ())
    assert found.validation is not None
    assert "### Validation part" in card.readme(config)
    assert "groups of the data" not in card.readme(config)


def test_a_model_without_scores_has_no_table(tmp_path: Path) -> None:
    config = bundle.load(shutil.copytree(STORED / "model", tmp_path / "model")).config
    text = card.readme(replace(config, validation=None, test=None))
    assert "Its scores were not recorded." in text
    assert "## Classes" not in text


def tables(text: str) -> list[list[list[str]]]:
    """The cells of each table of a Markdown text, as a reader of it sees them."""
    found: list[list[list[str]]] = []
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif token.type == "inline" and found and len(found[-1]) and token.level > 2:
            found[-1][-1].append("".join(child.content for child in token.children or ()))
    return found


def test_the_card_has_a_table_of_each_part() -> None:
    text = card.readme(config_of(COUNTS, NAMES))
    by_class = [table for table in tables(text) if table[0][0] == "class"]
    assert len(by_class) == 2
    assert text.index("### Test part") < text.index("### Validation part")
    rows = {row[0]: row[1:] for row in by_class[0][1:]}
    assert list(rows) == [each.name for each in worst_first(class_scores(NAMES, COUNTS))]
    assert rows["walk"] == ["10", "0.5000 [0.1871, 0.8129]", "0.8333 [0.3588, 0.9958]", "0.6250", "run (4)"]
    assert rows["lie"][2] == "undefined: no sequence is predicted as this class"
    assert rows["sit"][4] == ""


@pytest.mark.parametrize("name", ["a|b", "`|`", "a\\|b", "|", "<b>|</b>", "a\n| b"])
def test_a_name_with_a_bar_stays_in_its_cell(name: str) -> None:
    (table, _) = (t for t in tables(card.readme(config_of(((1, 1), (1, 1)), (name, "other")))) if t[0][0] == "class")
    assert all(len(row) == 6 for row in table)
    assert {row[0] for row in table[1:]} == {" ".join(name.split()), "other"}


def test_hundreds_of_classes_and_groups_do_not_flood_the_card() -> None:
    K = 300
    names = tuple(f"c{k:03}" for k in range(K))
    counts = (np.eye(K, dtype=int) * 3 + (np.arange(K)[:, None] < 5) * np.eye(K, k=7, dtype=int)).tolist()
    groups = Groups(500, ((3, 1),) * 500)
    text = card.readme(config_of(counts, names, groups))
    by_class, by_group, *_ = (table for table in tables(text) if table[0][0] in ("class", "sequences"))
    assert len(by_class) == 1 + card.CLASSES_SHOWN
    assert {row[0] for row in by_class[1:6]} == {"c000", "c001", "c002", "c003", "c004"}
    assert len(by_group) == 1 + card.GROUPS_SHOWN
    assert "And 270 classes more; the counts of all are in config.json." in text
    assert "the worst 10 of 500 groups" in text


# ---------------------------------------------------------------------------------------------------------- evaluation


@pytest.fixture
def evaluation(tmp_path: Path) -> Evaluation:
    """Of a model of three classes on 24 sequences of two of them, in three groups."""
    states, config = make()
    model = bundle.load(bundle.save(tmp_path / "model", states, config, CURVE))
    X = np.random.default_rng(0).normal(0, 3, (24, 9, 2))
    y = [f"class {i % 2 * 2}" for i in range(24)]
    groups = [("Ada", "Bob", "Cyd")[i % 3] for i in range(24)]
    return evaluate(model, from_arrays(X, np.array(y), features=("pulse", "breath"), groups=groups))


def test_an_evaluation_scores_classes_and_groups_by_their_names(evaluation: Evaluation) -> None:
    row = json.loads(json.dumps(evaluation_row(evaluation)))
    assert row["classes"] == ["class 0", "class 1", "class 2"]
    zero, one, two = row["by_class"]
    assert (zero["name"], zero["sequences"], one["sequences"], two["sequences"]) == ("class 0", 12, 0, 12)
    assert (one["recall"], one["undefined"]["recall"]) == (None, "no sequence is of this class")
    right = evaluation.predictions.labels == evaluation.labels
    assert row["groups"] == 3
    assert {each["name"]: each["right"] for each in row["by_group"]} == {
        name: int(right[k::3].sum()) for k, name in enumerate(("Ada", "Bob", "Cyd"))
    }


def test_an_evaluation_shows_ten_classes_and_groups_and_how_many_more(
    evaluation: Evaluation, capsys: pytest.CaptureFixture[str]
) -> None:
    show_evaluation(evaluation)
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("classes, the surest failures first", "taken for", "Ada", "Bob", "Cyd"))
    assert "undefined" in shown
    K = 40
    names = tuple(f"c{k:03}" for k in range(K))
    scores = scores_of(np.eye(K, dtype=int).tolist(), Groups(2000, ((2, 1),) * GROUPS_KEPT, ("g",) * GROUPS_KEPT))
    many = replace(evaluation.predictions, classes=names)
    show_evaluation(replace(evaluation, scores=scores, predictions=many))
    shown = capsys.readouterr().out
    assert "30 more, see --json" in shown
    assert "1,990 more, see --json" in shown
    assert len(shown.splitlines()) < 60


def test_scores_are_json_with_null_for_what_has_no_value() -> None:
    part = part_of(NAMES, COUNTS)
    text = json.dumps(asdict(part), allow_nan=False)
    assert json.loads(text)["by_class"][3]["precision"] is None
