"""Timing of training steps, whole and by phase.

Timing a phase waits for the device, which keeps it from working ahead. So whole steps are timed alternately with steps
by phase, and only whole steps count for the speed.
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
    """Everything for training steps without a run."""

    config: RunConfig
    data: Prefetch
    loss_of: nn.Module
    optimizer: Optimizers
    compute: ComputeConfig
    processes: Processes

    def whole(self, step: int) -> float:
        """Time a step, in seconds.

        Raises:
            UserError: its loss is not finite, so nothing was updated and its time means nothing.
        """
        start = time.perf_counter()
        micro_batches, _ = self.data.get(step)
        self._make(micro_batches, step, self.processes)
        synchronize(self.compute.device)
        return time.perf_counter() - start

    def by_phase(self, step: int) -> dict[str, float]:
        """Time the phases of a step, in seconds; they add up to the step.

        data: waiting for the batch. forward: copying it to the device and computing the loss, and the loss's own
        gradient, which is computed along with it. backward: the rest of the gradients, and averaging them over
        processes. update: clipping and the optimizer.
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
        """Trace a step in Chrome's format; empty in all processes but rank 0."""
        if not self.processes.main:
            self.whole(step)
            return b""
        kinds = [torch.profiler.ProfilerActivity.CPU]
        if self.compute.device.type == "cuda":
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its library else reports its own start and end on stderr
        profiler = torch.profiler.profile(activities=kinds, acc_events=True)  # else torch 2.11 warns about cycles
        with profiler as profile, torch.profiler.record_function("training step"):
            self.whole(step)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "trace.json"
            profile.export_chrome_trace(str(file))
            return file.read_bytes()

    def _make(self, micro_batches: MicroBatches, step: int, processes: Processes) -> None:
        made = train_step(self.loss_of, self.optimizer, micro_batches, self.config, step, processes).wait()
        if made.refused and self.compute.dtype != torch.float16:  # which has to find the scale of its loss first
            raise self.processes.error(
                f"a step's loss is {made.loss}, so its time says nothing; lower --optim.lr, or try --tokens real"
            )


class PhaseClock:
    """Seconds of a step by phase."""

    def __init__(self, wait: Callable[[], None], now: Callable[[], float] = time.perf_counter) -> None:
        """Start the first phase.

        Args:
            wait: waits for the device.
            now: returns the time in seconds.
        """
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._wait, self._now = wait, now
        self._last = now()
        self._computed = False  # whether a micro-batch has gone forward, and backward is what follows

    def mark(self, phase: str) -> None:
        """Add the time since the last mark to ``phase``."""
        self._wait()
        now = self._now()
        self.seconds[phase] += now - self._last
        self._last = now

    @contextlib.contextmanager
    def marks_forward(self, loss_of: nn.Module) -> Iterator[None]:
        """Count calls of ``loss_of`` as forward, and the time between two of them as backward."""

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
    """Processes that mark the end of backward, after which a step first averages the loss."""

    clock: PhaseClock = field(default_factory=lambda: PhaseClock(lambda: None))

    def mean(self, value: Tensor) -> Tensor:
        self.clock.mark("backward")
        return super().mean(value)


@dataclass(frozen=True)
class Timings:
    """Seconds of steps, in the order of measurement."""

    whole: list[float]
    phases: list[dict[str, float]]
    peak_bytes: int | None
    """Largest peak memory of a process; None where the system does not tell."""


def measure(steps: Steps, warmup: int, timed: int) -> Timings:
    """Make ``warmup`` steps, then time ``timed`` whole steps alternately with as many by phase."""
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
    """Peak bytes so far: allocated on the GPU since the last reset; elsewhere resident memory of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_resident_bytes()
