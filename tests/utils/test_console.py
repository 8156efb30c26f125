"""Console output of commands."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

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


def test_numbers_of_a_record_with_the_mfu_where_it_is_known() -> None:
    assert format_train_record(RECORD) == "loss 3.1416  lr 6.00e-04  norm 0.57  1234 ms/step  98,765 tok/s"
    assert format_train_record({**RECORD, "mfu": 0.4123}).endswith("tok/s  mfu 41.2%")


# --- the display ---------------------------------------------------------------------------------------------


def show(display: Display) -> None:
    """All that a run shows."""
    display.table([("model", "GPT-2"), ("batch", "[bold]4,096[/bold]")])
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
    assert "batch  [bold]4,096[/bold]" in lines
    assert "  ▸ def [x](self):" in lines
    assert "        pass" in lines
    assert "everything is in [runs/a]" in lines


def test_long_lines_are_not_broken(capsys: pytest.CaptureFixture[str]) -> None:
    Display(interactive=False).line("word " * 100)
    assert capsys.readouterr().out == "word " * 100 + "\n"


def in_terminal(width: int = 200) -> tuple[Display, io.StringIO]:
    """A display, and what it writes."""
    display, written = Display(interactive=True), io.StringIO()
    display.stop()  # does nothing before the start
    display.console = Console(file=written, force_terminal=True, color_system="standard", width=width, highlight=False)
    return display, written


def test_in_a_terminal_there_is_a_progress_bar() -> None:
    display, terminal = in_terminal()
    show(display)
    assert "step 42/100" in terminal.getvalue()
    assert "98,765 tok/s" in terminal.getvalue()
    assert "validation loss 3.0000" in terminal.getvalue()


def test_only_what_is_meant_is_styled() -> None:
    display, terminal = in_terminal(80)
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


@pytest.mark.parametrize(("status", "colour"), [("pass", "32"), ("warn", "33"), ("fail", "1;31"), ("skip", "2")])
def test_a_check_result_is_one_line_in_columns_and_its_status_in_colour(status: CheckStatus, colour: str) -> None:
    display, output = in_terminal()
    display.check_result(CheckResult("kernel shapes", status, "[64] of 64"))
    assert output.getvalue() == f"\x1b[{colour}m{status}  \x1b[0mkernel shapes     [64] of 64\n"


def test_a_check_result_without_a_terminal_is_plain(capsys: pytest.CaptureFixture[str]) -> None:
    Display(interactive=False).check_result(CheckResult("bf16", "skip", "a reason " * 30))
    assert capsys.readouterr().out == f"skip  bf16              {'a reason ' * 30}\n"
