"""Out of memory halves the micro-batch. On a GPU the memory is limited; on the CPU the error is raised by the test."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from restomod.checks import device_parity
from restomod.config.run import DataConfig, RunConfig
from restomod.engine.distributed import SINGLE
from restomod.engine.optimizer import build_optimizer
from restomod.engine.step import BatchLoss, ComputeConfig, batch_loss
from restomod.train.rollback import train_step_retrying_oom
from restomod.train.setup import set_up
from tests.cuda.common import DEVICE, REAL, random_text, wide, write_text

pytestmark = pytest.mark.cuda

SEQUENCES, FIT = 32, 8
LENGTH = 1024 if REAL else 32


def release() -> None:
    """Release unused memory."""
    gc.collect()
    torch.cuda.empty_cache()


@contextlib.contextmanager
def memory_for(sequences: int, peak_bytes: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Limit memory so that about ``sequences`` sequences fit, whose peak is ``peak_bytes``."""
    if not REAL:
        forward = BatchLoss.forward

        def limited(self: BatchLoss, tokens: Tensor, *more: Any) -> Tensor:
            if len(tokens) > sequences:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return forward(self, tokens, *more)

        with monkeypatch.context() as patch:
            patch.setattr(BatchLoss, "forward", limited)
            yield
        return
    release()
    torch.cuda.set_per_process_memory_fraction(1.15 * peak_bytes / torch.cuda.get_device_properties(0).total_memory)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        release()


@contextlib.contextmanager
def peak_reserved() -> Iterator[list[int]]:
    """Measure the peak of reserved bytes within the context, and append it to the yielded list."""
    found: list[int] = []
    if REAL:
        release()
        torch.cuda.reset_peak_memory_stats()
    yield found
    found.append(torch.cuda.max_memory_reserved() if REAL else 0)


class Lines:
    """Display that records its lines."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def warn(self, text: str) -> None:
        self.said.append(text)


def test_a_step_that_does_not_fit_uses_smaller_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    config = RunConfig(steps=10, batch_tokens=SEQUENCES * LENGTH, sequence_length=LENGTH, model=wide("gpt2-124m", 4))
    model = device_parity.random_model(config.model).to(DEVICE)
    compute = ComputeConfig(DEVICE, torch.bfloat16, SEQUENCES)
    optimizer = build_optimizer(model, config.optim, compute.dtype)
    training = types.SimpleNamespace(
        config=config,
        model=model,
        loss_of=BatchLoss(model, compute),
        optimizer=optimizer,
        compute=compute,
        processes=SINGLE,
    )
    batch = random_text(config.model, SEQUENCES, LENGTH)
    batch[1][FIT:] = 0  # another loss than that of the first sequences, so that a missing sequence is detected
    micro_batches = [tuple(t.pin_memory() for t in batch) if REAL else batch]
    display = Lines()

    def step(number: int, sequences: int) -> tuple[float, int]:
        made, fitting = train_step_retrying_oom(training, number, micro_batches, sequences, float("inf"), display)  # type: ignore[arg-type]
        return made.wait().loss, fitting

    step(0, FIT)  # creates the optimizer state
    with peak_reserved() as reserved:
        step(1, FIT)
    assert display.said == []
    with torch.no_grad():
        parts = zip(*(t.split(FIT) for t in batch), strict=True)
        expected = torch.stack([batch_loss(model, *part, compute) for part in parts]).mean().item()
    with memory_for(FIT, reserved[0], monkeypatch):
        loss, fitting = step(2, SEQUENCES)
    print(f"\n{reserved[0] / 1e9:.2f} GB for {FIT} sequences; {display.said}; loss {loss:.4f}, expected {expected:.4f}")
    assert fitting < SEQUENCES
    assert display.said[-1] == f"step 2: out of memory; the micro-batch is now {fitting}"
    assert loss == pytest.approx(expected, abs=2e-3)
    assert step(3, SEQUENCES)[1] == SEQUENCES  # the limit is removed


def test_a_first_micro_batch_that_does_not_fit_is_halved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`fitting_micro_batch` uses the memory of the whole GPU, so that its choice is too large for a limited process."""
    text = write_text(tmp_path / "text")
    model = dataclasses.replace(wide("gpt2-124m", 4), vocab_size=50257)
    config = RunConfig(
        steps=10,
        batch_tokens=SEQUENCES * LENGTH,
        sequence_length=LENGTH,
        model=model,
        data=DataConfig(source="text", path=str(text), val_fraction=0.0, cache=str(tmp_path / "data")),
        sanity_checks=False,
        device=DEVICE.type,  # type: ignore[arg-type]
        precision="bf16",
        compile="off",
    )
    with peak_reserved() as reserved:
        fits = set_up(dataclasses.replace(config, micro_batch=FIT), tmp_path / "fits", resume=False)
        assert fits.compute.micro_batch == FIT
    del fits
    with memory_for(FIT, reserved[0], monkeypatch):
        training = set_up(config, tmp_path / "limited", resume=False)
    print(
        f"\n{reserved[0] / 1e9:.2f} GB for {FIT} sequences; micro-batch {training.compute.micro_batch} of {SEQUENCES}"
    )
    assert training.compute.micro_batch < SEQUENCES
    assert SEQUENCES % training.compute.micro_batch == 0
