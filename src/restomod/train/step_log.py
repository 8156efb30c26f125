"""What became of the steps of a run: read, judged, written down and shown, in order."""

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
from restomod.train.spike_guard import Guard
from restomod.utils.console import Display

STEPS_BEHIND = {"cuda": 1}  # how many steps a kind of device may have before one is read


@dataclass(frozen=True)
class _Entry:
    step: int
    made: PendingStep
    started: float
    """When the batch was asked for, in seconds."""
    waited: float
    """Seconds until it was there."""


class Journal:
    """Keeps the steps that the device has been given, and reads them when they are computed.

    On a GPU a step is read while the next one is computed. So nothing is known of the newest step until `read` is told
    to wait for it.
    """

    def __init__(self, training: Training, display: Display) -> None:
        self.training, self.display = training, display
        compute = training.compute
        log, fp16 = training.run.folder / "metrics.jsonl", compute.dtype == torch.float16
        # from the one file that there is: guards that differ would refuse different steps, and processes part
        self.guard = training.processes.from_main(lambda: Guard(training.config, iterate_jsonl(log), fp16))
        self.began = training.first_step
        self.reached_target = False
        self._behind = STEPS_BEHIND.get(compute.device.type, 0)
        self._entries: deque[_Entry] = deque()
        self._seconds = 0.0  # in all steps since `began`
        self._read = 0.0  # when the last one was read

    def add(self, step: int, made: PendingStep, started: float, waited: float) -> None:
        """Take a step that the device has been given."""
        self._entries.append(_Entry(step, made, started, waited))

    def read(self, everything: bool) -> tuple[int, str] | None:
        """Read the steps that are computed; ``everything``: wait for the newest too.

        Returns:
            The step whose failure sends the run back to a checkpoint, and what was wrong with it; what came after it
            is forgotten.

        Raises:
            UserError: a step failed, and the run is to stop then.
        """
        while len(self._entries) > (0 if everything or self.reached_target else self._behind):
            entry = self._entries.popleft()
            problem = self._settle(entry, entry.made.wait())
            if problem is not None:
                self._entries.clear()
                return entry.step, problem
        return None

    def went_back(self, step: int) -> None:
        """Go on from an earlier step."""
        self.began, self._seconds = step, 0.0

    def _settle(self, entry: _Entry, made: StepResult) -> str | None:
        """What was wrong with a step for which the run has to go back."""
        config, step, display = self.training.config, entry.step, self.display
        now = time.perf_counter()
        seconds, self._read = now - max(entry.started, self._read), now
        self._seconds += seconds
        problem = self.guard.problem(made)
        record = self._log(entry, made, problem, seconds)
        action = self.guard.judge(made)
        if problem is not None:
            display.line(f"step {step}  {problem}: no update", style="bold yellow")
        if action == "stop":
            newest = describe_newest(self.training.run.folder)
            raise self.training.processes.error(
                f"step {step}: {problem}, so nothing was updated; "
                f"lower --optim.lr or raise --optim.warmup-steps in a new run ({newest})"
            )
        if action == "update":
            done = step + 1 - self.began
            display.step(record, seconds_left=(config.steps - step - 1) * self._seconds / done)
            if config.target_loss is not None and made.loss <= config.target_loss:
                self.reached_target = True
                display.line(
                    f"step {step}  training loss {made.loss:.4f} is at or below the target {config.target_loss}"
                )
        return problem if action == "rollback" else None

    def _log(self, entry: _Entry, made: StepResult, problem: str | None, seconds: float) -> dict[str, object]:
        """Log a step, with what it took; what is not finite as null."""
        training, config = self.training, self.training.config
        speed = config.batch_tokens / seconds
        return training.run.log(
            "train",
            entry.step,
            loss=made.loss if math.isfinite(made.loss) else None,
            lr=learning_rate(config.optim, entry.step, config.steps),
            grad_norm=made.grad_norm if math.isfinite(made.grad_norm) else None,
            ms=1000 * seconds,
            data_ms=1000 * entry.waited,
            tokens_per_second=speed,
            mfu=mfu(speed, training.flops_per_token, training.peak_flops),
            **({"skipped": problem} if problem is not None else {}),
        )
