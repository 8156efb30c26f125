"""GPU time of a sweep's trials; a GPU that trials share at the same time counts once."""

from __future__ import annotations

import itertools
import os
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Interval:
    """Time of an attempt at a trial, in seconds since 1970."""

    number: int
    start: float
    end: float
    gpu: str
    """As `gpu_in_use` names it."""
    processes: int


@dataclass(frozen=True)
class TrialTimes:
    """Time of the trials of a sweep, in seconds by number of the trial."""

    seconds: dict[int, float]
    """Sum over all attempts."""
    gpu_seconds: dict[int, float]
    """Seconds times processes, one GPU each; trials that share a GPU share its seconds equally."""

    @property
    def totals(self) -> tuple[float, float]:
        """Seconds and GPU seconds of all trials."""
        return sum(self.seconds.values()), sum(self.gpu_seconds.values())

    @classmethod
    def from_intervals(cls, numbers: Iterable[int], spans: Sequence[Interval]) -> TrialTimes:
        """Add up the attempts of the trials ``numbers``."""
        seconds = dict.fromkeys(numbers, 0.0)
        gpu_seconds = dict(seconds)
        by_gpu: dict[str, list[Interval]] = {}
        for span in spans:
            seconds[span.number] += span.end - span.start
            by_gpu.setdefault(span.gpu, []).append(span)
        for same in by_gpu.values():
            begun = [(span.start, True, i) for i, span in enumerate(same) if span.end > span.start]
            changes = sorted(begun + [(same[i].end, False, i) for _, _, i in begun])
            at_once: set[int] = set()
            for (since, begins, i), (until, _, _) in itertools.pairwise(changes):
                (at_once.add if begins else at_once.discard)(i)
                for j in at_once:
                    gpu_seconds[same[j].number] += (until - since) * same[j].processes / len(at_once)
        return cls(seconds, gpu_seconds)


def gpu_in_use() -> str:
    """Identify the GPU of this process's environment, the first visible one.

    Slurm jobs and tasks may each see a different GPU under the same number, so their ids are part of the name.
    """
    place = [os.environ.get(name, "") for name in ("SLURM_JOB_ID", "SLURM_PROCID")]
    return " ".join([socket.gethostname(), *place, os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]])
