"""Data loading of 10 trillion tokens by 1,024 ranks: correctness, and time and memory per rank.

Ordering and reading is the package's code (`Batches`, `TokenStream`, `open_dataset`). Two replacements avoid 20 TB of
files. Correctness uses shards that compute their tokens when they are read: each window begins with its number, so the
tensors of a rank show which windows it read. Time and memory use many hard links to few sparse files.

n = windows of the data, T = tokens of a window.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import statistics
import time
import tracemalloc
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from restomod.data.batches import FEISTEL_ROUNDS, Batches, _mix
from restomod.data.dataset import HEADER_BYTES, MAGIC, VERSION, TokenStream, open_dataset
from restomod.data.manifest import MANIFEST, MANIFEST_FORMAT
from restomod.utils.files import sha256_file, write_json_atomically
from restomod.utils.process_memory import status_bytes
from restomod.utils.verified import VERIFIED, _seen

BASE, DIGITS = 50_000, 3  # base and number of tokens of a window number: up to 1.25e14 windows
NAMES_PER_FILE = 1000  # hard links; ext4 allows 65,000, other file systems fewer
VOCABULARY = "0" * 64  # placeholder for the SHA-256 of a tokenizer
STEPS_TIMED = 20


class NumberedShard:
    """Shard whose tokens are computed when read, with each window beginning with its number.

    Args:
        first: position of the first token in the stream.
        length: number of tokens.
        T: tokens per window.
    """

    def __init__(self, first: int, length: int, T: int) -> None:
        self.first, self.length, self.T = first, length, T

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, _ = part.indices(self.length)
        window, place = np.divmod(np.arange(self.first + start, self.first + stop), self.T)
        digit = window // BASE ** np.minimum(place, DIGITS) % BASE
        return np.where(place < DIGITS, digit, 0).astype(np.uint16)


def numbered_stream(tokens: int, shard_tokens: int, T: int) -> TokenStream:
    """Return a stream of ``tokens`` tokens in shards of ``shard_tokens``, with numbered windows of T >= 3."""
    firsts = range(0, tokens, shard_tokens)
    return TokenStream([NumberedShard(f, min(shard_tokens, tokens - f), T) for f in firsts])  # type: ignore[misc]


def windows_read(micro_batches: Iterable[tuple[Tensor, Tensor]]) -> list[int]:
    """Return the numbers of the windows in micro-batches from a `numbered_stream`.

    Args:
        micro_batches: pairs of tokens and targets, (B, T).

    Raises:
        AssertionError: the targets are not the next tokens, including the first token of the next window.
    """
    found: list[int] = []
    for x, y in micro_batches:
        assert (x[:, 1:] == y[:, :-1]).all(), "targets are not the next tokens"
        numbers = sum(x[:, j] * BASE**j for j in range(DIGITS))
        assert (y[:, -1] == (numbers + 1) % BASE).all(), "the last target is not the next window's first token"
        found += numbers.tolist()
    return found


@dataclass(frozen=True)
class Reader:
    """All ranks of a run, simulated in this process."""

    batches: Batches
    """Batches of the run."""
    ranks: int
    """Number of ranks."""

    @property
    def share(self) -> int:
        """Sequences per rank and step."""
        return self.batches.batch_sequences // self.ranks

    def read(self, step: int, rank: int) -> list[int]:
        """Return the windows that a rank reads in a step, with the code of training."""
        return windows_read(self.batches.micro_batches(step, self.share, rank, self.ranks))

    def duplicates(self, steps: Iterable[int]) -> tuple[int, int]:
        """Return the number of sequences that all ranks read in ``steps``, and of duplicates within an epoch."""
        n, size = self.batches.n_windows, self.batches.batch_sequences
        seen: set[tuple[int, int]] = set()
        count = 0
        for step in steps:
            windows = [w for rank in range(self.ranks) for w in self.read(step, rank)]
            epochs = ((step * size + i) // n for i in range(size))
            seen.update(zip(epochs, windows, strict=True))
            count += len(windows)
        return count, count - len(seen)

    def missing(self, epoch: int = 0) -> int:
        """Return the number of windows that are not read exactly once in an epoch, over all ranks and steps."""
        n, size = self.batches.n_windows, self.batches.batch_sequences
        times = np.zeros(n, dtype=np.int64)
        for step in range(epoch * n // size, ((epoch + 1) * n - 1) // size + 1):
            windows = np.array([w for rank in range(self.ranks) for w in self.read(step, rank)])
            position = step * size + np.arange(size)
            np.add.at(times, windows[position // n == epoch], 1)
        return int((times != 1).sum())

    def not_found(self, windows: np.ndarray, epoch: int = 0) -> int:
        """Return the number of ``windows`` that are not read at the rank and step from the inverse permutation."""
        b = self.batches
        positions = epoch * b.n_windows + unpermute(windows, b.n_windows, b.seed, epoch)
        lost = 0
        for window, position in zip(windows.tolist(), positions.tolist(), strict=True):
            step, place = divmod(position, b.batch_sequences)
            rank, index = divmod(place, self.share)
            lost += self.read(step, rank)[index] != window
        return lost


def unpermute(window: np.ndarray, n: int, seed: int, epoch: int, source: int = 0) -> np.ndarray:
    """Return the position of each window in an epoch, (m,), int64: the inverse of `restomod.data.batches.permute`.

    The inverse of a Feistel round (L, R) -> (R, L ^ f(R)) is (L', R') -> (R' ^ f(L'), L') for any f (Luby and Rackoff,
    1988), so the network is a bijection of its range. Cycle walking, which repeats the network until the result is in
    [0, n), is inverted in the same way. Since an inverse exists, an epoch is complete and without duplicates.
    """
    half_bits = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    keys = np.random.SeedSequence([seed, epoch, source]).generate_state(FEISTEL_ROUNDS, np.uint64)
    x = window.astype(np.uint64)
    outside = np.ones(len(x), dtype=bool)
    while outside.any():
        left, right = x[outside] >> half_bits, x[outside] & mask
        for key in keys[::-1]:
            left, right = right ^ (_mix(left + key) & mask), left
        x[outside] = left << half_bits | right
        outside = x >= n
    return x.astype(np.int64)


def write_sparse_shard(path: Path, tokens: int) -> None:
    """Write a shard of zeros in llm.c's format as a sparse file."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = MAGIC, VERSION, tokens
    with open(path, "wb") as f:
        f.write(header.tobytes())
        f.truncate(HEADER_BYTES + 2 * tokens)


def write_sparse_dataset(folder: Path, shards: int, shard_tokens: int) -> None:
    """Write a complete folder of token shards, all zeros, as hard links to few sparse files.

    The manifest is correct. The record of verified shards equals the one that the first training start writes.
    """
    folder.mkdir(parents=True)
    names = [f"train_{i:06d}.bin" for i in range(shards)] + ["val_000000.bin"]
    for i in range(0, len(names), NAMES_PER_FILE):
        write_sparse_shard(folder / names[i], shard_tokens)
        for name in names[i + 1 : i + NAMES_PER_FILE]:
            os.link(folder / names[i], folder / name)
    sha256 = sha256_file(folder / names[0])
    entries = [{"file": name, "tokens": shard_tokens, "sha256": sha256} for name in names]
    splits = {"train": entries[:-1], "val": entries[-1:]}
    write_json_atomically(
        folder / MANIFEST,
        {
            "format": MANIFEST_FORMAT,
            "name": "sparse",
            "fingerprint": sha256,
            "tokenizer": {"name": "none", "vocab_size": 50257, "sha256": VOCABULARY},
            "documents": 1,
            "tokens": shard_tokens * len(names),
            "splits": {k: {"tokens": shard_tokens * len(v), "shards": v} for k, v in splits.items()},
        },
    )
    write_json_atomically(folder / VERIFIED, {name: _seen(folder / name, sha256) for name in names})


def anonymous_bytes() -> int:
    """Return the anonymous memory of this process in bytes, which excludes memory-mapped files. Linux only."""
    return status_bytes("RssAnon") or 0


def rank_cost(folder: Path, T: int, batch_sequences: int, ranks: int, at: Sequence[float]) -> dict[str, Any]:
    """Measure seconds and bytes of one rank that resumes at fractions ``at`` of an epoch.

    Call it in a new process, so that no memory of earlier work is counted.
    """
    gc.collect()
    before, computing, start = anonymous_bytes(), time.process_time(), time.perf_counter()
    dataset = open_dataset(folder, VOCABULARY)
    opened, computed = time.perf_counter(), time.process_time() - computing
    gc.collect()
    held = anonymous_bytes() - before
    dataset.train.expect_random_reads()
    share, rank = batch_sequences // ranks, ranks - 1
    firsts, order, load = [], [], []
    for part in at:
        began = time.perf_counter()
        batches = Batches(dataset.train, T, batch_sequences, seed=1)
        step = int(part * batches.n_windows) // batch_sequences
        batches.micro_batches(step, share, rank, ranks)
        firsts.append(time.perf_counter() - began)
        for later in range(step + 1, step + 1 + STEPS_TIMED):
            began = time.perf_counter()
            windows = batches.windows(later, rank * share, share)
            ordered = time.perf_counter()
            batches.load(windows)
            order.append(ordered - began)
            load.append(time.perf_counter() - ordered)
    grown = anonymous_bytes() - before - held
    tracemalloc.start()
    batches.micro_batches(step, share, rank, ranks)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return {
        "tokens": len(dataset.train),
        "shards": len(dataset.manifest["splits"]["train"]["shards"]),
        "at": list(at),
        "open_seconds": opened - start,
        "open_cpu_seconds": computed,
        "first_batch_seconds": firsts,
        "order_seconds": statistics.median(order),
        "load_seconds": statistics.median(load),
        "step_peak_bytes": peak,
        "opened_bytes": held,
        "grown_bytes": grown,
        "process_bytes": before + held + grown,
        "files_open": sum(_is_shard(link) for link in Path("/proc/self/fd").iterdir()),
    }


def _is_shard(link: Path) -> bool:
    try:
        return os.readlink(link).endswith(".bin")
    except OSError:  # the descriptor of the directory listing is closed
        return False


def in_fresh_process(*arguments: Any) -> dict[str, Any]:
    """Call `rank_cost` in a new process, forked from a server that has imported torch."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["restomod.data.batches", "restomod.engine.step"])
    with context.Pool(1) as pool:
        return pool.apply(rank_cost, arguments)
