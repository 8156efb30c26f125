"""History of a run's metrics as arrays of bounded size. Needs no torch."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from restomod.analysis.health.noise import Array, level_at, level_width
from restomod.analysis.health.spikes import Spike, SpikeFinder

ROWS = 8192  # rows of a curve, at most
RECENT = 8192  # newest steps kept one by one
VALIDATIONS = 4096
DRAWN = np.random.default_rng(0).random(ROWS)  # which step represents a row; random, to avoid aliasing with a rhythm
LARGEST = 1e100  # larger values count as infinite, so that squares cannot overflow
LARGEST_STEP = 2**53
ERROR_OF_TOKEN = 4.0  # nats: standard deviation of the losses of single tokens


def number(value: Any) -> float:
    """A value of a record as a float; NaN for anything but a finite number below `LARGEST`."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST
    return float(value) if good else math.nan


@dataclass(frozen=True)
class Curves:
    """Curves of a run, from `History`. Unknown values are NaN.

    Shapes: rows = steps with finite loss and an applied update, merged to at most `ROWS`; recent = the newest of these
    steps, at most `RECENT`, unmerged; vals = validations with finite loss.
    """

    step: Array
    """(rows,): first step of each row."""
    loss: Array
    """(rows,): mean over the steps of a row."""
    grad_norm: Array
    """(rows,): of one step of each row, as is `ms`."""
    ms: Array
    row_steps: int
    """Steps per row; 1 in runs of up to `ROWS` steps."""
    updates: int
    """Number of updates applied."""
    recent_step: Array
    recent_loss: Array
    """(recent,)."""
    first_rate: float
    """Learning rate of step 0; NaN if unknown."""
    val_step: Array
    val_loss: Array
    """(vals,)."""
    val_error: Array
    """(vals,): bound on the sampling error of each validation loss, from its number of tokens."""
    val_level: Array
    """(vals,): level of the training loss at that step, see `level_at`."""
    val_level_error: Array
    """(vals,): standard error of `val_level`."""
    spikes: list[Spike]
    skipped: list[tuple[int, str]]
    """Step and reason of each skipped update, fp16 overflows excluded."""
    not_finite: list[int]
    """Steps whose loss or gradient norm was not finite, fp16 overflows excluded."""
    rollbacks: int
    steps_seen: int
    """Last recorded training step plus one."""


class History:
    """Collects the records of `metrics.jsonl`, in order and each once, and gives the run's `Curves` at any time.

    Memory and time are bounded: beyond `ROWS` steps, neighbouring rows are merged, repeatedly. The loss of a row is the
    mean of its steps; gradient norm and time, whose medians matter, are those of one step, drawn at random.
    """

    def __init__(self) -> None:
        self._steps = np.empty((2 * RECENT, 4))  # step, loss, gradient norm, ms
        self._count = 0  # of self._steps
        self._in_rows = 0  # how many of self._steps are in rows already
        self._rows = np.empty((ROWS, 4))
        self._row_count, self._row_steps = 0, 1
        self._updates = 0
        self._validations: list[tuple[float, ...]] = []  # step, loss, its error, training loss, its error
        self._open: list[tuple[float, ...]] = []  # step, loss, its error; steps around it are missing
        self._spikes = SpikeFinder()
        self._skipped: list[tuple[int, str]] = []
        self._not_finite: list[int] = []
        self._rollbacks = 0
        self._first_rate = math.nan
        self._last_step = self._last_validation = -1

    def add(self, record: Mapping[str, Any]) -> None:
        """Add the next record. Malformed records, and those of known steps, are ignored."""
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
        """Drop the older half of the unmerged steps."""
        self._digest()
        self._count -= RECENT
        self._steps[: self._count] = self._steps[RECENT:]
        self._in_rows -= RECENT
        self._spikes.forget(RECENT)

    def _digest(self) -> None:
        """Process what later steps cannot change: full rows, validations with enough steps around them, spikes."""
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
        """A validation with the level of the training loss at its step, and its error."""
        known = self._steps[: self._count]
        return (*validation, *(level_at(known[:, 0], known[:, 1], validation[0]) or (math.nan, math.nan)))


def _merged(groups: Array, first: int) -> Array:
    """Merge steps or rows, (rows, n, 4), into rows, (rows, 4)."""
    rows = np.arange(len(groups))
    drawn = groups[rows, (DRAWN[first + rows] * groups.shape[1]).astype(int)]
    return np.column_stack((groups[:, 0, 0], groups[:, :, 1].mean(axis=1), drawn[:, 2:]))


def curves_from_records(records: Iterable[Mapping[str, Any]]) -> Curves:
    """Curves of records in any order; of several records of one step the last counts."""
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
