"""Lines at the head and at the end of a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from restomod.runs.metrics import append_jsonl
from restomod.train.console_lines import check_lines, closing_lines
from restomod.utils.console import CheckResult

LOSS = CheckResult("initial loss", "pass", "10.80, expected ln(50257) = 10.82")
CAUSAL = CheckResult("causality", "pass", "changing token 32 changes none before it")
NARROW = CheckResult("kernel shapes", "warn", "n_embd 32 is no multiple of 64")


@pytest.mark.parametrize(
    ("results", "lines"),
    [
        ([], []),
        ([LOSS], ["initial loss 10.80, expected ln(50257) = 10.82"]),
        (
            [LOSS, CAUSAL, CheckResult("tied lm_head", "pass", "")],
            ["initial loss 10.80, expected ln(50257) = 10.82", "also checked: causality, tied lm_head"],
        ),
        (
            [LOSS, CAUSAL, NARROW],
            [
                "initial loss 10.80, expected ln(50257) = 10.82",
                "also checked: causality",
                "warning: kernel shapes: n_embd 32 is no multiple of 64",
            ],
        ),
        (
            [CheckResult("loss", "warn", "11.00 is worse than guessing"), CAUSAL, CheckResult("gradients", "skip", "")],
            ["also checked: causality", "warning: loss: 11.00 is worse than guessing"],
        ),
    ],
)
def test_the_head_of_a_run_says_what_was_checked(results: list[CheckResult], lines: list[str]) -> None:
    assert check_lines(results) == lines


def test_a_finished_run_tells_its_losses_and_what_to_do_next(tmp_path: Path) -> None:
    for kind, step, loss in [("val", 0, 10.9), ("train", 0, 10.8), ("train", 1, 9.0), ("val", 2, 8.5)]:
        append_jsonl(tmp_path / "metrics.jsonl", {"kind": kind, "step": step, "loss": loss})
    text = "\n".join(closing_lines(tmp_path, [tmp_path / "checkpoints" / "step_000002"], 61, finished=True))
    assert "finished in 1 min 01 s" in text
    assert "10.8000 at the start, 9.0000 at the end" in text
    assert "10.9000 at the start, 8.5000 at the end" in text
    assert f"restomod sample {tmp_path}" in text
    assert f"from_pretrained('{tmp_path}/checkpoints/step_000002')" in text
    own = closing_lines(tmp_path, [tmp_path / "checkpoints" / "step_000002"], 61, finished=True, exportable=False)
    assert own[-1].startswith("not exportable")
    assert "from_pretrained" not in "\n".join(own)


def test_a_run_without_validation_tells_only_its_training_loss(tmp_path: Path) -> None:
    append_jsonl(tmp_path / "metrics.jsonl", {"kind": "train", "step": 0, "loss": 10.8})
    text = "\n".join(closing_lines(tmp_path, [tmp_path / "step_000001"], 1, finished=True))
    assert "training loss" in text
    assert "validation loss" not in text


@pytest.mark.parametrize(
    ("saved", "said"),
    [
        (["step_000003"], "checkpoint of step 3;"),
        (["step_000002"], "stopped after 3 steps; the newest checkpoint is that of step 2,"),
        ([], "stopped after 3 steps without a checkpoint"),
    ],
)
def test_a_stopped_run_tells_which_checkpoint_there_is_and_how_to_go_on(
    tmp_path: Path, saved: list[str], said: str
) -> None:
    for step in range(3):
        append_jsonl(tmp_path / "metrics.jsonl", {"kind": "train", "step": step, "loss": 10.8})
    (line,) = closing_lines(tmp_path, [tmp_path / name for name in saved], 1, finished=False)
    assert said in line
    assert f"restomod train --resume {tmp_path}" in line


@pytest.mark.parametrize(("saved", "missing"), [(["step_000001"], False), (["step_000000"], True), ([], True)])
def test_a_finished_run_without_its_last_checkpoint_says_so(tmp_path: Path, saved: list[str], missing: bool) -> None:
    append_jsonl(tmp_path / "metrics.jsonl", {"kind": "train", "step": 0, "loss": 10.8})
    text = "\n".join(closing_lines(tmp_path, [tmp_path / name for name in saved], 1, finished=True))
    assert ("the checkpoint of step 1 could not be saved" in text) == missing
    assert text.count("from_pretrained") == len(saved)
