"""Plots of measurements: advantage of restomod over every peer with intervals, and curves over time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.ratios import Ratio, advantage, ratio_of
from benchmarks.records import Item
from benchmarks.table import machine, number
from restomod.utils.figures import INK, new_figure, quiet, write_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BETTER, WORSE = "#1b7f4d", "#b3402a"


def advantages(items: dict[str, Item]) -> list[tuple[str, Ratio]]:
    """Return a label and restomod's advantage, above 1 if restomod is better, for every peer and metric."""
    found = []
    for item in items.values():
        for comparison in item.comparisons:
            for metric in comparison.metrics:
                for entry in comparison.entries[1:]:
                    ratio = ratio_of(entry, metric) if entry.absent is None else None
                    if ratio is not None:
                        label = f"{item.title}, {comparison.case}: {metric.name}, compared with {entry.name}"
                        found.append((label, advantage(ratio, metric)))
    return found


def draw(items: dict[str, Item], path: Path) -> None:
    """Write a PNG file, or no file if there is nothing to draw.

    Raises:
        UserError: the file cannot be written.
    """
    ratios, series = advantages(items), [one for item in items.values() for one in item.series]
    if not ratios and not series:
        return
    heights = ([0.6 + 0.24 * len(ratios)] if ratios else []) + [2.2] * len(series)
    subject = "Advantage of restomod (above 1: better), median and 95 % interval" if ratios else "restomod"
    figure = new_figure(subject, 12, 1 + sum(heights))
    every = figure.subplots(len(heights), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    if ratios:
        _forest(every[0], ratios)
    for axes, one in zip(every[len(ratios) > 0 :], series, strict=True):
        axes.plot(*zip(*one.points, strict=True), color=INK, linewidth=1, label="restomod")
        if one.published:
            axes.plot(*zip(*one.published, strict=True), "o", color=WORSE, markersize=4, label="published")
            axes.legend(fontsize=7, frameon=False)
        axes.set(title=one.case, xlabel=one.x, ylabel=one.y, ylim=(0, 1.1 * max(y for _, y in one.points) or 1))
        quiet(axes)
    about = machine(next(iter(items.values())).environment).split(", `")[0]
    figure.text(0.01, 0, about, fontsize=7, color=INK, va="bottom", parse_math=False)
    write_figure(figure, path)


def _forest(axes: Axes, ratios: list[tuple[str, Ratio]]) -> None:
    for y, (_, ratio) in enumerate(reversed(ratios)):
        low, high, color = ratio.median, ratio.median, INK
        if ratio.low is not None and ratio.high is not None:  # one round has no interval
            low, high = ratio.low, ratio.high
            color = BETTER if low > 1 else WORSE if high < 1 else INK
        axes.plot([low, high], [y, y], color=color, linewidth=2, solid_capstyle="butt")
        axes.plot(ratio.median, y, "o", color=color, markersize=5)
        axes.annotate(number(ratio.median), (high, y), (5, 0), textcoords="offset points", va="center", fontsize=7)
    axes.axvline(1, color=INK, linewidth=1)
    axes.set_xscale("log")
    axes.set_yticks(range(len(ratios)), [label for label, _ in reversed(ratios)], fontsize=7, parse_math=False)
    axes.set_ylim(-0.7, len(ratios) - 0.3)
    axes.xaxis.set_major_formatter("{x:g}")
    quiet(axes)
