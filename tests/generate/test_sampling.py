"""Sampling compared with `transformers`' logits warpers and with expected frequencies."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from restomod.config.run import SamplingConfig
from restomod.generate.sampling import candidates, next_tokens
from restomod.utils.errors import UserError

LOGITS = [0.3, -1.0, 2.0, 0.0, 1.1, -0.4, 0.9, 0.25]


def drawing(temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> SamplingConfig:
    return SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p)


def ours(logits: Tensor, sampling: SamplingConfig) -> Tensor:
    """Probability of every token, (B, V) float64."""
    weights, ids = candidates(logits, sampling)
    return torch.zeros(logits.shape, dtype=torch.float64).scatter_add_(-1, ids, weights / weights.sum(-1, keepdim=True))


def theirs(logits: Tensor, sampling: SamplingConfig) -> Tensor:
    """Probability of every token, (B, V) float64, from `transformers`."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    return torch.softmax(warpers(torch.zeros(len(logits), 1, dtype=torch.long), logits.double()), -1)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [0, 1, 2, 50, 299, 300, 1000])
@pytest.mark.parametrize("top_p", [1e-9, 0.1, 0.5, 0.9, 0.999, 1.0])
def test_candidates_are_those_of_transformers(temperature: float, top_k: int, top_p: float) -> None:
    logits = 3 * torch.randn(7, 300, generator=torch.Generator().manual_seed(0))
    sampling = drawing(temperature, top_k, top_p)
    torch.testing.assert_close(ours(logits, sampling), theirs(logits, sampling), rtol=1e-9, atol=0)


@given(st.lists(st.floats(-30, 30, width=16), min_size=2, max_size=12, unique=True), st.floats(0.01, 1), st.data())
def test_the_nucleus_is_the_smallest_set_that_reaches_p(logits: list[float], top_p: float, data: st.DataObject) -> None:
    probabilities = torch.softmax(torch.tensor(logits, dtype=torch.float64), -1)
    falling = sorted(probabilities.tolist(), reverse=True)
    mass, size = 0.0, 0
    while mass < top_p - 1e-12 and size < len(falling):
        mass, size = mass + falling[size], size + 1
    kept = int((ours(torch.tensor([logits]), drawing(top_p=top_p)) > 0).sum())
    assert kept == size or abs(sum(falling[: min(kept, size)]) - top_p) < 1e-9


def test_top_p_keeps_the_token_that_reaches_p() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    kept = {p: (ours(logits, drawing(top_p=p)) > 0).sum().item() for p in (0.4, 0.5, 0.51, 0.75, 0.8, 1.0)}
    assert kept == {0.4: 1, 0.5: 1, 0.51: 2, 0.75: 2, 0.8: 3, 1.0: 4}
    even = torch.zeros(1, 4)  # probability 1/4 each
    assert [(ours(even, drawing(top_p=p)) > 0).sum().item() for p in (0.25, 0.5, 0.75)] == [1, 2, 3]


def test_ties_with_the_last_of_the_top_k_are_kept() -> None:
    logits = torch.tensor([[3.0, 1.0, 1.0, 1.0, 0.0, -1.0], [5.0, 4.0, 3.0, 2.0, 1.0, 0.0]])
    sampling = drawing(top_k=2)
    assert (ours(logits, sampling) > 0).sum(-1).tolist() == [4, 2]
    torch.testing.assert_close(ours(logits, sampling), theirs(logits, sampling))


def draws(sampling: SamplingConfig, n: int = 20_000) -> Tensor:
    """Number of draws of each token."""
    uniforms = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).tolist()
    return torch.bincount(next_tokens(torch.tensor([LOGITS] * n), sampling, uniforms), minlength=len(LOGITS))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("top_k", [0, 3, 8, 1000])
@pytest.mark.parametrize("top_p", [0.7, 1.0])
def test_draws_follow_the_distribution_of_transformers(temperature: float, top_k: int, top_p: float) -> None:
    sampling = drawing(temperature, top_k, top_p)
    expected = 20_000 * theirs(torch.tensor([LOGITS]), sampling)[0]
    counts = draws(sampling)
    assert (counts[expected == 0] == 0).all()
    drawn = expected > 0
    chi_square = ((counts - expected)[drawn] ** 2 / expected[drawn]).sum()
    assert chi_square < 24.3  # p = 0.001 at 7 degrees of freedom


@pytest.mark.parametrize("sampling", [drawing(), drawing(top_k=3), drawing(top_p=0.8)])
def test_extreme_uniform_numbers_draw_candidates_only(sampling: SamplingConfig) -> None:
    possible = theirs(torch.tensor([LOGITS]), sampling)[0] > 0
    for uniform in (0.0, 1 - 2**-53):
        assert possible[next_tokens(torch.tensor([LOGITS]), sampling, [uniform])]


def test_a_token_without_weight_is_never_drawn() -> None:
    never = float("-inf")
    logits = torch.tensor([[never, 0.0, never, 0.0]] * 2)
    assert next_tokens(logits, drawing(), [0.0, 0.5]).tolist() == [1, 3]


def test_temperature_0_takes_the_most_likely_token() -> None:
    assert draws(drawing(0.0), n=10).tolist() == [0, 0, 10, 0, 0, 0, 0, 0]


def test_a_tiny_temperature_equals_0() -> None:
    assert draws(drawing(1e-320), n=10).tolist() == [0, 0, 10, 0, 0, 0, 0, 0]


def test_each_row_is_drawn_from_its_own_logits_and_number() -> None:
    logits = torch.full((5, 9), -1e9)
    logits[range(5), [8, 0, 3, 3, 1]] = 1e9
    assert next_tokens(logits, drawing(), [0.5] * 5).tolist() == [8, 0, 3, 3, 1]
    uniforms = [0.05, 0.95, 0.35, 0.65]
    assert next_tokens(torch.zeros(4, 10), drawing(), uniforms).tolist() == [0, 9, 3, 6]


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_refused(wrong: float, temperature: float) -> None:
    with pytest.raises(UserError, match="not finite"):
        next_tokens(torch.tensor([[0.0, wrong, 1.0]]), drawing(temperature), [0.5])
