"""Statistics of noisy curves: trend, level, deviation, autocorrelation time, period. Needs no torch."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

SIGMAS_PER_MAD = 1.4826  # of a normal distribution
OUTLIER = 4.0  # standard deviations at which residuals are clipped
LAGS = 16  # steps over which noise may be correlated
FEWEST_FOR_PERIODS = 128
PEAK = 35.0  # ratio of a peak to the spectrum around it; 10,000 spectra of white and drifting noise had none
LIKENESS = 7.0  # standard errors of an autocorrelation
LASTING = 0.5  # share of the amplitude of a wave that it has without its two largest eighths
SHORTEST_PERIOD = 8
FEWEST_WAVES = 5


def detrended(values: Array, width: int) -> Array:
    """Detrend ``values`` over ``width`` (odd) steps, in units of the deviation of the residuals, outliers clipped.

    The trend is the moving mean of the moving mean, which amplifies no wave, applied twice ("twicing": Tukey,
    "Exploratory Data Analysis", 1977) to follow bends.
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
    """Autocorrelation time, in steps, of the noise on a slow curve: the factor by which the variance of a mean of n
    steps exceeds that of n independent ones. At least 1.

    Sum of autocorrelations with Bartlett's weights (Newey and West, Econometrica 55, 1987). Up to a factor of two too
    low, as the trend follows slow noise. The first quarter, where a loss falls fast, is left out.
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
    """Moving median over ``reach`` values before and after, at every eighth of ``reach``, interpolated between."""
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(values, reach, mode="reflect"), 2 * reach + 1)
    at = np.unique(np.append(np.arange(0, len(values), max(1, reach // 8)), len(values) - 1))
    return np.interp(np.arange(len(values)), at, np.median(windows[at], axis=1))


def noise_deviation(values: Array) -> float:
    """Standard deviation of the noise on a slow curve, from the median absolute difference of neighbours, which is
    robust to outliers; 0 for fewer than two values.
    """
    if len(values) < 2:
        return 0.0
    return float(SIGMAS_PER_MAD * np.median(np.abs(np.diff(values))) / math.sqrt(2))


def blocks(values: Array, width: int) -> Array:
    """Cut ``values`` into rows of ``width``; the remainder is dropped at the front, so that the last row is newest."""
    count = len(values) // width
    return values[len(values) - count * width :].reshape(count, width)


def level_width(step: float) -> int:
    """Steps before and after ``step`` that `level_at` fits: the later, the straighter the curve."""
    return int(min(max(64.0, step / 8), 1024.0))


def level_at(steps: Array, loss: Array, step: float) -> tuple[float, float] | None:
    """Level of a noisy loss at ``step`` and its standard error, assuming independent noise at every step.

    Least-squares line through the `level_width` steps before and after. Where there are no later steps yet, the line
    goes through up to twice as many earlier ones, if the run is long enough to be straight there, and is extrapolated.
    None where fewer than half of the steps are near.
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
    """Period, in steps, of a noisy curve; None where there is none, or the curve is too short.

    Two signs: the noise repeats (autocorrelation, as when batches return), or there is a wave (a peak in the spectrum).
    The first quarter, where a loss falls fast, is left out.
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
    power = np.abs(np.fft.rfft(x * np.hanning(n)))[1:] ** 2  # without the mean: of 1, 2, ... waves in all
    reach = max(40, len(power) // 8)
    around = moving_median(power, reach) / math.log(2)
    around = np.maximum(around, np.median(power) / math.log(2))
    ratio = np.divide(power, around, out=np.zeros_like(around), where=around > 0)
    searched = ratio[FEWEST_WAVES - 1 : n // SHORTEST_PERIOD]
    best = int(np.argmax(searched))
    length = n / (FEWEST_WAVES + best)
    return length if searched[best] > PEAK and _lasts(x, length) else None


def _lasts(x: Array, length: float) -> bool:
    """Whether a wave covers all of ``x``, unlike a bend of the curve, as when a learning rate begins to decay."""
    wave = np.exp(-2j * np.pi * np.arange(len(x)) / length)
    amplitudes = np.array([part.mean() for part in np.array_split(x * wave, 8)])
    mean = amplitudes.mean()
    in_phase = np.sort((amplitudes * mean.conjugate()).real)
    return bool(in_phase[:6].mean() > LASTING * abs(mean) ** 2)
