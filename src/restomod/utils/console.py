"""Console output of commands: tables, check results, warnings, samples, progress.

In a terminal, progress is a bar, and long values and samples are wrapped at its width. In a log, lines are not wrapped,
and progress is a line at most every `LOG_SECONDS`.
"""

from __future__ import annotations

import io
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TextIO, cast

from rich.console import RenderableType
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column
from rich.text import Text

from restomod.utils import output
from restomod.utils.errors import UserError, reason
from restomod.utils.terminal import WIDTH_ELSEWHERE, Terminal, rich_table
from restomod.utils.text import duration, visible

CheckStatus = Literal["pass", "warn", "fail", "skip"]
STATUS_STYLE: dict[CheckStatus, str] = {"pass": "green", "warn": "yellow", "fail": "bold red", "skip": "dim"}
LOG_SECONDS = 10.0  # minimum time between two progress lines in a log
MIN_WIDTH = 20  # characters of a wrapped value in a narrow terminal


@dataclass(frozen=True)
class CheckResult:
    """Result of one check of a model or a machine."""

    check: str
    status: CheckStatus
    """fail: the model cannot learn, or the machine cannot train. warn: unusual or slow. skip: not applicable, or not
    possible on this machine."""
    reason: str


def format_train_record(record: dict[str, Any]) -> str:
    """Format a "train" record of `metrics.jsonl` as loss, learning rate, gradient norm, time and speed."""
    mfu = f"  mfu {record['mfu']:.1%}" if record["mfu"] is not None else ""
    return (
        f"loss {record['loss']:.4f}  lr {record['lr']:.2e}  norm {record['grad_norm']:.2f}  "
        f"{record['ms']:.0f} ms/step  {record['tokens_per_second']:,.0f} tok/s{mfu}"
    )


class _Output(io.TextIOBase):
    """Standard output for rich. Exceptions are passed to ``fail``, because rich also prints from a thread."""

    def __init__(self, fail: Callable[[Exception], None]) -> None:
        self._fail = fail

    @property
    def _stream(self) -> TextIO | None:
        return cast(TextIO | None, output.raw_stream(sys.stdout))

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self._stream, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        return output.is_open("stdout") and bool(getattr(self._stream, "isatty", lambda: False)())

    def write(self, text: str) -> int:
        self._attempt(lambda stream: stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._attempt(lambda stream: stream.flush())

    def _attempt(self, do: Callable[[TextIO], object]) -> None:
        stream = self._stream
        try:
            if stream is not None:
                do(stream)
        except Exception as e:  # a replacement of sys.stdout may raise any exception
            self._fail(e)


class Display:
    """Console output of a command, on standard output.

    If printing fails, all further output is dropped and the command continues.

    Args:
        interactive: whether to print for a terminal, with a progress bar and wrapped lines. None: if standard output
            is a terminal.
        muted: whether to print nothing.
    """

    def __init__(self, interactive: bool | None = None, muted: bool = False) -> None:
        file = _Output(self._fail)
        self.interactive = (file.isatty() if interactive is None else interactive) and not muted
        self.muted = muted
        self.console = Terminal(file=cast(TextIO, file), highlight=False, soft_wrap=True)
        self.on_failure: Callable[[str], None] = lambda reason: None
        """Callback for the first failure of standard output, with its reason; not called if the reader has exited."""
        self._failure: Exception | None = None
        self._progress: Progress | None = None

    @property
    def closed(self) -> bool:
        """Whether the reader of standard output, such as `head`, has exited."""
        return isinstance(self._failure, BrokenPipeError)

    def require_printed(self) -> None:
        """Raise UserError if printing has failed."""
        if self._failure is not None and not self.closed:
            raise UserError(f"standard output cannot be written ({reason(self._failure)})")

    def _fail(self, e: Exception) -> None:
        if self._failure is None:
            self._failure = e
            output.drop_stream("stdout")
            if not self.closed:
                self.on_failure(reason(e))

    def _print(self, text: RenderableType, soft_wrap: bool = True) -> None:
        if self._failure is None and not self.muted:
            self.console.print(text, soft_wrap=soft_wrap)
            self.console.file.flush()

    def table(self, rows: list[tuple[str, str]]) -> None:
        """Print (label, value) rows with aligned values; in a terminal, long values are wrapped."""
        width = max(len(name) for name, _ in rows)
        room = max(MIN_WIDTH, self.console.width - width - 2) if self.interactive else 10_000
        for name, value in rows:
            first, *more = textwrap.wrap(value, room, break_long_words=False, break_on_hyphens=False)
            self._print(Text.assemble((f"{name:<{width}}  ", "dim"), first))
            for line in more:
                self._print(Text(" " * (width + 2) + line))

    def grid(self, headings: list[str], rows: list[list[str]]) -> None:
        """Print a table with headings, at most as wide as the terminal; in a log, cells are not wrapped."""
        table = rich_table(headings, rows)
        for column in table.columns[1:-1]:
            column.no_wrap = True
        if not self.interactive:
            self.console.width = WIDTH_ELSEWHERE
        self._print(table, soft_wrap=False)

    def check_result(self, result: CheckResult) -> None:
        """Print the result of one check."""
        status = f"{result.status}  ", STATUS_STYLE[result.status]
        self._print(Text.assemble(status, f"{result.check:<16}  {result.reason}"))

    def line(self, text: str, style: str = "") -> None:
        """Print a line, above the progress bar; a line that begins with "warning: " is yellow."""
        self._print(Text(text, style=output.message_style(text) or style))

    def warn(self, text: str) -> None:
        """Print a warning as "warning: TEXT", in yellow."""
        self.line(f"warning: {text}")

    def lines(self, texts: list[str]) -> None:
        """Print several lines."""
        for text in texts:
            self.line(text)

    def start(self, first: int, steps: int) -> None:
        """Start to show progress from step ``first`` of ``steps``."""
        self._steps, self._logged_at = steps, -LOG_SECONDS
        if self.interactive:
            column = Column(no_wrap=True, min_width=len(f"step {steps}/{steps}"))
            columns = (
                TextColumn("step {task.completed}/{task.total}", table_column=column),
                BarColumn(12),
                TextColumn("{task.description}"),
            )
            self._progress = Progress(*columns, console=self.console, refresh_per_second=4)
            self._task = self._progress.add_task("", total=steps, completed=first)
            self._progress.start()

    def step(self, record: dict[str, Any], seconds_left: float) -> None:
        """Show the progress of a training step.

        In a log, only the first step, the last step, and a step every `LOG_SECONDS` are printed. In a narrow terminal,
        only loss and speed are shown.

        Args:
            record: "train" record of `metrics.jsonl`.
            seconds_left: estimated time until the end of the run.
        """
        eta = f"eta {duration(seconds_left)}"
        if self._progress is None:
            done, now = record["step"] + 1, time.monotonic()
            if done == self._steps or now - self._logged_at >= LOG_SECONDS:
                self._logged_at = now
                self._print(Text(f"step {done}/{self._steps}  {format_train_record(record)}  {eta}"))
            return
        short = f"loss {record['loss']:.4f}  {record['tokens_per_second']:,.0f} tok/s"
        text = f"{eta}  {format_train_record(record) if self.console.width >= 120 else short}"
        self._progress.update(self._task, completed=record["step"] + 1, description=text)

    def sample(self, prompt: str, text: str) -> None:
        """Print a prompt in bold and its continuation, with a hanging indent.

        In a terminal, long lines are wrapped between words and keep their indentation.
        """
        shown = Text.assemble((visible(prompt), "bold"), visible(text))
        rows = [part for row in shown.split("\n") for part in self._wrapped(row)]
        for i, row in enumerate(rows):
            self._print(Text.assemble(("  ▸ " if i == 0 else "    ", "dim"), row))

    def _wrapped(self, row: Text) -> list[Text]:
        """Wrap a line of a sample at the terminal's width; in a log, return it unchanged."""
        if not self.interactive:
            return [row]
        room = max(MIN_WIDTH, self.console.width - 4)
        row.expand_tabs(4)
        if row.cell_len <= room:
            return [row]
        indent = len(row.plain) - len(row.plain.lstrip())
        indent = indent if indent <= room // 2 else 0
        return [Text(" " * indent) + part for part in row[indent:].wrap(self.console, room - indent)]

    def stop(self) -> None:
        """Remove the progress bar."""
        if self._progress:
            self._progress.stop()
            self._progress = None
