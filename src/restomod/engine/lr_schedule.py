"""Learning-rate schedule as a pure function of the step: warm-up, then decay."""

from __future__ import annotations

import math
from collections.abc import Callable

from restomod.config.run import Decay, OptimConfig, RunConfig
from restomod.utils.text import counted


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Return the learning rate of step ``step`` of ``steps``, counted from 0."""
    return config.lr * rate_factor(config, step, steps)


def rate_factor(config: OptimConfig, step: int, steps: int) -> float:
    """Return the factor of all maximum learning rates at ``step`` of ``steps``, counted from 0.

    The factor rises linearly over ``warmup_steps``; the first step already has a positive rate. Then it falls along
    the function of ``decay`` in `DECAYS` from 1 to ``min_lr_ratio`` at the last step.

    Args:
        config: optimizer configuration.
        step: index of the step, counted from 0.
        steps: number of steps of the run.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, steps - 1 - config.warmup_steps))
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * DECAYS[config.decay](progress, config.cooldown)


def cosine(progress: float, cooldown: float) -> float:
    """Return (1 + cos(pi * progress)) / 2.

    Source: Brown et al., "Language Models are Few-Shot Learners", 2020, appendix B.
    """
    return 0.5 * (1 + math.cos(math.pi * progress))


def linear(progress: float, cooldown: float) -> float:
    """Return 1 - progress."""
    return 1 - progress


def wsd(progress: float, cooldown: float) -> float:
    """Return 1, then 1 - progress of the cooldown ("warm-up, stable, decay"). Source: Hu et al., "MiniCPM", 2024."""
    return 1 - cooldown_progress(progress, cooldown)


def one_minus_sqrt(progress: float, cooldown: float) -> float:
    """Return 1, then 1 - sqrt(progress of the cooldown).

    Source: Hägele et al., "Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations", 2024.
    """
    return 1 - math.sqrt(cooldown_progress(progress, cooldown))


def cooldown_progress(progress: float, cooldown: float) -> float:
    """Return the fraction of the cooldown that has passed: 0 before it begins, 1 at the last step."""
    return max(0.0, 1 - (1 - progress) / cooldown)


DECAYS: dict[Decay, Callable[[float, float], float]] = {
    "cosine": cosine,
    "linear": linear,
    "wsd": wsd,
    "1-sqrt": one_minus_sqrt,
}
"""Decays by name: functions of (progress, cooldown) that fall from 1 at progress 0 to 0 at progress 1.

``progress`` is the passed fraction of the steps after the warm-up, ``cooldown`` is `OptimConfig.cooldown`. A new decay
is a function, an entry here, and a name in `restomod.config.run.Decay`.
"""


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
