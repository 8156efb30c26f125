"""Squared ReLU, an alternative to GELU.

Source: So et al., "Primer: Searching for Efficient Transformers for Language Modeling", 2021.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from restomod.config.model import ModelConfig


class SquaredReLU(nn.Module):
    """Squared ReLU: relu(x)²."""

    def forward(self, x: Tensor) -> Tensor:
        """Compute relu(x)² elementwise, (..., I) to (..., I)."""
        return F.relu(x).square()


def build(config: ModelConfig) -> nn.Module:
    """Build a squared ReLU, (..., I) to (..., I)."""
    return SquaredReLU()
