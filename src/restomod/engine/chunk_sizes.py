"""How much is computed at once, by kind of device. Needs no torch, so that a run can be planned without it."""

from __future__ import annotations

from restomod.config.model import divisors_near
from restomod.config.run import RunConfig
from restomod.utils.errors import UserError

FAST_TOKENS = {"cpu": 4096, "mps": 8192, "cuda": 65_536}  # more in one forward pass gain nothing
# of the loss: enough rows for fast matrix products, and on CUDA few additions to the weight's fp32 gradient; 100 MB
# and 1.6 GB of logits in bf16
CHUNK_TOKENS = {"cpu": 1024, "mps": 1024, "cuda": 16_384}
# rows of an eager softmax, in fp32: what stays in a CPU's cache between its passes; elsewhere what fits
SOFTMAX_TOKENS = {"cpu": 32, "mps": 1024, "cuda": 1024}
# of the validation loss: tokens in one forward pass
EVAL_TOKENS = {"cpu": 8192, "mps": 8192, "cuda": 65_536}
ROOM = 0.9  # of a GPU's free memory; the rest is lost to fragmentation
LARGE_GPU = 24 * 10**9  # bytes; GPUs with less memory compute proportionally less at once


def tokens_at_once(table: dict[str, int], device_type: str, memory: int | None = None) -> int:
    """The entry of one of the tables above; on a GPU with less memory than `LARGE_GPU` proportionally fewer tokens.

    It depends on the device's size, not on what is free at the moment: a resumed run then computes the same bits.

    Args:
        table: tokens by kind of device.
        device_type: cpu, mps or cuda.
        memory: all of the device's memory in bytes; None where it does not matter or is not known.

    Returns:
        A multiple of 1,024 where it is reduced.
    """
    tokens = table[device_type]
    if device_type != "cuda" or memory is None or memory >= LARGE_GPU:
        return tokens
    return max(1024, tokens * memory // LARGE_GPU // 1024 * 1024)


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
