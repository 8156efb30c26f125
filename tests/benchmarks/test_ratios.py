"""Tests of the bootstrap interval of paired rounds against the binomial distribution and scipy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from benchmarks.ratios import paired_ratio


def test_the_result_is_the_median_of_ratios_not_the_ratio_of_medians() -> None:
    ours, theirs = [1.0, 10.0, 4.0], [2.0, 5.0, 8.0]  # ratios 0.5, 2, 0.5; medians 4 and 5
    assert paired_ratio(ours, theirs).median == 0.5


@pytest.mark.parametrize("n", [3, 5, 9, 13, 27])
def test_interval_of_an_odd_number_of_rounds_follows_the_binomial_distribution(n: int) -> None:
    """The median of n draws is at most the k-th smallest value if most of the draws are among the k smallest."""
    values = np.random.default_rng(n).lognormal(size=n)
    at_most = [stats.binom.sf((n + 1) // 2 - 1, n, k / n) for k in range(1, n + 1)]
    k = next(k for k, p in enumerate(at_most) if p > 0.025)
    assert min(abs(p - 0.025) for p in at_most) > 0.003, "too close to a step of the distribution for a random test"
    ordered = np.sort(values)
    found = paired_ratio(values.tolist(), [1.0] * n)
    assert found.median == pytest.approx(ordered[n // 2])
    assert found.low == pytest.approx(ordered[k])
    assert found.high == pytest.approx(ordered[n - 1 - k])


def test_interval_equals_that_of_scipy() -> None:
    draw = np.random.default_rng(0)
    ours, theirs = draw.lognormal(1, 0.2, 12), draw.lognormal(0, 0.2, 12)

    def median_of_ratios(a: np.ndarray, b: np.ndarray, axis: int) -> np.ndarray:
        return np.median(a / b, axis=axis)

    expected = stats.bootstrap(
        (ours, theirs), median_of_ratios, paired=True, method="percentile", n_resamples=20_000, random_state=1
    ).confidence_interval
    found = paired_ratio(ours.tolist(), theirs.tolist())
    width = expected.high - expected.low
    assert found.low == pytest.approx(expected.low, abs=0.05 * width)
    assert found.high == pytest.approx(expected.high, abs=0.05 * width)


def test_a_slow_machine_in_some_rounds_cancels() -> None:
    theirs = [1.0, 7.0, 2.0, 30.0, 1.5]
    found = paired_ratio([2 * x for x in theirs], theirs)
    assert (found.low, found.median, found.high) == (2.0, 2.0, 2.0)


def test_one_round_has_no_interval() -> None:
    found = paired_ratio([3.0], [2.0])
    assert (found.median, found.low, found.high) == (1.5, None, None)


@pytest.mark.parametrize(("ours", "theirs"), [([], []), ([1.0, 2.0], [1.0])])
def test_unpaired_rounds_are_rejected(ours: list[float], theirs: list[float]) -> None:
    with pytest.raises(ValueError, match=r"no rounds|shorter|longer"):
        paired_ratio(ours, theirs)
