"""Choice of the micro-batch size: large enough to be fast, small enough for memory, halved after out of memory."""

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
"""Function that shows a line to the user."""

TRIED = (2, 4)  # sequences of the two micro-batches whose memory is measured
USABLE_MEMORY = 0.9  # share of a GPU's free memory; the rest is reserved for fragmentation
LONG_MICRO_BATCH = 20.0  # seconds; a longer micro-batch is not repeated for timing, unless it was compiled


def sequences_per_process(config: RunConfig, processes: int) -> int:
    """Return the sequences of a step that each rank computes.

    Args:
        config: run configuration.
        processes: world size.

    Raises:
        UserError: the sequences cannot be divided evenly among the ranks, or a rank's share into micro-batches.
    """
    sequences, T = config.batch_sequences, config.sequence_length
    if sequences % processes:
        below = sequences // processes * processes
        tokens = " or ".join(str(T * n) for n in (below, below + processes) if n)
        raise UserError(
            f"the {sequences} sequences of a step cannot be divided evenly among {processes} processes; "
            f"choose --batch-tokens {tokens}, or start {divisors_near(sequences, processes)} processes"
        )
    share = sequences // processes
    if config.micro_batch and share % config.micro_batch:
        raise UserError(
            f"micro_batch {config.micro_batch} does not divide the {share} sequences of a step per process; choose "
            f"--micro-batch {divisors_near(share, config.micro_batch)}"
        )
    return share


def choose_micro_batch(config: RunConfig, device: torch.device, processes: int = 1) -> int:
    """Choose the micro-batch size: the configured one, or a fast one for the device type.

    Args:
        config: run configuration.
        device: device of the rank.
        processes: world size.

    Returns:
        Sequences per forward and backward pass, a divisor of the rank's sequences.

    Raises:
        UserError: the sequences cannot be divided evenly.
    """
    share = sequences_per_process(config, processes)
    return config.micro_batch or nearest_divisor_below(share, FORWARD_TOKENS[device.type] // config.sequence_length)


def fitting_micro_batch(model: GPT, batches: Batches, compute: ComputeConfig, optim: OptimConfig) -> int:
    """Find the largest divisor of ``compute.micro_batch`` that fits in a GPU's memory.

    The memory of two small micro-batches is measured in eager mode and extrapolated linearly. Both fill a chunk of the
    loss, so that the constant memory of a chunk does not affect the slope.

    Args:
        model: model on the GPU.
        batches: training data.
        compute: device, precision and the largest micro-batch to consider.
        optim: optimizer configuration, for the memory of its state.

    Returns:
        Sequences per forward and backward pass, at least 1.
    """
    chunk = min(compute.chunk or tokens_on(compute.device, CHUNK_TOKENS), compute.micro_batch * batches.T)
    tried = min(chunk, TRIED[0] * batches.T)
    trial = dataclasses.replace(compute, compiled=False, chunk=tried)
    _bytes_taken(model, batches, trial, TRIED[0])  # not measured, because it also allocates cuBLAS workspaces
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
    """Extrapolate linearly how many sequences fit in memory.

    Args:
        small, large: measured pairs (sequences, bytes). Equal bytes (short sequences) mean that any number fits.
        room: available bytes.

    Returns:
        Number of sequences, at least 1.
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
    """Run and time a first micro-batch, forward and backward, and adapt the settings until it works.

    All ranks must call this function. After out of memory the micro-batch is halved. If torch.compile fails and was
    chosen automatically, training continues in eager mode. The first compiled micro-batch includes compilation, so the
    second one is timed. Weights do not change.

    Args:
        model: model to train.
        loss_of: result of `distribute`, which contains `BatchLoss`. Changed settings are applied to it.
        batches: training data.
        compute: settings to start with.
        config: run configuration.
        step: index of the step whose batch is used.
        processes: ranks of the run.
        say: function that shows a line when compilation starts, and a line for each changed setting.

    Returns:
        Seconds per micro-batch, and the working settings.

    Raises:
        UserError: one sequence does not fit in memory, or torch.compile fails with --compile on.
    """
    repeated = False
    if compute.compiled:
        say("compiling the model (first time: 1 to 2 minutes) …")
    while True:
        seconds, failure, reason = _try_micro_batch(model, loss_of, batches, compute, step)
        no_memory, no_compiler, long = processes.any(
            failure == "memory", failure == "compiler", seconds > LONG_MICRO_BATCH
        )
        if no_compiler:
            reason = f"torch.compile fails ({reason or 'in another process'})"
            if config.compile == "on":
                raise UserError(f"{reason}; use --compile off or --compile auto")
            compute = dataclasses.replace(compute, compiled=False, compile_reason=f"auto: {reason}")
            for part in model.modules():
                part._compiled_call_impl = None
            say(f"warning: {reason}; training continues in eager mode, which is slower")
        elif no_memory:
            n = compute.micro_batch
            if n == 1:
                raise UserError(
                    f"out of memory with a micro-batch of 1 ({reason}); use --gradient-checkpointing or a smaller model"
                )
            compute = dataclasses.replace(compute, micro_batch=next_smaller_divisor(n))
            say(f"warning: out of memory with a micro-batch of {n}; reduced to {compute.micro_batch}")
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
    """Try one micro-batch, without an update of the weights.

    Gradients are not averaged over the ranks, so that no rank waits for a failed one. FSDP requires communication, so
    there out of memory is an error.

    Returns:
        Seconds, the kind of failure or None, and its reason in one line.

    Raises:
        UserError: out of memory with FSDP.
    """
    tokens, targets = batches.load(batches.windows(step)[: compute.micro_batch])
    sharded = isinstance(loss_of, FSDPModule)
    start = time.perf_counter()
    try:
        with synchronised(loss_of, last=sharded):
            loss = loss_of(tokens, targets)
            loss.backward()
        loss.item()  # waits for the device, so that the time is complete
        model.zero_grad(set_to_none=True)
    except Exception as e:
        reason = one_line(" ".join(str(e).split()) or type(e).__name__)  # the first line of a compiler error is vague
        if is_out_of_memory(e):
            if sharded:
                raise UserError(
                    f"out of memory ({reason}); lower --micro-batch, or use --gradient-checkpointing"
                ) from e
            return 0.0, "memory", reason
        if type(e).__module__.startswith(("torch._dynamo", "torch._inductor", "triton")):
            return 0.0, "compiler", reason
        raise
    return time.perf_counter() - start, None, ""


def split_micro_batches(micro_batches: MicroBatches, sequences: int) -> MicroBatches:
    """Split micro-batches into smaller ones.

    Args:
        micro_batches: pairs of tokens and targets, (B, T) each.
        sequences: maximum sequences per micro-batch of the result.
    """
    return [
        (tokens[i : i + sequences], targets[i : i + sequences])
        for tokens, targets in micro_batches
        for i in range(0, len(tokens), sequences)
    ]


def next_smaller_divisor(sequences: int) -> int:
    """Return the largest divisor of a micro-batch size that is at most half of it."""
    return nearest_divisor_below(sequences, sequences // 2)
