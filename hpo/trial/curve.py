"""A trial's learning curve: its numbers, and a small SVG picture drawn in well under a millisecond."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from hpo.models.training.training import Epoch
from hpo.study.record import Curve

WIDTH, HEIGHT, MARGIN = 640, 360, 48
COLOURS = {"value": "#1f77b4", "train_loss": "#ff7f0e", "log_loss": "#2ca02c"}


def curve_of(history: Sequence[Epoch]) -> Curve:
    """A training's numbers by name, one an epoch."""
    return {name: [getattr(epoch, name) for epoch in history] for name in ("value", "train_loss", "log_loss")}


def curve_svg(curves: Mapping[str, Sequence[float]], best_epoch: int, metric: str) -> str:
    """Per-epoch numbers by name, each drawn over its own range; the best epoch is marked by a dashed line."""
    epochs = max(len(curve) for curve in curves.values())
    x = [MARGIN + (WIDTH - 2 * MARGIN) * (i / max(epochs - 1, 1)) for i in range(epochs)]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" '
        f'font-size="12"><rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<line x1="{x[best_epoch - 1]:.1f}" x2="{x[best_epoch - 1]:.1f}" y1="{MARGIN}" y2="{HEIGHT - MARGIN}" '
        'stroke="#999" stroke-dasharray="4 3"/>',
        f'<path d="M{MARGIN} {MARGIN}V{HEIGHT - MARGIN}H{WIDTH - MARGIN}" fill="none" stroke="#333"/>',
        f'<text x="{MARGIN}" y="{HEIGHT - MARGIN + 18}">epoch 1</text>',
        f'<text x="{WIDTH - MARGIN}" y="{HEIGHT - MARGIN + 18}" text-anchor="end">epoch {epochs}</text>',
        f'<text x="{x[best_epoch - 1]:.1f}" y="{HEIGHT - 12}" text-anchor="middle">best: {best_epoch}</text>',
    ]
    for row, (name, curve) in enumerate(curves.items()):
        low, high = min(curve), max(curve)
        span = (high - low) or 1.0
        points = " ".join(
            f"{a:.1f},{HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * (b - low) / span:.1f}"
            for a, b in zip(x, curve, strict=False)
        )
        colour = COLOURS.get(name, "#777")
        title = metric if name == "value" else name.replace("_", " ")
        text = f"{title}: {low:.4g} to {high:.4g}, last {curve[-1]:.4g}"
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="{MARGIN + 8}" y="{16 + 14 * row}" fill="{colour}">{escape(text)}</text>')
    return "".join(parts) + "</svg>\n"
