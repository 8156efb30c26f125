"""How much is computed at once: what is fast and fits, less where memory has run out."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Literal

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from restomod.config.model import nearest_divisor_below
from restomod.config.run import OptimConfig, RunConfig
from restomod.data.batches import Batches
from restomod.data.prefetch import MicroBatches
from restomod.engine.chunk_sizes import CHUNK_TOKENS, FAST_TOKENS, ROOM, share_of, tokens_at_once
from restomod.engine.device import release_memory, total_memory
from restomod.engine.distributed import Processes, synchronised
from restomod.engine.memory import optimizer_bytes
from restomod.engine.step import BatchLoss, Compute, batch_loss
from restomod.model.gpt import GPT
from restomod.utils.errors import UserError, is_out_of_memory, one_line

Say = Callable[[str], None]
"""Shows a line to the user."""

TRIED = (2, 4)  # sequences
LONG_MICRO_BATCH = 20.0  # seconds; one that takes longer is not repeated to be timed, unless it was compiled


def choose_micro_batch(config: RunConfig, device: torch.device, processes: int = 1) -> int:
    """Sequences per forward pass: what is configured, or what is fast on this kind of device; raises as `share_of`."""
    share = share_of(config, processes)
    return config.micro_batch or nearest_divisor_below(share, FAST_TOKENS[device.type] // config.sequence_length)


def choose_chunk(device: torch.device) -> int:
    """Tokens whose logits exist at once in the loss."""
    return tokens_at_once(CHUNK_TOKENS, device.type, total_memory(device))


def fitting_micro_batch(model: GPT, batches: Batches, compute: Compute, optim: OptimConfig) -> int:
    """The largest divisor of ``compute.micro_batch`` that fits into a GPU's memory.

    Two small micro-batches go forward and backward, uncompiled; what they take tells what a larger one would. The loss
    is computed in chunks that both fill, so that its memory does not look as if it grew with the micro-batch.
    """
    chunk = min(compute.chunk or choose_chunk(compute.device), compute.micro_batch * batches.T)
    tried = min(chunk, TRIED[0] * batches.T)
    trial = dataclasses.replace(compute, compiled=False, chunk=tried)
    _bytes_taken(model, batches, trial, TRIED[0])  # cuBLAS takes its workspaces from the same memory, once
    taken = [_bytes_taken(model, batches, trial, n) for n in TRIED]
    release_memory(compute.device)
    free, _ = torch.cuda.mem_get_info(compute.device)
    free -= optimizer_bytes(model.config, optim)[0]
    logits = model.config.padded_vocab_size * compute.dtype.itemsize * (2 if compute.compiled else 1)
    free -= (chunk - tried) * logits
    fits = sequences_that_fit((TRIED[0], taken[0]), (TRIED[1], taken[1]), ROOM * free)
    return nearest_divisor_below(compute.micro_batch, fits)


def _bytes_taken(model: GPT, batches: Batches, compute: Compute, sequences: int) -> int:
    tokens, targets = batches.load(batches.windows(0)[:1].repeat(sequences))
    torch.cuda.reset_peak_memory_stats(compute.device)
    before = torch.cuda.memory_allocated(compute.device)
    batch_loss(model, tokens, targets, compute).backward()
    taken = torch.cuda.max_memory_allocated(compute.device) - before
    model.zero_grad(set_to_none=True)
    return taken


def sequences_that_fit(small: tuple[int, int], large: tuple[int, int], room: float) -> int:
    """How many sequences fit into ``room`` bytes, at least 1, given how many bytes two other numbers of them took.

    Short sequences may take so little that both numbers take the same; then any number fits, as far as can be told.
    """
    each = max(1.0, (large[1] - small[1]) / (large[0] - small[0]))
    return max(1, int((room - (small[1] - each * small[0])) / each))


def first_micro_batch(
    model: GPT,
    loss_of: nn.Module,
    batches: Batches,
    compute: Compute,
    config: RunConfig,
    step: int,
    processes: Processes,
    say: Say,
) -> tuple[float, Compute]:
    """Compute a micro-batch of ``step`` forward and backward, the first of a process. All processes call this.

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
            say(f"warning: {reason}: training goes on without it, slower")
        elif no_memory:
            n = compute.micro_batch
            if n == 1:
                raise UserError(
                    f"out of memory with one sequence at once ({reason}); try --recompute, or a smaller model"
                )
            compute = dataclasses.replace(compute, micro_batch=smaller(n))
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
    model: GPT, loss_of: nn.Module, batches: Batches, compute: Compute, step: int
) -> tuple[float, Literal["memory", "compiler"] | None, str]:
    """Seconds of a micro-batch, what kept it from being computed, and the reason in a line. Changes nothing.

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
                raise UserError(f"out of memory ({reason}); lower --micro-batch, or try --recompute") from e
            return 0.0, "memory", reason
        if type(e).__module__.startswith(("torch._dynamo", "torch._inductor", "triton")):
            return 0.0, "compiler", reason
        raise
    return time.perf_counter() - start, None, ""


def cut(micro_batches: MicroBatches, sequences: int) -> MicroBatches:
    """The same batch in micro-batches of at most so many sequences."""
    return [
        (tokens[i : i + sequences], targets[i : i + sequences])
        for tokens, targets in micro_batches
        for i in range(0, len(tokens), sequences)
    ]


def smaller(sequences: int) -> int:
    """The next smaller size of a micro-batch that divides it."""
    return nearest_divisor_below(sequences, sequences // 2)
