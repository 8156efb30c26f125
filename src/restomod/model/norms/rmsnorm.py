"""RMSNorm, Llama's. Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019."""

from __future__ import annotations

from torch import nn

from restomod.config.model import ModelConfig

NORM_EPS = 1e-6  # as in `transformers`' Llama and Qwen3


def build(config: ModelConfig) -> nn.Module:
    """Build an RMSNorm over D channels."""
    return nn.RMSNorm(config.n_embd, NORM_EPS)
