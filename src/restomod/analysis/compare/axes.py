"""Loss curves of runs by steps, tokens, FLOPs, time or cost, and mean curves of several runs."""

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
    """Losses along an axis."""

    x: Array
    """Increasing positions on the axis, (n,)."""
    loss: Array
    """Losses in nats, (n,)."""

    def at(self, x: float) -> float | None:
        """Interpolate the loss at ``x`` linearly; None outside the measured range."""
        if not len(self.x) or not self.x[0] <= x <= self.x[-1]:
            return None
        return float(np.interp(x, self.x, self.loss))

    def first_below(self, target: float) -> float | None:
        """Find the first position where the loss reaches ``target``, interpolated linearly; None if never."""
        below = np.flatnonzero(self.loss <= target + 1e-12)
        if not len(below):
            return None
        i = int(below[0])
        if i == 0 or self.loss[i] >= target:
            return float(self.x[i])
        share = (self.loss[i - 1] - target) / (self.loss[i - 1] - self.loss[i])
        return float(self.x[i - 1] + share * (self.x[i] - self.x[i - 1]))


def measured_losses(run: Run, measure: Measure) -> tuple[Array, Array]:
    """Return steps and losses, (n,) each.

    Args:
        run: run to read.
        measure: "validation loss" for the loss of every validation; "training loss" for means over at most
            `TRAIN_POINTS` equal blocks of steps.
    """
    records = run.val if measure == "validation loss" else run.train
    known = [(r["step"], loss) for r in records if math.isfinite(loss := number(r.get("loss")))]
    table = np.array(known, dtype=np.float64).reshape(-1, 2)
    if measure == "validation loss":
        return table[:, 0], table[:, 1]
    width = max(1, math.ceil(len(table) / TRAIN_POINTS))
    blocks = table[len(table) % width :].reshape(-1, width, 2)  # drops the earliest steps
    return blocks[:, -1, 0] + 1, blocks[:, :, 1].mean(axis=1)


def axis_positions(run: Run, steps: Array, axis: Axis, price: float | None) -> Array:
    """Return the position of a run on an axis after each number of updates, (n,).

    Args:
        run: run to read.
        steps: numbers of updates, (n,).
        axis: axis of the positions.
        price: US dollars per GPU hour; None: 0.
    """
    if axis == "steps":
        return steps
    if axis == "tokens":
        return steps * run.tokens_at(1)
    if axis == "flops":
        return steps * float(run.flops_at(1))
    return Clock(run).hours_at(steps) if axis == "time" else Clock(run, True).hours_at(steps) * (price or 0.0)


class Clock:
    """Cumulative time of a run in training steps, without validation and saving."""

    def __init__(self, run: Run, of_gpus: bool = False) -> None:
        """Read the step times of a run.

        Args:
            run: run to read.
            of_gpus: whether to count GPU hours, the time multiplied by the number of ranks at that time.
        """
        counts = [run.processes_of(r) if of_gpus else 1 for r in run.train]
        ms = np.nan_to_num([number(r.get("ms")) for r in run.train])
        self._steps = np.array([r["step"] for r in run.train], dtype=np.int64)
        self._hours = np.concatenate([[0.0], np.cumsum(np.array(counts) * ms / 3.6e6)])

    def hours_at(self, steps: NDArray[Any]) -> Array:
        """Return the hours in steps before each of ``steps``, (n,)."""
        return self._hours[np.searchsorted(self._steps, steps)]


def loss_curve(run: Run, measure: Measure, axis: Axis = "tokens", price: float | None = None) -> Curve:
    """Return the losses of a run along an axis; empty if its position does not change (no recorded times).

    Args:
        run: run to read.
        measure: loss to return.
        axis: axis of the curve.
        price: US dollars per GPU hour, for the axis "dollars".
    """
    steps, loss = measured_losses(run, measure)
    x = axis_positions(run, steps, axis, price)
    if len(x) > 1 and x[0] == x[-1]:
        return Curve(x[:0], loss[:0])
    return Curve(x, loss)


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """Average curves over their common range, at every measured point of any of them."""
    curves = [c for c in curves if len(c.x)]
    if not curves:
        return Curve(np.zeros(0), np.zeros(0))
    first, last = max(c.x[0] for c in curves), min(c.x[-1] for c in curves)
    x = np.unique(np.concatenate([c.x for c in curves]))
    x = x[(x >= first) & (x <= last)]
    losses = np.array([np.interp(x, c.x, c.loss) for c in curves])
    return Curve(x, losses.mean(axis=0) if len(x) else x)
