"""Charts as SVG text, within a page or as a picture of their own. The same numbers give the same bytes.

Colours and sizes of text come from STYLE, so that they follow light and dark; within a page its own style sheet may
add to them. A chart has no script, and every text in it is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup

WIDTH, HEIGHT = 420, 250  # units of a chart's view box; text is 11 to 12 units high
LEFT, RIGHT, TOP, BOTTOM = 54, 12, 10, 40  # margins around the plot
TICKS = 5  # about so many on an axis

Point = tuple[float, float]

STYLE = """\
:root {
  --surface: #fff; --sunk: #eef0f5; --line: #d9dee8; --text: #1a202c; --muted: #566074;
  --complete: #2b5fd9; --pruned: #8aa6e6; --failed: #c2362f; --finals: #1b7f5c; --winner: #d1730a;
  --s0: #2456c9; --s1: #c25a06; --s2: #157f5b; --s3: #8b3fb8; --s4: #b02a55;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --surface: #191e27; --sunk: #222936; --line: #2e3746; --text: #e7eaf0; --muted: #a5afc0;
    --complete: #7ba4ff; --pruned: #4f69ad; --failed: #f0766d; --finals: #5fc7a0; --winner: #f0a64a;
    --s0: #8fb3ff; --s1: #f0a35e; --s2: #63cfa4; --s3: #cf9bef; --s4: #f391b1;
  }
}
.chart text { font-size: 11.5px; fill: var(--muted); }
.chart text.axis { font-size: 12px; fill: var(--text); }
.chart text.count { font-size: 11.5px; fill: var(--text); }
.chart .grid { stroke: var(--line); stroke-width: .8; fill: none; }
.line { fill: none; stroke: currentColor; stroke-width: 1.7; stroke-linejoin: round; stroke-linecap: round; }
.line.thin { stroke-width: 1.1; opacity: .75; }
.line.wide { stroke-width: 2.2; }
.dot, .box { fill: currentColor; stroke: none; }
.complete { color: var(--complete); } .pruned { color: var(--pruned); } .failed { color: var(--failed); }
.finals { color: var(--finals); } .winner { color: var(--winner); } .equal { color: var(--complete); }
.other { color: var(--muted); } .selected { color: var(--muted); }
.dot.soft, .dot.value { fill-opacity: .6; } .dot.faint { color: var(--muted); fill-opacity: .4; }
.dot.pruned { fill-opacity: .8; }
.best { color: var(--complete); opacity: .6; stroke-width: 2; }
.other-curve { color: var(--muted); opacity: .22; stroke-width: 1; }
.chance { color: var(--muted); stroke-dasharray: 4 4; stroke-width: 1; opacity: .8; }
.before { color: var(--winner); } .after { color: var(--complete); }
.dot.before { fill: var(--surface); stroke: currentColor; stroke-width: 1.4; }
.s0 { color: var(--s0); } .s1 { color: var(--s1); } .s2 { color: var(--s2); } .s3 { color: var(--s3); }
.s4 { color: var(--s4); } .s5 { color: var(--muted); }
.cell { color: var(--sunk); } .cell.right { color: var(--complete); } .cell.wrong { color: var(--failed); }
"""
ALONE = """\
svg { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
.ground { fill: var(--surface); }
.title { font-size: 14px; font-weight: 600; fill: var(--text); }
.key { font-size: 12px; fill: var(--muted); }
"""  # what a picture needs that is no page's


@dataclass(frozen=True)
class Axis:
    """One direction of a chart: a range of numbers, or places 0, 1, … with names."""

    low: float
    high: float
    label: str = ""
    log: bool = False
    names: tuple[str, ...] = ()  # of the places 0, 1, …
    ticks: tuple[float, ...] | None = None  # None: round numbers
    inverted: bool = False  # the low end at the top
    whole: bool = False  # of whole numbers, as epochs are

    @classmethod
    def over(cls, values: Iterable[float], label: str = "", *, log: bool = False, margin: float = 0.05) -> Axis:
        """Around these numbers, with a margin; log where all are above 0."""
        found = [value for value in values if math.isfinite(value)]
        low, high = (min(found), max(found)) if found else (0.0, 1.0)
        if log and low > 0:
            more = (high / low) ** margin if high > low else 2.0
            return cls(low / more, high * more, label, log=True)
        more = margin * (high - low) if high > low else 0.05 * abs(high) or 0.5
        return cls(low - more, high + more, label)

    @classmethod
    def named(cls, names: Sequence[str], label: str = "", *, inverted: bool = False) -> Axis:
        """A place for each name."""
        return cls(-0.5, len(names) - 0.5, label, names=tuple(names), inverted=inverted)

    def share(self, value: float) -> float:
        """Where a value lies, 0 to 1."""
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        share = min(max((value - low) / (high - low), 0.0), 1.0) if high > low else 0.5
        return 1 - share if self.inverted else share

    def marks(self) -> list[tuple[float, str]]:
        """Ticks with their texts."""
        if self.names:
            return [(float(i), name) for i, name in enumerate(self.names)]
        ticks = self.ticks
        if ticks is None:
            ticks = _log_ticks(self.low, self.high) if self.log else round_ticks(self.low, self.high)
        if self.whole:
            ticks = tuple(tick for tick in ticks if tick == round(tick))
        return [(value, _text(value, () if self.log else ticks)) for value in ticks]


class Chart:
    """Marks are added in the order in which they are drawn."""

    def __init__(
        self,
        x: Axis,
        y: Axis,
        says: str,
        *,
        width: float = WIDTH,
        height: float = HEIGHT,
        left: float = LEFT,
        natural: bool = False,
    ) -> None:
        """says: what the chart shows, for whoever does not see it. natural: as large as it is, not as its place."""
        self.natural = natural
        self.x, self.y, self.says = x, y, says
        self.width, self.height, self.left = width, height, left
        self.parts: list[Markup] = []

    def at(self, x: float, y: float) -> Point:
        """A point of the view box."""
        right, bottom = self.width - RIGHT, self.height - BOTTOM
        return self.left + self.x.share(x) * (right - self.left), bottom - self.y.share(y) * (bottom - TOP)

    def line(self, points: Iterable[Point], kind: str, title: str = "") -> None:
        """Straight from point to point."""
        path = "L".join("{:.1f} {:.1f}".format(*self.at(*point)) for point in points)
        if path:
            self._add('<path class="{}" d="M{}h0">{}</path>', f"line {kind}", path, _title(title))

    def steps(self, points: Sequence[Point], kind: str, end: float) -> None:
        """A line that changes only where a point is, up to `end`."""
        shown: list[Point] = []
        for x, y in points:
            shown += [(x, shown[-1][1]), (x, y)] if shown else [(x, y)]
        if shown:
            self.line([*shown, (end, shown[-1][1])], kind)

    def area(self, points: Iterable[Point], kind: str) -> None:
        """Filled between points."""
        path = "L".join("{:.1f} {:.1f}".format(*self.at(*point)) for point in points)
        self._add('<path class="{}" d="M{}Z"/>', f"area {kind}", path)

    def dot(self, x: float, y: float, kind: str, title: str = "", radius: float = 3.5) -> None:
        """A point with its name, which a pointer shows."""
        cx, cy = self.at(x, y)
        self._add(
            '<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="{:.1f}">{}</circle>',
            f"dot {kind}", cx, cy, radius, _title(title),
        )  # fmt: skip

    def cross(self, x: float, y: float, kind: str, title: str = "") -> None:
        """A cross, for what has failed."""
        cx, cy = self.at(x, y)
        path = f"M{cx - 3:.1f} {cy - 3:.1f}l6 6m0 -6l-6 6"
        self._add('<path class="{}" d="{}">{}</path>', f"line {kind}", path, _title(title))

    def span(self, low: Point, high: Point, kind: str, cap: float = 4.0) -> None:
        """An interval with caps at its ends, along the axis in which they differ."""
        (a, b), (c, d) = self.at(*low), self.at(*high)
        level = abs(d - b) < abs(c - a)
        ends = [f"M{x:.1f} {y - cap:.1f}v{2 * cap:.1f}" if level else f"M{x - cap:.1f} {y:.1f}h{2 * cap:.1f}"
                for x, y in ((a, b), (c, d))]  # fmt: skip
        self._add('<path class="{}" d="{}"/>', f"line {kind}", f"M{a:.1f} {b:.1f}L{c:.1f} {d:.1f}{''.join(ends)}")

    def box(self, low: Point, high: Point, kind: str, title: str = "", opacity: float | None = None) -> None:
        """A filled rectangle between two corners."""
        (a, b), (c, d) = self.at(*low), self.at(*high)
        shade = Markup("") if opacity is None else Markup(' fill-opacity="{:.3f}"').format(opacity)
        self._add(
            '<rect class="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"{}>{}</rect>',
            f"box {kind}", min(a, c), min(b, d), abs(c - a), abs(d - b), shade, _title(title),
        )  # fmt: skip

    def tick(self, x: float, kind: str) -> None:
        """A short stroke at the foot of the plot."""
        cx, cy = self.at(x, self.y.low)
        self._add('<path class="{}" d="M{:.1f} {:.1f}v-7"/>', f"line {kind}", cx, cy)

    def text(self, x: float, y: float, text: str, kind: str = "", anchor: str = "start", dx: float = 0.0) -> None:
        """A text at a point, its middle at that height."""
        cx, cy = self.at(x, y)
        self._add(
            '<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}" dominant-baseline="central">{}</text>',
            kind, cx + dx, cy, anchor, text,
        )  # fmt: skip

    def svg(self, at: Point | None = None) -> Markup:
        """The chart; with its upper left corner there, as large as it is, in a picture."""
        size = Markup(' width="{:g}"').format(self.width) if self.natural or at is not None else Markup("")
        if at is not None:
            size += Markup(' height="{:g}" x="{:g}" y="{:g}"').format(self.height, *at)
        return Markup('<svg class="chart" viewBox="0 0 {:g} {:g}" role="img" aria-label="{}"{}>{}{}</svg>').format(
            self.width, self.height, self.says, size, self._axes(), Markup("").join(self.parts)
        )

    def _add(self, template: str, *given: object) -> None:
        self.parts.append(Markup(template).format(*given))

    def _axes(self) -> Markup:
        left, right, bottom = self.left, self.width - RIGHT, self.height - BOTTOM
        marks: list[Markup] = []
        grid: list[str] = []
        for value, text in self.y.marks():
            y = self.at(self.x.low, value)[1]
            grid += [] if self.y.names else [f"M{left:.1f} {y:.1f}H{right:.1f}"]
            marks.append(_label(left - 6, y, text, "end", room=left - 8))
        for value, text in self.x.marks():
            x = self.at(value, self.y.low)[0]
            grid += [] if self.x.names else [f"M{x:.1f} {TOP}V{bottom:.1f}"]
            room = (right - left) / max(len(self.x.marks()), 1)
            marks.append(_label(x, bottom + 12, text, "middle", room=room))
        if self.x.label:
            marks.append(_label((left + right) / 2, self.height - 8, self.x.label, "middle", "axis"))
        return Markup('<path class="grid" d="{}"/>{}').format("".join(grid), Markup("").join(marks))


def _label(x: float, y: float, text: str, anchor: str, kind: str = "tick", room: float = math.inf) -> Markup:
    """A tick's text, cut where there is no room for it: about 6 units a letter."""
    most = max(2, int(room / 5.8)) if math.isfinite(room) else len(text)
    shown = text if len(text) <= most else f"{text[: most - 1]}…"
    whole = _title(text) if shown != text else Markup("")
    return Markup(
        '<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}" dominant-baseline="central">{}{}</text>'
    ).format(kind, x, y, anchor, shown, whole)


def _title(text: str) -> Markup:
    return Markup("<title>{}</title>").format(text) if text else Markup("")


def round_ticks(low: float, high: float, about: int = TICKS) -> tuple[float, ...]:
    """Round numbers from low to high: multiples of 1, 2 or 5 times a power of ten."""
    span = high - low
    if not span > 0:
        return (low,)
    power = 10.0 ** math.floor(math.log10(span / about))
    step = next((k * power for k in (1, 2, 5) if span / (k * power) <= about + 0.5), 10 * power)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return tuple(round(i * step, 12) for i in range(first, last + 1))


def _log_ticks(low: float, high: float) -> tuple[float, ...]:
    """Powers of ten and, where these are few, their doubles and fives."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5)):
        found = tuple(k * 10.0**power for power in powers for k in factors if low <= k * 10.0**power <= high)
        if len(found) >= 3:
            return found[:: 1 + len(found) // (TICKS + 2)]
    return round_ticks(low, high)


def _text(value: float, ticks: Sequence[float]) -> str:
    """A tick's number, with as many digits as tell these ticks apart; without any, with its own."""
    if value == 0:
        return "0"
    if abs(value) >= 1e5 or abs(value) < 1e-4:
        return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e").replace(".0e", "e")
    gaps = [abs(b - a) for a, b in pairwise(ticks)]
    least = min(gaps, default=abs(value)) or abs(value)
    digits = max(0, -math.floor(math.log10(min(least, abs(value))) + 1e-9))
    return f"{value:,.{min(digits, 6)}f}"


@dataclass(frozen=True)
class Panel:
    """A chart of a picture, below its title and a line for each kind of mark."""

    title: str
    chart: Chart
    keys: tuple[tuple[str, str], ...] = ()  # kind and what it is


def picture(panels: Sequence[Panel]) -> bytes:
    """One SVG file with these charts, one below the other."""
    parts: list[Markup] = []
    edge, y = 12.0, 0.0
    for panel in panels:
        y += edge + 12
        parts.append(Markup('<text class="title" x="{:g}" y="{:g}">{}</text>').format(edge, y, panel.title))
        for kind, text in panel.keys:
            y += 18
            dot = Markup('<circle class="dot {}" cx="{:g}" cy="{:g}" r="4"/>').format(kind, edge + 5, y - 4)
            parts.append(dot + Markup('<text class="key" x="{:g}" y="{:g}">{}</text>').format(edge + 16, y, text))
        y += 8
        parts.append(panel.chart.svg((0, y)))
        y += panel.chart.height
    texts = [8.2 * len(panel.title) for panel in panels] + [16 + 6.6 * len(key) for p in panels for _, key in p.keys]
    width = max([panel.chart.width for panel in panels] + [2 * edge + text for text in texts])
    whole = Markup(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {0:g} {1:g}" width="{0:g}" height="{1:g}">'
        '<style>{2}{3}</style><rect class="ground" width="100%" height="100%"/>{4}</svg>\n'
    ).format(width, y, Markup(STYLE), Markup(ALONE), Markup("").join(parts))
    return whole.encode()


def spark(lines: Sequence[Sequence[float]], says: str, width: float = 300, height: float = 110) -> Markup:
    """Lines over their steps, each over its own range, without axes."""
    parts = []
    for i, line in enumerate(lines):
        found = [value for value in line if math.isfinite(value)]
        if not found:
            continue
        low, high, end = min(found), max(found), max(len(line) - 1, 1)
        points = (
            f"{4 + (width - 8) * step / end:.1f} "
            f"{4 + (height - 8) * (1 - ((value - low) / (high - low) if high > low else 0.5)):.1f}"
            for step, value in enumerate(line)
            if math.isfinite(value)
        )
        parts.append(Markup('<path class="line s{}" d="M{}h0"/>').format(i, "L".join(points)))
    return Markup('<svg class="spark" viewBox="0 0 {:g} {:g}" role="img" aria-label="{}">{}</svg>').format(
        width, height, says, Markup("").join(parts)
    )
