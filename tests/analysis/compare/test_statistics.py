"""Means, and Welch's test, against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest

from restomod.analysis.compare.statistics import summarize, welch


def test_a_summary_is_numpys() -> None:
    values = [4.1, 4.3, 3.9, 4.4]
    found = summarize(values)
    assert (found.n, found.mean) == (4, pytest.approx(np.mean(values)))
    assert found.sd == pytest.approx(np.std(values, ddof=1))
    assert found.shown(2) == "4.17 ± 0.22"


def test_one_value_has_no_deviation() -> None:
    assert summarize([4.25]).sd is None
    assert summarize([4.25]).shown(2) == "4.25"


@pytest.mark.parametrize("d", [0.5, -3.0, 40.0])
def test_two_pairs_of_equal_variance_have_a_closed_form(d: float) -> None:
    # variances 2 and 2 of 2 values each: t = d / sqrt(2), 2 degrees of freedom, P(|T| > t) = 1 - t / sqrt(t² + 2)
    found = welch([0.0, 2.0], [d, d + 2.0])
    assert found is not None
    t = d / math.sqrt(2)
    assert (found.difference, found.t, found.df) == pytest.approx((d, t, 2.0))
    assert found.p == pytest.approx(1 - abs(t) / math.sqrt(t * t + 2), rel=1e-6)
    quantile = 0.95 * math.sqrt(2 / (1 - 0.95**2))  # 4.303
    assert (found.low, found.high) == pytest.approx((d - quantile * math.sqrt(2), d + quantile * math.sqrt(2)))


def test_unequal_variances_and_numbers_follow_welchs_formulas() -> None:
    a, b = [3.31, 3.29, 3.30, 3.32, 3.28], [3.20, 3.29, 3.15]
    va, vb = np.var(a, ddof=1) / 5, np.var(b, ddof=1) / 3
    t, df = (np.mean(b) - np.mean(a)) / math.sqrt(va + vb), (va + vb) ** 2 / (va**2 / 4 + vb**2 / 2)
    # the tail of Student's density, integrated: x = |t| + tan²-like substitution x = |t| / u, u in (0, 1]
    u = (np.arange(2_000_000) + 0.5) / 2_000_000
    x = abs(t) / u
    constant = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
    p = 2 * np.mean(constant * (1 + x * x / df) ** (-(df + 1) / 2) * abs(t) / u**2)
    found = welch(a, b)
    assert found is not None
    assert (found.t, found.df, found.p) == pytest.approx((t, df, p), rel=1e-5)
    assert found.low < found.difference < found.high
    assert (found.low < 0 < found.high) == (found.p > 0.05)


@pytest.mark.parametrize(("a", "b"), [([1.0], [2.0, 3.0]), ([1.0, 2.0], [3.0]), ([1.0, 1.0], [2.0, 2.0])])
def test_what_cannot_be_tested_is_not(a: list[float], b: list[float]) -> None:
    assert welch(a, b) is None


def test_chance_alone_is_significant_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    tests = [welch(rng.normal(0, 1, 3).tolist(), rng.normal(0, 3, 5).tolist()) for _ in range(2000)]
    assert np.mean([t is not None and t.p < 0.05 for t in tests]) == pytest.approx(0.05, abs=0.015)
