"""SwiGLU, the gated activation of Llama. Source: Shazeer, "GLU Variants Improve Transformer", 2020, section 2."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from restomod.config.model import ModelConfig


class SwiGLU(nn.Module):
    """Gated activation silu(gate) * up; gate and up are the two halves of the input."""

    def forward(self, x: Tensor) -> Tensor:
        """Compute silu(gate) * up, (..., 2 I) to (..., I)."""
        gate, up = x.chunk(2, -1)  # each (..., I)
        return F.silu(gate) * up


def build(config: ModelConfig) -> nn.Module:
    """Build SwiGLU, (..., 2 I) to (..., I)."""
    return SwiGLU()
