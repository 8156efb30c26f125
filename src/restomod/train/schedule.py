"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from restomod.config import OptimConfig


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Learning rate of step ``step`` of ``steps``, counted from 0.

    Linear warm-up to ``lr`` over ``warmup_steps`` (the first step already moves), then half a cosine that reaches
    ``min_lr_ratio * lr`` at the last step. Source: Brown et al., "Language Models are Few-Shot Learners", 2020,
    appendix B.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, steps - 1 - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * cosine)
