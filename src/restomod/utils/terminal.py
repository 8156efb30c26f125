"""rich's console: its own colours and cursor movements pass, control characters of the text do not."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import IO

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from restomod.utils.output import raw_stream
from restomod.utils.text import visible


class Terminal(Console):
    """Standard output, or the ``file`` given. The only console to use: a plain one shows its colours as characters.

    Cells of a table should be `visible` before: rich takes the width of a column from the text that it is given.
    """

    @property
    def file(self) -> IO[str]:
        return raw_stream(self._file or sys.stdout)

    @file.setter
    def file(self, new_file: IO[str]) -> None:
        self._file = new_file

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """What rich makes of something, in pieces; links of a terminal are left out."""
        for segment in super().render(renderable, options):
            if segment.control:
                yield segment
            else:
                style = segment.style.update_link(None) if segment.style and segment.style.link else segment.style
                yield Segment(visible(segment.text), style)
