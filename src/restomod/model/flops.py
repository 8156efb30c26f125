"""Parameter counts, FLOPs per token, and MFU.

Counts come from the model itself, built on the meta device; torch is imported when the first one is asked for.
"""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

from restomod.config.model import ModelConfig


class Counts(NamedTuple):
    """Numbers of parameters."""

    padded: int
    """In memory, with the padding rows of the vocabulary."""
    total: int
    """Without padding; a tied lm_head counts once."""
    embeddings: int
    """Of all embeddings and an untied lm_head, without padding."""


@functools.lru_cache
def _counts(config: ModelConfig) -> Counts:
    import torch

    from restomod.model.gpt import GPT

    with torch.device("meta"):
        model = GPT(config)
    padded = sum(p.numel() for p in model.parameters())
    padding = (config.padded_vocab_size - config.vocab_size) * sum(m.shape[1] for m in model.vocabulary_matrices())
    tables = [m.weight for m in model.modules() if isinstance(m, torch.nn.Embedding) or m is model.lm_head]
    return Counts(padded, padded - padding, sum(table.numel() for table in tables) - padding)


def parameter_count(config: ModelConfig) -> int:
    """Number of parameters without padding; a tied lm_head counts once (124,439,808 for the smallest GPT-2)."""
    return _counts(config).total


def padded_parameters(config: ModelConfig) -> int:
    """Number of parameters in memory, with the padding rows of the vocabulary."""
    return _counts(config).padded


def embedding_parameters(config: ModelConfig) -> int:
    """Number of parameters of embeddings and an untied lm_head, without padding."""
    return _counts(config).embeddings


def flops_per_token(config: ModelConfig, sequence_length: int) -> int:
    """Floating-point operations of a forward and backward pass, per token.

    6 per parameter outside the embeddings (a matmul uses each weight once per token: 2 forward, 4 backward), 6 per
    weight of the lm_head, and 12 * n_layer * n_head * head_size * T for the two matmuls of attention over the full
    square. All parameters of a new part count so. Source: Chowdhery et al., "PaLM", 2022, appendix B. GPT-2 124M at
    T = 1024: 855 MFLOP.
    """
    counts, head = _counts(config), config.vocab_size * config.n_embd
    in_matmuls = counts.total - counts.embeddings + head
    return 6 * in_matmuls + 12 * config.n_layer * config.n_head * config.head_size * sequence_length


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
