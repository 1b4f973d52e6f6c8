"""What every report must be, and facts to make one of."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from typing import Any

import numpy as np

from hpo.models.bundle.config import BundleConfig
from hpo.models.calibration import Comparison, calibrate, measure_reliability
from hpo.models.class_scores import model_scores
from hpo.models.config import ClassifierConfig
from hpo.models.data.sequences import from_arrays
from hpo.models.diagnosis import diagnose
from hpo.models.estimate import Estimate
from hpo.models.metrics import measure
from hpo.report.facts import Asked, Cost, Facts, FinalistFact, Importances, ModelFact, Repeat, Slice, TrialFact

VOID = {"meta", "br", "wbr", "link", "img", "input", "hr", "col"}
BEGAN = datetime(2026, 11, 1, 12, tzinfo=UTC)
NASTY = "<script>alert(1)</script>&\"'"  # a name that must not become HTML


class Structure(HTMLParser):
    """Ids, links, headings and tags of a page; raises AssertionError where tags do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.nameless: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append(tag)
        assert not any(name.startswith("on") or name in ("src", "style", "action") for name in found), (tag, found)
        if "id" in found:
            self.ids.append(str(found["id"]))
        if "href" in found:
            self.links.append(str(found["href"]))
        if tag == "svg" and not found.get("aria-label"):
            self.nameless.append(str(found))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> ends nothing"
        assert self.open.pop() == tag


def check_report(text: str) -> Structure:
    """Raise AssertionError unless it is one whole page that needs nothing else and has a text for each picture."""
    found = Structure(text)
    assert text.startswith("<!doctype html>")
    assert not {"script", "link", "img", "iframe", "object", "form", "base"} & set(found.tags)
    outside = re.sub(r"<title>.*?</title>", "", text)
    assert not re.search(r"https?:|url\(|@import|javascript:|data:", outside)
    assert len(found.ids) == len(set(found.ids))
    assert all(link.startswith("#") and link[1:] in found.ids for link in found.links), found.links
    assert found.nameless == []
    assert found.tags.count("h1") == 1
    assert not re.search(r"\b(nan|inf|None|Infinity)\b", re.sub(r"(?s)<style>.*?</style>|<pre.*?</pre>", "", text))
    return found


def trial(number: int, state: str = "complete", value: float | None = 0.5, **given: Any) -> TrialFact:
    curve = {"value": [0.4, 0.45, value], "train_loss": [1.0, 0.8, 0.7], "log_loss": [0.9, 0.8, float("nan")]}
    ended = state in ("complete", "pruned", "failed")
    begin = BEGAN + timedelta(seconds=10 * number)
    known: dict[str, Any] = {
        "params": {"hidden_size": 8 * (1 + number % 3), "learning_rate": 0.001 * (1 + number), "pooling": "mean"},
        "training_s": 4.0 if state in ("complete", "pruned") else None,
        "span": (begin, begin + timedelta(seconds=5)) if ended else None,
        "worker": "host-17",
        "device": "cpu",
        "failure": None,
        "dropped": False,
        "curve": curve if state in ("complete", "pruned") else {},
    }
    return TrialFact(number, state, value, **{**known, **given})


def model_fact(classes: tuple[str, ...], *, n: int = 200, test: bool = True, seed: int = 0, **given: Any) -> ModelFact:
    """Of a model that is right in most cases."""
    random, K = np.random.default_rng(seed), len(classes)
    labels = np.concatenate([np.arange(K), random.integers(0, K, n - K)])
    logits = random.normal(size=(n, K)) + 2.5 * np.eye(K)[labels]
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    X = np.sin(np.arange(12)[None, :] * (0.3 + labels[:, None])) + 0.1 * random.normal(size=(n, 12))
    sequences = from_arrays(X[:, :, None], [classes[k] for k in labels], classes=classes, features=(NASTY,))
    scores = measure(probabilities, labels, 0.5, 0, classes)
    reliable = Comparison(
        measure_reliability(probabilities, labels), measure_reliability(calibrate(probabilities, 1.3), labels)
    )
    config = BundleConfig(
        classifier=ClassifierConfig(features=1, classes=K, steps=12),
        classes=classes,
        features=(NASTY,),
        metric="accuracy",
        temperature=1.3,
        validation=scores,
        test=scores if test else None,
        calibration={"validation": reliable, **({"test": reliable} if test else {})},
        estimate=given.pop("estimate", None),
    )
    shown = model_scores(classes, config.validation, config.test)
    diagnosis = diagnose("test" if test else "validation", sequences, probabilities, 0.5)
    known: dict[str, Any] = {"version": 3, "trial": 0, "value": 0.9, "diagnosis": diagnosis, "test_looks": 1}
    return ModelFact("study", config=config, scores=shown, **{**known, **given})


def estimate() -> Estimate:
    return Estimate(0.81, (0.7, 0.9), "squares added", (0.8, 0.81, 0.82), 0.9)


def facts(trials: tuple[TrialFact, ...] = (trial(0),), **given: Any) -> Facts:
    complete = [each for each in trials if each.counts]
    ends = [each.span for each in trials if each.span is not None]
    wall_s = (max(end for _, end in ends) - min(begin for begin, _ in ends)).total_seconds() if ends else None
    known: dict[str, Any] = {
        "study": "study",
        "over": True,
        "state": "open",
        "ended_by": "budget",
        "asked": asked(),
        "best": max(complete, key=lambda each: each.value or 0.0).number if complete else None,
        "finals": (),
        "resolution": 0.01,
        "importances": None,
        "model": None,
        "cost": Cost(wall_s, BEGAN if ends else None, BEGAN if ends else None, trials, ()),
        "repeat": Repeat(
            {"torch": "2.11", "commit": None},
            ("cpu",),
            ("native",),
            7,
            {"training": "ab" * 32},
            ("hpo launch",),
            "[study]",
        ),
        "private": True,
    }
    return Facts(trials=trials, **{**known, **given})


def asked(**given: Any) -> Asked:
    known: dict[str, Any] = {
        "metric": "accuracy",
        "maximize": True,
        "budget": 10,
        "timeout_s": None,
        "patience": None,
        "sampler": "tpe",
        "pruner": "hyperband",
        "finalists": 0,
        "repeats": 3,
        "data": "waves.npz",
        "test": None,
        "validation": "5 folds",
        "classes": ("a", "b"),
        "features": ("x",),
        "sequences": 60,
        "steps": 12,
        "members": 5,
        "limits": {},
        "columns": {},
    }
    return Asked(**{**known, **given})


def finalist(number: int, values: tuple[float, ...], weights: int = 100, **given: Any) -> FinalistFact:
    known: dict[str, Any] = {
        "selected": 0.95,
        "equal": False,
        "winner": False,
        "curves": (trial(0).curve,) * len(values),
    }
    return FinalistFact(number, values=values, weights=weights, **{**known, **given})


def importances(trials: tuple[TrialFact, ...]) -> Importances:
    names = ("learning_rate", "hidden_size", "pooling")
    slices = tuple(
        Slice(name, 0.5, name == "learning_rate", tuple((t.params[name], t.value or 0.0, t.number) for t in trials))
        for name in names
    )
    return Importances((("learning_rate", 0.7), ("hidden_size", 0.2), ("pooling", 0.1)), slices, len(trials), 0.1)
