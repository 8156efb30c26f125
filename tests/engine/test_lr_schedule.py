"""Learning-rate schedule against torch's schedulers."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from restomod.config.run import Decay, OptimConfig
from restomod.engine.lr_schedule import DECAYS, learning_rate


@pytest.mark.parametrize(("steps", "warmup"), [(50, 10), (50, 1), (200, 60), (12, 10)])
def test_warmup_and_cosine_equal_torchs(steps: int, warmup: int) -> None:
    config = OptimConfig(lr=6e-4, min_lr_ratio=0.1, warmup_steps=warmup)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=6e-4)
    linear = LinearLR(optimizer, start_factor=1 / warmup, total_iters=max(1, warmup - 1))
    cosine = CosineAnnealingLR(optimizer, T_max=steps - 1 - warmup, eta_min=6e-5)
    scheduler = SequentialLR(optimizer, [linear, cosine], milestones=[warmup])
    for step in range(steps):
        assert learning_rate(config, step, steps) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9), step
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("ratio", [0.0, 0.1, 1.0])
def test_last_step_has_exactly_the_smallest_learning_rate(ratio: float) -> None:
    config = OptimConfig(lr=3e-3, min_lr_ratio=ratio, warmup_steps=20)
    assert learning_rate(config, 299, 300) == ratio * 3e-3


@pytest.mark.parametrize(
    ("warmup", "ratio", "step", "steps", "rate"),
    [
        (100, 0.1, 0, 1000, 0.01),  # the first step of a warm-up has a rate above 0
        (100, 0.1, 99, 1000, 1.0),
        (10, 0.2, 60, 111, 0.6),  # halfway down the cosine: the mean of both ends
        (0, 0.1, 0, 3, 1.0),
        (0, 0.1, 1, 3, 0.55),
        (0, 0.1, 0, 1, 1.0),
    ],
)
def test_rates_at_known_steps(warmup: int, ratio: float, step: int, steps: int, rate: float) -> None:
    config = OptimConfig(lr=1.0, min_lr_ratio=ratio, warmup_steps=warmup)
    assert learning_rate(config, step, steps) == pytest.approx(rate)


@pytest.mark.parametrize("warmup", [4, 5, 6, 1000])
def test_the_rate_never_falls_if_the_warmup_is_as_long_as_the_run(warmup: int) -> None:
    config = OptimConfig(lr=1.0, warmup_steps=warmup)
    rates = [learning_rate(config, step, 5) for step in range(5)]
    assert rates == sorted(rates)
    assert 0 < rates[0] <= rates[-1] <= 1.0


def test_every_decay_has_a_function() -> None:
    assert sorted(DECAYS) == sorted(get_args(Decay))


@pytest.mark.parametrize("cooldown", [0.1, 0.4, 1.0])
@pytest.mark.parametrize("decay", DECAYS)
def test_a_decay_falls_from_1_to_0(decay: Decay, cooldown: float) -> None:
    factors = [DECAYS[decay](i / 1000, cooldown) for i in range(1001)]
    assert factors[0] == pytest.approx(1.0)
    assert factors[-1] == pytest.approx(0.0)
    assert factors == sorted(factors, reverse=True)


@pytest.mark.parametrize(
    ("decay", "step", "factor"),
    [
        ("linear", 75, 0.25),
        ("wsd", 60, 1.0),  # a cooldown of 0.4 begins at step 60
        ("wsd", 70, 0.75),
        ("wsd", 90, 0.25),
        ("1-sqrt", 60, 1.0),
        ("1-sqrt", 70, 1 - math.sqrt(0.25)),
        ("1-sqrt", 90, 1 - math.sqrt(0.75)),
    ],
)
def test_decays_at_known_steps(decay: Decay, step: int, factor: float) -> None:
    config = OptimConfig(lr=1.0, min_lr_ratio=0.0, warmup_steps=0, decay=decay, cooldown=0.4)
    assert learning_rate(config, step, 101) == pytest.approx(factor)
