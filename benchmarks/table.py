"""Measurements as Markdown tables, computed from the raw values."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.ratios import Ratio, advantage, ahead, ratio_of
from benchmarks.records import Comparison, Entry, Item, Metric, Series

NO_RIVALS = (  # other ways of ours, floors, and what does something else
    "nothing prepared",
    "1 process, one thread each",
    "speedrun",
    "python, doing nothing",
    "import torch",
    "transformers, ready to load a GPT-2",
)


def page(items: dict[str, Item], level: str = "##") -> str:
    """All items, one section each, with headings of a level."""
    return "\n\n".join(section(item, level) for item in items.values()) + "\n"


def section(item: Item, level: str = "##") -> str:
    """An item under its title, with the machine it was measured on."""
    return f"{level} {item.title}\n\n{body(item)}"


def body(item: Item) -> str:
    """Tables, what was left out, and the machine."""
    blocks = [_comparison(comparison) for comparison in item.comparisons]
    if item.series:
        blocks.append(_series(item.series))
        blocks += [_published(one) for one in item.series if one.published]
    lines = [*(f"- {note}" for note in item.notes), *(f"- left out: {what}" for what in item.left_out)]
    if lines:
        blocks.append("\n".join(lines))
    if item.environment or not lines:  # an item that could not be measured has none
        blocks.append(f"*{machine(item.environment, item.seconds or None)}*")
    return "\n\n".join(blocks)


def _comparison(comparison: Comparison) -> str:
    here = [e for e in comparison.entries if e.absent is None]
    metrics = [m for m in comparison.metrics if any(m.name in e.values for e in here)]
    head = [comparison.case]
    beside, agreeing = any(e.beside for e in here), any(e.agreement for e in here)
    for metric in metrics:
        head += [_heading(metric), *(["ours / theirs"] if beside else [])]
    head += ["same output"] if agreeing else []
    rows = [_row(e, metrics, beside, agreeing) for e in here]
    lines = [*_markdown(head, rows)]
    remarks = [f"absent: {e.name}: {e.absent}" for e in comparison.entries if e.absent is not None]
    remarks += [f"**{who} is ahead** in {metric}: {why}" for who, metric, why in ahead(comparison)]
    remarks += comparison.notes
    return "\n".join([*lines, *(["", *(f"- {remark}" for remark in remarks)] if remarks else [])])


def _heading(metric: Metric) -> str:
    unit = f", {metric.unit}" if metric.unit else ""
    return f"{metric.name}{unit} ({metric.better} is better)"


def _row(entry: Entry, metrics: list[Metric], beside: bool, agreeing: bool) -> list[str]:
    cells = [entry.name]
    for metric in metrics:
        values = entry.values.get(metric.name)
        cells.append(spread(values) if values else "–")
        ratio = ratio_of(entry, metric)
        cells += [in_words(ratio) if ratio else ""] if beside else []
    return cells + ([f"{statistics.mean(entry.agreement):.1%}" if entry.agreement else ""] if agreeing else [])


def _series(series: Sequence[Series]) -> str:
    head = ["over time", "points", "median, first quarter", "median, last quarter", "last / first"]
    rows = []
    for one in series:
        first, last = quarters(one)
        ratio = number(last / first) if first else "–"
        rows.append(
            [f"{one.case}: {one.y} by {one.x}", f"{len(one.points):,}", number(first), number(last), f"{ratio} ×"]
        )
    return "\n".join(_markdown(head, rows))


def _published(series: Series) -> str:
    """The published points of a curve beside ours at the same x."""
    ours = dict(series.points)
    rows = [[f"{x:,.0f}", f"{ours[x]:.3f}" if x in ours else "–", f"{y:.3f}"] for x, y in series.published]
    return "\n".join(_markdown([f"{series.case}: {series.y} by {series.x}", "restomod", "published"], rows))


def quarters(series: Series) -> tuple[float, float]:
    """Medians of the first and of the last quarter of the points."""
    values = [y for _, y in series.points]
    n = max(1, len(values) // 4)
    return statistics.median(values[:n]), statistics.median(values[-n:])


def _markdown(head: list[str], rows: list[list[str]]) -> list[str]:
    align = ["---"] + ["---:"] * (len(head) - 1)
    return ["| " + " | ".join(cells) + " |" for cells in [head, align, *rows]]


def headlines(items: dict[str, Item]) -> str:
    """One row for each comparison with others: its first metric, ours and theirs, and how many times better ours is."""
    rows = []
    about = []
    for item in items.values():
        for comparison in item.comparisons:
            metric, ours = comparison.metrics[0], comparison.entries[0]
            if ours.absent is not None or metric.name not in ours.values:
                continue
            rivals = [e for e in comparison.entries[1:] if e.absent is None and is_rival(e)]
            others = [cell for cell in (_beside(e, metric) for e in rivals) if cell]
            if others:
                what = f"{item.title}: {comparison.case}, {metric.name}{f', {metric.unit}' if metric.unit else ''}"
                rows.append([what, spread(ours.values[metric.name]), "<br>".join(others)])
        said = machine(item.environment)
        if said not in about:
            about.append(said)
    table = _markdown(["median (range)", "restomod", "others: median (how many times better ours is)"], rows)
    return "\n".join([*table, "", *(f"*{said}*" for said in about)])


def is_rival(entry: Entry) -> bool:
    """Whether this is somebody else's way to the same."""
    return not entry.name.startswith("restomod") and entry.name not in NO_RIVALS


def _beside(entry: Entry, metric: Metric) -> str:
    values, ratio = entry.values.get(metric.name), ratio_of(entry, metric)
    if not values:
        return ""
    times = f" ({in_words(advantage(ratio, metric))})" if ratio else ""
    return f"{entry.name} {number(statistics.median(values))}{times}"


def machine(environment: dict[str, Any], seconds: float | None = None) -> str:
    """Where, when and by which command, in a line."""
    e = environment
    if not e:
        return "no environment recorded"
    words = [str(e["device"]), f"torch {e['torch']}", str(e["precision"])]
    if e.get("git_revision"):
        words.append(f"revision {e['git_revision'][:12]}" + (" and changes" if "+changes" in e["git_revision"] else ""))
    words += [str(e["started"])[:10], f"`{e['command']}`"]
    if seconds is not None:
        words.append(f"{seconds:,.0f} s")
    return ("A smoke test: the numbers mean nothing. " if e.get("smoke") else "") + ", ".join(words)


def spread(values: Sequence[float]) -> str:
    """Median and range."""
    median = number(statistics.median(values))
    return f"{median} ({number(min(values))} to {number(max(values))})" if len(values) > 1 else median


def in_words(ratio: Ratio) -> str:
    """A ratio and its interval."""
    if ratio.low is None or ratio.high is None:
        return f"{number(ratio.median)} ×, one round"
    return f"{number(ratio.median)} × [{number(ratio.low)}, {number(ratio.high)}]"


def number(x: float) -> str:
    """Three significant digits, or all before the point."""
    if x == 0 or abs(x) >= 99.95:
        return f"{x:,.0f}"
    size = abs(float(f"{x:.3g}"))
    digits = 1 if size >= 10 else 2 if size >= 1 else 3
    return f"{x:.{digits}f}" if size >= 0.01 else f"{x:.2e}"
