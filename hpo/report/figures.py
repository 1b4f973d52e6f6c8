"""The report's charts, each from the facts that it shows; None where these are too few for it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from markupsafe import Markup

from hpo.models.bundle import pictures
from hpo.models.charts import Axis, Chart, spark
from hpo.models.diagnosis import ClassCurves, Diagnosis, HardSequence
from hpo.report.facts import Curve, Facts, FinalistFact, Importances, Slice, TrialFact
from hpo.report.words import number, plain

MOST_POINTS = 1_500  # trials of one kind that are drawn
MOST_CURVES = 60  # learning curves of other trials
CURVES_SHOWN = 5  # classes whose ROC curves have a colour; of more the worst
LINES = 5  # colours
LATENCIES_LEAST = 3  # trials from which latencies are drawn
HALF = 0.5


def history(facts: Facts) -> Markup | None:
    """Values by trial: complete, pruned, failed, and the best so far."""
    counted = [each for each in facts.trials if each.counts]
    if not counted:
        return None
    values = [each.value for each in counted if each.value is not None]
    low, high = _without_outliers(values, maximize=facts.asked.maximize)
    y, x = Axis.over((low, high)), Axis(-0.5, max(facts.trials[-1].number, 1) + 0.5, "trial", whole=True)
    says = (
        f"{facts.asked.metric} of {len(counted)} complete trials by number, from {number(min(values))} to "
        f"{number(max(values))}; the best so far as a line"
    )
    chart = Chart(x, y, says)
    for kind in ("pruned", "complete"):
        found = [t for t in facts.trials if t.state == kind and t.value is not None]
        for trial in found[:: 1 + len(found) // MOST_POINTS]:
            assert trial.value is not None
            title = f"trial {trial.number}: {number(trial.value)}, {kind}{', dropped' if trial.dropped else ''}"
            chart.dot(trial.number, trial.value, "faint" if trial.dropped else kind, title, 2.6)
    for trial in facts.trials:
        if trial.state == "failed":
            chart.cross(trial.number, y.low, "failed", f"trial {trial.number} failed")
    best = accumulate(values, max if facts.asked.maximize else min)
    chart.steps(_changes([t.number for t in counted], list(best)), "best", facts.trials[-1].number)
    winner = facts.trial(facts.winner)
    if winner is not None and winner.value is not None:
        chart.dot(winner.number, winner.value, "winner", f"trial {winner.number}: {number(winner.value)}", 5.5)
    return chart.svg()


def _without_outliers(values: Sequence[float], *, maximize: bool) -> tuple[float, float]:
    """The range that is worth drawing: far beyond the quartile on the worse side values lie at the edge."""
    ordered = sorted(values)
    low, high = ordered[0], ordered[-1]
    if len(ordered) < 8:
        return low, high
    first, third = ordered[len(ordered) // 4], ordered[-1 - len(ordered) // 4]
    reach = 3 * (third - first)
    return (max(low, first - reach), high) if maximize else (low, min(high, third + reach))


def _changes(numbers: Sequence[int], best: Sequence[float]) -> list[tuple[float, float]]:
    """Where the best value so far changes."""
    pairs = list(zip(numbers, best, strict=True))
    return [pair for i, pair in enumerate(pairs) if not i or pair[1] != pairs[i - 1][1]]


def finals(facts: Facts) -> Markup | None:
    """Each finalist's fresh values with mean and standard error, and the value that it was selected by."""
    found = facts.finals
    if not found:
        return None
    every = [value for each in found for value in (*each.values, each.selected)]
    y = Axis.named([f"trial {each.trial}" for each in found], inverted=True)
    best = found[0]
    winner = next((each for each in found if each.winner), best)
    says = (
        f"fresh values of {len(found)} finalists; the best mean is trial {best.trial}'s {number(best.mean)}, the "
        f"winner is trial {winner.trial} with {number(winner.mean)}"
    )
    height = 60 + 34 * len(found)
    chart = Chart(Axis.over(every, facts.asked.metric, margin=0.08), y, says, height=height, left=66)
    for place, each in enumerate(found):
        kind = "winner" if each.winner else "equal" if each.equal else "other"
        for repeat, value in enumerate(each.values, 1):
            title = f"trial {each.trial}, repeat {repeat}: {number(value)}"
            chart.dot(value, place + 0.12, f"{kind} value", title, 3)
        if each.error is not None:
            chart.span((each.mean - each.error, place - 0.14), (each.mean + each.error, place - 0.14), f"{kind} wide")
        chart.dot(each.mean, place - 0.14, kind, f"trial {each.trial}: mean {number(each.mean)}", 4.5)
        chart.cross(each.selected, place - 0.14, "selected", f"trial {each.trial}: selected by {number(each.selected)}")
    return chart.svg()


def latency(facts: Facts) -> Markup | None:
    """Values by the latency of a prediction, with the front: trials than which none is both better and faster."""
    found = [(t.latency_ms, t.value, t) for t in facts.trials if t.counts and t.latency_ms and t.value is not None]
    if len(found) < LATENCIES_LEAST:
        return None
    limit = facts.asked.limits.get("latency_ms")
    times = [ms for ms, _, _ in found]
    reach = [*times, limit] if limit is not None and min(times) / 10 < limit < 10 * max(times) else times
    y = Axis.over(_without_outliers([value for _, value, _ in found], maximize=facts.asked.maximize))
    front = front_of(found, maximize=facts.asked.maximize)
    says = (
        f"{facts.asked.metric} of {len(found)} complete trials by the latency of a prediction; the front has "
        f"{len(front)} of them, from {number(front[0][0])} to {number(front[-1][0])} ms"
    )
    x = Axis.over(reach, "ms for one sequence, one thread", log=True)
    chart = Chart(x, y, says)
    if len(reach) > len(times) and limit is not None:
        chart.line([(limit, y.low), (limit, y.high)], "chance", f"limit: {limit:g} ms")
    chart.steps([(ms, value) for ms, value, _ in front], "best", x.high)
    for ms, value, trial in sorted(found, key=lambda each: each[2].number == facts.winner):  # it on top
        kind = "winner" if trial.number == facts.winner else "faint" if trial.feasible is False else "complete soft"
        title = f"trial {trial.number}: {number(value)}, {ms:.3g} ms, {number(trial.size_mb)} MB"
        chart.dot(ms, value, kind, title, 5 if kind == "winner" else 3)
    return chart.svg()


def front_of(
    found: Sequence[tuple[float, float, TrialFact]], *, maximize: bool
) -> list[tuple[float, float, TrialFact]]:
    """Of (latency, value, trial) those that no other one is better and no slower than."""
    sign = 1 if maximize else -1
    front: list[tuple[float, float, TrialFact]] = []
    for each in sorted(found, key=lambda each: (each[0], -sign * each[1], each[2].number)):
        if not front or sign * each[1] > sign * front[-1][1]:
            front.append(each)
    return front


def importances(found: Importances) -> Markup:
    """A bar for each parameter."""
    shares = found.shares[:12]
    largest = max(share for _, share in shares)
    says = "importance of each parameter: " + ", ".join(f"{name} {100 * share:.0f} %" for name, share in shares)
    chart = Chart(
        Axis(0, max(1.2 * largest, 0.01), "share of the importance", ticks=()),
        Axis.named([name for name, _ in shares], inverted=True),
        says,
        height=54 + 22 * len(shares),
        left=118,
    )
    for place, (name, share) in enumerate(shares):
        chart.box((0, place - 0.34), (share, place + 0.34), "complete", f"{name}: {100 * share:.1f} %")
        chart.text(share, place, f"{100 * share:.0f} %", "tick", dx=5)
    return chart.svg()


def slice_of(found: Slice, facts: Facts) -> Markup:
    """What trials scored by one parameter's value."""
    scores = [score for _, score, _ in found.points]
    y = Axis.over(_without_outliers(scores, maximize=facts.asked.maximize))
    says = f"{facts.asked.metric} by {found.name} of {len(scores)} complete trials"
    values = [*(value for value, _, _ in found.points), *found.pruned]
    if _numeric(values):
        chart = Chart(Axis.over(values, found.name, log=found.log), y, says)
        places = [float(value) for value, _, _ in found.points]
        pruned = [float(value) for value in found.pruned]
    else:
        names = sorted(set(map(plain, values)), key=_natural)
        chart = Chart(Axis.named(names, found.name), y, says)
        places = [names.index(plain(value)) + _spread(trial) for value, _, trial in found.points]
        pruned = [names.index(plain(value)) + _spread(i) for i, value in enumerate(found.pruned)]
    for place in pruned:
        chart.tick(place, "pruned")
    drawn = sorted(zip(places, found.points, strict=True), key=lambda each: each[1][2] == facts.winner)  # it on top
    for place, (value, score, trial) in drawn:
        kind = "winner" if trial == facts.winner else "complete soft"
        title = f"trial {trial}: {found.name} {plain(value)}, {number(score)}"
        chart.dot(place, score, kind, title, 5 if kind == "winner" else 3)
    return chart.svg()


def _numeric(values: Sequence[Any]) -> bool:
    """Whether these are numbers, and many enough for an axis of numbers; a few have a place each."""
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    return numbers and len(set(values)) > 5


def _spread(trial: int) -> float:
    """A little to the side, so that equal points are seen: evenly by the golden ratio."""
    return 0.5 * ((trial * 0.6180339887) % 1 - HALF)


def _natural(text: str) -> tuple[float, str]:
    try:
        return float(text), text
    except ValueError:
        return math.inf, text


def learning(facts: Facts) -> dict[str, Markup]:
    """The winner's curves beside those of other trials, by what they show."""
    winners = next((each.curves for each in facts.finals if each.trial == facts.winner), ())
    own = facts.trial(facts.winner)
    winners = winners or ((own.curve,) if own is not None else ())
    others = [each.curve for each in facts.trials if each.curve and each.number != facts.winner]
    others = others[:: 1 + len(others) // MOST_CURVES]
    found = {}
    for kind, title in (
        ("value", f"validation {facts.asked.metric}"),
        ("log_loss", "validation log-loss"),
        ("train_loss", "training loss"),
    ):
        shown = [_points(curve, kind) for curve in winners]
        if any(shown) and not (kind == "log_loss" and facts.asked.metric == "log_loss"):
            found[title] = _learning(title, shown, [_points(curve, kind) for curve in others])
    return found


def _points(curve: Curve, kind: str) -> list[tuple[float, float]]:
    return [(epoch, v) for epoch, v in enumerate(curve.get(kind, ()), 1) if v is not None and math.isfinite(v)]


def _learning(
    title: str, winners: Sequence[list[tuple[float, float]]], others: Sequence[list[tuple[float, float]]]
) -> Markup:
    values = [value for points in winners for _, value in points]
    around = sorted(value for points in others for _, value in points)
    if around:  # others may lie far off: nine tenths of them are drawn whole
        values += around[len(around) // 20 : len(around) - len(around) // 20]
    last = max([*(points[-1][0] for points in (*winners, *others) if points), 2.0])
    says = f"{title} by epoch of the winner, {len(winners)} {'line' if len(winners) == 1 else 'lines'}"
    chart = Chart(Axis(1, last, "epoch", whole=True), Axis.over(values), says)
    for points in others:
        chart.line(points, "other-curve")
    for i, points in enumerate(winners):
        chart.line(points, f"s{i % LINES}", f"repeat {i + 1}" if len(winners) > 1 else "")
    return chart.svg()


def roc(found: Diagnosis) -> Markup | None:
    """True against false positive rates."""
    unit = Axis(0.0, 1.0, "false positive rate")
    return _class_curves(found, "roc", unit, Axis(0.0, 1.0), "ROC", [(0, 0), (1, 1)])


def precision_recall(found: Diagnosis) -> Markup | None:
    """Precision by recall."""
    return _class_curves(found, "precision", Axis(0.0, 1.0, "recall"), Axis(0.0, 1.0), "precision-recall", [])


def _class_curves(
    found: Diagnosis, what: str, x: Axis, y: Axis, title: str, diagonal: list[tuple[float, float]]
) -> Markup | None:
    if not found.curves:
        return None
    area = "auroc" if what == "roc" else "average_precision"
    shown = ", ".join(f"{each.name} {getattr(each, area):.3f}" for each in found.curves[:CURVES_SHOWN])
    name = "AUROC" if what == "roc" else "average precision"
    chart = Chart(x, y, f"{title} curves of the {found.part} part; {name}: {shown}")
    chart.line(diagonal, "chance")
    for each in found.curves[CURVES_SHOWN:]:
        chart.line(getattr(each, what), "other-curve", each.name)
    for i, each in reversed(list(enumerate(found.curves[:CURVES_SHOWN]))):
        chart.line(getattr(each, what), f"s{i % LINES}", f"{each.name}: {name} {getattr(each, area):.4f}")
    return chart.svg()


def coloured(found: Diagnosis) -> list[tuple[int, ClassCurves]]:
    """Colour and class of the curves that have one."""
    return [(i % LINES, each) for i, each in enumerate(found.curves[:CURVES_SHOWN])]


def hard(found: HardSequence) -> Markup:
    """A sequence's features over its steps, each over its own range."""
    return spark(found.values, f"values of {', '.join(found.features)} over {found.steps} steps")


def states_bar(seconds: Mapping[str, float]) -> Markup:
    """Shares of time as one bar."""
    whole = sum(seconds.values()) or 1.0
    says = "share of the trials' time: " + ", ".join(f"{k} {100 * s / whole:.0f} %" for k, s in seconds.items())
    parts, at = [], 0.0
    for state, each in seconds.items():
        width = 1000 * each / whole
        parts.append(
            Markup('<rect class="box {}" x="{:.1f}" y="0" width="{:.1f}" height="20"><title>{}</title></rect>').format(
                state, at, width, f"{state}: {100 * each / whole:.0f} %"
            )
        )
        at += width
    return Markup(
        '<svg class="bar" viewBox="0 0 1000 20" preserveAspectRatio="none" role="img" aria-label="{}">{}</svg>'
    ).format(says, Markup("").join(parts))


def best_first(found: Sequence[FinalistFact], *, maximize: bool) -> list[FinalistFact]:
    """Finalists by their mean fresh value."""
    return sorted(found, key=lambda each: (-each.mean if maximize else each.mean, each.trial))


NAMES = ("importances", "slices", "confusion", "reliability", "roc", "precision", "coloured", "hard")  # of a chart


def figures(facts: Facts) -> dict[str, Any]:
    """Every chart by the name under which the template shows it; None or empty where the facts are not enough."""
    found: dict[str, Any] = dict.fromkeys(NAMES)
    found |= {"history": history(facts), "finals": finals(facts), "learning": learning(facts)}
    found["latency"] = latency(facts)
    if facts.importances is not None:
        found["importances"] = importances(facts.importances)
        found["slices"] = [(each, slice_of(each, facts)) for each in facts.importances.slices]
    if facts.model is not None:
        config, diagnosis = facts.model.config, facts.model.diagnosis
        part = "test" if config.test is not None else "validation"
        scores = config.test or config.validation
        if scores is not None:
            matrix = pictures.confusion(scores.confusion, config.classes, part)
            found["confusion"] = None if matrix is None else matrix.svg()
        found["reliability"] = [(k, pictures.reliability(each, k).svg()) for k, each in config.calibration.items()]
        if diagnosis is not None:
            found |= {"roc": roc(diagnosis), "precision": precision_recall(diagnosis), "coloured": coloured(diagnosis)}
            found["hard"] = [(each, hard(each)) for each in diagnosis.hardest] if facts.private else []
    return found
