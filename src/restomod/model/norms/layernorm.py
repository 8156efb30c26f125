"""LayerNorm, as in GPT-2, with epsilon 1e-5. Source: Ba et al., "Layer Normalization", 2016, section 3."""

from __future__ import annotations

from torch import nn

from restomod.config.model import ModelConfig


def build(config: ModelConfig) -> nn.Module:
    """Build a LayerNorm over D channels, (..., D) to (..., D), with a bias if ``config.bias`` is set."""
    return nn.LayerNorm(config.n_embd, bias=config.bias)
