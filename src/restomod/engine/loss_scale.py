"""Dynamic loss scaling for fp16.

The loss is multiplied by a factor before the backward pass, and the update divides the gradients by it: fp16 has
nothing below 6e-8, where most gradients of a language model lie. Source: Micikevicius et al., "Mixed Precision
Training", 2018, section 3.2; the constants are those of `torch.amp.GradScaler`.
"""

from __future__ import annotations

import torch
from torch import Tensor

START = 2.0**16
STEPS_BEFORE_GROWTH = 2000
LOSS_SCALE = ("loss_scale.factor", "loss_scale.finite_steps")  # in checkpoints of fp16 runs only


class LossScale:
    """Factor of the loss: in fp16 as large as its range allows, found by trying; otherwise 1."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.adapts = dtype == torch.float16
        self.factor = torch.tensor(START if self.adapts else 1.0, device=device)
        self.finite_steps = torch.tensor(0.0, device=device)  # in a row, since the factor last changed

    def update(self, overflowed: Tensor) -> None:
        """Halve the factor where the gradients ``overflowed`` (a scalar bool), double it after many steps without.

        Nothing is read from the device.
        """
        if not self.adapts:
            return
        self.finite_steps.add_(1).mul_(~overflowed)
        grows = self.finite_steps >= STEPS_BEFORE_GROWTH
        self.factor.mul_(torch.where(overflowed, 0.5, torch.where(grows, 2.0, 1.0)))
        self.finite_steps.mul_(~grows)

    def tensors(self) -> dict[str, Tensor]:
        """State for a checkpoint, sharing its memory; none where the factor is constant."""
        if not self.adapts:
            return {}
        return dict(zip(LOSS_SCALE, (self.factor, self.finite_steps), strict=True))

    def reset(self) -> None:
        """Reset to the initial state, in place."""
        self.factor.fill_(START if self.adapts else 1.0)
        self.finite_steps.zero_()
