"""Spike guard: which steps are skipped, and when a run rolls back or stops, after losses that spike or are not finite.

A spike is a loss far above the recent ones, in units of their standard deviation. The guard's state follows from
`metrics.jsonl`, so a resumed run decides like one that was never stopped.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable
from typing import Any, Literal

from restomod.config.run import RunConfig
from restomod.engine.step import StepResult

WINDOW = 128  # recent losses that a new one is compared with
MIN_LOSSES = 64  # fewer give no limit
MIN_DEVIATION = 0.02  # nats; a run that has memorised its text has losses that hardly differ
SKIPS_BEFORE_ROLLBACK = 3
SKIPS_BEFORE_STOP = 10
ROLLBACKS_BEFORE_STOP = 3
MAX_HALVINGS = 24  # of fp16's loss scale in a row: from its largest value to far below 1

Action = Literal["update", "skip", "rollback", "stop"]


class SpikeGuard:
    """Decides about the steps of a run, in order; a resumed run continues from its ``records``.

    ``fp16``: gradients may overflow while the loss scale is being found.
    """

    def __init__(self, config: RunConfig, records: Iterable[dict[str, Any]] = (), fp16: bool = False) -> None:
        self.fp16 = fp16
        self.policy, self.sigmas = config.on_spike, config.spike_sigmas
        self.losses: deque[float] = deque(maxlen=WINDOW)
        self.skipped = 0  # consecutive skipped steps
        self.rollbacks: dict[int, int] = {}  # number of rollbacks by the checkpoint's step
        self._replay(records)

    def loss_limit(self) -> float:
        """The largest loss that is not a spike."""
        if not self.sigmas or len(self.losses) < MIN_LOSSES:
            return math.inf
        mean, deviation = self._mean_and_deviation()
        return mean + self.sigmas * deviation

    def problem(self, result: StepResult) -> str | None:
        """What was wrong with a step; None if it was an update."""
        if not result.refused:
            return None
        if self._overflowed(result):
            return "the gradients overflowed fp16, so the loss is scaled by half as much from here on"
        if not math.isfinite(result.loss) or not math.isfinite(result.grad_norm):
            return f"the loss is {result.loss:.4f} and the gradient norm {result.grad_norm:.4f}"
        mean, deviation = self._mean_and_deviation()
        above = (result.loss - mean) / deviation
        return f"the loss is {result.loss:.4f}, {above:.0f} standard deviations above the mean of the last ones"

    def decide(self, result: StepResult) -> Action:
        """What to do after a step, which is remembered."""
        self._remember(result.loss, result.refused)
        if not result.refused:
            return "update"
        if self._overflowed(result) and self.skipped <= MAX_HALVINGS:
            return "skip"
        if self.policy == "rollback":
            return "rollback" if self.skipped >= SKIPS_BEFORE_ROLLBACK else "skip"
        return "stop" if self.policy == "stop" or self.skipped >= SKIPS_BEFORE_STOP else "skip"

    def rolled_back(self, step: int, records: Iterable[dict[str, Any]]) -> bool:
        """Continue from the checkpoint of ``step``, which ``records`` precede; False after too many rollbacks to it."""
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
