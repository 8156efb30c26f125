"""What several measurements of one number say: median, range, and how sure a ratio is."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 10_000


@dataclass(frozen=True)
class Spread:
    """Several measurements of one number."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Ratio:
    """How many times a number of ours is theirs."""

    median: float
    """Of the rounds."""
    low: float | None
    """Lower end of the interval; None for a single round, which says nothing about noise."""
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
