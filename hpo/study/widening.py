"""A study whose file has changed: what it goes on with. Its search space may become wider, never narrower.

All that the study has drawn must lie in the space that it goes on with, or its trials would not compare: so a range may
reach further, a list may get more choices, and what was fixed may become a range or a list that holds it. Optuna asks
that a parameter keeps its kind and its scale; new choices come after the earlier ones, so that these keep their places.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from hpo.study.config import StudyConfig, differences
from hpo.study.entries import Choices, Entry, Range, contains, only, show, size
from hpo.study.plan import Plan, StudyConflict, keeps_gaps

Change = tuple[Entry, Entry]  # an entry as it was and is


def continued(stored: Plan, plan: Plan) -> Plan:
    """The plan that a stored study goes on with under the plan of its file: the stored one, or one with a wider space.

    What neither file names stays as the study began. Raises StudyConflict with all differences that are none of these.
    """
    lines = differences(_without_space(stored), _without_space(plan))
    for name in ("train", "test"):
        if getattr(stored, name) != getattr(plan, name):
            lines.append(f"data.{name}: the content of the file differs from the one that the study began with")
    named = stored.written.space.keys() | plan.written.space.keys()
    space: dict[str, Entry] = {}
    narrower = False
    for name, old in stored.config.space.items():
        new = plan.config.space.get(name, old) if name in named else old
        if (fault := _fault(old, new)) is not None:
            narrower = True
            lines.append(f"space.{name}: stored {show(old)}, file {show(new)}: {fault}")
        space[name] = _wider(old, new)
    if not keeps_gaps(stored.rules) and contains(space["missing"], "mask"):
        lines.append("space.missing: an earlier version made the study, whose data do not say what was missing")
    for name in plan.written.space.keys() - space.keys():
        lines.append(f"space.{name}: the study was made by an earlier version, which did not have it")
    if lines:
        raise StudyConflict(_message(stored, lines, narrower=narrower))
    if space == stored.config.space:
        return stored
    fixed = {name: only(old) for name, old in stored.config.space.items() if size(old) == 1 and size(space[name]) != 1}
    return replace(
        stored,
        config=replace(stored.config, space=space),
        written=replace(stored.written, space={name: space[name] for name in plan.written.space}),
        fixed={**stored.fixed, **fixed},
        revision=stored.revision + 1,
    )


def changes(earlier: Plan, later: Plan) -> dict[str, Change]:
    """The entries of the space that differ."""
    before, after = earlier.config.space, later.config.space
    return {name: (before[name], after[name]) for name in before if before[name] != after[name]}


def shown(changed: Mapping[str, Change]) -> str:
    """Changes of a space, in one line."""
    return "; ".join(f"space.{name} from {show(old)} to {show(new)}" for name, (old, new) in changed.items())


def _without_space(plan: Plan) -> StudyConfig:
    return replace(plan.written, space={})


def _message(stored: Plan, lines: list[str], *, narrower: bool) -> str:
    name = stored.config.study.name
    begin = f', with warm_start = "{name}" to begin with those of its trials that lie in the new space' * narrower
    return (
        f"the study file contradicts the study {name!r} in the database:\n  "
        + "\n  ".join(lines)
        + f"\nchange it back, choose another [study] name{begin}, or `hpo delete` the study"
    )


def _fault(old: Entry, new: Entry) -> str | None:
    """Why an entry may not become another one; None where it may."""
    if size(old) == 1:
        value = only(old)
        return None if contains(new, value) else f"its trials have {show(value)}, which must stay in it"
    if isinstance(old, Choices):
        return _fault_of_choices(old, new)
    assert isinstance(old, Range)  # a constant has one value
    if not isinstance(new, Range):
        return "a range may be widened, not narrowed, and stays a range"
    if new.log != old.log or new.step != old.step:
        return "log and step of a range stay as they are"
    if new.low > old.low or new.high < old.high:
        return "a range may be widened, not narrowed"
    return None if contains(new, old.low) else "a wider range goes on in the steps of the earlier one"


def _fault_of_choices(old: Choices, new: Entry) -> str | None:
    if not isinstance(new, Choices):
        return "a list of choices may get more of them, none less, and stays a list"
    gone = [show(value) for value in old.values if value not in new.values]
    return f"a list of choices may get more of them, none less: {', '.join(gone)} is missing" if gone else None


def _wider(old: Entry, new: Entry) -> Entry:
    """The entry to go on with: the old one where the new one says the same in another way or order."""
    if size(new) == size(old) == 1:
        return old
    if isinstance(old, Choices) and isinstance(new, Choices):
        return Choices((*old.values, *(value for value in new.values if value not in old.values)))
    return new
