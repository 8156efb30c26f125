"""Which tokens a step sees: a pure function of (seed, step).

A split of n tokens holds (n - 1) // T windows; window i is tokens [i*T, i*T + T], the last one only a target. Every
epoch visits all windows once, in an order drawn from (seed, epoch). Steps take `batch_sequences` windows each,
running on from one epoch into the next. To resume at step k is to ask for step k: nothing is skipped or stored.

Shapes: B = sequences, T = sequence_length.
"""

from __future__ import annotations

import numpy as np
import torch

from restomod.data.shards import TokenStream
from restomod.errors import UserError

FEISTEL_ROUNDS = 8


def permute(index: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """Where a seeded permutation of range(n) sends each index, in memory that does not grow with n.

    A balanced Feistel network over the smallest 4^k >= n, whose results outside range(n) are sent through again until
    they fall inside (cycle walking; Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002, section 4).

    Args:
        index: shape (m,), values in [0, n).
        n: size of the permuted range.
        seed, epoch: choose the permutation.

    Returns:
        Shape (m,), int64, values in [0, n); distinct for distinct indices.
    """
    half_bits = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    keys = np.random.SeedSequence([seed, epoch]).generate_state(FEISTEL_ROUNDS, np.uint64)
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


class Batches:
    """The batches of a run, by step."""

    def __init__(
        self,
        stream: TokenStream,
        sequence_length: int,
        batch_sequences: int,
        seed: int,
        split: str = "training",
    ) -> None:
        """Raises UserError where ``stream``, called ``split`` in messages, is shorter than a window and its target."""
        self.stream, self.T, self.batch_sequences, self.seed = stream, sequence_length, batch_sequences, seed
        self.n_windows = (len(stream) - 1) // sequence_length if len(stream) else 0
        if self.n_windows < 1:
            raise UserError(
                f"the {split} text has {len(stream)} tokens, fewer than a window of {sequence_length} and its target; "
                f"give more text, lower --sequence-length, or change --data.val-fraction"
            )

    def windows(self, step: int) -> np.ndarray:
        """The windows of step ``step``'s global batch, shape (batch_sequences,), int64."""
        position = np.arange(step * self.batch_sequences, (step + 1) * self.batch_sequences)
        epoch, within = np.divmod(position, self.n_windows)
        windows = np.empty_like(within)
        for e in np.unique(epoch):  # a batch may end one epoch and begin the next
            here = epoch == e
            windows[here] = permute(within[here], self.n_windows, self.seed, int(e))
        return windows

    def load(self, windows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and targets of ``windows`` (B,): two int64 tensors (B, T), the second one token ahead."""
        rows = np.stack([self.stream.read(int(w) * self.T, self.T + 1) for w in windows])  # (B, T + 1)
        batch = torch.from_numpy(rows.astype(np.int64))
        return batch[:, :-1].contiguous(), batch[:, 1:].contiguous()

    def micro_batches(
        self, step: int, micro_batch: int, rank: int = 0, world_size: int = 1
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """One process's share of a step, cut into micro-batches of ``micro_batch`` sequences.

        The ranks' shares are consecutive slices of the global batch, so together they are that batch whatever their
        number.

        Raises:
            UserError: the batch cannot be shared out so evenly.
        """
        share = self.batch_sequences // world_size
        if share * world_size != self.batch_sequences or share % micro_batch:
            raise UserError(
                f"a batch of {self.batch_sequences} sequences cannot be cut into micro-batches of {micro_batch} "
                f"on {world_size} processes; choose numbers that divide it"
            )
        mine = self.windows(step)[rank * share : (rank + 1) * share]
        return [self.load(mine[i : i + micro_batch]) for i in range(0, share, micro_batch)]
