"""Gather sharded models and tensors, and broadcast full ones, tensor by tensor.

With FSDP each rank has a shard of every tensor, a DTensor. Without FSDP these functions copy or return their argument.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from restomod.engine.distributed import Processes, linear_parameters
from restomod.model.gpt import GPT


def is_sharded(model: nn.Module) -> bool:
    """Return whether the model's weights are sharded over the ranks (FSDP)."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


@torch.no_grad()
def copy_from_main(read: Callable[[], Tensor], tensor: Tensor, processes: Processes) -> None:
    """Copy a tensor from rank 0 into a tensor of all ranks. All ranks must call this function.

    Args:
        read: function that returns the full tensor, on any device. It is called in rank 0 only.
        tensor: destination, a full tensor or a DTensor of the same shape. A DTensor gets this rank's shard.
        processes: ranks that have the tensor.

    Raises:
        UserError: ``read`` failed; raised in rank 0.
        ReportedElsewhere: ``read`` failed; raised in all other ranks.
    """

    def work() -> Tensor:
        if processes.main:
            return read().to(tensor.device, tensor.dtype)
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)

    value = processes.run_on_all_ranks(work)
    if processes.world_size > 1:
        dist.broadcast(value, src=0)
    if isinstance(tensor, DTensor):
        value = distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)
    tensor.copy_(value)


def broadcast_weights(model: GPT, source: GPT | None, processes: Processes) -> None:
    """Broadcast the weights of a model from rank 0 to all ranks. All ranks must call this function.

    Args:
        model: destination, with full or sharded weights.
        source: model with the same configuration; needed in rank 0 only.
        processes: ranks that have the model.
    """
    weights = {} if source is None else dict(source.named_parameters())
    for name, parameter in model.named_parameters():
        copy_from_main(functools.partial(weights.__getitem__, name), parameter, processes)


@torch.no_grad()
def gather_on_main(tensors: Mapping[str, Tensor], processes: Processes) -> dict[str, Tensor]:
    """Gather tensors on the CPU of rank 0. All ranks must call this function.

    A GPU has at most one full tensor at a time.

    Returns:
        Full tensors by name in rank 0; an empty dict in other ranks.
    """
    gathered = {}
    for name, tensor in tensors.items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if processes.main:
            gathered[name] = full.cpu()
        del full  # free it before the next tensor is gathered
    return gathered


def gather_model_on_main(model: GPT, processes: Processes) -> GPT:
    """Gather a full copy of a model on the CPU of rank 0. All ranks must call this function.

    Returns:
        Model on the CPU in rank 0; model on the meta device, without weights, in other ranks.
    """
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return _assembled(model, gather_on_main(parameters, processes))


@torch.no_grad()
def gather_full_model(model: GPT, dtype: torch.dtype = torch.float32, keep: bool = True) -> GPT:
    """Gather the full model on the device of this rank. All ranks must call this function.

    Args:
        model: model after `distribute`.
        dtype: dtype of the blocks' linear layers in the copy. The compute dtype loses nothing, because autocast would
            cast them to it anyway.
        keep: whether this rank needs the weights.

    Returns:
        ``model`` if it is not sharded, else a full copy; without ``keep`` a copy on the meta device, without weights.
    """
    if not is_sharded(model):
        return model
    linear, tensors = linear_parameters(model), {}
    for name, parameter in model.named_parameters():
        tensor = parameter.to(dtype) if parameter in linear else parameter.detach()
        assert isinstance(tensor, DTensor)
        full = tensor.full_tensor()
        if keep:
            tensors[name] = full
        del full
    return _assembled(model, tensors)


def _assembled(like: GPT, tensors: Mapping[str, Tensor]) -> GPT:
    """Build a model with the configuration of ``like`` and the given weights; on the meta device if there are none."""
    with torch.device("meta"):
        model = GPT(like.config)
    if tensors:
        model.load_state_dict(tensors, assign=True)
    return model.requires_grad_(False)
