"""GELU with the tanh approximation, as in GPT-2.

Source: Hendrycks and Gimpel, "Gaussian Error Linear Units (GELUs)", 2016, section 2.
"""

from __future__ import annotations

from torch import nn

from restomod.config.model import ModelConfig


def build(config: ModelConfig) -> nn.Module:
    """Build GELU with the tanh approximation, (..., I) to (..., I)."""
    return nn.GELU(approximate="tanh")
