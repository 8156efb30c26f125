"""Muon for the matrices of the blocks, AdamW for all other parameters.

Muon's update is the momentum of a matrix with all singular values made equal. Source: Jordan et al., "Muon: An
optimizer for hidden layers in neural networks", 2024. The orthogonalisation is the Newton-Schulz iteration with the
coefficients of Amsel et al., "The Polar Express", 2025.

Shapes: n = matrices of equal shape, R = rows, C = columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from restomod.config.run import OptimConfig
from restomod.engine.optimizers.adamw import adamw
from restomod.model.gpt import GPT, stacked_matrices

# x (a + b x² + c x⁴), applied in turn: the odd polynomials of degree 5 whose composition brings singular values between
# 0.001 and 1 nearest to 1. The largest singular value has to be at most 1.
COEFFICIENTS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
MARGIN = 1.02  # the norm is made this much less than 1, as rounding may add to it


def build(model: GPT, config: OptimConfig, dtype: torch.dtype, distributed: bool) -> list[Optimizer]:
    """Muon over the matrices of the blocks, AdamW over all other parameters.

    Queries, keys and values, and the two matrices of SwiGLU, are stacked in one parameter each and orthogonalised
    separately.
    """
    named = dict(model.named_parameters())
    matrices = [name for name, p in named.items() if p.ndim == 2 and ".h." in name]
    by_stack: dict[int, list[Tensor]] = {}
    for name in matrices:
        by_stack.setdefault(stacked_matrices(model.config, name), []).append(named[name])
    groups = [{"params": parameters, "stacked": n} for n, parameters in by_stack.items()]
    precise = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32  # fp16's range is too small
    return [
        adamw((p for name, p in named.items() if name not in matrices), config),
        Muon(groups, config.muon_lr, config.muon_momentum, config.muon_weight_decay, precise, distributed),
    ]


def orthogonalise(matrices: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Approximate U Vᵀ of each matrix U S Vᵀ: singular values above a thousandth of the norm become about 1.

    Args:
        matrices: (n, R, C).
        dtype: compute dtype of the matmuls. bf16 is precise enough.

    Returns:
        (n, R, C) in ``dtype``.
    """
    x = matrices.to(dtype)
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT  # x @ x.mT is then the smaller of the two
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * MARGIN + 1e-7)
    for a, b, c in COEFFICIENTS:
        square = x @ x.mT  # (n, R, R)
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x if wide else x.mT


def _full(direction: Tensor, dtype: torch.dtype) -> Tensor:
    """The full tensor of a direction; a sharded one is gathered in ``dtype``."""
    if not isinstance(direction, DTensor):
        return direction
    rounded = direction.to(dtype)
    assert isinstance(rounded, DTensor)
    return rounded.full_tensor()


def step_factor(rows: int, columns: int) -> float:
    """Factor of a matrix's update by its shape, so that updates of all shapes change their layer's output equally.

    Args:
        rows: outputs of the linear layer.
        columns: its inputs.
    """
    return max(1.0, rows / columns) ** 0.5


class Muon(Optimizer):
    """Muon over matrices, several of which may be stacked in one parameter.

    As in torch's fused optimizers, gradients are divided by ``grad_scale``, and nothing changes where ``found_inf`` is
    1. Nothing is read from the device.
    """

    refuses_on_device = True  # see `restomod.engine.optimizer.Optimizers`

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float,
        momentum: float,
        weight_decay: float,
        dtype: torch.dtype = torch.float32,
        distributed: bool = False,
    ) -> None:
        """Args:
        groups: ``params``, matrices; ``stacked``, how many matrices of equal size each of them has one below the other.
        lr: learning rate.
        momentum: decay of the running sum of gradients.
        weight_decay: decoupled, times lr.
        dtype: compute dtype of the orthogonalisation.
        distributed: each process orthogonalises a part of the matrices. All must hold the same gradients, or their
            shards in DTensors.
        """
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "stacked": 1})
        self.dtype, self.distributed = dtype, distributed
        self.grad_scale: Tensor | None = None
        self.found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Make an update, or none; see the class."""
        assert closure is None
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for p in parameters:
                by_shape.setdefault(p.shape, []).append(p)
            for alike in by_shape.values():
                self._update(alike, group)

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Update parameters of one shape."""
        refused = self.found_inf
        directions = []
        for p in parameters:
            state = self.state[p]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(p)
            assert p.grad is not None
            gradient = p.grad if self.grad_scale is None else p.grad / self.grad_scale
            sum_ = state["momentum"] * group["momentum"] + gradient
            if refused is not None:
                sum_ = torch.where(refused > 0, state["momentum"], sum_)
                gradient = torch.where(refused > 0, torch.zeros((), device=p.device), gradient)
            state["momentum"].copy_(sum_)
            directions.append(gradient + group["momentum"] * sum_)  # Nesterov's
        kept = 1.0 if refused is None else 1.0 - refused
        changes = self._orthogonalised(directions, group["stacked"])
        for p, change in zip(parameters, changes, strict=True):
            rows, columns = p.shape[0] // group["stacked"], p.shape[1]
            p.mul_(1 - kept * (group["lr"] * group["weight_decay"]))
            p.sub_(change * (kept * (group["lr"] * step_factor(rows, columns))))

    def _orthogonalised(self, directions: list[Tensor], stacked: int) -> list[Tensor]:
        """Orthogonalise directions of one shape, each of the matrices ``stacked`` in them separately."""
        first = directions[0]
        full = torch.stack([_full(d, self.dtype) for d in directions])
        matrices = full.unflatten(1, (stacked, -1)).flatten(0, 1)  # (n, R, C)
        result = self._divided_among_ranks(matrices) if self.distributed else orthogonalise(matrices, self.dtype)
        changes = result.to(first.dtype).unflatten(0, (-1, stacked)).flatten(1, 2).unbind()
        if not isinstance(first, DTensor):
            return list(changes)
        mesh, placements = first.device_mesh, first.placements
        return [distribute_tensor(c, mesh, placements, src_data_rank=None) for c in changes]

    def _divided_among_ranks(self, matrices: Tensor) -> Tensor:
        """`orthogonalise`, each process a part of the matrices."""
        count, rank, n = dist.get_world_size(), dist.get_rank(), len(matrices)
        each = -(-n // count)
        mine = matrices[rank * each : (rank + 1) * each]
        mine = torch.cat([mine, mine.new_zeros(each - len(mine), *mine.shape[1:])])
        found = mine.new_empty(count, *mine.shape, dtype=self.dtype)
        dist.all_gather(list(found), orthogonalise(mine, self.dtype).contiguous())
        return found.flatten(0, 1)[:n]
