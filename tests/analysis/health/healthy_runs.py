"""False alarms of the symptoms, counted in simulated healthy runs.

python -m tests.analysis.health.healthy_runs 100000 150 3000     # 100,000 runs of 150 and of 3,000 steps
"""

from __future__ import annotations

import collections
import dataclasses
import math
import sys
from collections.abc import Callable

import numpy as np

from restomod.analysis.health.history import ERROR_OF_TOKEN, Curves
from restomod.analysis.health.noise import Array, level_at
from restomod.analysis.health.spikes import SpikeFinder
from restomod.analysis.health.symptoms import find_symptoms_in_curves
from tests.runs.made_runs import QUICKSTART

LENGTHS = (60, 130, 150, 200, 400, 1000, 3000)
DEVIATIONS = (0.02, 0.1, 0.3, 0.6)  # nats, for the loss of one step: batches of half a million to 512 tokens
ERROR_OF_VAL = ERROR_OF_TOKEN / math.sqrt(32_768)


def noise(rng: np.random.Generator, steps: int) -> Array:
    """Return noise of unit variance for the loss of each step: normal, heavy-tailed or autocorrelated."""
    kind = rng.integers(4)
    if kind == 0:
        return rng.standard_normal(steps)
    if kind == 1:
        return rng.laplace(0, math.sqrt(0.5), steps)
    white = rng.standard_normal(steps + 7)
    if kind == 2:  # a moving mean of eight steps under the noise of each
        return 0.5 * np.convolve(white, np.full(8, 8**-0.5), "valid") + 0.75**0.5 * rng.standard_normal(steps)
    drift = np.empty(steps)  # autoregressive, over four steps
    at = 0.0
    for i in range(steps):
        at = drift[i] = 0.75 * at + white[i]
    return 0.4 * drift * math.sqrt(1 - 0.75**2) + 0.84**0.5 * rng.standard_normal(steps)


def level(rng: np.random.Generator, steps: int) -> Array:
    """Return the loss without noise before each step and after the last, (steps + 1,), falling from ln(V)."""
    t = np.arange(steps + 1)
    floor = rng.uniform(2.5, 4.5)
    shape = rng.integers(3)
    if shape == 0:  # a power law
        fall = (1 + t / rng.uniform(15, 60)) ** -rng.uniform(0.4, 0.7)
    elif shape == 1:  # two exponentials: words, then the rest
        slow = rng.uniform(0.15, 0.4)
        fall = (1 - slow) * np.exp(-t / rng.uniform(15, 40)) + slow * np.exp(-t / (steps * rng.uniform(0.3, 1.0)))
    else:  # a power law, with the effect of learning-rate decay in the last fifth
        fall = (1 + t / rng.uniform(15, 60)) ** -rng.uniform(0.4, 0.7)
        fall -= rng.uniform(0, 0.03) * np.maximum(0, t / steps - 0.8) / 0.2
    return floor + (10.82 - floor) * fall


def healthy_run(seed: int, steps: int) -> Curves:
    """Return the curves of one healthy run, as from `restomod.analysis.health.history.curves_from_records`."""
    rng = np.random.default_rng((seed, steps))
    t = np.arange(steps, dtype=np.float64)
    truth = level(rng, steps)
    loss = truth[:-1] + rng.choice(DEVIATIONS) * noise(rng, steps)
    norm = 0.4 * (1 + 8 * np.exp(-t / 30)) * (1 + 0.5 * t / steps) * np.exp(rng.normal(0, 0.25, steps))
    ms = 200 * np.exp(rng.normal(0, rng.choice((0.02, 0.08, 0.15)), steps))
    ms *= 1 + (rng.random(steps) < 0.01) * rng.exponential(5, steps)
    every = max(1, steps // int(rng.choice((2, 3, 6, 20))))
    val_step = np.arange(0, steps + 1, every)
    val_loss = truth[val_step] + rng.normal(0, 0.08) + rng.normal(0, rng.choice((0.003, 0.01, 0.02)), len(val_step))
    return gathered(loss, norm, ms, val_step, val_loss)


def gathered(loss: Array, norm: Array, ms: Array, val_step: Array, val_loss: Array) -> Curves:
    """Return the curves of a run of at most `ROWS` steps, without records."""
    t = np.arange(len(loss), dtype=np.float64)
    spikes = SpikeFinder()
    spikes.scan(t, loss, to_the_end=True)
    nothing = np.full(len(val_step), math.nan)
    seen = Curves(
        *(t, loss, norm, ms, 1, len(loss), t, loss, 0.0, val_step.astype(float), val_loss),
        *(np.full(len(val_step), ERROR_OF_VAL), nothing, nothing, spikes.found, [], [], 0, len(loss)),
    )
    levels = np.array([level_at(seen.recent_step, seen.recent_loss, step) or (math.nan, math.nan) for step in val_step])
    return dataclasses.replace(seen, val_level=levels[:, 0], val_level_error=levels[:, 1])


def alarms(runs: int, steps: int, run: Callable[[int, int], Curves] = healthy_run) -> dict[tuple[str, str], list[int]]:
    """Return the seeds of runs with a symptom of status "fail" or "warning"."""
    config = dataclasses.replace(QUICKSTART, steps=steps)
    found: dict[tuple[str, str], list[int]] = collections.defaultdict(list)
    for seed in range(runs):
        for finding in find_symptoms_in_curves(config, run(seed, steps)):
            if finding.status in ("fail", "warning"):
                found[finding.symptom, finding.status].append(seed)
    return dict(found)


if __name__ == "__main__":
    runs, *lengths = map(int, sys.argv[1:])
    for steps in lengths or LENGTHS:
        seen = alarms(runs, steps)
        print(f"{runs:,} runs of {steps:,} steps: {sum(map(len, seen.values()))} false alarms", flush=True)
        for (symptom, status), seeds in seen.items():
            print(f"  {symptom} ({status}): {len(seeds)}, seeds {seeds[:10]}", flush=True)
