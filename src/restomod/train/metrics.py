"""A run's numbers, one JSON object per line, on disk as soon as they are known.

`metrics.jsonl` holds these kinds of records: "train" (step s: the loss under the weights after s updates, before update
s is applied), "val" (step s: the held-out loss under those same weights), "task" (the same, of a task that was asked),
and "rollback" (step s: the run goes back). Each says at which time it was known, in seconds since 1970.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from restomod.files import open_to_append, write_bytes_atomically

Record = dict[str, Any]


def append_jsonl(path: Path, record: dict[str, Any]) -> None:
    """Add one record to the end of a `.jsonl` file; nothing of it where that fails.

    Raises:
        OSError: the disk is full, or refuses.
    """
    line = json.dumps(record).encode() + b"\n"
    with open_to_append(path) as f:
        end = f.seek(0, os.SEEK_END)
        try:
            while line:  # a disk that is nearly full takes a part
                line = line[f.write(line) :]
        except OSError:
            f.truncate(end)
            raise


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The records of a `.jsonl` file; none if there is no file, and without the lines that are damaged."""
    return list(iterate_jsonl(path))


def iterate_jsonl(path: Path, warn: Callable[[str], None] | None = None) -> Iterator[Record]:
    """Yield the records of a `.jsonl` file one by one; together, those of a long run take a gigabyte.

    Args:
        path: the file.
        warn: told at the end how many lines are damaged, if any are. A last line that a crash has cut short is no
            damage: what it said is done and logged again.
    """
    bad: list[int] = []
    number = 0
    if path.exists():
        with open(path, "rb") as f:
            for number, line in enumerate(f, 1):
                record = _parsed(line)
                if type((record or {}).get("step")) is not int and line.strip() and line.endswith(b"\n"):
                    bad.append(number)
                if record is not None:
                    yield record
    if bad and warn is not None:
        warn(f"{path}: {len(bad)} of {number} lines cannot be read and are skipped; the first is line {bad[0]}")


class NewRecords:
    """Reads a `.jsonl` file that grows: each time what has been added since, however long the file is.

    Args:
        path: need not be there yet.
        containing: lines without these bytes are passed over unread.
    """

    def __init__(self, path: Path, containing: bytes = b"") -> None:
        self._path, self._containing = path, containing
        self._end = 0  # of what has been read, in bytes
        self._last = b""  # the line before that: whether the file has been replaced meanwhile

    def read(self) -> tuple[bool, Iterator[Record]]:
        """Whether the file has to be read from its beginning, as the first time, and the new records.

        A last line without an end is left for the next time: it may be half written.
        """
        if self._end and not self._goes_on():
            self._end, self._last = 0, b""
        return self._end == 0, self._new()

    def _goes_on(self) -> bool:
        try:
            with open(self._path, "rb") as f:
                f.seek(self._end - len(self._last))
                return f.read(len(self._last)) == self._last
        except FileNotFoundError:
            return False

    def _new(self) -> Iterator[Record]:
        if not self._path.exists():
            return
        with open(self._path, "rb") as f:
            f.seek(self._end)
            for line in f:
                if not line.endswith(b"\n"):
                    return
                self._end, self._last = self._end + len(line), line
                if self._containing in line and (record := _parsed(line)) is not None:
                    yield record


class HeldoutLosses:
    """The held-out losses of a run while it goes on; each call reads only what is new."""

    def __init__(self, run: Path) -> None:
        self._records = NewRecords(run / "metrics.jsonl", containing=b'"val"')
        self._losses: dict[int, float] = {}

    def read(self) -> dict[int, float]:
        """The finite held-out losses by step."""
        fresh, records = self._records.read()
        if fresh:
            self._losses.clear()
        for record in records:
            step, loss = record.get("step"), record.get("loss")
            if record.get("kind") != "val" or not isinstance(step, int) or not isinstance(loss, float):
                continue
            if math.isfinite(loss):
                self._losses[step] = loss
        return self._losses

    def after_start(self) -> dict[int, float]:
        """The finite held-out losses by step, without step 0."""
        return {step: loss for step, loss in self.read().items() if step > 0}


def keep_records(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Rewrite a `.jsonl` file with only the records that ``keep`` wants, and the damaged lines among them."""
    if not path.exists():
        return
    kept: list[bytes] = []
    whole = 0
    with open(path, "rb") as f:
        for line in f:
            record = _parsed(line)
            if record is None or keep(record):
                kept.append(line if line.endswith(b"\n") else line + b"\n")
                whole = len(kept) if record is not None else whole
    write_bytes_atomically(path, b"".join(kept[:whole]), path.parent)


def _parsed(line: bytes) -> dict[str, Any] | None:
    """The record of a line; None where it is not JSON, not UTF-8, or no object."""
    with contextlib.suppress(ValueError, RecursionError):
        record = json.loads(line)
        # json makes the keys anew in each line: half of what a long run's records would need
        return {sys.intern(key): value for key, value in record.items()} if isinstance(record, dict) else None
    return None
