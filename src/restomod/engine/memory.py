"""Memory of training by part, for planning, `doctor` and `check`.

The optimizer's memory is that of an update of fake tensors, and that of norms and activations what autograd saves of
them on the meta device, so both follow from the parts. Other activation memory was derived from the model's operations,
and `tests/engine/test_memory.py` compares the sum with the tensors that autograd saves.

Letters: D = n_embd, W = width of all heads, V = rows of the vocabulary in memory.
"""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from restomod.config.run import ModelConfig, OptimConfig, RunConfig
from restomod.engine.device import CHUNK_TOKENS, SOFTMAX_TOKENS, scaled_tokens
from restomod.engine.optimizer import build_optimizer, refuses_on_device
from restomod.model.attention import PLAIN_ATTENTION_TOKENS
from restomod.model.flops import padded_parameters
from restomod.model.gpt import GPT, build_part

FP32 = 4  # bytes of a number
RUNTIME_BYTES = {"cpu": 340 * 2**20, "mps": 340 * 2**20, "cuda": 600 * 2**20}
"""Python, torch and its libraries (measured); on a GPU the CUDA context and library workspaces, roughly."""
FRAGMENTATION = {"cpu": 0.17, "mps": 0.17, "cuda": 0.1}
"""Share of allocated memory lost to fragmentation: on a CPU measured from 0.06 to 0.43 (docs/design.md)."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Peak memory of one process, in bytes."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    """Tensors saved for the backward pass, and weights cast to the compute dtype of the matmuls."""
    temporary: int
    """A chunk of logits and the gradient of the head; or temporary tensors of the backward pass or the update."""
    runtime: int
    """CUDA context on a GPU; elsewhere Python and libraries."""
    fragmentation: int

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))

    def to_dict(self) -> dict[str, int]:
        """For JSON, with the total."""
        return dataclasses.asdict(self) | {"total": self.total}


def estimate_memory(
    config: RunConfig, micro_batch: int, itemsize: int, device_type: str, processes: int = 1, memory: int | None = None
) -> MemoryEstimate:
    """Estimate the peak memory of a process of a run.

    Args:
        config: of the run.
        micro_batch: sequences at once.
        itemsize: bytes of a number in the compute dtype of the matmuls: 4 in fp32, 2 in bf16 and fp16.
        device_type: cpu, mps or cuda.
        processes: that share the batch. With FSDP each has a shard of weights, gradients and optimizer state.
        memory: all of a GPU's memory in bytes, on which the size of a chunk of the loss depends; None: 24 GB or more.
    """
    m, tokens = config.model, micro_batch * config.sequence_length
    parts = processes if config.parallel == "fsdp" else 1
    state, update = optimizer_bytes(m, config.optim, itemsize)
    weights, optimizer = FP32 * padded_parameters(m) // parts, state // parts
    # DistributedDataParallel keeps room for all gradients
    accumulates = config.batch_sequences // processes > micro_batch or (processes > 1 and config.parallel == "ddp")
    saved = activation_bytes(config, tokens, itemsize, device_type)
    head = FP32 * m.padded_vocab_size * m.n_embd
    loss, backward = _temporary(config, tokens, itemsize, device_type, memory)
    # at the loss; where the last gradient is computed, the embedding's in addition to the head's; in the update
    moments = [
        (weights if accumulates else 0, saved, head + max(loss, backward)),
        (weights, 0, 2 * head if m.tied else head),
        (weights, 0, update),
    ]
    gradients, activations, temporary = max(moments, key=sum)
    allocated = weights + optimizer + gradients + activations + temporary
    fragmentation = round(FRAGMENTATION[device_type] * allocated)
    return MemoryEstimate(
        weights, gradients, optimizer, activations, temporary, RUNTIME_BYTES[device_type], fragmentation
    )


def state_bytes(config: ModelConfig, optim: OptimConfig) -> int:
    """Bytes of weights, gradients and optimizer state, which do not depend on the batch."""
    return 2 * FP32 * padded_parameters(config) + optimizer_bytes(config, optim)[0]


@functools.cache
def optimizer_bytes(config: ModelConfig, optim: OptimConfig, itemsize: int = FP32) -> tuple[int, int]:
    """Bytes of the optimizer's state, and of the temporary tensors of an update, found by an update of fake tensors.

    Args:
        config: of the model, which is held by one process.
        optim: of the optimizer.
        itemsize: see `estimate_memory`.
    """
    temporary = 0
    with FakeTensorMode():
        model = GPT(config)
        parts = build_optimizer(model, optim, torch.bfloat16 if itemsize < FP32 else torch.float32).parts
        for p in model.parameters():
            p.grad = torch.empty_like(p)
        for part in filter(refuses_on_device, parts):
            part.grad_scale, part.found_inf = torch.ones(()), torch.zeros(())  # type: ignore[attr-defined]
        with _Allocations([*model.parameters(), *(p.grad for p in model.parameters())]) as allocations:
            for part in [*parts, *parts]:  # all state is there before the second update
                allocations.peak = allocations.held
                part.step()
                temporary = max(temporary, allocations.peak - allocations.held)
        states = [value for part in parts for state in part.state.values() for value in state.values()]
    return sum(value.nbytes for value in states if isinstance(value, Tensor) and value.ndim), temporary


class _Allocations(TorchDispatchMode):
    """Counts the bytes of tensors that operations allocate, at present and at most.

    ``.item()`` of a fake tensor whose value is not known is 1.
    """

    def __init__(self, existing: Iterable[Tensor | None]) -> None:
        super().__init__()
        self.held = self.peak = 0
        self._seen = weakref.WeakSet(tensor.untyped_storage() for tensor in existing if tensor is not None)

    def __torch_dispatch__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            result = f(*args, **(kwargs or {}))
        except DataDependentOutputException:
            return 1
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self._seen:
                self._seen.add(storage)
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes())
        return result

    def _add(self, size: int) -> None:
        self.held += size
        self.peak = max(self.peak, self.held)


def activation_bytes(config: RunConfig, tokens: int, itemsize: int, device_type: str) -> int:
    """Bytes saved for the backward pass of ``tokens`` tokens, and of weights cast to the compute dtype.

    Without `torch.compile`, which saves fewer tensors.
    """
    m, cpu = config.model, device_type == "cpu"
    block = block_activation_bytes(config, itemsize, cpu) * tokens
    copies = itemsize * _block_matrices(m) if itemsize < FP32 else 0
    outside = part_bytes("norms", m, itemsize, cpu)  # the final norm, with the gradient of its output in its place
    if m.embedding_norm:
        outside += FP32 * m.n_embd * (2 if cpu else 1)
    if m.value_embedding:
        outside += FP32 * m.n_head * m.head_size
    if config.document_mask:
        outside += config.sequence_length  # a bool for each pair of tokens
    if config.gradient_checkpointing:  # the input of each block, and one block at a time
        return m.n_layer * FP32 * m.n_embd * tokens + block + copies + outside * tokens
    return m.n_layer * (block + copies) + outside * tokens


def block_activation_bytes(config: RunConfig, itemsize: int, cpu: bool) -> int:
    """Bytes per token that autograd saves in a block.

    The residual stream is in fp32, all else but norms in the compute dtype. On CPUs the result of attention is laid out
    otherwise where queries are rotated or normalised.
    """
    m = config.model
    W = m.n_head * m.head_size
    parts = 2 * part_bytes("norms", m, itemsize, cpu) + part_bytes("activations", m, itemsize, cpu)
    attention = itemsize * 4 * W  # queries, keys, values, and the result
    if cpu and itemsize < FP32 and config.sequence_length <= PLAIN_ATTENTION_TOKENS and not config.document_mask:
        attention += itemsize * m.n_head * config.sequence_length  # attention weights of all pairs of tokens
        attention += itemsize * 3 * W if m.value_embedding else 0  # the operands of multiplications are copies
    else:
        attention += FP32 * m.n_head  # a sum of exponentials for each head
        attention += itemsize * (3 if cpu else 2) * W if m.positions == "rope" or m.qk_norm else 0
        attention += itemsize * W if m.value_embedding else 0
    if m.qk_norm and cpu:
        attention += FP32 * 2 * W * (2 if itemsize < FP32 else 1)
    return parts + attention + (FP32 * m.n_embd if m.embedding_skip else 0)


@functools.cache
def part_bytes(kind: Literal["norms", "activations"], m: ModelConfig, itemsize: int, cpu: bool) -> int:
    """Bytes per token that autograd saves of a norm or activation, with its output in the compute dtype.

    Measured on the meta device, where RMSNorm is computed as on a CPU; GPUs have a fused kernel, which saves its input
    and a number per token.
    """
    compute = torch.float32 if itemsize == FP32 else torch.bfloat16
    is_norm = kind == "norms"
    width, dtype = (m.n_embd, torch.float32) if is_norm else ((2 if m.gated else 1) * m.inner_size, compute)
    with torch.device("meta"):
        part = build_part(kind, m.norm if is_norm else m.mlp, m)
        if isinstance(part, nn.RMSNorm) and not cpu:
            return FP32 * (width + 1) + itemsize * width

        def saved(tokens: int) -> int:
            storages: dict[int, torch.UntypedStorage] = {}

            def pack(tensor: Tensor) -> Tensor:
                storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
                return tensor

            x = torch.empty(tokens, width, dtype=dtype, requires_grad=True)
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                pack(part(x).to(compute))
            return sum(storage.nbytes() for storage in storages.values())

        return saved(2) - saved(1)  # without parameters


def _block_matrices(m: ModelConfig) -> int:
    """Parameters in the matrices of a block."""
    width, units = m.n_head * m.head_size, m.inner_size * (2 if m.gated else 1)
    return m.n_embd * (4 * width + units + m.inner_size)


def _temporary(config: RunConfig, tokens: int, itemsize: int, device_type: str, memory: int | None) -> tuple[int, int]:
    """Bytes of temporary tensors of the loss, without the gradient of the head, and of the backward pass of a block."""
    m, half = config.model, itemsize < FP32
    V, D, stream = m.padded_vocab_size, m.n_embd, FP32 * m.n_embd * tokens
    compiled, cuda = config.compiles_on(device_type), device_type == "cuda"
    chunk = min(tokens, scaled_tokens(CHUNK_TOKENS, device_type, memory))
    logits = itemsize * chunk * V * (2 if compiled else 1)  # eager, their gradient overwrites them
    rows = FP32 * min(chunk, SOFTMAX_TOKENS[device_type]) * V if half and not compiled else 0
    # the head in half precision, and a chunk's part of its gradient where that is not summed in place
    head = itemsize * V * D * ((1 if cuda else 2) if half else 0)
    loss = stream + logits + rows + head + (itemsize * D * tokens if half else 0)
    units = m.inner_size * (3 if m.gated else 2)
    return loss, stream + itemsize * units * tokens
