"""Finals: the best configurations of a study that is over, trained again on fresh seeds and fresh splits of the data.

The best of many noisy values is too good on average (the winner's curse), the value of a training that nothing was
chosen by is not. Finals are the trials of a study of their own, NAME/finals, that workers serve like any other:
counted, leased, adopted, resumed and shown as such. Its plan says what trial 0, 1, … trains. The first repeat of all
finalists comes before the second one of any, so that finals that run out of time have whole repeats to compare.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace

from hpo.storage.terms import StudyRow, Terms
from hpo.study.config import LimitsSection
from hpo.study.lifecycle import SEARCH_SHARE, OpenStudy, finals_name, find_or_create, open_study
from hpo.study.notes import describe_study
from hpo.study.plan import Final, Plan
from hpo.study.record import TrialRecord

log = logging.getLogger("hpo")


@dataclass(frozen=True)
class Finalist:
    """A configuration in the finals."""

    record: TrialRecord  # of its trial in the study
    repeats: Mapping[int, TrialRecord]  # of its trainings that came to their end, by repeat, from 1

    @property
    def first(self) -> TrialRecord:
        """The first of these trainings."""
        return self.repeats[min(self.repeats)]


def prepare_finals(study: OpenStudy) -> OpenStudy | None:
    """The finals of a study that is over, begun or extended by what they lack; None where it has none.

    For the one that holds the study's promotion. Whatever it has done before its process was killed stays.
    """
    leases = study.leases
    row = leases.study(study.study_id)
    records = [] if row is None else _finalists(study, row.finalists)
    if not records or row is None:
        return None
    wanted = [Final(each.number, repeat, each.params) for repeat in range(1, row.repeats + 1) for each in records]
    found = leases.finals(study.study_id)
    if found is None:
        return _begin(study, row, wanted)
    finals = open_study(found.name, study.storage)
    known = {(final.trial, final.repeat) for final in finals.plan.finals}
    if missing := [final for final in wanted if (final.trial, final.repeat) not in known]:
        _extend(study, finals, row, missing)
        return open_study(found.name, study.storage)
    return finals


def _extend(study: OpenStudy, finals: OpenStudy, row: StudyRow, missing: list[Final]) -> None:
    """Let finals train more, in the space that the study has now; row: of the study."""
    plan, begun = finals.plan, finals.leases.study(finals.study_id)
    longer = replace(finals_plan(study.plan, [*plan.finals, *missing]), revision=plan.revision + 1)
    left_s = _time_left(row)
    timeout_s = None if left_s is None or begun is None else begun.elapsed_s + left_s
    budget = len(longer.finals)
    finals.leases.extend_finals(
        finals.study_id, longer.to_json(), revision=plan.revision, budget=budget, timeout_s=timeout_s
    )


def _time_left(row: StudyRow) -> float | None:
    """Seconds of a study's time that its search has left; None without a limit."""
    return None if row.timeout_s is None else max(0.0, row.timeout_s / SEARCH_SHARE - row.elapsed_s)


def _finalists(study: OpenStudy, most: int) -> list[TrialRecord]:
    """The best trials of a study, of equal configurations the first."""
    found: list[TrialRecord] = []
    for record in study.best_first():
        if len(found) == most:
            break
        if all(record.params != other.params for other in found):
            found.append(record)
    return found


def _begin(study: OpenStudy, row: StudyRow, wanted: list[Final]) -> OpenStudy:
    plan, name = finals_plan(study.plan, wanted), finals_name(study.name)
    study_id = find_or_create(study.storage, plan, name)
    describe_study(study.storage, study_id, plan.metric, plan.note())
    terms = Terms(
        budget=len(wanted),
        timeout_s=_time_left(row),
        lease_s=row.lease_s,
        stall_s=row.stall_s,
        max_attempts=row.max_attempts,
        resolution=row.resolution,
        priority=row.priority,
        max_workers=row.max_workers,
    )
    study.leases.open_study(study_id, terms, plan.to_json(), row.owner, finals_of=study.study_id)
    text = "study %s: finals of %d configurations, %d trainings each"
    repeats = max(final.repeat for final in wanted)
    log.info(text, study.name, len(wanted) // repeats, repeats)
    return open_study(name, study.storage)


def finals_plan(plan: Plan, wanted: list[Final]) -> Plan:
    """The plan of a study's finals: its own, without pruning, limits and an order of starts; it keeps the weights of
    every training."""
    study = replace(plan.config.study, pruner="none", warm_start=None, parallel=None)
    train = replace(plan.config.train, keep_best=len(wanted))
    config = replace(plan.config, study=study, train=train, enqueue=(), limits=LimitsSection())
    return replace(plan, config=config, finals=tuple(wanted), revision=0)


def finalists_of(study: OpenStudy) -> list[Finalist]:
    """The configurations in a study's finals whose trials still count, with what has come to its end; the study's best
    one first. Empty without finals."""
    row = study.leases.finals(study.study_id)
    if row is None:
        return []
    finals = open_study(row.name, study.storage)
    ended: dict[int, dict[int, TrialRecord]] = {}
    for record in finals.complete():
        final = finals.plan.finals[record.number]
        ended.setdefault(final.trial, {})[final.repeat] = record
    return [
        Finalist(record, dict(sorted(ended[record.number].items())))
        for record in study.best_first()
        if record.number in ended
    ]
