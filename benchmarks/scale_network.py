"""A model of the time of a data-parallel step: collectives, and how much computation hides them.

Collectives are rings (Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms", 2009): an all-gather or a
reduce-scatter of M bytes over n processes is n - 1 messages of M / n bytes one after the other, an all-reduce is both.
A ring through several machines leaves each once, and as many rings as a machine has network cards run beside each
other, so their bandwidths add up. Where trees are known (NCCL), the quicker of ring and tree counts, as NCCL chooses.

All times in seconds, sizes in bytes, bandwidths in bytes/s of one direction.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MIB = 2**20
FP32 = 4
FIRST_BUCKET, BUCKET = MIB, 25 * MIB  # of DistributedDataParallel, by default


@dataclass(frozen=True)
class Tree:
    """Latencies of a double binary tree through all machines, a chain within each."""

    start: float
    within: float
    between: float


@dataclass(frozen=True)
class Network:
    """Bandwidths and latencies between processes."""

    name: str
    bandwidth: float
    """From one process to the others of its machine."""
    latency: float
    """Per message of a ring within a machine."""
    per_machine: int
    """Processes of a machine."""
    bandwidth_out: float = math.inf
    """Per process, through its network card."""
    latency_out: float = 0.0
    """Per message of a ring between machines."""
    start: float = 0.0
    """Fixed cost of any ring."""
    tree: Tree | None = None
    source: str = ""

    def machines(self, n: int) -> int:
        return math.ceil(n / self.per_machine)

    def bus(self, n: int) -> float:
        """Bandwidth of all rings together through one process."""
        return self.bandwidth if self.machines(n) == 1 else min(self.bandwidth, self.per_machine * self.bandwidth_out)


def ring(network: Network, n: int, size: float, rounds: int) -> float:
    """A collective that goes ``rounds`` times around: 2 for an all-reduce, 1 for its halves."""
    if n == 1:
        return 0.0
    out = rounds * (network.machines(n) - 1)
    latency = network.start + (rounds * (n - 1) - out) * network.latency + out * network.latency_out
    return latency + rounds * (n - 1) / n * size / network.bus(n)


def tree(network: Network, n: int, size: float) -> float:
    """An all-reduce up and down a double binary tree (Sanders, Speck and Träff, 2009), as NCCL's tuning has it.

    Every byte passes each process twice, at 0.9 of the bandwidth.
    """
    t = network.tree
    if t is None:
        return math.inf
    machines = network.machines(n)
    inside = n // machines - 1
    latency = t.start + 2 * (inside * t.within + math.log2(machines) * t.between)
    return latency + 2 * size / (0.9 * network.bus(n))


def all_reduce(network: Network, n: int, size: float) -> float:
    return min(ring(network, n, size, 2), tree(network, n, size)) if n > 1 else 0.0


def all_gather(network: Network, n: int, size: float) -> float:
    """``size``: of what all have in the end."""
    return ring(network, n, size, 1)


reduce_scatter = all_gather  # the same messages the other way around; ``size`` is what each has at first


def fit(sizes: Sequence[float], seconds: Sequence[float], rounds: int, n: int = 2) -> Network:
    """The network of one machine that explains measured rings best, by least squares of relative errors."""
    x, t = np.asarray(sizes, dtype=float), np.asarray(seconds, dtype=float)
    design = np.stack([np.ones_like(x), x], axis=1) / t[:, None]
    latency, per_byte = np.linalg.lstsq(design, np.ones_like(t), rcond=None)[0]
    bandwidth = rounds * (n - 1) / n / per_byte if per_byte > 0 else math.inf
    return Network("measured", float(bandwidth), max(0.0, float(latency)) / (rounds * (n - 1)), per_machine=n)


@dataclass(frozen=True)
class Payload:
    """Bytes that a model communicates."""

    blocks: tuple[int, ...]
    """Bytes of each block's parameters, which FSDP gathers together."""
    outside: int
    """Bytes of the embeddings, the last norm and the head."""
    buckets: tuple[int, ...]
    """Bytes of DistributedDataParallel's buckets, in the order in which they are ready."""

    @property
    def total(self) -> int:
        return sum(self.blocks) + self.outside


def buckets(sizes: Sequence[int], first: int = FIRST_BUCKET, cap: int = BUCKET) -> tuple[int, ...]:
    """Bytes of DistributedDataParallel's buckets for gradients of ``sizes`` bytes, in the order they are ready.

    A bucket is closed by the tensor with which it reaches its limit; the first one's is lower.
    """
    found: list[int] = []
    held = 0
    for size in sizes:
        held += size
        if held >= (cap if found else first):
            found.append(held)
            held = 0
    return (*found, held) if held else tuple(found)


@dataclass(frozen=True)
class Work:
    """Compute time of one process in a step, in seconds."""

    micro_batches: int
    forward_backward: float
    """Per micro-batch."""
    update: float
    """Update of all parameters."""


@dataclass(frozen=True)
class StepTime:
    """A predicted step."""

    compute: float
    communication: float
    """Sum of all collectives."""
    hidden: float
    """The part of it for which no process waits."""

    @property
    def seconds(self) -> float:
        return self.compute + self.communication - self.hidden

    @property
    def efficiency(self) -> float:
        """Computing time as a share of the step."""
        return self.compute / self.seconds


def ddp(payload: Payload, work: Work, n: int, network: Network, overlap: float) -> StepTime:
    """DistributedDataParallel: every bucket is all-reduced once it is ready, in the last micro-batch's backward pass.

    ``overlap`` is the share, 0 to 1, hidden of what can be: communication during the last backward pass (2/3 of a
    micro-batch) without the last bucket, which is ready when that ends. The mean of the loss is never hidden.
    """
    times = [all_reduce(network, n, size) for size in payload.buckets]
    hidden = overlap * min(sum(times[:-1]), 2 / 3 * work.forward_backward)
    return StepTime(
        work.micro_batches * work.forward_backward + work.update, sum(times) + _scalars(network, n, 1), hidden
    )


def fsdp(
    payload: Payload, work: Work, n: int, network: Network, gathers: Network, scatters: Network, overlap: float
) -> StepTime:
    """FSDP2: blocks are gathered for the forward and again for the backward pass of every micro-batch.

    Parameters outside of the blocks are gathered once for both. Gradients are reduce-scattered in the last micro-batch;
    a process updates its part. ``network``, ``gathers`` and ``scatters`` are for all-reduces, all-gathers and
    reduce-scatters. All but the first all-gather and the last reduce-scatter can be hidden, up to the time of the
    passes; the mean of the loss and the norm of the gradients are never hidden.
    """
    outside = all_gather(gathers, n, payload.outside)
    blocks = [all_gather(gathers, n, size) for size in payload.blocks]
    scattered = [reduce_scatter(scatters, n, size) for size in (*payload.blocks, payload.outside)]
    total = work.micro_batches * (outside + 2 * sum(blocks)) + sum(scattered)
    computing = work.micro_batches * work.forward_backward
    hidden = overlap * min(total - outside - scattered[-1], computing)
    return StepTime(computing + work.update / n, total + _scalars(network, n, 2), hidden)


def _scalars(network: Network, n: int, count: int) -> float:
    return count * all_reduce(network, n, FP32)
