"""Batches out of 10 billion tokens: how fast, in how much memory, and how long it takes to begin in the middle.

    python benchmarks/loader.py [FOLDER]

Writes 100 sparse shards of 100M tokens into FOLDER (a temporary one by default). They take no room on the disk and are
all zeros, but are read through the page cache as any others, which has none of their pages at first. Batches are 512
sequences of 1,024 tokens, GPT-2's half a million.
"""

from __future__ import annotations

import statistics
import time
import tracemalloc
from pathlib import Path

import numpy as np
from folder import in_folder

from restomod.data.batches import Batches
from restomod.data.prefetch import Prefetch
from restomod.data.shards import HEADER_BYTES, MAGIC, VERSION, TokenStream, open_shard
from restomod.memory import peak_resident_bytes

SHARDS, SHARD_TOKENS = 100, 100_000_000
T, SEQUENCES = 1024, 512
STEPS = 30


def write_sparse(folder: Path) -> list[Path]:
    header = np.zeros(256, dtype="<i4")
    header[:3] = MAGIC, VERSION, SHARD_TOKENS
    paths = [folder / f"sparse_train_{i:06d}.bin" for i in range(SHARDS)]
    for path in paths:
        with open(path, "wb") as f:
            f.write(header.tobytes())
            f.truncate(HEADER_BYTES + 2 * SHARD_TOKENS)
    return paths


def milliseconds(seconds: list[float]) -> str:
    ms = [1000 * s for s in seconds]
    return f"{statistics.median(ms):.2f} ms ({min(ms):.2f} to {max(ms):.2f})"


def main(folder: Path) -> None:
    start = time.perf_counter()
    paths = write_sparse(folder)
    print(f"{SHARDS} sparse shards written in {time.perf_counter() - start:.2f} s")

    start = time.perf_counter()
    stream = TokenStream([open_shard(path) for path in paths])
    stream.expect_random_reads()
    batches = Batches(stream, T, SEQUENCES, seed=1)
    opened = time.perf_counter() - start
    middle = SHARDS * SHARD_TOKENS // 2 // (T * SEQUENCES)
    batches.micro_batches(middle, SEQUENCES)
    print(f"{batches.n_windows:,} windows opened in {1000 * opened:.1f} ms")
    print(f"first batch, that of token {middle * T * SEQUENCES:,}, after {1000 * (time.perf_counter() - start):.1f} ms")

    tracemalloc.start()
    batches.windows(middle)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    print(f"order of a batch: {peak:,} bytes at the peak, whatever the number of tokens")

    order, load, waited = [], [], []
    for step in range(middle, middle + STEPS):
        start = time.perf_counter()
        windows = batches.windows(step)
        order.append(time.perf_counter() - start)
        start = time.perf_counter()
        batches.load(windows)
        load.append(time.perf_counter() - start)
    print(f"order of {SEQUENCES} sequences: {milliseconds(order)}")
    print(f"loading them: {milliseconds(load)}, {T * SEQUENCES / statistics.median(load):,.0f} tokens/s in one thread")

    with Prefetch(batches, 64, middle + 2 * STEPS) as data:
        for step in range(middle + STEPS, middle + 2 * STEPS):
            waited.append(data.get(step)[1])
            time.sleep(0.1)  # a step of 5M tokens/s, faster than any one GPU
    print(f"waited for a batch loaded ahead, steps of 100 ms: {milliseconds(waited[1:])}")
    print(f"peak resident memory {(peak_resident_bytes() or 0) / 2**20:,.0f} MiB, torch included")


if __name__ == "__main__":
    in_folder(main)
