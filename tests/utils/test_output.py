"""Failures of printing: one line, no traceback."""

from __future__ import annotations

import errno
import io
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table
from rich.text import Text

import restomod
from restomod.utils.console import Display
from restomod.utils.errors import UserError
from restomod.utils.output import print_error, print_if_possible, raw_stream, run_guarded
from restomod.utils.terminal import Terminal

CODES = [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EBADF, errno.EAGAIN]


STEERS = "a\x1b[2J\x1b]8;;http://x\x1b\\b\x9b1m\u202ec\r\x07\udcff\u2028d"
SHOWN = "a␛[2J␛]8;;http://x␛\\b\ufffd1m\ufffdc␍␇\ufffd\ufffdd"


class Failing(io.StringIO):
    """Stream that fails at every write, or only when it is flushed."""

    def __init__(self, error: Exception, buffered: bool) -> None:
        super().__init__()
        self.error, self.buffered, self.written = error, buffered, 0

    def write(self, text: str) -> int:
        self.written += 1
        if not self.buffered:
            raise self.error
        return len(text)

    def flush(self) -> None:
        if self.written:
            raise self.error


def closed() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


class WriteOnly:
    """Replacement of standard output by a script or a notebook."""

    def write(self, text: str) -> int:
        raise RuntimeError("the window is gone")


FAILURES = [(lambda b=b, c=c: Failing(OSError(c, os.strerror(c)), b)) for c in CODES for b in (False, True)]


def printing() -> int:
    print("results")
    return 0


NOT_ASCII = UnicodeEncodeError("ascii", "é", 0, 1, "ordinal not in range(128)")


@pytest.mark.parametrize("make", [*FAILURES, closed, lambda: None, lambda: Failing(NOT_ASCII, buffered=False)])
def test_a_command_that_cannot_print_ends_in_one_line(
    make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdout", make())
    assert run_guarded(printing) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("buffered", [False, True])
@pytest.mark.parametrize("rich", [False, True])
def test_an_exited_reader_is_no_error(
    buffered: bool, rich: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def tabulating() -> int:
        Console().print("results")
        return 1

    monkeypatch.setattr(sys, "stdout", Failing(BrokenPipeError(errno.EPIPE, "Broken pipe"), buffered))
    monkeypatch.setattr("rich.console.os.dup2", lambda *_: None)  # protects pytest's output
    monkeypatch.setattr(Failing, "fileno", lambda _: 99)
    assert run_guarded(tabulating if rich else printing) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("make", [*FAILURES, closed, lambda: None, WriteOnly])
def test_work_without_output_keeps_its_exit_code(make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    display = []

    def work() -> int:
        display.append(Display(interactive=False))
        for _ in range(3):
            display[0].line("a step")
        return 75

    monkeypatch.setattr(sys, "stdout", make())
    assert run_guarded(work, without_output=True) == 75
    assert not display[0].closed


@pytest.mark.parametrize("make", [lambda: None, closed, *FAILURES])
def test_print_if_possible_warns_once(
    make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stream = make()
    monkeypatch.setattr(sys, "stdout", stream)
    for _ in range(3):
        print_if_possible("a line")
    assert capsys.readouterr().err.count("cannot be written") == (stream is not None)


@pytest.mark.parametrize("make", FAILURES)
def test_a_display_drops_output_that_cannot_be_printed(
    make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    stream = make()
    monkeypatch.setattr(sys, "stdout", stream)
    display = Display(interactive=True)
    display.on_failure = told.append
    display.start(0, 10)
    for i in range(3):
        display.line(f"line {i}")
    display.stop()
    assert told == [stream.error.strerror]
    with pytest.raises(UserError, match="standard output"):
        display.require_printed()


@pytest.mark.parametrize("stderr", [lambda: None, closed, *FAILURES])
def test_an_error_that_cannot_be_printed_is_still_an_error(
    stderr: Callable[[], Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def work() -> int:
        raise UserError("something is wrong")

    monkeypatch.setattr(sys, "stderr", stderr())
    assert run_guarded(work) == 2
    assert capsys.readouterr().out == ""


def test_other_errors_keep_their_traceback() -> None:
    def work() -> int:
        raise ValueError("a fault")

    with pytest.raises(ValueError, match="a fault"):
        run_guarded(work)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has /dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    ("redirection", "code"),
    [(">/dev/full", 2), (">&-", 2), (">&- 2>&-", 2), (">/dev/full 2>/dev/full", 2), ("2>&- >/dev/null", 0)],
)
def test_the_command_itself_ends_without_a_traceback(redirection: str, code: int, unbuffered: str) -> None:
    command = f"'{sys.executable}' -m restomod --version {redirection}"
    done = subprocess.run(
        command, shell=True, capture_output=True, text=True, env=os.environ | {"PYTHONUNBUFFERED": unbuffered}
    )
    assert done.returncode == code
    assert done.stdout == ""
    assert done.stderr.count("\n") == (1 if "2>" not in redirection else 0)


def test_control_characters_are_never_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """Prints of this package, of libraries and of `logging` are sanitized."""

    def work() -> int:
        print(STEERS)
        print("exact \x1b", file=raw_stream(sys.stdout))
        sys.stderr.writelines(["\r 50 % of \x1b", "\n"])
        logging.lastResort.handle(logging.makeLogRecord({"msg": "log \x1b", "levelno": 50}))  # type: ignore[union-attr]
        print_if_possible("say \x1b")
        raise UserError(STEERS)

    streams = sys.stdout, sys.stderr
    assert run_guarded(work) == 2
    assert (sys.stdout, sys.stderr) == streams
    out, error = capsys.readouterr()
    assert out == f"{SHOWN}\nexact \x1b\nsay ␛\n"
    assert error.startswith("\r 50 % of ␛\nlog ␛\n")
    assert error.splitlines()[-1].startswith("restomod: error: a␛[2J")
    assert not set(error) & set("\x1b\x9b\u202e\u2028\udcff")


class FakeTerminal(io.StringIO):
    """Stream that is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("no_colour", ["", "1"])
@pytest.mark.parametrize("stream", [FakeTerminal, io.StringIO])
def test_warnings_and_errors_are_coloured_in_a_terminal_only(
    stream: type[io.StringIO], no_colour: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work() -> int:
        print("warning: little memory")
        print("a line\x1b[33m")
        print_error("warning: no shard")
        raise UserError("bad flag")

    monkeypatch.setenv("NO_COLOR", no_colour)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", out := stream())
    monkeypatch.setattr(sys, "stderr", error := stream())
    assert run_guarded(work) == 2
    coloured = stream is FakeTerminal and not no_colour and os.name != "nt"
    yellow, red, reset = ("\x1b[33m", "\x1b[31m", "\x1b[0m") if coloured else ("", "", "")
    assert out.getvalue() == f"{yellow}warning: little memory{reset}\na line␛[33m\n"
    assert error.getvalue() == f"{yellow}warning: no shard{reset}\n{red}restomod: error: bad flag{reset}\n"


def test_rich_keeps_its_own_escapes_and_replaces_those_of_text(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)

    def work() -> int:
        console = Terminal(force_terminal=True, color_system="standard", width=200)
        console.print(Text("red\x1b[2J\u202e", style="red"))
        console.print(Text.from_ansi("\x1b]8;;http://evil\x1b\\link\x1b]8;;\x1b\\"))
        table = Table(box=None)
        table.add_column("x")
        table.add_row(Text("cell\x9b"))
        console.print(table)
        return 0

    assert run_guarded(work) == 0
    shown = stream.getvalue()
    assert "\x1b[31mred␛[2J\ufffd\x1b[0m\n" in shown
    assert "evil" not in shown
    assert not set(shown) & set("\x9b\u202e")
    assert set(re.findall("\x1b.[0-9;]*.", shown)) == {"\x1b[31m", "\x1b[1m", "\x1b[0m"}


def test_only_one_module_creates_consoles() -> None:
    source = Path(restomod.__file__).parent
    naming = [path.name for path in source.rglob("*.py") if re.search(r"import .*\bConsole\b", path.read_text())]
    assert naming == ["terminal.py"]
