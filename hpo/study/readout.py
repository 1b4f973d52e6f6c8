"""What a launch has read, in a line or two, and what about it makes a score too good to be true.

The cheapest guard against swapped axes, an index taken for a feature, a class that is a typing error.
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np

from hpo.models.data.buffers import pieces_of
from hpo.models.data.sequences import Sequences, valid_steps
from hpo.models.data.time_order import span
from hpo.study.config import DataSection, Folds
from hpo.study.plan import Plan
from hpo.study.portfolio import LEARNING

MANY = 10  # names listed at most


def readout(plan: Plan, train: Sequences, test: Sequences | None) -> list[str]:
    """Sizes, features, classes with their counts, gaps, groups, parts, the distance of steps, the positive class, and
    what the sampler does not learn."""
    lines = [f"training part: {'; '.join([_sizes(train), *_absent(plan, train)])}"]
    if test is not None:
        lines.append(f"test part: {'; '.join([_sizes(test), *_absent(plan, test)])}")
    about = [f"features {_listed(train.features)}", f"validation on {_validation(plan.config.data)}"]
    if plan.interval:
        about.append(f"steps are usually {plan.interval:g} apart (dates: in seconds)")
    if len(train.classes) == 2:
        about.append(f"{train.classes[1]!r} is the positive class of f1, auroc and average_precision")
    return [*lines, "; ".join(about), *_limits(plan)]


def _limits(plan: Plan) -> list[str]:
    """That a limit does not steer the search. Of size it always does: what is too large is drawn again."""
    sampler = plan.config.study.sampler
    if plan.config.limits.latency_ms is None or sampler in LEARNING:
        return []
    return [f'sampler "{sampler}" does not learn from limits.latency_ms: slower trials are drawn, and not promoted']


def _validation(data: DataSection) -> str:
    """What validates, and by which column it is later than what trains."""
    ordered = data.time is not None
    if isinstance(data.validation, Folds):
        parts = f"{data.validation.folds} {'rolling ' * ordered}folds"
    else:
        parts = f"{'the latest' if ordered else 'a'} share of {data.validation:g}"
    gap = "" if not data.gap else f"{data.gap} sequences" if isinstance(data.gap, int) else _duration(data.gap)
    return parts + f" by {data.time!r}" * ordered + f", {gap} before it left out" * bool(gap)


def _duration(seconds: float) -> str:
    """As in a study file: 604800 s are 7d."""
    sizes = {"d": 86400, "h": 3600, "m": 60, "s": 1}
    unit = next((unit for unit, size in sizes.items() if seconds % size == 0), "s")
    return f"{seconds / sizes[unit]:g}{unit}"


def suspicions(train: Sequences, test: Sequences | None) -> list[str]:
    """Leaks from the label or the training part into what is to be scored, each with what to do."""
    found = [
        f"feature {name!r} is one value in each sequence and tells the class of every one: is it the label under "
        "another name? Leave it out of the file"
        for feature, name in enumerate(train.features)
        if _tells_the_label(train, feature)
    ]
    if test is None:
        return found
    common = len(_contents(test) & _contents(train))
    if common:
        found.append(f"{common} of the test part's sequences are in the training part too: its score will be too good")
    both = _groups(test) & _groups(train)
    if both:
        found.append(
            f"{len(both)} of the test part's {len(_groups(test))} groups are in the training part too "
            f"({_listed(tuple(sorted(both)))}): its score says nothing of groups that the model has not seen"
        )
    return found


def _sizes(part: Sequences) -> str:
    shortest, longest = int(part.lengths.min()), int(part.lengths.max())
    steps = f"{longest}" if shortest == longest else f"{shortest} to {longest}"
    noun = "feature" if part.n_features == 1 else "features"
    text = [f"{part.n} sequences of {steps} steps, {part.n_features} {noun}"]
    if part.labels is not None:
        counts = np.bincount(part.labels, minlength=len(part.classes)).tolist()
        names = [f"{name} {count}" for name, count in zip(part.classes, counts, strict=True)]
        text.append("classes " + ", ".join(names[:MANY]) + (f" and {len(names) - MANY} more" * (len(names) > MANY)))
    if part.groups is not None:
        text.append(f"{len(np.unique(part.groups))} groups")
    if part.moments is not None:
        text.append(f"from {span(part)}")
    if part.weights is not None:
        text.append(f"weights from {part.weights.min():g} to {part.weights.max():g}")
    text.append(f"{part.filled if part.missing is None else part.missing.sum()} missing values filled")
    return "; ".join(text)


def _absent(plan: Plan, part: Sequences) -> list[str]:
    """Features that some of the sequences lack throughout, and what stands there."""
    if not part.absent.any():
        return []
    fill, counts = plan.fill or (0.0,) * len(plan.features), part.absent.sum(axis=0).tolist()
    rows = zip(plan.features, counts, fill, strict=True)
    texts = [f"{name!r} in {count} ({value:.6g})" for name, count, value in rows if count]
    rest = f" and {len(texts) - MANY} more" * (len(texts) > MANY)
    mean = "0" if plan.fill is None else "its mean over the training part"
    return [f"a feature that a sequence lacks throughout is {mean}: {', '.join(texts[:MANY])}{rest}"]


def _listed(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - MANY} more" if len(names) > MANY else ""
    return ", ".join(map(repr, names[:MANY])) + more


def _groups(part: Sequences) -> set[str]:
    """The names of its groups."""
    return set() if part.groups is None else {part.group_names[code] for code in np.unique(part.groups)}


def _contents(part: Sequences) -> set[bytes]:
    """What stands for the content of each sequence: equal ones have the same digest."""
    rows = (part.values[i, :length].tobytes() for i, length in enumerate(part.lengths.tolist()))
    return {blake2b(row, digest_size=16).digest() for row in rows}


def _tells_the_label(part: Sequences, feature: int) -> bool:
    """Whether the feature is constant in each sequence, and each of its values stands for one class."""
    assert part.labels is not None
    for some in pieces_of(part.values):
        values = part.values[some, :, feature]
        inside = valid_steps(part.lengths[some], part.steps)
        if ((values != values[:, :1]) & inside).any():
            return False
    pairs = {
        (value, label) for value, label in zip(part.values[:, 0, feature].tolist(), part.labels.tolist(), strict=True)
    }
    values_seen = {value for value, _ in pairs}
    return len(pairs) == len(values_seen) == len(set(part.labels.tolist())) > 1
