"""Validation loss: mean cross-entropy on a fixed set of tokens. It is bit-identical for any number of ranks.

Shapes: B = windows per batch, T = tokens per window, D = embedding width, N = B * T.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from restomod.data.batches import Batches
from restomod.data.dataset import Dataset, TokenStream
from restomod.data.tokenizer import Tokenizer
from restomod.engine.device import EVAL_TOKENS, autocast, tokens_on
from restomod.engine.distributed import SINGLE, Processes
from restomod.evals.likelihood import Batch, LanguageModel, gpt_log_probs
from restomod.model.gpt import GPT

UNIT = 2**32  # losses are summed as integers in units of 1 / UNIT nats, because integer sums do not depend on the order


@dataclass(frozen=True)
class ValidationLoss:
    """Loss on a validation split. For a mix, all means are weighted by the shares of its sources."""

    loss: float
    """Mean cross-entropy per token, in nats."""
    tokens: int
    """Number of evaluated tokens in all sources."""
    bytes: int
    """UTF-8 bytes of the evaluated tokens; 0 if bytes were not counted."""
    by_position: list[float]
    """Mean loss at each position of a window, (T,), in nats."""
    sources: dict[str, float]
    """Loss of each source of a mix; empty without a mix."""
    bytes_per_token: float = 0.0
    """Mean bytes per token, weighted by share like the loss; 0 if bytes were not counted.

    ``bytes / tokens`` would instead weight the sources of a mix by the sizes of their splits.
    """

    @property
    def perplexity(self) -> float:
        """Perplexity, exp(loss)."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """Mean loss per token in bits, divided by the mean bytes per token; None if bytes were not counted.

        For a mix, it is the value of text sampled with its shares. `<|endoftext|>` has no bytes, but its loss counts.
        """
        return self.loss / math.log(2) / self.bytes_per_token if self.bytes_per_token else None

    def to_dict(self) -> dict[str, Any]:
        """Return all values as JSON values, with perplexity and bits per byte."""
        return dataclasses.asdict(self) | {"perplexity": self.perplexity, "bits_per_byte": self.bits_per_byte}


def validation_windows(n_windows: int, sequence_length: int, max_tokens: int | None) -> np.ndarray:
    """Return the indices of the windows to evaluate, (m,), spread evenly over the split.

    Args:
        n_windows: windows of the split.
        sequence_length: tokens per window.
        max_tokens: maximum number of tokens to evaluate; None: all windows.
    """
    m = n_windows if max_tokens is None else min(n_windows, max_tokens // sequence_length)
    return np.arange(m) * n_windows // m


@torch.no_grad()
def validation_loss(
    model: GPT | LanguageModel,
    stream: TokenStream,
    sequence_length: int,
    device: torch.device,
    dtype: torch.dtype,
    max_tokens: int | None = None,
    batch: int | None = None,
    processes: Processes = SINGLE,
    tokenizer: Tokenizer | None = None,
) -> ValidationLoss:
    """Compute the mean cross-entropy per token over a split. All ranks must call this function.

    A compiled model runs in eager mode.

    Args:
        model: restomod model, or any `LanguageModel` with GPT-2's tokens, which keeps its own device and dtype.
        stream: tokens of the split.
        sequence_length: T, tokens per window; windows do not share context.
        device: device of a restomod model.
        dtype: compute dtype of a restomod model.
        max_tokens: approximate number of tokens to evaluate, in complete windows; None: all tokens of the split except
            the first, with a shorter last window.
        batch: windows per forward pass, changes the result by rounding only; None: chosen automatically.
        processes: ranks that share the windows.
        tokenizer: tokenizer that counts bytes; None: bytes are not counted.
    """
    T = sequence_length
    batch = batch or max(1, tokens_on(device, EVAL_TOKENS) // T)
    total, tokens, n_bytes, finite = torch.zeros(T, dtype=torch.int64), 0, 0, True
    for i, (x, y) in enumerate(_inputs(stream, T, max_tokens, batch)):
        tokens += y.numel()
        n_bytes += tokenizer.byte_length(y.numpy().ravel()) if tokenizer else 0
        if i % processes.world_size == processes.rank:
            losses = token_losses(model, x, y, device, dtype)
            finite = finite and bool(losses.isfinite().all())
            total[: y.shape[1]] += (losses.nan_to_num(0, 0, 0).double() * UNIT).round().long().sum(0)
    parts = processes.gather((total.tolist(), finite))
    sums = [sum(column) for column in zip(*(part for part, _ in parts), strict=True)]
    n_windows, rest = divmod(tokens, T)
    by_position = [s / UNIT / (n_windows + (t < rest)) for t, s in enumerate(sums)]
    loss = sum(sums) / UNIT / tokens
    if not all(finite for _, finite in parts):
        loss, by_position = math.nan, [math.nan] * T
    return ValidationLoss(loss, tokens, n_bytes, by_position, {}, n_bytes / tokens)


def _inputs(stream: TokenStream, T: int, max_tokens: int | None, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield tokens and targets, (B, T) each; without ``max_tokens``, a shorter last window follows."""
    batches = Batches(stream, T, 1, seed=0, split="validation")
    windows = validation_windows(batches.n_windows, T, max_tokens)
    for start in range(0, len(windows), batch):
        yield batches.load(windows[start : start + batch])
    rest = (len(stream) - 1) % T
    if max_tokens is None and rest:
        tail = torch.from_numpy(stream.read(len(stream) - 1 - rest, rest + 1).astype(np.int64))[None]
        yield tail[:, :-1].contiguous(), tail[:, 1:].contiguous()


def token_losses(
    model: GPT | LanguageModel, tokens: Tensor, targets: Tensor, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Compute the cross-entropy of each target.

    Args:
        model: restomod model or `LanguageModel`.
        tokens: inputs, (B, T) int64.
        targets: next tokens, (B, T) int64.
        device: device of a restomod model.
        dtype: compute dtype of a restomod model.

    Returns:
        Losses in nats, (B, T) fp32, on the CPU.
    """
    if not isinstance(model, GPT):
        every = torch.arange(tokens.numel())
        log_probs, _ = model.predict(Batch(tokens, None, None, every, every, targets.flatten()))
        return -log_probs.view(targets.shape).cpu()
    with autocast(device, dtype):
        hidden = model.transformer.forward(tokens.to(device)).flatten(0, 1)  # (N, D)
    which = torch.arange(len(hidden), device=device)
    log_probs, _ = gpt_log_probs(model, hidden, which, targets.to(device).flatten(), dtype)
    return -log_probs.view(targets.shape).cpu()


def dataset_loss(
    model: GPT | LanguageModel,
    dataset: Dataset,
    sequence_length: int,
    device: torch.device,
    dtype: torch.dtype,
    max_tokens: int | None = None,
    batch: int | None = None,
    processes: Processes = SINGLE,
    tokenizer: Tokenizer | None = None,
) -> ValidationLoss | None:
    """Compute the validation loss of a dataset. For a mix, average the losses of its sources by share.

    The arguments are those of `validation_loss`. Each source of a mix gets its share of ``max_tokens``, at least one
    window.

    Returns:
        Validation loss; None if the dataset has no validation split.
    """
    sources = [source for source in dataset.sources if len(source.dataset.val)]
    if not sources:
        return None
    whole = sum(source.share for source in sources)
    shares = [float(source.share / whole) for source in sources]
    parts = []
    for source, share in zip(sources, shares, strict=True):
        limit = None if max_tokens is None else max(sequence_length, int(share * max_tokens))
        parts.append(
            validation_loss(
                model, source.dataset.val, sequence_length, device, dtype, limit, batch, processes, tokenizer
            )
        )

    def by_share(values: Iterable[float]) -> float:
        return sum(share * value for share, value in zip(shares, values, strict=True))

    return ValidationLoss(
        by_share(part.loss for part in parts),
        sum(part.tokens for part in parts),
        sum(part.bytes for part in parts),
        [by_share(losses) for losses in zip(*(part.by_position for part in parts), strict=True)],
        {s.name: part.loss for s, part in zip(sources, parts, strict=True)} if dataset.parts else {},
        by_share(part.bytes_per_token for part in parts),
    )
