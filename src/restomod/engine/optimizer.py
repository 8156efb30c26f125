"""Optimizers of a model: construction by name, updates that skip NaN gradients, gradient norm, state as tensors."""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Adam, AdamW, Optimizer

from restomod.config.run import ModelConfig, OptimConfig
from restomod.engine.distributed import SINGLE, Processes
from restomod.engine.loss_scale import LossScale
from restomod.model.gpt import GPT, build_model


class Optimizers:
    """One or more torch optimizers that together update all parameters of a model.

    Contract: a skipped update changes neither weights nor optimizer state. `changed_by_nan` tests the contract.

    Any `torch.optim.Optimizer` whose ``step`` needs no closure can be a part. In general `update` waits for the device,
    divides the gradients, and calls ``step`` unless the update is skipped. It does not wait for optimizers that read
    ``grad_scale`` and ``found_inf`` in their kernels and skip the update themselves. These are Adam and AdamW with
    ``fused=True``, and classes that define ``refuses_on_device = True``.

    Args:
        parts: optimizers that together contain every parameter once. The ``lr`` of each group is its maximum learning
            rate.
        loss_scale: factor of the loss in fp16.

    Raises:
        TypeError: ``step`` of a part needs a closure, or a parameter group has no learning rate.
    """

    def __init__(self, parts: Sequence[Optimizer], loss_scale: LossScale) -> None:
        for part in parts:
            closure = inspect.signature(part.step).parameters.get("closure")
            if closure is not None and closure.default is closure.empty:
                raise TypeError(f"{type(part).__name__} cannot be used: its step needs a closure")
            if any("lr" not in group for group in part.param_groups):
                raise TypeError(f"{type(part).__name__} cannot be used: a parameter group has no learning rate ('lr')")
        self.parts, self.loss_scale = parts, loss_scale
        for group in self.param_groups:
            group["max_lr"] = group["lr"]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Parameter groups of all parts."""
        return [group for part in self.parts for group in part.param_groups]

    def update(self, rate_factor: float, divisor: Tensor, refused: Tensor) -> None:
        """Update the parameters, unless the update is skipped, and delete the gradients.

        Args:
            rate_factor: fraction of the maximum learning rates.
            divisor: divisor of the gradients, scalar (loss scale times clipping factor).
            refused: whether to skip the update, scalar bool on the device.
        """
        for group in self.param_groups:
            group["lr"] = rate_factor * group["max_lr"]
        for part in self.parts:
            if refuses_on_device(part):
                # torch's fused kernels read these two attributes if they exist
                part.grad_scale, part.found_inf = divisor, refused.float()  # type: ignore[attr-defined]
                part.step()
            elif not refused:
                for group in part.param_groups:
                    for p in group["params"]:
                        if p.grad is not None:
                            p.grad.div_(divisor)
                part.step()
        self.zero_grad()

    def reset(self) -> None:
        """Reset all state to that before the first step."""
        for part in self.parts:
            part.state.clear()
        self.loss_scale.reset()

    def zero_grad(self) -> None:
        """Delete the gradients of all parameters."""
        for part in self.parts:
            part.zero_grad(set_to_none=True)


def refuses_on_device(part: Optimizer) -> bool:
    """Return whether the kernels of an optimizer divide by ``grad_scale`` and skip the update if ``found_inf`` is 1.

    torch's other fused optimizers also read these attributes, but SGD leaves its momentum uninitialised if its first
    update is skipped. Only the class itself counts, not its base classes, because a subclass may override ``step``.
    """
    if type(part) in (Adam, AdamW):
        return all(group["fused"] for group in part.param_groups)
    return vars(type(part)).get("refuses_on_device") is True


def build_optimizer(
    model: GPT, config: OptimConfig, dtype: torch.dtype = torch.float32, processes: Processes = SINGLE
) -> Optimizers:
    """Build the optimizers of a model from the file ``restomod/engine/optimizers/NAME.py``.

    Args:
        model: model after `restomod.engine.distributed.distribute`.
        config: name and settings of the optimizer.
        dtype: compute dtype of matmuls.
        processes: ranks of the run.
    """
    module = importlib.import_module(f"restomod.engine.optimizers.{config.optimizer}")
    parts = module.build(model, config, dtype, processes.world_size > 1)
    return Optimizers(parts, LossScale(dtype, next(model.parameters()).device))


def changed_by_nan(build: Callable[[GPT], Optimizers], device: torch.device, loss_scale: float = 1.0) -> list[str]:
    """Test the contract of `Optimizers`: find weights and optimizer state that a skipped update changes.

    Two equal small models get the same three updates. The second model also gets a skipped update with NaN gradients
    before each of them.

    Args:
        build: function that builds the optimizers of a model.
        device: device of the models.
        loss_scale: factor of the second model's gradients, divided out in the update. A power of two changes no bit.

    Returns:
        Names of tensors that differ between the two models; empty if the contract holds.
    """
    config, ends = ModelConfig(n_layer=2, n_head=2, n_embd=8, n_positions=4, vocab_size=8), []
    for with_nan in (False, True):
        model, generator = build_model(config, 0, device), torch.Generator().manual_seed(0)
        optimizers, scale = build(model), loss_scale if with_nan else 1.0
        for factor in (math.nan, scale) * 3 if with_nan else (scale,) * 3:
            refused = math.isnan(factor)
            for p in model.parameters():
                drawn = torch.ones(p.shape) if refused else torch.randn(p.shape, generator=generator)
                p.grad = (drawn * factor).to(device)
            optimizers.update(1.0, torch.tensor(factor, device=device), torch.tensor(refused, device=device))
        ends.append(dict(model.named_parameters()) | optimizer_tensors(model, optimizers))
    return [name for name, value in ends[0].items() if not torch.equal(value, ends[1][name])]


def optimizer_tensors(model: nn.Module, optimizer: Optimizers) -> dict[str, Tensor]:
    """Return the optimizer state for a checkpoint, by names such as ``state.transformer.wte.weight.exp_avg``.

    All ranks must call this function, because it creates the state of an optimizer before its first step. Tensors are
    views, and DTensors if the model is sharded. Hyperparameters are omitted, because they follow from the configuration
    and the step.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict  # a slow import

    options = StateDictOptions(flatten_optimizer_state_dict=True)
    flat = cast(dict[str, Any], get_optimizer_state_dict(model, tuple(optimizer.parts), options=options))
    tensors = {name: _as_tensor(value) for name, value in flat.items() if name.startswith("state.")}
    return tensors | optimizer.loss_scale.tensors()


def put_numbers_back(model: nn.Module, optimizer: Optimizers, tensors: dict[str, Tensor]) -> None:
    """Restore optimizer state that is stored as Python numbers, such as a step count.

    Args:
        model: model of the optimizer.
        optimizer: optimizers to restore.
        tensors: state by name, as returned by `optimizer_tensors`.
    """
    for name, parameter in model.named_parameters():
        for part in optimizer.parts:
            state = part.state.get(parameter, {})
            state.update({k: tensors[f"state.{name}.{k}"].item() for k, v in state.items() if _is_number(v)})


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float))


def _as_tensor(value: Any) -> Tensor:
    return (
        torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None) if _is_number(value) else value
    )


def gradient_norm(model: nn.Module) -> Tensor:
    """Compute the global L2 norm of all gradients, a scalar; over all shards with FSDP."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
