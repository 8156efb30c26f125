"""AdamW as GPT-2 is trained with it, Muon beside it if asked for, and their state as named tensors."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.distributed.tensor import DTensor
from torch.optim import Adam, AdamW, Optimizer

from restomod.config.run import OptimConfig
from restomod.engine.distributed import SINGLE, Processes
from restomod.engine.loss_scale import LossScale
from restomod.engine.muon import Muon
from restomod.model.gpt import GPT, stacked_matrices


class Optimizers:
    """The optimizers of a model, each with the parameters that it suits, for gradients of a scaled loss.

    Any `torch.optim.Optimizer` is right whose ``step`` takes no closure. AdamW and Adam with ``fused=True`` and Muon
    divide the gradients and refuse updates in their own kernels; for all others that is done here, for which the
    device has to be waited for at every step.
    """

    def __init__(self, parts: Sequence[Optimizer], loss_scale: LossScale) -> None:
        """Args:
        parts: all their groups have the learning rate that is their maximum.
        loss_scale: what the loss is multiplied with.

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
        """Of all parts."""
        return [group for part in self.parts for group in part.param_groups]

    def update(self, rate_factor: float, divisor: Tensor, refused: Tensor) -> None:
        """Make an update, or none, and drop the gradients. Nothing is read from the device; see the class.

        Args:
            rate_factor: fraction of the maximum learning rates.
            divisor: scalar; the gradients are divided by it, in the same kernel.
            refused: scalar bool; whether nothing must change.
        """
        for group in self.param_groups:
            group["lr"] = rate_factor * group["max_lr"]
        for part in self.parts:
            if _refuses_by_itself(part):
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


def _refuses_by_itself(part: Optimizer) -> bool:
    """Whether an optimizer divides gradients by ``grad_scale`` and changes nothing where ``found_inf`` is 1.

    torch's other fused optimizers read them too, but a first step that SGD refuses leaves its momentum uninitialised.
    """
    if type(part) in (Adam, AdamW):
        return all(group["fused"] for group in part.param_groups)
    return type(part) is Muon


def build_optimizer(
    model: GPT, config: OptimConfig, dtype: torch.dtype = torch.float32, processes: Processes = SINGLE
) -> Optimizers:
    """What `config` asks for over ``model``'s parameters, computed in ``dtype``.

    Weight decay applies to what has two dimensions (matrices and embeddings), not to biases and norms. Source: Brown
    et al., 2020, appendix B (betas 0.9 and 0.95, eps 1e-8, decay 0.1). Muon takes the matrices of the blocks, queries,
    keys and values (and the two of SwiGLU) each for itself.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices = (
        [name for name, p in named.items() if p.ndim == 2 and ".h." in name] if config.optimizer == "muon" else []
    )
    rest = [p for name, p in named.items() if name not in matrices]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    parts: list[Optimizer] = [AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)]
    if matrices:
        by_parts: dict[int, list[Tensor]] = {}
        for name in matrices:
            by_parts.setdefault(stacked_matrices(model.config, name), []).append(named[name])
        muon_groups = [{"params": ps, "parts": n} for n, ps in by_parts.items()]
        precise = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32  # fp16 has too few exponents
        share = processes.world_size > 1
        parts.append(Muon(muon_groups, config.muon_lr, config.muon_momentum, config.muon_weight_decay, precise, share))
    return Optimizers(parts, LossScale(dtype, next(model.parameters()).device))


def optimizer_tensors(model: nn.Module, optimizer: Optimizers) -> dict[str, Tensor]:
    """The optimizer's state by parameter name (``state.transformer.wte.weight.exp_avg``), sharing its memory.

    Its hyperparameters are left out: they are functions of the configuration and the step. An optimizer that has not
    stepped yet gets its state made first, for which all processes have to call this. Of a tensor that processes share,
    each has its part, in a DTensor.
    """
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    flat = cast(dict[str, Any], get_optimizer_state_dict(model, tuple(optimizer.parts), options=options))
    tensors = {name: _as_tensor(value) for name, value in flat.items() if name.startswith("state.")}
    return tensors | optimizer.loss_scale.tensors()


def put_numbers_back(model: nn.Module, optimizer: Optimizers, tensors: dict[str, Tensor]) -> None:
    """Set the state that is Python's numbers, as an optimizer of one's own may count its steps, to that in ``tensors``.

    Args:
        model: the one that is optimized.
        optimizer: has the state of `optimizer_tensors`.
        tensors: those of `optimizer_tensors`, which do not share memory with numbers, with other values.
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
    """The norm of all gradients together, a scalar."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
