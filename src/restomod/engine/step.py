"""The training step: forward and backward over micro-batches, gradient clipping, update.

Gradient accumulation sums the gradients of all micro-batches of a step. Mixed precision runs matmuls in the compute
dtype under autocast, with fp32 weights. The step is queued on the device and the CPU does not wait for it; the result
is read one step later.

Shapes: B = sequences of a micro-batch, T = tokens per sequence, D = n_embd.
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
    """Device, precision and micro-batch size of training steps."""

    device: torch.device
    """Device of the model."""
    dtype: torch.dtype
    """Compute dtype of matmuls."""
    micro_batch: int
    """B, sequences per forward and backward pass."""
    compiled: bool = False
    """Whether the model uses torch.compile."""
    document_mask: bool = False
    """Whether tokens attend only to their own document."""
    chunk: int | None = None
    """Tokens per chunk of the loss; None: a fast value for the device type."""
    compile_reason: str = ""
    """Reason why the model is compiled or not, for the console."""


def batch_loss(
    model: GPT, tokens: Tensor, targets: Tensor, compute: ComputeConfig, head_gradient: HeadGradient | None = None
) -> Tensor:
    """Compute the mean cross-entropy of a micro-batch, a scalar in nats.

    Args:
        model: model on ``compute.device``.
        tokens: input tokens, (B, T) int64. Pinned memory makes the copy to a GPU asynchronous.
        targets: next tokens, (B, T) int64.
        compute: device, precision and chunk size.
        head_gradient: accumulator of lm_head's gradient over the micro-batches of a step; None: no accumulation.
    """
    asynchronous = compute.device.type == "cuda"  # on MPS an asynchronous copy may be read too early
    tokens = tokens.to(compute.device, non_blocking=asynchronous)
    mask = document_mask(tokens) if compute.document_mask else None
    with autocast(compute.device, compute.dtype):
        hidden = model.transformer(tokens, mask=mask)  # (B, T, D)
    targets = targets.to(compute.device, non_blocking=asynchronous).flatten()  # (B T,)
    config, hidden = model.config, hidden.flatten(0, 1)  # (B T, D)
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
    """Compute the document mask: a token attends to itself and to earlier tokens of the same document.

    Args:
        tokens: input tokens, (B, T) int64.

    Returns:
        Attention mask, (B, 1, T, T) bool, True where a query attends to a key.
    """
    T, documents = tokens.shape[1], document_ids(tokens)  # (B, T)
    same = documents[:, :, None] == documents[:, None, :]  # (B, T, T)
    return (same & torch.ones(T, T, dtype=torch.bool, device=tokens.device).tril())[:, None]


class BatchLoss(nn.Module):
    """Module form of `batch_loss`, which DDP and FSDP can wrap.

    Args:
        model: language model.
        compute: device, precision and chunk size.
    """

    def __init__(self, model: GPT, compute: ComputeConfig) -> None:
        super().__init__()
        self.model, self.compute = model, compute

    def forward(self, tokens: Tensor, targets: Tensor, head_gradient: HeadGradient | None = None) -> Tensor:
        """Compute the mean cross-entropy of tokens and targets, (B, T) int64 each; see `batch_loss`."""
        return batch_loss(self.model, tokens, targets, self.compute, head_gradient)


@dataclass(frozen=True)
class StepResult:
    """Result of a training step."""

    loss: float
    """Training loss before the update, in nats per token."""
    grad_norm: float
    """Global gradient norm before clipping."""
    refused: bool
    """Whether the update was skipped: loss or gradient norm is not finite, or the loss is above the limit."""


class PendingStep:
    """Training step that is queued on the device.

    Args:
        loss: training loss, scalar.
        grad_norm: global gradient norm, scalar.
        refused: whether the update is skipped, scalar bool.
    """

    def __init__(self, loss: Tensor, grad_norm: Tensor, refused: Tensor) -> None:
        values = torch.stack([loss, grad_norm, refused.float()])  # (3,), so that one copy suffices
        self._values = values.to("cpu", non_blocking=loss.is_cuda)  # on MPS there is no event to wait for
        self._computed = torch.cuda.Event() if loss.is_cuda else None
        if self._computed is not None:
            self._computed.record()

    def wait(self) -> StepResult:
        """Wait until the device has computed this step, and return its result. Later steps may still be queued."""
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
    """Compute the gradients of a batch and update the model.

    The update is skipped if the loss or the gradient norm is not finite, or the loss is above ``loss_limit``.

    Args:
        loss_of: `BatchLoss`, or the result of `distribute` for it.
        optimizer: optimizers of the model.
        micro_batches: tokens and targets of this rank's share of the batch, (B, T) int64 each.
        config: run configuration.
        step: index of the step, the number of updates so far.
        processes: ranks that share the batch.
        loss_limit: maximum training loss, in nats.

    Returns:
        Step that is queued on the device.
    """
    scale = optimizer.loss_scale.factor
    losses, head_gradient = [], HeadGradient()
    for i, (tokens, targets) in enumerate(micro_batches):
        head_gradient.last = i + 1 == len(micro_batches)
        with synchronised(loss_of, head_gradient.last):  # all-reduce only after the last micro-batch
            loss = loss_of(tokens, targets, head_gradient) / len(micro_batches)
            (loss * scale).backward()
        losses.append(loss.detach())
    loss = processes.mean(torch.stack(losses).sum())
    grad_norm = gradient_norm(loss_of) / scale
    finite = torch.isfinite(loss) & torch.isfinite(grad_norm)
    refused = ~finite | (loss > loss_limit)
    clip = torch.clamp(grad_norm / config.optim.grad_clip, min=1.0)  # divisor that limits the norm to grad_clip
    optimizer.update(rate_factor(config.optim, step, config.steps), scale * clip, refused)
    optimizer.loss_scale.update(~finite)
    return PendingStep(loss, grad_norm, refused)
