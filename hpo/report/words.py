"""Numbers, durations and times as people read them, for the report and the service's pages."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from typing import Any

from markupsafe import Markup

NONE = "–"  # what is not known


def number(value: float | None) -> str:
    """Four digits that count."""
    if value is None or math.isnan(value):
        return NONE
    return f"{value:.4f}" if 1e-3 <= abs(value) < 1e3 or value == 0 else f"{value:.4g}"


def plain(value: Any) -> str:
    """A parameter's value."""
    return f"{value:.3g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)


def lasted(seconds: float | None) -> str:
    """A duration, in its two largest units."""
    if seconds is None:
        return NONE
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, hours, days = int(seconds // 60), int(seconds // 3600), int(seconds // 86400)
    if days:
        return f"{days} d {hours % 24} h"
    return f"{hours} h {minutes % 60} min" if hours else f"{minutes} min {int(seconds) % 60} s"


def moment(at: datetime | None) -> str:
    """A time, in UTC."""
    return NONE if at is None else f"{at.astimezone(UTC):%Y-%m-%d %H:%M} UTC"


def counted(count: int, noun: str, many: str | None = None) -> str:
    """A number of things."""
    return f"{count:,} {noun if count == 1 else many or noun + 's'}"


def percent(share: float | None) -> str:
    """A share of 0 to 1."""
    return NONE if share is None else f"{100 * share:.0f} %"


def words(name: str) -> Markup:
    """A name that may be broken after its underscores."""
    return Markup("_<wbr>").join(name.split("_"))


FILTERS = {  # of the templates
    each.__name__: each for each in (number, plain, lasted, moment, counted, percent, words)
}
