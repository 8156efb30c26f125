"""Known-answer arithmetic about a model: its parameters and the work of training it. Needs no torch."""

from __future__ import annotations

import re

from restomod.config import ModelConfig


def parameter_count(config: ModelConfig) -> int:
    """Parameters of a GPT-2, the tied head counted once and padding not at all (124,439,808 for the smallest)."""
    D = config.n_embd
    attention = D * 3 * D + 3 * D + D * D + D
    mlp = D * 4 * D + 4 * D + 4 * D * D + D
    block = 2 * D + attention + 2 * D + mlp
    return (config.vocab_size + config.n_positions) * D + config.n_layer * block + 2 * D


def flops_per_token(config: ModelConfig, sequence_length: int) -> int:
    """Floating-point operations of a forward and backward pass, per token.

    6 per parameter that takes part in a product (the position embeddings do not; the token embeddings do, as the
    tied head), and 12 * n_layer * n_embd * T for attention's two products, counted over the full square. Source:
    Chowdhery et al., "PaLM", 2022, appendix B. GPT-2 124M at T = 1024: 855 MFLOP.
    """
    in_products = parameter_count(config) - config.n_positions * config.n_embd
    return 6 * in_products + 12 * config.n_layer * config.n_embd * sequence_length


# dense bf16 peaks in FLOP/s, from the makers' data sheets, by a part of the name that the driver reports
PEAK_FLOPS = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "L40S": 362e12,
    "RTX 3090": 71e12,
    "RTX 4090": 165e12,
}


def peak_flops(device_name: str) -> float | None:
    """Peak dense bf16 FLOP/s of a whole desktop or server GPU by name, or None where it is not known."""
    if re.search(r"Laptop|Max-Q|MIG", device_name):
        return None
    return next((peak for part, peak in PEAK_FLOPS.items() if re.search(rf"\b{part}\b", device_name)), None)


def mfu(tokens_per_second: float, flops_per_token: float, peak: float | None) -> float | None:
    """Model FLOP utilisation: the share of the device's peak that goes into the model; None if unknown."""
    return tokens_per_second * flops_per_token / peak if peak else None
