"""Checkpoints of GPT-2 124M with AdamW state: training stall, time to disk, loading time, size."""

from __future__ import annotations

import dataclasses
import itertools
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.contenders import Contender, InProcess, Measured, Round
from benchmarks.harness import BenchPlan, compare
from benchmarks.items.generation import random_model
from benchmarks.records import Item, Metric
from restomod.config.presets import preset
from restomod.config.run import OptimConfig
from restomod.engine.device import synchronize
from restomod.engine.optimizer import Optimizers, build_optimizer
from restomod.model.gpt import GPT
from restomod.runs.async_saver import Saver
from restomod.runs.checkpoint import load_checkpoint
from restomod.utils.run_files import list_checkpoints

METRICS = [
    Metric("training stall", "s", "lower"),
    Metric("time to disk", "s", "lower"),
    Metric("load", "s", "lower"),
    Metric("size", "GB", "lower"),
]


def measure(plan: BenchPlan) -> Item:
    """Compare restomod's checkpoints with `torch.save`, followed by fsync, and `torch.load` of the same tensors."""
    model = random_model(plan).train()
    config = dataclasses.replace(preset("gpt2-124m"), model=model.config, keep_checkpoints=1)
    optimizer = build_optimizer(model, OptimConfig())
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-4)
    optimizer.update(1.0, torch.ones((), device=plan.device), torch.zeros((), dtype=torch.bool, device=plan.device))
    contenders: list[Contender] = [
        InProcess("restomod", lambda: ours(plan.scratch, Saver(plan.scratch / "run", config), model, optimizer)),
        InProcess("torch.save", lambda: torch_save_rounds(plan.scratch, model, optimizer)),
    ]
    return Item("Checkpoints of GPT-2 124M", [compare(plan, "weights and AdamW state", contenders, METRICS, 3)])


Act = Callable[[], None]


def timed(save: Act, finish: Act, load: Act, size: Callable[[], int]) -> Round:
    """Return a round that saves, waits until the checkpoint is on disk, and loads it."""

    def one_round() -> Measured:
        start = time.perf_counter()
        save()
        stall = time.perf_counter() - start
        finish()
        whole = time.perf_counter() - start
        start = time.perf_counter()
        load()
        loaded = time.perf_counter() - start
        values = (stall, whole, loaded, size() / 1e9)
        return Measured({metric.name: value for metric, value in zip(METRICS, values, strict=True)})

    return one_round


def ours(scratch: Path, saver: Saver, model: GPT, optimizer: Optimizers) -> Round:
    """Return a round with restomod's `Saver`, which stalls training only while it copies the tensors."""
    run, numbers, device = scratch / "run", itertools.count(1), model.head.device
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir()

    def load() -> None:
        load_checkpoint(list_checkpoints(run)[-1], model, optimizer)
        synchronize(device)

    def size() -> int:
        return sum(path.stat().st_size for path in list_checkpoints(run)[-1].rglob("*") if path.is_file())

    return timed(lambda: saver.save(next(numbers), model, optimizer), saver.finish, load, size)


def torch_save_rounds(folder: Path, model: GPT, optimizer: Optimizers) -> Round:
    """Return a round that writes all tensors to a new file and deletes the previous one; training stalls meanwhile."""
    numbers = itertools.count(1)
    files: list[Path] = []
    adamw = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        adamw.state[parameter] = {
            "step": torch.tensor(1.0),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }

    def save() -> None:
        files.append(folder / f"plain-{next(numbers)}.pt")
        with open(files[-1], "wb") as f:
            torch.save({"model": model.state_dict(), "optimizer": adamw.state_dict()}, f)
            f.flush()
            os.fsync(f.fileno())
        for old in files[:-1]:
            old.unlink(missing_ok=True)

    def load() -> None:
        saved = torch.load(files[-1], weights_only=True, map_location=model.head.device)
        model.load_state_dict(saved["model"])
        adamw.load_state_dict(saved["optimizer"])
        synchronize(model.head.device)

    return timed(save, lambda: None, load, lambda: files[-1].stat().st_size)
