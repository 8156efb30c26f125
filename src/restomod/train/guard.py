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

from restomod.config import RunConfig

WINDOW = 128  # losses that a new one is compared with
ENOUGH = 64  # fewer of them say nothing
SMALLEST_DEVIATION = 0.02  # nats; a run that has learnt its text by heart has losses that hardly differ
SKIPS_BEFORE_ROLLBACK = 3
SKIPS_BEFORE_STOP = 10
ROLLBACKS_BEFORE_STOP = 3

Action = Literal["update", "skip", "rollback", "stop"]


class Guard:
    """Judges the steps of a run, in order."""

    def __init__(self, config: RunConfig, records: Iterable[dict[str, Any]] = ()) -> None:
        """Go on where the train records of `metrics.jsonl` end."""
        self.policy, self.sigmas = config.on_spike, config.spike_sigmas
        self.losses: deque[float] = deque(maxlen=WINDOW)
        self.skipped = 0  # steps in a row
        self.rollbacks: dict[int, int] = {}  # how many, by the checkpoint that was gone back to
        for record in records:
            if record.get("kind") == "train":
                self._remember(record["loss"], record.get("skipped"))

    def problem(self, loss: float, grad_norm: float) -> str | None:
        """What is wrong with a step; None if nothing is."""
        if not math.isfinite(loss) or not math.isfinite(grad_norm):
            return f"the loss is {loss} and the gradient norm {grad_norm}"
        if self.sigmas and len(self.losses) >= ENOUGH:
            mean = statistics.fmean(self.losses)
            deviation = max(statistics.pstdev(self.losses, mean), SMALLEST_DEVIATION)
            if loss > mean + self.sigmas * deviation:
                above = (loss - mean) / deviation
                return f"the loss is {loss:.4f}, {above:.0f} standard deviations above the mean of the last ones"
        return None

    def judge(self, loss: float, problem: str | None) -> Action:
        """What to do about a step in which ``problem`` was found, and remember it."""
        self._remember(loss, problem)
        if problem is None:
            return "update"
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
                self._remember(record["loss"], record.get("skipped"))
        return self.rollbacks[step] <= ROLLBACKS_BEFORE_STOP

    def _remember(self, loss: float | None, problem: str | None) -> None:
        if problem is None and loss is not None:
            self.losses.append(loss)
            self.skipped = 0
        else:
            self.skipped += 1
