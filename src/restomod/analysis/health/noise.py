"""Statistics of noisy curves: trend, level, deviation, autocorrelation time, period. Does not import torch."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

SIGMAS_PER_MAD = 1.4826  # standard deviation / median absolute deviation of a normal distribution
OUTLIER = 4.0  # residuals are clipped at this many standard deviations
LAGS = 16  # maximum correlation length of noise, in steps
FEWEST_FOR_PERIODS = 128  # values
PEAK = 35.0  # minimum ratio of a peak to the spectrum around it; not reached in 10,000 spectra of white and slow noise
LIKENESS = 7.0  # minimum autocorrelation of a period, in standard errors
LASTING = 0.5  # minimum share of a wave's amplitude that remains without its two largest eighths
SHORTEST_PERIOD = 8  # steps
FEWEST_WAVES = 5


def detrended(values: Array, width: int) -> Array:
    """Return the residuals of a trend in units of their standard deviation, with outliers clipped.

    The trend is the moving mean of a moving mean, applied twice ("twicing": Tukey, "Exploratory Data Analysis", 1977)
    so that it follows bends.

    Args:
        values: curve, (n,).
        width: odd number of steps of the moving mean.
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
    """Estimate the autocorrelation time of the noise on a slow curve, in steps, at least 1.

    The variance of a mean of n steps is larger by this factor than that of n independent values. The estimate is a sum
    of autocorrelations with Bartlett's weights (Newey and West, Econometrica 55, 1987). It may be too low by a factor
    of two, because the trend follows slow noise. The first quarter of the curve, where a loss falls fast, is ignored.
    """
    values = values[len(values) // 4 :]
    if len(values) < 2 * LAGS:
        return 1.0
    off = detrended(values, 4 * LAGS + 1)
    variance = float(np.mean(off * off))
    if variance == 0:
        return 1.0
    covariances = sum((1 - k / (LAGS + 1)) * float(np.mean(off[k:] * off[:-k])) for k in range(1, LAGS + 1))
    return max(1.0, 1 + 2 * covariances / variance)


def moving_median(values: Array, reach: int) -> Array:
    """Compute the moving median over ``reach`` values before and after, (n,).

    It is computed at every ``reach // 8``-th value and interpolated linearly between them.
    """
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(values, reach, mode="reflect"), 2 * reach + 1)
    at = np.unique(np.append(np.arange(0, len(values), max(1, reach // 8)), len(values) - 1))
    return np.interp(np.arange(len(values)), at, np.median(windows[at], axis=1))


def noise_deviation(values: Array) -> float:
    """Estimate the standard deviation of the noise on a slow curve; 0 for fewer than two values.

    The estimate uses the median absolute difference of consecutive values, which is robust to outliers.
    """
    if len(values) < 2:
        return 0.0
    return float(SIGMAS_PER_MAD * np.median(np.abs(np.diff(values))) / math.sqrt(2))


def blocks(values: Array, width: int) -> Array:
    """Cut ``values`` into rows, (n // width, width). The first n % width values are dropped."""
    count = len(values) // width
    return values[len(values) - count * width :].reshape(count, width)


def level_width(step: float) -> int:
    """Return the number of steps before and after ``step`` that `level_at` fits; it grows as the curve flattens."""
    return int(min(max(64.0, step / 8), 1024.0))


def level_at(steps: Array, loss: Array, step: float) -> tuple[float, float] | None:
    """Estimate the level of a noisy loss at ``step`` by a least-squares line through the steps around it.

    The line is fitted to `level_width` steps before and after. If there are no later steps yet, it is fitted to up to
    twice as many earlier steps and extrapolated.

    Args:
        steps: recorded steps in increasing order, (n,).
        loss: their losses in nats, (n,).
        step: step of the estimate.

    Returns:
        Level and its standard error for independent noise; None if fewer than `level_width` / 2 steps are near.
    """
    width = level_width(step)
    before = max(width, min(step / 4, 2048.0)) if len(steps) and steps[-1] < step else width
    near = slice(*np.searchsorted(steps, (step - before, step + width)))
    x, y = steps[near] - step, loss[near]
    if len(x) < width // 2:  # at least 32
        return None
    middle, mean = float(x.mean()), float(y.mean())
    off = x - middle
    spread = float(off @ off)
    slope = float(off @ y) / spread
    rest = y - mean - slope * off
    return mean - slope * middle, math.sqrt(float(rest @ rest) / len(x) * (1 / len(x) + middle**2 / spread))


def period(values: Array) -> float | None:
    """Find the period of a noisy curve in steps; None if it has none or is too short.

    A period is found in the autocorrelation, if the noise repeats (the same batches return), or as a peak of the
    spectrum, if the curve has a wave. The first quarter of the curve, where a loss falls fast, is ignored.
    """
    values = values[len(values) // 4 :]
    if len(values) < FEWEST_FOR_PERIODS or not np.isfinite(values).all():
        return None
    return _repetition(detrended(values, 33)) or _wave(detrended(values, max(33, len(values) // 8 | 1)))


def _repetition(x: Array) -> float | None:
    n = len(x)
    x = x - x.mean()
    covariances = np.fft.irfft(np.abs(np.fft.rfft(x, 2 * n)) ** 2)[: n // 2 + 1]
    if covariances[0] <= 0:
        return None
    lags = np.arange(n // 2 + 1)
    likeness = covariances / covariances[0] * n / np.sqrt(n - lags)  # autocorrelations in units of their standard error
    likeness[:SHORTEST_PERIOD] = 0
    best = likeness.max()
    return float(np.flatnonzero(likeness >= 0.8 * best)[0]) if best > LIKENESS else None


def _wave(x: Array) -> float | None:
    n = len(x)
    power = np.abs(np.fft.rfft(x * np.hanning(n)))[1:] ** 2  # without the mean: 1, 2, ... waves over the curve
    reach = max(40, len(power) // 8)
    around = moving_median(power, reach) / math.log(2)
    around = np.maximum(around, np.median(power) / math.log(2))
    ratio = np.divide(power, around, out=np.zeros_like(around), where=around > 0)
    searched = ratio[FEWEST_WAVES - 1 : n // SHORTEST_PERIOD]
    best = int(np.argmax(searched))
    length = n / (FEWEST_WAVES + best)
    return length if searched[best] > PEAK and _lasts(x, length) else None


def _lasts(x: Array, length: float) -> bool:
    """Return whether a wave covers all of ``x``. A bend, such as the start of learning-rate decay, does not."""
    wave = np.exp(-2j * np.pi * np.arange(len(x)) / length)
    amplitudes = np.array([part.mean() for part in np.array_split(x * wave, 8)])
    mean = amplitudes.mean()
    in_phase = np.sort((amplitudes * mean.conjugate()).real)
    return bool(in_phase[:6].mean() > LASTING * abs(mean) ** 2)
