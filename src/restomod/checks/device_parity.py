"""Device parity: loss and gradients of a small GPT-2 on a device, compared with a reference in fp64.

The reference is computed on the CPU in fp64, with unfused attention and the loss from all logits. Training uses none
of these kernels, so the comparison finds any wrong kernel of a device.
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

CHECKED_BEFORE_TRAINING = {"mps"}  # device types that had wrong kernels in earlier releases

# Largest relative differences explained by rounding. Over 20 seeds, a CPU with AVX-512 BF16 had differences of at most
# 7e-8 (loss) and 1.2e-6 (gradients) in fp32, 1.4e-4 and 0.013 in bf16. The tolerances are larger, because other devices
# sum in another order. The smallest fault in the tests, a softmax 2 % too large, exceeds them.
LOSS_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-3, torch.float16: 3e-4}
GRADIENT_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}

SHAPE = ModelConfig(n_layer=2, n_head=2, n_embd=128, n_positions=128, vocab_size=1009)  # heads of 64, as GPT-2's
SEQUENCES = 2
SEED = 0


@dataclass(frozen=True)
class Differences:
    """Relative differences from the reference."""

    loss: float
    """Relative difference of the loss."""
    gradients: dict[str, float]
    """Norm of each gradient's difference, relative to the norm of the gradient, by parameter name."""

    @property
    def worst(self) -> str:
        """Name of the parameter with the largest gradient difference; NaN counts as infinite."""
        return max(self.gradients, key=lambda name: _finite(self.gradients[name]))


def device_parity(device: torch.device, dtype: torch.dtype) -> CheckResult:
    """Check that loss and gradients of a small GPT-2 on a device equal the fp64 reference, up to rounding."""
    found = parity_errors(device, dtype)
    gradient = found.gradients[found.worst]
    where = f"{device.type} in {dtype_name(dtype)}"
    reason = (
        f"{where}, relative error against fp64: loss {found.loss:.1e}, gradients at most {gradient:.1e} "
        f"({found.worst.removeprefix('transformer.')})"
    )
    limits = LOSS_TOLERANCE[dtype], GRADIENT_TOLERANCE[dtype]
    if found.loss <= limits[0] and gradient <= limits[1]:
        return CheckResult("parity", "pass", reason)
    other = "--precision fp32" if dtype != torch.float32 else "another torch release, or --device cpu"
    return CheckResult("parity", "fail", f"{reason}; limits are {limits[0]:.0e} and {limits[1]:.0e}: use {other}")


def parity_errors(device: torch.device, dtype: torch.dtype, seed: int = SEED) -> Differences:
    """Compute the relative errors of a device and compute dtype, with the weights and tokens of ``seed``."""
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
    """Build a model with random biases, norms and large weights.

    At initialisation, attention is almost uniform and biases are 0; wrong kernels could remain unnoticed.
    """
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
    """Compute the reference loss, and gradients by parameter name, in fp64."""
    model = copy.deepcopy(model).double()
    with sdpa_kernel(SDPBackend.MATH):
        logits = model(tokens)  # (B, T, V)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return loss.detach(), loss_gradients(model, loss)


def _finite(difference: float) -> float:
    return difference if difference == difference else float("inf")
