"""Statistics of model weights: values per tensor, totals, and differences between two models."""

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
    """Statistics of one tensor."""

    name: str
    shape: tuple[int, ...]
    """Shape in the model's file."""
    count: int
    """Number of elements."""
    mean: float
    std: float
    """Population standard deviation."""
    not_finite: int
    """Number of infinite or NaN elements."""


def tensor_statistics(tensors: Mapping[str, Tensor]) -> list[TensorStatistics]:
    """Compute shape, mean and standard deviation of every tensor, in fp64 and in the given order."""
    rows = []
    for name, value in tensors.items():
        x = value.double()
        std, mean = torch.std_mean(x, correction=0)
        not_finite = int((~torch.isfinite(x)).sum())
        rows.append(TensorStatistics(name, tuple(value.shape), value.numel(), mean.item(), std.item(), not_finite))
    return rows


def roughness(series: Tensor) -> float:
    """Compute the roughness of a series, (n, channels): 1 for white noise, near 0 for a smooth series.

    It is the mean over channels of sum((x[i+1] - x[i])^2) / (2 * sum((x[i] - mean)^2)), half of the ratio of von
    Neumann, "Distribution of the Ratio of the Mean Square Successive Difference to the Variance", 1941. Constant
    channels are skipped; NaN if all channels are constant.
    """
    x = series.double()  # (n, channels)
    jumps = x.diff(dim=0).square().sum(0)  # (channels,)
    spread = (x - x.mean(0)).square().sum(0)
    varies = jumps > 0
    return (jumps[varies] / (2 * spread[varies])).mean().item()


def totals(config: ModelConfig) -> list[tuple[str, str]]:
    """Return parameters, FLOPs and training memory of a model as pairs of label and value."""
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
        ("optimizer state", f"{gigabytes(2 * weights)} with AdamW"),
        ("training memory", f"{gigabytes(4 * weights)} with AdamW, plus activations"),
    ]


@dataclass(frozen=True)
class Difference:
    """Difference of one tensor between two models. Numbers are NaN if the tensors cannot be compared."""

    name: str
    largest: float
    """Largest absolute difference of elements."""
    relative: float
    """Norm of the difference, divided by the norm of the first tensor."""
    cosine: float
    """Cosine similarity of the flattened tensors."""
    remark: str = ""
    """Reason why the tensors cannot be compared: missing in one model, or different shapes. Empty: comparable."""

    @property
    def identical(self) -> bool:
        """Whether the tensors are equal."""
        return not self.remark and self.largest == 0


def weight_differences(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> list[Difference]:
    """Compare two models tensor by tensor, in the order of the first model."""
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
