"""Log-likelihoods of continuations given contexts: the one interface under every task.

Requests with the same context share a row: the context once, then its continuations side by side. A mask lets each
continuation attend to the context and itself; position ids are those it would have directly after the context. One
forward pass replaces a row per continuation, and the context is computed once.

The rules are those of lm-evaluation-harness 0.4 (EleutherAI): how text is split into the tokens of a context and of a
continuation (`encode_pair`), and what is cut away where the two are too long for the model (`_fit`).

Shapes: B = rows, T = tokens of the longest, N = positions that predict, M = predicted tokens, D = n_embd,
V = vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from restomod.engine.distributed import SINGLE, Processes
from restomod.engine.loss import linear_log_probs
from restomod.model.gpt import GPT
from restomod.utils.errors import UserError

PADDING = -1

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Request:
    """A context and a continuation to score, neither of them empty."""

    context: Tokens
    continuation: Tokens


@dataclass(frozen=True)
class Score:
    """Log-likelihood of a continuation."""

    log_likelihood: float
    """Nats, summed over the tokens of the continuation."""
    greedy: bool
    """Whether greedy decoding would generate the continuation."""
    tokens: int
    """Length of the continuation."""
    truncated: bool
    """Whether the beginning of the context was cut to fit into the model's window."""


@dataclass(frozen=True)
class Batch:
    """Rows that go through the model together."""

    tokens: Tensor
    """(B, T) int64, padded at the right."""
    positions: Tensor | None
    """(B, T) int64; None: 0, 1, 2, … in every row."""
    mask: Tensor | None
    """(B, 1, T, T) bool, which tokens (last) each token attends to; None: causal."""
    at: Tensor
    """(N,) int64, the positions that predict, counted through all rows."""
    which: Tensor
    """(M,) int64, index into ``at`` of the position that predicts each target."""
    targets: Tensor
    """(M,) int64, the tokens of all continuations, one continuation after the other."""


class LanguageModel(Protocol):
    """A model that can be scored."""

    max_length: int
    """Length of its window in tokens."""
    shares_contexts: bool
    """Whether it takes positions and masks, so that continuations can share a row."""
    tokens_per_forward: int
    """Tokens per forward pass, chosen for speed."""
    prefix: int
    """The token that stands for an empty context."""

    def encode(self, text: str) -> list[int]:
        """Encode a text."""

    def predict(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Log-probability, (M,) fp32, of each target, and whether no other token was likelier, (M,) bool."""


@dataclass(frozen=True)
class _Row:
    """A context and some of its continuations."""

    context: Tokens
    continuations: tuple[Tokens, ...]

    @property
    def length(self) -> int:
        """Tokens that go through the model: the last one of a continuation predicts nothing."""
        return len(self.context) + sum(len(c) - 1 for c in self.continuations)


def encode_pair(encode: Callable[[str], Sequence[int]], prefix: int, context: str, continuation: str) -> Request:
    """Encode a context and a continuation, split where the context ends.

    As in lm-evaluation-harness's `_encode_pair`: spaces at the end of the context belong to the continuation; both are
    encoded together, so that the boundary is the one that running text has; an empty context is the token ``prefix``.

    Raises:
        UserError: the continuation is empty, or the context's last token swallows it.
    """
    if not continuation:
        raise UserError("a continuation is empty: there is nothing to score")
    if not context:
        tokens = tuple(map(int, encode(continuation)))
        return Request((prefix,), tokens) if tokens[0] != prefix else Request(tokens[:1], tokens[1:])
    kept = context.rstrip()
    before = tuple(map(int, encode(kept)))
    whole = tuple(map(int, encode(context + continuation)))
    if not before:  # of white space alone
        return Request((prefix,), whole)
    if len(whole) <= len(before):
        raise UserError(f"the continuation {continuation!r:.40} adds no token to its context; put a space before it")
    return Request(before, whole[len(before) :])


def log_likelihoods(
    model: LanguageModel, requests: Sequence[Request], batch: int | None = None, processes: Processes = SINGLE
) -> list[Score]:
    """Score every request.

    The result depends on neither the order of the requests nor the number of processes, and on ``batch`` only by the
    rounding of matmuls: which requests share a batch follows from their content alone.

    Equal requests are computed once. ``batch`` is in contexts per forward pass; None: about
    ``model.tokens_per_forward`` tokens. All processes call this, share the work and get the same result.

    Raises:
        UserError: a continuation alone is longer than the model's window.
    """
    fitted = [_fit(request, model.max_length) for request in requests]
    batches = list(_batches(_rows(fitted, model), batch, model.tokens_per_forward))
    mine = [_score(model, rows) for rows in batches[processes.rank :: processes.world_size]]
    parts = processes.gather(mine)
    found: dict[Request, tuple[float, bool]] = {}
    for i, rows in enumerate(batches):
        answered = iter(parts[i % processes.world_size][i // processes.world_size])
        for row in rows:
            found |= {Request(row.context, continuation): next(answered) for continuation in row.continuations}
    return [
        Score(*found[fit], len(fit.continuation), truncated=fit.context != request.context)
        for fit, request in zip(fitted, requests, strict=True)
    ]


def _fit(request: Request, max_length: int) -> Request:
    """Cut the beginning of the context where both together exceed the window by more than one token.

    The last token is predicted and not read, so one more than the window fits.
    """
    room = max_length + 1 - len(request.continuation)
    if room < 1:
        raise UserError(
            f"a continuation of {len(request.continuation):,} tokens is longer than the model's window of "
            f"{max_length:,}; shorten it, or leave it out"
        )
    return request if len(request.context) <= room else Request(request.context[-room:], request.continuation)


def _rows(requests: Sequence[Request], model: LanguageModel) -> list[_Row]:
    """Group requests by context, longest row first, in an order that depends on their content only."""
    by_context: dict[Tokens, set[Tokens]] = {}
    for request in requests:
        by_context.setdefault(request.context, set()).add(request.continuation)
    rows = []
    for context, continuations in by_context.items():
        part: list[Tokens] = []
        for continuation in sorted(continuations):
            grown = _Row(context, (*part, continuation))
            if part and (not model.shares_contexts or grown.length > 2 * model.max_length):
                rows.append(_Row(context, tuple(part)))
                part = []
            part.append(continuation)
        rows.append(_Row(context, tuple(part)))
    return sorted(rows, key=lambda row: (-row.length, row.context, row.continuations))


def _batches(rows: list[_Row], batch: int | None, tokens_per_forward: int) -> Iterator[list[_Row]]:
    """Batches of neighbouring rows, which have similar lengths."""
    start = 0
    while start < len(rows):
        stop = start + (batch or max(1, tokens_per_forward // rows[start].length))
        yield rows[start:stop]
        start = stop


@torch.no_grad()
def _score(model: LanguageModel, rows: list[_Row]) -> list[tuple[float, bool]]:
    """Log-likelihood and greediness of every continuation of some rows."""
    log_probs, best = model.predict(pack(rows))
    p, b = log_probs.cpu().double().tolist(), best.tolist()  # MPS has no fp64
    scores, start = [], 0
    for continuation in (c for row in rows for c in row.continuations):
        stop = start + len(continuation)
        scores.append((math.fsum(p[start:stop]), all(b[start:stop])))
        start = stop
    return scores


def pack(rows: Sequence[_Row]) -> Batch:
    """Pack rows into tensors."""
    T = max(row.length for row in rows)
    tokens, positions, branches = [], [], []  # a row each, later (B, T)
    at: list[int] = []
    which: list[int] = []
    targets: list[int] = []
    for b, row in enumerate(rows):
        ids, position, branch = list(row.context), list(range(len(row.context))), [0] * len(row.context)
        after_context = len(at)
        at.append(b * T + len(row.context) - 1)
        for k, continuation in enumerate(row.continuations, 1):
            read = continuation[:-1]
            which += [after_context, *range(len(at), len(at) + len(read))]
            at += range(b * T + len(ids), b * T + len(ids) + len(read))
            targets += continuation
            ids += read
            position += range(len(row.context), len(row.context) + len(read))
            branch += [k] * len(read)
        rest = T - len(ids)
        tokens.append(ids + [0] * rest)
        positions.append(position + [0] * rest)
        branches.append(branch + [PADDING] * rest)
    plain = all(len(row.continuations) == 1 for row in rows)
    return Batch(
        torch.tensor(tokens),
        None if plain else torch.tensor(positions),
        None if plain else _mask(torch.tensor(branches)),
        torch.tensor(at),
        torch.tensor(which),
        torch.tensor(targets),
    )


def _mask(branches: Tensor) -> Tensor:
    """Attention mask, (B, 1, T, T) bool: each token attends to earlier tokens of the context and of its own branch.

    Args:
        branches: (B, T): 0 in the context, k in its k-th continuation, `PADDING` behind.
    """
    T = branches.shape[1]
    key, query = branches[:, None, :], branches[:, :, None]
    return (((key == 0) | (key == query)) & torch.ones(T, T, dtype=torch.bool).tril())[:, None]


def gpt_log_probs(
    model: GPT, hidden: Tensor, which: Tensor, targets: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of tokens from the hidden states that predict them.

    Takes ``hidden`` (N, D) and, of each target, its index ``which`` (M,). Returns (M,) fp32, at most 0, and whether no
    other token was likelier, (M,) bool.
    """
    config = model.config
    return linear_log_probs(hidden[which], model.head, targets, config.vocab_size, dtype, config.softcap)
