"""Chunked cross-entropy from hidden states, for training and scoring, which never stores the logits of all positions.

GPT-2 has 50,304 logits per token, 65 times the size of a hidden state. They are computed in chunks of some thousand
tokens. Each chunk is reduced to a loss and gradients (or to log-probabilities) and freed before the next.

Shapes: N = tokens of a micro-batch (B T), n = tokens of one chunk, D = n_embd, V = vocab_size, padded V >= V.

Source of the gradient within the forward pass: Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models",
2024; Hsu et al., "Liger Kernel: Efficient Triton Kernels for LLM Training", 2024.
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

GRADIENT_SCALE = 2.0**-5
"""Factor of the gradients before the backward pass, which keeps those of the summed loss in the range of fp16, 6e-8 to
65504. A power of two changes no bit in other dtypes."""


@dataclass
class HeadGradient:
    """Gradient of lm_head, summed over the micro-batches of one step (gradient accumulation).

    Autograd would allocate, scale and add a tensor of lm_head's size (154 MB for GPT-2 124M) for every micro-batch.
    Here the backward pass of the last micro-batch returns the sum. All micro-batches of a step must have the same
    number of tokens and the same weight in the loss.
    """

    last: bool = False
    """Whether the next micro-batch is the last one of the step."""
    total: Tensor | None = None
    """Sum over the micro-batches so far, (padded V, D) fp32; None before the first one."""


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
    """Compute the mean cross-entropy of the next token, in nats.

    Args:
        hidden: hidden states, (N, D).
        weight: weight of lm_head, (padded V, D). Rows from ``vocab_size`` on are ignored.
        targets: token ids, (N,) int64, below ``vocab_size``.
        vocab_size: V.
        dtype: compute dtype of matmuls. The softmax and the sum over tokens are fp32.
        compiled: use torch.compile for the softmax, which is several times as fast.
        cap: logit soft cap; None: no cap.
        chunk: n, tokens per chunk; None: a fast value for the device type.
        head_gradient: accumulator of the gradient of ``weight`` over the micro-batches of a step; None: every backward
            pass returns the gradient of its micro-batch.

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
    """Compute the log-probability of every target, and whether the target is the most likely token.

    Arguments are those of `linear_cross_entropy`.

    Returns:
        Log-probabilities in nats, (N,) fp32, at most 0; and (N,) bool, True where no token has a higher logit.
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
    """Compute the log-probabilities of targets from logits that a function returns chunk by chunk.

    Args:
        logits_of: function that returns the logits, (n, padded V), for a slice of the targets. They are overwritten.
        targets: token ids, (N,) int64.
        target_logits: logits of the targets, (N,) fp32, which replace the 16-bit ones of ``logits_of``; None: those of
            ``logits_of``.
        vocab_size: V; None: there is no padding.
        cap: logit soft cap; None: no cap.
        chunk: n, tokens per chunk; None: a fast value for the device type.

    Returns:
        Log-probabilities in nats, (N,) fp32, at most 0; and (N,) bool, True where no token has a higher logit.
    """
    kind = targets.device.type
    n = chunk or tokens_on(targets.device, CHUNK_TOKENS)
    log_probs = torch.empty(len(targets), device=targets.device)
    best = torch.empty(len(targets), dtype=torch.bool, device=targets.device)
    for start in range(0, len(targets), n):
        logits = logits_of(slice(start, start + n))  # (n, padded V)
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
            log_probs[rows] = (0.0 - losses).squeeze(1)  # `-losses` would give -0.0
    return log_probs, best


def _operands(hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden states and lm_head in the compute dtype, and the uncapped logits of the targets, (N,) fp32."""
    return hidden.to(dtype), weight.to(dtype), (hidden.float() * weight[targets].float()).sum(-1)


Softmax = Callable[[Tensor, Tensor, Tensor, int, float | None], tuple[Tensor, Tensor]]
"""Function with the arguments and results of `_softmax`."""


class _LinearCrossEntropy(torch.autograd.Function):
    """Autograd function of `linear_cross_entropy`; the forward pass also computes the gradients, chunk by chunk."""

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
        d_hidden = torch.empty_like(hidden, dtype=dtype)  # (N, D)
        so_far = None if head_gradient is None else head_gradient.total
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if so_far is None else so_far  # (padded V, D)
        x, w, target_logits = _operands(hidden, weight, targets, dtype)
        total = torch.zeros((), device=hidden.device)
        for start in range(0, len(hidden), n):
            chunk = slice(start, start + n)
            # x @ w.t(), d_logits: (n, padded V)
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
        # in place, which is safe because the loss is differentiated only once
        d_weight = None if d_weight is None else d_weight.to(weight_dtype).mul_(scale)
        return d_hidden.to(hidden_dtype).mul_(scale), d_weight, *(None,) * 7


def add_matmul(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a matrix product to a tensor in place: total += a @ b, summed in fp32.

    On CUDA a 16-bit matmul accumulates into the fp32 total without rounding in between. Other devices lack this
    operation, and round a @ b to 16 bits first.

    Args:
        total: (V, D) fp32.
        a, b: (V, n) and (n, D), of the same dtype.
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
    """Compute the summed cross-entropy of one chunk and its gradient; written for torch.compile.

    The gradient with respect to the logits is softmax(logits) - one_hot(targets).

    Args:
        logits: (n, padded V) in the compute dtype.
        target_logits: logits of the targets, (n,) fp32, which replace their rounded entries in ``logits``.
        targets: token ids, (n,) int64.
        V: vocabulary size.
        cap: logit soft cap; None: no cap.

    Returns:
        Sum over the chunk, scalar fp32; and its gradient times `GRADIENT_SCALE`, (n, padded V) in the compute dtype.
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
    """Compute `_softmax` in place and a few rows at a time, the fastest way without torch.compile."""
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
    """Compute the cross-entropy of each row of logits, and overwrite the logits.

    Args:
        z: logits, (n, padded V) fp32, -inf in the padding columns.
        y: targets, (n, 1) int64.
        target: logits of the targets, (n, 1) fp32. They replace those in ``z``, because a loss could be negative if the
            two were rounded differently.
        V: vocabulary size.
        cap: logit soft cap; None: no cap.

    Returns:
        Losses in nats, (n, 1), at least 0; exp(z - max(z)), (n, padded V); its sums, (n, 1); tanh(z / cap), or None
        without a cap.
    """
    z, bent = z.scatter_(1, y, target), None
    if cap is not None:
        bent = z.div_(cap).tanh_()
        z, target = cap * bent, soft_cap(target, cap)
        z[:, V:] = float("-inf")
    largest = z.amax(-1, keepdim=True)
    norm = z.sub_(largest).exp_().sum(-1, keepdim=True)
    return norm.log() + largest - target, z, norm, bent
