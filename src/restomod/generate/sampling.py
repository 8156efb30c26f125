"""Sampling of the next token: temperature, then top-k, then top-p, then one draw per row.

The caller gives one uniform number per row, so that no row depends on the others.

Shapes: B = rows, V = vocabulary, C = candidates that may be drawn.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from restomod.config.run import SamplingConfig
from restomod.utils.errors import NOT_FINITE, UserError


def next_tokens(logits: Tensor, sampling: SamplingConfig, uniforms: Sequence[float]) -> Tensor:
    """Draw one token per row.

    Args:
        logits: (B, V), on any device.
        sampling: at temperature 0 the likeliest token is taken; else see `candidates`.
        uniforms: B numbers in [0, 1); not used at temperature 0.

    Returns:
        (B,) int64 on the CPU.

    Raises:
        UserError: a row's largest logit is not finite.
    """
    if not torch.isfinite(logits.amax(-1)).all():
        raise UserError(NOT_FINITE)
    if sampling.temperature == 0:
        return logits.argmax(-1).cpu()
    weights, ids = candidates(logits, sampling)
    return ids.gather(-1, _pick(weights, torch.tensor(uniforms, dtype=torch.float64))).squeeze(-1)


def candidates(logits: Tensor, sampling: SamplingConfig) -> tuple[Tensor, Tensor]:
    """Weights of the tokens that may be drawn.

    Top-k: Fan et al., "Hierarchical Neural Story Generation", 2018, section 5.4. Top-p: Holtzman et al., "The Curious
    Case of Neural Text Degeneration", 2020, section 3.1: the smallest set of likeliest tokens whose mass, after
    temperature and top-k, reaches p. Order and results are those of `transformers`' logits warpers.

    The temperature is above 0. ``logits`` are (B, V).

    Returns:
        Weights (B, C) float64, 0 for what must not be drawn, and token ids (B, C) int64, both on the CPU.
    """
    logits = logits.float()
    if 0 < sampling.top_k < logits.shape[-1]:
        values, ids = _largest(logits, sampling.top_k)
    elif sampling.top_p < 1:
        values, ids = logits.sort(descending=True, stable=True)
    else:
        values, ids = logits, torch.arange(logits.shape[-1], device=logits.device).expand_as(logits)
    values, ids = values.cpu().double(), ids.cpu()  # few numbers; not all devices have fp64
    best = values.amax(-1, keepdim=True)  # subtracted first: dividing by a tiny temperature overflows
    weights = torch.softmax((values - best) / sampling.temperature, -1)
    if sampling.top_p < 1:
        likelier = weights.cumsum(-1) - weights  # the mass of all tokens before each
        weights = weights.masked_fill(likelier >= sampling.top_p, 0.0)
    return weights, ids


def _largest(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest logits of each row and their ids, in descending order; all that equal the k-th are kept."""
    values, ids = logits.topk(k)
    least = values[:, -1:]  # (B, 1)
    kept = int((logits >= least).sum(-1).max())
    if kept > k:  # in bf16 ties are common, and which of them topk returns depends on the device
        values, ids = logits.topk(kept)
        values = values.masked_fill(values < least, float("-inf"))
    return values, ids


def _pick(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Inverse of the cumulative weights (B, C) at ``uniforms`` (B,): an index per row, (B, 1) int64.

    A weight of 0 is never picked: the sum does not rise there, and a number below 1 with 53 bits, times the total, is
    rounded to less than the total.
    """
    sums = weights.cumsum(-1)
    return torch.searchsorted(sums, uniforms[:, None] * sums[:, -1:], right=True)
