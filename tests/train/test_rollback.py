"""Rollback of several ranks without a shared file system: only the main process reads the run's files."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from restomod.engine.distributed import Processes, distribute
from restomod.engine.optimizer import build_optimizer
from restomod.engine.step import BatchLoss, ComputeConfig
from restomod.runs.async_saver import Saver
from restomod.runs.folder import RunFolder
from restomod.runs.metrics import append_jsonl
from restomod.train.rollback import roll_back
from restomod.train.setup import Start
from restomod.train.spike_guard import MIN_LOSSES
from restomod.train.step_log import StepLog
from restomod.utils.console import Display
from tests.models import CPU
from tests.processes import member, results
from tests.trainee import make_trainee

QUIET = Display(muted=True)
LOSSES = [5.0 + step / 1000 for step in range(2 * MIN_LOSSES)]
SAVED = MIN_LOSSES + 1  # the step of the checkpoint


def training(processes: Processes, folder: Path) -> Any:
    """Return a `Training` with ``LOSSES`` in its log; only the main process has the folder."""
    t = make_trainee()
    compute = ComputeConfig(CPU, torch.float32, 2)
    loss_of = distribute(BatchLoss(t.model, compute), t.model, "ddp", processes)
    run = RunFolder(
        folder / str(processes.rank), dataclasses.replace(t.config, spike_sigmas=5.0), writes=processes.main
    )
    if processes.main:
        run.folder.mkdir()
        for step, loss in enumerate(LOSSES):
            append_jsonl(run.folder / "metrics.jsonl", {"kind": "train", "step": step, "loss": loss})
    return SimpleNamespace(
        run=run,
        config=run.config,
        compute=compute,
        processes=processes,
        start=Start(step=len(LOSSES)),
        model=t.model,
        loss_of=loss_of,
        optimizer=build_optimizer(t.model, t.config.optim, torch.float32, processes),
    )


def limits(processes: Processes, folder: Path) -> tuple[float, float, tuple[int, int], Tensor, bool]:
    """Return the loss limit at the start and after a rollback, and the step after the rollback."""
    subject = training(processes, folder)
    guard = StepLog(subject, QUIET).guard
    at_start, weight = guard.loss_limit(), subject.model.transformer.wte.weight
    with Saver(subject.run.folder, subject.config, processes) as saver:
        saver.save(SAVED, subject.model, subject.optimizer)
        saved = weight.detach().clone()
        with torch.no_grad():
            weight.add_(1)
        back = roll_back(subject, saver, guard, len(LOSSES), "a spike", 0, QUIET)
    return at_start, guard.loss_limit(), back, weight.detach() - saved, subject.run.folder.exists()


def test_all_ranks_use_the_log_and_checkpoint_of_the_main_process(tmp_path: Path) -> None:
    main, other = results(2, member, limits, tmp_path)
    for at_start, after, back, change, _ in (main, other):
        assert at_start > after > 5.0
        assert (at_start, after) == main[:2]
        assert after < 6.0, "there are losses enough for a limit"
        assert back == (SAVED, len(LOSSES) + 1 - SAVED)
        assert not change.any()
    assert main[-1]
    assert not other[-1]
