"""Chunked cross-entropy against `torch.nn.functional.cross_entropy` on full logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from restomod.engine import loss as module
from restomod.engine.loss import HeadGradient, add_matmul, linear_cross_entropy, linear_log_probs

FP32 = torch.float32


def problem(N: int, D: int, V: int, padded: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden states, an lm_head whose padding rows are large instead of zero, and targets."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, D, generator=generator)
    weight = torch.randn(padded, D, generator=generator)
    weight[V:] *= 50
    targets = torch.randint(V, (N,), generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, V: int, cap: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the loss and both gradients in fp64 from full logits."""
    h, w = (x.detach().double().requires_grad_() for x in (hidden, weight))
    logits = h @ w[:V].t()
    loss = F.cross_entropy(logits if cap is None else cap * torch.tanh(logits / cap), targets)
    return loss.detach(), *torch.autograd.grad(loss, (h, w))


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_TOKENS", {"cpu": 8})
    monkeypatch.setattr(module, "SOFTMAX_TOKENS", {"cpu": 3})


# --- values --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [8, None])
@pytest.mark.parametrize("N", [1, 2, 3, 7, 8, 9, 16, 30, 1024, 1500])
def test_loss_and_gradients_equal_full_logits_at_any_length(
    N: int, chunk: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SOFTMAX_TOKENS", {"cpu": 3 if chunk else 32})
    hidden, weight, targets = problem(N, D=12, V=50, padded=64)
    loss = linear_cross_entropy(hidden, weight, targets, 50, FP32, chunk=chunk)
    loss.backward()
    for ours, exact in zip((loss, hidden.grad, weight.grad), reference(hidden, weight, targets, 50), strict=True):
        torch.testing.assert_close(ours.double(), exact, atol=1e-6, rtol=1e-5)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("cap", [2.0, 15.0])
def test_loss_and_gradients_equal_capped_logits(cap: float, compiled: bool) -> None:
    hidden, weight, targets = problem(30, D=12, V=50, padded=64)
    loss = linear_cross_entropy(hidden, weight, targets, 50, FP32, compiled, cap)
    loss.backward()
    exact = reference(hidden, weight, targets, 50, cap)
    assert (exact[0] - reference(hidden, weight, targets, 50)[0]).abs() > 0.01
    for ours, theirs in zip((loss, hidden.grad, weight.grad), exact, strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=1e-5, rtol=1e-4)
    assert (weight.grad[50:] == 0).all()
    with torch.no_grad():
        again = linear_cross_entropy(hidden, weight, targets, 50, FP32, compiled, cap)
    torch.testing.assert_close(again, loss.detach())


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("cap", [None, 2.0])
def test_log_probabilities_equal_full_logits(cap: float | None) -> None:
    hidden, weight, targets = problem(30, D=12, V=50, padded=64)
    with torch.no_grad():
        found, best = linear_log_probs(hidden, weight, targets, 50, FP32, cap)
        logits = hidden.double() @ weight[:50].t().double()
    expected = (logits if cap is None else cap * torch.tanh(logits / cap)).log_softmax(-1)
    torch.testing.assert_close(found.double(), expected.gather(1, targets[:, None])[:, 0], atol=1e-5, rtol=1e-4)
    assert torch.equal(best, logits.argmax(-1) == targets)


def test_padding_rows_have_no_effect_even_if_they_are_not_zero() -> None:
    hidden, weight, targets = problem(20, D=12, V=50, padded=64)
    losses = []
    for scale in (0.0, 1.0, 1000.0):
        with torch.no_grad():
            changed = torch.cat([weight[:50], scale * weight[50:]])
        loss = linear_cross_entropy(hidden, changed.requires_grad_(), targets, 50, FP32)
        loss.backward()
        losses.append(loss.item())
        assert changed.grad is not None
        assert (changed.grad[50:] == 0).all()
    assert losses[0] == losses[1] == losses[2]


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("which", [0, 1], ids=["hidden", "weight"])
def test_gradient_is_the_slope_of_the_loss(which: int) -> None:
    hidden, weight, targets = problem(11, D=6, V=20, padded=64)
    linear_cross_entropy(hidden, weight, targets, 20, FP32).backward()

    def loss(shift: Tensor) -> float:
        inputs = [hidden.detach(), weight.detach()]
        inputs[which] = inputs[which] + shift
        return linear_cross_entropy(*inputs, targets, 20, FP32).item()

    generator, h = torch.Generator().manual_seed(1), 3e-3
    gradient = (hidden.grad, weight.grad)[which]
    for _ in range(5):
        direction = torch.randn(gradient.shape, generator=generator)
        slope = (loss(h * direction) - loss(-h * direction)) / (2 * h)
        assert slope == pytest.approx((gradient * direction).sum().item(), abs=1e-3)


def test_upstream_gradient_scales_both_gradients() -> None:
    whole, half = problem(20, D=12, V=50, padded=64), problem(20, D=12, V=50, padded=64)
    linear_cross_entropy(*whole, 50, FP32).backward()
    (linear_cross_entropy(*half, 50, FP32) / 2).backward()
    torch.testing.assert_close(half[0].grad, whole[0].grad / 2)
    torch.testing.assert_close(half[1].grad, whole[1].grad / 2)


def test_loss_is_fp32_and_gradients_have_the_dtypes_of_their_tensors() -> None:
    hidden, weight, targets = problem(20, D=12, V=50, padded=64)
    hidden = hidden.detach().bfloat16().requires_grad_()
    loss = linear_cross_entropy(hidden, weight, targets, 50, torch.bfloat16)
    loss.backward()
    assert (loss.dtype, hidden.grad.dtype, weight.grad.dtype) == (FP32, torch.bfloat16, FP32)


# --- precision -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [FP32, torch.bfloat16])
def test_a_loss_of_hundreds_of_nats_is_exact_and_its_gradient_finite(dtype: torch.dtype) -> None:
    # The logit of token 0 exceeds that of the target, token 1, by 512. All numbers are exact in bf16.
    hidden, weight = torch.tensor([[512.0]], requires_grad=True), torch.zeros(64, 1)
    weight[0] = 1.0
    weight.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, torch.tensor([1]), 50, dtype)
    loss.backward()
    assert loss.item() == 512.0
    assert hidden.grad.item() == 1.0
    assert weight.grad[:2, 0].tolist() == [512.0, -512.0]
    assert (weight.grad[2:] == 0).all()


@pytest.mark.parametrize("dtype", [FP32, torch.bfloat16])
@pytest.mark.parametrize("sign", [1, -1])
def test_extreme_logits_give_neither_infinity_nor_nan(dtype: torch.dtype, sign: int) -> None:
    hidden, weight, targets = problem(20, D=12, V=50, padded=64)
    huge = (sign * 1e4 * hidden.detach()).requires_grad_()
    loss = linear_cross_entropy(huge, weight, targets, 50, dtype)
    loss.backward()
    assert loss > 1000
    assert all(torch.isfinite(x).all() for x in (loss, huge.grad, weight.grad))


def test_extreme_logits_give_the_exact_loss_in_fp32() -> None:
    hidden, weight, targets = problem(20, D=12, V=50, padded=64)
    huge = 1e4 * hidden.detach()
    exact = reference(huge, weight, targets, 50)[0].item()
    assert linear_cross_entropy(huge, weight, targets, 50, FP32).item() == pytest.approx(exact, rel=1e-6)


def test_bf16_matmuls_stay_within_half_a_percent_of_fp64() -> None:
    # bf16 has 8 bits, so the relative error of one multiplication is up to 0.4%; the loss is a mean of many.
    hidden, weight, targets = problem(256, D=64, V=1000, padded=1024)
    with torch.no_grad():
        weight *= 0.1
    loss = linear_cross_entropy(hidden, weight, targets, 1000, torch.bfloat16)
    loss.backward()
    exact, d_hidden, d_weight = reference(hidden, weight, targets, 1000)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-4)
    assert (hidden.grad - d_hidden).norm() < 0.005 * d_hidden.norm()
    assert (weight.grad - d_weight).norm() < 0.005 * d_weight.norm()


def test_fp16_gradients_of_a_large_batch_do_not_underflow() -> None:
    """The gradients of a mean over 4,096 tokens would underflow; those of the sum, times `GRADIENT_SCALE`, do not."""
    hidden, weight, targets = problem(4096, D=16, V=500, padded=512)
    with torch.no_grad():
        weight *= 0.1
    linear_cross_entropy(hidden, weight, targets, 500, torch.float16).backward()
    _, d_hidden, d_weight = reference(hidden, weight, targets, 500)
    assert (hidden.grad - d_hidden).norm() < 0.002 * d_hidden.norm()
    assert (weight.grad - d_weight).norm() < 0.002 * d_weight.norm()


@pytest.mark.parametrize("dtype", [FP32, torch.bfloat16])
@pytest.mark.usefixtures("small_chunks")
def test_the_formula_of_the_compiled_softmax(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The formula is run in eager mode here; a slow test compiles it."""
    monkeypatch.setattr(module, "_compiled_softmax", lambda: module._softmax)
    results = []
    for compiled in (False, True):
        hidden, weight, targets = problem(30, D=12, V=50, padded=64)
        loss = linear_cross_entropy(hidden, weight, targets, 50, dtype, compiled)
        loss.backward()
        results.append((loss.detach(), hidden.grad, weight.grad))
    tolerance = 1e-6 if dtype == FP32 else 1e-2
    for plain, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused, plain, atol=tolerance, rtol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [FP32, torch.bfloat16])
def test_compiled_loss_and_gradients_equal_full_logits(dtype: torch.dtype) -> None:
    hidden, weight, targets = problem(1500, D=8, V=50, padded=64)
    loss = linear_cross_entropy(hidden, weight, targets, 50, dtype, compiled=True)
    loss.backward()
    tolerance = 1e-5 if dtype == FP32 else 0.01
    for ours, exact in zip((loss, hidden.grad, weight.grad), reference(hidden, weight, targets, 50), strict=True):
        assert (ours.double() - exact).norm() < tolerance * exact.norm()


# --- memory and work -----------------------------------------------------------------------------------------


class Sizes(TorchDispatchMode):
    """Dispatch mode that records the operation and the number of elements of every new tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = f(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.seen.append((str(f), result.numel()))
        return result


def test_no_tensor_is_larger_than_the_logits_of_a_chunk() -> None:
    N, D, V = 4096, 4, 256
    hidden, weight, targets = problem(N, D, V, padded=V)
    with Sizes() as sizes:
        linear_cross_entropy(hidden, weight, targets, V, FP32).backward()
    assert max(numel for _, numel in sizes.seen) == module.CHUNK_TOKENS["cpu"] * V == N * V // 4


@pytest.mark.usefixtures("small_chunks")
def test_no_grad_gives_the_same_loss() -> None:
    hidden, weight, targets = problem(30, D=12, V=50, padded=64)
    with torch.no_grad():
        without = linear_cross_entropy(hidden, weight, targets, 50, FP32)
    assert not without.requires_grad
    assert without.item() == pytest.approx(linear_cross_entropy(hidden, weight, targets, 50, FP32).item(), rel=1e-6)


def test_no_grad_does_not_compute_gradients() -> None:
    # Two of the three large matmuls are for gradients; validation losses need one.
    hidden, weight, targets = problem(30, D=12, V=50, padded=64)
    with torch.no_grad(), Sizes() as sizes:
        linear_cross_entropy(hidden, weight, targets, 50, FP32)
    assert sum(name.startswith("aten.mm") for name, _ in sizes.seen) == 1


# --- chunks and micro-batches ---------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 7, 30, 1000])
def test_the_chunk_size_changes_only_rounding(chunk: int) -> None:
    hidden, weight, targets = problem(30, D=12, V=50, padded=64)
    with Sizes() as sizes:
        loss = linear_cross_entropy(hidden, weight, targets, 50, FP32, chunk=chunk)
        loss.backward()
    for ours, exact in zip((loss, hidden.grad, weight.grad), reference(hidden, weight, targets, 50), strict=True):
        torch.testing.assert_close(ours.double(), exact, atol=1e-6, rtol=1e-5)
    assert max(numel for name, numel in sizes.seen if name == "aten.mm.default") == min(chunk, 30) * 64


@pytest.mark.parametrize("dtype", [FP32, torch.bfloat16, torch.float16])
def test_lm_heads_gradient_is_summed_over_micro_batches(dtype: torch.dtype) -> None:
    """Autograd gets no gradient before the last micro-batch, and then that of the mean over all."""
    hidden, weight, targets = problem(30, D=12, V=50, padded=64)
    head_gradient = HeadGradient()
    for i, part in enumerate((slice(0, 10), slice(10, 20), slice(20, 30))):
        head_gradient.last = i == 2
        assert weight.grad is None
        loss = linear_cross_entropy(
            hidden[part], weight, targets[part], 50, dtype, chunk=4, head_gradient=head_gradient
        )
        (loss / 3).backward()
    _, d_hidden, d_weight = reference(hidden, weight, targets, 50)
    off = {FP32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    for ours, exact in ((hidden.grad, d_hidden), (weight.grad, d_weight)):
        assert ours is not None
        assert (ours.double() - exact).norm() < off * exact.norm()
    assert head_gradient.total is None, "the accumulator is empty for the next step"


@pytest.mark.parametrize("dtype", [FP32, torch.bfloat16])
def test_a_matmul_is_added_in_place(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, 6, generator=generator).to(dtype) for n in (5, 7))
    total = torch.ones(5, 7)
    add_matmul(total, a, b.t())
    torch.testing.assert_close(
        total.double(), 1 + a.double() @ b.double().t(), atol=1e-2, rtol=1e-2 if dtype != FP32 else 1e-5
    )
