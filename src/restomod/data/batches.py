"""Training batches as a pure function of (seed, step), and a background thread that prefetches them.

A source of n tokens has (n - 1) // T windows. Window i contains the tokens [i*T, i*T + T]; its last token is only a
target. Every epoch visits all windows once, in an order determined by (seed, epoch). Every step reads
`batch_sequences` windows and continues in the next epoch where one ends. No state is stored, so a run resumes at
step k by requesting step k.

Each source of a mix has its own windows and epochs. After any number of sequences, every source has contributed its
share to within one or two sequences.

Shapes: B = sequences, T = sequence_length.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from restomod.data.dataset import TokenStream
from restomod.data.tokenizer import END_OF_TEXT, require_in_vocabulary
from restomod.utils.errors import UserError

FEISTEL_ROUNDS = 8
STEPS_AHEAD = 2  # steps that `Prefetch` loads in advance

MicroBatches = list[tuple[Tensor, Tensor]]  # (tokens, targets) of each micro-batch, both (B, T)


def permute(index: np.ndarray, n: int, seed: int, epoch: int, source: int = 0) -> np.ndarray:
    """Apply a seeded permutation of range(n) to indices, in memory that does not grow with n.

    The permutation is a balanced Feistel network over the smallest 4^k >= n with cycle walking: results outside
    range(n) pass through the network again (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002,
    section 4).

    Args:
        index: indices to permute, shape (m,), values in [0, n).
        n: size of the permuted range.
        seed: seed of the run.
        epoch: index of the epoch.
        source: index of the source in a mix.

    Returns:
        Permuted indices, shape (m,), int64, values in [0, n); distinct for distinct inputs.
    """
    half_bits = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    keys = np.random.SeedSequence([seed, epoch, source]).generate_state(FEISTEL_ROUNDS, np.uint64)
    x = index.astype(np.uint64)
    outside = np.ones(len(x), dtype=bool)
    while outside.any():
        left, right = x[outside] >> half_bits, x[outside] & mask
        for key in keys:
            left, right = right, left ^ (_mix(right + key) & mask)
        x[outside] = left << half_bits | right
        outside = x >= n
    return x.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """Mix 64-bit integers with SplitMix64's finalizer (Steele et al., 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def assign_sources(position: np.ndarray, shares: Sequence[Fraction]) -> tuple[np.ndarray, np.ndarray]:
    """Return the source of each sequence of a run, and its index within that source.

    The first source gets sequence p if floor((p + 1) * share) > floor(p * share). The same rule assigns the remaining
    sequences to the remaining sources. The result for p does not depend on earlier results.

    Args:
        position: indices of sequences in the run, shape (m,), int64.
        shares: share of each source; the sum is 1, and the denominators are small enough for 64-bit arithmetic.

    Returns:
        Two arrays of shape (m,), int64: the source, and the index within the source.
    """
    source, index = np.full(len(position), len(shares) - 1), np.empty(len(position), dtype=np.int64)
    left, rest = np.arange(len(position)), Fraction(1)
    for k, share in enumerate(shares[:-1]):
        part = share / rest
        before = position * part.numerator // part.denominator
        here = (position + 1) * part.numerator // part.denominator > before
        source[left[here]], index[left[here]] = k, before[here]
        left, position, rest = left[~here], (position - before)[~here], rest - share
    index[left] = position
    return source, index


class Batches:
    """Access to the batches of a run by step."""

    def __init__(
        self,
        streams: TokenStream | Sequence[TokenStream],
        sequence_length: int,
        batch_sequences: int,
        seed: int,
        split: str = "training",
        shares: Sequence[Fraction] = (Fraction(1),),
    ) -> None:
        """Initialise the batches and count the windows of every source.

        Args:
            streams: token stream of each source.
            sequence_length: T, in tokens.
            batch_sequences: sequences per step, over all ranks.
            seed: seed of the order of the windows.
            split: name of the split in error messages.
            shares: fraction of the run's sequences from each source; the sum is 1.

        Raises:
            UserError: a stream has fewer than T + 1 tokens.
        """
        self.streams = [streams] if isinstance(streams, TokenStream) else list(streams)
        self.T, self.batch_sequences, self.seed, self.shares = sequence_length, batch_sequences, seed, tuple(shares)
        self.source_windows = [max(0, len(stream) - 1) // sequence_length for stream in self.streams]
        for stream, n_windows in zip(self.streams, self.source_windows, strict=True):
            if n_windows < 1:
                raise UserError(
                    f"the {split} split has {len(stream)} tokens, fewer than --sequence-length {sequence_length} "
                    f"plus one target; add text, lower --sequence-length, or use --data.val-fraction 0 (none)"
                )
        self._first_windows = np.cumsum([0, *self.source_windows])  # first window of each source, then the total

    @property
    def n_windows(self) -> int:
        """Total number of windows over all sources."""
        return int(self._first_windows[-1])

    def windows(self, step: int, start: int = 0, count: int | None = None) -> np.ndarray:
        """Return the window indices of a slice of a step's global batch.

        The numbering of windows is consecutive over the sources.

        Args:
            step: index of the step.
            start: first sequence of the slice.
            count: number of sequences; None: up to the end of the batch.

        Returns:
            Window indices, shape (count,), int64.
        """
        first = step * self.batch_sequences + start
        position = np.arange(first, first + (self.batch_sequences - start if count is None else count))
        source, index = assign_sources(position, self.shares)
        windows = np.empty_like(index)
        for k, n in enumerate(self.source_windows):
            epoch, within = np.divmod(index, n)
            for e in np.unique(epoch[source == k]):  # a batch can span two epochs
                here = (source == k) & (epoch == e)
                windows[here] = self._first_windows[k] + permute(within[here], n, self.seed, int(e), k)
        return windows

    def load(self, windows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Read the tokens and targets of windows.

        Args:
            windows: window indices, shape (B,).

        Returns:
            Two int64 tensors (B, T); the targets are the tokens shifted by one position.

        Raises:
            UserError: a shard is missing or damaged, or contains a token outside GPT-2's vocabulary.
        """
        source = np.searchsorted(self._first_windows, windows, side="right") - 1
        starts = (windows - self._first_windows[source]) * self.T
        reads = zip(source.tolist(), starts.tolist(), strict=True)
        rows = np.stack([self.streams[k].read(start, self.T + 1) for k, start in reads])  # (B, T + 1)
        require_in_vocabulary(rows, "a shard")
        batch = torch.from_numpy(rows.astype(np.int64))
        return batch[:, :-1].contiguous(), batch[:, 1:].contiguous()

    def micro_batches(self, step: int, micro_batch: int, rank: int = 0, world_size: int = 1) -> MicroBatches:
        """Load one rank's part of a step as micro-batches of ``micro_batch`` sequences.

        Each rank reads a consecutive slice of the global batch, so the global batch does not depend on ``world_size``.

        Raises:
            UserError: the batch is not divisible by ``world_size * micro_batch``, or `load` raises it.
        """
        share = self.batch_sequences // world_size
        if share * world_size != self.batch_sequences or share % micro_batch:
            raise UserError(
                f"a batch of {self.batch_sequences} sequences is not divisible into micro-batches of {micro_batch} "
                f"on {world_size} processes; change --batch-tokens, --micro-batch or the number of processes"
            )
        mine = self.windows(step, rank * share, share)
        return [self.load(mine[i : i + micro_batch]) for i in range(0, share, micro_batch)]


def document_ids(tokens: Tensor) -> Tensor:
    """Return the index of each token's document within its window, for the document mask.

    Args:
        tokens: token ids (B, T), with ``<|endoftext|>`` before every document.

    Returns:
        Document indices (B, T), int32. The document in which the window begins has index 0. ``<|endoftext|>`` is the
        first token of its document.
    """
    return (tokens == END_OF_TEXT).cumsum(dim=1, dtype=torch.int32)


class Prefetch:
    """Background thread that loads the micro-batches of the next steps while the device computes."""

    def __init__(
        self,
        batches: Batches,
        micro_batch: int,
        steps: int,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | None = None,
    ) -> None:
        """Initialise the thread; loading starts with the first call of `get`.

        Args:
            batches: source of the micro-batches.
            micro_batch: sequences per micro-batch.
            steps: number of steps of the run; later steps are not prefetched.
            rank: index of this process.
            world_size: number of processes.
            device: device that receives the batches; for CUDA they are loaded into pinned memory, from which copies are
                asynchronous.
        """
        self.batches, self.micro_batch, self.steps = batches, micro_batch, steps
        self.rank, self.world_size = rank, world_size
        self.pin_memory = device is not None and device.type == "cuda"
        self._loading: dict[int, Future[MicroBatches]] = {}
        # a new thread defaults to GPU 0, where pinning would create a CUDA context for every process
        one_of_several = self.pin_memory and device is not None and device.index is not None
        choose = (torch.cuda.set_device, (device,)) if one_of_several else (None, ())
        self._thread = ThreadPoolExecutor(1, "prefetch", *choose)

    def get(self, step: int) -> tuple[MicroBatches, float]:
        """Return the micro-batches of ``step`` (see `Batches.micro_batches`) and the waiting time in seconds.

        Raises:
            UserError: the micro-batches cannot be loaded.
        """
        start = time.perf_counter()
        for ahead in range(step, max(step + 1, min(step + 1 + STEPS_AHEAD, self.steps))):
            if ahead not in self._loading:
                self._loading[ahead] = self._thread.submit(self._load, ahead)
        micro_batches = self._loading.pop(step).result()
        return micro_batches, time.perf_counter() - start

    def _load(self, step: int) -> MicroBatches:
        micro_batches = self.batches.micro_batches(step, self.micro_batch, self.rank, self.world_size)
        if self.pin_memory:
            return [(tokens.pin_memory(), targets.pin_memory()) for tokens, targets in micro_batches]
        return micro_batches

    def close(self) -> None:
        """Cancel pending loads."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._loading.clear()

    def __enter__(self) -> Prefetch:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
