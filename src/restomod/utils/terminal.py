"""Printing with rich: a console that escapes control characters of text, and tables for terminals and Markdown."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import IO

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table as RichTable
from rich.text import Text

from restomod.utils.output import raw_stream
from restomod.utils.redaction import redact
from restomod.utils.text import visible

WIDTH_ELSEWHERE = 200  # characters, if the output is not a terminal
SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~&])")
STYLES = {"ok": "green", "warning": "yellow", "fail": "bold red", "unknown": "dim"}


class Terminal(Console):
    """Rich console on standard output or ``file`` that makes control characters of text visible.

    This package uses no other console. Cells of a table must be `visible` already, because rich measures their width.
    """

    @property
    def file(self) -> IO[str]:
        """Output stream."""
        return raw_stream(self._file or sys.stdout)

    @file.setter
    def file(self, new_file: IO[str]) -> None:
        self._file = new_file

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render segments without hyperlinks and without control characters of the text."""
        for segment in super().render(renderable, options):
            if segment.control:
                yield segment
            else:
                style = segment.style.update_link(None) if segment.style and segment.style.link else segment.style
                yield Segment(visible(segment.text), style)


@dataclass(frozen=True)
class Table:
    """Table with a title, headings, rows and notes below."""

    title: str
    headings: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        """Return the table as Markdown, with its title as a heading."""
        lines = [f"## {escaped(self.title)}", ""] if self.title else []
        if self.rows:
            lines += [_row(self.headings), _row(["---"] * len(self.headings), plain=True), *map(_row, self.rows), ""]
        lines += [f"{escaped(note)}\n" for note in self.notes]
        return "\n".join(lines)


def _row(cells: list[str], plain: bool = False) -> str:
    return f"| {' | '.join(cells if plain else map(escaped, cells))} |"


def escaped(text: str) -> str:
    """Redact text and escape it for Markdown, on one line."""
    return SPECIAL.sub(r"\\\1", " ".join(redact(text).split()))


def rich_table(headings: list[str], rows: list[list[str]]) -> RichTable:
    """Return a rich table with coloured statuses."""
    grid = RichTable(*headings, box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for column in grid.columns:
        column.overflow = "fold"
    for row in rows:  # `visible` before rich measures the columns
        grid.add_row(*(Text(visible(cell), style=STYLES.get(cell, "")) for cell in row))
    return grid


def print_table(table: Table) -> None:
    """Print a table, at most as wide as the terminal, or 200 characters in a log."""
    console = Terminal(highlight=False, markup=False)
    if not sys.stdout.isatty():
        console.width = WIDTH_ELSEWHERE
    if table.title:
        console.print(Text(table.title, style="bold"))
    if table.rows:
        console.print(rich_table(table.headings, table.rows))
    for note in table.notes:
        console.print(Text(note, style="dim"), soft_wrap=True)
