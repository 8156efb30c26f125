"""Dynamic loss scaling for mixed precision in fp16.

Most gradients of a language model are smaller than 6e-8, where fp16 underflows. The loss is therefore multiplied by a
factor before the backward pass, and the update divides the gradients by it. Source: Micikevicius et al., "Mixed
Precision Training", 2018, section 3.2. The constants are those of `torch.amp.GradScaler`.
"""

from __future__ import annotations

import torch
from torch import Tensor

START = 2.0**16
STEPS_BEFORE_GROWTH = 2000
LOSS_SCALE = ("loss_scale.factor", "loss_scale.finite_steps")
"""Names of the state in checkpoints of fp16 runs."""


class LossScale:
    """Factor of the loss: in fp16 the largest power of two without overflows, adapted during training; otherwise 1.

    Args:
        dtype: compute dtype of matmuls.
        device: device of the model.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.adapts = dtype == torch.float16
        self.factor = torch.tensor(START if self.adapts else 1.0, device=device)
        self.finite_steps = torch.tensor(0.0, device=device)  # consecutive ones since the last change of the factor

    def update(self, overflowed: Tensor) -> None:
        """Halve the factor after an overflow, double it after 2,000 steps without one. Does not wait for the device.

        Args:
            overflowed: whether the loss or a gradient is not finite, scalar bool.
        """
        if not self.adapts:
            return
        self.finite_steps.add_(1).mul_(~overflowed)
        grows = self.finite_steps >= STEPS_BEFORE_GROWTH
        self.factor.mul_(torch.where(overflowed, 0.5, torch.where(grows, 2.0, 1.0)))
        self.finite_steps.mul_(~grows)

    def tensors(self) -> dict[str, Tensor]:
        """Return the state for a checkpoint, as views; empty if the factor is constant."""
        if not self.adapts:
            return {}
        return dict(zip(LOSS_SCALE, (self.factor, self.finite_steps), strict=True))

    def reset(self) -> None:
        """Reset the state to its initial values, in place."""
        self.factor.fill_(START if self.adapts else 1.0)
        self.finite_steps.zero_()
