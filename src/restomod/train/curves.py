"""A run's numbers as arrays, and what is seen in noisy curves: levels, noise, slopes, repetition. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

LARGEST = 1e100  # what is larger counts as infinite, and no square of what is not overflows
LARGEST_STEP = 2**53
SIGMAS_PER_MAD = 1.4826  # of a normal distribution
ERROR_OF_TOKEN = 8.0  # nats: losses of tokens differ by 3 to 4, and those of a document are alike
OUTLIER = 4.0  # standard deviations at which residuals are cut off before repetition is looked for
FEWEST_FOR_PERIODS = 128
PEAK = 35.0  # times the level around it: noise has such a peak in no spectrum of 10,000, drifting noise either
LIKENESS = 7.0  # standard errors of an autocorrelation
SHORTEST_PERIOD = 8
FEWEST_WAVES = 5


@dataclass(frozen=True)
class Curves:
    """The train and val records of `metrics.jsonl`, each step once, in order. Lost numbers are NaN."""

    step: Array
    """Of the training steps whose loss is finite and whose update was made, as the next three are."""
    loss: Array
    grad_norm: Array
    ms: Array
    first_rate: float
    """The learning rate of step 0; NaN where it is not known."""
    val_step: Array
    val_loss: Array
    val_error: Array
    """An allowance for the sampling error of each held-out loss, from the number of its tokens."""
    skipped: list[tuple[int, str]]
    """Steps without an update, and why, but for those that overflowed fp16."""
    not_finite: list[int]
    """Steps whose loss or gradient norm was not finite, but for those that overflowed fp16."""
    rollbacks: int
    steps_seen: int
    """One more than the last training step of which there is a record."""


def curves(records: Iterable[Mapping[str, Any]]) -> Curves:
    """Sort the records of `metrics.jsonl`; whatever is not as expected is left out."""
    train: dict[int, Mapping[str, Any]] = {}
    val: dict[int, tuple[float, float]] = {}
    rollbacks = 0
    for record in records:
        step, kind = record.get("step"), record.get("kind")
        if type(step) is not int or not 0 <= step < LARGEST_STEP:
            continue
        if kind == "train":
            train[step] = record
        elif kind == "val" and math.isfinite(_number(record, "loss")):
            tokens = _number(record, "tokens")
            val[step] = _number(record, "loss"), ERROR_OF_TOKEN / math.sqrt(tokens) if tokens >= 1 else 0.0
        elif kind == "rollback":
            rollbacks += 1
    rows, skipped, not_finite = [], [], []
    for step in sorted(train):
        record = train[step]
        loss, norm = _number(record, "loss"), _number(record, "grad_norm")
        why = record.get("skipped")
        if why is not None and "fp16" in str(why):
            continue
        if why is not None:
            skipped.append((step, str(why)))
        if not math.isfinite(loss) or ("grad_norm" in record and not math.isfinite(norm)):
            not_finite.append(step)
        elif why is None:
            rows.append((step, loss, norm, _number(record, "ms")))
    table = np.array(rows, dtype=np.float64).reshape(-1, 4)
    return Curves(
        step=table[:, 0],
        loss=table[:, 1],
        grad_norm=table[:, 2],
        ms=table[:, 3],
        first_rate=_number(train.get(0, {}), "lr"),
        val_step=np.array(sorted(val), dtype=np.float64),
        val_loss=np.array([val[step][0] for step in sorted(val)], dtype=np.float64),
        val_error=np.array([val[step][1] for step in sorted(val)], dtype=np.float64),
        skipped=skipped,
        not_finite=not_finite,
        rollbacks=rollbacks,
        steps_seen=max(train) + 1 if train else 0,
    )


def _number(record: Mapping[str, Any], key: str) -> float:
    value = record.get(key)
    return float(value) if isinstance(value, int | float) and abs(value) < LARGEST else math.nan


def noise(values: Array) -> float:
    """Standard deviation of the noise upon a slow curve, from the median of its steps up and down; outliers do not move
    it. 0 of fewer than two values."""
    if len(values) < 2:
        return 0.0
    return float(SIGMAS_PER_MAD * np.median(np.abs(np.diff(values))) / math.sqrt(2))


def blocks(values: Array, width: int) -> Array:
    """``values`` cut into rows of ``width``; what is left over is dropped at the front, so the last is the newest."""
    count = len(values) // width
    return values[len(values) - count * width :].reshape(count, width)


def level_at(curve: Curves, step: float, width: int = 64) -> tuple[float, float] | None:
    """The training loss at ``step`` and its standard error, by a line through the ``width`` steps before and after.

    None where fewer than ``width`` / 2 steps are near. After the last step the line is prolonged by one step.
    """
    near = (curve.step >= step - width) & (curve.step < step + width)
    x, y = curve.step[near] - step, curve.loss[near]
    if len(x) < width // 2 or np.ptp(x) == 0:
        return None
    slope, level = np.polyfit(x, y, 1)
    leverage = 1 / len(x) + x.mean() ** 2 / ((x - x.mean()) ** 2).sum()
    scatter = float(np.sqrt(np.mean((y - level - slope * x) ** 2)))
    return float(level), scatter * math.sqrt(leverage)


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


def period(values: Array) -> float | None:
    """The length, in steps, after which a noisy curve repeats itself; None where it does not, or is too short to say.

    Two signs are looked for: the same noise again (an autocorrelation, as of batches that return), and a wave (a peak
    in the spectrum). The first quarter is left out: a loss falls fast there, and what is left of that is no noise.
    """
    values = values[len(values) // 4 :]
    if len(values) < FEWEST_FOR_PERIODS or not np.isfinite(values).all():
        return None
    return _repetition(residual(values, 33)) or _wave(residual(values, max(33, len(values) // 8 | 1)))


def _repetition(x: Array) -> float | None:
    n = len(x)
    x = x - x.mean()
    products = np.fft.irfft(np.abs(np.fft.rfft(x, 2 * n)) ** 2)[: n // 2 + 1]
    if products[0] <= 0:
        return None
    lags = np.arange(n // 2 + 1)
    likeness = products / products[0] * n / np.sqrt(n - lags)  # autocorrelations in units of their standard error
    likeness[:SHORTEST_PERIOD] = 0
    best = likeness.max()
    return float(np.flatnonzero(likeness >= 0.8 * best)[0]) if best > LIKENESS else None


def _wave(x: Array) -> float | None:
    n = len(x)
    power = np.abs(np.fft.rfft(x * np.hanning(n)))[1:] ** 2  # without the mean: of 1, 2, ... waves in all
    reach = max(40, len(power) // 8)
    padded = np.pad(power, reach, mode="reflect")
    around = np.median(np.lib.stride_tricks.sliding_window_view(padded, 2 * reach + 1), axis=1) / math.log(2)
    around = np.maximum(around, np.median(power) / math.log(2))
    ratio = np.divide(power, around, out=np.zeros_like(around), where=around > 0)
    searched = ratio[FEWEST_WAVES - 1 : n // SHORTEST_PERIOD]
    best = int(np.argmax(searched))
    return n / (FEWEST_WAVES + best) if searched[best] > PEAK else None
