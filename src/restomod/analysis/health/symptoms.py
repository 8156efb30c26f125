"""Symptoms of an unhealthy run in its metrics. Every finding names the evidence and a remedy. Does not import torch.

Thresholds are several standard errors of the noise and larger than the values of healthy runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from restomod.analysis.health.history import Curves, curves_from_records
from restomod.analysis.health.noise import FEWEST_FOR_PERIODS, autocorrelation_time, blocks, noise_deviation, period
from restomod.analysis.health.spikes import SPIKE_ENOUGH, SPIKE_SIGMAS
from restomod.config.run import RunConfig
from restomod.utils.text import counted

Status = Literal["ok", "warning", "fail", "unknown"]
Judged = tuple[Status, str]
"""Status and reason of a `Finding`."""

STUCK_AFTER = 100  # updates; enough for a model that trains to learn the token frequencies
SHORT = 100  # steps; runs up to this length may have a warm-up of one step
STUCK_WITHIN = 0.5  # nats below ln(V)
RECENT = 32  # steps averaged for the current loss

DIVERGED_SIGMAS = 6.0
DIVERGED_BY = 0.25  # nats
GRADIENT_GREW = 4.0  # factor; the norm of a healthy small model grew by a factor of 3
SLOWER = 1.5  # factor relative to the fastest part of the run
FEWEST_BLOCKS = 4

GAP_SIGMAS = 6.0
OVERFITTED_BY = 0.3  # growth of the gap in nats
VAL_ROSE_BY = 0.1  # nats above the minimum; small, as all validations use the same tokens
VAL_SIGMAS = 5.0  # added to the expected distance of the minimum from the mean
BELOW_BY = 0.4  # nats
NOTABLE_SKIPS = 0.01  # fraction of the steps
GAPS_AFTER = 128  # steps; the training loss falls too fast before
VALS_FOR_NOISE = 24  # validations needed to estimate their noise
VAL_NOISE = 0.02  # nats; typical of small batches


@dataclass(frozen=True)
class Finding:
    """Result for one symptom."""

    symptom: str
    """Name of the symptom."""
    status: Status
    """ok: not found; warning: found, but over, rare or due to other settings; fail: found; unknown: not judged."""
    reason: str
    """Evidence for the status and, for failures, a remedy."""


def find_symptoms(
    config: RunConfig, records: Iterable[Mapping[str, Any]], lengths: Mapping[str, float] | None = None
) -> list[Finding]:
    """Look for every symptom in the records of `metrics.jsonl`, of a run that is finished or in progress.

    Args:
        config: run configuration.
        records: records in any order.
        lengths: lengths of parts of the data in steps, such as "an epoch", to explain a periodic loss; None: unknown.
    """
    return find_symptoms_in_curves(config, curves_from_records(records), lengths)


def find_symptoms_in_curves(
    config: RunConfig, seen: Curves, lengths: Mapping[str, float] | None = None
) -> list[Finding]:
    """Look for every symptom in the curves of a run.

    Args:
        config: run configuration.
        seen: curves from `restomod.analysis.health.history.History`.
        lengths: see `find_symptoms`.
    """
    found = {name: look(config, seen) for name, look in SYMPTOMS.items()}
    found["periodic loss"] = periodicity(seen, lengths or {})
    return [Finding(name, status, reason) for name, (status, reason) in found.items()]


def failures(findings: Iterable[Finding]) -> list[Finding]:
    """Return the findings with status fail."""
    return [finding for finding in findings if finding.status == "fail"]


def not_finite(config: RunConfig, seen: Curves) -> Judged:
    """Look for losses or gradient norms that are not finite. Their updates were skipped."""
    steps = seen.not_finite
    if not steps:
        return _none_seen(seen, "every loss and gradient norm is finite")
    times = f"at step {steps[0]}" if len(steps) == 1 else f"at {len(steps)} steps, first at {steps[0]}"
    return "fail", f"{times}; lower --optim.lr or raise --optim.warmup-steps in a new run"


def skipped_updates(config: RunConfig, seen: Curves) -> Judged:
    """Look for updates that were skipped because of the loss, and for rollbacks."""
    skips = seen.skipped
    if not skips and not seen.rollbacks:
        return _none_seen(seen, "every update was applied")
    parts = (
        [f"{len(skips)} of {seen.steps_seen:,} steps, last at step {skips[-1][0]} ({skips[-1][1]})"] if skips else []
    )
    if seen.rollbacks:
        parts.append(f"{counted(seen.rollbacks, 'rollback')} to a checkpoint")
    often = seen.rollbacks > 0 or len(skips) > max(1, NOTABLE_SKIPS * seen.steps_seen)
    return "fail" if often else "warning", "; ".join(parts)


def stuck(config: RunConfig, seen: Curves) -> Judged:
    """Look for a loss that stays near ln(V), the loss of a uniform prediction."""
    guess = math.log(config.model.vocab_size)
    if seen.updates < STUCK_AFTER:
        return _too_short(seen, STUCK_AFTER)
    level = float(seen.recent_loss[-RECENT:].mean())
    if level < guess - STUCK_WITHIN:
        return "ok", f"loss {level:.2f}, a uniform prediction gives {guess:.2f}"
    return "fail", (
        f"loss {level:.2f} after {seen.updates:,} updates, a uniform prediction gives {guess:.2f}: --optim.lr "
        f"({config.optim.lr:g}) may be far too low or too high; `restomod check` tests the model"
    )


def spikes(config: RunConfig, seen: Curves) -> Judged:
    """Look for loss spikes of one step or a few steps."""
    found = seen.spikes
    if seen.updates <= SPIKE_ENOUGH:
        return _too_short(seen, SPIKE_ENOUGH + 1)
    if not found:
        return "ok", f"no loss is {SPIKE_SIGMAS:.0f} standard deviations above the steps before"
    last, largest = found[-1], max(found, key=lambda spike: spike.rise)
    now = float(seen.recent_loss[-RECENT:].mean())
    back = now <= last.mean + max(0.1, 4 * last.deviation * math.sqrt(1 / RECENT + 1 / last.count))
    several = f"{len(found)} spikes, the largest " if len(found) > 1 else ""
    reason = f"{several}at step {largest.step}, {largest.rise:.2f} nats above the steps before"
    if back:
        return "warning" if len(found) <= 3 else "fail", f"{reason}; the loss has recovered"
    return "fail", f"{reason}; the loss has not recovered: return to an earlier checkpoint, or lower --optim.lr"


def diverged(config: RunConfig, seen: Curves) -> Judged:
    """Look for a loss that has risen above its minimum."""
    x = seen.loss
    width = max(RECENT, len(x) // 20)
    if len(x) < FEWEST_BLOCKS * width:
        return _too_short(seen, FEWEST_BLOCKS * width)
    means = blocks(x, width).mean(axis=1)
    lowest = int(means.argmin())
    before = x[: max(len(x) // 2, len(x) - (len(means) - 1 - lowest) * width)]  # a later rise is not noise
    error = noise_deviation(before) * math.sqrt(2 * autocorrelation_time(before) / width)
    if means[-1] - means[lowest] <= max(DIVERGED_BY, DIVERGED_SIGMAS * error):
        steps = width * seen.row_steps
        return "ok", f"mean loss of the last {steps} steps {means[-1]:.3f}, minimum so far {means.min():.3f}"
    at = seen.step[len(x) - (len(means) - lowest) * width]
    return "fail", (
        f"the loss was {means.min():.3f} around step {at:.0f} and is {means[-1]:.3f} now: "
        f"return to an earlier checkpoint and lower --optim.lr"
    )


def gradient(config: RunConfig, seen: Curves) -> Judged:
    """Look for a growing gradient norm, which often precedes divergence."""
    x = seen.grad_norm[seen.step >= config.optim.warmup_steps]
    x = x[np.isfinite(x)]
    width = max(RECENT, len(x) // 20)
    if len(x) < FEWEST_BLOCKS * width:
        return _too_short(seen, config.optim.warmup_steps + FEWEST_BLOCKS * width)
    levels = np.median(blocks(x, width), axis=1)
    lowest, last = float(levels.min()), float(levels[-1])
    if not last > GRADIENT_GREW * lowest > 0:
        return "ok", f"{last:.2f} now, {lowest:.2f} to {levels.max():.2f} since the warm-up"
    return "fail", f"from {lowest:.2f} to {last:.2f}: the loss may diverge; lower --optim.lr or --optim.betas"


def throughput(config: RunConfig, seen: Curves) -> Judged:
    """Look for steps that take longer than before."""
    x = seen.ms[np.isfinite(seen.ms) & (seen.ms > 0)]
    width = max(20, len(x) // 10)
    if len(x) < FEWEST_BLOCKS * width:
        return _too_short(seen, FEWEST_BLOCKS * width)
    parts = blocks(x, width)
    levels = np.median(parts, axis=1)
    fast, last = int(levels.argmin()), float(levels[-1])
    apart = np.quantile(parts[-1], 0.25) > np.quantile(parts[fast], 0.75)
    if last <= SLOWER * levels[fast] or not apart:
        return "ok", f"{last:.0f} ms per step now, {levels[fast]:.0f} at the fastest"
    return "fail", (
        f"{last:.0f} ms per step now, {levels[fast]:.0f} before: check for other processes, overheating and slow data "
        f"loading (data_ms)"
    )


def warm_up(config: RunConfig, seen: Curves) -> Judged:
    """Look for a learning rate that starts at its maximum, or a warm-up that is not shorter than the run."""
    optim = config.optim
    if config.steps <= optim.warmup_steps > 1:
        return "fail", (
            f"the warm-up of {optim.warmup_steps} steps covers all {config.steps} steps, so the learning rate ends at "
            f"its highest value, {optim.lr * config.steps / optim.warmup_steps:g}: lower --optim.warmup-steps"
        )
    if optim.optimizer != "adamw":
        return "ok", f"{optim.warmup_steps} steps with {optim.optimizer}; judged for AdamW only"
    first = seen.first_rate
    if optim.warmup_steps == 1 and config.steps <= SHORT:
        return "unknown", f"{config.steps} steps are too few for a warm-up"
    if optim.warmup_steps <= 1 or (math.isfinite(first) and first > 0.9 * optim.lr):
        return "fail", (
            f"the learning rate is {optim.lr:g} from the first step, before AdamW has moment estimates: "
            f"add --optim.warmup-steps"
        )
    return "ok", f"{optim.warmup_steps} steps of {config.steps:,}"


@dataclass(frozen=True)
class Gap:
    """Gap between validation and training loss at one validation."""

    step: float
    nats: float
    """Validation minus training loss."""
    train_error: float
    """Standard error of the training loss."""
    val_error: float
    """Bound on the sampling error of the validation tokens, which are the same at every validation."""

    @property
    def error(self) -> float:
        """Standard error of the gap in nats."""
        return math.hypot(self.train_error, self.val_error)


def gaps_of(seen: Curves) -> list[Gap]:
    """Return the gaps at all validations with a known training loss."""
    compared = (seen.val_step >= GAPS_AFTER) & np.isfinite(seen.val_level)
    train_error = seen.val_level_error * math.sqrt(autocorrelation_time(seen.recent_loss))
    columns = seen.val_step, seen.val_loss - seen.val_level, train_error, seen.val_error
    return [Gap(*row) for row in np.column_stack(columns)[compared].tolist()]


def latest_gaps(gaps: list[Gap]) -> tuple[Gap, ...]:
    """Return the newest gap and the mean of the newest two, weighted by their precision.

    The newest gap is the least precise one, because there are no later steps yet. The errors of the two gaps are not
    assumed to be independent, because both may use the same steps.
    """
    if len(gaps) == 1:
        return (gaps[0],)
    latest = gaps[-2:]
    weights = [1 / max(gap.train_error, 1e-6) ** 2 for gap in latest]
    nats, train_error = np.average([(g.nats, g.train_error) for g in latest], axis=0, weights=weights).tolist()
    return gaps[-1], Gap(gaps[-1].step, nats, train_error, gaps[-1].val_error)


def val_noise(seen: Curves) -> float:
    """Estimate the standard deviation of the validation losses around their trend; `VAL_NOISE` if they are few."""
    latest = seen.val_loss[-2 * VALS_FOR_NOISE :]
    return noise_deviation(np.diff(latest)) / math.sqrt(3) if len(latest) >= VALS_FOR_NOISE else VAL_NOISE


def overfitting(config: RunConfig, seen: Curves) -> Judged:
    """Look for a validation loss that rises, or falls more slowly than the training loss."""
    gaps = gaps_of(seen)
    if len(gaps) < 2:
        return _no_gap(seen, 2)
    lowest = int(seen.val_loss.argmin())
    rise = float(seen.val_loss[-1] - seen.val_loss[lowest])
    near, now, error = seen.val_level[lowest], seen.val_level[-1], seen.val_level_error[-1]
    allowed = max(VAL_ROSE_BY, val_noise(seen) * (VAL_SIGMAS + math.sqrt(2 * math.log(len(seen.val_loss)))))
    if rise > allowed and now <= near + GAP_SIGMAS * error:
        return "fail", (
            f"the validation loss was {seen.val_loss[lowest]:.4f} at step {seen.val_step[lowest]:.0f} and is "
            f"{seen.val_loss[-1]:.4f} now, while the training loss does not rise: use more data or fewer steps"
        )
    first = gaps[0]
    for last in latest_gaps(gaps[1:]):
        grew = last.nats - first.nats
        allowed = math.hypot(OVERFITTED_BY, GAP_SIGMAS * math.hypot(last.error, first.train_error))
        if grew > allowed and last.nats > OVERFITTED_BY:
            return "fail", (
                f"validation minus training loss has grown from {first.nats:+.2f} to {last.nats:+.2f} at step "
                f"{last.step:.0f}: use more data or fewer steps"
            )
    return _gap_ok(gaps[-1])


def below(config: RunConfig, seen: Curves) -> Judged:
    """Look for a validation loss below the training loss."""
    gaps = gaps_of(seen)
    if not gaps:
        return _no_gap(seen, 1)
    for gap in latest_gaps(gaps):
        if gap.nats < -math.hypot(BELOW_BY, GAP_SIGMAS * gap.error):
            return "fail", (
                f"by {-gap.nats:.2f} nats at step {gap.step:.0f}; possible causes: easier validation text, validation "
                f"text that is also in the training text, or losses that are computed differently"
            )
    return _gap_ok(gaps[-1])


def periodicity(seen: Curves, lengths: Mapping[str, float]) -> Judged:
    """Look for a periodic loss, a sign of data that is not shuffled.

    Args:
        seen: curves of the run.
        lengths: lengths of parts of the data in steps, such as "an epoch".
    """
    needed = 4 * FEWEST_FOR_PERIODS // 3 + 1  # `period` ignores the first quarter
    if seen.updates < needed:
        return _too_short(seen, needed)
    found = period(seen.recent_loss)
    if found is None and seen.row_steps > 1 and (rows := period(seen.loss)) is not None:
        found = rows * seen.row_steps  # too long to be found in the newest steps
    if found is None:
        return "ok", "the loss has no period"
    known = next((part for part, steps in lengths.items() if abs(found / steps - 1) < 0.03), None)
    of = f", the length of {known}" if known else ""
    return "fail", f"period of {found:.0f} steps{of}: shuffle the complete data"


def _gap_ok(gap: Gap) -> Judged:
    return "ok", f"validation minus training loss: {gap.nats:+.2f} at step {gap.step:.0f} (± {gap.error:.2f})"


def _no_gap(seen: Curves, needed: int) -> Judged:
    if not len(seen.val_step):
        return "unknown", "the run has no validation"
    return "unknown", f"needs {counted(needed, 'validation')} after step {GAPS_AFTER}"


def _too_short(seen: Curves, needed: int) -> Judged:
    return "unknown", f"needs {needed:,} steps, the run has {seen.updates:,}"


def _none_seen(seen: Curves, reason: str) -> Judged:
    return ("ok", reason) if seen.steps_seen else ("unknown", "no step is recorded yet")


SYMPTOMS: dict[str, Callable[[RunConfig, Curves], Judged]] = {
    "loss not finite": not_finite,
    "skipped updates": skipped_updates,
    "stuck near ln(V)": stuck,
    "spike": spikes,
    "divergence": diverged,
    "gradient norm growing": gradient,
    "overfitting": overfitting,
    "validation below training": below,
    "throughput drop": throughput,
    "warm-up": warm_up,
}
