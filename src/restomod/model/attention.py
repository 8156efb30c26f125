"""Scaled dot-product attention (flash attention where available), and the allowed torch backends on CUDA.

torch's `scaled_dot_product_attention` has four backends: cuDNN, flash attention, memory-efficient attention, and plain
math. On Hopper it prefers cuDNN since release 2.11. cuDNN is fast in training, where shapes are constant. Two faults
exclude it elsewhere. It builds a plan for every new (batch, keys) shape, which a growing key/value cache would pay for
at every token. Its backward pass with a mask returns NaN for some lengths (pytorch issue 196678, cuDNN of torch 2.11 to
2.14).

Shapes: B = sequences, H = n_head, T = queries, S = keys, K = head_size.

Sources: Vaswani et al., "Attention Is All You Need", 2017, section 3.2.1; Dao et al., "FlashAttention", 2022.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

PLAIN_ATTENTION_TOKENS = 256
"""Maximum sequence length for which 16-bit attention on a CPU uses plain matmuls. The backward pass of torch's fused
CPU kernel takes two to four times as long there."""

Use = Literal["training", "masked training", "scoring", "decoding"]
"""Purpose of a call of `attention`, which decides the allowed backends."""

CUDNN, FLASH = SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION
EFFICIENT, MATH = SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH
ALL = [CUDNN, FLASH, EFFICIENT, MATH]
BACKENDS: dict[Use, list[SDPBackend]] = {
    "training": ALL,
    "masked training": [EFFICIENT, MATH],  # flash attention supports no explicit mask
    "scoring": [FLASH, EFFICIENT, MATH],
    "decoding": [FLASH, EFFICIENT, MATH],
}
"""Allowed backends on CUDA by purpose. torch uses the first one in its own order that supports the inputs."""


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None = None) -> Tensor:
    """Compute scaled dot-product attention, softmax(q kᵀ / sqrt(K)) v.

    Args:
        q: queries, (B, H, T, K).
        k, v: keys and values, (B, H, S, K).
        causal: causal mask: each query attends to its own and earlier positions. Requires T = S and no ``mask``.
        mask: attention mask, (B or 1, 1 or H, T, S) bool, True where a query attends to a key; None: no explicit mask.

    Returns:
        Weighted sums of the values, (B, H, T, K), in the dtype of ``q``.
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
    """Return the attention backends that torch may choose from.

    The purpose follows from the call: training if gradients are enabled, decoding if T = 1, scoring otherwise.

    Args:
        q: queries, (B, H, T, K).
        mask: attention mask of the call; None: causal or no mask.

    Returns:
        Entry of `BACKENDS`; None if all backends are allowed, or on a device other than CUDA.
    """
    if not q.is_cuda:
        return None
    if torch.is_grad_enabled():
        allowed = BACKENDS["training" if mask is None else "masked training"]
    else:
        allowed = BACKENDS["decoding" if q.shape[-2] == 1 else "scoring"]
    return None if len(allowed) == len(ALL) else allowed
