"""Scaled dot-product attention, and which of torch's attention backends may compute it on CUDA.

torch chooses among four backends by itself, cuDNN first on Hopper since release 2.11. cuDNN is fast where shapes stay
the same, as in training. It has two faults that rule it out elsewhere: it builds a plan for every new (batch, keys)
shape, which a growing key/value cache would pay for at every token; and its backward pass with a mask returns NaN for
some lengths (pytorch issue 196678, cuDNN as shipped with torch 2.11 to 2.14).

Shapes: B = sequences, H = n_head, T = queries, S = keys, K = head_size.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

PLAIN_ATTENTION_TOKENS = 256
"""Up to this length attention in half precision on a CPU is computed by plain matmuls, because the backward pass of
torch's fused kernel takes two to four times as long."""

Use = Literal["training", "masked training", "scoring", "decoding"]

CUDNN, FLASH = SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION
EFFICIENT, MATH = SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH
ALL = [CUDNN, FLASH, EFFICIENT, MATH]
BACKENDS: dict[Use, list[SDPBackend]] = {
    "training": ALL,
    "masked training": [EFFICIENT, MATH],  # flash takes no mask
    "scoring": [FLASH, EFFICIENT, MATH],
    "decoding": [FLASH, EFFICIENT, MATH],
}
"""Backends allowed on CUDA. torch takes the first in its own order that supports the inputs."""


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ / sqrt(K)) v, (B, H, T, K).

    Args:
        q: (B, H, T, K).
        k, v: (B, H, S, K).
        causal: each query attends to its own position and those before it; T = S then, and ``mask`` is None.
        mask: (B or 1, 1 or H, T, S) bool, True where a query attends to a key.
    """
    T, K = q.shape[-2:]
    if causal and q.device.type == "cpu" and q.dtype.itemsize == 2 and T <= PLAIN_ATTENTION_TOKENS:
        later = torch.ones(T, T, dtype=torch.bool).triu(1)
        scores = (q * K**-0.5) @ k.mT  # (B, H, T, T)
        return torch.softmax(scores.masked_fill(later, float("-inf")), -1) @ v
    allowed = allowed_backends(q, mask)
    if allowed is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    with sdpa_kernel(allowed):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)


def allowed_backends(q: Tensor, mask: Tensor | None) -> list[SDPBackend] | None:
    """Return the backends that torch may choose from; None for all.

    Queries (B, H, T, K) with gradients are training, a single one without is decoding, all else is scoring.
    """
    if not q.is_cuda:
        return None
    if torch.is_grad_enabled():
        allowed = BACKENDS["training" if mask is None else "masked training"]
    else:
        allowed = BACKENDS["decoding" if q.shape[-2] == 1 else "scoring"]
    return None if len(allowed) == len(ALL) else allowed
