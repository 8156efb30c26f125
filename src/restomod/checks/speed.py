"""How fast a device is: matrix products in each precision, and memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from restomod.engine.device import synchronize

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PROBE = 256  # a first product, from which the time of larger ones is told
SIZES = (1024, 2048, 4096)
LONGEST_PRODUCT = 0.5  # seconds
REPEAT_SECONDS = 0.15
COPIED_BYTES = {"cpu": 2**28, "cuda": 2**30, "mps": 2**28}

Product = Callable[[torch.device, torch.dtype, int], float]


@dataclass(frozen=True)
class Rates:
    """FLOP/s of square matrix products, by precision and size."""

    by_size: dict[str, dict[int, float]]

    def compared(self, name: str, other: str) -> tuple[int, float, float]:
        """The largest size that both precisions have, and their rates there."""
        size = max(self.by_size[name].keys() & self.by_size[other].keys())
        return size, self.by_size[name][size], self.by_size[other][size]


def matmul_rates(device: torch.device, product_seconds: Product | None = None) -> Rates:
    """Measure products of growing size, the precisions in turns, as long as one takes no more than half a second."""
    seconds = product_seconds or fastest_product
    rates: dict[str, dict[int, float]] = {name: {} for name in TYPES}
    for size in (PROBE, *SIZES):
        for name, dtype in TYPES.items():
            known = rates[name]
            if not known or 2 * size**3 / known[max(known)] <= LONGEST_PRODUCT:
                known[size] = 2 * size**3 / seconds(device, dtype, size)
    return Rates(rates)


def fastest_product(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Seconds of one product of two (size, size) matrices: the fastest of several, as other programs only slow it."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return fastest(lambda: a @ b, device)


def memory_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, of copying a tensor that no cache holds."""
    source = torch.ones(COPIED_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / fastest(lambda: target.copy_(source), device)


def fastest(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of several repetitions, after one to warm up."""
    work()
    synchronize(device)
    seconds: list[float] = []
    while len(seconds) < 2 or sum(seconds) < REPEAT_SECONDS:
        start = time.perf_counter()
        work()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return max(min(seconds), 1e-9)
