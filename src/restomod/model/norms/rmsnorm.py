"""RMSNorm, as in Llama. Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019, section 4."""

from __future__ import annotations

from torch import nn

from restomod.config.model import ModelConfig

NORM_EPS = 1e-6  # the value of Llama and Qwen3 in `transformers`


def build(config: ModelConfig) -> nn.Module:
    """Build an RMSNorm over D channels, (..., D) to (..., D), without a bias."""
    return nn.RMSNorm(config.n_embd, NORM_EPS)
