"""Device parity: a small GPT-2's loss and gradients on a device, compared with a reference in fp64.

The reference is computed on the CPU in fp64, attention as plain matmuls and a softmax, the loss from all logits.
Training uses none of these kernels on any device, so any wrong kernel shows.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from restomod.checks.model_quick import loss_gradients
from restomod.config.run import ModelConfig
from restomod.engine.device import dtype_name
from restomod.engine.step import ComputeConfig, batch_loss
from restomod.model.gpt import GPT, build_model
from restomod.utils.console import CheckResult

CHECKED_BEFORE_TRAINING = {"mps"}  # device types whose kernels have been wrong before

# Largest relative differences that count as rounding. Over 20 seeds a CPU with AVX-512 BF16 was off by at most 7e-8
# (loss) and 1.2e-6 (gradients) in fp32, by 1.4e-4 and 0.013 in bf16. Other devices add in another order, so there is
# room; the least of the faults that are planted in tests, a softmax 2 % too large, is off by more.
LOSS_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-3, torch.float16: 3e-4}
GRADIENT_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}

SHAPE = ModelConfig(n_layer=2, n_head=2, n_embd=128, n_positions=128, vocab_size=1009)  # heads of 64, as GPT-2's
SEQUENCES = 2
SEED = 0


@dataclass(frozen=True)
class Differences:
    """Relative differences of the loss, and of each gradient in its norm, from the reference."""

    loss: float
    gradients: dict[str, float]
    """By the parameter's name."""

    @property
    def worst(self) -> str:
        """The parameter with the largest gradient difference; NaN counts as infinite."""
        return max(self.gradients, key=lambda name: _finite(self.gradients[name]))


def device_parity(device: torch.device, dtype: torch.dtype) -> CheckResult:
    """Check that a small GPT-2 has the reference's loss and gradients on this device in this dtype, up to rounding."""
    found = parity_errors(device, dtype)
    gradient = found.gradients[found.worst]
    where = f"{device.type} in {dtype_name(dtype)}"
    reason = (
        f"{where} against exact arithmetic: loss off by {found.loss:.1e}, gradients by at most {gradient:.1e} "
        f"({found.worst.removeprefix('transformer.')})"
    )
    limits = LOSS_TOLERANCE[dtype], GRADIENT_TOLERANCE[dtype]
    if found.loss <= limits[0] and gradient <= limits[1]:
        return CheckResult("parity", "pass", reason)
    other = "--precision fp32" if dtype != torch.float32 else "another torch release, or --device cpu"
    return CheckResult(
        "parity", "fail", f"{reason}; rounding explains {limits[0]:.0e} and {limits[1]:.0e}: use {other}"
    )


def parity_errors(device: torch.device, dtype: torch.dtype, seed: int = SEED) -> Differences:
    """Compare a device and compute dtype with the reference."""
    model = random_model(SHAPE, seed)
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(SHAPE.vocab_size, (SEQUENCES, SHAPE.n_positions + 1), generator=generator)
    tokens, targets = text[:, :-1], text[:, 1:]
    exact_loss, exact = _exact(model, tokens, targets)
    there = copy.deepcopy(model).to(device)
    loss = batch_loss(there, tokens, targets, ComputeConfig(device, dtype, SEQUENCES))
    gradients = {name: g.cpu().double() for name, g in loss_gradients(there, loss).items()}
    missing = torch.zeros(())
    return Differences(
        abs(loss.item() / exact_loss.item() - 1),
        {name: ((gradients.get(name, missing) - g).norm() / g.norm()).item() for name, g in exact.items()},
    )


def random_model(config: ModelConfig, seed: int = SEED) -> GPT:
    """A model whose attention is not uniform, and whose biases and norms all matter, unlike at initialisation."""
    model = build_model(config, seed, torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * config.n_embd**-0.5)
            if parameter.ndim == 1 and name.endswith("weight"):  # norms
                parameter.add_(1.0)
        for matrix in model.vocabulary_matrices():
            matrix[config.vocab_size :] = 0.0
    return model


def _exact(model: GPT, tokens: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Reference loss and gradients by parameter name, in fp64."""
    model = copy.deepcopy(model).double()
    with sdpa_kernel(SDPBackend.MATH):
        logits = model(tokens)  # (B, T, V)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return loss.detach(), loss_gradients(model, loss)


def _finite(difference: float) -> float:
    return difference if difference == difference else float("inf")
