"""Parameter counts, FLOPs per token, MFU and peak FLOP/s against known values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from restomod.config.run import ModelConfig
from restomod.model.flops import (
    embedding_parameters,
    flops_per_token,
    mfu,
    padded_parameters,
    parameter_count,
    peak_flops,
)
from restomod.model.gpt import GPT


@pytest.mark.parametrize(
    ("shape", "parameters"),
    [
        ((12, 12, 768), 124_439_808),
        ((24, 16, 1024), 354_823_168),
        ((36, 20, 1280), 774_030_080),
        ((48, 25, 1600), 1_557_611_200),
    ],
)
def test_parameters_and_flops_of_the_four_gpt2_sizes_match_closed_forms(
    shape: tuple[int, int, int], parameters: int
) -> None:
    config, (L, _, D), T = ModelConfig(*shape), shape, 1024
    assert parameter_count(config) == parameters == 12 * L * D * D + 13 * L * D + 2 * D + (50257 + 1024) * D
    assert padded_parameters(config) == parameters + 47 * D
    assert embedding_parameters(config) == (50257 + 1024) * D
    assert flops_per_token(config, T) == 6 * (parameters - 1024 * D) + 12 * L * D * T  # PaLM, appendix B


def test_gpt2_124m_takes_855_mflop_per_token_at_1024_positions() -> None:
    assert round(flops_per_token(ModelConfig(), 1024) / 1e6) == 855


def test_flops_per_token_equal_torchs_count_plus_6_per_bias_and_norm_parameter() -> None:
    # torch counts matmuls only; ours also has 6 for every parameter of biases and norms. The vocabulary is a multiple
    # of 64, so that there is no padding.
    config = ModelConfig(n_layer=3, n_head=2, n_embd=32, n_positions=16, vocab_size=128)
    model, B, T = GPT(config), 2, 16
    tokens = torch.zeros(B, T, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # attention as plain matmuls
        model(tokens).sum().backward()
    outside_matmuls = sum(p.numel() for p in model.parameters() if p.ndim == 1)
    assert flops_per_token(config, T) - 6 * outside_matmuls == counter.get_total_flops() / (B * T)


@pytest.mark.parametrize(
    ("speed", "flops", "peak", "share"),
    [
        (100_000, 855e6, 312e12, pytest.approx(0.274, abs=0.0005)),
        (1e6, 989e6, 989e12, 1.0),
        (100_000, 855e6, None, None),
    ],
)
def test_mfu_is_the_share_of_a_known_peak(speed: float, flops: float, peak: float | None, share: Any) -> None:
    assert mfu(speed, flops, peak) == share


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 3090", 71e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("Tesla T4", None),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("AMD EPYC 7763 64-Core Processor, 2 threads", None),
        ("Apple M3", None),
        ("", None),
    ],
)
def test_peak_flops_by_device_name(name: str, peak: float | None) -> None:
    assert peak_flops(name) == peak
