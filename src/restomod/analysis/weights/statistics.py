"""What a model's weights look like, in numbers: every tensor, the totals, the costs, and two models side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from restomod.config.run import ModelConfig
from restomod.model.flops import embedding_parameters, flops_per_token, padded_parameters, parameter_count

POSITIONS = "transformer.wpe.weight"
FP32_BYTES = 4


@dataclass(frozen=True)
class TensorStatistics:
    """One tensor of a model, in the shape that its file gives it."""

    name: str
    shape: tuple[int, ...]
    count: int
    mean: float
    std: float
    """Population standard deviation."""
    not_finite: int
    """How many of its numbers are infinite or not a number."""


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
    """How much a series jumps from one step to the next: 1 for white noise, towards 0 the smoother it is.

    The mean over channels of sum((x[i+1] - x[i])^2) / (2 * sum((x[i] - mean)^2)): half of the ratio of von Neumann,
    "Distribution of the Ratio of the Mean Square Successive Difference to the Variance", 1941.

    Args:
        series: (n, channels). Channels that do not vary are left out; if none does, the result is NaN.
    """
    x = series.double()
    jumps = x.diff(dim=0).square().sum(0)  # (channels,)
    spread = (x - x.mean(0)).square().sum(0)
    varies = jumps > 0
    return (jumps[varies] / (2 * spread[varies])).mean().item()


def totals(config: ModelConfig) -> list[tuple[str, str]]:
    """Parameters, FLOPs and memory of a GPT-2 of this shape, as a table of two columns."""
    parameters, head = parameter_count(config), config.vocab_size * config.n_embd
    T = config.n_positions
    weights = FP32_BYTES * padded_parameters(config)
    return [
        ("parameters", f"{parameters:,}"),
        ("without embeddings", f"{parameters - embedding_parameters(config):,}"),
        ("tied head", f"saves {head:,}: one matrix is the token embedding and the head")
        if config.tied
        else ("head", f"{head:,}, apart from the token embedding"),
        (
            "FLOPs per token",
            f"{flops_per_token(config, T) / 1e6:,.0f} million, forward and backward, at {T:,} positions",
        ),
        ("weights", f"{gigabytes(weights)} in fp32"),
        ("gradients", f"{gigabytes(weights)}"),
        ("AdamW's state", f"{gigabytes(2 * weights)}"),
        ("to train", f"{gigabytes(4 * weights)} and what the activations of a micro-batch take"),
    ]


def gigabytes(n: int) -> str:
    """A number of bytes for people: ``0.50 GB``, of 10^9."""
    return f"{n / 1e9:.2f} GB"


@dataclass(frozen=True)
class Difference:
    """How a tensor of one model differs from that of the same name in another."""

    name: str
    largest: float
    """Largest absolute difference of two numbers."""
    relative: float
    """Norm of the difference over the norm of the first."""
    cosine: float
    """Cosine of the angle between the two, flattened."""
    remark: str = ""
    """Why they cannot be compared: it is missing in one, or has another shape there."""

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
