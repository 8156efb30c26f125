"""Spike guard: policy for loss spikes and non-finite losses (skip the update, roll back, or stop the run).

A spike is a loss many standard deviations above the mean of recent losses. The guard's state is a function of
`metrics.jsonl`, so a resumed run makes the same decisions as an uninterrupted run.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable
from typing import Any, Literal

from restomod.config.run import RunConfig
from restomod.engine.step import StepResult

WINDOW = 128  # number of recent losses
MIN_LOSSES = 64  # number of losses needed for a limit
MIN_DEVIATION = 0.02  # nats; losses of a model that memorised its text have almost no deviation
SKIPS_BEFORE_ROLLBACK = 3
SKIPS_BEFORE_STOP = 10
ROLLBACKS_BEFORE_STOP = 3
MAX_HALVINGS = 24  # consecutive halvings of the fp16 loss scale, from its maximum to far below 1

Action = Literal["update", "skip", "rollback", "stop"]


class SpikeGuard:
    """Decision to update, skip, roll back or stop, for the steps of a run in order.

    Args:
        config: run configuration, with ``on_spike`` and ``spike_sigmas``.
        records: records of earlier steps, from which a resumed run continues.
        fp16: whether the compute dtype is fp16, where gradients may overflow until the loss scale is small enough.
    """

    def __init__(self, config: RunConfig, records: Iterable[dict[str, Any]] = (), fp16: bool = False) -> None:
        self.fp16 = fp16
        self.policy, self.sigmas = config.on_spike, config.spike_sigmas
        self.losses: deque[float] = deque(maxlen=WINDOW)
        self.skipped = 0  # consecutive skipped steps
        self.rollbacks: dict[int, int] = {}  # number of rollbacks by checkpoint step
        self._replay(records)

    def loss_limit(self) -> float:
        """Return the maximum loss that is not a spike, in nats; infinity without a limit."""
        if not self.sigmas or len(self.losses) < MIN_LOSSES:
            return math.inf
        mean, deviation = self._mean_and_deviation()
        return mean + self.sigmas * deviation

    def problem(self, result: StepResult) -> str | None:
        """Describe the problem of a skipped step; None if the weights were updated."""
        if not result.refused:
            return None
        if self._overflowed(result):
            return "fp16 gradients overflowed, so the loss scale is halved"
        if not math.isfinite(result.loss) or not math.isfinite(result.grad_norm):
            return f"the loss is {result.loss:.4f} and the gradient norm {result.grad_norm:.4f}"
        mean, deviation = self._mean_and_deviation()
        above = (result.loss - mean) / deviation
        return f"the loss is {result.loss:.4f}, {above:.0f} standard deviations above the recent mean"

    def decide(self, result: StepResult) -> Action:
        """Record the result of a step and return the action."""
        self._remember(result.loss, result.refused)
        if not result.refused:
            return "update"
        if self._overflowed(result) and self.skipped <= MAX_HALVINGS:
            return "skip"
        if self.policy == "rollback":
            return "rollback" if self.skipped >= SKIPS_BEFORE_ROLLBACK else "skip"
        return "stop" if self.policy == "stop" or self.skipped >= SKIPS_BEFORE_STOP else "skip"

    def rolled_back(self, step: int, records: Iterable[dict[str, Any]]) -> bool:
        """Reset the guard to a checkpoint.

        Args:
            step: step of the checkpoint.
            records: records of the steps before it.

        Returns:
            False after too many rollbacks to this checkpoint, otherwise True.
        """
        self.rollbacks[step] = self.rollbacks.get(step, 0) + 1
        self.losses.clear()
        self.skipped = 0
        self._replay(records)
        return self.rollbacks[step] <= ROLLBACKS_BEFORE_STOP

    def _replay(self, records: Iterable[dict[str, Any]]) -> None:
        for record in records:
            if record.get("kind") == "train":
                self._remember(record.get("loss"), "skipped" in record)

    def _remember(self, loss: float | None, refused: bool) -> None:
        if not refused and isinstance(loss, (int, float)) and math.isfinite(loss):
            self.losses.append(loss)
            self.skipped = 0
        else:
            self.skipped += 1

    def _mean_and_deviation(self) -> tuple[float, float]:
        mean = statistics.fmean(self.losses)
        return mean, max(statistics.pstdev(self.losses, mean), MIN_DEVIATION)

    def _overflowed(self, result: StepResult) -> bool:
        return self.fp16 and math.isfinite(result.loss) and not math.isfinite(result.grad_norm)
