"""Statistics of a model's weights: per tensor, in total, and differences of two models."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from restomod.config.run import ModelConfig
from restomod.model.flops import embedding_parameters, flops_per_token, padded_parameters, parameter_count
from restomod.utils.text import gigabytes

POSITIONS = "transformer.wpe.weight"
FP32_BYTES = 4


@dataclass(frozen=True)
class TensorStatistics:
    """Statistics of a tensor, in the shape it has in the model's file."""

    name: str
    shape: tuple[int, ...]
    count: int
    mean: float
    std: float
    """Population standard deviation."""
    not_finite: int
    """Number of infinite or NaN elements."""


def tensor_statistics(tensors: Mapping[str, Tensor]) -> list[TensorStatistics]:
    """Shape, mean and standard deviation of every tensor, in the order given."""
    rows = []
    for name, value in tensors.items():
        x = value.double()
        std, mean = torch.std_mean(x, correction=0)
        not_finite = int((~torch.isfinite(x)).sum())
        rows.append(TensorStatistics(name, tuple(value.shape), value.numel(), mean.item(), std.item(), not_finite))
    return rows


def roughness(series: Tensor) -> float:
    """Roughness of a series: 1 for white noise, near 0 for a smooth one.

    The mean over channels of sum((x[i+1] - x[i])^2) / (2 * sum((x[i] - mean)^2)): half of the ratio of von Neumann,
    "Distribution of the Ratio of the Mean Square Successive Difference to the Variance", 1941. Constant channels are
    left out; NaN if all are.
    """
    x = series.double()  # (n, channels)
    jumps = x.diff(dim=0).square().sum(0)  # (channels,)
    spread = (x - x.mean(0)).square().sum(0)
    varies = jumps > 0
    return (jumps[varies] / (2 * spread[varies])).mean().item()


def totals(config: ModelConfig) -> list[tuple[str, str]]:
    """Parameters, FLOPs and memory of a model, as a table of two columns."""
    parameters, head = parameter_count(config), config.vocab_size * config.n_embd
    T = config.n_positions
    weights = FP32_BYTES * padded_parameters(config)
    return [
        ("parameters", f"{parameters:,}"),
        ("without embeddings", f"{parameters - embedding_parameters(config):,}"),
        ("tied lm_head", f"saves {head:,} parameters") if config.tied else ("untied lm_head", f"{head:,}"),
        ("FLOPs per token", f"{flops_per_token(config, T) / 1e6:,.0f} million, forward and backward, T = {T:,}"),
        ("weights", f"{gigabytes(weights)} in fp32"),
        ("gradients", gigabytes(weights)),
        ("AdamW state", gigabytes(2 * weights)),
        ("training", f"{gigabytes(4 * weights)} plus activations"),
    ]


@dataclass(frozen=True)
class Difference:
    """Difference of a tensor between two models."""

    name: str
    largest: float
    """Largest absolute difference of elements."""
    relative: float
    """Norm of the difference over the norm of the first tensor."""
    cosine: float
    """Cosine similarity of the flattened tensors."""
    remark: str = ""
    """Why they cannot be compared: missing in one model, or different shapes."""

    @property
    def identical(self) -> bool:
        return not self.remark and self.largest == 0


def weight_differences(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> list[Difference]:
    """Compare two models tensor by tensor, in the order of the first."""
    rows = []
    for name in [*first, *(name for name in second if name not in first)]:
        if name not in first or name not in second:
            remark = f"only in the {'second' if name not in first else 'first'}"
        elif first[name].shape != second[name].shape:
            remark = f"{tuple(first[name].shape)} and {tuple(second[name].shape)}"
        else:
            rows.append(_difference(name, first[name].double(), second[name].double()))
            continue
        rows.append(Difference(name, math.nan, math.nan, math.nan, remark))
    return rows


def _difference(name: str, a: Tensor, b: Tensor) -> Difference:
    delta, norm_a, norm_b = a - b, a.norm(), b.norm()
    if torch.equal(a, b):
        return Difference(name, 0.0, 0.0, 1.0)
    relative = (delta.norm() / norm_a).item() if norm_a > 0 else math.inf
    cosine = ((a * b).sum() / (norm_a * norm_b)).item() if norm_a > 0 and norm_b > 0 else math.nan
    return Difference(name, delta.abs().max().item(), relative, cosine)
