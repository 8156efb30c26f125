"""A run's numbers as arrays, and what is seen in noisy curves: levels, noise, slopes, repetition. Needs no torch."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from restomod.analysis.health.spikes import Spike, SpikeFinder
from restomod.analysis.health.trends import SIGMAS_PER_MAD, Array, moving_median, residual

ROWS = 8192  # of a curve
RECENT = 8192  # steps that are kept one by one
VALIDATIONS = 4096
DRAWN = np.random.default_rng(0).random(ROWS)  # which step of a row counts: at random, or it falls in with a rhythm
LARGEST = 1e100  # what is larger counts as infinite, and no square of what is not overflows
LARGEST_STEP = 2**53
ERROR_OF_TOKEN = 4.0  # nats: standard deviation of the losses of single tokens
FEWEST_FOR_PERIODS = 128
PEAK = 35.0  # times the level around it: noise has such a peak in no spectrum of 10,000, drifting noise either
LIKENESS = 7.0  # standard errors of an autocorrelation
LASTING = 0.5  # share of the amplitude of a wave that it has without its two largest eighths
SHORTEST_PERIOD = 8
FEWEST_WAVES = 5


@dataclass(frozen=True)
class Curves:
    """What `History` knows of a run. Lost numbers are NaN."""

    step: Array
    """First step of each row, (rows,): of the steps whose loss is finite and whose update was made."""
    loss: Array
    """Mean over the steps of a row."""
    grad_norm: Array
    """Of one step of each row, as is `ms`."""
    ms: Array
    row_steps: int
    """Steps a row; 1 in runs of up to `ROWS` steps."""
    updates: int
    """Steps in all rows, and in none yet."""
    recent_step: Array
    """The newest steps, at most `RECENT`, one by one, as is `recent_loss`."""
    recent_loss: Array
    first_rate: float
    """The learning rate of step 0; NaN where it is not known."""
    val_step: Array
    """Of the validations whose loss is finite, (validations,), as are the next four."""
    val_loss: Array
    val_error: Array
    """An allowance for the sampling error of each validation loss, from the number of its tokens."""
    val_level: Array
    """The training loss at that step, and its standard error; see `level_at`."""
    val_level_error: Array
    spikes: list[Spike]
    skipped: list[tuple[int, str]]
    """Steps without an update, and why, but for those that overflowed fp16."""
    not_finite: list[int]
    """Steps whose loss or gradient norm was not finite, but for those that overflowed fp16."""
    rollbacks: int
    steps_seen: int
    """One more than the last training step of which there is a record."""


class History:
    """Takes the records of `metrics.jsonl` in order, each once, and gives the run's `Curves` at any time.

    Up to `ROWS` steps nothing is lost. Then neighbouring rows are merged, again and again: the loss of a row is the
    mean of its steps; of gradient norms and times, whose medians matter, it has those of one step, drawn at random. The
    newest steps are kept one by one. So neither the memory nor the time of `curves_of_records` grows with the run.
    """

    def __init__(self) -> None:
        self._steps = np.empty((2 * RECENT, 4))  # step, loss, gradient norm, ms
        self._count = 0  # of them
        self._in_rows = 0  # how many of them are in rows already
        self._rows = np.empty((ROWS, 4))
        self._row_count, self._row_steps = 0, 1
        self._updates = 0
        self._validations: list[tuple[float, ...]] = []  # step, loss, its error, training loss, its error
        self._open: list[tuple[float, ...]] = []  # step, loss, its error: not all steps around it are known
        self._spikes = SpikeFinder()
        self._skipped: list[tuple[int, str]] = []
        self._not_finite: list[int] = []
        self._rollbacks = 0
        self._first_rate = math.nan
        self._last_step = self._last_validation = -1

    def add(self, record: Mapping[str, Any]) -> None:
        """Take the next record. What is not as expected, or of a step that is known already, is left out."""
        step, kind = record.get("step"), record.get("kind")
        if type(step) is not int or not 0 <= step < LARGEST_STEP:
            return
        if kind == "rollback":
            self._rollbacks += 1
        elif kind == "val" and step > self._last_validation and math.isfinite(loss := _number(record, "loss")):
            self._last_validation = step
            tokens = _number(record, "tokens")
            self._open.append((step, loss, ERROR_OF_TOKEN / math.sqrt(tokens) if tokens >= 1 else 0.0))
        elif kind == "train" and step > self._last_step:
            self._last_step = step
            self._add_step(step, record)

    def _add_step(self, step: int, record: Mapping[str, Any]) -> None:
        if step == 0:
            self._first_rate = _number(record, "lr")
        loss, norm = _number(record, "loss"), _number(record, "grad_norm")
        why = record.get("skipped")
        if why is not None and "fp16" in str(why):
            return
        if why is not None:
            self._skipped.append((step, str(why)))
        if not math.isfinite(loss) or ("grad_norm" in record and not math.isfinite(norm)):
            self._not_finite.append(step)
        elif why is None:
            if self._count == len(self._steps):
                self._make_room()
            self._steps[self._count] = step, loss, norm, _number(record, "ms")
            self._count += 1
            self._updates += 1

    def curves(self) -> Curves:
        """The curves so far."""
        self._digest()
        known = self._steps[: self._count]
        spikes = copy.deepcopy(self._spikes)
        spikes.scan(known[:, 0], known[:, 1], to_the_end=True)
        recent = known[-RECENT:, :2].copy()
        step, loss, grad_norm, ms = self._rows[: self._row_count].T.copy()
        validations = np.array([*self._validations, *map(self._with_level, self._open)], np.float64).reshape(-1, 5)
        val_step, val_loss, val_error, val_level, val_level_error = validations.T
        return Curves(
            step=step,
            loss=loss,
            grad_norm=grad_norm,
            ms=ms,
            row_steps=self._row_steps,
            updates=self._updates,
            recent_step=recent[:, 0],
            recent_loss=recent[:, 1],
            first_rate=self._first_rate,
            val_step=val_step,
            val_loss=val_loss,
            val_error=val_error,
            val_level=val_level,
            val_level_error=val_level_error,
            spikes=spikes.found,
            skipped=list(self._skipped),
            not_finite=list(self._not_finite),
            rollbacks=self._rollbacks,
            steps_seen=self._last_step + 1,
        )

    def _make_room(self) -> None:
        """Forget the older half of the single steps."""
        self._digest()
        self._count -= RECENT
        self._steps[: self._count] = self._steps[RECENT:]
        self._in_rows -= RECENT
        self._spikes.forget(RECENT)

    def _digest(self) -> None:
        """Process what later steps cannot change: whole rows, validations with enough steps around them, spikes."""
        while self._count - self._in_rows >= self._row_steps:
            if self._row_count == ROWS:
                self._rows[: ROWS // 2] = _merged(self._rows.reshape(-1, 2, 4), 0)
                self._row_count, self._row_steps = ROWS // 2, 2 * self._row_steps
                continue
            new = min((self._count - self._in_rows) // self._row_steps, ROWS - self._row_count)
            end = self._in_rows + new * self._row_steps
            groups = self._steps[self._in_rows : end].reshape(new, self._row_steps, 4)
            self._rows[self._row_count : self._row_count + new] = _merged(groups, self._row_count)
            self._in_rows, self._row_count = end, self._row_count + new
        while self._open and self._last_step >= self._open[0][0] + level_width(self._open[0][0]):
            self._validations.append(self._with_level(self._open.pop(0)))
            if len(self._validations) == VALIDATIONS:  # keep every second one of the older half, and the lowest
                half, lowest = VALIDATIONS // 2, min(self._validations, key=lambda known: known[1])
                older = [v for i, v in enumerate(self._validations[:half]) if i % 2 == 0 or v is lowest]
                self._validations[:half] = older
        self._spikes.scan(self._steps[: self._count, 0], self._steps[: self._count, 1])

    def _with_level(self, validation: tuple[float, ...]) -> tuple[float, ...]:
        """A validation, and the training loss at its step."""
        known = self._steps[: self._count]
        return (*validation, *(_level(known[:, 0], known[:, 1], validation[0]) or (math.nan, math.nan)))


def _merged(groups: Array, first: int) -> Array:
    """Rows of a curve, (rows, 4), from the steps or rows that go into each, (rows, n, 4)."""
    rows = np.arange(len(groups))
    drawn = groups[rows, (DRAWN[first + rows] * groups.shape[1]).astype(int)]
    return np.column_stack((groups[:, 0, 0], groups[:, :, 1].mean(axis=1), drawn[:, 2:]))


def curves_of_records(records: Iterable[Mapping[str, Any]]) -> Curves:
    """The curves of records in any order; of several records of one step the last counts."""
    history = History()
    last: dict[tuple[int, bool], Mapping[str, Any]] = {}
    for record in records:
        step, kind = record.get("step"), record.get("kind")
        if kind == "rollback":
            history.add(record)
        elif type(step) is int and (kind == "train" or (kind == "val" and math.isfinite(_number(record, "loss")))):
            last[step, kind == "train"] = record
    for at in sorted(last):
        history.add(last[at])
    return history.curves()


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


def level_at(curve: Curves, step: float) -> tuple[float, float] | None:
    """The training loss at one of the newest steps and its standard error, if the noise of every step is independent.

    By a line through the `level_width` steps before and after. None where fewer than half as many are near. Where there
    are no steps after it yet, the line goes through up to twice as many before, in runs long enough to be straight
    there, and is prolonged by one step.
    """
    return _level(curve.recent_step, curve.recent_loss, step)


def level_width(step: float) -> int:
    """How many steps before ``step``, and after it, the level there is taken from: the loss bends less and less."""
    return int(min(max(64.0, step / 8), 1024.0))


def _level(steps: Array, loss: Array, step: float) -> tuple[float, float] | None:
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
    around = moving_median(power, reach) / math.log(2)
    around = np.maximum(around, np.median(power) / math.log(2))
    ratio = np.divide(power, around, out=np.zeros_like(around), where=around > 0)
    searched = ratio[FEWEST_WAVES - 1 : n // SHORTEST_PERIOD]
    best = int(np.argmax(searched))
    length = n / (FEWEST_WAVES + best)
    return length if searched[best] > PEAK and _lasts(x, length) else None


def _lasts(x: Array, length: float) -> bool:
    """Whether a wave is all over ``x``, and not only where a curve bends, as when a learning rate begins to decay."""
    wave = np.exp(-2j * np.pi * np.arange(len(x)) / length)
    amplitudes = np.array([part.mean() for part in np.array_split(x * wave, 8)])
    mean = amplitudes.mean()
    in_phase = np.sort((amplitudes * mean.conjugate()).real)
    return bool(in_phase[:6].mean() > LASTING * abs(mean) ** 2)
