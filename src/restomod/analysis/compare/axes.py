"""Loss curves of a run by steps, tokens, FLOPs, time and money, and mean curves of several runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from restomod.analysis.health.history import number
from restomod.runs.reader import Run

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
TRAIN_POINTS = 60  # block means of the training loss; the last is the final loss


@dataclass(frozen=True)
class Curve:
    """Losses at increasing points ``x`` of an axis, (n,) each."""

    x: Array
    loss: Array

    def at(self, x: float) -> float | None:
        """The loss at ``x``, interpolated linearly; None outside the measurements."""
        if not len(self.x) or not self.x[0] <= x <= self.x[-1]:
            return None
        return float(np.interp(x, self.x, self.loss))

    def first_below(self, target: float) -> float | None:
        """Where the loss first reaches ``target``, interpolated linearly; None if never."""
        below = np.flatnonzero(self.loss <= target + 1e-12)
        if not len(below):
            return None
        i = int(below[0])
        if i == 0 or self.loss[i] >= target:
            return float(self.x[i])
        share = (self.loss[i - 1] - target) / (self.loss[i - 1] - self.loss[i])
        return float(self.x[i - 1] + share * (self.x[i] - self.x[i - 1]))


def measured_losses(run: Run, measure: Measure) -> tuple[Array, Array]:
    """Steps and losses, (n,) each: of every validation, or block means of the training loss."""
    records = run.val if measure == "validation loss" else run.train
    known = [(r["step"], loss) for r in records if math.isfinite(loss := number(r.get("loss")))]
    table = np.array(known, dtype=np.float64).reshape(-1, 2)
    if measure == "validation loss":
        return table[:, 0], table[:, 1]
    width = max(1, math.ceil(len(table) / TRAIN_POINTS))
    blocks = table[len(table) % width :].reshape(-1, width, 2)  # drops the earliest steps
    return blocks[:, -1, 0] + 1, blocks[:, :, 1].mean(axis=1)


def axis_positions(run: Run, steps: Array, axis: Axis, price: float | None) -> Array:
    """Position of a run on an axis after each number of updates, (n,). The price is that of one GPU and one hour."""
    if axis == "steps":
        return steps
    if axis == "tokens":
        return steps * run.tokens_at(1)
    if axis == "flops":
        return steps * float(run.flops_at(1))
    return Clock(run).hours_at(steps) if axis == "time" else Clock(run, True).hours_at(steps) * (price or 0.0)


class Clock:
    """Time of a run in steps, without validation and saving.

    With ``of_gpus`` in GPU hours: times the number of GPUs (processes), which may change when a run is resumed.
    """

    def __init__(self, run: Run, of_gpus: bool = False) -> None:
        counts = [run.processes_of(r) if of_gpus else 1 for r in run.train]
        ms = np.nan_to_num([number(r.get("ms")) for r in run.train])
        self._steps = np.array([r["step"] for r in run.train], dtype=np.int64)
        self._hours = np.concatenate([[0.0], np.cumsum(np.array(counts) * ms / 3.6e6)])

    def hours_at(self, steps: NDArray[Any]) -> Array:
        """Hours spent before each of ``steps``, that is, after so many updates."""
        return self._hours[np.searchsorted(self._steps, steps)]


def loss_curve(run: Run, measure: Measure, axis: Axis = "tokens", price: float | None = None) -> Curve:
    """Losses of a run along an axis; no points where its position does not change, as without recorded times."""
    steps, loss = measured_losses(run, measure)
    x = axis_positions(run, steps, axis, price)
    if len(x) > 1 and x[0] == x[-1]:
        return Curve(x[:0], loss[:0])
    return Curve(x, loss)


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """Mean of curves over their common range, at every point where one was measured."""
    curves = [c for c in curves if len(c.x)]
    if not curves:
        return Curve(np.zeros(0), np.zeros(0))
    first, last = max(c.x[0] for c in curves), min(c.x[-1] for c in curves)
    x = np.unique(np.concatenate([c.x for c in curves]))
    x = x[(x >= first) & (x <= last)]
    losses = np.array([np.interp(x, c.x, c.loss) for c in curves])
    return Curve(x, losses.mean(axis=0) if len(x) else x)
