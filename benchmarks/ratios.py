"""Ratios of measurements, restomod divided by a peer, with bootstrap intervals and reasons where a peer is ahead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.records import Comparison, Entry, Metric

CONFIDENCE = 0.95
RESAMPLES = 10_000
NOISE = 0.02  # smaller relative differences count as equal
NO_REASON = "no reason is known yet"
# reasons by contender and metric where a peer is ahead; a test fails if a committed measurement has none
REASONS: dict[tuple[str, str], str] = {
    ("empty Python program", "seconds"): "a lower bound, the interpreter only",
    ("empty Python program", "peak memory"): "a lower bound, the interpreter only",
    ("torch.save", "load"): (
        "restomod verifies the SHA-256 of every file first, which takes most of the time; torch.load does not"
    ),
    ("1 process, one thread each", "peak memory"): "with two processes, DDP allocates buckets of gradients",
    ("gpt2", "tokens/s"): "Muon and the modern parts need more compute per token, and fewer tokens",
}


@dataclass(frozen=True)
class Ratio:
    """Ratio of a measured number, restomod divided by a peer."""

    median: float
    """Median of the rounds."""
    low: float | None
    """Lower end of the interval; None for a single round."""
    high: float | None
    """Upper end of the interval; None for a single round."""


def paired_ratio(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """Return the median over rounds of ours / theirs, with its percentile bootstrap interval.

    Rounds are resampled in pairs, so a slow machine in one round cancels (Efron and Tibshirani, 1993, section 13.3).
    The seed is fixed, so the result is reproducible.

    Args:
        ours: positive values of restomod, one per round.
        theirs: positive values of the peer in the same rounds.

    Raises:
        ValueError: there are no rounds, or the numbers of rounds differ.
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
    """Return the ratio of restomod to a contender; None if either has no value of the metric."""
    ours, theirs = entry.paired.get(metric.name), entry.values.get(metric.name)
    if not ours or not theirs or min(theirs) <= 0:
        return None
    return paired_ratio(ours, theirs)


def advantage(ratio: Ratio, metric: Metric) -> Ratio:
    """Return the advantage of restomod: the ratio, or its reciprocal if lower values are better."""
    if metric.better == "higher":
        return ratio
    low, high = ratio.low, ratio.high
    return Ratio(1 / ratio.median, None if high is None else 1 / high, None if low is None else 1 / low)


def is_ahead(entry: Entry, metric: Metric) -> bool:
    """Return whether a contender is better than restomod by more than noise."""
    ratio = ratio_of(entry, metric)
    if ratio is None:
        return False
    better = advantage(ratio, metric)
    return better.median < 1 - NOISE and (better.high is None or better.high < 1)


def ahead(comparison: Comparison) -> list[tuple[str, str, str]]:
    """Return name, metric and reason for contenders that are ahead of restomod."""
    return [
        (entry.name, metric.name, REASONS.get((entry.name, metric.name), NO_REASON))
        for entry in comparison.entries[1:]
        for metric in comparison.metrics
        if entry.absent is None and is_ahead(entry, metric)
    ]
