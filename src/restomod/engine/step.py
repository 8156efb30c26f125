"""One optimizer step: forward and backward over micro-batches, clipping, update.

Nothing waits for the device, which may be a step behind the CPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from restomod.config.run import RunConfig
from restomod.data.batches import MicroBatches, document_ids
from restomod.engine.device import autocast
from restomod.engine.distributed import Processes, synchronised
from restomod.engine.loss import HeadGradient, linear_cross_entropy
from restomod.engine.lr_schedule import rate_factor
from restomod.engine.optimizer import Optimizers, gradient_norm
from restomod.model.gpt import GPT


@dataclass(frozen=True)
class ComputeConfig:
    """Device, precision and micro-batch of a step."""

    device: torch.device
    dtype: torch.dtype
    micro_batch: int
    compiled: bool = False
    document_mask: bool = False
    """Whether a token attends to its own document only."""
    chunk: int | None = None
    """Tokens of a chunk of the loss; None: what is fast on this kind of device."""
    compile_reason: str = ""
    """Reason why the model is compiled or not, for the console."""


def batch_loss(
    model: GPT, tokens: Tensor, targets: Tensor, compute: ComputeConfig, head_gradient: HeadGradient | None = None
) -> Tensor:
    """Mean cross-entropy of ``targets`` (B, T) given ``tokens`` (B, T): a scalar, in nats.

    Args:
        model: on ``compute.device``.
        tokens, targets: int64; in pinned memory where the device is a GPU, so that copying is asynchronous.
        compute: device, precision, chunk.
        head_gradient: see `linear_cross_entropy`.
    """
    asynchronous = compute.device.type == "cuda"  # MPS may read or write such a copy too early
    tokens = tokens.to(compute.device, non_blocking=asynchronous)
    mask = document_mask(tokens) if compute.document_mask else None
    with autocast(compute.device, compute.dtype):
        hidden = model.transformer(tokens, mask=mask)  # (B, T, D)
    targets = targets.to(compute.device, non_blocking=asynchronous).flatten()
    config, hidden = model.config, hidden.flatten(0, 1)
    return linear_cross_entropy(
        hidden,
        model.head,
        targets,
        config.vocab_size,
        compute.dtype,
        compute.compiled,
        config.softcap,
        compute.chunk,
        head_gradient,
    )


def document_mask(tokens: Tensor) -> Tensor:
    """Attention mask, (B, 1, T, T) bool, of (B, T) windows: causal and within the token's own document."""
    T, documents = tokens.shape[1], document_ids(tokens)  # (B, T)
    same = documents[:, :, None] == documents[:, None, :]
    return (same & torch.ones(T, T, dtype=torch.bool, device=tokens.device).tril())[:, None]


class BatchLoss(nn.Module):
    """`batch_loss` as a module, which DDP and FSDP can wrap."""

    def __init__(self, model: GPT, compute: ComputeConfig) -> None:
        super().__init__()
        self.model, self.compute = model, compute

    def forward(self, tokens: Tensor, targets: Tensor, head_gradient: HeadGradient | None = None) -> Tensor:
        return batch_loss(self.model, tokens, targets, self.compute, head_gradient)


@dataclass(frozen=True)
class StepResult:
    """Result of a step."""

    loss: float
    """Loss before the update, in nats."""
    grad_norm: float
    """Gradient norm before clipping."""
    refused: bool
    """Whether there was no update: something is not finite, or the loss is above the limit."""


class PendingStep:
    """Step that is queued on the device."""

    def __init__(self, loss: Tensor, grad_norm: Tensor, refused: Tensor) -> None:
        values = torch.stack([loss, grad_norm, refused.float()])
        self._values = values.to("cpu", non_blocking=loss.is_cuda)  # MPS has no event to wait for
        self._computed = torch.cuda.Event() if loss.is_cuda else None
        if self._computed is not None:
            self._computed.record()

    def wait(self) -> StepResult:
        """Wait until this step is computed; later steps may go on."""
        if self._computed is not None:
            self._computed.synchronize()
        loss, grad_norm, refused = self._values.tolist()
        return StepResult(loss, grad_norm, refused > 0)


def train_step(
    loss_of: nn.Module,
    optimizer: Optimizers,
    micro_batches: MicroBatches,
    config: RunConfig,
    step: int,
    processes: Processes,
    loss_limit: float = math.inf,
) -> PendingStep:
    """Update a model once, unless the loss or a gradient is not finite.

    Args:
        loss_of: `BatchLoss`, or what `distribute` made of it.
        optimizer: of the model's parameters.
        micro_batches: tokens and targets, (B, T) each: this process's part of the batch of step ``step``.
        config: of the run.
        step: number of updates so far.
        processes: that compute parts of the batch.
        loss_limit: a larger loss is refused as well.
    """
    scale = optimizer.loss_scale.factor
    losses, head_gradient = [], HeadGradient()
    for i, (tokens, targets) in enumerate(micro_batches):
        head_gradient.last = i + 1 == len(micro_batches)
        with synchronised(loss_of, head_gradient.last):
            loss = loss_of(tokens, targets, head_gradient) / len(micro_batches)
            (loss * scale).backward()
        losses.append(loss.detach())
    loss = processes.mean(torch.stack(losses).sum())
    grad_norm = gradient_norm(loss_of) / scale
    finite = torch.isfinite(loss) & torch.isfinite(grad_norm)
    refused = ~finite | (loss > loss_limit)
    clip = torch.clamp(grad_norm / config.optim.grad_clip, min=1.0)
    optimizer.update(rate_factor(config.optim, step, config.steps), scale * clip, refused)
    optimizer.loss_scale.update(~finite)
    return PendingStep(loss, grad_norm, refused)
