"""One optimizer step: the batch in micro-batches forward and backward, clip, update."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from restomod.config import RunConfig
from restomod.data.prefetch import MicroBatches
from restomod.device import autocast
from restomod.model.gpt import GPT
from restomod.train.distributed import Processes, synchronised
from restomod.train.loss import linear_cross_entropy
from restomod.train.optimizer import clip_gradients, set_learning_rate
from restomod.train.schedule import learning_rate


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


class BatchLoss(nn.Module):
    """`batch_loss` as a module, so that its gradients can be synchronised."""

    def __init__(self, model: GPT, compute: Compute) -> None:
        super().__init__()
        self.model, self.compute = model, compute

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return batch_loss(self.model, tokens, targets, self.compute)


def train_step(
    loss_of: nn.Module,
    optimizer: Optimizer,
    micro_batches: MicroBatches,
    config: RunConfig,
    step: int,
    processes: Processes,
    refuse: Callable[[float, float], str | None],
) -> tuple[float, float, str | None]:
    """Update a model once.

    Args:
        loss_of: `BatchLoss`, or what `distribute` made of it.
        optimizer: of the model's parameters.
        micro_batches: tokens and targets, (B, T) each: this process's share of the batch of step ``step``.
        config: of the run.
        step: how many updates the weights have had.
        processes: that share the batch.
        refuse: from the loss and the norm, why they must not lead to an update; None: they may.

    Returns:
        The loss (nats), the gradient's norm before clipping, and why there was no update.
    """
    losses = []
    for i, (tokens, targets) in enumerate(micro_batches):
        with synchronised(loss_of, last=i + 1 == len(micro_batches)):
            loss = loss_of(tokens, targets) / len(micro_batches)
            loss.backward()
        losses.append(loss.detach())
    loss = processes.mean(torch.stack(losses).sum())
    grad_norm = clip_gradients(loss_of, config.optim.grad_clip)
    problem = refuse(loss.item(), grad_norm.item())
    if problem is None:
        set_learning_rate(optimizer, learning_rate(config.optim, step, config.steps))
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item(), grad_norm.item(), problem
