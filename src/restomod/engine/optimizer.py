"""The optimizers of a model: built by name, update or refusal, gradient norm, state as named tensors."""

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
    """The torch optimizers of a model, each with its parameters, for gradients of a scaled loss.

    Contract: `update` changes nothing where ``refused``, whatever the optimizer. Any `torch.optim.Optimizer` whose
    ``step`` needs no closure can be a part. Before ``step`` its gradients are divided here, and where the update is
    refused ``step`` is not called, for which the device has to be waited for. Only optimizers that are known to divide
    by ``grad_scale`` and to refuse where ``found_inf`` is 1 in their own kernels are called without waiting: Adam and
    AdamW with ``fused=True``, and classes that themselves define ``refuses_on_device = True``. `changed_by_nan` tests
    the contract.
    """

    def __init__(self, parts: Sequence[Optimizer], loss_scale: LossScale) -> None:
        """Args:
        parts: together they hold all parameters; every group's ``lr`` is its maximum learning rate.
        loss_scale: factor of the loss.

        Raises:
            TypeError: a part needs a closure, or a group has no learning rate.
        """
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
        """Update the parameters unless ``refused``, and drop the gradients; see the class.

        Args:
            rate_factor: fraction of the maximum learning rates.
            divisor: scalar; the gradients are divided by it.
            refused: scalar bool; whether neither parameters nor state must change.
        """
        for group in self.param_groups:
            group["lr"] = rate_factor * group["max_lr"]
        for part in self.parts:
            if refuses_on_device(part):
                # what torch calls them; its fused kernels read them if they exist
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
        """Forget all state, as before the first step."""
        for part in self.parts:
            part.state.clear()
        self.loss_scale.reset()

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=True)


def refuses_on_device(part: Optimizer) -> bool:
    """Whether an optimizer divides by ``grad_scale`` and refuses where ``found_inf`` is 1 by itself; see `Optimizers`.

    torch's other fused optimizers read them too, but a first step that SGD refuses leaves its momentum uninitialised.
    A subclass may have another ``step``, so what its base class defines does not count.
    """
    if type(part) in (Adam, AdamW):
        return all(group["fused"] for group in part.param_groups)
    return vars(type(part)).get("refuses_on_device") is True


def build_optimizer(
    model: GPT, config: OptimConfig, dtype: torch.dtype = torch.float32, processes: Processes = SINGLE
) -> Optimizers:
    """Build the optimizer that ``config`` names, by its file in `restomod.engine.optimizers`.

    Args:
        model: as `restomod.engine.distributed.distribute` left it.
        config: the optimizer's name and settings.
        dtype: compute dtype of the matmuls.
        processes: that hold the model.
    """
    module = importlib.import_module(f"restomod.engine.optimizers.{config.optimizer}")
    parts = module.build(model, config, dtype, processes.world_size > 1)
    return Optimizers(parts, LossScale(dtype, next(model.parameters()).device))


def changed_by_nan(build: Callable[[GPT], Optimizers], device: torch.device, loss_scale: float = 1.0) -> list[str]:
    """Names of weights and optimizer state that NaN gradients change; none where the contract of `Optimizers` holds.

    Of two equal small models both get the same three updates, one of them with a refused update before each.

    Args:
        build: makes the optimizers of a model.
        device: of the models.
        loss_scale: the gradients of the second model are multiplied and divided by it; a power of 2 changes no bit.
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
    """The optimizer's state by parameter name (``state.transformer.wte.weight.exp_avg``), sharing its memory.

    Hyperparameters are left out: they are functions of the configuration and the step. The state of an optimizer that
    has not stepped yet is created first, for which all processes have to call this. Sharded state is in DTensors.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict  # takes long

    options = StateDictOptions(flatten_optimizer_state_dict=True)
    flat = cast(dict[str, Any], get_optimizer_state_dict(model, tuple(optimizer.parts), options=options))
    tensors = {name: _as_tensor(value) for name, value in flat.items() if name.startswith("state.")}
    return tensors | optimizer.loss_scale.tensors()


def put_numbers_back(model: nn.Module, optimizer: Optimizers, tensors: dict[str, Tensor]) -> None:
    """Set the optimizer state that is Python numbers (a count of steps, say) to the values in ``tensors``.

    Args:
        model: the one that is optimized.
        optimizer: whose state is set.
        tensors: named as those of `optimizer_tensors`.
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
    """Global norm of all gradients, a scalar."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
