"""Log-likelihoods of continuations given contexts, the scoring interface of every task.

Requests with the same context share a row: the context, followed by all its continuations. An attention mask lets each
continuation attend to the context and to itself. Its position ids begin directly after the context. The context is
therefore computed once, and a multiple-choice question needs one row instead of one row per choice.

Tokenization (`encode_pair`) and truncation (`_fit`) follow lm-evaluation-harness 0.4 (EleutherAI).

Shapes: B = rows, T = tokens of the longest row, N = positions that predict a token, M = predicted tokens,
D = embedding width, V = vocabulary size.
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
    """Token ids of a context and of the continuation to score, both non-empty."""

    context: Tokens
    continuation: Tokens


@dataclass(frozen=True)
class Score:
    """Log-likelihood of a continuation."""

    log_likelihood: float
    """Sum over the tokens of the continuation, in nats."""
    greedy: bool
    """Whether greedy decoding would generate the continuation."""
    tokens: int
    """Length of the continuation in tokens."""
    truncated: bool
    """Whether the beginning of the context was cut to fit into the context length."""


@dataclass(frozen=True)
class Batch:
    """Input of one forward pass."""

    tokens: Tensor
    """Token ids, (B, T) int64, padded at the right."""
    positions: Tensor | None
    """Position ids, (B, T) int64; None: 0, 1, 2, … in every row."""
    mask: Tensor | None
    """Attention mask, (B, 1, T, T) bool; True where a query (third axis) attends to a key (last axis). None: causal."""
    at: Tensor
    """Positions that predict a token, (N,) int64, as indices into the flattened (B * T,) tokens."""
    which: Tensor
    """Index into ``at`` of the position that predicts each target, (M,) int64."""
    targets: Tensor
    """Tokens of all continuations, concatenated, (M,) int64."""


class LanguageModel(Protocol):
    """Interface of a model that can be scored."""

    max_length: int
    """Context length in tokens."""
    shares_contexts: bool
    """Whether the model accepts position ids and masks, so that continuations can share a row."""
    tokens_per_forward: int
    """Tokens per forward pass, chosen for speed."""
    prefix: int
    """Token that replaces an empty context."""

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text."""

    def predict(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Compute the log-probability of each target.

        Returns:
            Log-probabilities, (M,) fp32, and whether no other token is likelier than the target, (M,) bool.
        """


@dataclass(frozen=True)
class _Row:
    """Context and some of its continuations."""

    context: Tokens
    continuations: tuple[Tokens, ...]

    @property
    def length(self) -> int:
        """Number of input tokens. The last token of a continuation is only a target, not an input."""
        return len(self.context) + sum(len(c) - 1 for c in self.continuations)


def encode_pair(encode: Callable[[str], Sequence[int]], prefix: int, context: str, continuation: str) -> Request:
    """Encode a context and a continuation.

    Follows `_encode_pair` of lm-evaluation-harness. Spaces at the end of the context become part of the continuation.
    Both texts are encoded together and then split, so that the tokens are those of continuous text.

    Args:
        encode: tokenizer.
        prefix: token that replaces an empty context.
        context: text before the continuation, may be empty.
        continuation: text to score.

    Raises:
        UserError: the continuation is empty or adds no token to the context.
    """
    if not continuation:
        raise UserError("a continuation is empty; it needs text to score")
    if not context:
        tokens = tuple(map(int, encode(continuation)))
        return Request((prefix,), tokens) if tokens[0] != prefix else Request(tokens[:1], tokens[1:])
    kept = context.rstrip()
    before = tuple(map(int, encode(kept)))
    whole = tuple(map(int, encode(context + continuation)))
    if not before:  # the context is white space
        return Request((prefix,), whole)
    if len(whole) <= len(before):
        raise UserError(f"the continuation {continuation!r:.40} adds no token to its context; put a space before it")
    return Request(before, whole[len(before) :])


def log_likelihoods(
    model: LanguageModel, requests: Sequence[Request], batch: int | None = None, processes: Processes = SINGLE
) -> list[Score]:
    """Score every request. Equal requests are computed once.

    The result does not depend on the order of the requests or on the number of ranks, because batches are formed from
    the content of the requests. ``batch`` changes the rounding of matmuls only. All ranks must call this function.

    Args:
        model: model to evaluate.
        requests: contexts and continuations.
        batch: contexts per forward pass; None: about ``model.tokens_per_forward`` tokens.
        processes: ranks that share the work; all of them get the complete result.

    Raises:
        UserError: a continuation is longer than the context length.
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
    """Cut the beginning of the context if context and continuation together exceed ``max_length + 1`` tokens.

    One more token than the context length fits, because the last token is only a target.
    """
    room = max_length + 1 - len(request.continuation)
    if room < 1:
        raise UserError(
            f"a continuation of {len(request.continuation):,} tokens is longer than the model's context length of "
            f"{max_length:,}; shorten or remove it"
        )
    return request if len(request.context) <= room else Request(request.context[-room:], request.continuation)


def _rows(requests: Sequence[Request], model: LanguageModel) -> list[_Row]:
    """Group requests by context, longest row first; the order depends only on their content."""
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
    """Yield batches of consecutive rows, which have similar lengths."""
    start = 0
    while start < len(rows):
        stop = start + (batch or max(1, tokens_per_forward // rows[start].length))
        yield rows[start:stop]
        start = stop


@torch.no_grad()
def _score(model: LanguageModel, rows: list[_Row]) -> list[tuple[float, bool]]:
    """Return the log-likelihood of every continuation, and whether greedy decoding would generate it."""
    log_probs, best = model.predict(pack(rows))
    p, b = log_probs.cpu().double().tolist(), best.tolist()  # MPS has no fp64
    scores, start = [], 0
    for continuation in (c for row in rows for c in row.continuations):
        stop = start + len(continuation)
        scores.append((math.fsum(p[start:stop]), all(b[start:stop])))
        start = stop
    return scores


def pack(rows: Sequence[_Row]) -> Batch:
    """Pack rows into the tensors of one forward pass."""
    T = max(row.length for row in rows)
    tokens, positions, branches = [], [], []  # lists of rows, later (B, T)
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
    """Return the attention mask, (B, 1, T, T) bool: causal within the context and the token's own continuation.

    Args:
        branches: (B, T) int64: 0 in the context, k in the k-th continuation, `PADDING` after the last one.
    """
    T = branches.shape[1]
    key, query = branches[:, None, :], branches[:, :, None]
    return (((key == 0) | (key == query)) & torch.ones(T, T, dtype=torch.bool).tril())[:, None]


def gpt_log_probs(
    model: GPT, hidden: Tensor, which: Tensor, targets: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Compute log-probabilities of tokens from hidden states.

    Args:
        model: model whose lm_head and logit soft cap are used.
        hidden: hidden states, (N, D).
        which: row of ``hidden`` that predicts each target, (M,).
        targets: token ids, (M,).
        dtype: compute dtype of the lm_head.

    Returns:
        Log-probabilities, (M,) fp32, at most 0, and whether no other token is likelier than the target, (M,) bool.
    """
    config = model.config
    return linear_log_probs(hidden[which], model.head, targets, config.vocab_size, dtype, config.softcap)
