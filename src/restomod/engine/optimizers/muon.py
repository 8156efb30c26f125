"""Muon for the matrices of the blocks, AdamW for all other parameters.

Muon's update of a matrix is its momentum, orthogonalised: all singular values become about 1. The orthogonalisation is
a Newton-Schulz iteration.

Shapes: n = matrices of equal shape, R = rows, C = columns.

Sources: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024; Amsel et al., "The Polar
Express", 2025 (coefficients of the iteration).
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

COEFFICIENTS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
"""Coefficients (a, b, c) of the polynomial x (a + b x² + c x⁴) of each iteration. Their composition is the best
approximation of 1 for singular values between 0.001 and 1. The largest singular value must be at most 1."""
MARGIN = 1.02  # divisor that keeps the norm below 1 in spite of rounding


def build(model: GPT, config: OptimConfig, dtype: torch.dtype, distributed: bool) -> list[Optimizer]:
    """Build Muon for the matrices of the blocks and AdamW for all other parameters.

    Matrices that are stacked in one parameter (queries, keys and values; gate and up) are orthogonalised separately.
    Arguments are those in `restomod.engine.optimizers`.
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
    """Orthogonalise matrices: approximate U Vᵀ of each matrix U S Vᵀ (singular value decomposition).

    Singular values above 0.001 of the matrix's norm become about 1.

    Args:
        matrices: (n, R, C).
        dtype: compute dtype of matmuls. bf16 is precise enough.

    Returns:
        Orthogonalised matrices, (n, R, C) in ``dtype``.
    """
    x = matrices.to(dtype)
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT  # R <= C from here on, so that x @ x.mT is the smaller of the two Gram matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * MARGIN + 1e-7)
    for a, b, c in COEFFICIENTS:
        square = x @ x.mT  # (n, R, R)
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x if wide else x.mT


def _full(direction: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the full tensor of a direction. A DTensor is all-gathered in ``dtype`` (bf16 halves the traffic)."""
    if not isinstance(direction, DTensor):
        return direction
    rounded = direction.to(dtype)
    assert isinstance(rounded, DTensor)
    return rounded.full_tensor()


def step_factor(rows: int, columns: int) -> float:
    """Return the factor of a matrix's update, sqrt(max(1, rows / columns)).

    With it, updates of matrices of all shapes change the outputs of their layers by equal amounts.

    Args:
        rows: outputs of the linear layer.
        columns: inputs of the linear layer.
    """
    return max(1.0, rows / columns) ** 0.5


class Muon(Optimizer):
    """Muon optimizer for matrices. Several matrices may be stacked in one parameter.

    As in torch's fused optimizers, gradients are divided by ``grad_scale``, and the update is skipped if ``found_inf``
    is 1, without waiting for the device.

    Args:
        groups: parameter groups with ``params`` (matrices) and ``stacked`` (number of equal matrices that are stacked
            along the rows of each parameter).
        lr: learning rate.
        momentum: decay of the running sum of gradients.
        weight_decay: decoupled weight decay, multiplied by ``lr``.
        dtype: compute dtype of the orthogonalisation.
        distributed: divide the matrices among the ranks for orthogonalisation. All ranks must have the same gradients,
            or their shards in DTensors.
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
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "stacked": 1})
        self.dtype, self.distributed = dtype, distributed
        self.grad_scale: Tensor | None = None
        self.found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient, or skip the update if ``found_inf`` is 1."""
        assert closure is None
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for p in parameters:
                by_shape.setdefault(p.shape, []).append(p)
            for alike in by_shape.values():
                self._update(alike, group)

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Update parameters of equal shape, whose matrices are orthogonalised in one batch."""
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
            directions.append(gradient + group["momentum"] * sum_)  # Nesterov momentum
        kept = 1.0 if refused is None else 1.0 - refused
        changes = self._orthogonalised(directions, group["stacked"])
        for p, change in zip(parameters, changes, strict=True):
            rows, columns = p.shape[0] // group["stacked"], p.shape[1]
            p.mul_(1 - kept * (group["lr"] * group["weight_decay"]))
            p.sub_(change * (kept * (group["lr"] * step_factor(rows, columns))))

    def _orthogonalised(self, directions: list[Tensor], stacked: int) -> list[Tensor]:
        """Orthogonalise directions of equal shape, each of their ``stacked`` matrices separately."""
        first = directions[0]
        full = torch.stack([_full(d, self.dtype) for d in directions])  # (parameters, stacked R, C)
        matrices = full.unflatten(1, (stacked, -1)).flatten(0, 1)  # (n, R, C)
        result = self._divided_among_ranks(matrices) if self.distributed else orthogonalise(matrices, self.dtype)
        changes = result.to(first.dtype).unflatten(0, (-1, stacked)).flatten(1, 2).unbind()
        if not isinstance(first, DTensor):
            return list(changes)
        mesh, placements = first.device_mesh, first.placements
        return [distribute_tensor(c, mesh, placements, src_data_rank=None) for c in changes]

    def _divided_among_ranks(self, matrices: Tensor) -> Tensor:
        """Orthogonalise matrices, (n, R, C), with each rank computing a part; all-gather the results."""
        count, rank, n = dist.get_world_size(), dist.get_rank(), len(matrices)
        each = -(-n // count)
        mine = matrices[rank * each : (rank + 1) * each]
        mine = torch.cat([mine, mine.new_zeros(each - len(mine), *mine.shape[1:])])  # (each, R, C)
        found = mine.new_empty(count, *mine.shape, dtype=self.dtype)
        dist.all_gather(list(found), orthogonalise(mine, self.dtype).contiguous())
        return found.flatten(0, 1)[:n]
