"""Learning rates as a pure function of the step."""

from __future__ import annotations

import math

from restomod.config.run import OptimConfig, RunConfig
from restomod.utils.text import counted


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Learning rate in step ``step`` of ``steps``, counted from 0."""
    return config.lr * rate_factor(config, step, steps)


def rate_factor(config: OptimConfig, step: int, steps: int) -> float:
    """Factor of all maximum learning rates in step ``step`` of ``steps``, counted from 0.

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


def describe_warmup(config: RunConfig) -> str:
    """Describe the schedule in a line: 715 steps of 19,073 to 0.0006, then cosine decay to 6e-05."""
    optim, steps = config.optim, config.steps
    length = f"{counted(optim.warmup_steps, 'step')} of {steps:,}"
    if optim.warmup_steps >= steps:
        return f"{length} to {_rates(optim, steps / max(1, optim.warmup_steps))}, without a decay"
    end = rate_factor(optim, steps - 1, steps)
    then = f"{optim.decay} decay to {_rates(optim, end)}" if end < 1 else "without a decay"
    return f"{length} to {_rates(optim, 1.0)}, then {then}"


def schedule_warnings(config: RunConfig) -> list[str]:
    """Warnings about the length of a run: a warm-up that takes all of it, checkpoints that are never kept."""
    optim, steps, found = config.optim, config.steps, []
    if optim.warmup_steps >= steps > 1:
        as_long = "as long as the run" if optim.warmup_steps == steps else f"longer than the run of {steps:,}"
        short = "" if optim.warmup_steps == steps else f" of {_rates(optim, 1.0)}"
        found.append(
            f"the warm-up of {optim.warmup_steps:,} steps is {as_long}: the learning rate rises to "
            f"{_rates(optim, steps / optim.warmup_steps)}{short} in the last step and never comes down; lower "
            f"--optim.warmup-steps or raise --steps"
        )
    if config.keep_every > steps:
        found.append(f"keep_every {config.keep_every:,} is more than the run's {steps:,} steps: it keeps no checkpoint")
    return found


def _rates(optim: OptimConfig, factor: float) -> str:
    """A fraction of the maximum learning rate, and of Muon's where it is used."""
    rate = f"{factor * optim.lr:.4g}"
    return f"{rate} (Muon: {factor * optim.muon_lr:.4g})" if optim.optimizer == "muon" else rate
