"""Printing with rich: a console that text cannot steer, and tables for the terminal and for Markdown."""

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

WIDTH_ELSEWHERE = 200  # characters, where the output is no terminal
SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~&])")
STYLES = {"ok": "green", "warning": "yellow", "fail": "bold red", "unknown": "dim"}


class Terminal(Console):
    """A console on standard output, or on ``file``: rich's own colours pass, control characters of the text do not.

    The only console to use. Cells of a table must be `visible` already, because rich measures columns by them.
    """

    @property
    def file(self) -> IO[str]:
        return raw_stream(self._file or sys.stdout)

    @file.setter
    def file(self, new_file: IO[str]) -> None:
        self._file = new_file

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render in segments, without control characters of the text and without hyperlinks."""
        for segment in super().render(renderable, options):
            if segment.control:
                yield segment
            else:
                style = segment.style.update_link(None) if segment.style and segment.style.link else segment.style
                yield Segment(visible(segment.text), style)


@dataclass(frozen=True)
class Table:
    """A title, headings, rows, and remarks below them."""

    title: str
    headings: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        """Return Markdown, with the title as a heading."""
        lines = [f"## {escaped(self.title)}", ""] if self.title else []
        if self.rows:
            lines += [_row(self.headings), _row(["---"] * len(self.headings), plain=True), *map(_row, self.rows), ""]
        lines += [f"{escaped(note)}\n" for note in self.notes]
        return "\n".join(lines)


def _row(cells: list[str], plain: bool = False) -> str:
    return f"| {' | '.join(cells if plain else map(escaped, cells))} |"


def escaped(text: str) -> str:
    """Escape text so that Markdown shows it literally, on one line, redacted."""
    return SPECIAL.sub(r"\\\1", " ".join(redact(text).split()))


def rich_table(headings: list[str], rows: list[list[str]]) -> RichTable:
    """Return a table of rich, with statuses in colour."""
    grid = RichTable(*headings, box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for column in grid.columns:
        column.overflow = "fold"
    for row in rows:  # visible here already: it gives a column its width
        grid.add_row(*(Text(visible(cell), style=STYLES.get(cell, "")) for cell in row))
    return grid


def print_table(table: Table) -> None:
    """Print a table, at most as wide as the terminal."""
    console = Terminal(highlight=False, markup=False)
    if not sys.stdout.isatty():
        console.width = WIDTH_ELSEWHERE
    if table.title:
        console.print(Text(table.title, style="bold"))
    if table.rows:
        console.print(rich_table(table.headings, table.rows))
    for note in table.notes:
        console.print(Text(note, style="dim"), soft_wrap=True)
