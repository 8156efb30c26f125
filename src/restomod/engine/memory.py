"""Memory estimate of training by part, for `plan`, `doctor` and `check`.

The optimizer's memory is measured in an update of fake tensors. The activation memory of norms and activation functions
is measured on the meta device, as the tensors that autograd saves. Other activation memory is computed from formulas;
`tests/engine/test_memory.py` compares the sum with the tensors that autograd saves.

Shapes: D = n_embd, W = n_head * head_size, V = padded_vocab_size.
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
"""Bytes of Python, torch and its libraries (measured); on a GPU the approximate size of CUDA context and workspaces."""
FRAGMENTATION = {"cpu": 0.17, "mps": 0.17, "cuda": 0.1}
"""Share of allocated memory lost to fragmentation; measured values on a CPU are 0.06 to 0.43."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Peak memory of one rank by part, in bytes, at the moment of a step with the largest total."""

    weights: int
    """Parameters in fp32."""
    gradients: int
    """Gradients in fp32."""
    optimizer: int
    """Optimizer state."""
    activations: int
    """Tensors saved for the backward pass, and weights cast to the compute dtype."""
    temporary: int
    """Temporary tensors: a chunk of logits and the gradient of lm_head, or those of the backward pass or the update."""
    runtime: int
    """CUDA context on a GPU; elsewhere Python and libraries."""
    fragmentation: int
    """Allocated memory that no tensor uses."""

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return sum(dataclasses.astuple(self))

    def to_dict(self) -> dict[str, int]:
        """Return the bytes of all parts and their total, for JSON."""
        return dataclasses.asdict(self) | {"total": self.total}


def estimate_memory(
    config: RunConfig, micro_batch: int, itemsize: int, device_type: str, processes: int = 1, memory: int | None = None
) -> MemoryEstimate:
    """Estimate the peak memory of one rank of a run.

    Args:
        config: run configuration.
        micro_batch: sequences per forward and backward pass.
        itemsize: bytes of a number in the compute dtype: 4 in fp32, 2 in bf16 and fp16.
        device_type: cpu, mps or cuda.
        processes: world size. With FSDP each rank has a shard of weights, gradients and optimizer state.
        memory: total memory of a GPU in bytes, which decides the chunk size of the loss; None: 24 GB or more.
    """
    m, tokens = config.model, micro_batch * config.sequence_length
    parts = processes if config.parallel == "fsdp" else 1
    state, update = optimizer_bytes(m, config.optim, itemsize)
    weights, optimizer = FP32 * padded_parameters(m) // parts, state // parts
    # DDP allocates buckets for all gradients; gradient accumulation keeps the gradients between micro-batches
    accumulates = config.batch_sequences // processes > micro_batch or (processes > 1 and config.parallel == "ddp")
    saved = activation_bytes(config, tokens, itemsize, device_type)
    head = FP32 * m.padded_vocab_size * m.n_embd
    loss, backward = _temporary(config, tokens, itemsize, device_type, memory)
    # gradients, activations and temporary tensors at the loss, at the end of the backward pass, and in the update
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
    """Return the bytes of weights, gradients and optimizer state, which do not depend on the batch."""
    return 2 * FP32 * padded_parameters(config) + optimizer_bytes(config, optim)[0]


@functools.cache
def optimizer_bytes(config: ModelConfig, optim: OptimConfig, itemsize: int = FP32) -> tuple[int, int]:
    """Measure the optimizer's memory in an update of fake tensors, which allocates nothing.

    Args:
        config: model configuration.
        optim: optimizer configuration.
        itemsize: bytes of a number in the compute dtype.

    Returns:
        Bytes of the optimizer state, and of the temporary tensors of an update, without FSDP.
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
            for part in [*parts, *parts]:  # twice, because the first update creates the state
                allocations.peak = allocations.held
                part.step()
                temporary = max(temporary, allocations.peak - allocations.held)
        states = [value for part in parts for state in part.state.values() for value in state.values()]
    return sum(value.nbytes for value in states if isinstance(value, Tensor) and value.ndim), temporary


class _Allocations(TorchDispatchMode):
    """Dispatch mode that counts the current and peak bytes of newly allocated tensors.

    ``.item()`` of a fake tensor with an unknown value returns 1.
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
    """Estimate the bytes of tensors saved for the backward pass, and of weights cast to the compute dtype.

    This is an upper bound with torch.compile, which saves fewer tensors.

    Args:
        config: run configuration.
        tokens: tokens of a micro-batch.
        itemsize: bytes of a number in the compute dtype.
        device_type: cpu, mps or cuda.
    """
    m, cpu = config.model, device_type == "cpu"
    block = block_activation_bytes(config, itemsize, cpu) * tokens
    copies = itemsize * _block_matrices(m) if itemsize < FP32 else 0
    outside = part_bytes("norms", m, itemsize, cpu)  # the final norm; the gradient of its output replaces the output
    if m.embedding_norm:
        outside += FP32 * m.n_embd * (2 if cpu else 1)
    if m.value_embedding:
        outside += FP32 * m.n_head * m.head_size
    if config.document_mask:
        outside += config.sequence_length  # a bool mask, (T, T) per sequence
    if config.gradient_checkpointing:  # the inputs of all blocks, and the activations of one block
        return m.n_layer * FP32 * m.n_embd * tokens + block + copies + outside * tokens
    return m.n_layer * (block + copies) + outside * tokens


def block_activation_bytes(config: RunConfig, itemsize: int, cpu: bool) -> int:
    """Estimate the bytes per token that autograd saves in one block.

    The residual stream and the inputs of norms are fp32, all other tensors have the compute dtype. On a CPU the output
    of attention is copied if queries are rotated or normalised.

    Args:
        config: run configuration.
        itemsize: bytes of a number in the compute dtype.
        cpu: whether the device is a CPU.
    """
    m = config.model
    W = m.n_head * m.head_size
    parts = 2 * part_bytes("norms", m, itemsize, cpu) + part_bytes("activations", m, itemsize, cpu)
    attention = itemsize * 4 * W  # queries, keys, values and output
    if cpu and itemsize < FP32 and config.sequence_length <= PLAIN_ATTENTION_TOKENS and not config.document_mask:
        attention += itemsize * m.n_head * config.sequence_length  # attention weights, (H, T, T) per sequence
        attention += itemsize * 3 * W if m.value_embedding else 0  # contiguous copies for the matmuls
    else:
        attention += FP32 * m.n_head  # logsumexp of the scores, per head
        attention += itemsize * (3 if cpu else 2) * W if m.positions == "rope" or m.qk_norm else 0
        attention += itemsize * W if m.value_embedding else 0
    if m.qk_norm and cpu:
        attention += FP32 * 2 * W * (2 if itemsize < FP32 else 1)
    return parts + attention + (FP32 * m.n_embd if m.embedding_skip else 0)


@functools.cache
def part_bytes(kind: Literal["norms", "activations"], m: ModelConfig, itemsize: int, cpu: bool) -> int:
    """Measure the bytes per token that autograd saves in a norm or activation, including its output.

    The measurement runs on the meta device. Its RMSNorm saves the same tensors as on a CPU. The fused kernel of GPUs
    saves its input and one number per token, so its bytes are computed.

    Args:
        kind: norms or activations.
        m: model configuration.
        itemsize: bytes of a number in the compute dtype.
        cpu: whether the device is a CPU.
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

        return saved(2) - saved(1)  # the difference excludes parameters


def _block_matrices(m: ModelConfig) -> int:
    """Return the number of parameters in the matrices of one block."""
    width, units = m.n_head * m.head_size, m.inner_size * (2 if m.gated else 1)
    return m.n_embd * (4 * width + units + m.inner_size)


def _temporary(config: RunConfig, tokens: int, itemsize: int, device_type: str, memory: int | None) -> tuple[int, int]:
    """Estimate the bytes of temporary tensors: of the loss without lm_head's gradient, of a block's backward pass."""
    m, half = config.model, itemsize < FP32
    V, D, stream = m.padded_vocab_size, m.n_embd, FP32 * m.n_embd * tokens
    compiled, cuda = config.compiles_on(device_type), device_type == "cuda"
    chunk = min(tokens, scaled_tokens(CHUNK_TOKENS, device_type, memory))
    logits = itemsize * chunk * V * (2 if compiled else 1)  # in eager mode the gradient overwrites the logits
    rows = FP32 * min(chunk, SOFTMAX_TOKENS[device_type]) * V if half and not compiled else 0
    # lm_head in the compute dtype, and a chunk's part of its gradient, which only CUDA adds in place
    head = itemsize * V * D * ((1 if cuda else 2) if half else 0)
    loss = stream + logits + rows + head + (itemsize * D * tokens if half else 0)
    units = m.inner_size * (3 if m.gated else 2)
    return loss, stream + itemsize * units * tokens
