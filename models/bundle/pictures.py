"""The charts of a saved model, which its card and the study's report show."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from hpo.models.calibration import Comparison, Reliability
from hpo.models.charts import Axis, Chart, Panel, picture
from hpo.models.metrics import proportion_interval

COUNTS_SHOWN = 14  # classes up to which the confusion matrix shows its numbers …
NAMES_SHOWN = 60  # … every name, at the rows …
MATRIX_MOST = 200  # … and up to which it is drawn
HALF = 0.5


def curves(curve: Mapping[str, Sequence[float]], best_epoch: int, metric: str) -> bytes:
    """SVG: losses and the validation metric over the epochs, the best epoch marked."""
    kinds = {"train_loss": ("s0", "training loss"), "log_loss": ("s1", "validation log-loss")}
    losses = [(kind, text, _points(curve[name])) for name, (kind, text) in kinds.items() if name in curve]
    values, best = _points(curve["value"]), curve["value"][best_epoch - 1]
    epochs = len(curve["value"])
    above = _over_epochs(losses, epochs, best_epoch, "losses by epoch")
    below = _over_epochs([("s2", metric, values)], epochs, best_epoch, f"validation {metric} by epoch")
    below.dot(best_epoch, best, "winner", f"epoch {best_epoch}: {best:.4f}", 4.5)
    panels = (
        Panel("Losses", above, tuple((kind, text) for kind, text, _ in losses)),
        Panel(f"Validation {metric}", below, (("winner", f"epoch {best_epoch}, whose weights were kept: {best:.4f}"),)),
    )
    return picture(panels)


def _over_epochs(
    lines: Sequence[tuple[str, str, list[tuple[float, float]]]], epochs: int, best_epoch: int, says: str
) -> Chart:
    values = [value for _, _, points in lines for _, value in points]
    chart = Chart(Axis(1, max(epochs, 2), "epoch", whole=True), Axis.over(values), says)
    chart.line([(best_epoch, chart.y.low), (best_epoch, chart.y.high)], "chance")
    for kind, text, points in lines:
        chart.line(points, kind, text)
    return chart


def _points(values: Sequence[float]) -> list[tuple[float, float]]:
    return [(epoch, value) for epoch, value in enumerate(values, 1) if math.isfinite(value)]


def confusion_picture(counts: Sequence[Sequence[int]], classes: Sequence[str], part: str) -> bytes | None:
    """SVG of the matrix; None for too many classes."""
    chart = confusion(counts, classes, part)
    if chart is None:
        return None
    keys = (("cell right", "right"), ("cell wrong", "taken for another; the stronger, the more of its row"))
    return picture([Panel(f"Confusion matrix, {part} part: a row for each true class", chart, keys)])


def confusion(counts: Sequence[Sequence[int]], classes: Sequence[str], part: str) -> Chart | None:
    """Counts (K, K), row = true class, shaded by their share of the row; None for too many classes."""
    K = len(classes)
    if K > MATRIX_MOST:
        return None
    few, named = K <= COUNTS_SHOWN, K <= NAMES_SHOWN
    right, total = sum(counts[k][k] for k in range(K)), max(sum(map(sum, counts)), 1)
    says = f"confusion matrix of the {part} part: {right} of {total} sequences get their class; the table has the rest"
    cell = max(14.0 if named else 4.0, min(84.0, 290.0 / K))
    left = min(110.0, 14 + 6 * max(map(len, classes))) if named else 12.0
    chart = Chart(
        Axis.named(classes if few else [""] * K, "predicted class" if few else "predicted class, in the rows’ order"),
        Axis.named(classes if named else [""] * K, inverted=True),
        says,
        width=left + cell * K + 12,
        height=cell * K + 50,
        left=left,
        natural=True,
    )
    chart.box((-HALF, -HALF), (K - HALF, K - HALF), "cell")
    for r, row in enumerate(counts):
        whole = max(sum(row), 1)
        for c, count in ((c, count) for c, count in enumerate(row) if count):
            title = f"{classes[r]} predicted as {classes[c]}: {count} of {sum(row)}" if named else ""
            kind = "right" if r == c else "wrong"
            chart.box((c - HALF, r - HALF), (c + HALF, r + HALF), f"cell {kind}", title, 0.06 + 0.74 * count / whole)
            if few:
                chart.text(c, r, f"{count:,}", "count", "middle")
    return chart


def reliability_picture(parts: Mapping[str, Comparison], temperature: float) -> bytes:
    """SVG: the diagram of each part, before and after the calibration with this temperature."""
    panels = []
    for part, found in parts.items():
        keys = tuple(
            (kind, f"{kind} calibration: ECE {each.ece:.3f}, Brier score {each.brier:.3f}")
            for kind, each in (("before", found.before), ("after", found.after))
        )
        panels.append(Panel(f"Share that is right, {part} part, T = {temperature:.3g}", reliability(found, part), keys))
    return picture(panels)


def reliability(found: Comparison, part: str) -> Chart:
    """How many sequences are right by how sure the model is of them, before and after calibration."""
    shown = [row for each in (found.before, found.after) for row in each.bins if row[0]]
    low = max(0.0, min([row[1] for row in shown], default=0.0) - 0.05)
    says = (
        f"reliability diagram of the {part} part: expected calibration error {found.before.ece:.3f} before and "
        f"{found.after.ece:.3f} after calibration"
    )
    chart = Chart(Axis(low, 1.0, "probability of the predicted class"), Axis(0.0, 1.0), says)
    chart.line([(low, low), (1, 1)], "chance")
    for kind, each in (("before", found.before), ("after", found.after)):
        _draw_bins(chart, kind, each)
    return chart


def _draw_bins(chart: Chart, kind: str, found: Reliability) -> None:
    rows = [row for row in found.bins if row[0]]
    chart.line([(confidence, accuracy) for _, confidence, accuracy in rows], f"{kind} thin")
    for share, confidence, accuracy in rows:
        n = share * found.number
        if kind == "after":
            low, high = proportion_interval(accuracy * n, n)
            chart.span((confidence, low), (confidence, high), f"{kind} thin", 0)
        title = f"{kind} calibration: {100 * share:.0f} % of sequences, {confidence:.3f} sure, {accuracy:.3f} right"
        chart.dot(confidence, accuracy, kind, title, 2.5 + 5 * math.sqrt(share))
