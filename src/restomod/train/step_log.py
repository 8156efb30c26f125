"""Log of training steps: results of the device, spike guard, `metrics.jsonl`, progress on the console."""

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

STEPS_BEHIND = {"cuda": 1}  # asynchronous steps by type of device; the oldest is read first


@dataclass(frozen=True)
class _Entry:
    step: int
    pending: PendingStep
    started: float
    """Time of the request for the batch, in seconds."""
    waited: float
    """Seconds spent waiting for the batch."""


class StepLog:
    """Queue of steps submitted to the device; results are read and logged in order.

    On a GPU the result of a step is read while the next step is computed. Only ``read(everything=True)`` waits for the
    newest step.
    """

    def __init__(self, training: Training, display: Display) -> None:
        self.training, self.display = training, display
        compute = training.compute
        path, fp16 = training.run.folder / "metrics.jsonl", compute.dtype == torch.float16
        # the main process reads the records: different guards would skip different steps on different ranks
        self.guard = training.processes.from_main(lambda: SpikeGuard(training.config, iterate_jsonl(path), fp16))
        self.first_step = training.start.step
        self.reached_target = False
        self._behind = STEPS_BEHIND.get(compute.device.type, 0)
        self._entries: deque[_Entry] = deque()
        self._seconds = 0.0  # duration of all steps since `first_step`
        self._last_read = 0.0

    def add(self, step: int, pending: PendingStep, started: float, waited: float) -> None:
        """Append a step that was submitted to the device.

        Args:
            step: number of the step.
            pending: its result, still being computed.
            started: time of the request for the batch, in seconds.
            waited: time spent waiting for the batch, in seconds.
        """
        self._entries.append(_Entry(step, pending, started, waited))

    def read(self, everything: bool) -> tuple[int, str] | None:
        """Read and log the results of finished steps.

        Args:
            everything: whether to wait for the newest step too.

        Returns:
            Step and problem if the run must roll back to a checkpoint, otherwise None. Later steps are dropped.

        Raises:
            UserError: a step failed and ``on_spike`` is "stop", or too many steps were skipped.
        """
        while len(self._entries) > (0 if everything or self.reached_target else self._behind):
            entry = self._entries.popleft()
            problem = self._log(entry, entry.pending.wait())
            if problem is not None:
                self._entries.clear()
                return entry.step, problem
        return None

    def restart_from(self, step: int) -> None:
        """Continue from an earlier step after a rollback."""
        self.first_step, self._seconds = step, 0.0

    def _log(self, entry: _Entry, result: StepResult) -> str | None:
        """Judge, log and print one step. Return the problem if the run must roll back, otherwise None."""
        config, step, display = self.training.config, entry.step, self.display
        now = time.perf_counter()
        seconds, self._last_read = now - max(entry.started, self._last_read), now
        self._seconds += seconds
        problem = self.guard.problem(result)
        record = self._write(entry, result, problem, seconds)
        action = self.guard.decide(result)
        if problem is not None:
            display.warn(f"step {step}: {problem}; the update is skipped")
        if action == "stop":
            newest = describe_newest(self.training.run.folder)
            raise self.training.processes.error(
                f"step {step}: {problem}, so the run has stopped; "
                f"lower --optim.lr or raise --optim.warmup-steps in a new run ({newest})"
            )
        if action == "update":
            done = step + 1 - self.first_step
            display.step(record, seconds_left=(config.steps - step - 1) * self._seconds / done)
            if config.target_loss is not None and result.loss <= config.target_loss:
                self.reached_target = True
                display.line(f"step {step}  training loss {result.loss:.4f} reached --target-loss {config.target_loss}")
        return problem if action == "rollback" else None

    def _write(self, entry: _Entry, result: StepResult, problem: str | None, seconds: float) -> dict[str, object]:
        """Append the record of a step to `metrics.jsonl`; NaN and infinity become null."""
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
