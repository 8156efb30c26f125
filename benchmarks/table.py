"""Markdown tables of measurements, computed from the raw values."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.ratios import NOISE, Ratio, advantage, ahead, ratio_of
from benchmarks.records import Comparison, Entry, Item, Metric, Series

NOT_PEERS = (  # other settings of restomod, lower bounds, and programs that do something else
    "empty cache",
    "1 process, one thread each",
    "speedrun",
    "gpt2",
    "empty Python program",
    "import torch",
    "import transformers.GPT2LMHeadModel",
)
SUMMARY = (  # rows of the summary: item, index of its comparison, label ({case} is the comparison's title)
    ("loader", 1, "resume in the middle of 10 billion tokens"),
    ("tokenizing", 0, "text to token shards, one core"),
    ("checkpoint", 0, "training stall per checkpoint"),
    ("hellaswag", 0, "HellaSwag scoring, 124M"),
    ("generation", 0, "generation, 124M, {case}"),
    ("step", 0, "training step, 124M, {case}"),
    ("step", 1, "training step, 124M, {case}"),
    ("step", 2, "training step, 124M, {case}"),
)


def page(items: dict[str, Item], level: str = "##") -> str:
    """Return all items, one section each; ``level`` is the Markdown prefix of headings."""
    return "\n\n".join(section(item, level) for item in items.values()) + "\n"


def section(item: Item, level: str = "##") -> str:
    """Return an item with its title."""
    return f"{level} {item.title}\n\n{body(item)}"


def body(item: Item) -> str:
    """Return the tables of an item, its remarks, skipped parts and the machine."""
    blocks = [_comparison(comparison) for comparison in item.comparisons]
    if item.series:
        blocks.append(_series(item.series))
        blocks += [_published(one) for one in item.series if one.published]
    lines = [*(f"- {note}" for note in item.notes), *(f"- skipped: {what}" for what in item.left_out)]
    if lines:
        blocks.append("\n".join(lines))
    if item.environment or not lines:  # an item that failed has no environment
        blocks.append(f"*{machine(item.environment, item.seconds or None)}*")
    return "\n\n".join(blocks)


def _comparison(comparison: Comparison) -> str:
    measured = [e for e in comparison.entries if e.absent is None]
    metrics = [m for m in comparison.metrics if any(m.name in e.values for e in measured)]
    head = [comparison.case]
    paired, agreeing = any(e.paired for e in measured), any(e.agreement for e in measured)
    for metric in metrics:
        head += [_heading(metric), *(["ratio"] if paired else [])]
    head += ["same output"] if agreeing else []
    rows = [_row(e, metrics, paired, agreeing) for e in measured]
    lines = [*_markdown(head, rows)]
    remarks = [f"absent: {e.name}: {e.absent}" for e in comparison.entries if e.absent is not None]
    remarks += [f"**{who} is ahead** in {metric}: {why}" for who, metric, why in ahead(comparison)]
    remarks += comparison.notes
    return "\n".join([*lines, *(["", *(f"- {remark}" for remark in remarks)] if remarks else [])])


def _heading(metric: Metric) -> str:
    unit = f", {metric.unit}" if metric.unit else ""
    return f"{metric.name}{unit} ({metric.better} is better)"


def _row(entry: Entry, metrics: list[Metric], paired: bool, agreeing: bool) -> list[str]:
    cells = [entry.name]
    for metric in metrics:
        values = entry.values.get(metric.name)
        cells.append(spread(values) if values else "–")
        ratio = ratio_of(entry, metric)
        cells += [in_words(ratio) if ratio else ""] if paired else []
    return cells + ([f"{statistics.mean(entry.agreement):.1%}" if entry.agreement else ""] if agreeing else [])


def _series(series: Sequence[Series]) -> str:
    head = ["curve", "points", "median of the first quarter", "median of the last quarter", "last / first"]
    rows = []
    for one in series:
        first, last = quarters(one)
        ratio = number(last / first) if first else "–"
        rows.append(
            [f"{one.case}: {one.y} by {one.x}", f"{len(one.points):,}", number(first), number(last), f"{ratio} ×"]
        )
    return "\n".join(_markdown(head, rows))


def _published(series: Series) -> str:
    """Return a table of the published points of a curve and the measured ones at the same x."""
    ours = dict(series.points)
    rows = [[f"{x:,.0f}", f"{ours[x]:.3f}" if x in ours else "–", f"{y:.3f}"] for x, y in series.published]
    return "\n".join(_markdown([f"{series.case}: {series.y} by {series.x}", "restomod", "published"], rows))


def quarters(series: Series) -> tuple[float, float]:
    """Return the medians of the first and of the last quarter of the points."""
    values = [y for _, y in series.points]
    n = max(1, len(values) // 4)
    return statistics.median(values[:n]), statistics.median(values[-n:])


def _markdown(head: list[str], rows: list[list[str]]) -> list[str]:
    align = ["---"] + ["---:"] * (len(head) - 1)
    return ["| " + " | ".join(cells) + " |" for cells in [head, align, *rows]]


def summary(items: dict[str, Item]) -> str:
    """Return a table of the comparisons in `SUMMARY` with the best peer, and all results in which a peer is better.

    The last part covers all comparisons, also those outside the table.
    """
    rows: list[list[str]] = []
    for name, index, label in SUMMARY:
        if name not in items or index >= len(items[name].comparisons):
            continue
        comparison = items[name].comparisons[index]
        metric, ours = comparison.metrics[0], comparison.entries[0]
        peers = [
            (advantage(ratio, metric).median, entry)
            for entry in _peers_of(comparison)
            if (ratio := ratio_of(entry, metric)) is not None
        ]
        if ours.absent is None and peers:
            _, best = min(peers, key=lambda pair: pair[0])
            cell, theirs = (
                f"{number(statistics.median(entry.values[metric.name]))} {metric.unit or metric.name}"
                for entry in (ours, best)
            )
            ratio = ratio_of(best, metric)
            gain = in_words(advantage(ratio, metric)) if ratio else ""
            if ratio and ratio.low is not None and ratio.high is not None and ratio.low <= 1 <= ratio.high:
                gain += ", not significant"
            rows.append([label.format(case=comparison.case), cell, f"{theirs}, {best.name}", gain])
    comparisons = [comparison for item in items.values() for comparison in item.comparisons]
    leading = [line for comparison in comparisons for line in _better_peers(comparison)]
    head = ["measurement", "restomod", "best peer", "advantage of restomod [95 % interval]"]
    devices = dict.fromkeys(str(item.environment["device"]) for item in items.values() if item.environment)
    dates = sorted(str(item.environment["started"])[:10] for item in items.values() if item.environment)
    about = f"*{'; '.join(devices)}, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}*" if dates else ""
    return "\n".join([*_markdown(head, rows), "", *leading, *([""] if leading else []), about])


def _better_peers(comparison: Comparison) -> Iterator[str]:
    """Yield a line per peer and metric for which the peer is better, with the reason for a significant difference."""
    reasons = {(who, metric): why for who, metric, why in ahead(comparison)}
    for entry in _peers_of(comparison):
        for metric in comparison.metrics:
            ratio = ratio_of(entry, metric)
            if (entry.name, metric.name) in reasons:
                why = reasons[entry.name, metric.name]
                yield f"- {entry.name} is ahead in {metric.name} ({comparison.case}): {why}"
            elif ratio is not None and advantage(ratio, metric).median < 1 - NOISE:
                words = in_words(advantage(ratio, metric))
                yield f"- {entry.name} may be ahead in {metric.name} ({comparison.case}): {words}, not significant"


def peer_table(items: dict[str, Item]) -> str:
    """Return a table with one row per comparison with peers: its first metric and restomod's advantage."""
    rows = []
    about = []
    for item in items.values():
        for comparison in item.comparisons:
            metric, ours = comparison.metrics[0], comparison.entries[0]
            if ours.absent is not None or metric.name not in ours.values:
                continue
            cells = [cell for cell in (_peer(e, metric) for e in _peers_of(comparison)) if cell]
            if cells:
                what = f"{item.title}: {comparison.case}, {metric.name}{f', {metric.unit}' if metric.unit else ''}"
                rows.append([what, spread(ours.values[metric.name]), "<br>".join(cells)])
        line = machine(item.environment)
        if line not in about:
            about.append(line)
    head = ["measurement", "restomod: median (range)", "peers: median (advantage of restomod with 95 % interval)"]
    return "\n".join([*_markdown(head, rows), "", *(f"- *{line}*" for line in about)])


def is_peer(entry: Entry) -> bool:
    """Return whether a contender is another project's or a standard method for the same work."""
    return not entry.name.startswith("restomod") and entry.name not in NOT_PEERS


def _peers_of(comparison: Comparison) -> list[Entry]:
    return [e for e in comparison.entries[1:] if e.absent is None and is_peer(e)]


def _peer(entry: Entry, metric: Metric) -> str:
    values, ratio = entry.values.get(metric.name), ratio_of(entry, metric)
    if not values:
        return ""
    times = f" ({in_words(advantage(ratio, metric))})" if ratio else ""
    return f"{entry.name} {number(statistics.median(values))}{times}"


def machine(environment: dict[str, Any], seconds: float | None = None) -> str:
    """Return machine, versions, date, command and, if given, ``seconds`` of a measurement in one line."""
    e = environment
    if not e:
        return "no environment recorded"
    words = [str(e["device"]), f"torch {e['torch']}", str(e["precision"])]
    if e.get("git_revision"):
        words.append(f"revision {e['git_revision'][:12]}" + (" and changes" if "+changes" in e["git_revision"] else ""))
    words += [str(e["started"])[:10], f"`{e['command']}`"]
    if seconds is not None:
        words.append(f"{seconds:,.0f} s")
    return ("Smoke test with meaningless numbers. " if e.get("smoke") else "") + ", ".join(words)


def spread(values: Sequence[float]) -> str:
    """Format the median and, for several values, the range."""
    median = number(statistics.median(values))
    return f"{median} ({number(min(values))} to {number(max(values))})" if len(values) > 1 else median


def in_words(ratio: Ratio) -> str:
    """Format a ratio and its interval."""
    if ratio.low is None or ratio.high is None:
        return f"{number(ratio.median)} ×, one round"
    return f"{number(ratio.median)} × [{number(ratio.low)}, {number(ratio.high)}]"


def number(x: float) -> str:
    """Format a number with three significant digits, or as an integer from 100 on."""
    if x == 0 or abs(x) >= 99.95:
        return f"{x:,.0f}"
    size = abs(float(f"{x:.3g}"))
    digits = 1 if size >= 10 else 2 if size >= 1 else 3
    return f"{x:.{digits}f}" if size >= 0.01 else f"{x:.2e}"
