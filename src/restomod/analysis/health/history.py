"""History of a run's metrics as arrays of bounded size. Does not import torch."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from restomod.analysis.health.noise import Array, level_at, level_width
from restomod.analysis.health.spikes import Spike, SpikeFinder

ROWS = 8192  # maximum number of rows of a curve
RECENT = 8192  # newest steps, kept without merging
VALIDATIONS = 4096  # maximum number of validations
DRAWN = np.random.default_rng(0).random(ROWS)  # step that represents a row; random, so that periods do not alias
LARGEST = 1e100  # larger values count as infinite, so that squares cannot overflow
LARGEST_STEP = 2**53  # exact in float64
ERROR_OF_TOKEN = 4.0  # standard deviation of the losses of single tokens, in nats


def number(value: Any) -> float:
    """Return a value of a record as a float; NaN unless it is a finite number below `LARGEST`."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST
    return float(value) if good else math.nan


@dataclass(frozen=True)
class Curves:
    """Curves of a run, from `History`. All arrays are float64; unknown values are NaN.

    Shapes: rows = steps with finite loss and an applied update, merged to at most `ROWS`; recent = the newest of these
    steps, at most `RECENT`, not merged; vals = validations with finite loss.
    """

    step: Array
    """First step of each row, (rows,)."""
    loss: Array
    """Mean training loss of each row in nats, (rows,)."""
    grad_norm: Array
    """Gradient norm of one step of each row, (rows,)."""
    ms: Array
    """Milliseconds of one step of each row, (rows,)."""
    row_steps: int
    """Steps per row; 1 in runs of up to `ROWS` steps."""
    updates: int
    """Number of applied updates."""
    recent_step: Array
    """Newest steps, (recent,)."""
    recent_loss: Array
    """Training loss of the newest steps in nats, (recent,)."""
    first_rate: float
    """Learning rate of step 0; NaN if unknown."""
    val_step: Array
    """Step of each validation, (vals,)."""
    val_loss: Array
    """Validation losses in nats, (vals,)."""
    val_error: Array
    """Bound on the sampling error of each validation loss, from its number of tokens, (vals,)."""
    val_level: Array
    """Level of the training loss at each validation, (vals,); see `restomod.analysis.health.noise.level_at`."""
    val_level_error: Array
    """Standard error of `val_level`, (vals,)."""
    spikes: list[Spike]
    """Loss spikes in order of their steps."""
    skipped: list[tuple[int, str]]
    """Step and reason of each skipped update, without fp16 overflows."""
    not_finite: list[int]
    """Steps whose loss or gradient norm was not finite, without fp16 overflows."""
    rollbacks: int
    """Number of rollbacks to a checkpoint."""
    steps_seen: int
    """Last recorded training step plus one."""


class History:
    """Accumulator of the records of `metrics.jsonl`. It returns the `Curves` of a run at any time.

    Memory is bounded: beyond `ROWS` steps, pairs of rows are merged, repeatedly. The loss of a row is the mean of its
    steps. Gradient norm and time are those of one random step of the row, because their medians are needed.
    """

    def __init__(self) -> None:
        self._steps = np.empty((2 * RECENT, 4))  # step, loss, gradient norm, ms
        self._count = 0  # used entries of self._steps
        self._in_rows = 0  # entries of self._steps that are already in rows
        self._rows = np.empty((ROWS, 4))
        self._row_count, self._row_steps = 0, 1
        self._updates = 0
        self._validations: list[tuple[float, ...]] = []  # step, loss, its error, training loss, its error
        self._open: list[tuple[float, ...]] = []  # step, loss, its error; later steps are still needed
        self._spikes = SpikeFinder()
        self._skipped: list[tuple[int, str]] = []
        self._not_finite: list[int] = []
        self._rollbacks = 0
        self._first_rate = math.nan
        self._last_step = self._last_validation = -1

    def add(self, record: Mapping[str, Any]) -> None:
        """Add the next record, in order of steps. Malformed records and records of known steps are ignored."""
        step, kind = record.get("step"), record.get("kind")
        if type(step) is not int or not 0 <= step < LARGEST_STEP:
            return
        if kind == "rollback":
            self._rollbacks += 1
        elif kind == "val" and step > self._last_validation and math.isfinite(loss := number(record.get("loss"))):
            self._last_validation = step
            tokens = number(record.get("tokens"))
            self._open.append((step, loss, ERROR_OF_TOKEN / math.sqrt(tokens) if tokens >= 1 else 0.0))
        elif kind == "train" and step > self._last_step:
            self._last_step = step
            self._add_step(step, record)

    def _add_step(self, step: int, record: Mapping[str, Any]) -> None:
        if step == 0:
            self._first_rate = number(record.get("lr"))
        loss, norm = number(record.get("loss")), number(record.get("grad_norm"))
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
            self._steps[self._count] = step, loss, norm, number(record.get("ms"))
            self._count += 1
            self._updates += 1

    def curves(self) -> Curves:
        """Return the curves of the records so far."""
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
        """Drop the older half of the unmerged steps."""
        self._digest()
        self._count -= RECENT
        self._steps[: self._count] = self._steps[RECENT:]
        self._in_rows -= RECENT
        self._spikes.forget(RECENT)

    def _digest(self) -> None:
        """Process results that later steps cannot change: full rows, validations with enough later steps, spikes."""
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
        """Append the level of the training loss at a validation's step, and its standard error."""
        known = self._steps[: self._count]
        return (*validation, *(level_at(known[:, 0], known[:, 1], validation[0]) or (math.nan, math.nan)))


def _merged(groups: Array, first: int) -> Array:
    """Merge steps or rows, (rows, n, 4), into rows, (rows, 4)."""
    rows = np.arange(len(groups))
    drawn = groups[rows, (DRAWN[first + rows] * groups.shape[1]).astype(int)]
    return np.column_stack((groups[:, 0, 0], groups[:, :, 1].mean(axis=1), drawn[:, 2:]))


def curves_from_records(records: Iterable[Mapping[str, Any]]) -> Curves:
    """Return the curves of records in any order; the last record of a step replaces earlier ones."""
    history = History()
    last: dict[tuple[int, bool], Mapping[str, Any]] = {}
    for record in records:
        step, kind = record.get("step"), record.get("kind")
        if kind == "rollback":
            history.add(record)
        elif type(step) is int and (kind == "train" or (kind == "val" and math.isfinite(number(record.get("loss"))))):
            last[step, kind == "train"] = record
    for at in sorted(last):
        history.add(last[at])
    return history.curves()
