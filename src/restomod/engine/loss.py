"""Cross-entropy straight from the hidden states: the logits of all positions never exist at once.

GPT-2's logits are 50,304 numbers per token, 65 times its hidden state. Here they are made, turned into loss and
gradient, and dropped again, some thousand tokens at a time.

Shapes: N = tokens, n = tokens of one chunk, D = n_embd, V = vocabulary, padded V >= V.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from restomod.engine.chunk_sizes import CHUNK_TOKENS, SOFTMAX_TOKENS
from restomod.model.gpt import soft_cap

# Gradients are kept at this multiple of those of the summed loss, in which even fp16 holds them: it ends at 65504, and
# at 6e-8. A power of two changes no bit of the others.
GRADIENT_SCALE = 2.0**-5


@dataclass
class HeadGradient:
    """The output matrix's gradient, summed over the micro-batches of one step before autograd is given it.

    Autograd would zero, scale and add a tensor of the matrix's size (154 MB for GPT-2 124M) for every micro-batch. All
    micro-batches have to have equally many tokens, and their losses the same weight.
    """

    last: bool = False
    """Whether the next micro-batch is the step's last one, whose backward pass yields the sum."""
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
        weight: (padded V, D) output matrix; rows from ``vocab_size`` on take no part.
        targets: (N,) int64 token ids below ``vocab_size``.
        vocab_size: V.
        dtype: of the matrix products; the softmax and the sum over tokens are in fp32.
        compiled: compile the softmax, which is several times as fast.
        cap: logits z become cap * tanh(z / cap).
        chunk: n, tokens whose logits exist at once; None: what is fast on this kind of device.
        head_gradient: sums the gradient of ``weight`` over the micro-batches of a step; None: each yields its own.

    Returns:
        Scalar fp32 loss, differentiable once with respect to ``hidden`` and ``weight``.
    """
    settings = _Settings(vocab_size, dtype, compiled, cap, chunk or CHUNK_TOKENS[hidden.device.type])
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _LinearCrossEntropy.apply(hidden, weight, targets, settings, head_gradient)
    return _loss(hidden, weight, targets, settings)


@dataclass(frozen=True)
class _Settings:
    """The settings of `linear_cross_entropy`, which says what they mean."""

    vocab_size: int
    dtype: torch.dtype
    compiled: bool
    cap: float | None
    chunk: int


class _LinearCrossEntropy(torch.autograd.Function):
    """`linear_cross_entropy` with its gradient, which is computed along with it."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        settings: _Settings,
        head_gradient: HeadGradient | None,
    ) -> Tensor:
        d_hidden = torch.empty_like(hidden, dtype=settings.dtype)
        so_far = None if head_gradient is None else head_gradient.total
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if so_far is None else so_far
        loss = _loss(hidden, weight, targets, settings, d_hidden, d_weight)
        later = head_gradient is not None and not head_gradient.last
        if head_gradient is not None:
            head_gradient.total = d_weight if later else None
        ctx.save_for_backward(d_hidden, None if later else d_weight)
        ctx.dtypes = hidden.dtype, weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        hidden_dtype, weight_dtype = ctx.dtypes
        scale = grad[0] / (GRADIENT_SCALE * len(d_hidden))
        # in place: the loss can be differentiated once
        d_weight = None if d_weight is None else d_weight.to(weight_dtype).mul_(scale)
        return d_hidden.to(hidden_dtype).mul_(scale), d_weight, None, None, None


def _loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    settings: _Settings,
    d_hidden: Tensor | None = None,
    d_weight: Tensor | None = None,
) -> Tensor:
    """The mean loss.

    Where they are given, ``d_hidden`` (N, D) is filled with the gradient of the summed loss times `GRADIENT_SCALE`, and
    that of ``d_weight`` is added to it.
    """
    N, n = len(hidden), settings.chunk
    softmax = _compiled_softmax() if settings.compiled else _softmax_by_rows
    x, w = hidden.to(settings.dtype), weight.to(settings.dtype)
    target_logits = (hidden.float() * weight[targets].float()).sum(-1)  # (N,), exact where bf16 is not
    total = torch.zeros((), device=hidden.device)
    for start in range(0, N, n):
        chunk = slice(start, start + n)
        loss, d_logits = softmax(
            x[chunk] @ w.t(), target_logits[chunk], targets[chunk], settings.vocab_size, settings.cap
        )
        total += loss
        if d_hidden is not None and d_weight is not None:
            torch.mm(d_logits, w, out=d_hidden[chunk])
            add_product(d_weight, d_logits.t(), x[chunk])
    return total / N


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, summed in fp32.

    Args:
        total: (V, D) fp32.
        a, b: (V, n) and (n, D). On CUDA in bf16 or fp16 the sum is made inside the product, where nothing is rounded in
            between; elsewhere torch has no such product, and a @ b is rounded to their dtype first.
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
    """Sum of the cross-entropies of ``logits`` (n, padded V), and its gradient times `GRADIENT_SCALE`, likewise.

    The gradient with respect to the logits is softmax(logits) - one_hot(targets). ``target_logits`` (n,) replace the
    targets' own entries, which are rounded to the logits' type.
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
    highest = z.amax(-1, keepdim=True)
    exponentials = (z - highest).exp()
    norm = exponentials.sum(-1, keepdim=True)
    loss = (norm.log() + highest - target_logits[:, None]).sum()
    return loss, ((exponentials / norm - hit.float()) * slope * GRADIENT_SCALE).to(logits.dtype)


def cross_entropies_(z: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy of each row of logits; in place, ``z`` becomes exp(z - its largest number).

    Args:
        z: (n, V) fp32. The targets' entries are those of ``target``: with another, more or less rounded logit in the
            sum, a loss could be below 0.
        target: (n, 1) fp32, the targets' logits.

    Returns:
        (n, 1) fp32 each: the losses, at least 0, the sums of what ``z`` has become, and its largest numbers before.
    """
    highest = z.amax(-1, keepdim=True)
    norm = z.sub_(highest).exp_().sum(-1, keepdim=True)
    return norm.log() + highest - target, norm, highest


@functools.cache
def _compiled_softmax() -> Callable[[Tensor, Tensor, Tensor, int, float | None], tuple[Tensor, Tensor]]:
    return torch.compile(_softmax, dynamic=False)


def _softmax_by_rows(
    logits: Tensor, target_logits: Tensor, targets: Tensor, V: int, cap: float | None
) -> tuple[Tensor, Tensor]:
    """`_softmax` a few rows at a time and in place, the fastest way without a compiler."""
    total = torch.zeros((), device=logits.device)
    logits[:, V:] = float("-inf")
    rows, columns = SOFTMAX_TOKENS[logits.device.type], torch.arange(logits.shape[1], device=logits.device)
    for start in range(0, len(logits), rows):
        block = slice(start, start + rows)
        y, target = targets[block, None], target_logits[block, None]  # (rows, 1)
        z = logits[block].float().scatter_(1, y, target)
        slope = None
        if cap is not None:
            bent = z.div_(cap).tanh_()  # of the padding 1, which is made -inf again
            slope = 1 - bent.square()
            z = (cap * bent).masked_fill_(columns >= V, float("-inf"))
            target = soft_cap(target, cap)
        losses, norm, _ = cross_entropies_(z, target)
        total += losses.sum()
        z.mul_(GRADIENT_SCALE / norm).scatter_add_(1, y, torch.full_like(target, -GRADIENT_SCALE))
        logits[block] = z if slope is None else z.mul_(slope)
    return total, logits
