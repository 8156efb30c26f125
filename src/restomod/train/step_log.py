"""The log of training steps: wait for their results, judge them, write `metrics.jsonl`, show progress."""

from __future__ import annotations

import math
import time
from collections import deque
from dataclasses import dataclass

import torch

from restomod.engine.lr_schedule import learning_rate
from restomod.engine.step import PendingStep, StepResult
from restomod.model.flops import mfu
from restomod.runs.checkpoint import describe_newest
from restomod.runs.metrics import iterate_jsonl
from restomod.train.setup import Training
from restomod.train.spike_guard import SpikeGuard
from restomod.utils.console import Display

STEPS_BEHIND = {"cuda": 1}  # steps in flight on a kind of device before the oldest is read


@dataclass(frozen=True)
class _Entry:
    step: int
    pending: PendingStep
    started: float
    """When the batch was requested, in seconds."""
    waited: float
    """Seconds until the batch was there."""


class StepLog:
    """Keeps the steps that the device has been given, and reads their results in order.

    On a GPU a step is read while the next one is computed; only ``read(everything=True)`` waits for the newest.
    """

    def __init__(self, training: Training, display: Display) -> None:
        self.training, self.display = training, display
        compute = training.compute
        path, fp16 = training.run.folder / "metrics.jsonl", compute.dtype == torch.float16
        # from the main process's file: guards that differ would refuse different steps, and the processes diverge
        self.guard = training.processes.from_main(lambda: SpikeGuard(training.config, iterate_jsonl(path), fp16))
        self.first_step = training.start.step
        self.reached_target = False
        self._behind = STEPS_BEHIND.get(compute.device.type, 0)
        self._entries: deque[_Entry] = deque()
        self._seconds = 0.0  # in all steps since `first_step`
        self._last_read = 0.0

    def add(self, step: int, pending: PendingStep, started: float, waited: float) -> None:
        """Take a step that the device has been given."""
        self._entries.append(_Entry(step, pending, started, waited))

    def read(self, everything: bool) -> tuple[int, str] | None:
        """Read the steps that are computed; ``everything``: wait for the newest too.

        Returns:
            The step whose failure rolls the run back to a checkpoint, and the problem; later steps are dropped. None
            if there is no such step.

        Raises:
            UserError: a step failed, and ``on_spike`` is "stop", or too many were skipped.
        """
        while len(self._entries) > (0 if everything or self.reached_target else self._behind):
            entry = self._entries.popleft()
            problem = self._log(entry, entry.pending.wait())
            if problem is not None:
                self._entries.clear()
                return entry.step, problem
        return None

    def restart_from(self, step: int) -> None:
        """Continue from an earlier step."""
        self.first_step, self._seconds = step, 0.0

    def _log(self, entry: _Entry, result: StepResult) -> str | None:
        """Judge, write and show one step. Returns the problem if the run has to roll back."""
        config, step, display = self.training.config, entry.step, self.display
        now = time.perf_counter()
        seconds, self._last_read = now - max(entry.started, self._last_read), now
        self._seconds += seconds
        problem = self.guard.problem(result)
        record = self._write(entry, result, problem, seconds)
        action = self.guard.decide(result)
        if problem is not None:
            display.line(f"step {step}  {problem}: no update", style="bold yellow")
        if action == "stop":
            newest = describe_newest(self.training.run.folder)
            raise self.training.processes.error(
                f"step {step}: {problem}, so nothing was updated; "
                f"lower --optim.lr or raise --optim.warmup-steps in a new run ({newest})"
            )
        if action == "update":
            done = step + 1 - self.first_step
            display.step(record, seconds_left=(config.steps - step - 1) * self._seconds / done)
            if config.target_loss is not None and result.loss <= config.target_loss:
                self.reached_target = True
                display.line(
                    f"step {step}  training loss {result.loss:.4f} is at or below the target {config.target_loss}"
                )
        return problem if action == "rollback" else None

    def _write(self, entry: _Entry, result: StepResult, problem: str | None, seconds: float) -> dict[str, object]:
        """Append the record of a step to `metrics.jsonl`; values that are not finite become null."""
        training, config = self.training, self.training.config
        speed = config.batch_tokens / seconds
        return training.run.log(
            "train",
            entry.step,
            loss=result.loss if math.isfinite(result.loss) else None,
            lr=learning_rate(config.optim, entry.step, config.steps),
            grad_norm=result.grad_norm if math.isfinite(result.grad_norm) else None,
            ms=1000 * seconds,
            data_ms=1000 * entry.waited,
            tokens_per_second=speed,
            mfu=mfu(speed, training.flops_per_token, training.peak_flops),
            **({"skipped": problem} if problem is not None else {}),
        )
