"""SwiGLU, Llama's. Source: Shazeer, "GLU Variants Improve Transformer", 2020."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from restomod.config.model import ModelConfig


class SwiGLU(nn.Module):
    """silu(gate) * up, where (..., 2 I) inputs are gate and up."""

    def forward(self, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up


def build(config: ModelConfig) -> nn.Module:
    """Build SwiGLU."""
    return SwiGLU()
