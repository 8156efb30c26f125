"""Batches as a pure function of (seed, step), and loading them ahead in a thread.

A source of n tokens holds (n - 1) // T windows; window i is tokens [i*T, i*T + T], the last one only a target. Every
epoch visits all windows once, in an order drawn from (seed, epoch). Steps take `batch_sequences` windows each,
running on from one epoch into the next. To resume at step k is to ask for step k: nothing is skipped or stored.

Where several sources are mixed, each has its own windows and epochs, and the sequences of a run are dealt out among
the sources evenly: after any number of sequences each source has had its share of them, to within one or two.

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
STEPS_AHEAD = 2  # steps whose batches `Prefetch` loads before they are asked for

MicroBatches = list[tuple[Tensor, Tensor]]  # tokens and targets of each, (B, T)


def permute(index: np.ndarray, n: int, seed: int, epoch: int, source: int = 0) -> np.ndarray:
    """Map each index by a seeded permutation of range(n), in memory that does not grow with n.

    A balanced Feistel network over the smallest 4^k >= n, whose results outside range(n) are sent through again until
    they fall inside (cycle walking; Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002, section 4).

    Args:
        index: shape (m,), values in [0, n).
        n: size of the permuted range.
        seed, epoch, source: choose the permutation.

    Returns:
        Shape (m,), int64, values in [0, n); distinct for distinct indices.
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
    """SplitMix64's finalizer: every output bit depends on every input bit (Steele et al., 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def assign_sources(position: np.ndarray, shares: Sequence[Fraction]) -> tuple[np.ndarray, np.ndarray]:
    """Return the source of each sequence of a run, and its index within that source.

    The first source gets sequence p where floor(p * share) rises, the second likewise among those that are left, and
    so on. So both answers are known for any p without those before it.

    Args:
        position: shape (m,), int64: indices of sequences of the run.
        shares: one per source; they add up to 1, with denominators small enough for 64-bit arithmetic.

    Returns:
        Two arrays (m,), int64: the source, and the index within it.
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
    """The batches of a run, by step."""

    def __init__(
        self,
        streams: TokenStream | Sequence[TokenStream],
        sequence_length: int,
        batch_sequences: int,
        seed: int,
        split: str = "training",
        shares: Sequence[Fraction] = (Fraction(1),),
    ) -> None:
        """Number the windows of all streams, each of which is a source.

        Args:
            streams: the tokens of each source.
            sequence_length: T.
            batch_sequences: sequences per step, summed over processes.
            seed: chooses the order of the windows.
            split: the tokens' name in messages.
            shares: fraction of the run's sequences for each source; they add up to 1.

        Raises:
            UserError: a stream is shorter than a window and its target.
        """
        self.streams = [streams] if isinstance(streams, TokenStream) else list(streams)
        self.T, self.batch_sequences, self.seed, self.shares = sequence_length, batch_sequences, seed, tuple(shares)
        self.source_windows = [max(0, len(stream) - 1) // sequence_length for stream in self.streams]
        for stream, n_windows in zip(self.streams, self.source_windows, strict=True):
            if n_windows < 1:
                raise UserError(
                    f"the {split} text has {len(stream)} tokens, fewer than a window of {sequence_length} and its "
                    f"target; give more text, lower --sequence-length, or change --data.val-fraction"
                )
        self._first_windows = np.cumsum([0, *self.source_windows])  # of each source, and the number of all

    @property
    def n_windows(self) -> int:
        """Number of windows of all sources together."""
        return int(self._first_windows[-1])

    def windows(self, step: int, start: int = 0, count: int | None = None) -> np.ndarray:
        """The windows of step ``step``'s global batch, or ``count`` of them from ``start`` on, shape (count,), int64.

        The windows of all sources are numbered one source after the other. What is not asked for takes no time.
        """
        first = step * self.batch_sequences + start
        position = np.arange(first, first + (self.batch_sequences - start if count is None else count))
        source, index = assign_sources(position, self.shares)
        windows = np.empty_like(index)
        for k, n in enumerate(self.source_windows):
            epoch, within = np.divmod(index, n)
            for e in np.unique(epoch[source == k]):  # a batch may end one epoch and begin the next
                here = (source == k) & (epoch == e)
                windows[here] = self._first_windows[k] + permute(within[here], n, self.seed, int(e), k)
        return windows

    def load(self, windows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Tokens and targets of ``windows`` (B,): two int64 tensors (B, T), the second one token ahead.

        Raises:
            UserError: the shards hold a token that GPT-2's vocabulary lacks.
        """
        source = np.searchsorted(self._first_windows, windows, side="right") - 1
        starts = (windows - self._first_windows[source]) * self.T
        reads = zip(source.tolist(), starts.tolist(), strict=True)
        rows = np.stack([self.streams[k].read(start, self.T + 1) for k, start in reads])  # (B, T + 1)
        require_in_vocabulary(rows, "a shard")
        batch = torch.from_numpy(rows.astype(np.int64))
        return batch[:, :-1].contiguous(), batch[:, 1:].contiguous()

    def micro_batches(self, step: int, micro_batch: int, rank: int = 0, world_size: int = 1) -> MicroBatches:
        """One process's share of a step, cut into micro-batches of ``micro_batch`` sequences.

        The ranks' shares are consecutive slices of the global batch, so any number of ranks together has that batch.

        Raises:
            UserError: the batch cannot be shared out so evenly.
        """
        share = self.batch_sequences // world_size
        if share * world_size != self.batch_sequences or share % micro_batch:
            raise UserError(
                f"a batch of {self.batch_sequences} sequences cannot be cut into micro-batches of {micro_batch} "
                f"on {world_size} processes; choose numbers that divide it"
            )
        mine = self.windows(step, rank * share, share)
        return [self.load(mine[i : i + micro_batch]) for i in range(0, share, micro_batch)]


def document_ids(tokens: Tensor) -> Tensor:
    """Number the documents of each window, for attention that is masked at their boundaries.

    Args:
        tokens: (B, T), from shards, where ``<|endoftext|>`` stands before every document.

    Returns:
        (B, T), int32: 0 for what is left of the document in which the window begins, then 1, 2, …; the separator is
        the first token of its document.
    """
    return (tokens == END_OF_TEXT).cumsum(dim=1, dtype=torch.int32)


class Prefetch:
    """Loads the micro-batches of coming steps in a background thread while the device computes."""

    def __init__(
        self,
        batches: Batches,
        micro_batch: int,
        steps: int,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | None = None,
    ) -> None:
        """Load nothing yet; loading begins with the first `get`, and ends with the last of ``steps``.

        For a CUDA ``device`` batches are loaded into page-locked memory, from which it copies while it computes.
        """
        self.batches, self.micro_batch, self.steps = batches, micro_batch, steps
        self.rank, self.world_size = rank, world_size
        self.pin_memory = device is not None and device.type == "cuda"
        self._loading: dict[int, Future[MicroBatches]] = {}
        # a new thread uses GPU 0, on which pinning would create a CUDA context for every process of the machine
        one_of_several = self.pin_memory and device is not None and device.index is not None
        choose = (torch.cuda.set_device, (device,)) if one_of_several else (None, ())
        self._thread = ThreadPoolExecutor(1, "prefetch", *choose)

    def get(self, step: int) -> tuple[MicroBatches, float]:
        """The micro-batches of ``step`` (see `Batches.micro_batches`), and the seconds waited for them.

        Raises:
            UserError: as loading does.
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
        """Cancel what is not loaded yet."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._loading.clear()

    def __enter__(self) -> Prefetch:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
