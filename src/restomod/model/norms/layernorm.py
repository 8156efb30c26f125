"""LayerNorm, GPT-2's, with torch's epsilon of 1e-5. Source: Ba et al., "Layer Normalization", 2016."""

from __future__ import annotations

from torch import nn

from restomod.config.model import ModelConfig


def build(config: ModelConfig) -> nn.Module:
    """Build a LayerNorm over D channels; its bias follows ``config.bias``."""
    return nn.LayerNorm(config.n_embd, bias=config.bias)
