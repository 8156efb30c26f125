"""Model of the time of a data-parallel step, with collectives and their overlap with computation.

Collectives are rings (Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms", 2009). An all-gather or
reduce-scatter of M bytes over n processes is n - 1 sequential messages of M / n bytes; an all-reduce is both. A ring
through several machines leaves each machine once. One ring per network card runs in parallel, so their bandwidths add
up. If tree latencies are given (NCCL), an all-reduce takes the faster of ring and tree, as NCCL chooses.

Times are in seconds, sizes in bytes, bandwidths in bytes/s of one direction.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MIB = 2**20
FP32 = 4
FIRST_BUCKET, BUCKET = MIB, 25 * MIB  # defaults of DistributedDataParallel


@dataclass(frozen=True)
class Tree:
    """Latencies of a double binary tree over machines with a chain within each machine."""

    start: float
    """Fixed latency of a collective."""
    within: float
    """Latency per hop of the chain."""
    between: float
    """Latency per level of the tree."""


@dataclass(frozen=True)
class Network:
    """Bandwidths and latencies between processes."""

    name: str
    """Name of the network."""
    bandwidth: float
    """Bandwidth from one process to the others of its machine."""
    latency: float
    """Latency per message of a ring within a machine."""
    per_machine: int
    """Processes per machine."""
    bandwidth_out: float = math.inf
    """Bandwidth per process to other machines, through its network card."""
    latency_out: float = 0.0
    """Latency per message of a ring between machines."""
    start: float = 0.0
    """Fixed latency of a ring."""
    tree: Tree | None = None
    """Latencies of trees; None if the network has only rings."""
    source: str = ""
    """Source of the figures."""

    def machines(self, n: int) -> int:
        """Return the number of machines for ``n`` processes."""
        return math.ceil(n / self.per_machine)

    def bus(self, n: int) -> float:
        """Return the bandwidth of all rings together through one of ``n`` processes."""
        return self.bandwidth if self.machines(n) == 1 else min(self.bandwidth, self.per_machine * self.bandwidth_out)


def ring(network: Network, n: int, size: float, rounds: int) -> float:
    """Return the seconds of a ring collective of ``size`` bytes over ``n`` processes.

    ``rounds`` is 2 for an all-reduce, 1 for an all-gather or a reduce-scatter.
    """
    if n == 1:
        return 0.0
    out = rounds * (network.machines(n) - 1)
    latency = network.start + (rounds * (n - 1) - out) * network.latency + out * network.latency_out
    return latency + rounds * (n - 1) / n * size / network.bus(n)


def tree(network: Network, n: int, size: float) -> float:
    """Return the seconds of an all-reduce over a double binary tree (Sanders, Speck and Träff, 2009).

    As in NCCL's tuning, every byte passes each process twice, at 0.9 of the bandwidth. Infinite without `Network.tree`.
    """
    t = network.tree
    if t is None:
        return math.inf
    machines = network.machines(n)
    inside = n // machines - 1
    latency = t.start + 2 * (inside * t.within + math.log2(machines) * t.between)
    return latency + 2 * size / (0.9 * network.bus(n))


def all_reduce(network: Network, n: int, size: float) -> float:
    """Return the seconds of an all-reduce of ``size`` bytes over ``n`` processes, ring or tree."""
    return min(ring(network, n, size, 2), tree(network, n, size)) if n > 1 else 0.0


def all_gather(network: Network, n: int, size: float) -> float:
    """Return the seconds of an all-gather; ``size`` is the bytes of the gathered tensor."""
    return ring(network, n, size, 1)


reduce_scatter = all_gather  # the same messages in reverse; ``size`` is the bytes of the input tensor


def fit(sizes: Sequence[float], seconds: Sequence[float], rounds: int, n: int = 2) -> Network:
    """Fit latency and bandwidth of one machine to measured rings, by least squares of relative errors.

    Args:
        sizes: bytes of the collectives.
        seconds: measured seconds.
        rounds: 2 for an all-reduce, 1 for an all-gather or a reduce-scatter.
        n: number of processes.
    """
    x, t = np.asarray(sizes, dtype=float), np.asarray(seconds, dtype=float)
    design = np.stack([np.ones_like(x), x], axis=1) / t[:, None]
    latency, per_byte = np.linalg.lstsq(design, np.ones_like(t), rcond=None)[0]
    bandwidth = rounds * (n - 1) / n / per_byte if per_byte > 0 else math.inf
    return Network("measured", float(bandwidth), max(0.0, float(latency)) / (rounds * (n - 1)), per_machine=n)


@dataclass(frozen=True)
class Payload:
    """Bytes that a model communicates."""

    blocks: tuple[int, ...]
    """Bytes of the parameters of each block, which FSDP gathers together."""
    outside: int
    """Bytes of the embeddings, the last norm and lm_head."""
    buckets: tuple[int, ...]
    """Bytes of DistributedDataParallel's buckets, in the order in which they are ready."""

    @property
    def total(self) -> int:
        """Bytes of all parameters."""
        return sum(self.blocks) + self.outside


def buckets(sizes: Sequence[int], first: int = FIRST_BUCKET, cap: int = BUCKET) -> tuple[int, ...]:
    """Return the bytes of DistributedDataParallel's buckets, in the order in which they are ready.

    A bucket ends with the tensor that reaches its limit.

    Args:
        sizes: bytes of the gradients.
        first: limit of the first bucket in bytes.
        cap: limit of the other buckets in bytes.
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
    """Computation of one process in a step."""

    micro_batches: int
    """Number of micro-batches."""
    forward_backward: float
    """Seconds of forward and backward per micro-batch."""
    update: float
    """Seconds of the update of all parameters."""


@dataclass(frozen=True)
class StepTime:
    """Predicted times of a step."""

    compute: float
    """Seconds of computation."""
    communication: float
    """Seconds of all collectives."""
    hidden: float
    """Seconds of communication that overlap with computation."""

    @property
    def seconds(self) -> float:
        """Seconds of the step."""
        return self.compute + self.communication - self.hidden

    @property
    def efficiency(self) -> float:
        """Computation as a share of the step, 0 to 1."""
        return self.compute / self.seconds


def ddp(payload: Payload, work: Work, n: int, network: Network, overlap: float) -> StepTime:
    """Predict a step with DistributedDataParallel, which all-reduces each bucket when it is ready.

    Communication can overlap with the backward pass of the last micro-batch (2/3 of a micro-batch), except the last
    bucket, which is ready at its end, and the mean of the loss. ``overlap`` is the share of it that overlaps, 0 to 1.
    """
    times = [all_reduce(network, n, size) for size in payload.buckets]
    hidden = overlap * min(sum(times[:-1]), 2 / 3 * work.forward_backward)
    return StepTime(
        work.micro_batches * work.forward_backward + work.update, sum(times) + _scalars(network, n, 1), hidden
    )


def fsdp(
    payload: Payload, work: Work, n: int, network: Network, gathers: Network, scatters: Network, overlap: float
) -> StepTime:
    """Predict a step with FSDP2, which gathers each block for the forward and for the backward pass.

    Parameters outside the blocks are gathered once per micro-batch. Gradients are reduce-scattered in the last
    micro-batch, and each process updates its shard. All collectives can overlap with forward and backward, for at most
    their time, except the first all-gather, the last reduce-scatter, the mean of the loss and the gradient norm.

    Args:
        payload: bytes that the model communicates.
        work: computation of a step.
        n: number of processes.
        network: network for all-reduces.
        gathers: network for all-gathers.
        scatters: network for reduce-scatters.
        overlap: share of the possible overlap, 0 to 1.
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
