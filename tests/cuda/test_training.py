"""Training steps on the device: no synchronisation, complete batches, skipped updates, Muon."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from restomod.config.run import OptimConfig
from restomod.data.batches import Prefetch
from restomod.engine.distributed import SINGLE
from restomod.engine.optimizer import build_optimizer
from restomod.engine.optimizers.muon import Muon
from restomod.engine.step import train_step
from tests.cuda.common import CPU, DEVICE, REAL, assert_identical, make_trainee, relative_errors

pytestmark = pytest.mark.cuda

WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::is_nonzero"}
"""Operations whose result the CPU needs, so that it would wait for a GPU."""


class NoWaiting(TorchDispatchMode):
    """Dispatch mode for the CPU that raises if an operation would wait for a GPU."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function._schema.name in WAITS:
            raise AssertionError(f"{function} would wait for the device")
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """Raise an error if an operation within the context waits for the device."""
    if not REAL:
        with NoWaiting():
            yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("optimizer", "dtype", "family", "document_mask"),
    [
        ("adamw", torch.bfloat16, "gpt2-124m", False),
        ("adamw", torch.float16, "gpt2-124m", False),  # with loss scaling
        ("muon", torch.bfloat16, "speedrun-124m", False),
        ("muon", torch.bfloat16, "modern-124m", True),
    ],
    ids=["gpt2", "fp16", "speedrun", "document-mask"],
)
def test_a_step_never_waits_for_the_device(
    optimizer: str, dtype: torch.dtype, family: str, document_mask: bool
) -> None:
    run = make_trainee(optimizer, dtype=dtype, family=family, document_mask=document_mask)
    with Prefetch(run.batches, run.compute.micro_batch, run.config.steps, device=DEVICE) as data:
        for step in range(5):
            micro_batches, _ = data.get(step)
            with no_waiting() if step >= 2 else contextlib.nullcontext():  # the first steps load kernels
                made = train_step(run.loss_of, run.optimizer, micro_batches, run.config, step, SINGLE)
            outcome = made.wait()
            assert math.isfinite(outcome.loss)
            assert not outcome.refused or (dtype == torch.float16 and not math.isfinite(outcome.grad_norm))


def test_prefetched_tokens_are_complete() -> None:
    """The device executes copies late, when their pinned memory could already be reused."""
    run, n = make_trainee(), 4096 if REAL else 64
    busy = torch.randn(n, n, device=DEVICE)
    arrived = []
    with Prefetch(run.batches, run.compute.micro_batch, run.config.steps, device=DEVICE) as data:
        for step in range(run.config.steps):
            for _ in range(5):
                busy = (busy @ busy) * 1e-2
            micro_batches, _ = data.get(step)
            arrived += [t.to(DEVICE, non_blocking=True) for pair in micro_batches for t in pair]
            del micro_batches
    expected = [t for step in range(run.config.steps) for pair in run.micro_batches(step) for t in pair]
    assert len(arrived) == 4 * run.config.steps
    assert all(torch.equal(a.cpu(), b) for a, b in zip(arrived, expected, strict=True))


class Overflowing(nn.Module):
    """Loss with a finite value and infinite gradients."""

    def __init__(self, loss_of: nn.Module) -> None:
        super().__init__()
        self.loss_of = loss_of

    def forward(self, *arguments: Any) -> Tensor:
        loss = self.loss_of(*arguments)
        loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss


@pytest.mark.parametrize("reason", ["spike", "overflow"])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_skipped_update_changes_nothing(kind: str, reason: str) -> None:
    run = make_trainee()
    optim = OptimConfig(optimizer=kind, muon_weight_decay=0.1)  # type: ignore[arg-type]
    run.optimizer = build_optimizer(run.model, optim, torch.bfloat16)
    run.train(0, 2)
    before = run.tensors()
    loss_of, limit = (run.loss_of, 0.0) if reason == "spike" else (Overflowing(run.loss_of), float("inf"))
    made = train_step(loss_of, run.optimizer, run.micro_batches(2), run.config, 2, SINGLE, limit).wait()
    assert made.refused
    assert_identical(run.tensors(), before)
    assert not run.train(2, 3)[0].refused
    changed = run.tensors()
    assert all(not torch.equal(changed[name], value) for name, value in before.items() if name.endswith("c_fc.weight"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_muon_updates_equal_those_of_the_cpu(dtype: torch.dtype) -> None:
    def updates(device: torch.device) -> Tensor:
        """Return the changes of three parameters of three stacked matrices by three steps, (3, 384, 128)."""
        generator = torch.Generator().manual_seed(0)
        parameters = [nn.Parameter(torch.randn(384, 128, generator=generator).to(device)) for _ in range(3)]
        start = torch.stack(list(parameters)).detach()
        muon = Muon([{"params": parameters, "stacked": 3}], 0.02, 0.95, 0.1, dtype)
        muon.grad_scale, muon.found_inf = torch.tensor(2.0, device=device), torch.tensor(0.0, device=device)
        for _ in range(3):
            for p in parameters:
                p.grad = torch.randn(384, 128, generator=generator).to(device)
            muon.step()
        return (torch.stack(list(parameters)).detach() - start).cpu()

    error = relative_errors({"update": updates(DEVICE)}, {"update": updates(CPU)})["update"]
    print(f"\nMuon's update in {dtype}: relative error {error:.1e}")
    assert error < (1e-4 if dtype == torch.float32 else 0.05)  # in bf16 on a CPU rounding alone is 0.01
