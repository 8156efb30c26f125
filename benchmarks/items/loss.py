"""Speed and memory of cross-entropy and its gradient, compared with torch's functions."""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.contenders import Absent, Contender, Measured, Round, Worker
from benchmarks.harness import BenchPlan, compare
from benchmarks.records import Item, Metric
from restomod.bench.measure import peak_memory
from restomod.config.model import VOCAB_SIZE
from restomod.engine.device import choose_dtype, keep_freed_memory, synchronize
from restomod.engine.loss import linear_cross_entropy

PADDED = 50304
METRICS = [Metric("tokens/s", "", "higher"), Metric("peak memory", "GB", "lower")]
WAYS = ("restomod", "restomod, compiled", "all logits, F.cross_entropy", "F.linear_cross_entropy, chunked")


def measure(plan: BenchPlan) -> Item:
    """Measure forward and backward, each contender in a separate process."""
    tokens, width = plan.pick(2048, 64, 32_768), plan.pick(768, 32)
    contenders: list[Contender] = [Worker(way, rounds, (way, tokens, width, plan.device)) for way in WAYS]
    case = f"{tokens:,} tokens, width {width}, {VOCAB_SIZE:,} logits, forward and backward"
    note = f"same output: share of rounds with a relative difference of the losses of at most {TOLERANCE:g}"
    return Item("Loss", [compare(plan, case, contenders, METRICS, plan.pick(5, 2), agree=close, notes=[note])])


TOLERANCE = 2e-3  # rounding of matmuls in bf16


def close(ours: float, theirs: float) -> float:
    """Return 1 if two losses are equal within `TOLERANCE`, otherwise 0."""
    return float(abs(ours - theirs) <= TOLERANCE * abs(ours))


def rounds(way: str, tokens: int, width: int, device_type: str) -> Round:
    """Return a round of one loss and its gradient, for a `Worker`."""
    device = torch.device(device_type)
    if device.type == "cpu":
        keep_freed_memory()
    dtype = choose_dtype("auto", device)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator).to(device).requires_grad_()
    weight = (0.02 * torch.randn(PADDED, width, generator=generator)).to(device).requires_grad_()
    targets = torch.randint(0, VOCAB_SIZE, (tokens,), generator=generator).to(device)

    def loss() -> Tensor:
        if way == WAYS[2]:
            return F.cross_entropy((hidden.to(dtype) @ weight[:VOCAB_SIZE].to(dtype).t()).float(), targets)
        if way == WAYS[3]:
            return torchs(hidden.to(dtype), weight[:VOCAB_SIZE].to(dtype), targets)
        return linear_cross_entropy(hidden, weight, targets, VOCAB_SIZE, dtype, way == WAYS[1])

    def one_round() -> Measured:
        hidden.grad = weight.grad = None
        start = time.perf_counter()
        value = loss()
        value.backward()
        synchronize(device)
        seconds = time.perf_counter() - start
        return Measured(
            {"tokens/s": tokens / seconds, "peak memory": (peak_memory(device) or 0) / 1e9}, float(value.item())
        )

    return one_round


def torchs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Compute the loss with torch's chunked F.linear_cross_entropy; raise Absent if torch has none."""
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise Absent(f"torch {torch.__version__} has no chunked F.linear_cross_entropy")
    return F.linear_cross_entropy(hidden, weight, targets, options=torch.nn.LinearCrossEntropyOptions())
