"""Help of the commands: its example can be typed, its flags are grouped, its defaults are plain words."""

from __future__ import annotations

import importlib
import io
import re
import shlex
import sys
from collections.abc import Callable
from typing import Any

import pytest

from restomod.cli import main
from restomod.commands.catalog import COMMANDS, FIRST_STEPS
from restomod.config.run import COMMON_FIELDS, RARELY_USED_FIELDS

LINES = [*FIRST_STEPS, *(command.example for command in COMMANDS.values())]
ARGUMENTS = {  # arguments before --help that list all flags
    "train": ["quickstart"],
    "plan": ["quickstart"],
    "sweep": ["quickstart"],
    "bench": ["step", "quickstart"],
}
WITH_SETTINGS = {"train", "plan", "bench"}  # these list the settings of a run too

Help = Callable[..., str]


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Help:
    """Returns the complete help of a command, as it is printed in a terminal of some width."""

    def show(command: str, columns: int = 100) -> str:
        out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)  # tyro draws boxes of Unicode lines
        with monkeypatch.context() as patch:
            patch.setenv("COLUMNS", str(columns))
            patch.setattr(sys, "stdout", out)
            assert main([command, *ARGUMENTS.get(command, []), "--help"]) == 0
        return out.buffer.getvalue().decode()  # type: ignore[attr-defined]

    return show


class Parsed(Exception):
    """A command line was parsed."""


@pytest.mark.parametrize("line", LINES)
def test_an_example_is_parsed_without_an_error(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program, command, *arguments = shlex.split(line)
    module = importlib.import_module(f"restomod.commands.{command.replace('-', '_')}")
    name = "parse_run" if hasattr(module, "parse_run") else "parse"
    parse = getattr(module, name)

    def parse_and_stop(*given: Any, **named: Any) -> None:
        parse(*given, **named)
        raise Parsed

    monkeypatch.setattr(module, name, parse_and_stop)
    assert program == "restomod"
    with pytest.raises(Parsed):
        module.run(arguments)


def test_the_inputs_of_examples_are_written_by_other_examples() -> None:
    words = [shlex.split(line) for line in LINES]
    written = {"runs/quickstart", *(line[line.index("--out") + 1] for line in words if "--out" in line)}
    read = {line[2] for line in words if "/" in line[2]} | {line[3] for line in words if len(line) > 3}
    assert {path for path in read if re.match("runs/|data/", path)} <= written


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_begins_with_usage_summary_and_example(command: str, shown: Help) -> None:
    usage, _, summary, _, example = shown(command).splitlines()[:5]
    assert usage.startswith(f"usage: restomod {command}")
    assert (COMMANDS[command].summary, f"example: {COMMANDS[command].example}") == (summary, example)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_has_no_notation_of_python(command: str, shown: Help) -> None:
    boxes = shown(command, 600).partition("╭")[2]
    assert re.findall(r"\{None\}|default: (?:None|True|False|\)|\()|\[\S+ \[", boxes) == []


@pytest.mark.parametrize("columns", [60, 80, 110])
@pytest.mark.parametrize("command", COMMANDS)
def test_boxes_are_closed_and_fit_the_terminal(command: str, columns: int, shown: Help) -> None:
    """A default with a line break, such as a prompt of `quickstart`, would open the box."""
    boxes = [line for line in shown(command, columns).splitlines() if line[:1] in ("╭", "│", "╰")]
    assert boxes
    assert [line for line in boxes if line[-1] not in "╮│╯" or len(line) != len(boxes[0])] == []
    assert len(boxes[0]) <= columns
    assert "\x1b" not in "".join(boxes)


def groups(text: str) -> dict[str, list[str]]:
    """The fields in every box of a help, by its title."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if title := re.match(r"╭─ ([\w ]+) ─", line):
            flags = found.setdefault(title[1], [])
        elif flag := re.match(r"│ --([\w.-]+)", line):
            flags.append(flag[1].replace("-", "_"))
    return found


@pytest.mark.parametrize("command", COMMANDS)
def test_rarely_used_flags_are_listed_last(command: str, shown: Help) -> None:
    found = groups(shown(command))
    module = importlib.import_module(f"restomod.commands.{command.replace('-', '_')}")
    rare = {*getattr(module, "RARE", ()), *(RARELY_USED_FIELDS if command in WITH_SETTINGS else ())}
    assert set(found.get("rarely used options", ())) == rare
    assert not rare or list(found)[-1] == "rarely used options"
    every = [name for names in found.values() for name in names]
    assert len(every) == len(set(every)), "a flag is in two groups"


def test_the_common_settings_are_listed_first_and_in_order(shown: Help) -> None:
    found = groups(shown("train"))
    assert found["options"] == ["out", *COMMON_FIELDS]
    assert list(found)[1:-1] == ["model options", "data options", "optim options", "sampling options"]


def test_a_default_of_none_is_shown_in_words(shown: Help) -> None:
    text = " ".join(shown("train").replace("│", " ").split())
    assert "--micro-batch INT Micro-batch B" in text
    assert "(default: chosen automatically, and lowered when memory runs out)" in text
    assert "'import os\\nimport sys\\n'" in text
