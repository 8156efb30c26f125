"""Chunked cross-entropy from hidden states, for training and scoring: the logits of all positions never exist at once.

GPT-2's logits are 50,304 numbers per token, 65 times its hidden state. Here they are computed, turned into loss and
gradient (or into log-probabilities), and freed again, a chunk of some thousand tokens at a time.

Shapes: N = tokens, n = tokens of one chunk, D = n_embd, V = vocabulary, padded V >= V.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from restomod.engine.device import CHUNK_TOKENS, SOFTMAX_TOKENS, tokens_on
from restomod.model.gpt import soft_cap

# Gradients are kept at this multiple of those of the summed loss: fp16's range is 6e-8 to 65504. A power of two changes
# no bit in the other dtypes.
GRADIENT_SCALE = 2.0**-5


@dataclass
class HeadGradient:
    """Gradient of the output matrix, summed over the micro-batches of one step before autograd is given it.

    Autograd would zero, scale and add a tensor of the matrix's size (154 MB for GPT-2 124M) for every micro-batch. All
    micro-batches must have equally many tokens, and their losses the same weight.
    """

    last: bool = False
    """Whether the next micro-batch is the last one of the step, whose backward pass yields the sum."""
    total: Tensor | None = None
    """(padded V, D) fp32, of the micro-batches so far."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int,
    dtype: torch.dtype,
    compiled: bool = False,
    cap: float | None = None,
    chunk: int | None = None,
    head_gradient: HeadGradient | None = None,
) -> Tensor:
    """Mean cross-entropy of the next token, in nats.

    Args:
        hidden: (N, D) hidden states.
        weight: (padded V, D) output matrix; rows from ``vocab_size`` on are ignored.
        targets: (N,) int64 token ids below ``vocab_size``.
        vocab_size: V.
        dtype: compute dtype of the matmuls; the softmax and the sum over tokens are in fp32.
        compiled: compile the softmax, which is several times as fast.
        cap: logits z become cap * tanh(z / cap).
        chunk: n, tokens whose logits exist at once; None: what is fast on this kind of device.
        head_gradient: sums the gradient of ``weight`` over the micro-batches of a step; None: each yields its own.

    Returns:
        Scalar fp32 loss, differentiable once with respect to ``hidden`` and ``weight``.
    """
    if not (torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)):
        return -linear_log_probs(hidden, weight, targets, vocab_size, dtype, cap, chunk)[0].mean()
    softmax = _compiled_softmax() if compiled else _softmax_by_rows
    n = chunk or tokens_on(hidden.device, CHUNK_TOKENS)
    return _LinearCrossEntropy.apply(hidden, weight, targets, vocab_size, dtype, softmax, cap, n, head_gradient)


@torch.no_grad()
def linear_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int,
    dtype: torch.dtype,
    cap: float | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of every target, and whether it is the likeliest token. Arguments as `linear_cross_entropy`.

    Returns:
        (N,) fp32, at most 0; and (N,) bool, whether no other token has a higher logit.
    """
    x, w, target_logits = _operands(hidden, weight, targets, dtype)
    return log_probs_of(lambda part: x[part] @ w.t(), targets, target_logits, vocab_size, cap, chunk)


def log_probs_of(
    logits_of: Callable[[slice], Tensor],
    targets: Tensor,
    target_logits: Tensor | None = None,
    vocab_size: int | None = None,
    cap: float | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of tokens from logits that are computed chunk by chunk.

    Args:
        logits_of: returns the logits, (n, padded V), that predict a slice of the targets; they are overwritten.
        targets: (N,).
        target_logits: (N,) fp32, replace the targets' entries in ``logits_of``, which 16 bits have rounded.
        vocab_size: V; None: there is no padding.
        cap: logits z become cap * tanh(z / cap).
        chunk: n; None: what is fast on this kind of device.

    Returns:
        As `linear_log_probs`.
    """
    kind = targets.device.type
    n = chunk or tokens_on(targets.device, CHUNK_TOKENS)
    log_probs = torch.empty(len(targets), device=targets.device)
    best = torch.empty(len(targets), dtype=torch.bool, device=targets.device)
    for start in range(0, len(targets), n):
        logits = logits_of(slice(start, start + n))
        V = vocab_size or logits.shape[1]
        logits[:, V:] = float("-inf")
        for first in range(0, len(logits), SOFTMAX_TOKENS[kind]):
            z = logits[first : first + SOFTMAX_TOKENS[kind]].float()
            rows = slice(start + first, start + first + len(z))
            y = targets[rows, None]
            rounded = z.gather(1, y)
            best[rows] = (rounded >= z.amax(-1, keepdim=True)).squeeze(1)
            target = rounded if target_logits is None else target_logits[rows, None]
            losses, *_ = _cross_entropies_(z, y, target, V, cap)
            log_probs[rows] = (0.0 - losses).squeeze(1)  # not -0.0
    return log_probs, best


def _operands(hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states and output matrix in the compute dtype, and the targets' logits, (N,) in fp32."""
    return hidden.to(dtype), weight.to(dtype), (hidden.float() * weight[targets].float()).sum(-1)


Softmax = Callable[[Tensor, Tensor, Tensor, int, float | None], tuple[Tensor, Tensor]]


class _LinearCrossEntropy(torch.autograd.Function):
    """`linear_cross_entropy` with its gradient, which is computed along with it."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        vocab_size: int,
        dtype: torch.dtype,
        softmax: Softmax,
        cap: float | None,
        n: int,
        head_gradient: HeadGradient | None,
    ) -> Tensor:
        d_hidden = torch.empty_like(hidden, dtype=dtype)
        so_far = None if head_gradient is None else head_gradient.total
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if so_far is None else so_far
        x, w, target_logits = _operands(hidden, weight, targets, dtype)
        total = torch.zeros((), device=hidden.device)
        for start in range(0, len(hidden), n):
            chunk = slice(start, start + n)
            loss, d_logits = softmax(x[chunk] @ w.t(), target_logits[chunk], targets[chunk], vocab_size, cap)
            total += loss
            torch.mm(d_logits, w, out=d_hidden[chunk])
            add_matmul(d_weight, d_logits.t(), x[chunk])
        later = head_gradient is not None and not head_gradient.last
        if head_gradient is not None:
            head_gradient.total = d_weight if later else None
        ctx.save_for_backward(d_hidden, None if later else d_weight)
        ctx.dtypes = hidden.dtype, weight.dtype
        return total / len(hidden)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        hidden_dtype, weight_dtype = ctx.dtypes
        scale = grad[0] / (GRADIENT_SCALE * len(d_hidden))
        # in place: the loss can be differentiated once
        d_weight = None if d_weight is None else d_weight.to(weight_dtype).mul_(scale)
        return d_hidden.to(hidden_dtype).mul_(scale), d_weight, *(None,) * 7


def add_matmul(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Total += a @ b, summed in fp32.

    Args:
        total: (V, D) fp32.
        a, b: (V, n) and (n, D). On CUDA in bf16 or fp16 the sum is made within the matmul, without rounding in between;
            elsewhere torch has no such operation, and a @ b is rounded to their dtype first.
    """
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b


def _softmax(
    logits: Tensor, target_logits: Tensor, targets: Tensor, V: int, cap: float | None
) -> tuple[Tensor, Tensor]:
    """Sum of the cross-entropies of ``logits``, (n, padded V), and its gradient times `GRADIENT_SCALE`, to be compiled.

    The gradient with respect to the logits is softmax(logits) - one_hot(targets). ``target_logits``, (n,), replace the
    targets' own entries, which are rounded to the dtype of the logits.
    """
    columns = torch.arange(logits.shape[1], device=logits.device)
    hit = columns == targets[:, None]
    z = torch.where(hit, target_logits[:, None], logits.float())
    slope = torch.ones((), device=z.device)
    if cap is not None:
        bent = torch.tanh(z / cap)
        z, slope = cap * bent, 1 - bent.square()
        target_logits = soft_cap(target_logits, cap)
    z = torch.where(columns < V, z, float("-inf"))
    largest = z.amax(-1, keepdim=True)
    exponentials = (z - largest).exp()
    norm = exponentials.sum(-1, keepdim=True)
    loss = (norm.log() + largest - target_logits[:, None]).sum()
    return loss, ((exponentials / norm - hit.float()) * slope * GRADIENT_SCALE).to(logits.dtype)


@functools.cache
def _compiled_softmax() -> Softmax:
    return torch.compile(_softmax, dynamic=False)


def _softmax_by_rows(
    logits: Tensor, target_logits: Tensor, targets: Tensor, V: int, cap: float | None
) -> tuple[Tensor, Tensor]:
    """`_softmax` a few rows at a time and in place, the fastest way without a compiler."""
    total = torch.zeros((), device=logits.device)
    logits[:, V:] = float("-inf")
    for start in range(0, len(logits), SOFTMAX_TOKENS[logits.device.type]):
        rows = slice(start, start + SOFTMAX_TOKENS[logits.device.type])
        y, target = targets[rows, None], target_logits[rows, None]  # (n, 1)
        losses, z, norm, bent = _cross_entropies_(logits[rows].float(), y, target, V, cap)
        total += losses.sum()
        z.mul_(GRADIENT_SCALE / norm).scatter_add_(1, y, torch.full_like(target, -GRADIENT_SCALE))
        logits[rows] = z if bent is None else z.mul_(1 - bent.square())
    return total, logits


def _cross_entropies_(
    z: Tensor, y: Tensor, target: Tensor, V: int, cap: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Cross-entropy of each row of logits, which are overwritten.

    Args:
        z: (n, padded V) fp32, -inf from V on.
        y: (n, 1) int64, the targets.
        target: (n, 1) fp32, their logits, which replace those in ``z``: with a logit in the sum that is rounded
            otherwise, a loss could be below 0.
        V: vocabulary.
        cap: logits z become cap * tanh(z / cap).

    Returns:
        (n, 1) losses, at least 0; (n, padded V) exp(z - its maximum); their (n, 1) sums; tanh(z / cap) where capped.
    """
    z, bent = z.scatter_(1, y, target), None
    if cap is not None:
        bent = z.div_(cap).tanh_()
        z, target = cap * bent, soft_cap(target, cap)
        z[:, V:] = float("-inf")
    largest = z.amax(-1, keepdim=True)
    norm = z.sub_(largest).exp_().sum(-1, keepdim=True)
    return norm.log() + largest - target, z, norm, bent
