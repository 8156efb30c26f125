"""GPU time of a sweep's trials.

Trials that share a GPU at the same time share its seconds, so each GPU second counts once.
"""

from __future__ import annotations

import itertools
import os
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Interval:
    """Time span of one attempt at a trial."""

    number: int
    """Number of the trial."""
    start: float
    """Start in seconds since 1970."""
    end: float
    """End in seconds since 1970."""
    gpu: str
    """Name of the GPU, from `gpu_in_use`."""
    processes: int
    """Number of processes, each with one GPU."""


@dataclass(frozen=True)
class TrialTimes:
    """Training time of a sweep's trials, by number of the trial."""

    seconds: dict[int, float]
    """Seconds of all attempts."""
    gpu_seconds: dict[int, float]
    """Seconds times GPUs of all attempts; trials that share a GPU share its seconds equally."""

    @property
    def totals(self) -> tuple[float, float]:
        """Seconds and GPU seconds of all trials."""
        return sum(self.seconds.values()), sum(self.gpu_seconds.values())

    @classmethod
    def from_intervals(cls, numbers: Iterable[int], spans: Sequence[Interval]) -> TrialTimes:
        """Add up attempts by trial.

        Args:
            numbers: numbers of all trials.
            spans: attempts at these trials.
        """
        seconds = dict.fromkeys(numbers, 0.0)
        gpu_seconds = dict(seconds)
        by_gpu: dict[str, list[Interval]] = {}
        for span in spans:
            seconds[span.number] += span.end - span.start
            by_gpu.setdefault(span.gpu, []).append(span)
        for same in by_gpu.values():
            begun = [(span.start, True, i) for i, span in enumerate(same) if span.end > span.start]
            changes = sorted(begun + [(same[i].end, False, i) for _, _, i in begun])
            running: set[int] = set()
            for (since, begins, i), (until, _, _) in itertools.pairwise(changes):
                (running.add if begins else running.discard)(i)
                for j in running:
                    gpu_seconds[same[j].number] += (until - since) * same[j].processes / len(running)
        return cls(seconds, gpu_seconds)


def gpu_in_use() -> str:
    """Return a name of the first visible GPU of this process: host, Slurm job and task, CUDA index.

    Slurm jobs and tasks can see different GPUs under the same index, so their ids are part of the name.
    """
    place = [os.environ.get(name, "") for name in ("SLURM_JOB_ID", "SLURM_PROCID")]
    return " ".join([socket.gethostname(), *place, os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]])
