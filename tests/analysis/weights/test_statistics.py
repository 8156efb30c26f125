"""Weight statistics compared with numpy, totals with published numbers, roughness with theory."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from restomod.analysis.weights.statistics import Difference, roughness, tensor_statistics, totals, weight_differences
from restomod.config.presets import preset
from restomod.config.run import ModelConfig


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(0.3, 2.0, shape)).float()


# --- statistics ------------------------------------------------------------------------------------------------


def test_statistics_are_numpys() -> None:
    tensors = {"matrix": noise(30, 7), "vector": noise(11, seed=1), "large": 1e6 + noise(50, seed=2)}
    rows = tensor_statistics(tensors)
    assert [row.name for row in rows] == list(tensors)
    for row, value in zip(rows, tensors.values(), strict=True):
        x = value.numpy().astype(np.float64)
        assert (row.shape, row.count, row.not_finite) == (x.shape, x.size, 0)
        assert row.mean == pytest.approx(x.mean(), rel=1e-12)
        assert row.std == pytest.approx(x.std(), rel=1e-9)  # population standard deviation


def test_one_number_and_numbers_that_are_not_finite() -> None:
    one, bad = tensor_statistics(
        {"one": torch.tensor([3.0]), "bad": torch.tensor([[1.0, math.nan], [math.inf, -math.inf]])}
    )
    assert (one.mean, one.std, one.not_finite, bad.not_finite) == (3.0, 0.0, 0, 3)


# --- totals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters", "without_embeddings"),
    [
        ("gpt2-124m", 124_439_808, 85_056_000),
        ("gpt2-355m", 354_823_168, 302_311_424),
        ("gpt2-774m", 774_030_080, 708_390_400),
        ("gpt2-1558m", 1_557_611_200, 1_475_561_600),
    ],
)
def test_totals_of_openais_models_are_the_published_ones(name: str, parameters: int, without_embeddings: int) -> None:
    table = dict(totals(preset(name).model))
    assert table["parameters"] == f"{parameters:,}"
    assert table["without embeddings"] == f"{without_embeddings:,}"


def test_memory_and_work_of_gpt2() -> None:
    """Check values computed manually.

    Bytes: 4 * (124,439,808 parameters + 47 padded rows of 768). FLOPs: 6 * 123,653,376 + 12 * 12 * 768 * 1024.
    """
    table = dict(totals(ModelConfig()))
    assert table["weights"] == "0.50 GB in fp32"  # 497,903,616 bytes
    assert table["gradients"] == "0.50 GB"
    assert table["optimizer state"] == "1.00 GB with AdamW"
    assert table["training memory"].startswith("1.99 GB ")
    assert table["FLOPs per token"].startswith("855 million")
    assert table["tied lm_head"].startswith("saves 38,597,376 ")


def test_memory_counts_the_padding() -> None:
    D = 1248
    config = ModelConfig(n_layer=1, n_head=1, n_embd=D, n_positions=1, vocab_size=1)
    parameters = (1 + 1) * D + (12 * D**2 + 13 * D) + 2 * D  # embeddings, the block, the last norm
    without, with_padding = (f"{4 * n / 1e9:.2f} GB in fp32" for n in (parameters, parameters + 63 * D))
    assert dict(totals(config))["weights"] == with_padding != without


# --- roughness -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("series", "expected", "rel", "abs_"),
    [
        (noise(1024, 256), 1, 0.01, 0),  # white noise
        (
            torch.sin(2 * math.pi * 3 * torch.arange(1024) / 1024)[:, None],
            1 - math.cos(2 * math.pi * 3 / 1024),
            0.01,
            0,
        ),
        (noise(1024, 64).cumsum(0), 0, 0, 0.05),  # a random walk
        # von Neumann's ratio approaches 4: sum of jumps 4 (n - 1), twice the spread 2 n
        (torch.tensor([1.0, -1.0]).repeat(50)[:, None], 4 * 99 / 200, 1e-12, 0),
        # n - 1 jumps of 1, and a spread of n (n^2 - 1) / 12
        (torch.arange(50)[:, None], 49 / (50 * (50**2 - 1) / 6), 1e-12, 0),
    ],
    ids=["noise", "wave", "walk", "alternating", "line"],
)
def test_roughness_has_a_theory(series: Tensor, expected: float, rel: float, abs_: float) -> None:
    assert roughness(series) == pytest.approx(expected, rel=rel, abs=abs_)


def test_roughness_is_numpys_for_any_mean_and_scale() -> None:
    x = noise(40, 5)
    y = x.numpy().astype(np.float64)
    by_hand = np.mean((np.diff(y, axis=0) ** 2).sum(0) / (2 * ((y - y.mean(0)) ** 2).sum(0)))
    assert roughness(x) == pytest.approx(by_hand, rel=1e-12)
    assert roughness(x * 1000 + 50) == pytest.approx(by_hand, rel=1e-4)


@pytest.mark.parametrize("constant", [0.0, 0.1, 1 / 3, -7e-20])
@pytest.mark.parametrize("n", [2, 3, 10, 1024])
def test_a_channel_that_does_not_vary_is_left_out(constant: float, n: int) -> None:
    """Check channels whose variance may be a rounding error, because 0.1 + 0.1 + 0.1 is not 3 * 0.1."""
    x = noise(n, 2).double()
    still = torch.full((n, 1), constant, dtype=torch.float64)
    assert roughness(torch.cat([x, still], dim=1)) == roughness(x)
    assert math.isnan(roughness(still))
    assert math.isnan(roughness(x[:1]))


# --- differences -----------------------------------------------------------------------------------------------


def difference(a: Tensor, b: Tensor) -> Difference:
    (row,) = weight_differences({"x": a}, {"x": b})
    return row


def test_differences_are_numpys() -> None:
    a, b = noise(30, 7), noise(30, 7, seed=1)
    row = difference(a, b)
    x, y = (t.numpy().astype(np.float64).ravel() for t in (a, b))
    assert row.largest == pytest.approx(np.abs(x - y).max(), rel=1e-12)
    assert row.relative == pytest.approx(np.linalg.norm(x - y) / np.linalg.norm(x), rel=1e-12)
    assert row.cosine == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y), rel=1e-9)
    assert not row.identical


def test_equal_tensors_are_identical() -> None:
    for value in (noise(5, 5), torch.zeros(3), torch.tensor([1.0, math.inf])):
        row = difference(value, value.clone())
        assert row.identical
        assert (row.largest, row.relative, row.cosine, row.remark) == (0.0, 0.0, 1.0, "")


def test_the_smallest_difference_counts() -> None:
    a = noise(5, 5)
    b = a.clone()
    b[2, 2] = torch.nextafter(b[2, 2], torch.tensor(math.inf))
    row = difference(a, b)
    assert not row.identical
    assert 0 < row.largest < 1e-6


ZEROS, ONES, NINE = torch.zeros(4), torch.ones(4), noise(9)


@pytest.mark.parametrize(
    ("a", "b", "relative", "cosine"),
    [
        (NINE, -NINE, 2, -1),
        (NINE, 2 * NINE, 1, 1),
        (ZEROS, ONES, math.inf, math.nan),  # zeros have no direction
        (ONES, ZEROS, 1, math.nan),
    ],
)
def test_relative_change_and_cosine(a: Tensor, b: Tensor, relative: float, cosine: float) -> None:
    row = difference(a, b)
    assert (row.relative, row.cosine) == pytest.approx((relative, cosine), nan_ok=True)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_number_that_is_not_finite_in_one_is_seen(bad: float) -> None:
    a, b = torch.ones(4), torch.tensor([1.0, bad, 1.0, 1.0])
    for row in (difference(a, b), difference(b, a)):
        assert not row.identical
        assert not math.isfinite(row.largest)


def test_a_tensor_that_one_lacks_and_one_of_another_shape_are_said() -> None:
    first = {"both": torch.ones(2), "gone": torch.ones(2), "grown": torch.ones(2, 3)}
    second = {"new": torch.ones(2), "grown": torch.ones(3, 2), "both": torch.ones(2)}
    rows = {row.name: row for row in weight_differences(first, second)}
    assert list(rows) == ["both", "gone", "grown", "new"]
    assert rows["both"].identical
    assert [rows[name].remark for name in ("gone", "grown", "new")] == [
        "only in the first",
        "(2, 3) and (3, 2)",
        "only in the second",
    ]
    assert not any(rows[name].identical for name in ("gone", "grown", "new"))
