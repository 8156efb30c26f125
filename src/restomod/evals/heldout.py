"""Loss on held-out tokens: always the same tokens, whatever the batch size."""

from __future__ import annotations

import numpy as np
import torch

from restomod.data.batches import Batches
from restomod.data.shards import TokenStream
from restomod.device import autocast
from restomod.model.gpt import GPT
from restomod.train.distributed import SINGLE, Processes
from restomod.train.loss import linear_cross_entropy

TOKENS_PER_FORWARD = 8192


def heldout_windows(n_windows: int, sequence_length: int, max_tokens: int | None) -> np.ndarray:
    """Which windows to evaluate, (m,): all, or as many as ``max_tokens`` allow, spread evenly over the split."""
    m = n_windows if max_tokens is None else min(n_windows, max_tokens // sequence_length)
    return np.arange(m) * n_windows // m


@torch.no_grad()
def heldout_loss(
    model: GPT,
    stream: TokenStream,
    sequence_length: int,
    device: torch.device,
    dtype: torch.dtype,
    max_tokens: int | None = None,
    batch: int | None = None,
    processes: Processes = SINGLE,
) -> tuple[float, int]:
    """Mean cross-entropy per token over a split.

    Args:
        model: evaluated as it is; nothing in it changes, and a compiled transformer is run uncompiled.
        stream: the split's tokens.
        sequence_length: T; every window is evaluated without context from the one before.
        device, dtype: where and in which type to compute.
        max_tokens: evaluate about this many tokens (None: all windows of the split).
        batch: windows per forward pass; changes the speed, not the result.
        processes: that share the windows; all have to call this.

    Returns:
        Loss in nats, and the number of tokens it is the mean of.
    """
    batches = Batches(stream, sequence_length, 1, seed=0)
    windows = heldout_windows(batches.n_windows, sequence_length, max_tokens)
    batch = batch or max(1, TOKENS_PER_FORWARD // sequence_length)
    total = 0.0
    mine = windows[processes.rank :: processes.count]
    for start in range(0, len(mine), batch):
        tokens, targets = batches.load(mine[start : start + batch])  # (B, T) each
        with autocast(device, dtype):
            hidden = model.transformer.forward(tokens.to(device))  # (B, T, D)
        loss = linear_cross_entropy(
            hidden.flatten(0, 1), model.head, targets.to(device).flatten(), model.config.vocab_size, dtype
        )
        total += loss.item() * targets.numel()
    n_tokens = len(windows) * sequence_length
    return processes.sum(total)[0] / n_tokens, n_tokens
