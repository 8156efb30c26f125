"""Counts of files read by format and of files skipped by reason, for the manifest and the console."""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from restomod.data.documents import AnyDocument, Document, LongDocument
from restomod.data.file_format import FileFormat, ending
from restomod.data.manifest import READ
from restomod.data.tokenizer import END_OF_TEXT_LITERAL
from restomod.utils.text import counted

AS_TEXT = "plain text (JSON without the text field)"
ADVICE = (
    "if it separates documents, add --separator '<|endoftext|>', which splits plain text files there; in JSON, CSV or "
    "Parquet make a record of each document"
)
TO_MEND = ("broken link", "unreadable folder")


class ReadCounts:
    """Counts of files read and skipped, and of separators."""

    def __init__(self) -> None:
        self.files: dict[str, collections.Counter[str]] = {}
        """Number of files by format and ending."""
        self.bytes: collections.Counter[str] = collections.Counter()
        """Size of the files as stored, by format."""
        self.left_out: collections.Counter[str] = collections.Counter()
        """Number of files (or folders) skipped, by reason."""
        self.separators: int | None = None
        """Occurrences of --separator in plain text; None: not asked for."""
        self._literals = 0
        self._long_literals: dict[str, int] = {}

    def count_file(self, path: Path, found: FileFormat) -> None:
        """Count a file."""
        kind = AS_TEXT if found.as_text else found.kind
        self.files.setdefault(kind, collections.Counter())[ending(path)] += 1
        self.bytes[kind] += path.stat().st_size

    def count(self, document: AnyDocument) -> AnyDocument:
        """Count the literal ``<|endoftext|>`` in a document; in a long one while its text is read."""
        if isinstance(document, Document):
            self._literals += document.text.count(END_OF_TEXT_LITERAL)
            return document
        return LongDocument(document.name, functools.partial(self._counted, document.name, document.parts))

    def _counted(self, name: str, parts: Callable[[], Iterator[str]]) -> Iterator[str]:
        found, end = 0, ""
        for part in parts():
            joined = end + part
            found += joined.count(END_OF_TEXT_LITERAL)
            end = joined[1 - len(END_OF_TEXT_LITERAL) :]  # one may stand across two parts
            yield part
        self._long_literals[name] = found  # once, however often it is read

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, without counts of zero."""
        literals = self._literals + sum(self._long_literals.values())
        values = {
            "files": {kind: dict(sorted(endings.items())) for kind, endings in sorted(self.files.items())},
            "bytes": dict(sorted(self.bytes.items())),
            "left_out": dict(sorted(self.left_out.items())),
            "end_of_text_literals": literals,
        }
        separators = {} if self.separators is None else {"separators": self.separators}
        return {key: value for key, value in values.items() if value} | separators


def summary_rows(manifest: dict[str, Any]) -> list[tuple[str, str]]:
    """A manifest's counts of what was read, as (heading, text) rows, warnings last; none for published shards."""
    read = manifest.get(READ) or {}
    files, sizes, left_out = read.get("files", {}), read.get("bytes", {}), read.get("left_out", {})
    rows = []
    if files:
        rows.append(("read", ", ".join(_of_kind(kind, endings, sizes.get(kind, 0)) for kind, endings in files.items())))
    if left_out:
        n = sum(left_out.values())
        rows.append(("left out", f"{counted(n, 'file')} or {'folder' if n == 1 else 'folders'}: {_counts(left_out)}"))
    if literals := read.get("end_of_text_literals", 0):
        rows.append(("warning", f"the text holds <|endoftext|> {counted(literals, 'time')} as characters; {ADVICE}"))
    if read.get("separators") == 0:
        rows.append(("warning", "the separator does not occur in any plain text file, so nothing was split"))
    if list(files) == [AS_TEXT]:
        rows.append(
            ("warning", "this JSON is used as plain text; to use the text of a field, name it with --text-column")
        )
    if lost := {what: left_out[what] for what in TO_MEND if what in left_out}:
        rows.append(("warning", f"files may be missing: {_counts(lost)}"))
    return rows


def summary_lines(manifest: dict[str, Any]) -> list[str]:
    """`summary_rows` as lines."""
    return [f"{heading}: {text}" for heading, text in summary_rows(manifest)]


def _of_kind(kind: str, endings: dict[str, int], size: int) -> str:
    of = next(iter(endings)) if len(endings) == 1 else _counts(endings)
    return f"{counted(sum(endings.values()), 'file')} as {kind} ({of}, {size:,} bytes)"


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{what} {n:,}" for what, n in counts.items())
