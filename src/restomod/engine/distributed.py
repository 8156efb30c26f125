"""Data-parallel training: joining torchrun's processes, their collectives and errors, DDP and FSDP.

Every process computes its slice of the global batch, and gradients are averaged after the last micro-batch, so the
results of a run do not depend on the number of processes. DistributedDataParallel replicates the model; FSDP2
(`fully_shard`) shards every tensor. A single process has a world size of 1, so callers never branch.

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
CONNECTING = datetime.timedelta(minutes=1)  # to torchrun's store, which is there before the processes are

Result = TypeVar("Result")


@dataclass(frozen=True)
class Processes:
    """Rank and world size of this process, and collectives over all processes of the run."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """Rank among the processes of the same machine."""
    barrier: Barrier | None = field(default=None, compare=False)
    """Where processes wait for one that works alone; None: in the next collective operation."""

    @property
    def main(self) -> bool:
        """Whether this is rank 0, which prints and writes."""
        return self.rank == 0

    def mean(self, value: Tensor) -> Tensor:
        """Mean of a scalar over all processes, the same in each."""
        if self.world_size > 1:
            value = value.clone()
            dist.all_reduce(value)
            value /= self.world_size
        return value

    def sum(self, *values: float) -> list[float]:
        """Sums of numbers over all processes, the same in each."""
        if self.world_size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return [float(value) for value in total]

    def gather(self, value: Result) -> list[Result]:
        """Values of all processes, by rank, the same in each."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def least(self, value: int) -> int:
        """Smallest value over all processes."""
        if self.world_size > 1:
            least = torch.tensor(value)
            dist.all_reduce(least, dist.ReduceOp.MIN)
            value = int(least)
        return value

    def any(self, *flags: bool) -> list[bool]:
        """For each flag, whether it is set in any process."""
        return [n > 0 for n in self.sum(*flags)]

    def run_on_all_ranks(self, work: Callable[[], Result], one_first: bool = False) -> Result:
        """Run ``work`` in every process; if it fails in one, all fail.

        Args:
            work: called once.
            one_first: local rank 0 of each machine runs it before the others do; for work that writes files.

        Raises:
            UserError: in the first process that fails; in the others `ReportedElsewhere`, which is not printed.
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
                    if e.known_to_all:  # from a `run_on_all_ranks` within this one
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
        """Run ``work`` in rank 0 only, and return its result in every process.

        Raises:
            UserError: as ``work`` does; in the other processes `ReportedElsewhere`.
        """
        result = [self.run_on_all_ranks(lambda: work() if self.main else None)]
        if self.world_size > 1:
            dist.broadcast_object_list(result)
        return cast(Result, result[0])

    def agree(self) -> None:
        """Within a `run_on_all_ranks`: stop if another process has failed in it.

        To be called before a collective operation, which would wait for the process that has failed.
        """
        self.run_on_all_ranks(lambda: None)

    def error(self, message: str) -> UserError:
        """Error to raise where all processes meet the same problem; rank 0 reports it."""
        return self._shared(UserError(message)) if self.main else ReportedElsewhere(message)

    @staticmethod
    def _shared(problem: UserError | OSError) -> UserError:
        """Mark ``problem`` as known to the other processes."""
        error = problem if isinstance(problem, UserError) else UserError(describe_os_error(problem))
        error.known_to_all = True
        return error


SINGLE = Processes()


def device_of(device: torch.device, processes: Processes) -> torch.device:
    """Device of this process: on CUDA the GPU of its local rank."""
    if device.type != "cuda" or processes.world_size == 1:
        return device
    if processes.local_rank >= torch.cuda.device_count():
        raise UserError(
            f"{processes.local_rank + 1} processes or more on a machine with {torch.cuda.device_count()} GPUs; "
            f"start one per GPU: torchrun --nproc-per-node {torch.cuda.device_count()}"
        )
    return torch.device("cuda", processes.local_rank)


@contextlib.contextmanager
def join_processes(mend: str = "start all of them again") -> Iterator[Processes]:
    """Join the processes that torchrun has started, if any, and leave them at the end.

    Args:
        mend: what the user is to do where a process is lost.
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
        # Numbers and objects of the CPU go through gloo and wait for no GPU; gradients and weights go through NCCL.
        # Without `device_id`, which would connect NCCL here: `device_of` refuses two processes on one GPU in plain
        # words, NCCL with an internal error; and a run on the CPU needs no NCCL.
        backend = "cpu:gloo,cuda:nccl"
    store, rank = _store()
    # after a restart torchrun's store still holds the addresses of the processes before
    store = dist.PrefixStore(f"restart_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    barrier = Barrier(store, rank, count)  # before any can wait: then the heartbeats of all are there
    dist.init_process_group(backend, timeout=PATIENCE, store=store, rank=rank, world_size=count)
    processes = Processes(rank, count, local_rank, barrier)
    failed = False
    try:
        yield processes
    except BaseException as e:
        failed = True
        if threading.current_thread() is threading.main_thread():
            # torchrun sends it as soon as the first process has ended, and the line about why is still to be printed
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _drop_locals(e)
        if isinstance(e, UserError) and e.known_to_all:
            raise
        lost = isinstance(e, dist.DistError) or (isinstance(e, RuntimeError) and ("gloo" in str(e) or "NCCL" in str(e)))
        if not _reports_first(store) and (lost or isinstance(e, (UserError, OSError))):
            raise ReportedElsewhere from e
        if lost:
            raise UserError(f"another process of this run is gone ({one_line(e)}); {mend}") from e
        raise
    finally:
        # torch waits for gloo's threads while it deletes a DistributedDataParallel that outlives the process group,
        # and they may wait for the interpreter's lock, which it holds
        gc.collect()
        barrier.leave()
        with contextlib.suppress(Exception):  # where another process has died there is nothing to leave in order
            group = dist.group.WORLD
            if failed and group is not None:
                # destroying waits for what NCCL still has to do, which never ends where a process is missing
                group.abort()
            dist.destroy_process_group()


def _store() -> tuple[dist.Store, int]:
    """Connect to the store of the run; return it and the rank of this process.

    Raises:
        UserError: nobody answers there.
    """
    of_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # else that of the main process
    try:
        store, rank, _ = next(dist.rendezvous("env://", timeout=CONNECTING if of_torchrun else PATIENCE))
    except dist.DistError as e:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise UserError(f"nobody answers at {address}, where the processes are to meet: start all of them again") from e
    store.set_timeout(PATIENCE)
    return store, rank


def _reports_first(store: dist.Store) -> bool:
    """Whether no other process has reported yet why the run ends. The store is torchrun's, which outlives them."""
    try:
        return store.add("reported", 1) == 1
    except (dist.DistError, RuntimeError):  # it is gone too
        return True


def _drop_locals(e: BaseException | None) -> None:
    """Drop the local variables in the traceback of an exception."""
    while e is not None:
        traceback.clear_frames(e.__traceback__)
        e = e.__cause__ or e.__context__


def compiled_parts(model: GPT, parallel: Parallel) -> list[nn.Module]:
    """Modules to compile separately, before `distribute`; blocks share one graph.

    torch does not trace FSDP's hooks on the blocks; with activation checkpointing around them it would silently compile
    nothing of the transformer. Under DDP torch splits the transformer where buckets of gradients end.
    """
    return list(model.transformer.h) if parallel == "fsdp" else [model.transformer]


def distribute(
    loss: nn.Module, model: GPT, parallel: Parallel, processes: Processes, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """Wrap a module that computes the loss, so that its gradients are averaged over the processes.

    Args:
        loss: called with tokens and targets; holds ``model``.
        model: the language model within it, with fp32 weights.
        parallel: ddp or fsdp.
        processes: with a world size of 1, nothing is done for ddp.
        dtype: compute dtype of the matmuls, which run under autocast.

    Returns:
        The module to call in place of ``loss``.

    Raises:
        UserError: fsdp in a single process.
    """
    if parallel == "fsdp":
        if not dist.is_initialized():
            raise UserError(
                "--parallel fsdp shares a model among processes: start two or more with torchrun --nproc-per-node, "
                "or choose --parallel ddp"
            )
        _shard(loss, model, processes, dtype)
        return loss
    if processes.world_size == 1:
        return loss
    # with `device_ids` it would copy the tokens to the GPU itself, and wait there for all that the GPU has to do
    return DistributedDataParallel(loss, gradient_as_bucket_view=True)


def _shard(loss: nn.Module, model: GPT, processes: Processes, dtype: torch.dtype) -> None:
    """Apply FSDP2 in place: a group per block, and a root group with all other parameters.

    A block's linear layers are gathered in the compute dtype, to which autocast would round them anyway, so the results
    are those of fp32 weights at half the traffic and memory. Gradients are averaged in fp32. All else stays in fp32:
    embeddings, head and norms. A norm of the fp32 residual stream with 16-bit weights is an error on the CPU and, as an
    RMS norm, leaves the fused kernel on CUDA (torch 2.11). Norms are therefore in the root group, which a pass gathers
    once; hooks inside of the blocks would break the graph of `torch.compile`.
    """
    # the default mesh is that of the GPUs of a machine, even for a model on its CPU
    device = model.head.device
    mesh = init_device_mesh(device.type, (processes.world_size,))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    blocks, linear = model.transformer.h, linear_parameters(model)
    # the root group takes the parameters of all modules to which a path leads that avoids the groups before it
    loss.reached = nn.ModuleList(module for module in blocks.modules() if set(module.parameters(False)) - linear)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, ignored_params=set(block.parameters()) - linear)
    fully_shard(loss, mesh=mesh)
    del loss.reached

    def move(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        asynchronous = device.type == "cuda"  # MPS may read or write such a copy too early
        return tuple(x.to(device, non_blocking=asynchronous) if isinstance(x, Tensor) else x for x in inputs)

    # before FSDP's own hook, which would copy the tokens to the GPU, and wait there for all that the GPU has to do
    loss.register_forward_pre_hook(move, prepend=True)


def linear_parameters(model: GPT) -> set[nn.Parameter]:
    """Parameters of the blocks that autocast casts to the compute dtype: weights and biases of linear layers."""
    layers = [module for module in model.transformer.h.modules() if isinstance(module, nn.Linear)]
    return {parameter for layer in layers for parameter in layer.parameters()}


@contextlib.contextmanager
def synchronised(loss: nn.Module, last: bool) -> Iterator[None]:
    """Average gradients over the processes in a backward pass only if it is the ``last`` of its step."""
    if isinstance(loss, FSDPModule):
        loss.set_requires_gradient_sync(last)
        yield
    elif isinstance(loss, DistributedDataParallel) and not last:
        with loss.no_sync():
            yield
    else:
        yield
