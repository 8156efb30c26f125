"""Data-parallel training with torchrun: process group, collectives, errors of ranks, DDP and FSDP.

Each rank computes its share of the batch. Gradients are averaged after the last micro-batch (all-reduce), so the
results of a run do not depend on the number of ranks up to rounding. DDP (DistributedDataParallel) replicates the
model; FSDP2 (`fully_shard`) shards every tensor over the ranks. Without torchrun there is one rank, and all
collectives are no-ops.

    torchrun --nproc-per-node 8 -m restomod train gpt2-124m ...
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from restomod.config.run import Parallel
from restomod.engine.barrier import Barrier
from restomod.engine.signals import stop_with_torchrun
from restomod.model.gpt import GPT
from restomod.utils.errors import ReportedElsewhere, UserError, describe_os_error, one_line

PATIENCE = datetime.timedelta(minutes=30)  # time-out of collective operations
CONNECTING = datetime.timedelta(minutes=1)  # time-out of connecting to torchrun's store, which starts before the ranks

Result = TypeVar("Result")


@dataclass(frozen=True)
class Processes:
    """Ranks of a run: rank and world size of this process, and collective operations over all ranks.

    All ranks must call the collective operations, in the same order. With a world size of 1 there is no communication.
    """

    rank: int = 0
    """Rank of this process, 0 to world size - 1."""
    world_size: int = 1
    """Number of ranks."""
    local_rank: int = 0
    """Rank among the processes of the same machine, the index of its GPU."""
    barrier: Barrier | None = field(default=None, compare=False)
    """Barrier for work that a single rank does; None: the other ranks wait in the next collective operation."""

    @property
    def main(self) -> bool:
        """Whether this is the main process: rank 0, the only one that writes files and prints."""
        return self.rank == 0

    def mean(self, value: Tensor) -> Tensor:
        """Compute the mean of a scalar tensor over all ranks (all-reduce)."""
        if self.world_size > 1:
            value = value.clone()
            dist.all_reduce(value)
            value /= self.world_size
        return value

    def sum(self, *values: float) -> list[float]:
        """Compute the sum of each number over all ranks (all-reduce in fp64)."""
        if self.world_size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return [float(value) for value in total]

    def gather(self, value: Result) -> list[Result]:
        """Return the values of all ranks, in the order of ranks (all-gather of pickled objects)."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def least(self, value: int) -> int:
        """Return the minimum of an integer over all ranks (all-reduce)."""
        if self.world_size > 1:
            least = torch.tensor(value)
            dist.all_reduce(least, dist.ReduceOp.MIN)
            value = int(least)
        return value

    def any(self, *flags: bool) -> list[bool]:
        """Return for each flag whether it is set in any rank (all-reduce)."""
        return [n > 0 for n in self.sum(*flags)]

    def run_on_all_ranks(self, work: Callable[[], Result], one_first: bool = False) -> Result:
        """Run a function in all ranks; if it fails in one rank, raise in all.

        Args:
            work: function to run once per rank. A `UserError` or `OSError` counts as failure.
            one_first: run it in local rank 0 of each machine before the other ranks; for functions that write files.

        Returns:
            Result of ``work`` in this rank.

        Raises:
            UserError: ``work`` failed; raised in the first failing rank.
            ReportedElsewhere: ``work`` failed; raised in all other ranks, without a message to the user.
        """
        if self.world_size == 1:
            return work()
        result: list[Result] = []
        problem: UserError | OSError | None = None
        for turn in (self.local_rank == 0, self.local_rank > 0) if one_first else (True, False):
            if turn and problem is None:
                try:
                    result.append(work())
                except UserError as e:
                    if e.known_to_all:  # raised by a nested `run_on_all_ranks`
                        raise
                    problem = e
                except OSError as e:
                    problem = e
            if self.barrier is not None:
                self.barrier.wait()
            failed: list[bool] = [False] * self.world_size
            dist.all_gather_object(failed, problem is not None)
            if any(failed):
                raise self._shared(problem) if problem and failed.index(True) == self.rank else ReportedElsewhere()
        return result[0]

    def from_main(self, work: Callable[[], Result]) -> Result:
        """Run a function in the main process only, and broadcast its result.

        Args:
            work: function whose result can be pickled.

        Returns:
            Result of ``work``, in all ranks.

        Raises:
            UserError: ``work`` failed; raised in rank 0.
            ReportedElsewhere: ``work`` failed; raised in all other ranks.
        """
        result = [self.run_on_all_ranks(lambda: work() if self.main else None)]
        if self.world_size > 1:
            dist.broadcast_object_list(result)
        return cast(Result, result[0])

    def agree(self) -> None:
        """Raise if another rank has failed in the current `run_on_all_ranks`.

        ``work`` must call it before a collective operation, which would otherwise wait for the failed rank.

        Raises:
            ReportedElsewhere: another rank has failed.
        """
        self.run_on_all_ranks(lambda: None)

    def error(self, message: str) -> UserError:
        """Return an error for a problem that occurs in all ranks: `UserError` in rank 0, else `ReportedElsewhere`."""
        return self._shared(UserError(message)) if self.main else ReportedElsewhere(message)

    @staticmethod
    def _shared(problem: UserError | OSError) -> UserError:
        """Convert an error to a `UserError` that is marked as known to the other ranks."""
        error = problem if isinstance(problem, UserError) else UserError(describe_os_error(problem))
        error.known_to_all = True
        return error


SINGLE = Processes()
"""Ranks of a run without torchrun: one."""


def device_of(device: torch.device, processes: Processes) -> torch.device:
    """Return the device of this rank. On CUDA the local rank is the index of the GPU.

    Args:
        device: device type of the run.
        processes: ranks of the run.

    Raises:
        UserError: the machine has fewer GPUs than ranks.
    """
    if device.type != "cuda" or processes.world_size == 1:
        return device
    if processes.local_rank >= torch.cuda.device_count():
        raise UserError(
            f"there are at least {processes.local_rank + 1} processes, but only {torch.cuda.device_count()} GPUs; "
            f"start one process per GPU: torchrun --nproc-per-node {torch.cuda.device_count()}"
        )
    return torch.device("cuda", processes.local_rank)


@contextlib.contextmanager
def join_processes(remedy: str = "start all processes again") -> Iterator[Processes]:
    """Join torchrun's process group, and leave it at the end of the context. Without torchrun there is one rank.

    Args:
        remedy: advice to the user if another rank is lost.

    Yields:
        Ranks of the run.

    Raises:
        UserError: torchrun's store cannot be reached, or another rank is lost.
        ReportedElsewhere: another rank has reported the error.
    """
    stop_with_torchrun()
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Processes()
        return
    local_rank = int(os.environ["LOCAL_RANK"])
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
        # CPU tensors use gloo, without a wait for the GPU; GPU tensors use NCCL. `device_id` is not given, because it
        # would connect NCCL here. A run on the CPU needs no NCCL, and two ranks on one GPU must reach `device_of`,
        # whose message is clearer than NCCL's internal error.
        backend = "cpu:gloo,cuda:nccl"
    store, rank = _store()
    # after a restart torchrun's store still has the addresses of the previous processes
    store = dist.PrefixStore(f"restart_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    barrier = Barrier(store, rank, count)  # before the process group, so that all heartbeats exist before any wait
    dist.init_process_group(backend, timeout=PATIENCE, store=store, rank=rank, world_size=count)
    processes = Processes(rank, count, local_rank, barrier)
    failed = False
    try:
        yield processes
    except BaseException as e:
        failed = True
        if threading.current_thread() is threading.main_thread():
            # torchrun sends SIGTERM as soon as one rank has ended, but this rank may still have to print its error
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _drop_locals(e)
        if isinstance(e, UserError) and e.known_to_all:
            raise
        lost = isinstance(e, dist.DistError) or (isinstance(e, RuntimeError) and ("gloo" in str(e) or "NCCL" in str(e)))
        if not _reports_first(store) and (lost or isinstance(e, (UserError, OSError))):
            raise ReportedElsewhere from e
        if lost:
            raise UserError(f"another process of this run was lost ({one_line(e)}); {remedy}") from e
        raise
    finally:
        # deleting a DistributedDataParallel after the process group can deadlock: torch holds the interpreter's lock
        # while it waits for gloo's threads, which may need the lock
        gc.collect()
        barrier.leave()
        with contextlib.suppress(Exception):  # errors are expected if another rank has died
            group = dist.group.WORLD
            if failed and group is not None:
                # destroy_process_group waits for pending NCCL operations, which never end if a rank is missing
                group.abort()
            dist.destroy_process_group()


def _store() -> tuple[dist.Store, int]:
    """Connect to the store of the run.

    Returns:
        Store, and the rank of this process.

    Raises:
        UserError: the store does not answer.
    """
    of_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # otherwise rank 0 has the store
    try:
        store, rank, _ = next(dist.rendezvous("env://", timeout=CONNECTING if of_torchrun else PATIENCE))
    except dist.DistError as e:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise UserError(f"cannot connect to the other processes at {address}: start all processes again") from e
    store.set_timeout(PATIENCE)
    return store, rank


def _reports_first(store: dist.Store) -> bool:
    """Return whether this rank is the first one to report why the run ends. The store outlives the ranks."""
    try:
        return store.add("reported", 1) == 1
    except (dist.DistError, RuntimeError):  # torchrun has ended too
        return True


def _drop_locals(e: BaseException | None) -> None:
    """Delete the local variables in the traceback of an exception, so that their tensors are freed."""
    while e is not None:
        traceback.clear_frames(e.__traceback__)
        e = e.__cause__ or e.__context__


def compiled_parts(model: GPT, parallel: Parallel) -> list[nn.Module]:
    """Return the modules to compile with torch.compile, before `distribute`.

    With FSDP each block is compiled separately, and all blocks share one graph: torch does not trace FSDP's hooks on
    the blocks, and with gradient checkpointing it would silently compile nothing. With DDP the transformer is compiled
    as a whole, and torch splits the graph at the boundaries of gradient buckets.
    """
    return list(model.transformer.h) if parallel == "fsdp" else [model.transformer]


def distribute(
    loss: nn.Module, model: GPT, parallel: Parallel, processes: Processes, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """Apply DDP or FSDP to a module that computes the loss, so that gradients are averaged over the ranks.

    Args:
        loss: module that computes the loss from tokens and targets, and contains ``model``.
        model: language model with fp32 weights.
        parallel: ddp or fsdp.
        processes: ranks of the run. With a world size of 1, ddp changes nothing.
        dtype: compute dtype of matmuls, which run under autocast.

    Returns:
        Module to call instead of ``loss``.

    Raises:
        UserError: fsdp without torchrun.
    """
    if parallel == "fsdp":
        if not dist.is_initialized():
            raise UserError(
                "--parallel fsdp needs several processes: start two or more with torchrun --nproc-per-node, "
                "or choose --parallel ddp"
            )
        _shard(loss, model, processes, dtype)
        return loss
    if processes.world_size == 1:
        return loss
    # no `device_ids`: DDP would copy the tokens to the GPU synchronously
    return DistributedDataParallel(loss, gradient_as_bucket_view=True)


def _shard(loss: nn.Module, model: GPT, processes: Processes, dtype: torch.dtype) -> None:
    """Apply FSDP2 in place: one group per block for its linear layers, and a root group for all other parameters.

    Linear layers are all-gathered in the compute dtype. Autocast would round them to it anyway, so the results are
    unchanged, with half the traffic and memory. Gradients are averaged in fp32. Embeddings, lm_head and norms stay in
    fp32. Norms need fp32 weights: 16-bit weights on the fp32 residual stream are an error on a CPU, and exclude the
    fused RMS norm kernel on CUDA (torch 2.11). Norms are therefore in the root group, which is gathered once per pass.
    Hooks inside the blocks would break the graph of torch.compile.
    """
    # the default mesh consists of GPUs, even for a model on the CPU
    device = model.head.device
    mesh = init_device_mesh(device.type, (processes.world_size,))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    blocks, linear = model.transformer.h, linear_parameters(model)
    # FSDP finds the root group's parameters on paths that avoid the blocks, so norms need a second path to them
    loss.reached = nn.ModuleList(module for module in blocks.modules() if set(module.parameters(False)) - linear)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, ignored_params=set(block.parameters()) - linear)
    fully_shard(loss, mesh=mesh)
    del loss.reached

    def move(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        asynchronous = device.type == "cuda"  # MPS may read or write such a copy too early
        return tuple(x.to(device, non_blocking=asynchronous) if isinstance(x, Tensor) else x for x in inputs)

    # before FSDP's hook, which would copy the tokens to the GPU synchronously
    loss.register_forward_pre_hook(move, prepend=True)


def linear_parameters(model: GPT) -> set[nn.Parameter]:
    """Return the weights and biases of the blocks' linear layers, which autocast casts to the compute dtype."""
    layers = [module for module in model.transformer.h.modules() if isinstance(module, nn.Linear)]
    return {parameter for layer in layers for parameter in layer.parameters()}


@contextlib.contextmanager
def synchronised(loss: nn.Module, last: bool) -> Iterator[None]:
    """Average gradients over the ranks only in the last backward pass of a step (gradient accumulation).

    Args:
        loss: result of `distribute`.
        last: whether the micro-batch is the last one of its step.
    """
    if isinstance(loss, FSDPModule):
        loss.set_requires_gradient_sync(last)
        yield
    elif isinstance(loss, DistributedDataParallel) and not last:
        with loss.no_sync():
            yield
    else:
        yield
