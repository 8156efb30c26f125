"""The CUDA code path on a machine without a GPU, with fake tensors: shape, dtype and device, but no values.

These tests need a torch that is built for CUDA. torch computes the shape, dtype and device of every result, and raises
errors for mixed devices and incompatible dtypes. A missing `.to(device)` and a wrong dtype are therefore found. Values,
memory and kernels are not tested.

Tested are training steps of full size (forward, loss, backward, clipping, update) in fp32, bf16 and fp16, with a
document mask, the loss without gradients, scoring with masks, decoding with the key/value cache, and the copy of a
checkpoint. Operations that need a GPU are replaced:

- `torch.autocast("cuda")` disables itself; `forced_autocast` sets the same state.
- The autograd engine needs the driver; `walk_backward` calls the nodes of the graph one by one, and casts and sums
  their gradients like the engine.
- `torch.cuda.Event` and `torch.cuda.get_device_properties` need the driver; `NoEvent` does nothing, and the GPU has
  80 GB.
- `nn.Module.to_empty` cannot exchange the memory of fake tensors; the replacement makes new parameters.
- `torch.compile` of the loss's softmax: the softmax runs in eager mode.
- Fake tensors do not support `torch.addmm(..., out_dtype=...)`, the CUDA form of `restomod.engine.loss.add_matmul`; the
  replacement only compares devices and dtypes.

Not tested are operations that need values (`tolist`, `item`, sampling), pinned memory, compiled code, several ranks,
and the choice of kernels.
"""

from __future__ import annotations

import contextlib
import dataclasses
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import restomod.engine.loss
import restomod.engine.step
import restomod.evals.models
import restomod.generate.decode
from restomod.config.presets import preset
from restomod.config.run import OptimConfig, RunConfig
from restomod.engine.distributed import SINGLE
from restomod.engine.optimizer import build_optimizer, optimizer_tensors
from restomod.engine.step import BatchLoss, ComputeConfig, batch_loss, train_step
from restomod.evals.likelihood import Request, pack
from restomod.evals.likelihood import _rows as rows_of
from restomod.evals.models import ScoredGPT
from restomod.generate.decode import Decoder, RowCache
from restomod.model.gpt import GPT, build_model
from restomod.runs.async_saver import Saver
from tests.cuda.common import CPU, REAL

pytestmark = pytest.mark.cuda

CUDA = torch.device("cuda", 0)
FAMILIES = ("gpt2-124m", "modern-124m", "speedrun-124m")
DTYPES, DTYPE_NAMES = [torch.float32, torch.bfloat16], ["fp32", "bf16"]


@pytest.fixture(autouse=True)
def needs_device() -> None:
    """Override the folder's fixture, because these tests need no GPU."""
    if torch.version.cuda is None:
        pytest.skip("this torch is built without CUDA")
    if REAL:
        pytest.skip("there is a GPU: the other tests of this folder do the same with numbers")


@contextlib.contextmanager
def forced_autocast(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Replace `restomod.engine.device.autocast` for CUDA on a machine without a GPU."""
    assert device.type == "cuda"
    if dtype == torch.float32:
        yield
        return
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", dtype)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


def topological(root: Any) -> list[Any]:
    """Return the nodes of an autograd graph, each before the nodes that receive its gradients."""
    order, seen, stack = [], set(), [(root, False)]
    while stack:
        node, left = stack.pop()
        if left:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack += [(node, True), *((after, False) for after, _ in node.next_functions if after is not None)]
    return order[::-1]


@torch.no_grad()
def walk_backward(loss: Tensor) -> None:
    """Compute `loss.backward()` without the autograd engine."""
    gradients: dict[Any, list[Tensor | None]] = {loss.grad_fn: [torch.ones_like(loss)]}
    for node in topological(loss.grad_fn):
        found = gradients.pop(node, None)
        if found is None or all(gradient is None for gradient in found):
            continue
        inputs: list[Tensor | None] = []
        for gradient, expected in zip(found, node._input_metadata, strict=True):
            if gradient is not None:
                assert gradient.device == expected.device, node.name()
                gradient = gradient.sum_to_size(tuple(expected.shape)).to(expected.dtype)
            inputs.append(gradient)
        if hasattr(node, "variable"):  # the node of a parameter
            parameter, gradient = node.variable, inputs[0]
            assert gradient is not None
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
            continue
        outputs = node(*inputs) if callable(node) else node.apply(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        # custom autograd functions also return None for each argument after the tensors
        for (after, i), gradient in zip(node.next_functions, outputs, strict=False):
            if after is not None and gradient is not None:
                waiting = gradients.setdefault(after, [None] * len(after._input_metadata))
                waiting[i] = gradient if waiting[i] is None else waiting[i] + gradient


class NoEvent:
    """Replacement of `torch.cuda.Event` that does nothing."""

    def record(self) -> None:
        pass


def to_empty(module: nn.Module, device: torch.device | str) -> nn.Module:
    """Replace `nn.Module.to_empty`: make new parameters instead of exchanging memory."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            setattr(part, name, nn.Parameter(torch.empty_like(parameter, device=device)))
    return module


def add_matmul(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Replace `restomod.engine.loss.add_matmul`: check devices and dtypes only."""
    assert total.device == a.device == b.device == CUDA
    assert total.dtype == torch.float32
    assert a.dtype == b.dtype
    assert total.shape == (a @ b).shape


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTensorMode]:
    """Make every new tensor fake, and replace operations that need a GPU."""
    for module in (restomod.engine.step, restomod.evals.models, restomod.generate.decode):
        monkeypatch.setattr(module, "autocast", forced_autocast)
    monkeypatch.setattr(restomod.engine.loss, "add_matmul", add_matmul)
    monkeypatch.setattr(torch.Tensor, "backward", walk_backward)
    monkeypatch.setattr(torch.cuda, "Event", NoEvent)
    monkeypatch.setattr(nn.Module, "to_empty", to_empty)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(total_memory=80 * 10**9)
    )
    with FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()) as mode:
        yield mode


def make_model(family: str) -> GPT:
    """Build a model of full size on a fake GPU."""
    return build_model(preset(family).model, 1, CUDA)


def tokens_of(rows: int, length: int) -> Tensor:
    return torch.zeros(rows, length, dtype=torch.int64)


def where(*tensors: Tensor) -> set[tuple[torch.device, torch.dtype]]:
    """Return the devices and dtypes of tensors, after checking that all are fake."""
    assert all(isinstance(tensor.detach(), FakeTensor) for tensor in tensors)
    return {(tensor.device, tensor.dtype) for tensor in tensors}


@pytest.mark.parametrize(
    ("dtype", "document_mask", "residual_dtype"),
    [
        (torch.float32, False, torch.float32),
        (torch.bfloat16, False, torch.float32),
        (torch.float16, False, torch.float32),
        (torch.bfloat16, True, torch.float32),
        (torch.bfloat16, False, torch.bfloat16),
    ],
    ids=["fp32", "bf16", "fp16", "document-mask", "bf16-stream"],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_training_step(
    family: str, dtype: torch.dtype, document_mask: bool, residual_dtype: torch.dtype, fake: FakeTensorMode
) -> None:
    """The step has the preset's optimizer (AdamW, or Muon with AdamW) and two micro-batches of 16 x 1,024 tokens."""
    model, optim = make_model(family), preset(family).optim
    model.transformer.residual_dtype = residual_dtype
    config = RunConfig(10, batch_tokens=32 * 1024, sequence_length=1024, model=model.config, optim=optim)
    compute = ComputeConfig(CUDA, dtype, 16, document_mask=document_mask)
    optimizer = build_optimizer(model, optim, dtype)
    products: list[torch.dtype] = []
    streams: list[torch.dtype] = []
    gradients: list[Tensor] = []
    block = model.transformer.h[0]
    block.attn.c_attn.register_forward_hook(lambda module, inputs, output: products.append(output.dtype))
    block.register_forward_hook(lambda module, inputs, output: streams.append(output.dtype))
    optimizer.parts[0].register_step_pre_hook(lambda *_: gradients.extend(p.grad for p in model.parameters()))  # type: ignore[misc]
    tokens = tokens_of(16, 1024)
    made = train_step(BatchLoss(model, compute), optimizer, [(tokens, tokens)] * 2, config, 0, SINGLE)
    assert products == [dtype, dtype]
    assert streams == [residual_dtype, residual_dtype]
    assert [g.shape for g in gradients] == [p.shape for p in model.parameters()]
    assert where(*gradients) == where(*model.parameters()) == {(CUDA, torch.float32)}
    assert where(*optimizer_tensors(model, optimizer).values()) == {(CUDA, torch.float32)}
    assert where(made._values) == {(CPU, torch.float32)}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_as_it_is_written_for_the_compiler(
    family: str, fake: FakeTensorMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restomod.engine.loss, "_compiled_softmax", lambda: restomod.engine.loss._softmax)
    model = make_model(family)
    compute = ComputeConfig(CUDA, torch.bfloat16, 16, compiled=True)
    loss = batch_loss(model, tokens_of(16, 1024), tokens_of(16, 1024), compute)
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(gradients) == len(list(model.parameters()))
    assert where(loss, *gradients) == {(CUDA, torch.float32)}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_without_gradients(family: str, fake: FakeTensorMode) -> None:
    with torch.no_grad():
        loss = batch_loss(
            make_model(family), tokens_of(2, 1024), tokens_of(2, 1024), ComputeConfig(CUDA, torch.bfloat16, 2)
        )
    assert loss.shape == ()
    assert where(loss) == {(CUDA, torch.float32)}


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_NAMES)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_scoring_with_masks(family: str, dtype: torch.dtype, fake: FakeTensorMode) -> None:
    model = ScoredGPT(make_model(family), dtype)
    questions = [Request((1, 2, 3), (4 + k, 5)) for k in range(4)]
    batch = pack(rows_of(questions, model))
    assert batch.mask is not None
    log_probs, greedy = model.predict(batch)
    assert len(log_probs) == len(greedy) == 8
    assert where(log_probs) == {(CUDA, torch.float32)}
    assert where(greedy) == {(CUDA, torch.bool)}


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_NAMES)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_decoding_with_a_cache(family: str, dtype: torch.dtype, fake: FakeTensorMode) -> None:
    """Two contexts of different lengths are prefilled, then extended by a token; the second batch has equal lengths."""
    model = make_model(family)
    decoder = Decoder(model, dtype, 2)
    cache = RowCache(model.config, 2, CUDA, dtype, 16)
    for contexts in ([[1, 2, 3], [4, 5]], [[1, 2], [4, 5]]):
        cache.lengths = [0, 0]
        decoder.prefill(contexts, cache, [0, 1])
        logits = decoder.step([6, 7], cache)
        assert logits.shape == (2, model.config.vocab_size)
        assert where(logits, cache.keys, cache.values) == {(CUDA, dtype)}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_copy_of_a_checkpoint(optimizer: str, fake: FakeTensorMode, tmp_path: Path) -> None:
    model = make_model("gpt2-124m")
    optim: OptimConfig = dataclasses.replace(preset("gpt2-124m").optim, optimizer=optimizer)  # type: ignore[arg-type]
    state = optimizer_tensors(model, build_optimizer(model, optim))
    with Saver(tmp_path, preset("gpt2-124m")) as saver:
        saver._copy(model, state)
        assert saver._model is not None
        copies = [*saver._model.parameters(), *saver._state.values()]
    assert [c.shape for c in copies] == [t.shape for t in (*model.parameters(), *state.values())]
    assert where(*copies) == {(CPU, torch.float32)}
