"""Squared ReLU. Source: So et al., "Primer: Searching for Efficient Transformers", 2021."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from restomod.config.model import ModelConfig


class SquaredReLU(nn.Module):
    """relu(x)²"""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x).square()


def build(config: ModelConfig) -> nn.Module:
    """Build a squared ReLU."""
    return SquaredReLU()
