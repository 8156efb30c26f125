"""Speed measurements of a device: matmuls in each dtype, and memory bandwidth."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from restomod.engine.device import synchronize

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PROBE = 256  # size of the first matmul, which predicts the time of larger ones
SIZES = (1024, 2048, 4096)
LONGEST_MATMUL = 0.5  # seconds
REPEAT_SECONDS = 0.15
COPIED_BYTES = {"cpu": 2**28, "cuda": 2**30, "mps": 2**28}

Matmul = Callable[[torch.device, torch.dtype, int], float]


@dataclass(frozen=True)
class Rates:
    """FLOP/s of square matmuls."""

    by_size: dict[str, dict[int, float]]
    """FLOP/s by dtype and size."""

    def compared(self, name: str, other: str) -> tuple[int, float, float]:
        """Return the largest size measured in both dtypes, and the FLOP/s of each."""
        size = max(self.by_size[name].keys() & self.by_size[other].keys())
        return size, self.by_size[name][size], self.by_size[other][size]


def matmul_rates(device: torch.device, seconds: Matmul | None = None) -> Rates:
    """Measure matmuls of increasing size in all dtypes, while one takes at most `LONGEST_MATMUL` seconds.

    Args:
        device: device to measure.
        seconds: function that times a matmul; None uses `fastest_matmul`.
    """
    seconds = seconds or fastest_matmul
    rates: dict[str, dict[int, float]] = {name: {} for name in TYPES}
    for size in (PROBE, *SIZES):
        for name, dtype in TYPES.items():
            known = rates[name]
            if not known or 2 * size**3 / known[max(known)] <= LONGEST_MATMUL:
                known[size] = 2 * size**3 / seconds(device, dtype, size)
    return Rates(rates)


def fastest_matmul(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Return the seconds of one matmul of two (size, size) matrices, the fastest of several repetitions."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return fastest(lambda: a @ b, device)


def memory_bandwidth(device: torch.device) -> float:
    """Measure the memory bandwidth (bytes per second read and written) by copying a tensor larger than the caches."""
    source = torch.ones(COPIED_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / fastest(lambda: target.copy_(source), device)


def fastest(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of the fastest of several repetitions, after a warm-up."""
    work()
    synchronize(device)
    seconds: list[float] = []
    while len(seconds) < 2 or sum(seconds) < REPEAT_SECONDS:
        start = time.perf_counter()
        work()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return max(min(seconds), 1e-9)
