"""Learning-rate schedule as a pure function of the step: warm-up, then decay."""

from __future__ import annotations

import math

from restomod.config.run import OptimConfig, RunConfig
from restomod.utils.text import counted


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Return the learning rate of step ``step`` of ``steps``, counted from 0."""
    return config.lr * rate_factor(config, step, steps)


def rate_factor(config: OptimConfig, step: int, steps: int) -> float:
    """Return the fraction of the maximum learning rates in a step: linear warm-up, then decay to ``min_lr_ratio``.

    The first step has a learning rate above 0, the last one ``min_lr_ratio``.

    Args:
        config: optimizer configuration.
        step: index of the step, counted from 0.
        steps: number of steps of the run.

    Sources: Brown et al., "Language Models are Few-Shot Learners", 2020, appendix B (cosine); Hu et al., "MiniCPM",
    2024, section 4 (WSD: warm-up, stable, decay); Hägele et al., "Scaling Laws and Compute-Optimal Training Beyond
    Fixed Training Durations", 2024 (1-sqrt).
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, steps - 1 - config.warmup_steps))
    cooled = max(0.0, 1 - (1 - progress) / config.cooldown)  # fraction of the cooldown
    remaining = {
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "linear": 1 - progress,
        "wsd": 1 - cooled,
        "1-sqrt": 1 - math.sqrt(cooled),
    }[config.decay]
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * remaining


def describe_warmup(config: RunConfig) -> str:
    """Describe the schedule in one line: ``715 steps of 19,073 to 0.0006, then cosine decay to 6e-05``."""
    optim, steps = config.optim, config.steps
    length = f"{counted(optim.warmup_steps, 'step')} of {steps:,}"
    if optim.warmup_steps >= steps:
        return f"{length} to {_rates(optim, steps / max(1, optim.warmup_steps))}, without a decay"
    end = rate_factor(optim, steps - 1, steps)
    then = f"{optim.decay} decay to {_rates(optim, end)}" if end < 1 else "without a decay"
    return f"{length} to {_rates(optim, 1.0)}, then {then}"


def schedule_warnings(config: RunConfig) -> list[str]:
    """Return warnings about the length of a run: a warm-up as long as the run, or an interval longer than it."""
    optim, steps, found = config.optim, config.steps, []
    if optim.warmup_steps >= steps > 1:
        as_long = "as long as the run" if optim.warmup_steps == steps else f"longer than the run of {steps:,}"
        maximum = "" if optim.warmup_steps == steps else f" instead of {_rates(optim, 1.0)}"
        found.append(
            f"the warm-up of {optim.warmup_steps:,} steps is {as_long}: the learning rate rises to "
            f"{_rates(optim, steps / optim.warmup_steps)}{maximum} and never decays; lower --optim.warmup-steps or "
            f"raise --steps"
        )
    if config.keep_every > steps:
        found.append(
            f"keep_every {config.keep_every:,} is more than the run's {steps:,} steps: no extra checkpoint is kept"
        )
    return found


def _rates(optim: OptimConfig, factor: float) -> str:
    """Format a fraction of the maximum learning rate, and of Muon's maximum if the optimizer is Muon."""
    rate = f"{factor * optim.lr:.4g}"
    return f"{rate} (Muon: {factor * optim.muon_lr:.4g})" if optim.optimizer == "muon" else rate
