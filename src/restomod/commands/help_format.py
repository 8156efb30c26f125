"""Layout of a command's help: summary and example first, groups of flags, defaults without Python's notation.

tyro (1.0) prints the help. It has no option for groups of flags, so `help_layout` replaces its function `format_help`
while the help is printed; `tests/commands/test_help.py` fails if a release of tyro no longer calls it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import shutil
import textwrap
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import tyro._backends._tyro_help_formatting as tyro_help
import tyro._strings

RARELY_USED = "rarely used"
MAX_WIDTH = 100  # columns of a paragraph
MEANING_OF_NONE = re.compile(r"\s*\bNone: (.+?)\.?$", re.DOTALL)  # last sentence of a field's docstring
REPEATED_METAVAR = re.compile(r"\[(\S+) \[\1 \.\.\.\]\]")
DEFAULTS = {"True": "on", "False": "off", "": "none"}
# tyro breaks a paragraph before an indented line, and docstrings of fields are indented
tyro._strings.remove_single_line_breaks = lambda helptext: " ".join(helptext.split())


@contextlib.contextmanager
def help_layout(heading: str, common: Sequence[str], rare: Collection[str]) -> Iterator[None]:
    """Change the layout of the help that tyro prints within the context.

    The first group has the command's own flags and then the flags in ``common``. One group per nested dataclass
    follows. The last group has the flags in ``rare``.

    Args:
        heading: paragraphs to print below the usage line, separated by blank lines.
        common: names of fields in the order of the help, such as "data.path".
        rare: names of fields for the last group.
    """
    original = tyro_help.format_help

    def format_help(*, args: list[Any], **others: Any) -> list[str]:
        arranged = sorted(args, key=lambda arg: _rank(arg, common, rare))
        lines = original(args=[_grouped(_reworded(arg), common, rare) for arg in arranged], **others)
        return [lines[0], "", *_wrapped(heading), *lines[1:]]

    tyro_help.format_help = format_help  # type: ignore[assignment]
    try:
        yield
    finally:
        tyro_help.format_help = original


def _name(arg: Any) -> str:
    """Return the dotted name of an argument's field."""
    name: str = arg.arg.lowered.name_or_flags[-1]
    return name.lstrip("-").replace("-", "_")


def _rank(arg: Any, common: Sequence[str], rare: Collection[str]) -> tuple[int, int]:
    """Return the sort key of an argument: group, and position in the group."""
    name = _name(arg)
    if name in rare:
        return 3, 0
    if name in common:
        return 1, common.index(name)
    return (2 if "." in name else 0), 0


def _grouped(arg: Any, common: Sequence[str], rare: Collection[str]) -> Any:
    """Return a copy of an argument in the group for `_rank`; tyro names a group after the prefix of its parser."""
    if arg.arg.is_positional() or _name(arg) not in {*common, *rare}:
        return arg
    prefix = RARELY_USED if _name(arg) in rare else ""
    return dataclasses.replace(
        arg, source_parser=dataclasses.replace(arg.source_parser, extern_prefix=prefix, description="")
    )


def _reworded(arg: Any) -> Any:
    """Return a copy of an argument without "None" and brackets in its metavar and its default."""
    field, lowered = arg.arg.field, arg.arg.lowered
    text = field.helptext() if callable(field.helptext) else field.helptext or ""
    none = MEANING_OF_NONE.search(text) if field.default is None else None
    if none is not None:
        text = text[: none.start()]

    def hint(default: str) -> str:
        if lowered.action == "append" and not field.default:
            return "(may be repeated)"
        if arg.arg.is_positional() and default == "":  # `run` raises UserError without a value
            return "(required)"
        default = none[1] if none is not None else DEFAULTS.get(default, default)
        return "(default: {})".format(default.replace("\n", "\\n"))

    metavar = lowered.metavar and REPEATED_METAVAR.sub(r"\1 ...", lowered.metavar.replace("{None}|", ""))
    argconf = dataclasses.replace(field.argconf, metavar=metavar, help_behavior_hint=hint)
    changed = dataclasses.replace(arg.arg, field=dataclasses.replace(field, helptext=text, argconf=argconf))
    return dataclasses.replace(arg, arg=changed)


def _wrapped(heading: str) -> list[str]:
    """Return the lines of a heading; its example stays on one line and can be copied."""
    width = min(shutil.get_terminal_size().columns, MAX_WIDTH)
    lines: list[str] = []
    for paragraph in heading.split("\n\n"):
        lines += [""] if lines else []
        lines += [paragraph] if paragraph.startswith("example: ") else textwrap.wrap(paragraph, width)
    return lines
