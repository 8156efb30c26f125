"""Checkpoints on the device: exact contents, resuming bit for bit, and the time of a save."""

from __future__ import annotations

import dataclasses
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import restomod.runs.async_saver
from restomod.checks import device_parity
from restomod.engine.distributed import SINGLE
from restomod.engine.optimizer import build_optimizer, optimizer_tensors
from restomod.engine.step import BatchLoss, train_step
from restomod.model.gpt import GPT
from restomod.runs.async_saver import Saver
from restomod.runs.checkpoint import load_checkpoint, write_checkpoint
from tests.cuda.common import (
    DEVICE,
    REAL,
    Trainee,
    assert_identical,
    compile_transformer,
    deterministic,
    make_trainee,
    wide,
)

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resumed_run_equals_an_uninterrupted_run_bit_for_bit(optimizer: str, compiled: bool, tmp_path: Path) -> None:
    def make(seed: int) -> Trainee:
        run = make_trainee(optimizer, seed, rows=16 if REAL else 8)
        if compiled:
            compile_transformer(run.model)
            run.loss_of = BatchLoss(run.model, dataclasses.replace(run.compute, compiled=REAL))
        return run

    start = time.perf_counter()
    with deterministic():
        run = make(seed=1)
        losses = run.train(0, 4)
        saved = write_checkpoint(tmp_path, 4, run.model, optimizer_tensors(run.model, run.optimizer))
        losses += run.train(4, 8)
        resumed = dataclasses.replace(make(seed=2), batches=run.batches)
        assert load_checkpoint(saved, resumed.model, resumed.optimizer) == 4
        assert resumed.train(4, 8) == losses[4:]
    assert_identical(resumed.tensors(), run.tensors())
    print(f"\n{optimizer}, compiled {compiled}: {time.perf_counter() - start:.0f} s, loss {losses[-1].loss:.4f}")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_updates_after_a_save_do_not_change_the_checkpoint(
    optimizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training continues as soon as `Saver.save` returns. There are two saves, because the second reuses the memory."""
    trained_on = threading.Event()

    def write_later(run: Path, step: int, model: GPT, *more: Any) -> Path:
        assert trained_on.wait(60)
        return write_checkpoint(run, step, model, *more)

    monkeypatch.setattr(restomod.runs.async_saver, "write_checkpoint", write_later)
    run = make_trainee(optimizer)
    config = dataclasses.replace(run.config, keep_checkpoints=0)
    expected: dict[int, dict[str, Tensor]] = {}
    with Saver(tmp_path, config) as saver:
        for step in range(6):
            if step in (2, 4):
                saver.finish()
                trained_on.clear()
                expected[step] = run.tensors()
                saver.save(step, run.model, run.optimizer)
            # no wait, so that on a GPU the update may run during the copy
            train_step(run.loss_of, run.optimizer, run.micro_batches(step), run.config, step, SINGLE)
            if step in (3, 5):
                trained_on.set()
        saver.finish()
    for step, tensors in expected.items():
        saved = make_trainee(optimizer, seed=2)
        assert load_checkpoint(tmp_path / "checkpoints" / f"step_{step:06d}", saved.model, saved.optimizer) == step
        assert_identical(saved.tensors(), tensors)


def test_time_for_which_a_save_blocks_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model has full width. The first save allocates the memory of the copy, the later ones reuse it."""
    run = make_trainee()
    model = device_parity.random_model(wide("gpt2-124m", n_layer=6 if REAL else 2)).to(DEVICE)
    optimizer = build_optimizer(model, run.config.optim, torch.bfloat16)
    size = sum(p.nbytes for p in model.parameters()) + sum(
        value.nbytes for value in optimizer_tensors(model, optimizer).values()
    )
    monkeypatch.setattr(restomod.runs.async_saver, "write_checkpoint", lambda *arguments: tmp_path)
    with Saver(tmp_path, run.config) as saver:
        for i in range(1, 4):
            if REAL:
                torch.cuda.synchronize()
            start = time.perf_counter()
            saver.save(i, model, optimizer)
            seconds = time.perf_counter() - start
            print(f"\nsave {i}: training blocked for {1000 * seconds:.0f} ms, {size / 1e9:.2f} GB")
            saver.finish()
    assert seconds < max(0.2, size / 0.5e9)  # 0.5 GB/s is slower than any path from a GPU to memory
