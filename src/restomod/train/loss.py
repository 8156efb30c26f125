"""Cross-entropy straight from the hidden states: the logits of all positions never exist at once.

GPT-2's logits are 50,304 numbers per token, 65 times its hidden state. Here they are made, turned into loss and
gradient, and dropped again, about a thousand tokens at a time.

Shapes: N = tokens, n = tokens of one chunk, D = n_embd, V = vocabulary, padded V >= V.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK_TOKENS = 1024  # enough rows for fast matrix products; 100 MB of bf16 logits
CPU_SOFTMAX_TOKENS = 32  # fp32 rows that stay in a CPU's cache between the passes of a softmax


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, dtype: torch.dtype
) -> Tensor:
    """Mean cross-entropy of the next token, in nats.

    Args:
        hidden: (N, D) hidden states.
        weight: (padded V, D) output matrix; rows from ``vocab_size`` on take no part.
        targets: (N,) int64 token ids below ``vocab_size``.
        vocab_size: V.
        dtype: of the matrix products; the softmax and the sum over tokens are in fp32.

    Returns:
        Scalar fp32 loss, differentiable once with respect to ``hidden`` and ``weight``.
    """
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _LinearCrossEntropy.apply(hidden, weight, targets, vocab_size, dtype)
    return _loss(hidden, weight, targets, vocab_size, dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    """`linear_cross_entropy` with its gradient, which is computed along with it."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, V: int, dtype: torch.dtype) -> Tensor:
        d_hidden = torch.empty_like(hidden, dtype=dtype)
        d_weight = torch.zeros_like(weight, dtype=torch.float32)
        loss = _loss(hidden, weight, targets, V, dtype, d_hidden, d_weight)
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.dtypes = hidden.dtype, weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        hidden_dtype, weight_dtype = ctx.dtypes
        return (d_hidden * grad[0]).to(hidden_dtype), (d_weight * grad[0]).to(weight_dtype), None, None, None


def _loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    V: int,
    dtype: torch.dtype,
    d_hidden: Tensor | None = None,
    d_weight: Tensor | None = None,
) -> Tensor:
    """The loss; where they are given, ``d_hidden`` (N, D) is filled with its gradient and ``d_weight`` added to."""
    N = len(hidden)
    x, w = hidden.to(dtype), weight.to(dtype)
    target_logits = (hidden.float() * weight[targets].float()).sum(-1)  # (N,), exact where bf16 is not
    total = torch.zeros((), device=hidden.device)
    for start in range(0, N, CHUNK_TOKENS):
        chunk = slice(start, start + CHUNK_TOKENS)
        logits = x[chunk] @ w.t()  # (n, padded V)
        logits[:, V:] = float("-inf")
        total += _softmax_cross_entropy(logits, target_logits[chunk], targets[chunk], scale=1 / N)
        if d_hidden is not None and d_weight is not None:
            d_hidden[chunk] = logits @ w
            d_weight += logits.t() @ x[chunk]
    return total / N


def _softmax_cross_entropy(logits: Tensor, target_logits: Tensor, targets: Tensor, scale: float) -> Tensor:
    """Sum of the cross-entropies of ``logits`` (n, padded V); they are overwritten by ``scale`` times its gradient.

    The gradient with respect to the logits is softmax(logits) - one_hot(targets). ``target_logits`` (n,) replace the
    targets' own entries, which are rounded to the logits' type.
    """
    total = torch.zeros((), device=logits.device)
    rows = CPU_SOFTMAX_TOKENS if logits.device.type == "cpu" else len(logits)
    for start in range(0, len(logits), rows):
        block = slice(start, start + rows)
        y, target = targets[block, None], target_logits[block, None]  # (rows, 1)
        z = logits[block].float().scatter_(1, y, target)
        highest = z.amax(-1, keepdim=True)
        z.sub_(highest).exp_()
        norm = z.sum(-1, keepdim=True)
        total += (norm.log() + highest - target).sum()
        z.mul_(scale / norm).scatter_add_(1, y, torch.full_like(target, -scale))
        logits[block] = z
    return total
