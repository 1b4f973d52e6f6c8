"""A trial's networks as they were scored, and those of several trials as one model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from hpo.models.classifier import Weights
from hpo.models.data.sequences import Sequences
from hpo.models.metrics import Scores, choose_threshold, count_groups, measure, predict_labels
from hpo.models.training.training import Rows, Training
from hpo.study.plan import Plan
from hpo.study.record import TrialRecord


@dataclass(frozen=True, eq=False)
class Trained:
    """Networks, and what they say of the sequences that they validated on."""

    members: list[Weights]  # of the model: one a fold and training; of rolling folds the last one alone
    scores: Scores  # on validation
    rows: Rows  # (n,) of the training part that were validated on
    probabilities: NDArray[np.float64]  # (n, K) each by networks that have not trained on that sequence
    threshold: float
    chosen: bool  # the threshold was chosen by these probabilities
    seed: int

    @classmethod
    def of(cls, plan: Plan, record: TrialRecord, training: Training, sequences: Sequences) -> Trained:
        """A training of these sequences whose best weights are loaded."""
        last = plan.config.data.time is not None  # it alone has trained on all but the latest sequences
        members, probabilities = training.weights(), training.validate()
        return cls(
            members=members[-1:] if last else members,
            scores=_scored(sequences, training.validated, probabilities, record.threshold, record.seed),
            rows=training.validated,
            probabilities=probabilities,
            threshold=record.threshold,
            chosen=record.params.get("threshold") == "chosen",
            seed=record.seed,
        )


def pooled(plan: Plan, repeats: Mapping[int, Trained], sequences: Sequences) -> Trained:
    """Repeats of one configuration as one model: the networks of all, whose probabilities are averaged.

    Each sequence that any has validated on is scored by the mean of those that have: by networks that have not trained
    on it. A threshold that is chosen is chosen by these means.
    """
    first = repeats[min(repeats)]
    count = np.zeros(sequences.n)
    total = np.zeros((sequences.n, first.probabilities.shape[1]))
    for each in repeats.values():
        np.add.at(count, each.rows, 1)
        np.add.at(total, each.rows, each.probabilities)
    rows = np.flatnonzero(count)
    return _together(plan, list(repeats.values()), rows, total[rows] / count[rows, None], sequences)


def mixed(plan: Plan, parts: Mapping[int, Trained], weights: Mapping[int, float], sequences: Sequences) -> Trained:
    """Several configurations that have validated on the same sequences as one model, the first part's threshold chosen
    anew if it was chosen. weights: by the same numbers, of each one's probabilities in the mean; they sum to 1."""
    chosen = [parts[number] for number in weights]
    return _together(plan, chosen, chosen[0].rows, averages(parts, weights), sequences)


def averages(parts: Mapping[int, Trained], weights: Mapping[int, float]) -> NDArray[np.float64]:
    """(n, K) weighted means of the probabilities of parts that have validated on the same sequences."""
    rows = parts[next(iter(weights))].rows
    assert all(np.array_equal(parts[number].rows, rows) for number in weights)
    found: NDArray[np.float64] = sum(weight * parts[number].probabilities for number, weight in weights.items())  # type: ignore[assignment]
    return found


def _together(
    plan: Plan, parts: Sequence[Trained], rows: Rows, probabilities: NDArray[np.float64], sequences: Sequences
) -> Trained:
    """The networks of all parts, which say this of those rows together; otherwise as the first part."""
    found = replace(parts[0], rows=rows, members=[member for each in parts for member in each.members])
    threshold = threshold_of(plan, found, probabilities, sequences)
    scores = _scored(sequences, rows, probabilities, threshold, found.seed)
    return replace(found, probabilities=probabilities, threshold=threshold, scores=scores)


def threshold_of(plan: Plan, like: Trained, probabilities: NDArray[np.float64], sequences: Sequences) -> float:
    """The threshold on these probabilities (n, K) of a model whose rows and whose way to a threshold are another's:
    where decisions cost least if the study says what wrong ones cost, else where the metric is best if that one's was
    chosen so, else that one's."""
    aim = plan.config.promote.costs or (plan.metric if like.chosen else None)
    if aim is None:
        return like.threshold
    assert sequences.labels is not None
    weights = None if sequences.weights is None else sequences.weights[like.rows]
    return choose_threshold(probabilities, sequences.labels[like.rows], aim, weights)


def decided(plan: Plan, trained: Trained, sequences: Sequences) -> Trained:
    """With the threshold at which decisions cost least, where the study says what wrong ones cost. Like one that a
    trial chooses, it is chosen by the probabilities that it is scored by."""
    if plan.config.promote.costs is None:
        return trained
    return _together(plan, [trained], trained.rows, trained.probabilities, sequences)


def _scored(
    sequences: Sequences, rows: Rows, probabilities: NDArray[np.float64], threshold: float, seed: int
) -> Scores:
    """What probabilities (n, K) of these rows are worth, by group too."""
    assert sequences.labels is not None
    labels = sequences.labels[rows]
    weights = None if sequences.weights is None else sequences.weights[rows]
    groups = None if sequences.groups is None else sequences.groups[rows]
    right = predict_labels(probabilities, threshold) == labels
    scores = measure(probabilities, labels, threshold, seed, weights=weights)
    return replace(scores, groups=count_groups(right, groups, sequences.group_names))
