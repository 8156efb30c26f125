"""Known answers: parameters, the work per token, and shares of a GPU's peak."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from restomod.config.run import ModelConfig
from restomod.model.flops import flops_per_token, mfu, parameter_count, peak_flops
from restomod.model.gpt import GPT

GPT2_SIZES = {
    (12, 12, 768): 124_439_808,
    (24, 16, 1024): 354_823_168,
    (36, 20, 1280): 774_030_080,
    (48, 25, 1600): 1_557_611_200,
}


@pytest.mark.parametrize(("shape", "parameters"), GPT2_SIZES.items())
def test_parameters_of_the_four_gpt2_sizes(shape: tuple[int, int, int], parameters: int) -> None:
    assert parameter_count(ModelConfig(*shape)) == parameters


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(),
        ModelConfig(n_layer=1, n_head=1, n_embd=1, n_positions=1, vocab_size=1),
        ModelConfig(n_layer=3, n_head=4, n_embd=48, n_positions=24, vocab_size=211),
        ModelConfig(n_layer=5, n_head=2, n_embd=64, n_positions=7, vocab_size=128),
    ],
)
def test_parameter_count_is_that_of_the_modules_without_the_padding(config: ModelConfig) -> None:
    with torch.device("meta"):
        parameters = list(GPT(config).parameters())
    padding = (config.padded_vocab_size - config.vocab_size) * config.n_embd
    assert parameter_count(config) == sum(p.numel() for p in parameters) - padding


def test_gpt2_124m_takes_855_mflop_per_token_at_1024_positions() -> None:
    assert round(flops_per_token(ModelConfig(), 1024) / 1e6) == 855


def test_flops_per_token_is_what_torch_counts_plus_6_per_bias_and_norm() -> None:
    # torch counts matrix products only; the formula takes 6 for every parameter but the positions, and so also for
    # biases and norms, which take part in no product. The vocabulary is a multiple of 64: no padding to account for.
    config = ModelConfig(n_layer=3, n_head=2, n_embd=32, n_positions=16, vocab_size=128)
    model, B, T = GPT(config), 2, 16
    tokens = torch.zeros(B, T, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # attention as plain products
        model(tokens).sum().backward()
    in_no_product = sum(p.numel() for p in model.parameters() if p.ndim == 1)
    assert flops_per_token(config, T) - 6 * in_no_product == counter.get_total_flops() / (B * T)


def test_mfu_is_the_share_of_the_peak() -> None:
    assert mfu(100_000, 855e6, 312e12) == pytest.approx(0.274, abs=0.0005)


def test_mfu_is_1_where_all_of_the_peak_is_used() -> None:
    assert mfu(1e6, 989e6, 989e12) == 1.0


def test_mfu_is_unknown_where_the_peak_is() -> None:
    assert mfu(100_000, 855e6, None) is None


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
    ],
)
def test_peak_of_gpus_as_the_driver_names_them(name: str, peak: float) -> None:
    assert peak_flops(name) == peak


@pytest.mark.parametrize(
    "name",
    ["Tesla T4", "NVIDIA RTX A1000", "AMD EPYC 7763 64-Core Processor, 2 threads", "Apple M3", ""],
)
def test_peak_of_anything_else_is_unknown(name: str) -> None:
    assert peak_flops(name) is None
