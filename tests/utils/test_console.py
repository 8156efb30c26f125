"""What a run prints."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from restomod.runs.metrics import append_jsonl
from restomod.train.console_lines import closing_lines, sanity_lines
from restomod.utils.check_result import CheckResult, CheckStatus
from restomod.utils.console import Display, format_train_record

RECORD: dict[str, Any] = {
    "kind": "train",
    "step": 41,
    "loss": 3.14159,
    "lr": 6e-4,
    "grad_norm": 0.567,
    "ms": 1234.5,
    "tokens_per_second": 98765.4,
    "mfu": None,
}


def test_numbers_of_a_record() -> None:
    assert format_train_record(RECORD) == "loss 3.1416  lr 6.00e-04  norm 0.57  1234 ms/step  98,765 tok/s"


def test_mfu_is_shown_where_it_is_known() -> None:
    assert format_train_record({**RECORD, "mfu": 0.4123}).endswith("tok/s  mfu 41.2%")


# --- the display ---------------------------------------------------------------------------------------------


def show(display: Display) -> None:
    """All that a run shows."""
    display.table([("model", "GPT-2"), ("tokens per step", "[bold]4,096[/bold]")])
    display.start(40, 100)
    for step in (40, 41):
        display.step({**RECORD, "step": step}, seconds_left=200)
    display.line("step 42  validation loss 3.0000", style="bold cyan")
    display.sample("def [x", "](self):\n    pass")
    display.stop()
    display.lines(["finished in 3 s", "everything is in [runs/a]"])


def test_without_a_terminal_each_step_is_one_plain_line(capsys: pytest.CaptureFixture[str]) -> None:
    show(Display(interactive=False))
    out = capsys.readouterr().out
    steps = [line for line in out.splitlines() if line.startswith("step 4") and "tok/s" in line]
    assert steps == [
        "step 41/100  loss 3.1416  lr 6.00e-04  norm 0.57  1234 ms/step  98,765 tok/s  eta 3 min 20 s",
        "step 42/100  loss 3.1416  lr 6.00e-04  norm 0.57  1234 ms/step  98,765 tok/s  eta 3 min 20 s",
    ]
    assert "\x1b" not in out


def test_text_is_shown_as_it_is_even_where_it_looks_like_markup(capsys: pytest.CaptureFixture[str]) -> None:
    show(Display(interactive=False))
    lines = capsys.readouterr().out.splitlines()
    assert "tokens per step  [bold]4,096[/bold]" in lines
    assert "  ▸ def [x](self):" in lines
    assert "        pass" in lines
    assert "everything is in [runs/a]" in lines


def test_long_lines_are_not_broken(capsys: pytest.CaptureFixture[str]) -> None:
    Display(interactive=False).line("word " * 100)
    assert capsys.readouterr().out == "word " * 100 + "\n"


def test_in_a_terminal_there_is_a_progress_bar() -> None:
    display = Display(interactive=True)
    terminal = io.StringIO()
    display.console = Console(file=terminal, force_terminal=True, width=200, highlight=False)
    show(display)
    assert "step 42/100" in terminal.getvalue()
    assert "98,765 tok/s" in terminal.getvalue()
    assert "validation loss 3.0000" in terminal.getvalue()


def test_only_what_is_meant_is_styled() -> None:
    display = Display(interactive=True)
    terminal = io.StringIO()
    display.console = Console(file=terminal, force_terminal=True, color_system="standard", width=80, highlight=False)
    display.table([("model", "GPT-2")])
    display.sample("the", " cat\nsat")
    assert terminal.getvalue().splitlines() == [
        "\x1b[2mmodel  \x1b[0mGPT-2",
        "\x1b[2m  ▸ \x1b[0m\x1b[1mthe\x1b[0m cat",
        "\x1b[2m    \x1b[0msat",
    ]


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_decides_about_the_progress_bar(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal)
    assert Display().interactive == terminal


def test_a_display_that_was_never_started_can_be_stopped() -> None:
    Display(interactive=True).stop()


# --- sanity checks ------------------------------------------------------------------------------------------

LOSS = CheckResult("initial loss", "pass", "10.80 ≈ ln(50257) = 10.82")
CAUSAL = CheckResult("causality", "pass", "changing token 32 changes none before it")
NARROW = CheckResult("kernel shapes", "warn", "n_embd 32 is no multiple of 64")


@pytest.mark.parametrize(
    ("verdicts", "lines"),
    [
        ([], []),
        ([LOSS], ["initial loss 10.80 ≈ ln(50257) = 10.82"]),
        (
            [LOSS, CAUSAL, CheckResult("tied head", "pass", "")],
            ["initial loss 10.80 ≈ ln(50257) = 10.82", "checked too: causality, tied head"],
        ),
        (
            [LOSS, CAUSAL, NARROW],
            [
                "initial loss 10.80 ≈ ln(50257) = 10.82",
                "checked too: causality",
                "warning: kernel shapes: n_embd 32 is no multiple of 64",
            ],
        ),
        (
            [CheckResult("loss", "warn", "11.00 is worse than guessing"), CAUSAL, CheckResult("gradients", "skip", "")],
            ["checked too: causality", "warning: loss: 11.00 is worse than guessing"],
        ),
    ],
)
def test_the_head_of_a_run_says_what_was_checked(verdicts: list[CheckResult], lines: list[str]) -> None:
    assert sanity_lines(verdicts) == lines


@pytest.mark.parametrize(("status", "colour"), [("pass", "32"), ("warn", "33"), ("fail", "1;31"), ("skip", "2")])
def test_a_verdict_is_one_line_in_columns_and_its_status_in_colour(status: CheckStatus, colour: str) -> None:
    display = Display(interactive=True)
    output = io.StringIO()
    display.console = Console(file=output, force_terminal=True, color_system="standard", width=200, highlight=False)
    display.verdict(CheckResult("kernel shapes", status, "[64] of 64"))
    assert output.getvalue() == f"\x1b[{colour}m{status}  \x1b[0mkernel shapes     [64] of 64\n"


def test_a_verdict_without_a_terminal_is_plain(capsys: pytest.CaptureFixture[str]) -> None:
    Display(interactive=False).verdict(CheckResult("bf16", "skip", "a reason " * 30))
    assert capsys.readouterr().out == f"skip  bf16              {'a reason ' * 30}\n"


# --- the end -------------------------------------------------------------------------------------------------


def test_a_finished_run_tells_its_losses_and_what_to_do_next(tmp_path: Path) -> None:
    for kind, step, loss in [("val", 0, 10.9), ("train", 0, 10.8), ("train", 1, 9.0), ("val", 2, 8.5)]:
        append_jsonl(tmp_path / "metrics.jsonl", {"kind": kind, "step": step, "loss": loss})
    text = "\n".join(closing_lines(tmp_path, [tmp_path / "checkpoints" / "step_000002"], 61, finished=True))
    assert "finished in 1 min 01 s" in text
    assert "10.8000 at the start, 9.0000 at the end" in text
    assert "10.9000 at the start, 8.5000 at the end" in text
    assert f"restomod sample {tmp_path}" in text
    assert f"from_pretrained('{tmp_path}/checkpoints/step_000002')" in text


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
