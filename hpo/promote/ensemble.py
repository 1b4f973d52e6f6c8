"""Which finalists predict together: greedy selection with replacement (Caruana, Niculescu-Mizil, Crew and Ksikes,
Ensemble selection from libraries of models, ICML 2004)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence

from hpo.models.data.sequences import Sequences
from hpo.models.metrics import score
from hpo.promote.trained import Trained, averages, threshold_of
from hpo.study.plan import Plan
from hpo.study.ranking import Score, rank

ROUNDS = 20  # so that a configuration's weight is a multiple of a twentieth or more


def select(
    plan: Plan,
    candidates: Mapping[int, Trained],
    first: int,
    sequences: Sequences,
    admits: Callable[[Collection[int]], bool] = lambda chosen: True,
) -> dict[int, float]:
    """The weights of the candidates that predict together, by number, the first one's first; they sum to 1.

    From `first` on, each round adds the candidate, again perhaps, with which the mean of the probabilities is the best
    by the rule for trials; of all rounds the best mean is taken, of equal ones the earliest. So the mean is never
    worse than `first` by that rule. candidates: have validated on the same sequences, each by networks that have not
    trained on it. admits: whether so many different ones may be one model.
    """
    chosen, scores = [first], [_score(plan, candidates, [first], sequences)]
    while len(chosen) < ROUNDS:
        options = [number for number in candidates if admits({*chosen, number})]
        if not options:
            break
        found = {number: _score(plan, candidates, [*chosen, number], sequences) for number in options}
        chosen.append(rank(found, plan.metric, plan.resolution)[0])
        scores.append(found[chosen[-1]])
    rounds = rank(dict(enumerate(scores)), plan.metric, plan.resolution)[0] + 1
    counts = Counter(chosen[:rounds])
    return {number: count / rounds for number, count in counts.items()}


def _score(plan: Plan, candidates: Mapping[int, Trained], chosen: Sequence[int], sequences: Sequences) -> Score:
    """Value and log-loss of the mean of these, one for each time that it is among them."""
    weights = {number: count / len(chosen) for number, count in Counter(chosen).items()}
    first = candidates[chosen[0]]
    probabilities = averages(candidates, weights)
    assert sequences.labels is not None
    labels = sequences.labels[first.rows]
    rows = None if sequences.weights is None else sequences.weights[first.rows]
    threshold = threshold_of(plan, first, probabilities, sequences)
    value = score(plan.metric, probabilities, labels, threshold, rows)
    return value, score("log_loss", probabilities, labels, threshold, rows)
