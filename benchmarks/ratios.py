"""Ratios of measurements, ours to theirs, with bootstrap intervals; and where others are ahead, with the reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.records import Comparison, Entry, Metric

CONFIDENCE = 0.95
RESAMPLES = 10_000
NOISE = 0.02  # a smaller relative difference is none
NO_REASON = "no reason is known yet"
# why others are ahead, by contender and metric; a test fails where a committed measurement has no reason
REASONS: dict[tuple[str, str], str] = {
    ("python, doing nothing", "seconds"): "a floor and no rival, the interpreter alone",
    ("python, doing nothing", "peak memory"): "a floor and no rival, the interpreter alone",
    ("torch.save", "load"): (
        "restomod first compares every byte with its SHA-256, which takes most of that time; torch.load does not"
    ),
    ("1 process, one thread each", "peak memory"): "two processes hold buckets of gradients to exchange",
    ("gpt2", "tokens/s"): "Muon and the modern parts compute more for each token, and need fewer tokens",
}


@dataclass(frozen=True)
class Ratio:
    """A number of ours divided by theirs."""

    median: float
    """Median of the rounds."""
    low: float | None
    """Lower end of the interval; None for a single round."""
    high: float | None
    """Upper end."""


def paired_ratio(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """The median of ours / theirs over rounds in which both ran, with its bootstrap interval.

    Rounds are drawn again with replacement, as pairs, so that what slows both down in a round cancels; the interval
    runs between percentiles of the medians (Efron and Tibshirani, 1993, section 13.3). It is the same at every call.

    Args:
        ours, theirs: one value per round, in the order of the rounds; positive.

    Raises:
        ValueError: there are no rounds, or not equally many.
    """
    ratios = np.array([a / b for a, b in zip(ours, theirs, strict=True)])
    if len(ratios) == 0:
        raise ValueError("no rounds to compare")
    median = float(np.median(ratios))
    if len(ratios) == 1:
        return Ratio(median, None, None)
    drawn = np.random.default_rng(0).integers(len(ratios), size=(RESAMPLES, len(ratios)))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(np.median(ratios[drawn], axis=1), [tail, 1 - tail])
    return Ratio(median, float(low), float(high))


def ratio_of(entry: Entry, metric: Metric) -> Ratio | None:
    """Ours divided by this contender's; None where one of them lacks the metric."""
    ours, theirs = entry.beside.get(metric.name), entry.values.get(metric.name)
    if not ours or not theirs or min(theirs) <= 0:
        return None
    return paired_ratio(ours, theirs)


def advantage(ratio: Ratio, metric: Metric) -> Ratio:
    """How many times better ours is: the ratio, or its reciprocal where less is better."""
    if metric.better == "higher":
        return ratio
    low, high = ratio.low, ratio.high
    return Ratio(1 / ratio.median, None if high is None else 1 / high, None if low is None else 1 / low)


def is_ahead(entry: Entry, metric: Metric) -> bool:
    """Whether a contender is better than ours by more than noise."""
    ratio = ratio_of(entry, metric)
    if ratio is None:
        return False
    better = advantage(ratio, metric)
    return better.median < 1 - NOISE and (better.high is None or better.high < 1)


def ahead(comparison: Comparison) -> list[tuple[str, str, str]]:
    """Contenders that are ahead of ours: name, metric, reason."""
    return [
        (entry.name, metric.name, REASONS.get((entry.name, metric.name), NO_REASON))
        for entry in comparison.entries[1:]
        for metric in comparison.metrics
        if entry.absent is None and is_ahead(entry, metric)
    ]
