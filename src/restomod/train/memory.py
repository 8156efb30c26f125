"""How much is computed at once: what is fast and fits, less where memory has run out."""

from __future__ import annotations

import torch

from restomod.config import OptimConfig, RunConfig
from restomod.config_model import nearest_divisor_below
from restomod.data.batches import Batches
from restomod.data.prefetch import MicroBatches
from restomod.device import release_memory, total_memory
from restomod.model.gpt import GPT
from restomod.model.sizes import CHUNK_TOKENS, FAST_TOKENS, ROOM, share_of, tokens_at_once
from restomod.train.footprint import optimizer_bytes
from restomod.train.step import Compute, batch_loss

TRIED = (2, 4)  # sequences


def choose_micro_batch(config: RunConfig, device: torch.device, processes: int = 1) -> int:
    """Sequences per forward pass: what is configured, or what is fast on this kind of device; raises as `share_of`."""
    share = share_of(config, processes)
    return config.micro_batch or nearest_divisor_below(share, FAST_TOKENS[device.type] // config.sequence_length)


def choose_chunk(device: torch.device) -> int:
    """Tokens whose logits exist at once in the loss."""
    return tokens_at_once(CHUNK_TOKENS, device.type, total_memory(device))


def fitting_micro_batch(model: GPT, batches: Batches, compute: Compute, optim: OptimConfig) -> int:
    """The largest divisor of ``compute.micro_batch`` that fits into a GPU's memory.

    Two small micro-batches go forward and backward; what they take tells what a larger one would.
    """
    taken = [_bytes_taken(model, batches, compute, n) for n in TRIED]
    release_memory(compute.device)
    free, _ = torch.cuda.mem_get_info(compute.device)
    free -= optimizer_bytes(model.config, optim)
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
