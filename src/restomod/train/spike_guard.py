"""Keeps bad steps away from the weights: losses and gradients that are not finite, and spikes.

A spike is a loss far above the last ones, in units of their standard deviation. What a step is judged by is in
`metrics.jsonl`, so a run that was stopped judges as one that was not.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable
from typing import Any, Literal

from restomod.config.run import RunConfig
from restomod.engine.step import StepResult

WINDOW = 128  # losses that a new one is compared with
ENOUGH = 64  # fewer of them say nothing
SMALLEST_DEVIATION = 0.02  # nats; a run that has learnt its text by heart has losses that hardly differ
SKIPS_BEFORE_ROLLBACK = 3
SKIPS_BEFORE_STOP = 10
ROLLBACKS_BEFORE_STOP = 3
HALVINGS = 24  # of fp16's loss scale in a row: from any that it can have to far below 1

Action = Literal["update", "skip", "rollback", "stop"]


class Guard:
    """Judges the steps of a run, in order."""

    def __init__(self, config: RunConfig, records: Iterable[dict[str, Any]] = (), fp16: bool = False) -> None:
        """Go on where the train records of `metrics.jsonl` end.

        Args:
            config: of the run.
            records: of `metrics.jsonl`.
            fp16: whether the gradients overflow now and then, while the scale of the loss is found.
        """
        self.fp16 = fp16
        self.policy, self.sigmas = config.on_spike, config.spike_sigmas
        self.losses: deque[float] = deque(maxlen=WINDOW)
        self.skipped = 0  # steps in a row
        self.rollbacks: dict[int, int] = {}  # how many, by the checkpoint that was gone back to
        for record in records:
            if record.get("kind") == "train":
                self._remember(record.get("loss"), "skipped" in record)

    def loss_limit(self) -> float:
        """The loss_limit loss that is no spike."""
        if not self.sigmas or len(self.losses) < ENOUGH:
            return math.inf
        mean, deviation = self._usual()
        return mean + self.sigmas * deviation

    def _usual(self) -> tuple[float, float]:
        """Mean and standard deviation of the last losses."""
        mean = statistics.fmean(self.losses)
        return mean, max(statistics.pstdev(self.losses, mean), SMALLEST_DEVIATION)

    def problem(self, made: StepResult) -> str | None:
        """What was wrong with a step; None if nothing was."""
        if not made.refused:
            return None
        if self._overflowed(made):
            return "the gradients overflowed fp16, so the loss is scaled by half as much from here on"
        if not math.isfinite(made.loss) or not math.isfinite(made.grad_norm):
            return f"the loss is {made.loss} and the gradient norm {made.grad_norm}"
        mean, deviation = self._usual()
        above = (made.loss - mean) / deviation
        return f"the loss is {made.loss:.4f}, {above:.0f} standard deviations above the mean of the last ones"

    def judge(self, made: StepResult) -> Action:
        """What to do about a step, and remember it."""
        self._remember(made.loss, made.refused)
        if not made.refused:
            return "update"
        if self._overflowed(made) and self.skipped <= HALVINGS:
            return "skip"
        if self.policy == "rollback":
            return "rollback" if self.skipped >= SKIPS_BEFORE_ROLLBACK else "skip"
        return "stop" if self.policy == "stop" or self.skipped >= SKIPS_BEFORE_STOP else "skip"

    def rolled_back(self, step: int, records: Iterable[dict[str, Any]]) -> bool:
        """Go on from the checkpoint of ``step``, before which ``records`` were made; False if that was tried enough."""
        self.rollbacks[step] = self.rollbacks.get(step, 0) + 1
        self.losses.clear()
        self.skipped = 0
        for record in records:
            if record.get("kind") == "train":
                self._remember(record.get("loss"), "skipped" in record)
        return self.rollbacks[step] <= ROLLBACKS_BEFORE_STOP

    def _overflowed(self, made: StepResult) -> bool:
        return self.fp16 and math.isfinite(made.loss) and not math.isfinite(made.grad_norm)

    def _remember(self, loss: float | None, refused: bool) -> None:
        if not refused and isinstance(loss, (int, float)) and math.isfinite(loss):
            self.losses.append(loss)
            self.skipped = 0
        else:
            self.skipped += 1
