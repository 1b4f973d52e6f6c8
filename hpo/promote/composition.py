"""What a model is made of: one trial's networks, a finalist's repeats, or several finalists' by weight."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from hpo.models.data.sequences import Sequences
from hpo.models.estimate import Estimate
from hpo.promote.ensemble import select
from hpo.promote.finals import estimate
from hpo.promote.trained import Trained, mixed, pooled
from hpo.promote.weights import trained_networks
from hpo.storage.artifacts import ArtifactStore
from hpo.study.finals import Finalist, finalists_of
from hpo.study.lifecycle import OpenStudy, open_study
from hpo.study.limits import FIGURES
from hpo.study.record import TrialRecord


@dataclass(frozen=True)
class Share:
    """A configuration's part in a model."""

    record: TrialRecord  # of its trial in the study
    repeats: Mapping[int, TrialRecord]  # of its trainings in the finals; empty: the trial's own
    networks: int
    weight: float = 1.0  # of their mean in the probabilities


@dataclass(frozen=True, eq=False)
class Composition:
    """A model before it is calibrated."""

    trained: Trained  # the networks of all shares, one after the other
    shares: tuple[Share, ...]  # that of the promoted trial first
    estimate: Estimate | None = None  # of that one's configuration; None without finals


def compose(
    study: OpenStudy,
    store: ArtifactStore,
    record: TrialRecord,
    finalist: Finalist | None,
    sequences: Sequences,
    device: str,
) -> Composition:
    """Of a trial's networks or, with finals, of what `[promote] ensemble` asks for: the winner's repeats, these and
    other finalists' by greedy selection, or the first repeat alone, which nothing was chosen by either. It is that,
    too, where all repeats together are beyond the study's limits. Raises PromotionError.
    """
    plan = study.plan
    if finalist is None:
        alone = trained_networks(plan, store, record, sequences, device)
        return Composition(alone, (Share(record, {}, len(alone.members)),))
    repeats = _repeats(study, store, finalist, sequences, device)
    if plan.config.promote.ensemble == "none" or not _admits(study, [finalist]):
        trained = repeats[min(repeats)]
        shares: tuple[Share, ...] = (Share(record, {min(repeats): finalist.first}, len(trained.members)),)
    elif plan.config.promote.ensemble == "greedy":
        trained, shares = _selected(study, store, finalist, repeats, sequences, device)
    else:
        trained = _as_one(study, repeats, sequences)
        shares = (Share(record, finalist.repeats, len(trained.members)),)
    scores = {repeat: each.scores for repeat, each in repeats.items()}
    found = estimate(finalist, finalists_of(study), plan.metric, scores, trained.scores)
    return Composition(trained, shares, found)


def _selected(
    study: OpenStudy,
    store: ArtifactStore,
    winner: Finalist,
    repeats: Mapping[int, Trained],
    sequences: Sequences,
    device: str,
) -> tuple[Trained, tuple[Share, ...]]:
    """The winner with the finalists that make it better, of those that have the same repeats."""
    first = winner.record.number
    finalists, parts = {first: winner}, {first: _as_one(study, repeats, sequences)}
    for each in finalists_of(study):
        if each.record.number != first and each.repeats.keys() == winner.repeats.keys():
            finalists[each.record.number] = each
            parts[each.record.number] = _as_one(study, _repeats(study, store, each, sequences, device), sequences)

    def admits(chosen: Collection[int]) -> bool:
        return _admits(study, [finalists[number] for number in chosen])

    weights = select(study.plan, parts, first, sequences, admits)
    shares = tuple(
        Share(finalists[number].record, finalists[number].repeats, len(parts[number].members), weight)
        for number, weight in weights.items()
    )
    return mixed(study.plan, parts, weights, sequences), shares


def _as_one(study: OpenStudy, repeats: Mapping[int, Trained], sequences: Sequences) -> Trained:
    """A finalist's repeats as one model."""
    return pooled(study.plan, repeats, sequences) if len(repeats) > 1 else repeats[min(repeats)]


def _admits(study: OpenStudy, finalists: Collection[Finalist]) -> bool:
    """Whether all repeats of these together are within the study's limits."""
    return study.limits.admit(
        {name: sum(len(each.repeats) * (getattr(each.record, name) or 0.0) for each in finalists) for name in FIGURES}
    )


def _repeats(
    study: OpenStudy, store: ArtifactStore, finalist: Finalist, sequences: Sequences, device: str
) -> dict[int, Trained]:
    """A finalist's trainings in the finals, by repeat."""
    found = study.leases.finals(study.study_id)
    assert found is not None  # or there was no finalist
    plan = open_study(found.name, study.storage).plan
    return {
        repeat: trained_networks(plan, store, record, sequences, device) for repeat, record in finalist.repeats.items()
    }
