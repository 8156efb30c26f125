"""Muon: momentum whose update has, for every matrix, all its singular values made equal.

Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024. The orthogonalisation is the
Newton-Schulz iteration with the coefficients of Amsel et al., "The Polar Express", 2025.

Shapes: n = matrices of equal shape, R = rows, C = columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

# x (a + b x² + c x⁴), step after step: the odd polynomials of degree 5 that bring singular values between 0.001 and 1
# nearest to 1 together. The largest singular value has to be 1 or a little less.
COEFFICIENTS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
MARGIN = 1.02  # the norm is made this much less than 1, as rounding may add to it


def orthogonalised(matrices: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """U Vᵀ, nearly, of each matrix U S Vᵀ: singular values above a thousandth of the norm become about 1.

    Args:
        matrices: (n, R, C); all at once, so that the products are large.
        dtype: of the products. bf16 is precise enough.

    Returns:
        (n, R, C) in ``dtype``.
    """
    x = matrices.to(dtype)
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT  # the smaller of the two products
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * MARGIN + 1e-7)
    for a, b, c in COEFFICIENTS:
        square = x @ x.mT  # (n, R, R)
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x if wide else x.mT


def _whole(direction: Tensor, dtype: torch.dtype) -> Tensor:
    """All of a direction; one that processes share is gathered in ``dtype``, the dtype of the products."""
    if not isinstance(direction, DTensor):
        return direction
    rounded = direction.to(dtype)
    assert isinstance(rounded, DTensor)
    return rounded.full_tensor()


def step_factor(rows: int, columns: int) -> float:
    """What a matrix's update is multiplied with, so that updates of all shapes change their layer's output alike.

    Args:
        rows: outputs of the linear layer.
        columns: its inputs.
    """
    return max(1.0, rows / columns) ** 0.5


class Muon(torch.optim.Optimizer):
    """Muon over matrices. What is stacked in one parameter, as queries, keys and values, is taken apart.

    The interface is that of torch's fused optimizers: where ``grad_scale`` and ``found_inf`` are set, gradients are
    divided by the first, and nothing changes where the second is 1. Nothing is read from the device.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float,
        momentum: float,
        weight_decay: float,
        dtype: torch.dtype = torch.float32,
        share: bool = False,
    ) -> None:
        """Args:
        groups: ``params`` of two dimensions each, and into how many ``parts`` of equal size their rows are divided.
        lr: learning rate.
        momentum: decay of the running sum of gradients.
        weight_decay: decoupled, times lr.
        dtype: of the orthogonalisation's products.
        share: let each process orthogonalise a part of the matrices. All have to hold the same gradients, or parts
            of them in DTensors.
        """
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "parts": 1})
        self.dtype, self.share = dtype, share
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
        changes = self._orthogonalised(directions, group["parts"])
        for p, change in zip(parameters, changes, strict=True):
            rows, columns = p.shape[0] // group["parts"], p.shape[1]
            p.mul_(1 - kept * (group["lr"] * group["weight_decay"]))
            p.sub_(change * (kept * (group["lr"] * step_factor(rows, columns))))

    def _orthogonalised(self, directions: list[Tensor], parts: int) -> list[Tensor]:
        """Every direction, or each of its parts, orthogonalised; all have one shape."""
        first = directions[0]
        stacked = (
            torch.stack([_whole(d, self.dtype) for d in directions]).unflatten(1, (parts, -1)).flatten(0, 1)
        )  # (n, R, C)
        result = self._shared(stacked) if self.share else orthogonalised(stacked, self.dtype)
        changes = result.to(first.dtype).unflatten(0, (-1, parts)).flatten(1, 2).unbind()
        if not isinstance(first, DTensor):
            return list(changes)
        mesh, placements = first.device_mesh, first.placements
        return [distribute_tensor(c, mesh, placements, src_data_rank=None) for c in changes]

    def _shared(self, matrices: Tensor) -> Tensor:
        """`orthogonalised`, each process a part of the matrices."""
        count, rank, n = dist.get_world_size(), dist.get_rank(), len(matrices)
        each = -(-n // count)
        mine = matrices[rank * each : (rank + 1) * each]
        mine = torch.cat([mine, mine.new_zeros(each - len(mine), *mine.shape[1:])])
        found = mine.new_empty(count, *mine.shape, dtype=self.dtype)
        dist.all_gather(list(found), orthogonalised(mine, self.dtype).contiguous())
        return found.flatten(0, 1)[:n]
