"""One optimizer step: the batch in micro-batches forward and backward, clip, update."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from restomod.config import RunConfig, nearest_divisor_below
from restomod.data.prefetch import MicroBatches
from restomod.device import autocast
from restomod.model.gpt import GPT
from restomod.train.loss import linear_cross_entropy
from restomod.train.optimizer import clip_gradients, set_learning_rate
from restomod.train.schedule import learning_rate

MICRO_BATCH_TOKENS = {"cpu": 4096, "mps": 8192, "cuda": 65_536}


def choose_micro_batch(config: RunConfig, device: torch.device) -> int:
    """Sequences per forward pass: what is configured, or what fits comfortably on this kind of device."""
    fits = MICRO_BATCH_TOKENS[device.type] // config.sequence_length
    return config.micro_batch or nearest_divisor_below(config.batch_sequences, fits)


@dataclass(frozen=True)
class Compute:
    """Where and how precisely a step is computed."""

    device: torch.device
    dtype: torch.dtype
    micro_batch: int


def batch_loss(model: GPT, tokens: Tensor, targets: Tensor, compute: Compute) -> Tensor:
    """Mean cross-entropy of ``targets`` (B, T) given ``tokens`` (B, T): a scalar, in nats."""
    with autocast(compute.device, compute.dtype):
        hidden = model.transformer(tokens.to(compute.device, non_blocking=True))  # (B, T, D)
    targets = targets.to(compute.device, non_blocking=True).flatten()
    return linear_cross_entropy(hidden.flatten(0, 1), model.head, targets, model.config.vocab_size, compute.dtype)


def train_step(
    model: GPT, optimizer: Optimizer, micro_batches: MicroBatches, config: RunConfig, step: int, compute: Compute
) -> tuple[float, float]:
    """Update ``model`` once.

    Args:
        model: to train.
        optimizer: of its parameters.
        micro_batches: tokens and targets, (B, T) each, that together are the batch of step ``step``.
        config: of the run.
        step: how many updates the weights have had.
        compute: where and how precisely to compute.

    Returns:
        The loss (nats) and the gradient's norm before clipping. If either is not finite, nothing is updated.
    """
    loss = torch.zeros((), device=compute.device)
    for tokens, targets in micro_batches:
        micro_loss = batch_loss(model, tokens, targets, compute) / len(micro_batches)
        micro_loss.backward()
        loss += micro_loss.detach()
    grad_norm = clip_gradients(model, config.optim.grad_clip)
    if torch.isfinite(loss + grad_norm):
        set_learning_rate(optimizer, learning_rate(config.optim, step, config.steps))
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item(), grad_norm.item()
