"""From a study's facts to one HTML file: no script, nothing from elsewhere, equal bytes for equal facts.

A further section is a field of `Facts`, a chart of `figures.py` and a block of `templates/report.html`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from hpo.models.charts import STYLE
from hpo.models.class_scores import worst_first
from hpo.models.config import METRICS
from hpo.models.metrics import Scores
from hpo.report.facts import Cost, Facts, ModelFact, TrialFact
from hpo.report.figures import figures, states_bar
from hpo.report.words import FILTERS, counted, number

CLASSES_SHOWN, GROUPS_SHOWN, TRIALS_SHOWN, FAILURES_SHOWN = 30, 15, 10, 5  # rows of tables

ENDED = {  # in words
    "budget": "all trials of its budget have begun",
    "timeout": "its time is up",
    "patience": "nothing better came for as long as its patience",
    "exhausted space": "all of its space was tried",
}

_ENVIRONMENT = Environment(
    loader=PackageLoader("hpo.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)
_ENVIRONMENT.filters.update(FILTERS)


@dataclass(frozen=True)
class Answer:
    """How good the winner is, by the most trustworthy number that there is."""

    says: str  # what the number is
    value: float | None
    interval: tuple[float, float] | None
    why: str  # how far it can be trusted


@dataclass(frozen=True)
class Spent:
    """Time of trials that ended one way."""

    state: str
    trials: int
    training_s: float
    held_s: float


def render(facts: Facts) -> str:
    """The report as HTML."""
    loader = _ENVIRONMENT.loader
    assert loader is not None
    style = Markup(STYLE + loader.get_source(_ENVIRONMENT, "report.css")[0])
    return _ENVIRONMENT.get_template("report.html").render(
        facts=facts,
        style=style,
        hpo=version("hpo"),
        figures=figures(facts),
        answer=answer(facts),
        winner=facts.trial(facts.winner),
        finals_say=finals_say(facts),
        made_of=None if facts.model is None else made_of(facts.model),
        ended=ENDED.get(facts.ended_by or "", facts.ended_by),
        best_trials=(shown := _best_trials(facts)),
        varied=_varied(shown),
        failures=_failures(facts.trials),
        spent=spent(facts.cost),
        bar=states_bar({each.state: each.held_s for each in spent(facts.cost)}),
        workers=_workers((*facts.cost.trials, *facts.cost.finals)),
        parts=_parts(facts.model),
        scores=_scores(facts.model),
        limits={"classes": CLASSES_SHOWN, "groups": GROUPS_SHOWN},
    )


def answer(facts: Facts) -> Answer | None:
    """Of the estimate by finals, the test score and the selected value the first that there is; None without any."""
    metric, model = facts.asked.metric, facts.model
    if model is not None and (found := model.config.estimate) is not None:
        whose = "the winner’s" if model.config.others else "this"
        why = (
            f"The mean of {counted(len(found.values), 'training')} of {whose} configuration on fresh seeds and fresh "
            "splits, which nothing was chosen by: an honest expectation for sequences like those of training."
        )
        if model.config.others:
            why += " Other finalists predict with it, which this mean leaves out."
        return Answer(f"Expected {metric}", found.value, found.interval, why)
    if model is not None and (test := model.config.test) is not None and metric in test.metrics:
        looks = model.test_looks or 1
        why = "Measured once, on the test part, which nothing was chosen by."
        if looks > 1:
            why = f"Measured on the test part, which {looks} versions of models have been measured on by now."
        return Answer(f"{metric} on the test part", test.metrics[metric], test.intervals.get(metric), why)
    finalist = next((each for each in facts.finals if each.winner), None)
    if finalist is not None:
        why = f"The mean of {counted(len(finalist.values), 'fresh training')} so far; there is no model yet."
        return Answer(f"Fresh {metric}", finalist.mean, None, why)
    winner = facts.trial(facts.winner)
    if winner is None or winner.value is None:
        return None
    why = (
        "The best of many noisy values, by which this configuration was selected: too good on average. A test part "
        "([data] holdout) or finals ([study] finalists) would say what to expect."
    )
    return Answer(f"Selected {metric}, flattering", winner.value, None, why)


def made_of(model: ModelFact) -> str:
    """Which networks a model is, and how they predict together."""
    config = model.config
    if not config.others:
        many = f"{config.networks} networks of trial {model.trial}, whose probabilities are averaged"
        return f"one network, of trial {model.trial}" if config.networks == 1 else many
    shares = ", ".join(f"{each['trial']} ({each['weight']:.2g})" for each in config.provenance["ensemble"])
    return (
        f"{config.networks} networks: those of the winner, trial {model.trial}, and, by greedy selection, of "
        f"{counted(len(config.others), 'other finalist')}. Trials with their weights in the mean of the probabilities: "
        f"{shares}"
    )


def finals_say(facts: Facts) -> str | None:
    """Why the winner of the finals won, in words."""
    winner = next((each for each in facts.finals if each.winner), None)
    if winner is None:
        return None
    first = facts.finals[0]
    equal = [each for each in facts.finals if each.equal]
    named = f"Trial {first.trial} has the best mean of fresh values, {number(first.mean)}"
    if len(facts.finals) == 1:
        return f"Trial {first.trial} was the only finalist; the mean of its fresh values is {number(first.mean)}."
    if len(equal) < 2:
        return f"{named}, and no other finalist comes within one standard error of the difference to it: it won."
    others = ", ".join(str(each.trial) for each in equal if each is not first)
    rest = (
        f"{named}. Within one standard error of the difference to it (compared in pairs, over the same splits), or "
        f"within half a validation sequence, {'lies trial' if len(equal) == 2 else 'lie trials'} {others}: the finals "
        "do not tell them apart. "
    )
    if winner.weights == first.weights and winner is first:
        return f"{rest}It won, as none of them has fewer weights."
    why = "fewest weights" if winner.weights < max(each.weights for each in equal) else "lower log-loss"
    return f"{rest}Of these, trial {winner.trial} won, with the {why} ({winner.weights:,}): the cheaper of equals."


def spent(cost: Cost) -> list[Spent]:
    """Time by how trials ended, finals apart; states without a trial are left out."""
    groups = {state: [t for t in cost.trials if t.state == state] for state in ("complete", "pruned", "failed")}
    groups["finals"] = [trial for trial in cost.finals if trial.held_s is not None]
    return [
        Spent(
            state,
            len(found),
            sum(trial.training_s or 0.0 for trial in found),
            sum(trial.held_s or 0.0 for trial in found),
        )
        for state, found in groups.items()
        if found
    ]


def _workers(trials: Sequence[TrialFact]) -> list[tuple[str, str, int, float]]:
    """Worker, device, trials and seconds, the busiest first."""
    found: dict[tuple[str, str], tuple[int, float]] = {}
    for trial in trials:
        if trial.worker is not None:
            key = trial.worker, trial.device or ""
            count, seconds = found.get(key, (0, 0.0))
            found[key] = count + 1, seconds + (trial.held_s or 0.0)
    rows = [(worker, device, count, seconds) for (worker, device), (count, seconds) in found.items()]
    return sorted(rows, key=lambda row: (-row[3], row[0]))


def _best_trials(facts: Facts) -> list[TrialFact]:
    """Complete trials, the best values first."""
    sign = -1 if facts.asked.maximize else 1
    found = [trial for trial in facts.trials if trial.counts and trial.value is not None]
    return sorted(found, key=lambda trial: (sign * (trial.value or 0.0), trial.number))[:TRIALS_SHOWN]


def _varied(trials: Sequence[TrialFact]) -> list[str]:
    """Names of the parameters that are not the same in all of these."""
    names = dict.fromkeys(name for trial in trials for name in trial.params)
    return [name for name in names if any(trial.params.get(name) != trials[0].params.get(name) for trial in trials)]


def _failures(trials: Sequence[TrialFact]) -> list[tuple[str, int]]:
    """Reasons with how many trials gave them, the most frequent first."""
    found: dict[str, int] = {}
    for trial in trials:
        if trial.state == "failed":
            reason = trial.failure or "no reason was recorded"
            found[reason] = found.get(reason, 0) + 1
    return sorted(found.items(), key=lambda item: (-item[1], item[0]))[:FAILURES_SHOWN]


def _parts(model: ModelFact | None) -> list[tuple[str, Any, list[Any]]]:
    """Name, scores and classes (the surest failures first) of each part of the data that the model has scores of."""
    if model is None:
        return []
    parts = {"test": model.scores.test, "validation": model.scores.validation}
    return [(name, part, worst_first(part.by_class)) for name, part in parts.items() if part is not None]


def _scores(model: ModelFact | None) -> list[tuple[str, list[tuple[str, Scores]]]]:
    """Metric by metric, the tuned one first, the parts that were scored."""
    if model is None:
        return []
    parts = {"test": model.config.test, "validation": model.config.validation}
    known = [(name, scores) for name, scores in parts.items() if scores is not None]
    names = [model.config.metric, *(name for name in METRICS if name != model.config.metric)]
    return [(name, known) for name in names if any(name in {**s.metrics, **s.undefined} for _, s in known)]
