"""Parameter counts, FLOPs per token, and MFU (model FLOPs utilisation).

Parameters are counted in a model built on the meta device. torch is imported at the first count, because the import
takes long.
"""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

from restomod.config.model import ModelConfig


class Counts(NamedTuple):
    """Parameter counts of a model."""

    padded: int
    """Parameters in memory, including the padding rows of the vocabulary."""
    total: int
    """Parameters without padding; a tied lm_head counts once."""
    embeddings: int
    """Parameters of all embeddings and of an untied lm_head, without padding."""


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
    """Return the number of parameters without padding; a tied lm_head counts once.

    GPT-2 124M has 124,439,808.
    """
    return _counts(config).total


def padded_parameters(config: ModelConfig) -> int:
    """Return the number of parameters in memory, including the padding rows of the vocabulary."""
    return _counts(config).padded


def embedding_parameters(config: ModelConfig) -> int:
    """Return the number of parameters of all embeddings and of an untied lm_head, without padding."""
    return _counts(config).embeddings


def flops_per_token(config: ModelConfig, sequence_length: int) -> int:
    """Compute the floating-point operations of a forward and backward pass, per token.

    The count is 6 N + 12 * n_layer * n_head * head_size * T. N is the number of parameters outside the embeddings plus
    the weights of lm_head: a matmul uses each weight once per token, with 2 FLOPs forward and 4 backward. The second
    term is the two attention matmuls over all T² pairs, without a discount for the causal mask. GPT-2 124M at T = 1024
    has 855 MFLOP per token. Source: Chowdhery et al., "PaLM", 2022, appendix B.

    Args:
        config: model configuration.
        sequence_length: T, tokens per sequence.
    """
    counts, head = _counts(config), config.vocab_size * config.n_embd
    in_matmuls = counts.total - counts.embeddings + head
    return 6 * in_matmuls + 12 * config.n_layer * config.n_head * config.head_size * sequence_length


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
"""Peak dense bf16 FLOP/s from the manufacturers' data sheets, by part of the device name. First match wins."""


def peak_flops(device_name: str) -> float | None:
    """Return the peak dense bf16 FLOP/s of a GPU.

    Args:
        device_name: name from the driver, such as "NVIDIA A100-SXM4-80GB".

    Returns:
        FLOP/s; None for an unknown device, a laptop GPU, or a MIG slice.
    """
    if re.search(r"Laptop|Max-Q|MIG", device_name):
        return None
    return next((peak for part, peak in PEAK_FLOPS.items() if re.search(rf"\b{part}\b", device_name)), None)


def mfu(tokens_per_second: float, flops_per_token: float, peak: float | None) -> float | None:
    """Compute MFU (model FLOPs utilisation), achieved FLOP/s divided by the hardware's peak.

    Source: Chowdhery et al., "PaLM", 2022, section 4.1.

    Args:
        tokens_per_second: throughput of training.
        flops_per_token: result of `flops_per_token`.
        peak: peak FLOP/s of all devices together; None: unknown.

    Returns:
        Fraction of the peak, 0 to 1; None if ``peak`` is None.
    """
    return tokens_per_second * flops_per_token / peak if peak else None
