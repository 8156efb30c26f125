"""Timing of training steps, as a whole and by phase.

Timing by phase synchronises with the device after every phase, which slows the step down. So the speed comes from
whole steps only; steps by phase alternate with them.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from restomod.config.run import RunConfig
from restomod.data.batches import MicroBatches, Prefetch
from restomod.engine.device import synchronize
from restomod.engine.distributed import Processes
from restomod.engine.optimizer import Optimizers
from restomod.engine.step import ComputeConfig, train_step
from restomod.utils.process_memory import peak_resident_bytes

PHASES = ("data", "forward", "backward", "update")


@dataclass(frozen=True)
class Steps:
    """Model, data and optimizer for training steps without a run."""

    config: RunConfig
    """Run configuration."""
    data: Prefetch
    """Micro-batches of this rank by step."""
    loss_of: nn.Module
    """Module that computes the loss of a micro-batch."""
    optimizer: Optimizers
    """Optimizer."""
    compute: ComputeConfig
    """Device, compute dtype and micro-batch."""
    processes: Processes
    """Ranks that share the batch."""

    def whole(self, step: int) -> float:
        """Make a training step and return its seconds.

        Raises:
            UserError: the loss or the gradient norm is not finite, so the update was skipped.
        """
        start = time.perf_counter()
        micro_batches, _ = self.data.get(step)
        self._make(micro_batches, step, self.processes)
        synchronize(self.compute.device)
        return time.perf_counter() - start

    def by_phase(self, step: int) -> dict[str, float]:
        """Make a training step and return the seconds of its phases, which add up to the step.

        data: waiting for the batch.
        forward: copying the batch to the device, the loss, and its gradient with respect to the logits.
        backward: all other gradients, and averaging them over ranks.
        update: gradient clipping and the optimizer.
        """
        clock = PhaseClock(lambda: synchronize(self.compute.device))
        micro_batches, _ = self.data.get(step)
        clock.mark("data")
        processes = _MarkingProcesses(**vars(self.processes), clock=clock)
        with clock.marks_forward(self.loss_of):
            self._make(micro_batches, step, processes)
        clock.mark("update")
        return clock.seconds

    def traced(self, step: int) -> bytes:
        """Make a training step and return its trace in Chrome's format; empty on all ranks except rank 0."""
        if not self.processes.main:
            self.whole(step)
            return b""
        kinds = [torch.profiler.ProfilerActivity.CPU]
        if self.compute.device.type == "cuda":
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # no messages of the profiler on stderr
        profiler = torch.profiler.profile(activities=kinds, acc_events=True)  # prevents a warning of torch 2.11
        with profiler as profile, torch.profiler.record_function("training step"):
            self.whole(step)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "trace.json"
            profile.export_chrome_trace(str(file))
            return file.read_bytes()

    def _make(self, micro_batches: MicroBatches, step: int, processes: Processes) -> None:
        made = train_step(self.loss_of, self.optimizer, micro_batches, self.config, step, processes).wait()
        if made.refused and self.compute.dtype != torch.float16:  # fp16 skips steps while it searches the loss scale
            raise self.processes.error(
                f"step {step}: the loss is {made.loss:g} and the gradient norm {made.grad_norm:g}, so the update was "
                f"skipped and the time is invalid; lower --optim.lr or use --tokens real"
            )


class PhaseClock:
    """Stopwatch for the phases of a step.

    Args:
        wait: function that waits until the device is idle.
        now: function that returns the time in seconds.
    """

    def __init__(self, wait: Callable[[], None], now: Callable[[], float] = time.perf_counter) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._wait, self._now = wait, now
        self._last = now()
        self._computed = False  # whether the forward pass of a micro-batch has ended

    def mark(self, phase: str) -> None:
        """Add the seconds since the last mark to ``phase``."""
        self._wait()
        now = self._now()
        self.seconds[phase] += now - self._last
        self._last = now

    @contextlib.contextmanager
    def marks_forward(self, loss_of: nn.Module) -> Iterator[None]:
        """Count calls of ``loss_of`` as forward and the time between two calls as backward, with hooks."""

        def before(module: nn.Module, inputs: Any) -> None:
            if self._computed:
                self.mark("backward")

        def after(module: nn.Module, inputs: Any, output: Any) -> None:
            self.mark("forward")
            self._computed = True

        hooks = loss_of.register_forward_pre_hook(before, prepend=True), loss_of.register_forward_hook(after)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


@dataclass(frozen=True)
class _MarkingProcesses(Processes):
    """Processes that mark the end of the backward pass; a training step averages the loss right after it."""

    clock: PhaseClock = field(default_factory=lambda: PhaseClock(lambda: None))

    def mean(self, value: Tensor) -> Tensor:
        self.clock.mark("backward")
        return super().mean(value)


@dataclass(frozen=True)
class Timings:
    """Measured times of steps, in the order of measurement."""

    whole: list[float]
    """Seconds of each step timed as a whole."""
    phases: list[dict[str, float]]
    """Seconds by phase of each step timed by phase."""
    peak_bytes: int | None
    """Peak memory in bytes, maximum over processes; None if the system does not report it."""


def measure(steps: Steps, warmup: int, timed: int) -> Timings:
    """Make ``warmup`` steps, then time ``timed`` whole steps and ``timed`` steps by phase, alternating."""
    device, processes = steps.compute.device, steps.processes
    for step in range(warmup):
        steps.whole(step)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    whole, phases = [], []
    for i in range(timed):
        whole.append(steps.whole(warmup + 2 * i))
        phases.append(steps.by_phase(warmup + 2 * i + 1))
    mine = peak_memory(device)
    everyone = processes.sum(*(float(mine or 0) if r == processes.rank else 0.0 for r in range(processes.world_size)))
    return Timings(whole, phases, None if mine is None else int(max(everyone)))


def peak_memory(device: torch.device) -> int | None:
    """Return the peak memory in bytes so far.

    On a GPU: allocated memory since the last reset. Otherwise: resident memory of this process, None if unknown.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_resident_bytes()
