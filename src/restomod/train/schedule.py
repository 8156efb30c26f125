"""Learning rates as a pure function of the step."""

from __future__ import annotations

import math

from restomod.config import OptimConfig


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """AdamW's learning rate in step ``step`` of ``steps``, counted from 0."""
    return config.lr * rate_factor(config, step, steps)


def rate_factor(config: OptimConfig, step: int, steps: int) -> float:
    """The fraction of their maximum that all learning rates have in step ``step`` of ``steps``, counted from 0.

    Linear warm-up over ``warmup_steps`` (the first step already moves), then down as ``decay`` says, to
    ``min_lr_ratio`` at the last step. Sources: Brown et al., "Language Models are Few-Shot Learners", 2020, appendix B
    (cosine); Hu et al., "MiniCPM", 2024 (warm-up, stable, decay); Hägele et al., "Scaling Laws and Compute-Optimal
    Training Beyond Fixed Training Durations", 2024 (1-sqrt).
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, steps - 1 - config.warmup_steps))
    cooled = max(0.0, 1 - (1 - progress) / config.cooldown)  # how much of the cooldown has passed
    remaining = {
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "linear": 1 - progress,
        "wsd": 1 - cooled,
        "1-sqrt": 1 - math.sqrt(cooled),
    }[config.decay]
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * remaining
