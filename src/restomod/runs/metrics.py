"""A run's metrics: one JSON object per line, written immediately.

Kinds of records in `metrics.jsonl`: "train" (step s: the loss of the weights after s updates, before the next), "val"
(the validation loss of the same weights), "task" (metrics of a task), and "rollback" (the run rolls back to step s).
Each has its time, in seconds since 1970.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Required

from pydantic import Field
from typing_extensions import TypedDict

from restomod.data.manifest import Count
from restomod.utils.errors import UserError
from restomod.utils.files import open_to_append, require_regular, write_bytes_atomically
from restomod.utils.json_files import parse_line

Record = dict[str, Any]
"""A line of a `.jsonl` file, whose known keys are of the types of `MetricsRecord` or `SampleRecord`."""

MAX_LINE = 2**20  # bytes; a line of records has some hundred
MAX_SKIPPED = 2**28  # bytes of a line that is too long; beyond, the file is none of records
TOO_LONG = b"\0"  # stands for such a line

Seconds = Annotated[float, Field(ge=-1e12, le=1e12)]
Milliseconds = Annotated[float, Field(ge=0, le=1e12)]


class MetricsRecord(TypedDict, total=False):
    """A record of `metrics.jsonl`; what may be NaN or infinite is of the type ``float``."""

    kind: Required[str]
    step: Required[Count]
    time: Seconds | None
    loss: float | None
    lr: float | None
    grad_norm: float | None
    ms: Milliseconds | None
    data_ms: Milliseconds | None
    tokens_per_second: float | None
    mfu: float | None
    skipped: str
    tokens: Count | None
    sources: dict[str, float | None]
    task: str
    examples: Count | None
    failed_step: Count
    data_offset: Count


class SampleRecord(TypedDict):
    """A record of `samples.jsonl`."""

    step: Count
    prompt: str
    text: str


TASK_RESULT = dict[str, float | str | None]  # a "task" record, which has keys by the names of metrics, too


def append_jsonl(path: Path, record: dict[str, Any]) -> None:
    """Append a record to a `.jsonl` file; where the disk refuses it (OSError), no part of it stays."""
    line = json.dumps(record).encode() + b"\n"
    with open_to_append(path) as f:
        end = f.seek(0, os.SEEK_END)
        try:
            while line:  # a disk that is nearly full takes a part
                line = line[f.write(line) :]
        except OSError:
            f.truncate(end)
            raise


def read_jsonl(path: Path, kind: Any = MetricsRecord) -> list[Record]:
    """All readable records of a `.jsonl` file; none if there is no file."""
    return list(iterate_jsonl(path, kind=kind))


def iterate_jsonl(path: Path, warn: Callable[[str], None] | None = None, kind: Any = MetricsRecord) -> Iterator[Record]:
    """Yield the records of a `.jsonl` file one by one, as those of a long run take a gigabyte.

    Args:
        path: the file.
        warn: called at the end if lines are damaged: not JSON, of other types, or too long. A last line that a crash
            has cut short does not count: its step is repeated and logged again.
        kind: `MetricsRecord` or `SampleRecord`.

    Raises:
        UserError: it is not a regular file, or has a line of more than `MAX_SKIPPED` bytes.
    """
    bad: list[int] = []
    number = 0
    if path.exists():
        with _open(path) as f:
            for number, (line, _) in enumerate(_lines(f), 1):
                record = _parsed(line, kind)
                if record is not None:
                    yield record
                elif line.strip() and line.endswith(b"\n"):
                    bad.append(number)
    if bad and warn is not None:
        warn(f"{path}: {len(bad)} of {number} lines cannot be read and are skipped; the first is line {bad[0]}")


def _open(path: Path) -> BinaryIO:
    require_regular(path)
    return open(path, "rb")


def _lines(f: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """Each line and its size in the file; `TOO_LONG` stands for a line of more than `MAX_LINE` bytes."""
    while line := f.readline(MAX_LINE):
        size = len(line)
        if size == MAX_LINE and not line.endswith(b"\n"):
            while (more := f.readline(MAX_LINE)) and not more.endswith(b"\n"):
                size += len(more)
                if size > MAX_SKIPPED:
                    raise UserError(f"{f.name} has a line of more than {MAX_SKIPPED:,} bytes: it is no file of records")
            size += len(more)
            line = TOO_LONG + more[-1:]
        yield line, size


class NewRecords:
    """Reads only new lines of a growing `.jsonl` file; skips, unparsed, those without the bytes ``containing``."""

    def __init__(self, path: Path, containing: bytes = b"") -> None:
        self._path, self._containing = path, containing
        self._end = 0  # of what has been read, in bytes
        self._last = b""  # the line before that: whether the file has been replaced meanwhile

    def read(self) -> tuple[bool, Iterator[Record]]:
        """Whether the file is read from its start (the first time, or after a rewrite), and the new records.

        A last line without a newline is left for the next time: it may be half written.
        """
        if self._end and not self._is_continued():
            self._end, self._last = 0, b""
        return self._end == 0, self._new()

    def _is_continued(self) -> bool:
        try:
            with _open(self._path) as f:
                f.seek(self._end - len(self._last))
                return f.read(len(self._last)) == self._last
        except FileNotFoundError:
            return False

    def _new(self) -> Iterator[Record]:
        if not self._path.exists():
            return
        with _open(self._path) as f:
            f.seek(self._end)
            for line, size in _lines(f):
                if not line.endswith(b"\n"):
                    return
                self._end, self._last = self._end + size, line if len(line) == size else b""
                if self._containing in line and (record := _parsed(line, MetricsRecord)) is not None:
                    yield record


class ValidationLosses:
    """The validation losses of a running run; each call reads only what is new."""

    def __init__(self, run: Path) -> None:
        self._records = NewRecords(run / "metrics.jsonl", containing=b'"val"')
        self._losses: dict[int, float] = {}

    def read(self) -> dict[int, float]:
        """The finite validation losses by step."""
        fresh, records = self._records.read()
        if fresh:
            self._losses.clear()
        for record in records:
            loss = record.get("loss")
            if record["kind"] == "val" and loss is not None and math.isfinite(loss):
                self._losses[record["step"]] = loss
        return self._losses

    def after_start(self) -> dict[int, float]:
        """The finite validation losses by step, without step 0."""
        return {step: loss for step, loss in self.read().items() if step > 0}


def keep_records(path: Path, keep: Callable[[Record], bool], kind: Any = MetricsRecord) -> None:
    """Rewrite a `.jsonl` file with only the records for which ``keep`` is true, and damaged lines among them.

    Lines that are too long for a record are dropped. ``kind`` is as for `iterate_jsonl`.
    """
    if not path.exists():
        return
    kept: list[bytes] = []
    whole = 0
    with _open(path) as f:
        for line, size in _lines(f):
            record = _parsed(line, kind)
            if size == len(line) and (record is None or keep(record)):
                kept.append(line if line.endswith(b"\n") else line + b"\n")
                whole = len(kept) if record is not None else whole
    write_bytes_atomically(path, b"".join(kept[:whole]), path.parent)


def _parsed(line: bytes, kind: Any) -> Record | None:
    """Parse a line; None if it is not JSON, or of other types."""
    record: Record | None = parse_line(line, kind)
    if record is not None and record.get("kind") == "task":
        others = parse_line(line, TASK_RESULT)
        return others and others | record
    return record
