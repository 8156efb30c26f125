"""Losses of a run by steps, tokens, FLOPs, time and money, and curves of several runs laid over each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeGuard, get_args

import numpy as np
from numpy.typing import NDArray

from restomod.analysis.health.curves import LARGEST
from restomod.runs.reader import Record, Run

Array = NDArray[np.float64]
Axis = Literal["steps", "tokens", "flops", "time", "dollars"]
AXES: tuple[Axis, ...] = get_args(Axis)
LABELS: dict[Axis, str] = {
    "steps": "steps",
    "tokens": "tokens",
    "flops": "FLOPs",
    "time": "hours in steps",
    "dollars": "dollars",
}
Measure = Literal["validation loss", "training loss"]
TRAIN_POINTS = 60  # means over blocks of steps, of which the last is the level at the end


@dataclass(frozen=True)
class Curve:
    """Losses at growing points of the run: both arrays have shape (n,)."""

    x: Array
    loss: Array

    def at(self, x: float) -> float | None:
        """The loss at ``x``, along a line between the two measurements around it; None outside them."""
        if not len(self.x) or not self.x[0] <= x <= self.x[-1]:
            return None
        return float(np.interp(x, self.x, self.loss))

    def first_below(self, target: float) -> float | None:
        """Where the loss first is at or below ``target``, along a line from the measurement before; None if never."""
        below = np.flatnonzero(self.loss <= target + 1e-12)
        if not len(below):
            return None
        i = int(below[0])
        if i == 0 or self.loss[i] >= target:
            return float(self.x[i])
        share = (self.loss[i - 1] - target) / (self.loss[i - 1] - self.loss[i])
        return float(self.x[i - 1] + share * (self.x[i] - self.x[i - 1]))


def measured(run: Run, measure: Measure) -> tuple[Array, Array]:
    """Steps at which a loss is known, and that loss, both (n,): each validation, or means of the training loss."""
    if measure == "validation loss":
        known = [(r["step"], r["loss"]) for r in run.val if _is_number(r.get("loss"))]
        table = np.array(known, dtype=np.float64).reshape(-1, 2)
        return table[:, 0], table[:, 1]
    known = [(r["step"], r["loss"]) for r in run.train if _is_number(r.get("loss"))]
    table = np.array(known, dtype=np.float64).reshape(-1, 2)
    width = max(1, math.ceil(len(table) / TRAIN_POINTS))
    whole = table[len(table) % width :].reshape(-1, width, 2)  # what is left over is the earliest
    return whole[:, -1, 0] + 1, whole[:, :, 1].mean(axis=1)


def positions(run: Run, steps: Array, axis: Axis, price: float | None) -> Array:
    """Where on an axis a run is after so many updates.

    Args:
        run: whose.
        steps: (n,) updates made.
        axis: of which.
        price: US dollars for one GPU and one hour; the axis of dollars needs it.
    """
    if axis == "steps":
        return steps
    if axis == "tokens":
        return steps * run.tokens_at(1)
    if axis == "flops":
        return steps * float(run.flops_at(1))
    return hours_at(run, steps) if axis == "time" else hours_at(run, steps, of_gpus=True) * (price or 0.0)


def hours_at(run: Run, steps: Array, of_gpus: bool = False) -> Array:
    """Hours that the first so many updates took, (n,): the sum of their times, without validating and saving.

    Args:
        run: whose.
        steps: (n,) updates made.
        of_gpus: count each hour as often as there were GPUs (processes), which may change when a run is resumed.
    """
    at = np.array([-1] + [r["step"] for r in run.train], dtype=np.float64)
    counts = [run.processes_of(r) if of_gpus else 1 for r in run.train]
    spent = [count * (_ms(r) or 0.0) / 3.6e6 for r, count in zip(run.train, counts, strict=True)]
    hours = np.cumsum([0.0, *spent])
    return hours[np.searchsorted(at, steps - 1, side="right") - 1]


def loss_curve(run: Run, measure: Measure, axis: Axis = "tokens", price: float | None = None) -> Curve:
    """The losses of a run along an axis. On one where it stood still (no times are known) it has no points."""
    steps, loss = measured(run, measure)
    x = positions(run, steps, axis, price)
    if len(x) > 1 and x[0] == x[-1]:
        return Curve(x[:0], loss[:0])
    return Curve(x, loss)


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """The mean of curves where all of them are known, at every point where one was measured."""
    curves = [c for c in curves if len(c.x)]
    if not curves:
        return Curve(np.zeros(0), np.zeros(0))
    first, last = max(c.x[0] for c in curves), min(c.x[-1] for c in curves)
    x = np.unique(np.concatenate([c.x for c in curves]))
    x = x[(x >= first) & (x <= last)]
    losses = np.array([np.interp(x, c.x, c.loss) for c in curves])
    return Curve(x, losses.mean(axis=0) if len(x) else x)


def _ms(record: Record) -> float | None:
    value = record.get("ms")
    return float(value) if _is_number(value) else None


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and abs(value) < LARGEST
