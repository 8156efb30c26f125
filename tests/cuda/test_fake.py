"""The CUDA path walked with fake tensors, which have a shape, a dtype and a device and no numbers.

For a torch that is built for CUDA on a machine without a GPU. torch's own rules for fake tensors say what every
operation gives and refuse tensors of two devices or of dtypes that do not go together. So a forgotten `.to(device)`
and a wrong dtype are found, and nothing about numbers, memory or kernels.

Walked so: whole training steps of full size (forward, loss, backward, clipping, update), with `document_mask`, in
fp32, bf16 and fp16; the loss without gradients; scoring with masks; decoding with the key/value cache; the copy of a
checkpoint. What torch does not do without a GPU is replaced here:

- `torch.autocast("cuda")` switches itself off; `forced_autocast` sets what it would have set.
- The autograd engine asks the driver for the device; `walk_backward` calls the graph's nodes one by one, and casts and
  sums their gradients as the engine does.
- `torch.cuda.Event` and `torch.cuda.get_device_properties` need the driver; `NoEvent` does nothing, and the GPU is said
  to have 80 GB.
- `nn.Module.to_empty` cannot exchange the memory of fake tensors; the one here makes new parameters.

- `torch.compile` of the loss's softmax: it is run as it is written.
- torch has no rule for `torch.addmm(..., out_dtype=...)`, which `restomod.engine.loss.add_matmul` is on CUDA;
  `add_matmul` here compares devices and dtypes and leaves the product out.

Not walked: what takes numbers from the device (`tolist`, `item`, drawing a token), pinned memory, compiled code,
several processes, and which kernel computes an operation: a fake tensor has none.
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
    """In place of the folder's own: a GPU is what these tests do without."""
    if torch.version.cuda is None:
        pytest.skip("this torch is built without CUDA")
    if REAL:
        pytest.skip("there is a GPU: the other tests of this folder do the same with numbers")


@contextlib.contextmanager
def forced_autocast(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """`restomod.engine.device.autocast` for CUDA where there is none."""
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
    """The nodes of an autograd graph, each before those to which it hands gradients."""
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
    """`loss.backward()` without the autograd engine."""
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
        if hasattr(node, "variable"):  # a parameter's
            parameter, gradient = node.variable, inputs[0]
            assert gradient is not None
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
            continue
        outputs = node(*inputs) if callable(node) else node.apply(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        # a function of our own gives a None, too, for each argument behind the tensors
        for (after, i), gradient in zip(node.next_functions, outputs, strict=False):
            if after is not None and gradient is not None:
                waiting = gradients.setdefault(after, [None] * len(after._input_metadata))
                waiting[i] = gradient if waiting[i] is None else waiting[i] + gradient


class NoEvent:
    """In place of `torch.cuda.Event`."""

    def record(self) -> None:
        pass


def to_empty(module: nn.Module, device: torch.device | str) -> nn.Module:
    """`nn.Module.to_empty`, making new parameters instead of exchanging the old ones' memory."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            setattr(part, name, nn.Parameter(torch.empty_like(parameter, device=device)))
    return module


def add_matmul(total: Tensor, a: Tensor, b: Tensor) -> None:
    """`restomod.engine.loss.add_matmul` without numbers."""
    assert total.device == a.device == b.device == CUDA
    assert total.dtype == torch.float32
    assert a.dtype == b.dtype
    assert total.shape == (a @ b).shape


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTensorMode]:
    """Within, every new tensor is fake; what cannot be done without a GPU is replaced."""
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
    """A model of full size, on the GPU that is not there."""
    return build_model(preset(family).model, 1, CUDA)


def tokens_of(rows: int, length: int) -> Tensor:
    return torch.zeros(rows, length, dtype=torch.int64)


def where(*tensors: Tensor) -> set[tuple[torch.device, torch.dtype]]:
    """Devices and dtypes of tensors, all of which are fake."""
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
    """With the optimizer of the preset, AdamW or Muon with AdamW; two micro-batches of 16 x 1,024 tokens."""
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
    """Two contexts of different lengths are read, then a token of each; the second time all rows are equally long."""
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
