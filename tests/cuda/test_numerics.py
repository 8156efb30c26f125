"""Loss and gradients on the device against fp64: every family, every dtype, eager and compiled."""

from __future__ import annotations

import copy
import functools
import math
import time

import pytest
import torch
from torch import Tensor

from restomod.checks import device_parity
from restomod.checks.model_quick import loss_gradients
from restomod.engine.device import CHUNK_TOKENS
from restomod.engine.loss import HeadGradient, linear_cross_entropy
from restomod.engine.step import ComputeConfig, batch_loss
from restomod.model.gpt import GPT
from tests.cuda.common import (
    DEVICE,
    FAMILIES,
    REAL,
    compile_transformer,
    exact,
    random_text,
    relative_errors,
    small,
    wide,
    worst,
)

pytestmark = pytest.mark.cuda

LOSS_SCALE = {torch.float32: 1.0, torch.bfloat16: 1.0, torch.float16: 2.0**10}  # fp16 underflows without loss scaling
ROUNDING = {"gpt2-124m": 1.0, "llama-124m": 2.0, "modern-124m": 2.0, "speedrun-124m": 2.0}
"""Tolerance as a multiple of GPT-2's; the other families have more consecutive matmuls."""
HEAD = {"gpt2-124m": "transformer.wte.weight", "speedrun-124m": "lm_head.weight"}
HEAD_GRADIENT = {
    torch.float32: 1e-5,
    torch.bfloat16: 5e-5 if REAL else 2.0**-7,
    torch.float16: 5e-5 if REAL else 2.0**-10,
}
"""Largest relative error of lm_head's gradient if only the sum is rounded: to fp32, truncated by tensor cores. On a CPU
the matmul of each chunk is also rounded to ``dtype``."""
WIDE_ROWS, WIDE_LENGTH = (16, 1024) if REAL else (2, 32)


@functools.cache
def exact_case(family: str) -> tuple[GPT, Tensor, Tensor, float, dict[str, Tensor]]:
    """Return a CPU model, tokens and targets (2, 128), and their loss and gradients in fp64."""
    model = device_parity.random_model(small(family))
    tokens, targets = random_text(model.config, 2, 128)
    return model, tokens, targets, *exact(model, tokens, targets)


def loss_and_stream(model: GPT, tokens: Tensor, targets: Tensor, compute: ComputeConfig) -> tuple[Tensor, torch.dtype]:
    """Return the loss, and the dtype of the residual stream after the first block."""
    found: list[torch.dtype] = []
    hook = model.transformer.h[0].register_forward_hook(lambda module, inputs, output: found.append(output.dtype))
    loss = batch_loss(model, tokens, targets, compute)
    hook.remove()
    return loss, found[0]


def check_against_fp64(family: str, dtype: torch.dtype, residual_dtype: torch.dtype, tolerance: float) -> None:
    """Compare loss and gradients with fp64; ``tolerance`` multiplies that of `restomod.checks.device_parity`."""
    model, tokens, targets, exact_loss, expected = exact_case(family)
    model, scale = copy.deepcopy(model).to(DEVICE), LOSS_SCALE[dtype]
    model.transformer.residual_dtype = residual_dtype
    loss, stream = loss_and_stream(model, tokens, targets, ComputeConfig(DEVICE, dtype, 2))
    gradients = {name: gradient / scale for name, gradient in loss_gradients(model, loss * scale).items()}
    off, errors = abs(loss.item() / exact_loss - 1), relative_errors(gradients, expected)
    print(f"\n{family} {dtype}, stream {stream}: loss error {off:.1e}, worst gradient {worst(errors)}")
    assert stream == residual_dtype
    assert off < device_parity.LOSS_TOLERANCE[dtype] * tolerance
    assert worst(errors)[1] < device_parity.GRADIENT_TOLERANCE[dtype] * tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_against_fp64(family: str, dtype: torch.dtype) -> None:
    check_against_fp64(family, dtype, torch.float32, ROUNDING[family])


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_with_a_bf16_residual_stream_against_fp64(family: str) -> None:
    check_against_fp64(family, torch.bfloat16, torch.bfloat16, ROUNDING[family])


@pytest.mark.parametrize(
    ("family", "residual_dtype"),
    [
        ("gpt2-124m", torch.float32),
        ("gpt2-124m", torch.bfloat16),
        ("speedrun-124m", torch.float32),
    ],
    ids=["gpt2", "gpt2-bf16-stream", "speedrun"],
)
def test_compiled_gradients_are_as_exact_as_eager_ones(family: str, residual_dtype: torch.dtype) -> None:
    """The width is that of training: some Inductor releases reduce many rows wrongly (pytorch issue 193061)."""
    model = device_parity.random_model(wide(family)).to(DEVICE)
    tokens, targets = random_text(model.config, WIDE_ROWS, WIDE_LENGTH)
    in_fp32 = loss_gradients(model, batch_loss(model, tokens, targets, ComputeConfig(DEVICE, torch.float32, WIDE_ROWS)))

    model.transformer.residual_dtype = residual_dtype
    compute = ComputeConfig(DEVICE, torch.bfloat16, WIDE_ROWS)
    loss, stream = loss_and_stream(model, tokens, targets, compute)
    assert stream == residual_dtype
    eager = relative_errors(loss_gradients(model, loss), in_fp32)
    start = time.perf_counter()
    compile_transformer(model)
    compute = ComputeConfig(DEVICE, torch.bfloat16, WIDE_ROWS, compiled=REAL)
    compiled = relative_errors(loss_gradients(model, batch_loss(model, tokens, targets, compute)), in_fp32)
    seconds = time.perf_counter() - start
    print(f"\n{family}: compiled in {seconds:.0f} s; worst eager {worst(eager)}, compiled {worst(compiled)}")
    bad = {name: (error, eager[name]) for name, error in compiled.items() if not error <= 1.5 * eager[name] + 0.01}
    assert not bad, bad


@pytest.mark.parametrize(
    ("dtype", "compiled"),
    [
        (torch.float32, False),
        (torch.bfloat16, False),
        (torch.float16, False),
        pytest.param(torch.bfloat16, True, marks=pytest.mark.skipif(not REAL, reason="Inductor is tested on a GPU")),
    ],
    ids=["fp32", "bf16", "fp16", "bf16-compiled"],
)
def test_head_gradient_is_summed_in_fp32(dtype: torch.dtype, compiled: bool) -> None:
    """Compare lm_head's gradient over 128 chunks with a closed form; only the sum over chunks is rounded.

    All logits of a token are equal, so that every probability is 1/128. The gradients of the logits, 1/128 and
    1/128 - 1, and the hidden states are exact in bf16.
    """
    V, D, N = 128, 16, 128 * CHUNK_TOKENS[DEVICE.type]
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=generator).bfloat16().float()
    targets = torch.randint(V, (N,), generator=generator)
    mean = hidden.double().sum(0) / V
    expected = (mean.expand(V, D) - torch.zeros(V, D).double().index_add_(0, targets, hidden.double())) / N

    weight = torch.zeros(V, D, device=DEVICE)
    weight[:, 0] = 1.0
    x, w = hidden.to(DEVICE).requires_grad_(), weight.requires_grad_()
    loss = linear_cross_entropy(x, w, targets.to(DEVICE), V, dtype, compiled)
    loss.backward()
    assert w.grad is not None
    error = relative_errors({"head": w.grad}, {"head": expected})["head"]
    print(
        f"\n{dtype}, compiled {compiled}, {N} tokens: loss {loss.item():.6f}, error of lm_head's gradient {error:.1e}"
    )
    assert loss.item() == pytest.approx(math.log(V), rel=1e-5)
    assert error < HEAD_GRADIENT[dtype]


@pytest.mark.parametrize("summed", [False, True], ids=["by-autograd", "by-HeadGradient"])
@pytest.mark.parametrize("family", ["gpt2-124m", "speedrun-124m"])  # tied lm_head; untied lm_head with a soft cap
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_gradients_accumulated_over_micro_batches_against_fp64(family: str, dtype: torch.dtype, summed: bool) -> None:
    """Three micro-batches have several chunks each. lm_head's gradient is summed by autograd or by `HeadGradient`."""
    model, rows, chunk = device_parity.random_model(small(family)), 8, 384  # of 1,024 tokens
    tokens, targets = random_text(model.config, 3 * rows, 128)
    _, expected = exact(model, tokens, targets)
    model.to(DEVICE)
    head_gradient = HeadGradient()
    for i in range(0, 3 * rows, rows):
        head_gradient.last = i == 2 * rows
        compute, part = ComputeConfig(DEVICE, dtype, rows, chunk=chunk), slice(i, i + rows)
        loss = batch_loss(model, tokens[part], targets[part], compute, head_gradient if summed else None)
        (loss / 3).backward()
    errors = relative_errors({name: p.grad for name, p in model.named_parameters() if p.grad is not None}, expected)
    print(f"\n{family} {dtype}: worst accumulated gradient {worst(errors)}, lm_head's {errors[HEAD[family]]:.1e}")
    assert worst(errors)[1] < device_parity.GRADIENT_TOLERANCE[dtype] * ROUNDING[family]
