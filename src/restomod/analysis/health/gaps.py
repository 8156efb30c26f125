"""Validation minus training loss, with standard errors. Needs no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from restomod.analysis.health.curves import Curves, noise
from restomod.analysis.health.trends import autocorrelation_time

GAPS_AFTER = 128  # steps; before, the training loss falls too fast to be compared with
VALS_FOR_NOISE = 24  # validations that their noise is measured from
VAL_NOISE = 0.02  # nats; what it is at small batches


@dataclass(frozen=True)
class Gap:
    """Validation minus training loss at a validation."""

    step: float
    nats: float
    train_error: float
    """Standard error of the training loss."""
    val_error: float
    """Allowance for the choice of the validation tokens, which are the same at every validation."""

    @property
    def error(self) -> float:
        return math.hypot(self.train_error, self.val_error)


def gaps_of(seen: Curves) -> list[Gap]:
    """The gaps at all validations that can be compared."""
    compared = (seen.val_step >= GAPS_AFTER) & np.isfinite(seen.val_level)
    train_error = seen.val_level_error * math.sqrt(autocorrelation_time(seen.recent_loss))
    columns = seen.val_step, seen.val_loss - seen.val_level, train_error, seen.val_error
    return [Gap(*row) for row in np.column_stack(columns)[compared].tolist()]


def latest_gaps(gaps: list[Gap]) -> tuple[Gap, ...]:
    """The newest gap, and the mean of the newest two, weighted by their precision.

    The newest is the least precise: there are no steps after it yet. The error of the mean allows for both having the
    same error, as the same steps may be around both.
    """
    if len(gaps) == 1:
        return (gaps[0],)
    latest = gaps[-2:]
    weights = [1 / max(gap.train_error, 1e-6) ** 2 for gap in latest]
    nats, train_error = np.average([(g.nats, g.train_error) for g in latest], axis=0, weights=weights).tolist()
    return gaps[-1], Gap(gaps[-1].step, nats, train_error, gaps[-1].val_error)


def val_noise(seen: Curves) -> float:
    """Standard deviation of the validation losses upon their trend; an assumption where they are few."""
    latest = seen.val_loss[-2 * VALS_FOR_NOISE :]
    return noise(np.diff(latest)) / math.sqrt(3) if len(latest) >= VALS_FOR_NOISE else VAL_NOISE
