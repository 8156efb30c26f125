"""Means of a few runs, and whether two means differ by more than chance."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Summary:
    """Several values of the same thing."""

    n: int
    mean: float
    sd: float | None
    """Their sample standard deviation, divided by n - 1; None of a single value."""

    def shown(self, digits: int = 4) -> str:
        """As text: the mean, and the standard deviation if there is one."""
        return f"{self.mean:.{digits}f}" + (f" ± {self.sd:.{digits}f}" if self.sd is not None else "")


@dataclass(frozen=True)
class Welch:
    """Welch's t-test of two means: their variances need not be equal, nor their numbers."""

    difference: float
    """The second mean minus the first."""
    t: float
    df: float
    """Degrees of freedom, by the Welch-Satterthwaite equation."""
    p: float
    """Two-sided: how often chance alone gives a difference as large."""
    low: float
    """Of the 95 % confidence interval of the difference."""
    high: float


def summarize(values: Sequence[float]) -> Summary:
    """Mean and standard deviation of at least one value."""
    return Summary(len(values), statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


def welch(first: Sequence[float], second: Sequence[float]) -> Welch | None:
    """Test whether ``second`` has another mean than ``first``.

    None where it cannot be said: fewer than two values on a side, or no variation at all. Source: Welch, "The
    generalization of Student's problem when several different population variances are involved", 1947.
    """
    if min(len(first), len(second)) < 2 or statistics.pvariance(first) + statistics.pvariance(second) == 0:
        return None
    from scipy import stats

    found = stats.ttest_ind(second, first, equal_var=False)
    interval = found.confidence_interval(0.95)
    values = [float(v) for v in (found.statistic, found.df, found.pvalue, interval.low, interval.high)]
    if not all(map(math.isfinite, values)):
        return None
    return Welch(statistics.fmean(second) - statistics.fmean(first), *values)
