"""Speed of batches from 10 billion tokens, and time to the first batch of a resumed run.

The shards are sparse files, which contain zeros and need no disk space.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks.contenders import Contender, InProcess, Measured, Round
from benchmarks.harness import BenchPlan, compare
from benchmarks.records import Item, Metric
from benchmarks.scale_data import write_sparse_shard
from restomod.data.batches import Batches
from restomod.data.dataset import TokenStream, open_shard

T, SEQUENCES = 1024, 512
Fetch = Callable[[], torch.Tensor]


def measure(plan: BenchPlan) -> Item:
    """Compare with random windows of a memory-mapped file (nanoGPT's `get_batch`) and with torch's DataLoader."""
    shards, tokens = plan.pick(100, 4), plan.pick(100_000_000, 2_000_000)
    paths = [plan.scratch / f"sparse_train_{i:06d}.bin" for i in range(shards)]
    for path in paths:
        write_sparse_shard(path, tokens)
    middle = shards * tokens // 2 // (T * SEQUENCES)
    single = plan.scratch / "single.bin"
    with open(single, "wb") as f:
        f.truncate(2 * shards * tokens)
    ways: list[Contender] = [
        InProcess("restomod", lambda: timed_batches(ours(paths, itertools.count(middle)))),
        InProcess("random windows of a memory-mapped file", lambda: timed_batches(random_windows(single), 1)),
        InProcess("torch DataLoader, shuffled", lambda: timed_batches(data_loader(paths, 0))),
    ]
    size = f"{T * SEQUENCES:,} tokens from {shards * tokens / 1e9:.3g} billion"
    ahead = "memory-mapped file: without advice the system also reads the neighbouring pages of each page"
    ahead += f" ({read_ahead(plan.scratch)})"
    speed = compare(
        plan, f"batches of {size}", ways, [Metric("batches/s", "", "higher")], plan.pick(5, 2), notes=[ahead]
    )
    starts: list[Contender] = [
        InProcess("restomod", lambda: timed_first_batch(lambda: ours(paths, itertools.count(middle)))),
        InProcess("torch DataLoader, skipping indices", lambda: timed_first_batch(lambda: data_loader(paths, middle))),
    ]
    note = "the DataLoader draws the permutation again and skips indices without reading their windows"
    case = f"time from start to the batch at token {middle * T * SEQUENCES:,}"
    resumed = compare(plan, case, starts, [Metric("ms", "", "lower")], plan.pick(5, 2), notes=[note])
    return Item("Batches of 10 billion tokens", [speed, resumed])


def read_ahead(folder: Path) -> str:
    """Return the system's read-ahead for the disk of ``folder``, as text."""
    device = os.stat(folder).st_dev
    block = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    for queue in (block / "queue", block / ".." / "queue"):  # disk, or disk of a partition
        with contextlib.suppress(OSError, ValueError):
            return f"up to {int((queue / 'read_ahead_kb').read_text()):,} kB on this machine"
    return "size unknown on this machine"


def timed_batches(fetch: Fetch, batches: int = 5) -> Round:
    """Return a round that fetches ``batches`` batches."""

    def one_round() -> Measured:
        start = time.perf_counter()
        for _ in range(batches):
            assert fetch().shape == (SEQUENCES, T)
        return Measured({"batches/s": batches / (time.perf_counter() - start)})

    return one_round


def timed_first_batch(make: Callable[[], Fetch]) -> Round:
    """Return a round that opens the data and fetches one batch."""

    def one_round() -> Measured:
        start = time.perf_counter()
        assert make()().shape == (SEQUENCES, T)
        return Measured({"ms": 1000 * (time.perf_counter() - start)})

    return one_round


def stream_of(paths: list[Path]) -> TokenStream:
    """Open shards as a stream for random reads."""
    stream = TokenStream([open_shard(path) for path in paths])
    stream.expect_random_reads()
    return stream


def ours(paths: list[Path], steps: Iterator[int]) -> Fetch:
    """Return a function that loads the batch of the next step with restomod."""
    batches = Batches(stream_of(paths), T, SEQUENCES, seed=1)
    return lambda: batches.micro_batches(next(steps), SEQUENCES)[0][0]


def random_windows(path: Path) -> Fetch:
    """Return a reimplementation of nanoGPT's `get_batch`: windows drawn with replacement, the file mapped per batch."""
    generator = torch.Generator().manual_seed(1)

    def fetch() -> torch.Tensor:
        data = np.memmap(path, dtype=np.uint16, mode="r")
        starts = torch.randint(len(data) - T, (SEQUENCES,), generator=generator).tolist()
        x = torch.stack([torch.from_numpy(data[i : i + T].astype(np.int64)) for i in starts])
        torch.stack([torch.from_numpy(data[i + 1 : i + 1 + T].astype(np.int64)) for i in starts])
        return x

    return fetch


class Windows(torch.utils.data.Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Dataset of token windows for torch's DataLoader."""

    def __init__(self, stream: TokenStream) -> None:
        self.stream = stream

    def __len__(self) -> int:
        return (len(self.stream) - 1) // T

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = torch.from_numpy(self.stream.read(i * T, T + 1).astype(np.int64))
        return tokens[:-1], tokens[1:]


def data_loader(paths: list[Path], skipped: int) -> Fetch:
    """Return the batches of a DataLoader in this process whose batch sampler skips ``skipped`` batches."""
    windows = Windows(stream_of(paths))
    order = torch.utils.data.RandomSampler(windows, generator=torch.Generator().manual_seed(1))
    every = torch.utils.data.BatchSampler(order, SEQUENCES, drop_last=True)
    rest = itertools.islice(every, skipped, None)  # as accelerate resumes
    batches = iter(torch.utils.data.DataLoader(windows, batch_sampler=rest))
    return lambda: next(batches)[0]
