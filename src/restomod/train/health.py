"""Is a run healthy? Symptoms that its numbers show, each named, with what was seen and what to do. Needs no torch.

Thresholds are several standard errors of what noise does, and more than healthy runs do. What cannot be judged yet says
so.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from restomod.config import RunConfig
from restomod.train.curves import Array, Curves, blocks, curves, level_at, noise, period

Status = Literal["well", "note", "sick", "unknown"]

STUCK_AFTER = 100  # updates; by then every model that learns at all has learnt how frequent tokens are
SHORT = 100  # steps; of fewer, the share that warms up may be a single one
STUCK_WITHIN = 0.5  # nats below ln(V)
RECENT = 32  # steps whose mean is the level of now

SPIKE_BEFORE = 128  # steps that a spike stands out from
SPIKE_ENOUGH = 64
SPIKE_SIGMAS = 10.0  # as the guard of training has
SPIKE_WIDTHS = (1, 4, 16)  # steps
SMALLEST_SPIKE = 0.25  # nats

DIVERGED_SIGMAS = 6.0
DIVERGED_BY = 0.25  # nats
GRADIENT_GREW = 4.0  # times; by 3 the norm of a healthy small model grew
SLOWER = 1.5  # times the milliseconds of the fastest part
FEWEST_BLOCKS = 4

GAPS_AFTER = 128  # steps; before, the training loss falls too fast to be compared with
GAP_SIGMAS = 4.0
OVERFITTED_BY = 0.3  # nats that the gap has grown by
VAL_ROSE_BY = 0.1  # nats above its minimum; it is always measured on the same tokens
BELOW_BY = 0.4  # nats
NOTABLE_SKIPS = 0.01  # of the steps


@dataclass(frozen=True)
class Finding:
    """What became of looking for one symptom."""

    symptom: str
    status: Status
    """well: not seen; note: seen, and over; sick: seen; unknown: cannot be judged."""
    reason: str


def judge(
    config: RunConfig, records: Iterable[Mapping[str, Any]], lengths: Mapping[str, float] | None = None
) -> list[Finding]:
    """Look for every symptom in the records of a run, whether it is finished or not.

    Args:
        config: of the run.
        records: of `metrics.jsonl`.
        lengths: steps after which the data comes to a border, by what that is, such as an epoch.
    """
    seen = curves(records)
    return [*(look(config, seen) for look in SYMPTOMS), periodicity(seen, lengths or {})]


def seen_now(findings: Iterable[Finding]) -> list[Finding]:
    """Those that say that the run is not healthy."""
    return [finding for finding in findings if finding.status == "sick"]


def not_finite(config: RunConfig, seen: Curves) -> Finding:
    """Losses or gradients that are no numbers; their updates were not made."""
    name, steps = "loss not finite", seen.not_finite
    if not steps:
        return _quiet(name, seen, "every loss and gradient norm is finite")
    times = f"at step {steps[0]}" if len(steps) == 1 else f"at {len(steps)} steps, first at {steps[0]}"
    return Finding(name, "sick", f"{times}; lower --optim.lr or raise --optim.warmup-steps in a new run")


def skipped_updates(config: RunConfig, seen: Curves) -> Finding:
    """Updates that were not made because the loss was far off."""
    name, skips = "skipped updates", seen.skipped
    if not skips and not seen.rollbacks:
        return _quiet(name, seen, "every update was made")
    parts = [f"{len(skips)} of {seen.steps_seen:,} steps, the last at {skips[-1][0]} ({skips[-1][1]})"] if skips else []
    if seen.rollbacks:
        parts.append(f"the run went back to a checkpoint {_times(seen.rollbacks)}")
    often = seen.rollbacks > 0 or len(skips) > max(1, NOTABLE_SKIPS * seen.steps_seen)
    return Finding(name, "sick" if often else "note", "; ".join(parts))


def stuck(config: RunConfig, seen: Curves) -> Finding:
    """A loss that stays where guessing evenly among the vocabulary puts it."""
    name, guess = "stuck near ln(V)", math.log(config.model.vocab_size)
    if len(seen.loss) < STUCK_AFTER:
        return _too_short(name, seen, STUCK_AFTER)
    level = float(seen.loss[-RECENT:].mean())
    if level < guess - STUCK_WITHIN:
        return Finding(name, "well", f"loss {level:.2f}, guessing evenly gives {guess:.2f}")
    return Finding(
        name,
        "sick",
        f"loss {level:.2f} after {len(seen.loss):,} updates, and guessing evenly gives {guess:.2f}: "
        f"is --optim.lr ({config.optim.lr:g}) far too low or too high? `restomod check` looks for a broken model",
    )


def spikes(config: RunConfig, seen: Curves) -> Finding:
    """Losses far above those before, for one step or a few."""
    name, x = "spike", seen.loss
    if len(x) <= SPIKE_ENOUGH:
        return _too_short(name, seen, SPIKE_ENOUGH + 1)
    found = _spikes(x)
    if not found:
        return Finding(name, "well", f"no loss {SPIKE_SIGMAS:.0f} standard deviations above those before")
    before = x[max(0, found[-1][0] - SPIKE_BEFORE) : found[-1][0]]
    now = float(x[-RECENT:].mean())
    back = now <= before.mean() + max(0.1, 4 * float(before.std()) * math.sqrt(1 / RECENT + 1 / len(before)))
    largest = max(found, key=lambda spike: spike[1])
    several = f"{len(found)} of them, the largest " if len(found) > 1 else ""
    reason = f"{several}at step {seen.step[largest[0]]:.0f}, {largest[1]:.2f} nats above the steps before"
    if back:
        return Finding(name, "note" if len(found) <= 3 else "sick", f"{reason}; the loss has come back")
    return Finding(name, "sick", f"{reason}; the loss has not come back: go back to a checkpoint, or lower --optim.lr")


def _spikes(x: Array) -> list[tuple[int, float]]:
    """Where spikes begin and how high above the losses before they are, in order."""
    found: list[tuple[int, float]] = []
    usual = deque(x[:SPIKE_ENOUGH].tolist(), maxlen=SPIKE_BEFORE)  # spikes are not among them
    total, squares = sum(usual), sum(v * v for v in usual)
    i = SPIKE_ENOUGH
    while i < len(x):
        mean = total / len(usual)
        deviation = math.sqrt(max(squares / len(usual) - mean * mean, 1e-12))
        spike = _spike_at(x, i, mean, deviation) if x[i] - mean > deviation else None
        if spike is not None:
            found.append((i, spike[0]))
            i += spike[1]
            while i < len(x) and x[i] - mean > max(SMALLEST_SPIKE, 3 * deviation):
                i += 1  # the same one, on its way down
            continue
        value = float(x[i])
        gone = usual[0] if len(usual) == SPIKE_BEFORE else 0.0
        usual.append(value)
        total, squares = total + value - gone, squares + value * value - gone * gone
        i += 1
    return found


def _spike_at(x: Array, i: int, mean: float, deviation: float) -> tuple[float, int] | None:
    """Height and width of the spike that begins at ``i``; None if there is none."""
    rises = [(float(x[i : i + k].mean()) - mean, k) for k in SPIKE_WIDTHS if i + k <= len(x)]
    high = [(rise, k) for rise, k in rises if rise > max(SMALLEST_SPIKE, SPIKE_SIGMAS * deviation / math.sqrt(k))]
    return max(high) if high else None


def diverged(config: RunConfig, seen: Curves) -> Finding:
    """A loss that has been lower, and rises."""
    name, x = "divergence", seen.loss
    width = max(RECENT, len(x) // 20)
    if len(x) < FEWEST_BLOCKS * width:
        return _too_short(name, seen, FEWEST_BLOCKS * width)
    means = blocks(x, width).mean(axis=1)
    rise, allowed = means[-1] - means.min(), max(DIVERGED_BY, DIVERGED_SIGMAS * noise(x) * math.sqrt(2 / width))
    if rise <= allowed:
        return Finding(
            name, "well", f"the loss of the last {width} steps is {means[-1]:.3f}, its lowest so far {means.min():.3f}"
        )
    at = seen.step[len(x) - (len(means) - int(means.argmin())) * width]
    return Finding(
        name,
        "sick",
        f"the loss was {means.min():.3f} around step {at:.0f} and is {means[-1]:.3f} now: "
        f"go back to a checkpoint from before, lower --optim.lr",
    )


def gradient(config: RunConfig, seen: Curves) -> Finding:
    """A gradient norm that grows, which comes before many a divergence."""
    name = "gradient norm growing"
    x = seen.grad_norm[seen.step >= config.optim.warmup_steps]
    x = x[np.isfinite(x)]
    width = max(RECENT, len(x) // 20)
    if len(x) < FEWEST_BLOCKS * width:
        return _too_short(name, seen, config.optim.warmup_steps + FEWEST_BLOCKS * width)
    levels = np.median(blocks(x, width), axis=1)
    lowest, last = float(levels.min()), float(levels[-1])
    if not last > GRADIENT_GREW * lowest > 0:
        return Finding(name, "well", f"{last:.2f} now, and {lowest:.2f} to {levels.max():.2f} after the warm-up")
    return Finding(
        name, "sick", f"from {lowest:.2f} to {last:.2f}: a divergence may follow; lower --optim.lr or --optim.betas"
    )


def throughput(config: RunConfig, seen: Curves) -> Finding:
    """Steps that take longer than they did."""
    name, x = "throughput drop", seen.ms[np.isfinite(seen.ms) & (seen.ms > 0)]
    width = max(20, len(x) // 10)
    if len(x) < FEWEST_BLOCKS * width:
        return _too_short(name, seen, FEWEST_BLOCKS * width)
    parts = blocks(x, width)
    levels = np.median(parts, axis=1)
    fast, last = int(levels.argmin()), float(levels[-1])
    apart = np.quantile(parts[-1], 0.25) > np.quantile(parts[fast], 0.75)
    if last <= SLOWER * levels[fast] or not apart:
        return Finding(name, "well", f"{last:.0f} ms a step now, {levels[fast]:.0f} where it was fastest")
    return Finding(
        name,
        "sick",
        f"{last:.0f} ms a step now, {levels[fast]:.0f} before: does something else use the machine, is it too hot, "
        f"or does the data come late (data_ms)?",
    )


def warm_up(config: RunConfig, seen: Curves) -> Finding:
    """A learning rate that begins at its maximum, or never gets there."""
    name, optim = "no warm-up", config.optim
    if config.steps <= optim.warmup_steps > 1:
        return Finding(
            name,
            "sick",
            f"all {config.steps} steps lie within the warm-up of {optim.warmup_steps}, so the learning rate ends at "
            f"{optim.lr * config.steps / optim.warmup_steps:g}, its highest: lower --optim.warmup-steps",
        )
    if optim.optimizer != "adamw":
        return Finding(name, "well", f"{optim.optimizer} does without, and warms up for {optim.warmup_steps} steps")
    first = seen.first_rate
    if optim.warmup_steps == 1 and config.steps <= SHORT:
        return Finding(name, "unknown", f"{config.steps} steps are too few for one")
    if optim.warmup_steps <= 1 or (math.isfinite(first) and first > 0.9 * optim.lr):
        return Finding(
            name,
            "sick",
            f"the learning rate is {optim.lr:g} from the first step on, when AdamW has seen no gradients: "
            f"add --optim.warmup-steps",
        )
    return Finding(name, "well", f"{optim.warmup_steps} steps of {config.steps:,}")


def overfitting(config: RunConfig, seen: Curves) -> Finding:
    """A held-out loss that rises, or stays behind, while the training loss falls."""
    name, gaps = "overfitting", _gaps(seen)
    if len(gaps) < 2:
        return _no_gap(name, seen, 2)
    (_, first, first_error), (step, last, error) = gaps[0], gaps[-1]
    lowest = int(seen.val_loss.argmin())
    rise = float(seen.val_loss[-1] - seen.val_loss[lowest])
    near, now = level_at(seen, seen.val_step[lowest]), level_at(seen, seen.val_step[-1])
    falls = near is not None and now is not None and now[0] <= near[0] + GAP_SIGMAS * now[1]
    if rise > VAL_ROSE_BY and falls:
        return Finding(
            name,
            "sick",
            f"the held-out loss was {seen.val_loss[lowest]:.4f} at step {seen.val_step[lowest]:.0f} and is "
            f"{seen.val_loss[-1]:.4f} now, while the training loss does not rise: more data, or fewer steps",
        )
    grew, allowed = last - first, max(OVERFITTED_BY, GAP_SIGMAS * math.hypot(error, first_error))
    if grew > allowed and last > OVERFITTED_BY:
        return Finding(
            name,
            "sick",
            f"the held-out loss is {last:.2f} above the training loss at step {step:.0f}, and was {first:+.2f} from it "
            f"before: more data, or fewer steps",
        )
    return Finding(name, "well", f"held-out minus training loss: {last:+.2f} at step {step:.0f} (± {error:.2f})")


def below(config: RunConfig, seen: Curves) -> Finding:
    """A held-out loss below the training loss."""
    name, gaps = "validation below training", _gaps(seen)
    if not gaps:
        return _no_gap(name, seen, 1)
    latest = gaps[-2:]
    step, gap, _ = latest[-1]
    if all(g < -max(BELOW_BY, GAP_SIGMAS * error) for _, g, error in latest):
        return Finding(
            name,
            "sick",
            f"by {-gap:.2f} nats at step {step:.0f}: the held-out text is easier, is in the training text too and "
            f"learnt by heart, or the two losses are not computed alike",
        )
    return Finding(name, "well", f"held-out minus training loss: {gap:+.2f} at step {step:.0f}")


def periodicity(seen: Curves, lengths: Mapping[str, float]) -> Finding:
    """A loss that repeats itself, as with data that is not shuffled."""
    name, needed = "periodic loss", 4 * 128 // 3 + 1
    if len(seen.loss) < needed:
        return _too_short(name, seen, needed)
    found = period(seen.loss)
    if found is None:
        return Finding(name, "well", "no wave and no repetition in its noise")
    known = next((what for what, steps in lengths.items() if abs(found / steps - 1) < 0.03), None)
    of = f", the length of {known}" if known else ""
    return Finding(name, "sick", f"it repeats itself every {found:.0f} steps{of}: is the data shuffled, as a whole?")


def _gaps(seen: Curves) -> list[tuple[float, float, float]]:
    """Step, held-out minus training loss, and its standard error, at every validation that can be compared."""
    found = []
    for step, loss, error in zip(seen.val_step, seen.val_loss, seen.val_error, strict=True):
        level = level_at(seen, step)
        if step >= GAPS_AFTER and level is not None:
            found.append((float(step), float(loss) - level[0], math.hypot(error, level[1])))
    return found


def _no_gap(name: str, seen: Curves, needed: int) -> Finding:
    if not len(seen.val_step):
        return Finding(name, "unknown", "the run has no validation")
    return Finding(name, "unknown", f"needs {_times(needed, 'validation')} after step {GAPS_AFTER}")


def _too_short(name: str, seen: Curves, needed: int) -> Finding:
    return Finding(name, "unknown", f"needs {needed:,} steps, and there are {len(seen.loss):,}")


def _quiet(name: str, seen: Curves, reason: str) -> Finding:
    return Finding(name, "well", reason) if seen.steps_seen else Finding(name, "unknown", "no step has been made yet")


def _times(n: int, what: str = "time") -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


SYMPTOMS: tuple[Callable[[RunConfig, Curves], Finding], ...] = (
    not_finite,
    skipped_updates,
    stuck,
    spikes,
    diverged,
    gradient,
    overfitting,
    below,
    throughput,
    warm_up,
)
