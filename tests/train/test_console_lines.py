"""Console output at the start and at the end of a run."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import Any

import pytest

from restomod.config.presets import preset
from restomod.config.run import OptimConfig
from restomod.train.console_lines import (
    check_rows,
    describe_optimizer,
    missing_checkpoint,
    next_commands,
    result_rows,
    stop_line,
)
from restomod.utils.console import CheckResult

LOSS = CheckResult("initial loss", "pass", "10.80, expected ln(50257) = 10.82")
CAUSAL = CheckResult("causality", "pass", "changing token 32 changes none before it")
NARROW = CheckResult("kernel shapes", "warn", "n_embd 32 is no multiple of 64")
CONFIG = preset("quickstart")


def record(kind: str, step: int, loss: float, **values: Any) -> dict[str, Any]:
    return {"kind": kind, "step": step, "loss": loss, **values}


@pytest.mark.parametrize(
    ("results", "rows"),
    [
        ([], {}),
        ([LOSS], {"initial loss": LOSS.reason}),
        (
            [LOSS, CAUSAL, CheckResult("tied lm_head", "pass", "")],
            {"initial loss": LOSS.reason, "sanity checks": "passed: causality, tied lm_head"},
        ),
        ([LOSS, CAUSAL, NARROW], {"initial loss": LOSS.reason, "sanity checks": "passed: causality"}),
        (
            [CheckResult("loss", "warn", "11.00 is too high"), CAUSAL, CheckResult("gradients", "skip", "")],
            {"sanity checks": "passed: causality"},
        ),
    ],
)
def test_passed_sanity_checks_are_rows_of_the_first_table(results: list[CheckResult], rows: dict[str, str]) -> None:
    assert dict(check_rows(results)) == rows


def test_the_optimizer_is_described_with_its_settings() -> None:
    optim = OptimConfig(betas=(0.9, 0.95), weight_decay=0.1, grad_clip=1.0)
    assert describe_optimizer(optim) == "AdamW (betas 0.9 and 0.95, weight decay 0.1), gradient clipping 1"
    assert describe_optimizer(dataclasses.replace(optim, optimizer="muon")).startswith("Muon (momentum 0.95, ")


def test_results_are_labelled_and_name_the_best_validation_loss() -> None:
    records = [
        record("val", 0, 10.9),
        record("train", 0, 10.8, ms=1000.0),
        record("train", 1, 9.0, ms=3000.0),
        record("val", 1, 8.0),
        record("val", 2, 8.5),
    ]
    checkpoint = Path("run/checkpoints/step_000002")
    rows = dict(result_rows(CONFIG, [checkpoint], records, 61, "healthy"))
    assert rows["validation loss"] == "10.9000 → 8.5000 nats (best 8.0000 at step 1)"
    assert rows["training loss"] == "10.8000 → 9.0000 nats"
    assert rows["tokens"] == "1,024 in 2 steps, 256 tokens/s"
    assert rows["time"].startswith("1 min 01 s")
    assert rows["checkpoint"].startswith(str(checkpoint))
    assert "transformers" in rows["checkpoint"]
    assert rows["verdict"] == "healthy"
    own = dict(result_rows(CONFIG, [checkpoint], records, 61, "healthy", exportable=False))
    assert "loads in transformers" not in own["checkpoint"]


def test_without_validation_there_is_no_validation_loss() -> None:
    rows = dict(result_rows(CONFIG, [], [record("train", 0, 10.8)], 1, "healthy"))
    assert "training loss" in rows
    assert "validation loss" not in rows


@pytest.mark.parametrize("folder", ["runs/a", "my runs/it's"])
def test_commands_are_quoted_for_the_shell(folder: str) -> None:
    commands = [shlex.split(line.partition("restomod ")[2]) for line in next_commands(Path(folder), CONFIG)[1:]]
    assert [words[0] for words in commands] == ["sample", "report", "train"]
    assert all(folder in words for words in commands)
    assert commands[-1][-1] == str(2 * CONFIG.steps)


@pytest.mark.parametrize(
    ("saved", "said"),
    [
        (["step_000003"], "stopped after 3 steps, checkpoint saved;"),
        (["step_000002"], "stopped after 3 steps, newest checkpoint: step 2 "),
        ([], "stopped after 3 steps without a checkpoint"),
    ],
)
def test_a_stopped_run_names_its_checkpoint_and_the_command_to_resume(saved: list[str], said: str) -> None:
    records = [record("train", step, 10.8) for step in range(3)]
    line = stop_line(Path("runs/a b"), [Path(name) for name in saved], records)
    assert line.startswith(said)
    assert line.endswith("resume with: restomod train --resume 'runs/a b'")


@pytest.mark.parametrize(("saved", "missing"), [(["step_000001"], False), (["step_000000"], True), ([], True)])
def test_a_missing_last_checkpoint_is_a_warning(saved: list[str], missing: bool) -> None:
    found = missing_checkpoint([Path(name) for name in saved], [record("train", 0, 10.8)])
    assert bool(found) == missing
