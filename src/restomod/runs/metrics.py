"""Metrics of a run: writing and reading of `.jsonl` files, one JSON object per line.

Kinds of records in `metrics.jsonl`:

- "train": training loss at step s, of the weights after s updates, before the next
- "val": validation loss of the same weights
- "task": metrics of an evaluation task
- "rollback": return to step s

Every record has a time, in seconds since 1970.
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
"""Line of a `.jsonl` file; its known keys have the types of `MetricsRecord` or `SampleRecord`."""

MAX_LINE = 2**20  # bytes; a record has a few hundred
MAX_SKIPPED = 2**28  # bytes; longer lines are skipped up to this length, then the file is refused
TOO_LONG = b"\0"  # placeholder for a skipped line

Seconds = Annotated[float, Field(ge=-1e12, le=1e12)]
Milliseconds = Annotated[float, Field(ge=0, le=1e12)]


class MetricsRecord(TypedDict, total=False):
    """Record of `metrics.jsonl`; values of type ``float`` may be NaN or infinite."""

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
    """Record of `samples.jsonl`."""

    step: Count
    prompt: str
    text: str


TASK_RESULT = dict[str, float | str | None]  # a "task" record also has a key per metric


def append_jsonl(path: Path, record: dict[str, Any]) -> None:
    """Append a record to a `.jsonl` file; a write that fails with OSError leaves the file unchanged."""
    line = json.dumps(record).encode() + b"\n"
    with open_to_append(path) as f:
        end = f.seek(0, os.SEEK_END)
        try:
            while line:  # a nearly full disk may write only a part
                line = line[f.write(line) :]
        except OSError:
            f.truncate(end)
            raise


def read_jsonl(path: Path, kind: Any = MetricsRecord) -> list[Record]:
    """Read all valid records of a `.jsonl` file; return an empty list if the file does not exist."""
    return list(iterate_jsonl(path, kind=kind))


def iterate_jsonl(path: Path, warn: Callable[[str], None] | None = None, kind: Any = MetricsRecord) -> Iterator[Record]:
    """Yield the records of a `.jsonl` file one by one, because those of a long run take a gigabyte of memory.

    Args:
        path: path of the file, which may be missing.
        warn: function called at the end with a message about damaged lines (no JSON, wrong types, or too long). An
            incomplete last line is ignored: a resumed run repeats and logs its step.
        kind: `MetricsRecord` or `SampleRecord`.

    Raises:
        UserError: the path is not a regular file, or a line has more than `MAX_SKIPPED` bytes.
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
    """Yield each line and its size in bytes; `TOO_LONG` replaces lines of more than `MAX_LINE` bytes."""
    while line := f.readline(MAX_LINE):
        size = len(line)
        if size == MAX_LINE and not line.endswith(b"\n"):
            while (more := f.readline(MAX_LINE)) and not more.endswith(b"\n"):
                size += len(more)
                if size > MAX_SKIPPED:
                    raise UserError(f"{f.name} is not a file of records: a line has more than {MAX_SKIPPED:,} bytes")
            size += len(more)
            line = TOO_LONG + more[-1:]
        yield line, size


class NewRecords:
    """Incremental reader of a growing `.jsonl` file: each call reads only the new lines.

    Args:
        path: path of the file.
        containing: bytes that a line must contain; other lines are skipped without parsing.
    """

    def __init__(self, path: Path, containing: bytes = b"") -> None:
        self._path, self._containing = path, containing
        self._end = 0  # bytes read so far
        self._last = b""  # last line read; if it has changed, the file was rewritten

    def read(self) -> tuple[bool, Iterator[Record]]:
        """Read the new records.

        A last line without a newline may be incomplete; the next call reads it.

        Returns:
            True if the file is read from its start (first call, or rewritten file), and the records.
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
    """Validation losses of a run in progress, read incrementally from `metrics.jsonl`."""

    def __init__(self, run: Path) -> None:
        self._records = NewRecords(run / "metrics.jsonl", containing=b'"val"')
        self._losses: dict[int, float] = {}

    def read(self) -> dict[int, float]:
        """Return the finite validation losses by step."""
        fresh, records = self._records.read()
        if fresh:
            self._losses.clear()
        for record in records:
            loss = record.get("loss")
            if record["kind"] == "val" and loss is not None and math.isfinite(loss):
                self._losses[record["step"]] = loss
        return self._losses

    def after_start(self) -> dict[int, float]:
        """Return the finite validation losses by step, without step 0."""
        return {step: loss for step, loss in self.read().items() if step > 0}


def keep_records(path: Path, keep: Callable[[Record], bool], kind: Any = MetricsRecord) -> None:
    """Rewrite a `.jsonl` file atomically with selected records.

    Damaged lines before the last kept record stay. Lines of more than `MAX_LINE` bytes are dropped.

    Args:
        path: path of the file, which may be missing.
        keep: predicate that is true for the records to keep.
        kind: `MetricsRecord` or `SampleRecord`.
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
    """Parse a line; return None if it is not JSON or has wrong types."""
    record: Record | None = parse_line(line, kind)
    if record is not None and record.get("kind") == "task":
        others = parse_line(line, TASK_RESULT)
        return others and others | record
    return record
