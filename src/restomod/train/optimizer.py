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
from torch.optim import AdamW, Optimizer

from restomod.config import OptimConfig


def _options(model: nn.Module) -> StateDictOptions:
    """Names with dots; of a model that processes share, the whole tensors."""
    shared = any(isinstance(p, DTensor) for p in model.parameters())
    return StateDictOptions(flatten_optimizer_state_dict=True, full_state_dict=shared)


def build_optimizer(model: nn.Module, config: OptimConfig) -> Optimizer:
    """AdamW over ``model``'s parameters, fused into one kernel.

    Weight decay applies to what has two dimensions (matrices and embeddings), not to biases and norms. Source: Brown
    et al., 2020, appendix B (betas 0.9 and 0.95, eps 1e-8, decay 0.1).
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """Use ``lr`` in the next step."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by parameter name (``state.transformer.wte.weight.exp_avg``), sharing its memory.

    Its hyperparameters are left out: they are functions of the configuration and the step. An optimizer that has not
    stepped yet gets its state made first. Of a model that processes share, the tensors are whole copies, and all
    processes have to call this.
    """
    flat = cast(dict[str, Any], get_optimizer_state_dict(model, optimizer, options=_options(model)))
    return {name: value for name, value in flat.items() if name.startswith("state.")}


def load_optimizer_tensors(model: nn.Module, optimizer: Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave; of tensors that processes share, each takes its part."""
    options = StateDictOptions(flatten_optimizer_state_dict=True)  # torch cannot load whole tensors that are flattened
    flat = cast(dict[str, Any], get_optimizer_state_dict(model, optimizer, options=options))
    for name, value in tensors.items():
        here = flat.get(name)
        if isinstance(here, DTensor):
            value = distribute_tensor(value, here.device_mesh, here.placements, src_data_rank=None)
        flat[name] = value
    set_optimizer_state_dict(model, optimizer, flat, options=options)


def clip_gradients(model: nn.Module, limit: float) -> Tensor:
    """Scale all gradients down together so that their global norm is at most ``limit``; return the norm before."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
