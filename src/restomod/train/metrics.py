"""A run's numbers, one JSON object per line, on disk as soon as they are known.

`metrics.jsonl` holds these kinds of records: "train" (step s: the loss under the weights after s updates, before update
s is applied), "val" (step s: the held-out loss under those same weights), "task" (the same, of a task that was asked),
and "rollback" (step s: the run goes back). Each says at which time it was known, in seconds since 1970.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from restomod.files import write_text_atomically

Record = dict[str, Any]


def append_jsonl(path: Path, record: dict[str, Any]) -> None:
    """Add one record to the end of a `.jsonl` file; nothing of it where that fails.

    Raises:
        OSError: the disk is full, or refuses.
    """
    line = json.dumps(record).encode() + b"\n"
    with open(path, "ab", buffering=0) as f:
        end = f.seek(0, os.SEEK_END)
        try:
            while line:  # a disk that is nearly full takes a part
                line = line[f.write(line) :]
        except OSError:
            f.truncate(end)
            raise


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The records of a `.jsonl` file; none if there is no file, and without a line that a crash has damaged."""
    records = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):  # not JSON, not UTF-8
            record = json.loads(line)
            if isinstance(record, dict):
                records.append(record)
    return records


def keep_records(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Rewrite a `.jsonl` file with only the records that ``keep`` wants."""
    if path.exists():
        records = [record for record in read_jsonl(path) if keep(record)]
        write_text_atomically(path, "".join(json.dumps(record) + "\n" for record in records))
