"""How much memory training takes, by part: the one formula that planning and `doctor` share. Needs no torch.

What autograd keeps was derived from the model's operations, and `tests/engine/test_memory.py` holds it against the
tensors that autograd really saves.

Letters: N = tokens of a micro-batch, T = tokens of a sequence, D = n_embd, H = n_head, W = width of all heads,
U = outputs of the MLP's first matrix, I = units of the MLP, V = rows of the vocabulary in memory.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from restomod.config.model import PLAIN_ATTENTION_TOKENS
from restomod.config.run import ModelConfig, OptimConfig, RunConfig
from restomod.engine.chunk_sizes import CHUNK_TOKENS, SOFTMAX_TOKENS, tokens_at_once
from restomod.model.flops import padded_parameters

FP32 = 4  # bytes of a number
ADAMW_NUMBERS, MUON_NUMBERS = 2, 1  # running means of a parameter
PROCESS_BYTES = {"cpu": 340 * 2**20, "mps": 340 * 2**20, "cuda": 600 * 2**20}
"""Python, torch and its libraries (measured); on a GPU CUDA's context and the workspaces of its libraries, about."""
LOST_BETWEEN = {"cpu": 0.17, "mps": 0.17, "cuda": 0.1}
"""Holes between allocations, as a part of what is allocated: on a CPU measured from 0.08 to 0.36 (docs/design.md)."""


@dataclass(frozen=True)
class Footprint:
    """Bytes of one process at the moment of a step at which it needs most."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    """What the blocks keep for the backward pass, and weights copied to the type of the products."""
    temporary: int
    """A chunk of logits and the gradient of the head; or what the backward pass or Muon needs for a moment."""
    process: int
    """What is there before anything is trained."""
    lost: int
    """Holes between allocations."""

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))

    def to_dict(self) -> dict[str, int]:
        """For JSON, with the total."""
        return dataclasses.asdict(self) | {"total": self.total}


def footprint(
    config: RunConfig, micro_batch: int, number: int, device_type: str, processes: int = 1, memory: int | None = None
) -> Footprint:
    """What a process of a run takes.

    Args:
        config: of the run.
        micro_batch: sequences at once.
        number: bytes of a number in the matrix products: 4 in fp32, 2 in bf16 and fp16.
        device_type: cpu, mps or cuda.
        processes: that share the batch. With FSDP each has its part of weights, gradients and optimizer.
        memory: all of a GPU's memory in bytes, on which the size of a chunk of the loss depends; None: 24 GB or more.
    """
    m, tokens = config.model, micro_batch * config.sequence_length
    parts = processes if config.parallel == "fsdp" else 1
    weights, optimizer = FP32 * padded_parameters(m) // parts, optimizer_bytes(m, config.optim) // parts
    # DistributedDataParallel keeps room for all gradients
    accumulates = config.batch_sequences // processes > micro_batch or (processes > 1 and config.parallel == "ddp")
    kept = kept_bytes(config, tokens, number, device_type)
    head, (loss, backward) = (
        FP32 * m.padded_vocab_size * m.n_embd,
        _temporary(config, tokens, number, device_type, memory),
    )
    muon = _muon_temporary(m, number) if config.optim.optimizer == "muon" else 0
    # at the loss; where the last gradient is made, that of the embedding beside the head's; in the update
    moments = [
        (weights if accumulates else 0, kept, head + max(loss, backward)),
        (weights, 0, 2 * head if m.tied else head),
        (weights, 0, muon),
    ]
    gradients, activations, temporary = max(moments, key=sum)
    allocated = weights + optimizer + gradients + activations + temporary
    lost = round(LOST_BETWEEN[device_type] * allocated)
    return Footprint(weights, gradients, optimizer, activations, temporary, PROCESS_BYTES[device_type], lost)


def state_bytes(config: ModelConfig, optim: OptimConfig) -> int:
    """Weights, gradients and the optimizer's state: what training takes whatever the batch."""
    return 2 * FP32 * padded_parameters(config) + optimizer_bytes(config, optim)


def optimizer_bytes(config: ModelConfig, optim: OptimConfig) -> int:
    """The optimizer's running means: two per parameter of AdamW, one per parameter of Muon, in fp32."""
    matrices = _block_matrices(config) * config.n_layer if optim.optimizer == "muon" else 0
    return FP32 * (ADAMW_NUMBERS * (padded_parameters(config) - matrices) + MUON_NUMBERS * matrices)


def kept_bytes(config: RunConfig, tokens: int, number: int, device_type: str) -> int:
    """What the model keeps of ``tokens`` tokens for the backward pass, and the weights that it copies for products.

    Without `torch.compile`, which keeps less.
    """
    m, cpu = config.model, device_type == "cpu"
    block = block_bytes_per_token(config, number, cpu) * tokens
    copies = number * _block_matrices(m) if number < FP32 else 0
    norm = FP32 * m.n_embd * (2 if m.norm == "rmsnorm" and cpu else 1)  # of the last one
    outside = norm + number * m.n_embd  # the gradient of the hidden states is made along with the loss
    if m.embedding_norm:
        outside += FP32 * m.n_embd * (2 if cpu else 1)
    if m.value_embedding:
        outside += FP32 * m.n_head * m.head_size
    if config.document_mask:
        outside += config.sequence_length  # a bool for each pair of tokens
    if config.recompute:  # the stream before each block, and one block at a time
        return m.n_layer * FP32 * m.n_embd * tokens + block + copies + outside * tokens
    return m.n_layer * (block + copies) + outside * tokens


def block_bytes_per_token(config: RunConfig, number: int, cpu: bool) -> int:
    """What autograd keeps of a block.

    The residual stream and what norms make of it are in fp32, all else in the type of the products. CPUs lack fused
    kernels for RMS norms, and lay out the result of attention otherwise where queries have been changed.
    """
    m = config.model
    D, W, I = m.n_embd, m.n_head * m.head_size, m.inner_size  # noqa: E741
    rms = FP32 * D if m.norm == "rmsnorm" and cpu else FP32
    norms = 2 * (FP32 * D + number * D + rms)  # its input, its output as the products take it
    attention = number * 4 * W  # queries, keys, values, and the result
    if cpu and number < FP32 and config.sequence_length <= PLAIN_ATTENTION_TOKENS and not config.document_mask:
        attention += number * m.n_head * config.sequence_length  # the weights of all pairs of tokens
        attention += number * 3 * W if m.value_embedding else 0  # what is multiplied here are copies
    else:
        attention += FP32 * m.n_head  # a sum of exponentials for each head
        attention += number * (3 if cpu else 2) * W if m.positions == "rope" or m.qk_norm else 0
        attention += number * W if m.value_embedding else 0
    if m.qk_norm and cpu:
        attention += FP32 * 2 * W * (2 if number < FP32 else 1)
    mlp = number * (4 * I if m.mlp == "swiglu" else 2 * I)  # before and after the activation; both of SwiGLU's halves
    return norms + attention + mlp + (FP32 * D if m.embedding_skip else 0)


def _block_matrices(m: ModelConfig) -> int:
    """Numbers in the matrices of a block."""
    width, units = m.n_head * m.head_size, m.inner_size * (2 if m.mlp == "swiglu" else 1)
    return m.n_embd * (4 * width + units + m.inner_size)


def _temporary(config: RunConfig, tokens: int, number: int, device_type: str, memory: int | None) -> tuple[int, int]:
    """What is needed for a moment besides the gradient of the head: by the loss, by the backward pass of a block."""
    m, half = config.model, number < FP32
    V, D, stream = m.padded_vocab_size, m.n_embd, FP32 * m.n_embd * tokens
    compiled, cuda = config.compiles_on(device_type), device_type == "cuda"
    chunk = min(tokens, tokens_at_once(CHUNK_TOKENS, device_type, memory))
    logits = number * chunk * V * (2 if compiled else 1)  # eager, their gradient takes their place
    rows = FP32 * min(chunk, SOFTMAX_TOKENS[device_type]) * V if half and not compiled else 0
    # its copy for the products in half precision, and a chunk's share of its gradient where that is not summed in place
    head = number * V * D * ((1 if cuda else 2) if half else 0)
    loss = stream + logits + rows + head + (number * D * tokens if half else 0)
    units = m.inner_size * (3 if m.mlp == "swiglu" else 2)
    return loss, stream + number * units * tokens


def _muon_temporary(m: ModelConfig, number: int) -> int:
    """What Muon needs at once: all matrices of one shape, in fp32 as they are and stacked, and four in its products."""
    width, inner = m.n_head * m.head_size, m.inner_size
    largest = m.n_layer * m.n_embd * max(3 * width, inner * (2 if m.mlp == "swiglu" else 1))
    return largest * (2 * FP32 + 4 * (2 if number < FP32 else FP32))
