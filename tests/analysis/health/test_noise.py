"""Level, noise and period of noisy curves with known parameters."""

from __future__ import annotations

import numpy as np
import pytest

from restomod.analysis.health.history import curves_from_records
from restomod.analysis.health.noise import (
    Array,
    autocorrelation_time,
    blocks,
    level_at,
    moving_median,
    noise_deviation,
    period,
)
from tests.runs.made_runs import healthy, quickstart_records, train, val


def falling(n: int, sigma: float, seed: int) -> Array:
    t = np.arange(n)
    return 3 + 7 * (1 + t / 30) ** -0.5 + sigma * np.random.default_rng(seed).standard_normal(n)


def test_the_noise_on_a_trend_is_estimated_despite_outliers() -> None:
    x = falling(3000, 0.3, 0)
    x[::50] += 5
    assert noise_deviation(x) == pytest.approx(0.3, rel=0.07)
    assert noise_deviation(x[:1]) == 0


def test_the_last_block_is_the_newest() -> None:
    assert blocks(np.arange(7.0), 3).tolist() == [[1, 2, 3], [4, 5, 6]]


def test_the_level_and_its_error_are_those_of_a_least_squares_line() -> None:
    rng = np.random.default_rng(1)
    off = []
    for _ in range(300):
        loss = 5 - 0.01 * np.arange(400) + 0.5 * rng.standard_normal(400)
        for step in (200, 400):  # within the curve, and at its end
            level = level_at(np.arange(400.0), loss, step)
            assert level is not None
            off.append((level[0] - (5 - 0.01 * step)) / level[1])
    assert np.mean(off) == pytest.approx(0, abs=0.15)
    assert np.std(off) == pytest.approx(1, abs=0.12)
    assert level_at(np.arange(20.0), np.full(20, 5.0), 20) is None


def test_records_are_sorted_and_the_later_counts() -> None:
    overflow = "fp16 gradients overflowed, so the loss scale is halved"
    records = [
        *(train(3, 4.0), train(1, 6.0), train(1, 5.0), val(2, 7.0), {"kind": "rollback", "step": 1}),
        *(train(4, 99.0, skipped="the loss is 99"), train(5, None, grad_norm=None, skipped="the loss is nan")),
        *(train(6, 4.0, grad_norm=None, skipped=overflow), {"kind": "train"}, {"step": "x", "kind": "train"}),
    ]
    seen = curves_from_records(records)
    assert (seen.step.tolist(), seen.loss.tolist()) == ([1, 3], [5, 4])
    assert [step for step, _ in seen.skipped] == [4, 5]
    assert (seen.not_finite, seen.rollbacks, seen.steps_seen) == ([5], 1, 7)
    assert (seen.val_step.tolist(), seen.val_loss.tolist()) == ([2], [7])


@pytest.mark.parametrize("length", [40, 100, 225])
def test_repeated_batches_are_found_with_their_period(length: int) -> None:
    rng = np.random.default_rng(length)
    same = np.resize(rng.standard_normal(length), 900)
    assert period(falling(900, 0, 0) + 0.3 * same + 0.3 * rng.standard_normal(900)) == length


@pytest.mark.parametrize(("n", "length", "size"), [(900, 60, 0.8), (3000, 200, 0.5), (19_000, 190, 0.3)])
def test_a_wave_is_found_with_about_its_length(n: int, length: int, size: float) -> None:
    for seed in range(10):
        wave = size * 0.6 * np.sin(2 * np.pi * np.arange(n) / length)
        assert period(falling(n, 0.6, seed) + wave) == pytest.approx(length, rel=0.1)


def test_noise_does_not_repeat_itself() -> None:
    found = [
        s for s in range(300) if period(curves_from_records(healthy(s, (150, 300, 900, 3000)[s % 4])).loss) is not None
    ]
    assert found == []
    assert period(curves_from_records(quickstart_records()).loss) is None


def test_a_constant_or_short_curve_has_no_period() -> None:
    assert period(np.full(900, 3.0)) is None
    assert period(np.resize([0.0, 1.0], 100)) is None


@pytest.mark.parametrize(("rho", "truth"), [(0.0, 1.0), (0.5, 3.0), (0.7, 17 / 3)])
def test_the_autocorrelation_time_is_that_of_autoregressive_noise(rho: float, truth: float) -> None:
    """Compare with the closed form (1 + rho) / (1 - rho); removing the trend lowers the estimate by up to half."""
    white = np.random.default_rng(0).standard_normal(20_000)
    noise = np.empty_like(white)
    at = 0.0
    for i, shock in enumerate(white):
        at = noise[i] = rho * at + shock
    assert max(1.0, truth / 2) <= autocorrelation_time(falling(20_000, 0, 0) + noise) <= 1.1 * truth


def test_the_moving_median_equals_a_direct_computation() -> None:
    values = np.random.default_rng(0).exponential(size=500)
    padded = np.pad(values, 40, mode="reflect")
    every = np.array([np.median(padded[i : i + 81]) for i in range(500)])
    assert moving_median(values, 40)[::5] == pytest.approx(every[::5])
    assert moving_median(values, 40) == pytest.approx(every, abs=0.2)
