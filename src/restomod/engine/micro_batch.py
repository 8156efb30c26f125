"""Choice of the micro-batch: as large as is fast and fits into memory, smaller after an out-of-memory error."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Literal

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from restomod.config.model import divisors_near, nearest_divisor_below
from restomod.config.run import OptimConfig, RunConfig
from restomod.data.batches import Batches, MicroBatches
from restomod.engine.device import CHUNK_TOKENS, FORWARD_TOKENS, release_memory, tokens_on
from restomod.engine.distributed import Processes, synchronised
from restomod.engine.memory import optimizer_bytes
from restomod.engine.step import BatchLoss, ComputeConfig, batch_loss
from restomod.model.gpt import GPT
from restomod.utils.errors import UserError, is_out_of_memory, one_line

Say = Callable[[str], None]
"""Shows a line to the user."""

TRIED = (2, 4)  # sequences
USABLE_MEMORY = 0.9  # share of a GPU's free memory; the rest is lost to fragmentation
LONG_MICRO_BATCH = 20.0  # seconds; one that takes longer is not repeated to be timed, unless it was compiled


def sequences_per_process(config: RunConfig, processes: int) -> int:
    """Sequences of a step that each process computes.

    Raises:
        UserError: they cannot be divided evenly, or not into micro-batches of the configured size.
    """
    sequences, T = config.batch_sequences, config.sequence_length
    if sequences % processes:
        below = sequences // processes * processes
        tokens = " or ".join(str(T * n) for n in (below, below + processes) if n)
        raise UserError(
            f"the {sequences} sequences of a step cannot be shared evenly by {processes} processes; "
            f"choose --batch-tokens {tokens}, or start {divisors_near(sequences, processes)} processes"
        )
    share = sequences // processes
    if config.micro_batch and share % config.micro_batch:
        raise UserError(
            f"micro_batch {config.micro_batch} does not divide the {share} sequences of a step that each process "
            f"has; choose --micro-batch {divisors_near(share, config.micro_batch)}"
        )
    return share


def choose_micro_batch(config: RunConfig, device: torch.device, processes: int = 1) -> int:
    """Sequences per forward pass: configured or chosen by the kind of device. Raises as `sequences_per_process`."""
    share = sequences_per_process(config, processes)
    return config.micro_batch or nearest_divisor_below(share, FORWARD_TOKENS[device.type] // config.sequence_length)


def fitting_micro_batch(model: GPT, batches: Batches, compute: ComputeConfig, optim: OptimConfig) -> int:
    """Find the largest divisor of ``compute.micro_batch`` that fits into a GPU's memory.

    The memory of a forward and backward pass of two small micro-batches, uncompiled, is extrapolated linearly. Both
    fill the chunks of the loss, so that the memory of these does not seem to grow with the micro-batch.
    """
    chunk = min(compute.chunk or tokens_on(compute.device, CHUNK_TOKENS), compute.micro_batch * batches.T)
    tried = min(chunk, TRIED[0] * batches.T)
    trial = dataclasses.replace(compute, compiled=False, chunk=tried)
    _bytes_taken(model, batches, trial, TRIED[0])  # cuBLAS takes its workspaces from the same memory, once
    taken = [_bytes_taken(model, batches, trial, n) for n in TRIED]
    release_memory(compute.device)
    free, _ = torch.cuda.mem_get_info(compute.device)
    free -= optimizer_bytes(model.config, optim)[0]
    logits = model.config.padded_vocab_size * compute.dtype.itemsize * (2 if compute.compiled else 1)
    free -= (chunk - tried) * logits
    fits = sequences_that_fit((TRIED[0], taken[0]), (TRIED[1], taken[1]), USABLE_MEMORY * free)
    return nearest_divisor_below(compute.micro_batch, fits)


def _bytes_taken(model: GPT, batches: Batches, compute: ComputeConfig, sequences: int) -> int:
    tokens, targets = batches.load(batches.windows(0)[:1].repeat(sequences))
    torch.cuda.reset_peak_memory_stats(compute.device)
    before = torch.cuda.memory_allocated(compute.device)
    batch_loss(model, tokens, targets, compute).backward()
    taken = torch.cuda.max_memory_allocated(compute.device) - before
    model.zero_grad(set_to_none=True)
    return taken


def sequences_that_fit(small: tuple[int, int], large: tuple[int, int], room: float) -> int:
    """Extrapolate how many sequences fit into ``room`` bytes, at least 1, from two pairs (sequences, bytes).

    Both pairs may have the same bytes, where sequences are short; then any number fits.
    """
    each = max(1.0, (large[1] - small[1]) / (large[0] - small[0]))
    return max(1, int((room - (small[1] - each * small[0])) / each))


def first_micro_batch(
    model: GPT,
    loss_of: nn.Module,
    batches: Batches,
    compute: ComputeConfig,
    config: RunConfig,
    step: int,
    processes: Processes,
    say: Say,
) -> tuple[float, ComputeConfig]:
    """Compute the first micro-batch of a process, forward and backward. All processes call this.

    torch.compile compiles in it, so a compiled one is timed when it is repeated. Where memory runs out the micro-batch
    is halved; where torch.compile fails and was chosen automatically, the model is run without it.

    Args:
        model: that is trained.
        loss_of, compute: from `restomod.train.setup.make_ready`; a change of ``compute`` is made in ``loss_of`` too.
        batches, config: of the run.
        step: how many updates the weights have had.
        processes: that train the model.
        say: is given a line when compiling begins, and one for each change.

    Returns:
        Seconds of a micro-batch, and ``compute`` as it works.

    Raises:
        UserError: one sequence does not fit, or torch.compile was asked for and does not work.
    """
    repeated = False
    if compute.compiled:
        say("compiling the model, which takes a minute or two the first time …")
    while True:
        seconds, failure, reason = _try_micro_batch(model, loss_of, batches, compute, step)
        no_memory, no_compiler, long = processes.any(
            failure == "memory", failure == "compiler", seconds > LONG_MICRO_BATCH
        )
        if no_compiler:
            reason = f"torch.compile does not work here ({reason or 'in another process'})"
            if config.compile == "on":
                raise UserError(f"{reason}; leave --compile out")
            compute = dataclasses.replace(compute, compiled=False, compile_reason=f"auto: {reason}")
            for part in model.modules():
                part._compiled_call_impl = None
            say(f"warning: {reason}: training continues without it, slower")
        elif no_memory:
            n = compute.micro_batch
            if n == 1:
                raise UserError(
                    f"out of memory with one sequence at once ({reason}); try --gradient-checkpointing or a smaller "
                    "model"
                )
            compute = dataclasses.replace(compute, micro_batch=next_smaller_divisor(n))
            say(f"warning: out of memory with a micro-batch of {n}: it is {compute.micro_batch} from here on")
        elif repeated or (long and not compute.compiled):
            return seconds, compute
        repeated = not (no_compiler or no_memory)
        for module in loss_of.modules():
            if isinstance(module, BatchLoss):
                module.compute = compute
        model.zero_grad(set_to_none=True)
        if no_memory:
            release_memory(compute.device)


def _try_micro_batch(
    model: GPT, loss_of: nn.Module, batches: Batches, compute: ComputeConfig, step: int
) -> tuple[float, Literal["memory", "compiler"] | None, str]:
    """Try a micro-batch: its seconds, what failed, and the reason in a line. Changes nothing.

    Gradients are not averaged over processes, so that one that fails leaves no other waiting. FSDP cannot do without:
    there, out of memory is an error at once.
    """
    tokens, targets = batches.load(batches.windows(step)[: compute.micro_batch])
    sharded = isinstance(loss_of, FSDPModule)
    start = time.perf_counter()
    try:
        with synchronised(loss_of, last=sharded):
            loss = loss_of(tokens, targets)
            loss.backward()
        loss.item()  # waits for the device
        model.zero_grad(set_to_none=True)
    except Exception as e:
        reason = one_line(" ".join(str(e).split()) or type(e).__name__)  # a compiler's first line says nothing
        if is_out_of_memory(e):
            if sharded:
                raise UserError(
                    f"out of memory ({reason}); lower --micro-batch, or try --gradient-checkpointing"
                ) from e
            return 0.0, "memory", reason
        if type(e).__module__.startswith(("torch._dynamo", "torch._inductor", "triton")):
            return 0.0, "compiler", reason
        raise
    return time.perf_counter() - start, None, ""


def split_micro_batches(micro_batches: MicroBatches, sequences: int) -> MicroBatches:
    """Split a batch into micro-batches of at most ``sequences`` sequences."""
    return [
        (tokens[i : i + sequences], targets[i : i + sequences])
        for tokens, targets in micro_batches
        for i in range(0, len(tokens), sequences)
    ]


def next_smaller_divisor(sequences: int) -> int:
    """Next smaller micro-batch that divides this one."""
    return nearest_divisor_below(sequences, sequences // 2)
