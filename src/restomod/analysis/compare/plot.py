"""Plot of a comparison: mean curve of every group, curves of its runs, target loss and published losses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from restomod.analysis.compare.axes import LABELS, Axis, loss_curve
from restomod.analysis.compare.groups import Comparison
from restomod.analysis.compare.tables import why_not_published
from restomod.evals.tasks.registry import references
from restomod.utils.figures import INK, new_figure, quiet, write_figure
from restomod.utils.redaction import redact

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#2a6fbb", "#d1495b", "#3c8d53", "#8a5fbf", "#d98e04", "#3aa6a6", "#7a5c3e", "#c2559d")
BEGINNING = 0.1  # share of the axis, at its start, whose losses may exceed the limits of the plot


def draw_comparison(found: Comparison, axes: Sequence[Axis], path: Path) -> None:
    """Draw the curves of a comparison as a PNG file with one panel per axis.

    Args:
        found: comparison to draw.
        axes: axes of the panels.
        path: PNG file to write.

    Raises:
        UserError: the file cannot be written.
    """
    write_figure(comparison_figure(found, axes), path)


def comparison_figure(found: Comparison, axes: Sequence[Axis]) -> Figure:
    """Return the figure of a comparison, with one panel per axis, without writing it."""
    columns = 2 if len(axes) == 4 else min(3, len(axes))
    rows = -(-len(axes) // columns)
    figure = new_figure(found.measure, 8 if len(axes) == 1 else 5.2 * columns, 5 * rows)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel, axis in zip(panels, axes, strict=False):
        _draw(found, axis, panel)
    for panel in panels[len(axes) :]:
        panel.set_axis_off()
    if panels[0].get_legend_handles_labels()[0]:
        for text in panels[0].legend(frameon=False).get_texts():
            text.set_parse_math(False)
    return figure


def _draw(found: Comparison, axis: Axis, panel: Axes) -> None:
    from matplotlib.ticker import EngFormatter

    late: list[float] = []
    for i, group in enumerate(found.groups):
        colour, mean = COLOURS[i % len(COLOURS)], found.mean(i, axis)
        if not len(mean.x):
            continue
        if len(group.runs) > 1:
            for run in group.runs:
                one = loss_curve(run, found.measure, axis, found.price)
                panel.plot(one.x, one.loss, color=colour, linewidth=0.6, alpha=0.4)
        marker = "o" if len(mean.x) <= 30 else ""
        label = f" {redact(group.name)}"[:60]  # matplotlib hides labels that begin with an underscore
        panel.plot(mean.x, mean.loss, color=colour, marker=marker, markersize=3, label=label)
        late += mean.loss[mean.x >= mean.x[0] + BEGINNING * (mean.x[-1] - mean.x[0])].tolist()
    if found.target is not None:
        panel.axhline(found.target, color=INK, linewidth=0.7, linestyle="--", label=f"target {found.target:.4f}")
        late.append(found.target)
    if found.measure == "validation loss" and why_not_published([r for g in found.groups for r in g.runs]) is None:
        for reference in references("validation"):
            panel.axhline(reference.value, color="#999999", linewidth=0.7, linestyle=":")
            panel.annotate(
                reference.model, (0.99, reference.value), xycoords=("axes fraction", "data"), ha="right", size=7
            )
            late.append(reference.value)
    if late:
        low, high = float(np.min(late)), float(np.max(late))
        margin = 0.05 * (high - low) or 0.1
        panel.set_ylim(low - margin, high + margin)
    if axis in ("steps", "tokens", "flops"):
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))  # 1.5M
    panel.set_xlabel(LABELS[axis])
    panel.set_ylabel(f"{found.measure}, nats per token")
    quiet(panel)
