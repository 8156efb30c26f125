"""How many sequences go through the model at once: as many as are fast and fit; fewer where memory has run out."""

from __future__ import annotations

import torch

from restomod.config import RunConfig
from restomod.config_model import divisors_near, nearest_divisor_below
from restomod.data.batches import Batches
from restomod.data.prefetch import MicroBatches
from restomod.errors import UserError
from restomod.model.flops import parameter_count
from restomod.model.gpt import GPT
from restomod.train.step import Compute, batch_loss

FAST_TOKENS = {"cpu": 4096, "mps": 8192, "cuda": 65_536}  # more in one forward pass gain nothing
ROOM = 0.9  # of the memory that is free; the rest is lost between allocations
ADAMW_BYTES = 8  # a parameter: two running means in fp32
TRIED = (2, 4)  # sequences


def share_of(config: RunConfig, processes: int) -> int:
    """Sequences of a step for each process.

    Raises:
        UserError: they cannot be shared out evenly, or not in micro-batches of the size asked for.
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
    """Sequences per forward pass: what is configured, or what is fast on this kind of device; raises as `share_of`."""
    share = share_of(config, processes)
    return config.micro_batch or nearest_divisor_below(share, FAST_TOKENS[device.type] // config.sequence_length)


def fitting_micro_batch(model: GPT, batches: Batches, compute: Compute) -> int:
    """The largest divisor of ``compute.micro_batch`` that fits into a GPU's memory.

    Two small micro-batches go forward and backward; what they take tells what a larger one would.
    """
    taken = [_bytes_taken(model, batches, compute, n) for n in TRIED]
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(compute.device)
    free -= ADAMW_BYTES * parameter_count(model.config)
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
    """How many sequences fit into ``room`` bytes, at least 1, given how many bytes two other numbers of them took."""
    each = (large[1] - small[1]) / (large[0] - small[0])
    fixed = small[1] - each * small[0]
    return max(1, int((room - fixed) / each)) if each > 0 else large[0]


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
