"""Console output of commands."""

from __future__ import annotations

import io
import time
from typing import Any

import pytest
from rich.console import Console
from rich.text import Text

from restomod.utils.console import CheckResult, CheckStatus, Display, format_train_record

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


def test_a_record_is_formatted_with_the_mfu_if_known() -> None:
    assert format_train_record(RECORD) == "loss 3.1416  lr 6.00e-04  norm 0.57  1234 ms/step  98,765 tok/s"
    assert format_train_record({**RECORD, "mfu": 0.4123}).endswith("tok/s  mfu 41.2%")


# --- the display ---------------------------------------------------------------------------------------------


def show(display: Display) -> None:
    """Print everything that a run prints."""
    display.table([("model", "GPT-2"), ("batch", "[bold]4,096[/bold]")])
    display.start(40, 100)
    for step in (40, 41):
        display.step({**RECORD, "step": step}, seconds_left=200)
    display.line("step 42  validation loss 3.0000", style="bold cyan")
    display.sample("def [x", "](self):\n    pass")
    display.stop()
    display.lines(["finished", "checkpoint [runs/a]"])


def test_a_log_has_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    show(Display(interactive=False))
    out = capsys.readouterr().out
    steps = [line for line in out.splitlines() if line.startswith("step 4") and "tok/s" in line]
    assert steps == ["step 41/100  loss 3.1416  lr 6.00e-04  norm 0.57  1234 ms/step  98,765 tok/s  eta 3 min 20 s"]
    assert "\x1b" not in out


def test_a_log_has_the_first_and_last_step_and_one_every_few_seconds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    display, now = Display(interactive=False), [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    display.start(40, 100)
    for step in range(40, 100):
        display.step({**RECORD, "step": step}, seconds_left=0)
        now[0] += 0.9
    shown = [line.split()[1] for line in capsys.readouterr().out.splitlines()]
    assert shown == ["41/100", "53/100", "65/100", "77/100", "89/100", "100/100"]


def test_text_that_looks_like_markup_is_printed_unchanged(capsys: pytest.CaptureFixture[str]) -> None:
    show(Display(interactive=False))
    lines = capsys.readouterr().out.splitlines()
    assert "batch  [bold]4,096[/bold]" in lines
    assert "  ▸ def [x](self):" in lines
    assert "        pass" in lines
    assert "checkpoint [runs/a]" in lines


def test_long_lines_are_not_broken(capsys: pytest.CaptureFixture[str]) -> None:
    Display(interactive=False).line("word " * 100)
    assert capsys.readouterr().out == "word " * 100 + "\n"


def in_terminal(width: int = 200) -> tuple[Display, io.StringIO]:
    """Return a display for a terminal, and its output."""
    display, written = Display(interactive=True), io.StringIO()
    display.stop()  # no effect before the start
    display.console = Console(file=written, force_terminal=True, color_system="standard", width=width, highlight=False)
    return display, written


def test_in_a_terminal_there_is_a_progress_bar() -> None:
    display, terminal = in_terminal()
    show(display)
    assert "step 42/100" in terminal.getvalue()
    assert "98,765 tok/s" in terminal.getvalue()
    assert "validation loss 3.0000" in terminal.getvalue()


def test_labels_and_prompts_are_styled() -> None:
    display, terminal = in_terminal(80)
    display.table([("model", "GPT-2")])
    display.sample("the", " cat\nsat")
    assert terminal.getvalue().splitlines() == [
        "\x1b[2mmodel  \x1b[0mGPT-2",
        "\x1b[2m  ▸ \x1b[0m\x1b[1mthe\x1b[0m cat",
        "\x1b[2m    \x1b[0msat",
    ]


def test_samples_are_wrapped_between_words_and_keep_their_indentation() -> None:
    display, terminal = in_terminal(30)
    display.sample("Once upon", " a time there was a long sentence.\n    return some_value + another_value")
    assert [line.rstrip() for line in Text.from_ansi(terminal.getvalue()).plain.splitlines()] == [
        "  ▸ Once upon a time there was",
        "    a long sentence.",
        "        return some_value +",
        "        another_value",
    ]


def test_a_log_does_not_wrap_samples(capsys: pytest.CaptureFixture[str]) -> None:
    Display(interactive=False).sample("one", " word" * 100)
    assert capsys.readouterr().out == f"  ▸ one{' word' * 100}\n"


def test_values_of_a_table_are_aligned_when_they_are_wrapped() -> None:
    display, terminal = in_terminal(40)
    display.table([("run", "a"), ("batch", "512 tokens = gradient accumulation 1 × micro-batch 2")])
    assert Text.from_ansi(terminal.getvalue()).plain.splitlines() == [
        "run    a",
        "batch  512 tokens = gradient",
        "       accumulation 1 × micro-batch 2",
    ]


def test_warnings_are_yellow_in_a_terminal() -> None:
    display, terminal = in_terminal()
    display.warn("low memory")
    display.line("warning: low memory", style="dim")
    assert terminal.getvalue() == 2 * "\x1b[33mwarning: low memory\x1b[0m\n"


@pytest.mark.parametrize("terminal", [True, False])
def test_a_display_is_interactive_in_a_terminal_only(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal)
    assert Display().interactive == terminal


@pytest.mark.parametrize(("status", "colour"), [("pass", "32"), ("warn", "33"), ("fail", "1;31"), ("skip", "2")])
def test_a_check_result_is_one_line_in_columns_and_its_status_in_colour(status: CheckStatus, colour: str) -> None:
    display, output = in_terminal()
    display.check_result(CheckResult("kernel shapes", status, "[64] of 64"))
    assert output.getvalue() == f"\x1b[{colour}m{status}  \x1b[0mkernel shapes     [64] of 64\n"


def test_a_check_result_without_a_terminal_is_plain(capsys: pytest.CaptureFixture[str]) -> None:
    Display(interactive=False).check_result(CheckResult("bf16", "skip", "a reason " * 30))
    assert capsys.readouterr().out == f"skip  bf16              {'a reason ' * 30}\n"
