"""Gathering of sharded models and tensors, and broadcasting of full ones, tensor by tensor.

FSDP leaves each process a shard of every tensor, in a DTensor. Without shards these functions copy, or do nothing, so
callers never branch.
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
    """Whether each process holds only a shard of the model's weights."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


@torch.no_grad()
def copy_from_main(read: Callable[[], Tensor], tensor: Tensor, processes: Processes) -> None:
    """Broadcast what ``read`` returns in rank 0 into ``tensor`` of every process. All processes must call it.

    Args:
        read: called in rank 0 only; returns a full tensor of the shape of ``tensor``, on any device.
        tensor: full, or a DTensor, of which each process gets its shard.
        processes: that have the tensor.

    Raises:
        UserError: as ``read`` does; in the other processes `ReportedElsewhere`.
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
    """Broadcast the weights of ``source`` into the model of every process. All processes must call it.

    Args:
        model: each process has all of its weights, or shards.
        source: of the same shape; needed in rank 0 only.
        processes: that have the model.
    """
    weights = {} if source is None else dict(source.named_parameters())
    for name, parameter in model.named_parameters():
        copy_from_main(functools.partial(weights.__getitem__, name), parameter, processes)


@torch.no_grad()
def gather_on_main(tensors: Mapping[str, Tensor], processes: Processes) -> dict[str, Tensor]:
    """Gather full tensors on the CPU of rank 0, nothing in the others. All processes must call it.

    A GPU holds at most one full tensor at a time.
    """
    gathered = {}
    for name, tensor in tensors.items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if processes.main:
            gathered[name] = full.cpu()
        del full  # before the next one is gathered
    return gathered


def gather_model_on_main(model: GPT, processes: Processes) -> GPT:
    """Gather a full copy of a sharded model on the CPU of rank 0; without weights in the others.

    All processes must call it.
    """
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return _assembled(model, gather_on_main(parameters, processes))


@torch.no_grad()
def gather_full_model(model: GPT, dtype: torch.dtype = torch.float32, keep: bool = True) -> GPT:
    """Gather the full model on this process's device: itself, or a copy where it is sharded.

    All processes must call it.

    Args:
        model: as `distribute` left it.
        dtype: of the linear layers in the blocks: the compute dtype, to which autocast would cast them anyway.
        keep: whether this process needs the weights. The copy is without them otherwise.
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
    """Model of the configuration of ``like`` with ``tensors`` as weights; on `meta` where there are none."""
    with torch.device("meta"):
        model = GPT(like.config)
    if tensors:
        model.load_state_dict(tensors, assign=True)
    return model.requires_grad_(False)
