"""A trial's networks as they were scored, and several of the same configuration as one model."""

from __future__ import annotations

from collections.abc import Mapping
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

    members: list[Weights]  # of the model: one a fold; of rolling folds the last one alone
    scores: Scores  # on validation
    rows: Rows  # (n,) of the training part that were validated on
    probabilities: NDArray[np.float64]  # (n, K) each by a network that has not trained on that sequence
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
    assert sequences.labels is not None
    first = repeats[min(repeats)]
    count = np.zeros(sequences.n)
    total = np.zeros((sequences.n, first.probabilities.shape[1]))
    for each in repeats.values():
        np.add.at(count, each.rows, 1)
        np.add.at(total, each.rows, each.probabilities)
    rows = np.flatnonzero(count)
    probabilities = total[rows] / count[rows, None]
    threshold = first.threshold
    if first.chosen:
        weights = None if sequences.weights is None else sequences.weights[rows]
        threshold = choose_threshold(probabilities, sequences.labels[rows], plan.metric, weights)
    together = Trained(
        members=[member for each in repeats.values() for member in each.members],
        scores=_scored(sequences, rows, probabilities, threshold, first.seed),
        rows=rows,
        probabilities=probabilities,
        threshold=threshold,
        chosen=first.chosen,
        seed=first.seed,
    )
    return decided(plan, together, sequences)


def decided(plan: Plan, trained: Trained, sequences: Sequences) -> Trained:
    """With the threshold at which decisions cost least, where the study says what wrong ones cost. Like one that a
    trial chooses, it is chosen by the probabilities that it is scored by."""
    if plan.config.promote.costs is None:
        return trained
    assert sequences.labels is not None
    weights = None if sequences.weights is None else sequences.weights[trained.rows]
    threshold = choose_threshold(
        trained.probabilities, sequences.labels[trained.rows], plan.config.promote.costs, weights
    )
    scores = _scored(sequences, trained.rows, trained.probabilities, threshold, trained.seed)
    return replace(trained, threshold=threshold, scores=scores)


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
