"""Dispatch of the command line: help, version, system errors, exit codes."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys

import pytest

from restomod import __version__
from restomod.cli import EXIT_CODES, main
from restomod.commands.catalog import COMMANDS, FIRST_STEPS, GROUPS
from restomod.config.presets import PRESETS
from restomod.utils.errors import UserError


@pytest.mark.parametrize(
    "arguments", [[], *([command] for command in COMMANDS), *(["train", name] for name in PRESETS)], ids=" ".join
)
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_exits_with_0(capsys: pytest.CaptureFixture[str], arguments: list[str], flag: str) -> None:
    code = main([*arguments, flag])
    shown = capsys.readouterr()
    assert (code, shown.err) == (0, "")
    assert shown.out.startswith(" ".join(["usage: restomod", *arguments]))


def test_help_names_every_command_preset_and_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    main(["train", "--help"])
    shown = capsys.readouterr().out
    assert [name for name in (*COMMANDS, *PRESETS, *map(str, EXIT_CODES)) if name not in shown] == []


def test_help_begins_with_the_first_steps_and_groups_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    shown = capsys.readouterr().out
    _, *sections = shown.split("\n\n")
    titles = [section.partition(":\n")[0] for section in sections]
    assert titles == ["first steps", *GROUPS, "options", "exit codes"]
    assert [line.partition("  ")[0] for line in sections[0].replace("\n  ", "\n").splitlines()[1:]] == [*FIRST_STEPS]
    listed = [line.split()[0] for section in sections[1:-2] for line in section.splitlines()[1:]]
    assert listed == [name for commands in GROUPS.values() for name in commands]


def test_help_of_a_preset_shows_its_values_as_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "gpt2-124m", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "Number of optimizer steps. (default: 19073)" in shown


def test_help_of_a_flag_is_one_paragraph(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "600")
    with contextlib.suppress(SystemExit):
        main(["train", "quickstart", "--help"])
    assert (
        "up to batch_tokens. (default: chosen automatically, and lowered when memory runs out)"
        in capsys.readouterr().out
    )


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"restomod {__version__}\n"


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(UserError, match="unknown preset"):
        main(["train", "quikstart", "--debug"])


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (PermissionError(13, "Permission denied", "there"), 2, "restomod: error: there: Permission denied\n"),
        (KeyboardInterrupt(), 130, "restomod: stopped\n"),
    ],
)
def test_a_system_error_and_ctrl_c_are_one_line(
    error: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(arguments: list[str]) -> int:
        raise error

    monkeypatch.setattr("restomod.commands.train.run", fail)
    assert main(["train"]) == code
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["train", "quickstart", "--help"]])
def test_a_closed_pipe_is_not_an_error(arguments: list[str], unbuffered: str) -> None:
    """Like `restomod --help | head -1`; the write fails immediately without buffering, else at exit."""
    reader, writer = os.pipe()
    os.close(reader)
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    command = [sys.executable, "-m", "restomod", *arguments]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, env=environment)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")
