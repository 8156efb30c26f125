"""Sampling of the next token: temperature, then top-k, then top-p, then one draw per row.

The caller passes one uniform random number per row, so that rows are independent of each other.

Shapes: B = rows, V = vocabulary size, C = candidate tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from restomod.config.run import SamplingConfig
from restomod.utils.errors import NOT_FINITE, UserError


def next_tokens(logits: Tensor, sampling: SamplingConfig, uniforms: Sequence[float]) -> Tensor:
    """Sample one token per row.

    Args:
        logits: logits, (B, V), on any device.
        sampling: sampling settings; temperature 0 selects the most likely token.
        uniforms: B random numbers in [0, 1), ignored at temperature 0.

    Returns:
        Token ids, (B,) int64, on the CPU.

    Raises:
        UserError: the largest logit of a row is not finite.
    """
    if not torch.isfinite(logits.amax(-1)).all():
        raise UserError(NOT_FINITE)
    if sampling.temperature == 0:
        return logits.argmax(-1).cpu()
    weights, ids = candidates(logits, sampling)
    return ids.gather(-1, _pick(weights, torch.tensor(uniforms, dtype=torch.float64))).squeeze(-1)


def candidates(logits: Tensor, sampling: SamplingConfig) -> tuple[Tensor, Tensor]:
    """Compute the probabilities of the candidate tokens.

    Top-k sampling: Fan et al., "Hierarchical Neural Story Generation", 2018, section 5.4. Top-p (nucleus) sampling:
    Holtzman et al., "The Curious Case of Neural Text Degeneration", 2020, section 3.1. It keeps the smallest set of
    most likely tokens whose total probability, after temperature and top-k, reaches p. The order of operations and the
    results are those of the logits warpers in `transformers`.

    Args:
        logits: logits, (B, V).
        sampling: sampling settings with a temperature above 0.

    Returns:
        Unnormalised probabilities, (B, C) float64, 0 for excluded tokens; token ids, (B, C) int64; both on the CPU.
    """
    logits = logits.float()
    if 0 < sampling.top_k < logits.shape[-1]:
        values, ids = _largest(logits, sampling.top_k)
    elif sampling.top_p < 1:
        values, ids = logits.sort(descending=True, stable=True)
    else:
        values, ids = logits, torch.arange(logits.shape[-1], device=logits.device).expand_as(logits)
    values, ids = values.cpu().double(), ids.cpu()  # some devices have no fp64
    best = values.amax(-1, keepdim=True)  # subtracted first, because dividing by a tiny temperature overflows
    weights = torch.softmax((values - best) / sampling.temperature, -1)
    if sampling.top_p < 1:
        likelier = weights.cumsum(-1) - weights  # total probability of all likelier tokens
        weights = weights.masked_fill(likelier >= sampling.top_p, 0.0)
    return weights, ids


def _largest(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest logits of each row and their ids, in descending order; ties with the k-th are kept."""
    values, ids = logits.topk(k)
    least = values[:, -1:]  # (B, 1)
    kept = int((logits >= least).sum(-1).max())
    if kept > k:  # ties are common in bf16, and topk breaks them differently on each device
        values, ids = logits.topk(kept)
        values = values.masked_fill(values < least, float("-inf"))
    return values, ids


def _pick(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Draw an index per row by inverting the cumulative sum of the weights.

    An index with weight 0 is never drawn: the cumulative sum does not increase there, and a 53-bit number below 1 times
    the total rounds to less than the total.

    Args:
        weights: unnormalised probabilities, (B, C) float64.
        uniforms: random numbers in [0, 1), (B,) float64.

    Returns:
        Indices, (B, 1) int64.
    """
    sums = weights.cumsum(-1)
    return torch.searchsorted(sums, uniforms[:, None] * sums[:, -1:], right=True)
