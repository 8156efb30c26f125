"""How many times ours is theirs, how many times better, and where others are ahead."""

from __future__ import annotations

from benchmarks.reasons import REASONS
from benchmarks.records import Comparison, Entry, Metric
from benchmarks.stats import Ratio, paired_ratio

NO_REASON = "no reason is known yet"
SAME = 0.02  # a difference below this part is none


def ratio_of(entry: Entry, metric: Metric) -> Ratio | None:
    """Ours divided by this contender's; None where one of them lacks the metric."""
    ours, theirs = entry.beside.get(metric.name), entry.values.get(metric.name)
    if not ours or not theirs or min(theirs) <= 0:
        return None
    return paired_ratio(ours, theirs)


def advantage(ratio: Ratio, metric: Metric) -> Ratio:
    """The same where more is better; its reciprocal where less is."""
    if metric.better == "higher":
        return ratio
    low, high = ratio.low, ratio.high
    return Ratio(1 / ratio.median, None if high is None else 1 / high, None if low is None else 1 / low)


def is_ahead(entry: Entry, metric: Metric) -> bool:
    """Whether this contender is better than ours, by more than noise can be."""
    ratio = ratio_of(entry, metric)
    if ratio is None:
        return False
    better = advantage(ratio, metric)
    return better.median < 1 - SAME and (better.high is None or better.high < 1)


def ahead(comparison: Comparison) -> list[tuple[str, str, str]]:
    """Who is ahead of ours, in which metric, and why."""
    return [
        (entry.name, metric.name, REASONS.get((entry.name, metric.name), NO_REASON))
        for entry in comparison.entries[1:]
        for metric in comparison.metrics
        if entry.absent is None and is_ahead(entry, metric)
    ]
