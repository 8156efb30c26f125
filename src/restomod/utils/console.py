"""Console output of commands: tables, check results, and progress as a bar in a terminal, else a line per step."""

from __future__ import annotations

import io
import sys
import textwrap
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
from restomod.utils.text import duration

CheckStatus = Literal["pass", "warn", "fail", "skip"]
STATUS_STYLE: dict[CheckStatus, str] = {"pass": "green", "warn": "yellow", "fail": "bold red", "skip": "dim"}


@dataclass(frozen=True)
class CheckResult:
    """Result of one check of a model or a machine."""

    check: str
    status: CheckStatus
    """fail: the model cannot learn, or the machine cannot train. warn: unusual, or slow. skip: does not apply, or
    cannot run here."""
    reason: str


def format_train_record(record: dict[str, Any]) -> str:
    """Format one train record of `metrics.jsonl`."""
    mfu = f"  mfu {record['mfu']:.1%}" if record["mfu"] is not None else ""
    return (
        f"loss {record['loss']:.4f}  lr {record['lr']:.2e}  norm {record['grad_norm']:.2f}  "
        f"{record['ms']:.0f} ms/step  {record['tokens_per_second']:,.0f} tok/s{mfu}"
    )


class _Output(io.TextIOBase):
    """Standard output for rich, which also prints from a thread: exceptions go to ``fail`` and are not raised."""

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
        except Exception as e:  # a stand-in for the stream may raise anything
            self._fail(e)


class Display:
    """Prints a run: a progress bar if ``interactive``, plain lines otherwise, nothing if ``muted``.

    Where printing fails, all further output is dropped and the work continues. ``closed`` becomes true when the reader
    of standard output has left.
    """

    def __init__(self, interactive: bool | None = None, muted: bool = False) -> None:
        file = _Output(self._fail)
        self.interactive = (file.isatty() if interactive is None else interactive) and not muted
        self.muted = muted
        self.console = Terminal(file=cast(TextIO, file), highlight=False, soft_wrap=True)
        self.on_failure: Callable[[str], None] = lambda reason: None
        """Called once with the reason why nothing more is printed, unless the reader has left."""
        self._failure: Exception | None = None
        self._progress: Progress | None = None

    @property
    def closed(self) -> bool:
        """Whether the reader of standard output has left."""
        return isinstance(self._failure, BrokenPipeError)

    def require_printed(self) -> None:
        """Raise UserError if something could not be printed."""
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
        """Print (name, value) rows; values are wrapped in a terminal."""
        width = max(len(name) for name, _ in rows)
        room = max(20, self.console.width - width - 2) if self.interactive else 10_000
        for name, value in rows:
            first, *more = textwrap.wrap(value, room, break_long_words=False)
            self._print(Text.assemble((f"{name:<{width}}  ", "dim"), first))
            for line in more:
                self._print(Text(" " * (width + 2) + line))

    def grid(self, headings: list[str], rows: list[list[str]]) -> None:
        """Print a table with headings, as wide as the terminal, or as its cells outside of one."""
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
        """Print one line, above the progress bar if there is one."""
        self._print(Text(text, style=style))

    def lines(self, texts: list[str]) -> None:
        """Print several lines."""
        for text in texts:
            self.line(text)

    def start(self, first: int, steps: int) -> None:
        """Begin to show progress from step ``first`` of ``steps``."""
        self._steps = steps
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
        """Show one train record; in a narrow terminal only what fits."""
        eta = f"eta {duration(seconds_left)}"
        if self._progress is None:
            self._print(Text(f"step {record['step'] + 1}/{self._steps}  {format_train_record(record)}  {eta}"))
            return
        short = f"loss {record['loss']:.4f}  {record['tokens_per_second']:,.0f} tok/s"
        text = f"{eta}  {format_train_record(record) if self.console.width >= 120 else short}"
        self._progress.update(self._task, completed=record["step"] + 1, description=text)

    def sample(self, prompt: str, text: str) -> None:
        """Show a sample, its prompt in bold, marked at its beginning."""
        shown = Text.assemble((prompt, "bold"), text)
        for i, row in enumerate(shown.split("\n")):
            self._print(Text.assemble(("  ▸ " if i == 0 else "    ", "dim"), row))

    def stop(self) -> None:
        """Take the progress bar down."""
        if self._progress:
            self._progress.stop()
            self._progress = None
