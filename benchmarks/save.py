"""A checkpoint of GPT-2 124M with AdamW's state: how long training stands still, and how long the writing takes.

    python benchmarks/save.py [FOLDER]

The first save takes memory for the copy, the others use it again.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import torch
from folder import in_folder

from restomod.config import OptimConfig
from restomod.device import choose_device
from restomod.model.gpt import build_model
from restomod.presets import preset
from restomod.train.checkpoint import list_checkpoints, load_checkpoint
from restomod.train.optimizer import build_optimizer
from restomod.train.saver import Saver

SAVES = 5


def main(folder: Path) -> None:
    config = dataclasses.replace(preset("gpt2-124m"), keep_checkpoints=1)
    model = build_model(config.model, 1, choose_device("auto"))
    optimizer = build_optimizer(model, OptimConfig())
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-4)
    optimizer.step()
    with Saver(folder, config) as saver:
        for i in range(1, SAVES + 1):
            start = time.perf_counter()
            saver.save(i, model, optimizer)
            stall = time.perf_counter() - start
            saver.finish()
            whole = time.perf_counter() - start
            print(f"save {i}: training stands still for {stall:.3f} s of {whole:.2f} s, {stall / whole:.1%}")
    (checkpoint,) = list_checkpoints(folder)
    size = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
    start = time.perf_counter()
    load_checkpoint(checkpoint, model, optimizer)
    print(f"{size / 1e9:.2f} GB; verified and loaded in {time.perf_counter() - start:.2f} s")


if __name__ == "__main__":
    in_folder(main)
