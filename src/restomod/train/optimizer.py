"""AdamW as GPT-2 is trained with it, and its state as named tensors."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import AdamW

from restomod.config import OptimConfig
from restomod.train.scale import LossScale


def _options(model: nn.Module) -> StateDictOptions:
    """Names with dots; of a model that processes share, the whole tensors."""
    shared = any(isinstance(p, DTensor) for p in model.parameters())
    return StateDictOptions(flatten_optimizer_state_dict=True, full_state_dict=shared)


class ScaledAdamW(AdamW):
    """AdamW, fused into one kernel, for gradients of a scaled loss."""

    def __init__(self, groups: list[dict[str, Any]], loss_scale: LossScale, **settings: Any) -> None:
        super().__init__(groups, fused=True, **settings)
        self.loss_scale = loss_scale

    def update(self, lr: float, divisor: Tensor, refused: Tensor) -> None:
        """Make an update, or none, and drop the gradients. Nothing is read from the device.

        Args:
            lr: learning rate.
            divisor: scalar; the gradients are divided by it, in the same kernel.
            refused: scalar bool; whether nothing must change.
        """
        for group in self.param_groups:
            group["lr"] = lr
        self.grad_scale, self.found_inf = divisor, refused.float()  # what torch calls them; it reads them if they exist
        self.step()
        self.zero_grad(set_to_none=True)


def build_optimizer(model: nn.Module, config: OptimConfig, dtype: torch.dtype = torch.float32) -> ScaledAdamW:
    """AdamW over ``model``'s parameters, computed in ``dtype``.

    Weight decay applies to what has two dimensions (matrices and embeddings), not to biases and norms. Source: Brown
    et al., 2020, appendix B (betas 0.9 and 0.95, eps 1e-8, decay 0.1).
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    loss_scale = LossScale(dtype, next(model.parameters()).device)
    return ScaledAdamW(groups, loss_scale, lr=config.lr, betas=config.betas, eps=config.eps)


def optimizer_tensors(model: nn.Module, optimizer: ScaledAdamW) -> dict[str, Tensor]:
    """The optimizer's state by parameter name (``state.transformer.wte.weight.exp_avg``), sharing its memory.

    Its hyperparameters are left out: they are functions of the configuration and the step. An optimizer that has not
    stepped yet gets its state made first. Of a model that processes share, the tensors are whole copies, and all
    processes have to call this.
    """
    flat = cast(dict[str, Any], get_optimizer_state_dict(model, optimizer, options=_options(model)))
    tensors = {name: value for name, value in flat.items() if name.startswith("state.")}
    return tensors | optimizer.loss_scale.tensors()


def load_optimizer_tensors(model: nn.Module, optimizer: ScaledAdamW, tensors: dict[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave; of tensors that processes share, each takes its part."""
    scale = optimizer.loss_scale.tensors()  # of these two, in place
    for name, factor in scale.items():
        factor.copy_(tensors[name])
    options = StateDictOptions(flatten_optimizer_state_dict=True)  # torch cannot load whole tensors that are flattened
    flat = cast(dict[str, Any], get_optimizer_state_dict(model, optimizer, options=options))
    for name, value in tensors.items():
        if name in scale:
            continue
        here = flat.get(name)
        if isinstance(here, DTensor):
            value = distribute_tensor(value, here.device_mesh, here.placements, src_data_rank=None)
        flat[name] = value
    set_optimizer_state_dict(model, optimizer, flat, options=options)


def gradient_norm(model: nn.Module) -> Tensor:
    """The norm of all gradients together, a scalar."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
