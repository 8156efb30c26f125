"""Detrending of noisy curves, and the autocorrelation time of their noise. Needs no torch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

SIGMAS_PER_MAD = 1.4826  # of a normal distribution
OUTLIER = 4.0  # standard deviations at which residuals are cut off before repetition is looked for
LAGS = 16  # steps over which noise may be correlated


def residual(values: Array, width: int) -> Array:
    """``values`` without their trend over ``width`` (odd) steps, in units of their deviation, outliers cut.

    The trend is the moving mean of the moving mean, which amplifies no wave, and the same of what that leaves
    ("twicing": Tukey, "Exploratory Data Analysis", 1977), which follows bends that one mean cuts.
    """
    off = values
    for _ in range(2):
        off = off - _moving_mean(_moving_mean(off, width), width)
    deviation = SIGMAS_PER_MAD * np.median(np.abs(off - np.median(off)))
    return np.clip(off / deviation, -OUTLIER, OUTLIER) if deviation > 0 else np.zeros_like(values)


def _moving_mean(values: Array, width: int) -> Array:
    half = width // 2
    sums = np.cumsum(np.pad(values, (half + 1, half), mode="reflect", reflect_type="odd"))
    return (sums[2 * half + 1 :] - sums[: -2 * half - 1]) / (2 * half + 1)


def autocorrelation_time(values: Array) -> float:
    """How many neighbouring steps of noise upon a slow curve count as one: the variance of a mean of n is so many times
    that of n independent ones. At least 1.

    By a sum of autocorrelations with Bartlett's weights (Newey and West, Econometrica 55, 1987). It comes out up to a
    half too low, as the trend that is taken off follows slow noise. The first quarter is left out, where a loss falls
    fast.
    """
    values = values[len(values) // 4 :]
    if len(values) < 2 * LAGS:
        return 1.0
    off = residual(values, 4 * LAGS + 1)
    variance = float(np.mean(off * off))
    if variance == 0:
        return 1.0
    products = sum((1 - k / (LAGS + 1)) * float(np.mean(off[k:] * off[:-k])) for k in range(1, LAGS + 1))
    return max(1.0, 1 + 2 * products / variance)


def moving_median(values: Array, reach: int) -> Array:
    """Median of each number and ``reach`` before and after it, at every eighth of ``reach``; lines between them."""
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(values, reach, mode="reflect"), 2 * reach + 1)
    at = np.unique(np.append(np.arange(0, len(values), max(1, reach // 8)), len(values) - 1))
    return np.interp(np.arange(len(values)), at, np.median(windows[at], axis=1))
