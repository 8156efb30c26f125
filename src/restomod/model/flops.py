"""Known-answer arithmetic about a model: its parameters and the work of training it. Needs no torch."""

from __future__ import annotations

import re

from restomod.config.run import ModelConfig


def parameter_count(config: ModelConfig) -> int:
    """Parameters of a model, a tied head counted once and padding not at all (124,439,808 for the smallest GPT-2)."""
    D, width, bias = config.n_embd, config.n_head * config.head_size, int(config.bias)
    units = config.inner_size * (2 if config.mlp == "swiglu" else 1)
    norm = D * (2 if config.norm == "layernorm" and config.bias else 1)
    attention = (D + bias) * 3 * width + (width + bias) * D + (2 * config.head_size if config.qk_norm else 0)
    mlp = (D + bias) * units + (config.inner_size + bias) * D
    skips = 2 * (D * config.embedding_skip + width * config.value_embedding)
    block = norm + attention + norm + mlp + skips
    return embedding_parameters(config) + D * config.embedding_norm + config.n_layer * block + norm


def padded_parameters(config: ModelConfig) -> int:
    """Parameters as they lie in memory, with the vocabulary's extra rows."""
    tables = (1 if config.tied else 2) * config.n_embd
    tables += config.n_head * config.head_size if config.value_embedding else 0
    return parameter_count(config) + (config.padded_vocab_size - config.vocab_size) * tables


def embedding_parameters(config: ModelConfig) -> int:
    """Parameters of the embeddings and the head, without padding."""
    vocabularies = 1 if config.tied else 2
    positions = config.n_positions if config.positions == "learned" else 0
    values = config.vocab_size * config.n_head * config.head_size if config.value_embedding else 0
    return (vocabularies * config.vocab_size + positions) * config.n_embd + values


def flops_per_token(config: ModelConfig, sequence_length: int) -> int:
    """Floating-point operations of a forward and backward pass, per token.

    6 per parameter that takes part in a product (embeddings do not; a tied one does, as the head), and 12 * n_layer *
    n_head * head_size * T for attention's two products, counted over the full square. Source: Chowdhery et al.,
    "PaLM", 2022, appendix B. GPT-2 124M at T = 1024: 855 MFLOP.
    """
    head = config.vocab_size * config.n_embd
    in_products = parameter_count(config) - embedding_parameters(config) + head
    return 6 * in_products + 12 * config.n_layer * config.n_head * config.head_size * sequence_length


# dense bf16 peaks in FLOP/s, from the makers' data sheets, by a part of the name that the driver reports
PEAK_FLOPS = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "L40S": 362e12,
    "RTX 3090 Ti": 80e12,
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
