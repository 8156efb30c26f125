"""GELU by the tanh approximation, GPT-2's. Source: Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016."""

from __future__ import annotations

from torch import nn

from restomod.config.model import ModelConfig


def build(config: ModelConfig) -> nn.Module:
    """Build tanh-GELU."""
    return nn.GELU(approximate="tanh")
